// A heap that is put away: its memory goes, under what lives too, and comes back to the same addresses.
#include <utility>
#include <vector>

#include "alloc/heap.hpp"
#include "core/error.hpp"
#include "core/sizes.hpp"

namespace tem {

void Heap::put_away() {
  born_.check(name_.c_str());
  const std::shared_ptr<Arena> arena = this->arena();
  {
    const Guard guard(mutex_);
    if (away_) return;
    if (!shared_runs_.empty()) {
      throw Error(Kind::kInUse,
                  name_ + " cannot be put away: other processes may use some of them; free those first");
    }
    std::shared_ptr<Mark> all = captures_.empty() ? Mark::everything(*device_) : nullptr;
    if (!all) {
      throw Error(Kind::kInUse,
                  name_ +
                      " cannot be put away now: the driver marks no stream, as while a graph is captured; "
                      "end the capture first");
    }
    away_ = std::move(all);
  }
  arena->collect_quietly();
}

void Heap::bring_back(Stream stream, Deadline deadline) {
  born_.check(name_.c_str());
  const std::shared_ptr<Arena> arena = this->arena();
  for (;;) {
    size_t bytes = 0;
    {
      const Guard guard(mutex_);
      if (!away_) return;
      bytes = gone_bytes_;
    }
    // One that is empty, or still waits for its fence, needs no memory.
    std::optional<Grant> grant;
    if (bytes != 0) grant.emplace(arena->acquire(account_, bytes, deadline, Rung::kPause));

    const Arena::Lock lock = arena->lock();
    std::vector<Place> places;
    {
      const Guard guard(mutex_);
      if (!away_) return;  // another thread was faster
      // What waited for its fence may have gone meanwhile.
      if (gone_bytes_ > bytes) continue;
      extents_.for_each([&](const MappedExtent& extent) {
        if (extent.gone) places.push_back({range_.get(), extent.piece});
      });
    }
    if (!places.empty()) arena->map(lock, *grant, places, writer_, stream);
    const Guard guard(mutex_);
    extents_.for_each([this](MappedExtent& extent) {
      if (std::exchange(extent.gone, false)) count_extent(extent, true);
    });
    gone_bytes_ = 0;
    away_.reset();
    return;
  }
}

/// What of a heap that is put away is still mapped: nobody keeps it.
Idle Heap::idle_away() {
  const size_t left = extents_.mapped() - gone_bytes_;
  return away_->passed() ? Idle{left, 0, 0} : Idle{0, left, 0};
}

void Heap::trim_away(size_t bytes, size_t most, std::vector<Leaving>& out) {
  if (!away_->passed()) return;
  size_t freed = 0;
  extents_.for_each([&](MappedExtent& extent) {
    if (extent.gone || freed >= bytes || extent.piece.bytes > most - freed) return;
    freed += extent.piece.bytes;
    gone_bytes_ += extent.piece.bytes;
    extent.gone = true;
    count_extent(extent, false);
    out.push_back({{{range_.get(), extent.piece}}, reinterpret_cast<uint64_t>(extent.lane)});
  });
}

/// The driver refused: the extent is mapped as before, and is tried again.
void Heap::stay_away(MappedExtent& extent) {
  extent.gone = false;
  gone_bytes_ -= extent.piece.bytes;
  count_extent(extent, true);
}

/// Of a heap that is put away: into the figures, and to the observer.
void Heap::count_extent(const MappedExtent& extent, bool came) {
  const Lane& lane = *extent.lane;
  count_segments(lane.pool.id, lane.small, 1, static_cast<int64_t>(extent.piece.bytes), came);
  tell(came ? MallocEvent::Action::kMap : MallocEvent::Action::kUnmap, address(extent.piece.offset),
       extent.piece.bytes, lane);
}

}  // namespace tem
