// What is held, as the broker is told, and what is done where that is more than it allows.
#include "client/client.hpp"

namespace tem::client {
namespace {

constexpr double kReports = 0.1;  // seconds between reports
constexpr double kLook = 1.0;     // between looks at what is idle, which moves without a word
constexpr double kEnforce = 1.0;  // for one attempt at limits; what else is asked waits behind it

}  // namespace

/// Brings an account under its limits. Who is still above its max, for a step took longer or what it would
/// give was in use, is seen by report(), and has another attempt.
void Client::enforce(AccountId id) {
  {
    const Lock lock(mutex_);
    if (const auto found = entries_.find(id); found != entries_.end()) found->second.enforcing = true;
  }
  add_chore([this, id](Arena& arena) {
    try {
      arena.enforce_limits(id, deadline_in(kEnforce));
    } catch (const Error&) {
      // Closed meanwhile.
    }
    const Lock lock(mutex_);
    if (const auto found = entries_.find(id); found != entries_.end()) found->second.enforcing = false;
  });
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
  std::vector<AccountId> above;
  Lock lock(mutex_);
  for (const AccountState& account : state.accounts) {
    const auto found = entries_.find(account.holding.id);
    if (found == entries_.end() || !found->second.remote) continue;
    if (question(found->first, Type::kClose) != nullptr) continue;
    Entry& entry = found->second;
    if (account.holding.held > entry.limits.max && !entry.enforcing) above.push_back(found->first);
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
  for (const AccountId id : above) enforce(id);
}

}  // namespace tem::client
