// Who grants leases from outside the process, as the arena sees it. Without one an arena shares out its
// capacity by itself.
//
// A lease grows by demand() alone: the bytes are charged by Arena::leased() before the call returns. It
// shrinks by give_back(), after the driver has released the memory, or by a yield, with which memory may be
// passed on as it is. So what exists never exceeds what is leased.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "arena/rung.hpp"
#include "core/clock.hpp"
#include "ledger/ledger.hpp"

namespace tem {

/// Demands that are granted together or not at all: the ranks of an engine that grow at once.
struct Group {
  std::string name;
  uint32_t members = 1;
  uint64_t round = 0;  // the same for one demand of each member
};

struct LeaseDemand {
  AccountId account = kNobody;
  size_t bytes = 0;            // at least
  size_t want = 0;             // at most
  size_t take = 0;             // charged to the account when the lease has come, if it covers them
  std::optional<Rung> others;  // the dearest that may be asked of others; none: free memory only
  Rung own = Rung::kTrim;      // and of this process's accounts
  Deadline deadline{};
  const Group* group = nullptr;
};

struct LeaseAnswer {
  bool taken = false;  // `take` bytes are charged
  std::string why;     // of a denial; empty if the lease has grown
};

class Upstream {
 public:
  virtual ~Upstream() = default;

  // May block, up to a deadline or a few seconds; called without the arena's lock.

  /// Returns the limits in force. Error if it is refused, or nobody answers.
  virtual Limits open(AccountId id, const std::string& name, const std::string& priority,
                      const Limits& limits) = 0;
  /// Error{kInUse} while bytes are leased to it.
  virtual void close(AccountId id) = 0;
  virtual void set_limits(AccountId id, const Limits& limits) = 0;
  virtual LeaseAnswer demand(const LeaseDemand& demand) = 0;
  /// Ends its threads; nothing is called on the arena any more. `nothing_left`: all memory has been released.
  virtual void stop(bool nothing_left) noexcept = 0;

  // Never block; called with the arena's lock.

  /// Bytes of the device that are shared out, at most: what programs outside hold comes and goes.
  virtual size_t capacity() const noexcept = 0;
  virtual void give_back(AccountId id, size_t bytes) noexcept = 0;
  /// What accounts hold, or can give, has changed.
  virtual void changed() noexcept = 0;
};

}  // namespace tem
