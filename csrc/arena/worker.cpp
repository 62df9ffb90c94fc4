// The arena's thread: it keeps warm extents at hand and takes back what was waiting for a fence, so that
// neither a burst nor an idle tenant's memory waits for somebody's next call. Started when there is first
// something to do.
#include <system_error>
#include <utility>

#include "arena/arena.hpp"
#include "core/error.hpp"

namespace tem {
namespace {

constexpr auto kFenceTick = std::chrono::milliseconds(1);

}  // namespace

void Arena::start_worker() {
  if (worker_ || stopping_) return;
  try {
    worker_ = std::make_unique<std::thread>([this] { work(); });
  } catch (const std::system_error& error) {
    // A process that may have no more threads: what waits for a fence goes with the next call that looks.
    note_fault(Error(Kind::kDriver, std::string("the arena's thread does not start: ") + error.what()));
  }
}

void Arena::wake_worker() {
  nudged_ = true;
  wake_.notify_one();
}

void Arena::stop_worker() noexcept {
  std::unique_ptr<std::thread> worker;
  {
    const Lock lock(mutex_);
    stopping_ = true;
    worker = std::move(worker_);
    wake_.notify_all();
  }
  if (worker) worker->join();
}

void Arena::work() {
  Lock lock(mutex_);
  while (!stopping_) {
    nudged_ = false;
    trim_idle(nullptr);
    release_excess();
    lock.unlock();
    try {
      refill();
    } catch (const Error& error) {
      // A closed arena, or a device that others have filled: a growth that needs the memory will say so to
      // its caller.
      const Lock again(mutex_);
      if (!closed_) note_fault(error);
    }
    lock.lock();
    const auto due = [this] { return stopping_ || nudged_; };
    if (anything_waits()) {
      wake_.wait_for(lock, kFenceTick, due);
    } else {
      wake_.wait(lock, due);
    }
  }
}

}  // namespace tem
