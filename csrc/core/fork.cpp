#include "core/fork.hpp"

#include <pthread.h>

#include <atomic>
#include <string>

#include "core/error.hpp"

namespace tem {
namespace {

std::atomic<uint64_t>& generation() noexcept {
  // Leaked: an at-fork handler may run while static destructors do.
  static auto* const counter = [] {
    auto* made = new std::atomic<uint64_t>{0};
    pthread_atfork(nullptr, nullptr, [] { generation().fetch_add(1, std::memory_order_relaxed); });
    return made;
  }();
  return *counter;
}

}  // namespace

uint64_t fork_generation() noexcept { return generation().load(std::memory_order_relaxed); }

void BornHere::check(const char* what) const {
  if (here()) return;
  throw Error(Kind::kForked,
              std::string(what) +
                  " was made before fork() and cannot be used in the child; make a new one there, or "
                  "start the child with the 'spawn' method");
}

}  // namespace tem
