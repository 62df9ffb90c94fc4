#include "alloc/allocator.hpp"

#include <algorithm>
#include <mutex>
#include <shared_mutex>
#include <vector>

#include "core/error.hpp"

namespace tem {
namespace {

/// Addresses cost nothing, and a reservation several times the device lets holes be left where they are.
constexpr size_t kAddressFactor = 4;
/// How long an allocation waits for fences of memory that is already free. malloc has nobody to ask.
constexpr double kFenceWait = 1.0;  // seconds

struct Registry {
  std::shared_mutex mutex;
  std::vector<std::shared_ptr<Allocator>> allocators;
};

/// Leaked: blocks are freed while static destructors run.
Registry& registry() {
  static auto* const made = new Registry;
  return *made;
}

}  // namespace

std::shared_ptr<Allocator> Allocator::make(std::shared_ptr<Arena> arena, AccountId account,
                                           const std::string& name) {
  std::shared_ptr<Allocator> allocator(new Allocator);
  const size_t addresses = checked_mul(arena->handles().backend->memory_info().total, kAddressFactor);
  allocator->device_ = arena->device().ordinal;
  allocator->host_ = arena->device().backend == "host";
  allocator->small_ = Heap::make(arena, account, "the small blocks of " + name, addresses);
  try {
    allocator->large_ = Heap::make(arena, account, "the large blocks of " + name, addresses);
  } catch (...) {
    allocator->small_->retire();
    throw;
  }
  Registry& all = registry();
  const std::unique_lock<std::shared_mutex> lock(all.mutex);
  all.allocators.push_back(allocator);
  return allocator;
}

void* Allocator::allocate(size_t bytes, Stream stream) {
  return (bytes <= kSmall ? *small_ : *large_).allocate(bytes, stream, deadline_in(kFenceWait));
}

void Allocator::retire() {
  if (small_->live_blocks() + large_->live_blocks() == 0) {
    small_->retire();
    large_->retire();
  } else {
    // The heap that is in use says so; the other must stay too.
    (small_->live_blocks() != 0 ? *small_ : *large_).retire();
  }
  Registry& all = registry();
  const std::unique_lock<std::shared_mutex> lock(all.mutex);
  all.allocators.erase(std::remove(all.allocators.begin(), all.allocators.end(), shared_from_this()),
                       all.allocators.end());
}

std::shared_ptr<Allocator> allocator_of(const void* pointer) {
  Registry& all = registry();
  const std::shared_lock<std::shared_mutex> lock(all.mutex);
  const auto found = std::find_if(all.allocators.begin(), all.allocators.end(),
                                  [&](const auto& allocator) { return allocator->contains(pointer); });
  return found == all.allocators.end() ? nullptr : *found;
}

}  // namespace tem
