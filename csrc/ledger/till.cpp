#include "ledger/till.hpp"

#include <algorithm>

namespace tem {

const Till::Admitted* Till::find(uint64_t session, AccountId id) const {
  const auto found = admitted_.find(id);
  return found == admitted_.end() || found->second.session != session ? nullptr : &found->second;
}

std::optional<size_t> Till::grant(uint64_t session, AccountId id, size_t bytes, size_t want, int64_t now) {
  const Admitted* account = find(session, id);
  if (account == nullptr || !open_ || notes_.grants.size() == kMostGrants || want < bytes) return {};
  const size_t free = ledger_->free();
  if (free < spare_ || bytes > free - spare_ || !ledger_->grant(id, bytes)) return {};
  const size_t room = ledger_->room(id);
  size_t extra = std::min(want - bytes, room > spare_ ? room - spare_ : 0);
  extra -= extra % account->step;
  if (ledger_->grant(id, extra)) bytes += extra;
  notes_.grants.push_back({id, bytes, now});
  return bytes;
}

void Till::undo() {
  const Grant& last = notes_.grants.back();
  ledger_->give_back(last.account, last.bytes);
  notes_.grants.pop_back();
}

bool Till::take_back(uint64_t session, AccountId id, size_t bytes) {
  if (find(session, id) == nullptr || !open_ || bytes > ledger_->at(id).held) return false;
  ledger_->give_back(id, bytes);
  return true;
}

bool Till::report(uint64_t session, AccountId id, const Report& report) {
  if (find(session, id) == nullptr) return false;
  notes_.reports[id] = report;
  return true;
}

Till::Notes Till::take_notes() {
  // A copy: what is reserved stays.
  Notes taken = notes_;
  notes_.grants.clear();
  notes_.reports.clear();
  return taken;
}

}  // namespace tem
