// An account's malloc: small and large blocks in heaps of their own, so that a small block that stays does
// not hold a large extent. And the registry by which a bare pointer finds its way home.
#pragma once

#include <memory>

#include "alloc/heap.hpp"

namespace tem {

class Allocator : public std::enable_shared_from_this<Allocator> {
 public:
  static std::shared_ptr<Allocator> make(std::shared_ptr<Arena> arena, AccountId account,
                                         const std::string& name);

  /// Blocks up to this size share the small heap, as in torch's caching allocators.
  static constexpr size_t kSmall = kMiB;

  void* allocate(size_t bytes, Stream stream);
  void free(void* pointer) { heap_of(pointer).free(pointer); }
  void record_stream(void* pointer, Stream stream) { heap_of(pointer).record_stream(pointer, stream); }
  size_t live_bytes() { return small_->live_bytes() + large_->live_bytes(); }
  /// A child of fork() is served by nobody: its allocations go where they went without this package.
  bool serves_host() const { return host_ && born_.here(); }
  bool serves_cuda(int device) const { return !host_ && device_ == device && born_.here(); }
  bool contains(const void* pointer) const { return small_->contains(pointer) || large_->contains(pointer); }
  /// Error{kInUse} while blocks live.
  void retire();

 private:
  Allocator() = default;
  Heap& heap_of(const void* pointer) { return small_->contains(pointer) ? *small_ : *large_; }

  const BornHere born_;
  std::shared_ptr<Heap> small_;
  std::shared_ptr<Heap> large_;
  int device_ = 0;
  bool host_ = false;
};

/// The allocator whose addresses hold `pointer`, or null. Thread-safe.
std::shared_ptr<Allocator> allocator_of(const void* pointer);

}  // namespace tem
