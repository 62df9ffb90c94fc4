// How a bare pointer finds its heap, and a thread what it allocates from.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "alloc/heap.hpp"

namespace tem {

class Directory {
 public:
  void add(Address base, size_t bytes, Heap* heap);
  void remove(const Heap* heap);
  /// Lock-free. A heap must not be closed while a block of it is being freed.
  Heap* owner(const void* block) const noexcept {
    const auto at = reinterpret_cast<Address>(block);
    for (const Entry& entry : *entries_.load(std::memory_order_acquire)) {
      if (at - entry.base < entry.bytes) return entry.heap;
    }
    return nullptr;
  }

 private:
  struct Entry {
    Address base;
    size_t bytes;
    Heap* heap;
  };
  using Entries = std::vector<Entry>;

  std::mutex mutex_;  // of writers
  std::atomic<const Entries*> entries_{new Entries};
  // Readers may hold any of them: all stay. Heaps are few.
  std::vector<std::unique_ptr<const Entries>> replaced_;
};

/// The directory of this process. Leaked: blocks are freed while static destructors run.
Directory& directory();

}  // namespace tem
