// The yields on record, and what accounts have given and taken.
#include "arena/arena.hpp"

namespace tem {
namespace {

constexpr size_t kYieldsKept = 4096;

}  // namespace

std::vector<Yield> Arena::yields(uint64_t since) {
  const Lock held = lock();
  std::vector<Yield> out;
  for (const Yield& yield : yields_) {
    if (yield.seq > since) out.push_back(yield);
  }
  return out;
}

void Arena::record(AccountId demander, const std::string& label, AccountId victim, Rung rung, size_t asked,
                   size_t given, Clock::time_point start) {
  if (demander == victim) return;
  if (given != 0) {
    tallies_.at(victim).given += given;
    tallies_.at(victim).yields += 1;
    // A reclaimer may have closed the demander's account.
    if (const auto taker = tallies_.find(demander); taker != tallies_.end()) taker->second.taken += given;
  }
  yields_.push_back({next_yield_++, nanoseconds(start), nanoseconds(Clock::now()) - nanoseconds(start), label,
                     ledger_.at(victim).name, rung, asked, given});
  if (yields_.size() > kYieldsKept) yields_.pop_front();
}

}  // namespace tem
