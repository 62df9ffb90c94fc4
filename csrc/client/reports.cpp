// What is held, as the broker is told, and what is done where that is more than it allows.
#include "client/client.hpp"

namespace tem::client {
namespace {

constexpr double kReports = 0.1;  // seconds between reports
constexpr double kLook = 1.0;     // between looks at what is idle, which moves without a word
constexpr double kEnforce = 1.0;  // for one attempt at limits; what else is asked waits behind it

}  // namespace

/// Brings an account under the limits that the broker has set. A step may take longer than an attempt, or
/// what it would give be in use: report() sees when it is time for the next. Who has nothing to give is left
/// alone after a few, for each costs its requests.
void Client::enforce(AccountId id) {
  {
    const Lock lock(mutex_);
    const auto found = entries_.find(id);
    if (found == entries_.end()) return;
    found->second.enforcing = true;
    found->second.set_again = false;
  }
  add_chore([this, id](Arena& arena) {
    Arena::Enforced done{0, 0};
    try {
      done = arena.enforce_limits(id, deadline_in(kEnforce));
    } catch (const Error&) {
      // Closed meanwhile.
    }
    enforced(id, done.freed, done.above);
  });
}

void Client::enforced(AccountId id, size_t freed, size_t above) {
  const Lock lock(mutex_);
  const auto found = entries_.find(id);
  if (found == entries_.end()) return;
  Entry& entry = found->second;
  entry.enforcing = false;
  if (entry.set_again) return;
  if (above == 0) {
    entry.attempts = 0;
  } else if (freed != 0) {
    entry.attempts = kAttempts;
    entry.rest = kRest;
  } else {
    --entry.attempts;
    entry.rest *= 2;
  }
  entry.next_attempt = deadline_in(entry.rest);
}

void Client::report() {
  dirty_ = false;
  next_report_ = deadline_in(kReports);
  next_look_ = deadline_in(kLook);
  ArenaState state;
  try {
    state = arena_->state();
  } catch (const Error&) {
    return;  // closed
  }
  std::vector<AccountId> due;
  Lock lock(mutex_);
  for (const AccountState& account : state.accounts) {
    const auto found = entries_.find(account.holding.id);
    if (found == entries_.end() || !found->second.remote) continue;
    if (question(found->first, Type::kClose) != nullptr) continue;
    Entry& entry = found->second;
    if (entry.attempts > 0 && !entry.enforcing && Clock::now() >= entry.next_attempt)
      due.push_back(found->first);
    const size_t idle = account.idle.ready + account.idle.pending;
    uint32_t rungs = 0;
    for (const Rung rung : account.rungs) rungs |= 1U << static_cast<uint32_t>(rung);
    const Blocks& blocks = account.blocks;
    if (entry.held == account.holding.held && entry.idle == idle && entry.rungs == rungs &&
        entry.blocks == blocks)
      continue;
    entry.held = account.holding.held;
    entry.idle = idle;
    entry.rungs = rungs;
    entry.blocks = blocks;
    post(0, Report{*entry.remote, rungs, entry.held, entry.idle, blocks.in_use, blocks.cached, blocks.free,
                   blocks.parked});
  }
  lock.unlock();
  for (const AccountId id : due) enforce(id);
}

}  // namespace tem::client
