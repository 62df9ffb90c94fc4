// Blocks whose memory other processes map.
#include "alloc/heap.hpp"
#include "core/error.hpp"

namespace tem {

Heap::Share Heap::share(const void* pointer, const ShareToken& fresh) {
  born_.check(name_.c_str());
  const Guard guard(mutex_);
  const Spot spot = live_at(pointer, "sharing");
  const size_t begin = offset_of(pointer);
  const size_t bytes = spot.in_slab() ? spot.span->slab->block_bytes() : spot.span->bytes;
  Share share;
  Piece run{extents_.over(begin)->piece.offset, 0};
  extents_.touching(begin, begin + bytes, [&](const MappedExtent& extent) {
    run.bytes += extent.piece.bytes;
    share.extents.push_back(extent.piece.bytes);
  });
  share.offset = begin - run.offset;
  share.token = shared_runs_.add(begin, run, fresh);
  return share;
}

std::vector<Fd> Heap::export_fds(const ShareToken& token, size_t first, size_t most) {
  const std::shared_ptr<Arena> arena = this->arena();
  // What is not idle now stays mapped while this lock is held.
  const Arena::Lock lock = arena->lock();
  std::vector<Place> places;
  {
    const Guard guard(mutex_);
    const Piece run = shared_runs_.find(token);
    if (run.bytes == 0) throw Error(Kind::kClosed, "the block has been freed by the process that shared it");
    size_t number = 0;
    extents_.touching(run.offset, run.end(), [&](const MappedExtent& extent) {
      if (number >= first && number - first < most) places.push_back({range_.get(), extent.piece});
      ++number;
    });
  }
  std::vector<Fd> fds;
  fds.reserve(places.size());
  for (const Place& place : places) fds.push_back(arena->export_fd(lock, place));
  return fds;
}

}  // namespace tem
