// Limits and capacity that change at run time: they take effect before the call returns.
#include "arena/arena.hpp"
#include "core/error.hpp"

namespace tem {

/// Brings an account under its limits by its own means. Returns the bytes still held above `max`.
size_t Arena::apply_limits(Lock& lock, AccountId id, Deadline deadline) {
  const Limits limits = ledger_.at(id).limits;
  changed_.notify_all();
  // The dearer one first: it asks for what is cheap before, and has all of the time.
  if (ledger_.at(id).held > limits.max) trim_self(lock, id, limits.max, Rung::kPause, deadline);
  if (ledger_.at(id).held > limits.high) trim_self(lock, id, limits.high, Rung::kEvict, deadline);
  settle_spare();
  const size_t held = ledger_.at(id).held;
  return held > limits.max ? held - limits.max : 0;
}

size_t Arena::set_limits(AccountId id, const Limits& limits, Deadline deadline) {
  if (upstream_) {
    {
      const Lock known = lock();
      Ledger(ledger_).set_limits(id, limits);
    }
    upstream_->set_limits(id, limits);
  }
  Lock lock = this->lock();
  ledger_.set_limits(id, limits);
  return apply_limits(lock, id, deadline);
}

size_t Arena::set_capacity(const Options& wanted, Deadline deadline) {
  if (upstream_) {
    throw Error(
        Kind::kInvalid,
        "the broker shares out this device: lower the account's max, or change the broker's capacity");
  }
  const Options options = checked(*device_->backend, wanted);
  Lock lock = this->lock();
  ledger_.set_capacity(options.capacity, options.reserve_low);
  reserve_high_ = options.reserve_high;
  mapper_.set_budget(budget());
  changed_.notify_all();
  squeeze(
      lock, kNobody, "capacity", deadline, Rung::kPause, [this] { return ledger_.overdrawn(); },
      [this](size_t missing, const Givable& givable) { return ledger_.plan_shrink(missing, &givable); });
  settle_spare();
  changed_.notify_all();
  if (spare_target() != 0) {
    start_worker();
    wake_worker();
  }
  return ledger_.overdrawn();
}

void Arena::limits_changed(AccountId id, const std::string& priority, const Limits& limits) {
  const Lock lock = this->lock();
  ledger_.set_limits(id, limits);
  tallies_.at(id).priority = priority;
  changed_.notify_all();
}

Arena::Enforced Arena::enforce_limits(AccountId id, Deadline deadline) {
  Lock lock = this->lock();
  const size_t before = ledger_.at(id).held;
  const size_t above = apply_limits(lock, id, deadline);
  const size_t held = ledger_.at(id).held;
  return {before > held ? before - held : 0, above};
}

}  // namespace tem
