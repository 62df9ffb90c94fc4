// The thread for what takes long: reclaimers, waits for fences, changed limits.
#include <exception>
#include <utility>

#include "client/client.hpp"

namespace tem::client {

void Client::add_chore(Chore chore) {
  const Lock lock(mutex_);
  if (stopping_) return;
  chores_.push_back(std::move(chore));
  chore_.notify_one();
}

/// Starts the thread. False: the process may have no more threads. An ask is answered without one then, and
/// a changed limit waits until there is one. `worker_` is the receiving thread's until stop() has seen it
/// end.
bool Client::has_worker() {
  try {
    if (!worker_.joinable()) worker_ = std::thread([self = shared_from_this()] { self->work(); });
  } catch (const std::exception&) {
    return false;
  }
  return true;
}

void Client::work() {
  for (;;) {
    Chore chore;
    {
      Lock lock(mutex_);
      chore_.wait(lock, [this] { return stopping_ || !chores_.empty(); });
      if (stopping_) return;
      chore = std::move(chores_.front());
      chores_.pop_front();
    }
    if (const std::shared_ptr<Arena> arena = owner_.lock()) chore(*arena);
  }
}

}  // namespace tem::client
