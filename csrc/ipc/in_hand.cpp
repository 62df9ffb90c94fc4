#include "ipc/in_hand.hpp"

#include <pthread.h>

namespace tem::ipc {
namespace {

struct State {
  std::mutex mutex;
  void (*close_all)() = nullptr;
};

/// Leaked: a handler may run while static destructors do.
State& state() {
  static State* const made = [] {
    pthread_atfork([] { state().mutex.lock(); }, [] { state().mutex.unlock(); },
                   [] {
                     if (state().close_all != nullptr) state().close_all();
                     state().mutex.unlock();
                   });
    return new State;
  }();
  return *made;
}

}  // namespace

InHand::InHand() : lock_(state().mutex) {}

void on_fork(void (*close_all)()) {
  const InHand in_hand;
  state().close_all = close_all;
}

}  // namespace tem::ipc
