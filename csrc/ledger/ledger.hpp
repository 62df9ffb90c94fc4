// Who may hold how many bytes. Pure bookkeeping: no I/O, no clock, no lock, no torch. The arena keeps one
// under its lock; whoever arbitrates between processes keeps another.
//
// The limits are those of cgroup v2 memory (Documentation/admin-guide/cgroup-v2.rst), the value that of a
// Kubernetes PriorityClass. What a limit protects depends on who asks, and that is the whole policy:
//
//   pass        victims                          what may be taken from a victim
//   over high   any other account above `high`   held - high
//   lower       classes below the demander's     held - max(min, low)
//   peers       the demander's own class         held - its share, for a demander below its own share
//   protected   classes below the demander's     held - min
//   guarantee   every class                      held - min, for the part of the demand within own `min`
//
// A share is a part by weight of what a class has: what its accounts hold, what is free, and what other
// classes yield to it. Within a pass the lowest class goes first, and in it the account that is most above
// its share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace tem {

using AccountId = uint32_t;
constexpr AccountId kNobody = 0;
constexpr size_t kUnlimited = SIZE_MAX;

struct Limits {
  int64_t value = 0;  // priority: higher wins
  size_t min = 0;     // never reclaimed
  size_t low = 0;     // reclaimed only when nothing else is left
  size_t high =
      kUnlimited;  // above it the account gives first and gets nothing that others would have to yield
  size_t max = kUnlimited;  // its own out-of-memory
  double weight = 1.0;      // its part of what its class has
};

struct Holding {
  AccountId id = kNobody;
  std::string name;
  Limits limits;
  size_t held = 0;
  size_t lease = kUnlimited;  // bytes that a ledger above this one has granted to it
};

/// Bytes that `victim` should give up.
struct Ask {
  AccountId victim = kNobody;
  size_t bytes = 0;
};

/// What accounts can give at the moment; who is not named can give nothing.
using Givable = std::map<AccountId, size_t>;
/// What accounts have been asked for and have not given yet.
using Asked = std::map<AccountId, size_t>;

/// A place in the queue of demands that could not be granted at once.
using Ticket = uint64_t;

class Ledger {
 public:
  /// `reserve` bytes of `capacity` are never leased.
  Ledger(size_t capacity, size_t reserve);

  /// Error{kInvalid} for a name in use or limits that contradict each other, Error{kAdmission} for a `min`
  /// that does not fit beside those already promised.
  AccountId open(const std::string& name, const Limits& limits);
  /// Error{kInUse} while the account holds bytes.
  void close(AccountId id);
  void set_limits(AccountId id, const Limits& limits);
  /// Capacity may fall below what is leased; then nothing is granted until enough has come back (see
  /// overdrawn).
  void set_capacity(size_t capacity, size_t reserve);

  size_t capacity() const { return capacity_; }
  size_t reserve() const { return reserve_; }
  size_t leasable() const { return capacity_ - reserve_; }
  size_t leased() const { return leased_; }
  size_t free() const { return leased_ < leasable() ? leasable() - leased_ : 0; }
  size_t overdrawn() const { return leased_ > leasable() ? leased_ - leasable() : 0; }

  const Holding& at(AccountId id) const;
  const std::map<AccountId, Holding>& accounts() const { return accounts_; }

  /// A class below `value` holds bytes.
  bool holds_below(int64_t value) const;

  /// Bytes that a demand of `id` would be granted now, behind the demands that go before it.
  size_t room(AccountId id) const;
  /// Leases `bytes` to `id` if room() covers them. False leaves everything as it was.
  bool grant(AccountId id, size_t bytes);
  void set_lease(AccountId id, size_t bytes) { entry(id).lease = bytes; }
  void give_back(AccountId id, size_t bytes);
  /// Leases what `id` holds already, as known from elsewhere: also where there is no room, above `max` and
  /// ahead of the queue (see overdrawn).
  void charge(AccountId id, size_t bytes);

  /// Queues a demand: from now on freed bytes are kept for it from equal and lower classes that come later.
  Ticket enqueue(AccountId id, size_t bytes);
  /// Bytes that are missing before the demand can be granted.
  size_t shortage(Ticket ticket) const;
  /// Leases the demand's bytes and leaves the queue if nothing is missing.
  bool grant_ticket(Ticket ticket);
  void withdraw(Ticket ticket);
  /// Bytes of all queued demands.
  size_t queued() const;

  /// Whether the victim's work may be paused so that the demander gets memory. Of peers it may not, unless
  /// the demander has less than half of its share, or than its `min`: what a peer has above its share comes
  /// as its work ends, and to begin that anew would cost both.
  bool may_pause(AccountId demander, AccountId victim) const;

  /// Who should yield so that `id` gets `bytes` more, in the order to ask. May sum to less than `bytes`.
  /// Without `givable` everybody can give all that may be taken. `asked` is on its way back already, so a
  /// limit protects what is left after it.
  std::vector<Ask> plan(AccountId id, size_t bytes, const Givable* givable = nullptr,
                        const Asked* asked = nullptr) const;
  /// Who should yield so that `bytes` come back to the device: as for a demand above every class.
  std::vector<Ask> plan_shrink(size_t bytes, const Givable* givable = nullptr,
                               const Asked* asked = nullptr) const;

  /// "serving holds 3 GiB of max 4 GiB; training holds 1 GiB": for messages.
  std::string holders() const;

 private:
  struct Demand {
    AccountId id;
    size_t bytes;
    int64_t value;
  };
  struct Rule;

  const Demand& demand_at(Ticket ticket) const;
  size_t ahead_of(int64_t value, Ticket ticket) const;
  size_t room_ahead(const Holding& account, size_t ahead) const;
  double share(const Holding& account, size_t incoming) const;
  void admit(const Limits& limits, const std::string& name, AccountId replacing, size_t leasable) const;
  std::vector<Ask> collect(size_t bytes, AccountId demander, const Givable* givable, const Asked* asked,
                           const std::vector<Rule>& rules) const;
  Holding& entry(AccountId id);

  size_t capacity_;
  size_t reserve_;
  size_t leased_ = 0;
  AccountId next_id_ = 1;
  Ticket next_ticket_ = 1;
  std::map<AccountId, Holding> accounts_;
  std::map<Ticket, Demand> queue_;
};

}  // namespace tem
