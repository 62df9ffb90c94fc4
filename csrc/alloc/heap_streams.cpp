// Blocks that other streams use: parked when they are freed, until a mark on each of those has passed.
#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "alloc/heap.hpp"

namespace tem {
namespace {

constexpr auto kPoll = std::chrono::microseconds(50);

}  // namespace

void Heap::park(Spot spot, std::vector<Stream> streams) {
  auto made = std::make_unique<Parked>();
  Parked& parked = *made;
  parked.spot = spot;
  parked.unmarked = std::move(streams);
  parked_.emplace(&parked, std::move(made));
  ++unmarked_;
  if (spot.in_slab()) {
    Slab* slab = spot.span->slab.get();
    slab->park(spot.block);
    if (slab->deserted()) desert(slab);
  } else {
    spot.span->state = SpanState::kParked;
    stamp(spot.span);
    mark(*spot.span->lane);
  }
  if (captures_.empty()) mark_streams(parked);
}

/// An event on a stream that is captured would become a part of the graph: such streams are marked later.
void Heap::mark_streams(Parked& parked) {
  const auto queue_of = [this](Stream stream) -> Queue& {
    for (Queue& queue : queues_) {
      if (queue.stream == stream) return queue;
    }
    return queues_.emplace_back(Queue{stream, {}});
  };
  while (!parked.unmarked.empty()) {
    const Stream stream = parked.unmarked.back();
    std::unique_ptr<Mark> made;
    try {
      made = std::make_unique<Mark>(*device_, stream);
    } catch (const Error&) {
      return;
    }
    queue_of(stream).marks.emplace_back(std::move(made), &parked);
    ++parked.waits;
    parked.unmarked.pop_back();
  }
  --unmarked_;
}

/// Frees what no stream uses any more. Marks of one stream pass in their order, so that one query a stream is
/// enough to see that nothing has.
void Heap::unpark() {
  if (unmarked_ != 0 && captures_.empty()) {
    for (auto& [parked, owned] : parked_) {
      if (!parked->unmarked.empty()) mark_streams(*owned);
    }
  }
  for (Queue& queue : queues_) {
    while (!queue.marks.empty() && queue.marks.front().first->passed()) {
      Parked* parked = queue.marks.front().second;
      queue.marks.pop_front();
      if (--parked->waits == 0 && parked->unmarked.empty()) finish(parked);
    }
  }
}

void Heap::finish(Parked* parked) {
  const Spot spot = parked->spot;
  parked_.erase(parked);
  put(spot);
}

bool Heap::wait_for_streams() {
  for (;;) {
    {
      const Guard guard(mutex_);
      if (!captures_.empty()) return false;
      unpark();
      if (parked_.size() == unmarked_) return unmarked_ == 0;
      ++stats_.waits;
    }
    std::this_thread::sleep_for(kPoll);
  }
}

void Heap::empty_cache() {
  const std::shared_ptr<Arena> arena = this->arena();
  while (wait_for_streams()) {
    (void)arena->trim(account_);
    if (!comes_free()) return;
    std::this_thread::sleep_for(kPoll);
  }
  (void)arena->trim(account_);
}

}  // namespace tem
