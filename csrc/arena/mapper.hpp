// All that touches mappings: places extents under addresses and takes them away, all or nothing. Knows no
// account and no lease. Guarded by the arena's lock; holding it across driver calls costs nothing, because
// the driver serialises them anyway.
#pragma once

#include <cstddef>
#include <vector>

#include "arena/extent_pool.hpp"
#include "arena/range.hpp"

namespace tem {

/// Who wrote to an extent last; a tenant's number.
using WriterId = AccountId;

class Mapper {
 public:
  explicit Mapper(Device& device) : device_(device) {}

  /// Physical bytes that may exist at once, spares included.
  void set_budget(size_t bytes) { budget_ = bytes; }
  const ExtentPool& spare() const { return spare_; }

  /// Maps an extent at every place and makes it accessible; memory another writer used is zeroed on `stream`.
  /// If any call fails, every mapping is as before and the error goes on. A device that is full may cost
  /// spares.
  void map(const std::vector<Place>& places, WriterId writer, Stream stream);

  /// Unmaps the extents at `places` into the spares; exported ones are released. If any call fails, all of
  /// them are mapped as before.
  void unmap(const std::vector<Place>& places);

  /// A descriptor of the extent that is mapped at a place.
  Fd export_fd(const Place& place, Access access) {
    return place.range->mappings_.at(place.piece.offset).export_fd(access);
  }

  /// Opens all that is mapped in a range to the device and its peers, anew.
  void allow(const Range& range);

  /// Releases spares beyond `keep` bytes. A refusing driver leaves the rest spare and throws.
  void shrink_spare(size_t keep) { spare_.shrink_to(keep); }

  /// Lets spares beyond `keep` bytes go to another process, the largest first, none in part. A refusing
  /// driver costs what it refuses, and throws.
  void pass_spare(size_t keep, Passing& passing);

  /// Has descriptors at hand for what is mapped at the top of a range, where tenants give first: of so many
  /// extents. Makes one of those that are missing; false if there is nothing left to make.
  bool make_ready(Range& range, size_t extents);

  /// Takes over as spares what another process has passed on; what the driver refuses goes to the device.
  void receive(std::vector<Passed> passed) noexcept;

  /// Creates one spare extent, at the cost of no other.
  void add_spare(size_t bytes) { spare_.put(Extent(device_, bytes)); }

 private:
  struct Taken {
    Extent extent;
    bool was_spare = false;
  };

  Taken take(size_t bytes);
  Extent create(size_t bytes);
  void put_back(std::vector<Taken>& taken) noexcept;
  bool drain(Stream stream) noexcept;
  void zero_foreign(const std::vector<Place>& places, const std::vector<Mapping>& made, WriterId writer,
                    Stream stream);

  Device& device_;
  ExtentPool spare_;
  size_t budget_ = SIZE_MAX;
};

}  // namespace tem
