// A block range whose blocks are all held, as other processes are to map it.
#include "core/error.hpp"
#include "kv/block_range.hpp"

namespace tem {

std::vector<Place> BlockRange::all_places() const {
  std::vector<Place> out;
  for (size_t at = 0; at < bytes();) {
    const int32_t number = slot_of_[at / granularity_];
    if (number == kAbsent || slots_[static_cast<size_t>(number)].live == 0) {
      throw Error(Kind::kInvalid,
                  name_ + " is to be shared, and not all of it is held; ensure() every block");
    }
    const Piece piece = slots_[static_cast<size_t>(number)].piece;
    out.push_back({stripes_.front().get(), piece});
    at = piece.end();
  }
  return out;
}

std::vector<size_t> BlockRange::extents() {
  born_.check(name_.c_str());
  const Guard guard(mutex_);
  std::vector<size_t> sizes;
  for (const Place& place : all_places()) sizes.push_back(place.piece.bytes);
  return sizes;
}

std::vector<Fd> BlockRange::export_fds(size_t first, size_t count, Access access) {
  const std::shared_ptr<Arena> arena = this->arena();
  const Arena::Lock lock = arena->lock();
  const Guard guard(mutex_);
  const std::vector<Place> places = all_places();
  std::vector<Fd> fds;
  for (size_t i = first; i < std::min(places.size(), first + count); ++i) {
    fds.push_back(arena->export_fd(lock, places[i], access));
  }
  return fds;
}

}  // namespace tem
