// One process's memory on one device: the ledger, the mapper and the tenants, under one lock.
//
// Growth is in two steps, so that nobody waits for somebody else's yield with a lock held:
//   1. acquire() leases bytes for an account; lower classes yield if they must. No lock is held by the
//   caller.
//   2. under lock(): the tenant decides where, map() puts extents there, the tenant commits.
// With an upstream, step 1 gets the lease from there, and others of other processes yield for it.
// The way back is one step: tenants keep what is idle, and the arena takes it by Tenant::trim() when it is
// wanted.
//
// Order of locks: arena, then a tenant's own. Reclaimers are called with neither.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "arena/fence.hpp"
#include "arena/mapper.hpp"
#include "arena/rung.hpp"
#include "arena/tenant.hpp"
#include "arena/upstream.hpp"
#include "core/clock.hpp"
#include "ledger/ledger.hpp"

namespace tem {

/// Asks an account for bytes. May block up to the deadline; what it freed is read from the ledger.
using ReclaimFn = std::function<void(size_t bytes, Deadline deadline)>;

struct Options {
  size_t capacity = 0;      // bytes shared out
  size_t reserve_low = 0;   // bytes never leased, left free on the device
  size_t reserve_high = 0;  // up to this, free bytes are kept as warm spare extents
};

/// One victim's answer to one demand.
struct Yield {
  uint64_t seq = 0;
  int64_t start_ns = 0;  // CLOCK_MONOTONIC
  int64_t duration_ns = 0;
  std::string demander;  // an account's name; "capacity" or "limit" where no account gains
  std::string victim;
  Rung rung = Rung::kTrim;
  size_t asked = 0;
  size_t given = 0;
};

/// What an account gave to a demand from outside: bytes of its lease, and those that wait for a fence.
struct Yielded {
  size_t bytes = 0;
  size_t coming = 0;
};

/// An engine's blocks by what is in them, for people to look at: the arena makes nothing of it.
struct Blocks {
  uint32_t in_use = 0, cached = 0, free = 0, parked = 0;
  bool operator==(const Blocks& other) const {
    return in_use == other.in_use && cached == other.cached && free == other.free && parked == other.parked;
  }
};

struct AccountState {
  Holding holding;
  std::string priority;
  std::set<Rung> rungs;  // it has reclaimers for
  Idle idle;
  uint64_t given = 0;   // bytes yielded to others
  uint64_t taken = 0;   // bytes others yielded to it
  uint64_t yields = 0;  // times it gave
  uint64_t denied = 0;  // demands that failed
  Blocks blocks{};      // as its tenant last said
};

struct ArenaState {
  size_t capacity = 0, leased = 0, free = 0, reserve_low = 0, reserve_high = 0;
  size_t spare = 0, created = 0, lost = 0;
  uint64_t faults = 0;     // driver calls that failed while memory was given back
  std::string last_fault;  // and what the last one said
  std::vector<AccountState> accounts;
};

class Arena;
class Promised;

/// Leased bytes that are not mapped yet. Given back when it goes unused. Must not go under the arena's lock.
class Grant {
 public:
  Grant(std::shared_ptr<Arena> arena, AccountId account, size_t bytes)
      : arena_(std::move(arena)), account_(account), bytes_(bytes) {}
  Grant(Grant&& other) noexcept
      : arena_(std::move(other.arena_)), account_(other.account_), bytes_(std::exchange(other.bytes_, 0)) {}
  Grant& operator=(Grant&&) = delete;
  ~Grant();

  size_t bytes() const { return bytes_; }

 private:
  friend class Arena;
  std::shared_ptr<Arena> arena_;
  AccountId account_;
  size_t bytes_;
};

class Arena : public std::enable_shared_from_this<Arena> {
 public:
  using Lock = std::unique_lock<std::mutex>;

  /// One arena a CUDA device and process: a second one raises Error{kInUse} until the first is closed.
  static std::shared_ptr<Arena> open(std::shared_ptr<Backend> backend, Options options,
                                     std::shared_ptr<Upstream> upstream = nullptr);
  ~Arena();

  const Capabilities& device() const { return device_->backend->capabilities(); }
  Device& handles() { return *device_; }
  size_t granularity() const { return device().granularity; }

  // Accounts and limits. Lowered limits take effect before the call returns, idle accounts included.
  AccountId open_account(const std::string& name, const std::string& priority, const Limits& limits);
  void close_account(AccountId id);
  /// Returns the bytes still held above `max` at the deadline.
  size_t set_limits(AccountId id, const Limits& limits, Deadline deadline);
  /// Returns the bytes still leased above the new capacity at the deadline.
  size_t set_capacity(const Options& options, Deadline deadline);
  Holding account(AccountId id);
  std::string priority(AccountId id);
  /// What an account's tenant says of its blocks.
  void note_blocks(AccountId id, const Blocks& blocks);
  size_t room(AccountId id);
  /// Blocks until room() reaches `bytes`. False at the deadline.
  bool wait_for_room(AccountId id, size_t bytes, Deadline deadline);

