// What needs no decision: while nobody waits for memory and nobody was asked for any, free bytes are
// whoever's asks first, and bytes that come back are free. The books open it when that is so, and close it
// else. As pure as the ledger, of which it is a part: no I/O, no clock, no lock.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "ledger/ledger.hpp"

namespace tem {

class Till {
 public:
  struct Grant {
    AccountId account;
    size_t bytes;
    int64_t at;
  };
  struct Report {
    uint32_t rungs;
    size_t held, idle;
    std::array<uint32_t, 4> blocks;
  };
  /// What has happened at the till. Of each account the last report counts.
  struct Notes {
    std::vector<Grant> grants;
    std::map<AccountId, Report> reports;
  };

  /// Grants that it keeps in mind; with so many it grants no more until they are taken.
  static constexpr size_t kMostGrants = 1024;
  /// So many should be taken soon.
  static constexpr size_t kManyGrants = kMostGrants / 4;

  explicit Till(std::shared_ptr<Ledger> ledger) : ledger_(std::move(ledger)) {
    notes_.grants.reserve(kMostGrants);
  }

  /// `spare` bytes stay free: to grant them takes a decision.
  void open(size_t spare) {
    open_ = true;
    spare_ = spare;
  }
  void close() { open_ = false; }

  /// An account is served here, for one session alone. What it gets beyond its need is a multiple of `step`.
  void admit(AccountId id, uint64_t session, size_t step) { admitted_[id] = {session, step}; }
  void dismiss(AccountId id) { admitted_.erase(id); }

  /// Leases `bytes`, and up to `want` of what is free beyond the spare. Nothing: the books are to decide.
  std::optional<size_t> grant(uint64_t session, AccountId id, size_t bytes, size_t want, int64_t now);
  /// Takes the last grant back, which could not be told.
  void undo();
  /// False: the books are to decide.
  bool take_back(uint64_t session, AccountId id, size_t bytes);
  bool report(uint64_t session, AccountId id, const Report& report);

  /// There are so many grants that somebody should take them.
  bool many() const { return notes_.grants.size() == kManyGrants; }
  Notes take_notes();

 private:
  struct Admitted {
    uint64_t session;
    size_t step;
  };
  const Admitted* find(uint64_t session, AccountId id) const;

  const std::shared_ptr<Ledger> ledger_;
  bool open_ = false;
  size_t spare_ = 0;
  std::map<AccountId, Admitted> admitted_;
  Notes notes_;
};

}  // namespace tem
