#include "core/fork.hpp"

#include <pthread.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <string>

#include "core/error.hpp"

namespace tem {
namespace {

/// What an at-fork handler may touch: atomics, which need no lock that another thread held at the fork.
struct State {
  static constexpr size_t kWord = 64;
  std::atomic<uint64_t> generation{0};
  std::array<std::atomic<uint64_t>, 1024> closed_in_children{};  // a bit for each descriptor

  std::atomic<uint64_t>* word(int descriptor) {
    const size_t index = static_cast<size_t>(descriptor) / kWord;
    return index < closed_in_children.size() ? &closed_in_children[index] : nullptr;
  }
  static uint64_t bit(int descriptor) { return uint64_t{1} << (static_cast<size_t>(descriptor) % kWord); }

  void in_child() {
    generation.fetch_add(1, std::memory_order_relaxed);
    for (size_t i = 0; i < closed_in_children.size(); ++i) {
      for (uint64_t bits = closed_in_children[i].exchange(0); bits != 0; bits &= bits - 1)
        ::close(static_cast<int>(i * kWord) + __builtin_ctzll(bits));
    }
  }
};

State& state() noexcept {
  // Leaked: an at-fork handler may run while static destructors do.
  static auto* const made = [] {
    auto* fresh = new State;
    pthread_atfork(nullptr, nullptr, [] { state().in_child(); });
    return fresh;
  }();
  return *made;
}

}  // namespace

uint64_t fork_generation() noexcept { return state().generation.load(std::memory_order_relaxed); }

bool close_in_children(int descriptor) noexcept {
  std::atomic<uint64_t>* const word = state().word(descriptor);
  if (word != nullptr) word->fetch_or(State::bit(descriptor));
  return word != nullptr;
}

void leave_to_children(int descriptor) noexcept {
  state().word(descriptor)->fetch_and(~State::bit(descriptor));
}

void BornHere::check(const char* what) const {
  if (here()) return;
  throw Error(Kind::kForked,
              std::string(what) +
                  " was made before fork() and cannot be used in the child; make a new one there, or "
                  "start the child with the 'spawn' method");
}

}  // namespace tem
