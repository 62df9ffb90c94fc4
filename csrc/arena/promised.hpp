// What was let go of for one demand and waits for a fence.
#pragma once

#include <algorithm>
#include <map>

#include "ledger/ledger.hpp"

namespace tem {

/// By account. Guarded by the arena's lock. Others may have let go of more, or hold some of it again: so it
/// is kept as what an account will hold in the end, and is never more than what it has waiting.
class Promised {
 public:
  /// What is yet to come of an account that holds so much, with so much of it behind fences.
  size_t left(AccountId id, size_t held, size_t pending) const {
    const auto found = in_the_end_.find(id);
    if (found == in_the_end_.end() || held <= found->second) return 0;
    return std::min(held - found->second, pending);
  }

  /// An account was asked: it holds so much now, and what it has behind fences has become `more`.
  void note(AccountId id, size_t held, size_t pending, size_t more) {
    in_the_end_[id] = held - std::min(held, left(id, held, pending) + more);
  }

 private:
  std::map<AccountId, size_t> in_the_end_;
};

}  // namespace tem