  // Yielding.
  uint64_t add_reclaimer(AccountId id, Rung rung, ReclaimFn fn);
  void remove_reclaimer(uint64_t number);
  std::vector<Yield> yields(uint64_t since);

  // Growth.
  /// Leases bytes, calling reclaimers up to the rung `worst`, and in other processes up to `others`.
  /// Error{kOutOfMemory} leaves the ledger as it was.
  Grant acquire(AccountId id, size_t bytes, Deadline deadline, Rung worst, const Group* group = nullptr,
                Rung others = Rung::kPause);
  /// Leases bytes if nobody has to yield for them.
  std::optional<Grant> acquire_free(AccountId id, size_t bytes);
  Lock lock();
  /// Maps extents at `places` under the grant, for a tenant; the rest of the grant is given back.
  void map(const Lock&, Grant& grant, const std::vector<Place>& places, WriterId writer, Stream stream);

  /// Leases bytes that the account's next growths are then granted from, others asked up to `worst`. With a
  /// group, together with the other members or not at all.
  void reserve(AccountId id, size_t bytes, Deadline deadline, Rung worst, const Group* group);
  /// Gives back what is left of it. Returns the bytes.
  size_t unreserve(AccountId id);

  // For the upstream's threads.

  /// A lease has come; `take` bytes are charged at once for the caller that waits. False if the account may
  /// not hold so many: another thread used what was there, or its limits were lowered. `passed` is memory of
  /// another process that the lease comes with.
  bool leased(AccountId id, size_t bytes, size_t take, std::vector<Passed> passed = {});
  /// Gives up to `bytes` of an account's lease: what is unused, idle extents, then by reclaimers up to
  /// `worst`. `progress` is told of each part when its memory has been released, but for what is passed on
  /// with it: up to `pass` extents.
  using Progress = std::function<void(size_t bytes, std::vector<Parting> passed)>;
  Yielded yield(AccountId id, size_t bytes, Rung worst, Deadline deadline, const std::string& demander,
                size_t pass, const Progress& progress);
  /// Exports ahead what idle accounts would pass on next, for exporting takes longer than all else of a
  /// yield. True if there is more to do.
  bool make_ready_to_pass() noexcept;
  /// Limits were changed from outside: notes them. Who holds more than they allow is brought under them by
  /// `enforce_limits`, which may take several attempts.
  void limits_changed(AccountId id, const std::string& priority, const Limits& limits);
  struct Enforced {
    size_t freed;  // bytes
    size_t above;  // bytes still held above `max`
  };
  Enforced enforce_limits(AccountId id, Deadline deadline);
  /// Calls `visit` with what each account is leased, under the arena's lock: nothing is returned meanwhile.
  void visit_leases(const std::function<void(AccountId id, size_t lease)>& visit);

  /// A descriptor of a mapped extent, for another process.
  Fd export_fd(const Lock&, const Place& place, Access access = Access::kReadWrite) {
    return mapper_.export_fd(place, access);
  }

  /// Lets another device of this process reach all that is mapped here, now and later. False if it could
  /// already. Error{kDriver} if it cannot; what the error left out is tried again by the next call.
  bool allow_peer(int ordinal);

  // Giving back.
  WriterId attach(std::shared_ptr<Tenant> tenant, AccountId account);
  /// Lets a tenant go whose extents are all idle. The arena keeps it until the last fence has passed.
  void retire(Tenant& tenant) noexcept;
  std::shared_ptr<Mark> mark(Stream stream) { return std::make_shared<Mark>(*device_, stream); }
  /// Unmaps what is idle, not kept, and behind a passed fence. Returns the bytes; throws the driver's first
  /// refusal.
  size_t collect();
  /// The same for one account, kept extents included.
  size_t trim(AccountId id);
  /// As collect(), for a tenant that has just let go: a refusal is counted, and tried again later.
  void collect_quietly() noexcept;

  /// Creates warm spare extents up to the reserve's upper mark. Returns the bytes created.
  size_t refill();
  ArenaState state();
  /// Error{kInUse} while accounts are open.
  void close();

 private:
  friend class Grant;

