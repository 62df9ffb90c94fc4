// Leases from upstream: how they come, how they are used, and how they go back.
#include <algorithm>
#include <utility>

#include "arena/arena.hpp"
#include "core/error.hpp"
#include "core/sizes.hpp"

namespace tem {
namespace {

constexpr auto kRoomPoll = std::chrono::milliseconds(20);
// Extents exported ahead: with the largest, 4 GiB. Each costs a descriptor.
constexpr size_t kReady = 64;
// At a time: who asks meanwhile waits for them.
constexpr size_t kReadyAtOnce = 16;

}  // namespace

size_t Arena::leases() const {
  size_t sum = 0;
  for (const auto& [id, account] : ledger_.accounts()) sum += account.lease;
  return sum;
}

/// Unused lease that an account keeps, so that growth by small steps costs no message. Nothing need lie
/// behind it, and it is the first thing to go when another account wants memory.
size_t Arena::unused_kept() const {
  return std::clamp(round_down(upstream_->capacity() / 64, granularity()), granularity(), kMaxExtent);
}

size_t Arena::unused(AccountId id) const {
  const Holding& account = ledger_.at(id);
  return account.lease > account.held ? account.lease - account.held : 0;
}

/// Takes unused bytes out of a lease, once what lay behind them has been released or passed on.
size_t Arena::take_lease(AccountId id, size_t bytes, Passing* passing) noexcept {
  bytes = std::min(bytes, unused(id));
  const size_t sum = leases();
  const size_t elsewhere = device_->created - mapper_.spare().bytes();
  const size_t keep = sum - bytes > elsewhere ? sum - bytes - elsewhere : 0;
  try {
    if (passing != nullptr) mapper_.pass_spare(keep, *passing);
    mapper_.shrink_spare(keep);
  } catch (const Error& error) {
    note_fault(error);
  }
  bytes = std::min(bytes, sum > device_->created ? sum - device_->created : 0);
  ledger_.set_lease(id, ledger_.at(id).lease - bytes);
  mapper_.set_budget(budget());
  return bytes;
}

void Arena::return_leases() noexcept {
  for (const auto& [id, account] : ledger_.accounts()) {
    const size_t idle = unused(id);
    const size_t keep = unused_kept() + tallies_.at(id).asked;
    if (idle <= keep) continue;
    if (const size_t bytes = take_lease(id, idle - keep)) upstream_->give_back(id, bytes);
  }
}

bool Arena::leased(AccountId id, size_t bytes, size_t take, std::vector<Passed> passed) {
  const Lock held(mutex_);
  ledger_.set_lease(id, ledger_.at(id).lease + bytes);
  mapper_.set_budget(budget());
  mapper_.receive(std::move(passed));
  const bool taken = take != 0 && ledger_.grant(id, take);
  changed_.notify_all();
  return taken;
}

Grant Arena::acquire_leased(Lock& lock, AccountId id, size_t bytes, Deadline deadline, Rung worst,
                            const Group* group, Rung others) {
  // A member of a group always asks, and for all of it: the others wait for its demand.
  const auto ask = [&](std::optional<Rung> dearest) {
    LeaseDemand demand;
    demand.account = id;
    demand.bytes = group != nullptr ? bytes : bytes - std::min(bytes, unused(id));
    demand.want = demand.bytes + (group != nullptr ? 0 : unused_kept());
    demand.take = bytes;
    demand.others = dearest;
    demand.own = worst;
    demand.deadline = deadline;
    demand.group = group;
    lock.unlock();
    LeaseAnswer answer = upstream_->demand(demand);
    lock.lock();
    return answer;
  };
  // What it asks for beside its unused lease might not fit where the lease alone would do.
  if (group != nullptr) upstream_->give_back(id, take_lease(id, unused(id)));
  // What is free costs nobody anything; then goes what this account has idle; only then others yield.
  if (const Idle own = idle_of(id); group == nullptr && own.ready + own.pending != 0) {
    if (ask(std::nullopt).taken) return Grant(shared_from_this(), id, bytes);
    trim_seats(id, bytes - std::min(bytes, unused(id)), SIZE_MAX, true, nullptr);
  }
  for (;;) {
    require_open();
    if (group == nullptr && ledger_.grant(id, bytes)) return Grant(shared_from_this(), id, bytes);
    const size_t lease = ledger_.at(id).lease;
    const LeaseAnswer answer = ask(others);
    if (answer.taken) return Grant(shared_from_this(), id, bytes);
    // Another thread may have brought more than it needs, or have taken what was meant for this one.
    if (group == nullptr && ledger_.grant(id, bytes)) return Grant(shared_from_this(), id, bytes);
    const Holding& account = ledger_.at(id);
    const size_t most = std::min(account.limits.max, ledger_.capacity());
    if (most < bytes || most - bytes < account.held)
      refuse(id, bytes, "its max is " + format_bytes(most) + kRaiseMax);
    // A denial while other threads were granted more than they need, or gave some back, says nothing of what
    // there is now.
    const bool late = Clock::now() >= deadline;
    const bool stale = group == nullptr && !late && account.lease != lease;
    if (!answer.why.empty() && !stale) refuse(id, bytes, answer.why);
    if (late) refuse(id, bytes, "other threads took what was granted for it; wait longer");
  }
}

/// Room comes by asking: whoever frees memory elsewhere does not know who waits without a demand.
bool Arena::wait_for_lease(Lock& lock, AccountId id, size_t bytes, Deadline deadline) {
  for (;;) {
    require_open();
    const size_t room = ledger_.room(id);
    if (room >= bytes) return true;
    if (Clock::now() >= deadline) return false;
    const Holding& account = ledger_.at(id);
    bool granted = false;
    if (account.limits.max >= bytes && account.limits.max - bytes >= account.held) {
      LeaseDemand demand;
      demand.account = id;
      demand.bytes = demand.want = bytes - room;
      demand.own = Rung::kPause;
      demand.deadline = deadline;
      lock.unlock();
      granted = upstream_->demand(demand).why.empty();
      lock.lock();
    }
    if (!granted) changed_.wait_until(lock, std::min(deadline, Clock::now() + kRoomPoll));
  }
}

/// What is granted to a demand that was given up may cross the closing on its way. It has come by the time
/// that the closing is refused for it, and goes back before the account is closed again.
void Arena::close_upstream(Lock& lock, AccountId id) {
  for (bool again = false;; again = true) {
    const size_t back = take_lease(id, unused(id));
    upstream_->give_back(id, back);
    lock.unlock();
    std::optional<Error> refused;
    try {
      upstream_->close(id);
    } catch (const Error& error) {
      refused = error;
    }
    lock = this->lock();
    if (!refused) return;
    // Nothing came: a demand is under way, or the driver does not take its memory back.
    if (refused->kind() != Kind::kInUse || (again && back == 0)) throw Error(*refused);
  }
}

void Arena::stop_upstream(bool nothing_left) noexcept {
  if (!upstream_) return;
  {
    const Lock held(mutex_);
    try {
      mapper_.shrink_spare(0);
    } catch (const Error& error) {
      note_fault(error);
    }
    nothing_left = nothing_left && device_->created == 0;
  }
  upstream_->stop(nothing_left);
}

void Arena::reserve(AccountId id, size_t bytes, Deadline deadline, Rung worst, const Group* group) {
  Grant grant = acquire(id, bytes, deadline, worst, group, worst);
  const Lock held = lock();
  tallies_.at(id).reserved += std::exchange(grant.bytes_, 0);
}

size_t Arena::unreserve(AccountId id) {
  const Lock held = lock();
  (void)ledger_.at(id);
  const size_t bytes = std::exchange(tallies_.at(id).reserved, 0);
  if (bytes != 0) give_back(id, bytes);
  settle_spare();
  return bytes;
}

Yielded Arena::yield(AccountId id, size_t bytes, Rung worst, Deadline deadline, const std::string& demander,
                     size_t pass, const Progress& progress) {
  Yielded out;
  Lock lock = this->lock();
  (void)ledger_.at(id);
  // What comes free meanwhile goes to this demand, not back by itself.
  tallies_.at(id).asked += bytes;
  const auto missing = [&]() -> size_t {
    if (ledger_.accounts().count(id) == 0) return 0;
    Passing passing{pass, {}};
    const size_t taken = take_lease(id, bytes - out.bytes, &passing);
    pass -= passing.extents.size();
    out.bytes += taken;
    tallies_.at(id).asked -= taken;
    if (taken != 0) progress(taken, std::move(passing.extents));
    return bytes - out.bytes;
  };
  squeeze(
      lock, kNobody, demander, deadline, worst, missing,
      [id](size_t wanted, const Givable& givable) -> std::vector<Ask> {
        const auto own = givable.find(id);
        if (own == givable.end() || own->second == 0) return {};
        return {{id, std::min(wanted, own->second)}};
      },
      Source::kItself);
  missing();
  if (ledger_.accounts().count(id) != 0) {
    out.coming = std::min(idle_of(id).pending, bytes - out.bytes);
    tallies_.at(id).asked -= bytes - out.bytes;
  }
  settle_spare();
  return out;
}

bool Arena::make_ready_to_pass() noexcept {
  for (size_t made = 0; made < kReadyAtOnce; ++made) {
    const Lock held(mutex_);  // anew for each: it takes the driver longer than a growth should wait
    try {
      const bool any = std::any_of(seats_.begin(), seats_.end(), [this](const Seat& seat) {
        const Idle idle = seat.tenant->idle();
        if (idle.ready + idle.pending == 0) return false;
        const std::vector<Range*> ranges = seat.tenant->ranges();
        return std::any_of(ranges.begin(), ranges.end(),
                           [this](Range* range) { return mapper_.make_ready(*range, kReady); });
      });
      if (!any) return false;
    } catch (const Error& error) {
      note_fault(error);
      return false;
    }
  }
  return true;
}

void Arena::visit_leases(const std::function<void(AccountId, size_t)>& visit) {
  const Lock held = lock();
  for (const auto& [id, account] : ledger_.accounts()) visit(id, account.lease);
}

}  // namespace tem
