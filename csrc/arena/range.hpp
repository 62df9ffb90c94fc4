// A reservation and the extents now mapped in it. Guarded by the arena's lock.
#pragma once

#include <cstddef>
#include <map>

#include "arena/growth.hpp"
#include "arena/handles.hpp"

namespace tem {

class Range {
 public:
  /// `bytes` is rounded up to the device's granularity.
  Range(Device& device, size_t bytes)
      : reservation_(device, round_up(bytes, device.backend->capabilities().granularity), kMaxExtent) {}

  Address base() const { return reservation_.base(); }
  size_t bytes() const { return reservation_.bytes(); }
  bool contains(Address at) const { return reservation_.contains(at); }

  // Destroyed before the reservation: a reservation is given back empty.
 private:
  friend class Mapper;
  Reservation reservation_;
  std::map<size_t, Mapping> mappings_;  // by offset
};

/// An extent's place: where one is, or where one should be.
struct Place {
  Range* range = nullptr;
  Piece piece;
  Address at() const { return range->base() + piece.offset; }
};

}  // namespace tem
