// Descriptors of memory exist in a process's table only for moments, while they are sent or taken in. A child
// forked in such a moment would inherit them, and keep the memory for as long as it lives: so fork() waits
// for the moment to end. Order of locks: this one, then the arena's.
#pragma once

#include <mutex>

namespace tem::ipc {

/// Held while descriptors of memory are open.
class InHand {
 public:
  InHand();

 private:
  std::lock_guard<std::mutex> lock_;
};

/// Has `close_all` called, with the lock held, in every child that is forked from now on.
void on_fork(void (*close_all)());

}  // namespace tem::ipc