  struct Seat {
    std::shared_ptr<Tenant> tenant;
    AccountId account;
    bool retired = false;
  };
  struct Reclaimer {
    uint64_t number;
    AccountId account;
    Rung rung;
    ReclaimFn fn;
  };
  using PlanFn = std::function<std::vector<Ask>(size_t missing, const Givable&)>;
  struct Tally {
    std::string priority;
    uint64_t given = 0, taken = 0, yields = 0, denied = 0;
    size_t reserved = 0;  // held for growths to come
    size_t asked = 0;     // of its lease, by demands from outside that are being answered
    Blocks blocks{};      // as its tenant last said
  };

  Arena(std::shared_ptr<Backend> backend, const Options& options, std::shared_ptr<Upstream> upstream);
  static Options checked(Backend& backend, const Options& options);
  void require_open() const;
  size_t spare_target() const;
  size_t spare_limit(size_t target) const;
  void give_back(AccountId id, size_t bytes);
  Grant grant_reserved(AccountId id, size_t bytes);
  size_t apply_limits(Lock& lock, AccountId id, Deadline deadline);
  void release_excess() noexcept;
  void settle_spare() noexcept;
  void note_fault(const Error& error);
  // Where a broker says what to do about all else.
  static constexpr const char* kRaiseMax = "; free memory of this account, or raise its max";
  Error refusal(AccountId id, size_t bytes, const std::string& why);
  [[noreturn]] void refuse(AccountId id, size_t bytes, const std::string& why) {
    throw refusal(id, bytes, why);
  }

  // Leases from upstream, in leases.cpp.
  size_t leases() const;
  size_t budget() const { return upstream_ ? leases() : ledger_.leasable(); }
  size_t unused(AccountId id) const;
  size_t unused_kept() const;
  size_t take_lease(AccountId id, size_t bytes, Passing* passing = nullptr) noexcept;
  void return_leases() noexcept;
  bool wait_for_lease(Lock& lock, AccountId id, size_t bytes, Deadline deadline);
  void close_upstream(Lock& lock, AccountId id);
  void stop_upstream(bool nothing_left) noexcept;
  Grant acquire_leased(Lock& lock, AccountId id, size_t bytes, Deadline deadline, Rung worst,
                       const Group* group, Rung others);

  // Records, in records.cpp.
  void record(AccountId demander, const std::string& label, AccountId victim, Rung rung, size_t asked,
              size_t given, Clock::time_point start);

  // Yielding, in yield.cpp.
  size_t unmap(std::vector<Leaving>& leaving, const Seat& seat, std::exception_ptr* first);
  size_t trim_seats(AccountId id, size_t bytes, size_t most, bool kept, std::exception_ptr* first);
  size_t trim_idle(std::exception_ptr* first);
  size_t trim_victim(AccountId id, size_t bytes);
  Idle idle_of(AccountId id);
  bool trim_others(size_t missing, AccountId demander, const std::string& label, const PlanFn& plan);
  /// Whose memory makes up for what is missing.
  enum class Source { kAnybody, kItself };
  size_t coming_from(const std::vector<Ask>& asks, AccountId demander, Source source);
  std::vector<Ask> beyond(const Promised& promised, const std::vector<Ask>& asks);
  Givable givable(AccountId demander, const std::vector<uint64_t>& spent, Rung worst);
  void drop_retired();
  bool anything_waits();
  bool may_ask(AccountId demander, const Reclaimer& reclaimer) const;
  std::shared_ptr<Reclaimer> next_reclaimer(AccountId demander, const std::vector<Ask>& asks,
                                            const std::vector<uint64_t>& spent, Rung worst) const;
  void squeeze(Lock& lock, AccountId demander, std::string label, Deadline deadline, Rung worst,
               const std::function<size_t()>& shortage, const PlanFn& plan, Source source = Source::kAnybody);
  void trim_self(Lock& lock, AccountId id, size_t target, Rung worst, Deadline deadline);

  // The worker, in worker.cpp.
  void start_worker();
  void wake_worker();
  void stop_worker() noexcept;
  void work();

  const std::shared_ptr<Device> device_;
  std::mutex mutex_;
  std::condition_variable changed_;  // bytes came back, a demand left, limits moved
  std::condition_variable wake_;     // the worker has something to do
  Ledger ledger_;
  Mapper mapper_;
  const std::shared_ptr<Upstream> upstream_;
  size_t reserve_high_;
  bool closed_ = false;
  bool stopping_ = false;
  bool nudged_ = false;  // the worker was woken since it last looked
  std::vector<Seat> seats_;
  std::set<int> peers_;
  WriterId next_writer_ = 1;
  std::vector<std::shared_ptr<Reclaimer>> reclaimers_;
  uint64_t next_number_ = 1;
  std::map<AccountId, Tally> tallies_;
  std::deque<Yield> yields_;
  uint64_t next_yield_ = 1;
  uint64_t faults_ = 0;
  std::string last_fault_;
  std::unique_ptr<std::thread> worker_;
};

}  // namespace tem
