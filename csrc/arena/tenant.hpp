// What the arena asks of those who own ranges in it. Which bytes are idle is the tenant's own state, under
// its own lock, so that its fast path never takes the arena's. The lock order is arena, then tenant: a tenant
// never calls the arena with its lock held.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "arena/range.hpp"

namespace tem {

/// Extents that leave together, and the tenant's own number for them.
struct Leaving {
  std::vector<Place> places;
  uint64_t token = 0;
  size_t bytes() const {
    size_t sum = 0;
    for (const Place& place : places) sum += place.piece.bytes;
    return sum;
  }
};

/// Bytes of a tenant's extents on which nothing lives.
struct Idle {
  size_t ready = 0;    // fence passed
  size_t pending = 0;  // fence not passed yet
  size_t kept = 0;     // of both, what the tenant wants to keep until somebody needs it
};

class Tenant {
 public:
  virtual ~Tenant() = default;

  virtual std::string name() const = 0;
  /// All it owns; they never change.
  virtual std::vector<Range*> ranges() = 0;
  virtual Idle idle() = 0;
  /// True while idle extents that are not kept are mapped. A fence may pass between a trim and this question,
  /// so one that has passed counts as well: whoever asks would sleep over it.
  virtual bool waiting() = 0;

  /// Takes idle extents whose fence has passed out of use: at least `bytes` if there are that many, never
  /// more than `most`, and only what is not kept unless `kept` is set. Called with the arena's lock held: no
  /// driver call, no wait, no arena.
  virtual void trim(size_t bytes, size_t most, bool kept, std::vector<Leaving>& out) = 0;

  /// The driver refused to unmap them: they are idle as before.
  virtual void stay(const Leaving& leaving) = 0;
};

}  // namespace tem
