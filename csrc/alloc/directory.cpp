#include "alloc/directory.hpp"

#include <algorithm>

namespace tem {

Directory& directory() {
  static auto* const made = new Directory;
  return *made;
}

void Directory::add(Address base, size_t bytes, Heap* heap) {
  const std::lock_guard<std::mutex> guard(mutex_);
  const Entries* before = entries_.load(std::memory_order_relaxed);
  auto after = std::make_unique<Entries>(*before);
  after->push_back({base, bytes, heap});
  replaced_.emplace_back(before);
  entries_.store(after.release(), std::memory_order_release);
}

void Directory::remove(const Heap* heap) {
  const std::lock_guard<std::mutex> guard(mutex_);
  const Entries* before = entries_.load(std::memory_order_relaxed);
  auto after = std::make_unique<Entries>(*before);
  after->erase(
      std::remove_if(after->begin(), after->end(), [&](const Entry& entry) { return entry.heap == heap; }),
      after->end());
  replaced_.emplace_back(before);
  entries_.store(after.release(), std::memory_order_release);
}

}  // namespace tem
