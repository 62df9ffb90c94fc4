#include "core/fork.hpp"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <string>
#include <vector>

#include "core/error.hpp"

namespace tem {
namespace {

std::atomic<uint64_t>& generation() noexcept {
  // Leaked, as the next: an at-fork handler may run while static destructors do.
  static auto* const made = [] {
    auto* fresh = new std::atomic<uint64_t>(0);
    pthread_atfork(nullptr, nullptr, [] { generation().fetch_add(1, std::memory_order_relaxed); });
    return fresh;
  }();
  return *made;
}

struct Noted {
  std::mutex mutex;
  std::vector<bool> numbers;  // by descriptor

  void close_all() {
    for (size_t number = 0; number < numbers.size(); ++number) {
      if (numbers[number]) ::close(static_cast<int>(number));
    }
    numbers.clear();
  }
};

Noted& noted() {
  // Before a fork, handlers run in the reverse order of their registration. This lock is held over a call of
  // the driver, which is loaded before the first such call: so ours waits first, and what locks the driver
  // may take for a fork are free until then.
  static auto* const made = [] {
    auto* fresh = new Noted;
    pthread_atfork([] { noted().mutex.lock(); }, [] { noted().mutex.unlock(); },
                   [] {
                     noted().close_all();
                     noted().mutex.unlock();
                   });
    return fresh;
  }();
  return *made;
}

}  // namespace

uint64_t fork_generation() noexcept { return generation().load(std::memory_order_relaxed); }

NoFork::NoFork() : lock_(noted().mutex) {}

void NoFork::note(int descriptor) const {
  std::vector<bool>& numbers = noted().numbers;
  const auto number = static_cast<size_t>(descriptor);
  if (number >= numbers.size()) numbers.resize(number + 1);
  numbers[number] = true;
}

void NoFork::forget(int descriptor) const noexcept {
  noted().numbers[static_cast<size_t>(descriptor)] = false;
}

void BornHere::check(const char* what) const {
  if (here()) return;
  throw Error(Kind::kForked,
              std::string(what) +
                  " was made before fork() and cannot be used in the child; make a new one there, or "
                  "start the child with the 'spawn' method");
}

}  // namespace tem
