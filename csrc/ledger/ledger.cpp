#include "ledger/ledger.hpp"

#include <algorithm>
#include <cmath>
#include <functional>

#include "core/error.hpp"
#include "core/sizes.hpp"

namespace tem {
namespace {

size_t above(size_t held, size_t floor) { return held > floor ? held - floor : 0; }

void check_order(const std::string& name, const Limits& limits) {
  const auto fail = [&](const std::string& what) {
    throw Error(Kind::kInvalid, "account '" + name + "': " + what +
                                    "; limits must keep min <= low <= high <= max, with low 0 meaning none");
  };
  const auto text = [](size_t bytes) {
    return bytes == kUnlimited ? std::string("unlimited") : format_bytes(bytes);
  };
  if (limits.min > limits.max) fail("min " + text(limits.min) + " is above max " + text(limits.max));
  if (limits.low != 0 && limits.low < limits.min)
    fail("low " + text(limits.low) + " is below min " + text(limits.min));
  if (limits.low > limits.max) fail("low " + text(limits.low) + " is above max " + text(limits.max));
  if (limits.high > limits.max && limits.high != kUnlimited) {
    fail("high " + text(limits.high) + " is above max " + text(limits.max));
  }
  if (limits.high < limits.min) fail("high " + text(limits.high) + " is below min " + text(limits.min));
  if (limits.high < limits.low) fail("high " + text(limits.high) + " is below low " + text(limits.low));
  if (!(limits.weight > 0.0) || !std::isfinite(limits.weight)) fail("weight must be a positive number");
}

}  // namespace

/// What may be taken from whom in one pass of a plan.
struct Ledger::Rule {
  std::function<size_t(const Holding&)> takeable;
  size_t at_most = kUnlimited;  // bytes of the demand that this pass and those before it may serve
};

Ledger::Ledger(size_t capacity, size_t reserve) : capacity_(capacity), reserve_(reserve) {
  if (capacity == 0) throw Error(Kind::kInvalid, "capacity is zero bytes; give the arena something to share");
  if (reserve >= capacity) {
    throw Error(Kind::kInvalid, "reserve " + format_bytes(reserve) + " leaves nothing of capacity " +
                                    format_bytes(capacity) + "; lower the reserve");
  }
}

AccountId Ledger::open(const std::string& name, const Limits& limits) {
  for (const auto& [id, account] : accounts_) {
    if (account.name == name) {
      throw Error(Kind::kInvalid, "account '" + name + "' exists already; names are unique within an arena");
    }
  }
  check_order(name, limits);
  admit(limits, name, kNobody, leasable());
  const AccountId id = next_id_++;
  accounts_[id] = Holding{id, name, limits};
  return id;
}

void Ledger::close(AccountId id) {
  const Holding& account = at(id);
  if (account.held != 0) {
    throw Error(Kind::kInUse, "account '" + account.name + "' still holds " + format_bytes(account.held) +
                                  "; close its tensors and free its allocations first");
  }
  accounts_.erase(id);
}

void Ledger::set_limits(AccountId id, const Limits& limits) {
  Holding& account = entry(id);
  check_order(account.name, limits);
  admit(limits, account.name, id, leasable());
  account.limits = limits;
}

void Ledger::set_capacity(size_t capacity, size_t reserve) {
  const Ledger checked(capacity, reserve);
  for (const auto& [id, account] : accounts_) admit(account.limits, account.name, id, checked.leasable());
  capacity_ = capacity;
  reserve_ = reserve;
}

void Ledger::admit(const Limits& limits, const std::string& name, AccountId replacing,
                   size_t leasable) const {
  size_t promised = 0;
  for (const auto& [id, account] : accounts_) {
    if (id != replacing) promised = checked_add(promised, account.limits.min);
  }
  if (limits.min <= leasable && promised <= leasable - limits.min) return;
  throw Error(Kind::kAdmission, "account '" + name + "' asks for min " + format_bytes(limits.min) + "; " +
                                    format_bytes(above(leasable, promised)) + " of " +
                                    format_bytes(leasable) + " is not promised yet (" + holders() +
                                    "); lower this min or another account's");
}

const Holding& Ledger::at(AccountId id) const {
  const auto found = accounts_.find(id);
  if (found == accounts_.end()) throw Error(Kind::kClosed, "the account has been closed");
  return found->second;
}

Holding& Ledger::entry(AccountId id) { return const_cast<Holding&>(at(id)); }

bool Ledger::holds_below(int64_t value) const {
  return std::any_of(accounts_.begin(), accounts_.end(), [value](const auto& each) {
    return each.second.held != 0 && each.second.limits.value < value;
  });
}

size_t Ledger::ahead_of(int64_t value, Ticket ticket) const {
  size_t bytes = 0;
  for (const auto& [other, demand] : queue_) {
    if (demand.value < value || (demand.value == value && other >= ticket)) continue;
    if (__builtin_add_overflow(bytes, demand.bytes, &bytes)) return kUnlimited;
  }
  return bytes;
}

size_t Ledger::room_ahead(const Holding& account, size_t ahead) const {
  return std::min(above(free(), ahead), above(std::min(account.limits.max, account.lease), account.held));
}

size_t Ledger::room(AccountId id) const {
  const Holding& account = at(id);
  return room_ahead(account, ahead_of(account.limits.value, next_ticket_));
}

bool Ledger::grant(AccountId id, size_t bytes) {
  if (bytes > room(id)) return false;
  entry(id).held += bytes;
  leased_ += bytes;
  return true;
}

void Ledger::give_back(AccountId id, size_t bytes) {
  Holding& account = entry(id);
  if (bytes > account.held) {
    throw Error(Kind::kInvalid, "account '" + account.name + "' gives back " + format_bytes(bytes) +
                                    " but holds " + format_bytes(account.held));
  }
  account.held -= bytes;
  leased_ -= bytes;
}

void Ledger::charge(AccountId id, size_t bytes) {
  Holding& account = entry(id);
  leased_ = checked_add(leased_, bytes);
  account.held += bytes;
}

Ticket Ledger::enqueue(AccountId id, size_t bytes) {
  queue_[next_ticket_] = Demand{id, bytes, at(id).limits.value};
  return next_ticket_++;
}

const Ledger::Demand& Ledger::demand_at(Ticket ticket) const {
  const auto found = queue_.find(ticket);
  if (found == queue_.end()) throw Error(Kind::kInvalid, "no demand is queued under this ticket");
  return found->second;
}

size_t Ledger::shortage(Ticket ticket) const {
  const Demand& demand = demand_at(ticket);
  return above(demand.bytes, room_ahead(at(demand.id), ahead_of(demand.value, ticket)));
}

bool Ledger::grant_ticket(Ticket ticket) {
  if (shortage(ticket) != 0) return false;
  const Demand demand = demand_at(ticket);
  queue_.erase(ticket);
  entry(demand.id).held += demand.bytes;
  leased_ += demand.bytes;
  return true;
}

void Ledger::withdraw(Ticket ticket) { queue_.erase(ticket); }

size_t Ledger::queued() const {
  size_t bytes = 0;
  for (const auto& [ticket, demand] : queue_) bytes += demand.bytes;
  return bytes;
}

double Ledger::share(const Holding& account, size_t incoming) const {
  double weights = 0.0;
  double pool = static_cast<double>(free()) + static_cast<double>(incoming);
  for (const auto& [id, other] : accounts_) {
    if (other.limits.value != account.limits.value) continue;
    weights += other.limits.weight;
    pool += static_cast<double>(other.held);
  }
  return pool * account.limits.weight / weights;
}

bool Ledger::may_pause(AccountId demander, AccountId victim) const {
  const Holding& me = at(demander);
  if (at(victim).limits.value != me.limits.value || me.held < me.limits.min) return true;
  return static_cast<double>(me.held) < share(me, 0) / 2;
}

std::vector<Ask> Ledger::collect(size_t bytes, AccountId demander, const Givable* givable, const Asked* asked,
                                 const std::vector<Rule>& rules) const {
  std::vector<Ask> asks;
  const auto planned = [&](AccountId id) -> size_t {
    size_t sum = 0;
    for (const Ask& ask : asks) sum += ask.victim == id ? ask.bytes : 0;
    return sum;
  };
  const auto in = [](const std::map<AccountId, size_t>* found_in, AccountId id, size_t otherwise) {
    if (found_in == nullptr) return otherwise;
    const auto found = found_in->find(id);
    return found == found_in->end() ? 0 : found->second;
  };
  std::vector<const Holding*> order;
  for (const auto& [id, account] : accounts_) {
    if (id != demander) order.push_back(&account);
  }
  std::stable_sort(order.begin(), order.end(), [&](const Holding* a, const Holding* b) {
    if (a->limits.value != b->limits.value) return a->limits.value < b->limits.value;
    return static_cast<double>(a->held) - share(*a, 0) > static_cast<double>(b->held) - share(*b, 0);
  });
  size_t total = 0;
  for (const Rule& rule : rules) {
    size_t budget = std::min(bytes, above(rule.at_most, total));
    for (const Holding* account : order) {
      const size_t left = above(rule.takeable(*account), in(asked, account->id, 0));
      const size_t most = std::min(left, in(givable, account->id, kUnlimited));
      const size_t take = std::min(budget, above(most, planned(account->id)));
      if (take == 0) continue;
      budget -= take;
      bytes -= take;
      total += take;
      asks.push_back({account->id, take});
    }
  }
  // One ask a victim: a later pass adds to the bytes, the order of the first pass stays.
  std::vector<Ask> merged;
  for (const Ask& ask : asks) {
    const auto same =
        std::find_if(merged.begin(), merged.end(), [&](const Ask& m) { return m.victim == ask.victim; });
    if (same == merged.end()) {
      merged.push_back(ask);
    } else {
      same->bytes += ask.bytes;
    }
  }
  return merged;
}

std::vector<Ask> Ledger::plan(AccountId id, size_t bytes, const Givable* givable, const Asked* asked) const {
  const Holding& me = at(id);
  const int64_t value = me.limits.value;
  // Above `high` an account lives from what is free and from what others hold above their own `high`.
  const size_t entitled = above(me.limits.high, me.held);
  const size_t guaranteed = above(me.limits.min, me.held);
  const auto is_lower = [=](const Holding& v) { return v.limits.value < value; };
  std::vector<Rule> rules = {
      {[](const Holding& v) { return above(v.held, v.limits.high); }},
      {[=](const Holding& v) {
         return is_lower(v) ? above(v.held, std::max(v.limits.min, v.limits.low)) : 0;
       },
       entitled},
  };
  // What other classes yield first makes the shares of this one larger.
  size_t incoming = 0;
  for (const Ask& ask : collect(bytes, id, givable, asked, rules)) {
    if (at(ask.victim).limits.value != value) incoming += ask.bytes;
  }
  const double below_share = share(me, incoming) - static_cast<double>(me.held);
  const size_t fair = below_share > 0.0 ? static_cast<size_t>(below_share) : 0;
  rules.push_back({[=](const Holding& v) -> size_t {
                     if (v.limits.value != value) return 0;
                     const double theirs = std::max(
                         share(v, incoming), static_cast<double>(std::max(v.limits.min, v.limits.low)));
                     const double over = static_cast<double>(v.held) - theirs;
                     return over > 0.0 ? static_cast<size_t>(over) : 0;
                   },
                   std::min(entitled, fair)});
  rules.push_back(
      {[=](const Holding& v) { return is_lower(v) ? above(v.held, v.limits.min) : 0; }, entitled});
  rules.push_back({[](const Holding& v) { return above(v.held, v.limits.min); }, guaranteed});
  return collect(bytes, id, givable, asked, rules);
}

std::vector<Ask> Ledger::plan_shrink(size_t bytes, const Givable* givable, const Asked* asked) const {
  return collect(bytes, kNobody, givable, asked,
                 {
                     {[](const Holding& v) { return above(v.held, v.limits.high); }},
                     {[](const Holding& v) { return above(v.held, std::max(v.limits.min, v.limits.low)); }},
                     {[](const Holding& v) { return above(v.held, v.limits.min); }},
                 });
}

std::string Ledger::holders() const {
  if (accounts_.empty()) return "no account is open";
  std::string text;
  for (const auto& [id, account] : accounts_) {
    if (!text.empty()) text += "; ";
    text += account.name + " holds " + format_bytes(account.held);
    if (account.limits.min != 0) text += ", min " + format_bytes(account.limits.min);
    if (account.limits.max != kUnlimited) text += ", max " + format_bytes(account.limits.max);
  }
  return text;
}

}  // namespace tem
