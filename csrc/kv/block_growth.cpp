// How a block range grows: what is missing, which extents to put there, and the two steps in which it is
// done.
#include <algorithm>
#include <optional>

#include "core/error.hpp"
#include "core/sizes.hpp"
#include "kv/block_range.hpp"

namespace tem {

std::vector<Piece> BlockRange::missing(const std::vector<Block>& blocks) const {
  std::vector<size_t> granules;
  for (const Block block : blocks) {
    for (size_t granule = first_granule(block); granule <= last_granule(block); ++granule) {
      if (slot_of_[granule] == kAbsent) granules.push_back(granule);
    }
  }
  if (!std::is_sorted(granules.begin(), granules.end())) std::sort(granules.begin(), granules.end());
  granules.erase(std::unique(granules.begin(), granules.end()), granules.end());
  std::vector<Piece> runs;
  for (const size_t granule : granules) {
    const size_t offset = granule * granularity_;
    if (!runs.empty() && runs.back().end() == offset) {
      runs.back().bytes += granularity_;
    } else {
      runs.push_back({offset, granularity_});
    }
  }
  return runs;
}

bool BlockRange::absent(Piece piece) const {
  const auto first = slot_of_.begin() + static_cast<std::ptrdiff_t>(piece.offset / granularity_);
  const auto last = slot_of_.begin() + static_cast<std::ptrdiff_t>(piece.end() / granularity_);
  return std::all_of(first, last, [](int32_t slot) { return slot == kAbsent; });
}

std::vector<Piece> BlockRange::extents_for(const std::vector<Piece>& runs, bool ahead) const {
  const size_t unit = ahead ? ahead_extent(mapped_, granularity_) : granularity_;
  std::vector<Piece> wide;
  for (const Piece& run : runs) {
    const size_t begin = round_down(run.offset, unit);
    const Piece whole{begin, std::min(round_up(run.end(), unit), bytes()) - begin};
    const Piece chosen = absent(whole) ? whole : run;
    if (!wide.empty() && wide.back().end() >= chosen.end()) continue;  // inside what the run before it took
    wide.push_back(chosen);
    if (wide.size() > 1 && wide[wide.size() - 2].end() > chosen.offset) {
      Piece& last = wide.back();
      last = {wide[wide.size() - 2].end(), chosen.end() - wide[wide.size() - 2].end()};
    }
  }
  std::vector<Piece> extents;
  for (const Piece& run : wide)
    cover(run, geometry_.extent_bytes != 0 ? geometry_.extent_bytes : kMaxExtent, extents);
  return extents;
}

std::vector<Place> BlockRange::places(const std::vector<Piece>& extents) const {
  std::vector<Place> out;
  out.reserve(extents.size() * stripes_.size());
  for (const auto& stripe : stripes_) {
    for (const Piece& piece : extents) out.push_back({stripe.get(), piece});
  }
  return out;
}

void BlockRange::grow(const std::vector<Block>& blocks, Stream stream, Deadline deadline, Rung dearest) {
  const std::shared_ptr<Arena> arena = this->arena();
  const auto bytes_of = [this](const std::vector<Piece>& extents) {
    size_t sum = 0;
    for (const Piece& piece : extents) sum += piece.bytes;
    return sum * stripes_.size();
  };
  for (;;) {
    size_t exact = 0;
    size_t ahead = 0;
    std::vector<Piece> runs;
    uint64_t seen = 0;
    {
      const Guard guard(mutex_);
      if (hold_resident(blocks)) return;
      runs = missing(blocks);
      seen = generation_;
      exact = bytes_of(extents_for(runs, false));
      ahead = geometry_.extent_bytes != 0 ? exact : bytes_of(extents_for(runs, true));
    }
    // Beyond need only from what is free: nobody yields for growth ahead.
    std::optional<Grant> grant = ahead > exact ? arena->acquire_free(account_, ahead) : std::nullopt;
    const bool generous = grant.has_value();
    if (!generous) grant.emplace(arena->acquire(account_, exact, deadline, dearest, nullptr, dearest));

    const Arena::Lock lock = arena->lock();
    std::vector<Piece> extents;
    {
      const Guard guard(mutex_);
      if (!arena_) throw Error(Kind::kClosed, name_ + " was closed while it grew");
      if (seen != generation_) {
        if (hold_resident(blocks)) return;
        runs = missing(blocks);
      }
      extents = extents_for(runs, generous);
    }
    if (bytes_of(extents) > grant->bytes()) continue;  // what was resident has gone meanwhile
    arena->map(lock, *grant, places(extents), writer_, stream);
    const Guard guard(mutex_);
    for (const Piece& piece : extents) add_slot(piece);
    hold_resident(blocks);
    return;
  }
}

}  // namespace tem
