#include "ipc/leaving.hpp"

#include <algorithm>
#include <chrono>
#include <iterator>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "arena/fence.hpp"
#include "core/clock.hpp"

namespace tem::ipc {
namespace {

constexpr double kLastFences = 5.0;  // seconds
constexpr auto kFencePoll = std::chrono::microseconds(50);

struct Leaving {
  std::unique_ptr<Imported> memory;
  std::shared_ptr<Device> device;
  std::function<void()> then;
  std::shared_ptr<Mark> mark;  // null: the driver refused one, as while something is captured

  bool passed() const { return mark && mark->passed(); }
  void end() {
    memory.reset();
    if (then) then();
  }
};

struct Left {
  std::mutex mutex;  // taken last
  std::vector<Leaving> all;
};

/// Leaked: what was imported may go while static destructors run.
Left& left() {
  static auto* const made = new Left;
  return *made;
}

}  // namespace

void unmap_behind(std::unique_ptr<Imported> memory, std::shared_ptr<Device> device,
                  std::function<void()> then) noexcept {
  if (!device->born.here()) {
    (void)memory.release();  // the parent's, and its locks may be held for ever
    return;
  }
  Leaving leaving{std::move(memory), std::move(device), std::move(then), nullptr};
  leaving.mark = Mark::everything(*leaving.device);
  const Deadline deadline = deadline_in(kLastFences);
  while (leaving.mark && !leaving.passed() && Clock::now() < deadline)
    std::this_thread::sleep_for(kFencePoll);
  if (leaving.passed()) {
    leaving.end();
  } else {
    const std::lock_guard<std::mutex> guard(left().mutex);
    left().all.push_back(std::move(leaving));
  }
  unmap_what_was_left();
}

void unmap_what_was_left() {
  std::vector<Leaving> gone;
  {
    const std::lock_guard<std::mutex> guard(left().mutex);
    std::vector<Leaving>& all = left().all;
    const auto stays = [](Leaving& one) {
      if (!one.device->born.here()) return true;
      if (!one.mark) one.mark = Mark::everything(*one.device);
      return !one.passed();
    };
    const auto end = std::stable_partition(all.begin(), all.end(), stays);
    gone.assign(std::make_move_iterator(end), std::make_move_iterator(all.end()));
    all.erase(end, all.end());
  }
  for (Leaving& one : gone) one.end();
}

}  // namespace tem::ipc
