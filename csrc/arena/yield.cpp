// How memory moves between accounts: free extents at once, then reclaimers from cheap to dear.
#include <algorithm>
#include <exception>
#include <utility>

#include "arena/arena.hpp"
#include "arena/promised.hpp"
#include "core/error.hpp"
#include "core/sizes.hpp"

namespace tem {
namespace {

/// How often a wait looks at fences that have not passed: an event has no deadline of its own to wait for.
constexpr auto kFencePoll = std::chrono::microseconds(50);

size_t above(size_t bytes, size_t floor) { return bytes > floor ? bytes - floor : 0; }

/// What goes by itself once its fence has passed.
size_t leaving(const Idle& idle) {
  return std::min(idle.pending, above(idle.ready + idle.pending, idle.kept));
}

}  // namespace

const char* rung_name(Rung rung) {
  switch (rung) {
    case Rung::kTrim:
      return "trim";
    case Rung::kEvict:
      return "evict";
    case Rung::kSpill:
      return "spill";
    case Rung::kShrink:
      return "shrink";
    case Rung::kPause:
      return "pause";
  }
  return "unknown";
}

uint64_t Arena::add_reclaimer(AccountId id, Rung rung, ReclaimFn fn) {
  const Lock held = lock();
  (void)ledger_.at(id);
  const uint64_t number = next_number_++;
  reclaimers_.push_back(std::make_shared<Reclaimer>(Reclaimer{number, id, rung, std::move(fn)}));
  if (upstream_) upstream_->changed();
  std::stable_sort(reclaimers_.begin(), reclaimers_.end(),
                   [](const auto& a, const auto& b) { return a->rung < b->rung; });
  return number;
}

void Arena::remove_reclaimer(uint64_t number) {
  std::shared_ptr<Reclaimer> removed;  // outlives the lock: what its function owns may call back
  const Lock held = lock();
  const auto found = std::find_if(reclaimers_.begin(), reclaimers_.end(),
                                  [&](const auto& reclaimer) { return reclaimer->number == number; });
  if (found == reclaimers_.end()) return;
  removed = *found;
  reclaimers_.erase(found);
  if (upstream_) upstream_->changed();
}

size_t Arena::unmap(std::vector<Leaving>& leaving, const Seat& seat, std::exception_ptr* first) {
  size_t freed = 0;
  for (Leaving& one : leaving) {
    try {
      mapper_.unmap(one.places);
    } catch (const Error& error) {
      seat.tenant->stay(one);
      note_fault(error);
      if (first != nullptr && !*first) *first = std::current_exception();
      continue;
    }
    freed += one.bytes();
  }
  if (freed != 0) give_back(seat.account, freed);
  return freed;
}

size_t Arena::trim_seats(AccountId id, size_t bytes, size_t most, bool kept, std::exception_ptr* first) {
  size_t freed = 0;
  for (const Seat& seat : seats_) {
    if (seat.account != id || freed >= bytes) continue;
    std::vector<Leaving> leaving;
    seat.tenant->trim(bytes - freed, most - freed, kept, leaving);
    freed += unmap(leaving, seat, first);
  }
  return freed;
}

/// Idle extents go whole, so an ask may be exceeded; `min` is not.
size_t Arena::trim_victim(AccountId id, size_t bytes) {
  const Holding& victim = ledger_.at(id);
  const size_t most = above(victim.held, victim.limits.min);
  return trim_seats(id, bytes, most, true, nullptr);
}

size_t Arena::trim_idle(std::exception_ptr* first) {
  size_t freed = 0;
  for (const auto& [id, account] : ledger_.accounts())
    freed += trim_seats(id, SIZE_MAX, SIZE_MAX, false, first);
  drop_retired();
  return freed;
}

void Arena::drop_retired() {
  const auto done = [](const Seat& seat) {
    if (!seat.retired) return false;
    const Idle idle = seat.tenant->idle();
    return idle.ready + idle.pending == 0;
  };
  seats_.erase(std::remove_if(seats_.begin(), seats_.end(), done), seats_.end());
}

bool Arena::anything_waits() {
  return std::any_of(seats_.begin(), seats_.end(), [](const Seat& seat) { return seat.tenant->waiting(); });
}

size_t Arena::collect() {
  const Lock held = lock();
  std::exception_ptr first;
  const size_t freed = trim_idle(&first);
  settle_spare();
  if (first) std::rethrow_exception(first);
  return freed;
}

void Arena::collect_quietly() noexcept {
  const Lock held(mutex_);
  trim_idle(nullptr);
  settle_spare();
  if (anything_waits()) {
    start_worker();
    wake_worker();
  }
}

size_t Arena::trim(AccountId id) {
  const Lock held = lock();
  (void)ledger_.at(id);
  std::exception_ptr first;
  const size_t freed = trim_seats(id, SIZE_MAX, SIZE_MAX, true, &first);
  settle_spare();
  if (first) std::rethrow_exception(first);
  return freed;
}

Idle Arena::idle_of(AccountId id) {
  Idle sum;
  for (const Seat& seat : seats_) {
    if (seat.account != id) continue;
    const Idle idle = seat.tenant->idle();
    sum.ready += idle.ready;
    sum.pending += idle.pending;
    sum.kept += idle.kept;
  }
  return sum;
}

/// Takes what is idle, whoever has it, before anybody is asked for more. True if anything came.
bool Arena::trim_others(size_t missing, AccountId demander, const std::string& label, const PlanFn& plan) {
  Givable ready;
  for (const auto& [id, account] : ledger_.accounts()) ready[id] = idle_of(id).ready;
  for (;;) {
    const std::vector<Ask> asks = plan(missing, ready);
    if (asks.empty()) return false;
    bool progress = false;
    for (const Ask& ask : asks) {
      const auto start = Clock::now();
      const size_t given = trim_victim(ask.victim, ask.bytes);
      // Idle, but not to be had: its extents are larger than what is above `min`, or the driver refuses.
      if (given == 0) {
        ready.erase(ask.victim);
        continue;
      }
      progress = true;
      record(demander, label, ask.victim, Rung::kTrim, ask.bytes, given, start);
    }
    if (progress) return true;
  }
}

/// Bytes behind fences that will come to a demand: what those who are asked, and the demander, have idle, and
/// of everybody else what is not kept, where it is not one account's own that counts.
size_t Arena::coming_from(const std::vector<Ask>& asks, AccountId demander, Source source) {
  size_t coming = 0;
  for (const auto& [id, account] : ledger_.accounts()) {
    const Idle idle = idle_of(id);
    const size_t loose = source == Source::kAnybody ? leaving(idle) : 0;
    size_t asked = id == demander ? idle.pending : 0;
    for (const Ask& ask : asks) asked += ask.victim == id ? ask.bytes : 0;
    coming += std::min(idle.pending, std::max(asked, loose));
  }
  return coming;
}

/// Of what each is asked for, what it has not let go of for this demand already.
std::vector<Ask> Arena::beyond(const Promised& promised, const std::vector<Ask>& asks) {
  std::vector<Ask> out;
  for (const Ask& ask : asks) {
    const size_t left = promised.left(ask.victim, ledger_.at(ask.victim).held, idle_of(ask.victim).pending);
    if (ask.bytes > left) out.push_back({ask.victim, ask.bytes - left});
  }
  return out;
}

/// What accounts may still give: all of it where a reclaimer is left to ask, else what waits for a fence.
Givable Arena::givable(AccountId demander, const std::vector<uint64_t>& spent, Rung worst) {
  Givable out;
  for (const auto& [id, account] : ledger_.accounts()) {
    const auto reclaimer = next_reclaimer(demander, {{id, account.held}}, spent, worst);
    out[id] = reclaimer ? kUnlimited : idle_of(id).pending;
  }
  return out;
}

bool Arena::may_ask(AccountId demander, const Reclaimer& reclaimer) const {
  return reclaimer.rung != Rung::kPause || demander == kNobody ||
         ledger_.may_pause(demander, reclaimer.account);
}

std::shared_ptr<Arena::Reclaimer> Arena::next_reclaimer(AccountId demander, const std::vector<Ask>& asks,
                                                        const std::vector<uint64_t>& spent,
                                                        Rung worst) const {
  // Asks come lowest class first. Within a class every account is asked for a cheap rung before any for a
  // dear one, and within a rung in the order of the asks.
  for (size_t i = 0; i < asks.size();) {
    const int64_t value = ledger_.at(asks[i].victim).limits.value;
    std::shared_ptr<Reclaimer> best;
    for (; i < asks.size() && ledger_.at(asks[i].victim).limits.value == value; ++i) {
      const auto own = std::find_if(reclaimers_.begin(), reclaimers_.end(), [&](const auto& reclaimer) {
        return reclaimer->account == asks[i].victim && reclaimer->rung <= worst &&
               may_ask(demander, *reclaimer) &&
               std::find(spent.begin(), spent.end(), reclaimer->number) == spent.end();
      });
      if (own != reclaimers_.end() && (!best || (*own)->rung < best->rung)) best = *own;
    }
    if (best) return best;
  }
  return nullptr;
}

/// Has others yield until nothing is missing, nobody has more to give, or time is up. The label is a copy: a
/// reclaimer may close the account that it names.
void Arena::squeeze(Lock& lock, AccountId demander, std::string label, Deadline deadline, Rung worst,
                    const std::function<size_t()>& shortage, const PlanFn& plan, Source source) {
  // Fences usually pass soon, and what they free costs nobody anything. A stream that is stuck must not keep
  // the reclaimers from their half of the time.
  const Deadline patience = deadline_in(seconds_until(deadline) / 2);
  std::vector<uint64_t> spent;  // reclaimers that gave less than they were asked
  Promised promised;
  for (;;) {
    require_open();
    const size_t missing = shortage();
    if (missing == 0) return;
    // Seen before the looks at fences below: one that passes in between is then waited for, not missed.
    std::vector<Ask> asks = plan(missing, givable(demander, spent, worst));
    const size_t coming = coming_from(asks, demander, source);
    if (trim_idle(nullptr) != 0) continue;
    if (demander != kNobody && trim_seats(demander, missing, SIZE_MAX, true, nullptr) != 0) continue;
    if (trim_others(missing, demander, label, plan)) continue;

    const bool patient = Clock::now() < patience;
    // Left to ask, though perhaps for nothing now: some may have been let go of since the look above.
    const bool any = next_reclaimer(demander, asks, spent, worst) != nullptr;
    if (patient) asks = beyond(promised, asks);
    // Let go of before the lock is taken or given up: what a removed one owns may call back.
    auto reclaimer = next_reclaimer(demander, asks, spent, worst);
    if ((coming == 0 && !any) || Clock::now() >= deadline) return;
    if (!reclaimer || (coming >= missing && patient)) {
      reclaimer.reset();
      changed_.wait_for(lock, kFencePoll);
      continue;
    }

    const uint64_t number = reclaimer->number;
    const AccountId victim = reclaimer->account;
    const Rung rung = reclaimer->rung;
    size_t bytes = 0;
    for (const Ask& one : asks) bytes += one.victim == victim ? one.bytes : 0;
    const size_t before = ledger_.at(victim).held;
    const Idle idle = idle_of(victim);
    const auto start = Clock::now();
    lock.unlock();
    reclaimer->fn(bytes, deadline);
    reclaimer.reset();
    lock.lock();
    require_open();
    if (ledger_.accounts().count(victim) == 0) continue;  // it closed its account: all of it came back
    trim_victim(victim, bytes);
    const size_t after = ledger_.at(victim).held;
    const Idle now = idle_of(victim);
    const size_t given = above(before, after);
    record(demander, label, victim, rung, bytes, given + above(leaving(now), leaving(idle)), start);
    promised.note(victim, after, now.pending, above(now.pending, idle.pending));
    // One that gave in full is asked again where a higher demand took what came.
    if (given < bytes) spent.push_back(number);
  }
}

/// Brings an account down to `target` bytes by its own means, from trim up to the rung `worst`.
void Arena::trim_self(Lock& lock, AccountId id, size_t target, Rung worst, Deadline deadline) {
  const auto over = [this, id, target]() -> size_t { return above(ledger_.at(id).held, target); };
  squeeze(
      lock, kNobody, "limit", deadline, worst, over,
      [id](size_t bytes, const Givable& givable) -> std::vector<Ask> {
        const auto own = givable.find(id);
        if (own == givable.end() || own->second == 0) return {};
        return {{id, std::min(bytes, own->second)}};
      },
      Source::kItself);
}

Grant Arena::acquire(AccountId id, size_t bytes, Deadline deadline, Rung worst, const Group* group,
                     Rung others) {
  Lock lock = this->lock();
  if (group == nullptr && tallies_.count(id) != 0 && tallies_.at(id).reserved >= bytes && bytes != 0)
    return grant_reserved(id, bytes);
  const Limits limits = ledger_.at(id).limits;
  const auto below = [bytes](size_t limit) { return above(limit, bytes); };
  // What a member of a group may not have is the broker's to say: the others wait for its demand.
  const bool alone = group == nullptr || !upstream_;
  const char* const raise = upstream_ ? kRaiseMax : "";
  if (alone && bytes > limits.max)
    refuse(id, bytes, "that is more than the account's max " + format_bytes(limits.max) + raise);
  if (alone && bytes > ledger_.leasable()) {
    refuse(id, bytes, "that is more than all the arena may lease, " + format_bytes(ledger_.leasable()));
  }
  if (ledger_.at(id).held > below(limits.high)) {
    trim_self(lock, id, below(limits.high), std::min(worst, Rung::kEvict), deadline);
  }
  if (group == nullptr && ledger_.grant(id, bytes)) return Grant(shared_from_this(), id, bytes);
  if (bytes <= limits.max && ledger_.at(id).held > below(limits.max))
    trim_self(lock, id, below(limits.max), worst, deadline);
  if (alone && ledger_.at(id).held > below(limits.max))
    refuse(id, bytes, "max is " + format_bytes(limits.max) + raise);

  if (upstream_) return acquire_leased(lock, id, bytes, deadline, worst, group, others);
  if (group != nullptr && group->members != 1) {
    refuse(id, bytes,
           "the group '" + group->name + "' has " + std::to_string(group->members) +
               " members, and without a broker nobody brings them together");
  }

  const Ticket ticket = ledger_.enqueue(id, bytes);
  bool granted = false;
  try {
    squeeze(
        lock, id, ledger_.at(id).name, deadline, worst, [&] { return ledger_.shortage(ticket); },
        [&](size_t missing, const Givable& givable) { return ledger_.plan(id, missing, &givable); });
    granted = ledger_.grant_ticket(ticket);
  } catch (...) {
    ledger_.withdraw(ticket);
    changed_.notify_all();
    throw;
  }
  if (!granted) {
    ledger_.withdraw(ticket);
    changed_.notify_all();
    refuse(id, bytes, "no account that may be asked gave enough");
  }
  return Grant(shared_from_this(), id, bytes);
}

Error Arena::refusal(AccountId id, size_t bytes, const std::string& why) {
  ++tallies_.at(id).denied;
  settle_spare();
  const Holding& account = ledger_.at(id);
  const std::string asked = "account '" + account.name + "' asked for " + format_bytes(bytes) +
                            " beside the " + format_bytes(account.held) + " it holds";
  // The other side of a refusal from upstream knows who holds the rest, and what to do.
  if (upstream_) return Error(Kind::kOutOfMemory, asked + ": " + why);
  return Error(Kind::kOutOfMemory,
               asked + "; " + format_bytes(ledger_.free()) + " of " + format_bytes(ledger_.leasable()) +
                   " is free on " + device().device + ": " + why + ". Holders: " + ledger_.holders() +
                   ". To go on: free memory of this account, lower its demand, raise its limits or its "
                   "priority class, or give the arena more capacity");
}

}  // namespace tem
