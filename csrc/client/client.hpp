// An arena's side of the broker's protocol (docs/protocol.md).
//
// Threads: callers of demand() and the like wait for the answer. One thread of its own receives; it gives
// what is unused or idle by itself, so that a demand elsewhere waits for no Python here. A second one,
// started when first needed, runs what may take long: reclaimers, waits for fences, changed limits.
//
// Order of locks: arena, then `mutex_`, then the connection's. The arena is never called with `mutex_` held.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "arena/arena.hpp"
#include "arena/upstream.hpp"
#include "client/connection.hpp"
#include "core/error.hpp"

namespace tem::client {

/// What a process says of itself and of its device.
struct Identity {
  std::string device;  // the UUID; "HOST" for memory of the machine
  std::string backend, label, process;
  size_t total = 0, granularity = 0;
};

class Client final : public Upstream, public std::enable_shared_from_this<Client> {
 public:
  /// Error{kBroker}: no broker, one of another version, or one that does not want this process.
  static std::shared_ptr<Client> connect(const std::string& path, Identity identity, Deadline deadline);
  ~Client() override;

  const std::string& path() const { return connection_.path(); }
  bool connected() const { return connection_.number() != 0; }
  /// Bytes of the device that the broker shares out, as it said when the connection began.
  size_t capacity() const noexcept override { return capacity_; }

  /// Serves the arena from now on, until stop().
  void start(const std::shared_ptr<Arena>& arena);

  Limits open(AccountId id, const std::string& name, const std::string& priority,
              const Limits& limits) override;
  void close(AccountId id) override;
  void set_limits(AccountId id, const Limits& limits) override;
  LeaseAnswer demand(const LeaseDemand& demand) override;
  void stop(bool nothing_left) noexcept override;
  void give_back(AccountId id, size_t bytes) noexcept override;
  void changed() noexcept override;

 private:
  struct Entry {
    std::string name, priority;
    Limits limits;
    std::optional<uint32_t> remote;  // the broker's number; none until it has answered
    size_t unreturned = 0;           // bytes that went back before it had
    std::string refused;             // why a new broker does not want it
    size_t held = 0, idle = 0;       // as last reported
    uint32_t rungs = 0;
    Blocks blocks{};
    // What is done to bring it under limits that the broker has set:
    bool enforcing = false;  // by a chore, queued or at work
    bool set_again = false;  // since that began
    int attempts = 0;        // left
    double rest = 0;         // seconds from the last to the next
    Deadline next_attempt{};
  };
  /// A question that somebody waits with.
  struct Call {
    Type type;
    AccountId account;
    const LeaseDemand* demand = nullptr;
    Limits limits{};
    bool sent = false;
    bool heard = false;     // an OPEN: sent, be it over a connection that is gone
    bool settling = false;  // the answer is here and is being booked
    bool done = false;
    bool taken = false;
    std::optional<Error> error{};
  };
  // Attempts at limits below what is held that free nothing, and seconds to the second of them; then twice as
  // long each time.
  static constexpr int kAttempts = 5;
  static constexpr double kRest = 1.0;
  using Lock = std::unique_lock<std::mutex>;
  using Chore = std::function<void(Arena&)>;

  Client(const std::string& path, Identity identity);

  void handshake(Deadline deadline);
  void listen();
  void rejoin();
  void lose() noexcept;
  void handle(const Bytes& message, std::vector<Fd> descriptors);
  void on_opened(const Header& header, const Opened& opened);
  void on_done(const Header& header);
  void on_refused(const Header& header, const Error& why);
  void on_grant(const Header& header, const Granted& granted);
  void on_ask(const Header& header, const Ask& ask);
  void on_passed(const Header& header, const PassedOn& passed, std::vector<Fd> descriptors);
  void on_set(const Set& set);
  void finish(uint64_t request, std::optional<Error> error);
  void enforce(AccountId id);
  void enforced(AccountId id, size_t freed, size_t above);
  void report();
  void add_chore(Chore chore);
  bool has_worker();
  void work();

  void call(Lock& lock, Call& call, Deadline deadline);
  const Call* question(AccountId id, std::optional<Type> type = {}) const;
  void part(AccountId id);
  void tell_left(Deadline deadline) noexcept;
  bool opens(AccountId id) const;
  bool leaving(const std::string& name) const;
  void try_send(uint64_t request, Call& call);
  void send_open(AccountId id, Entry& entry, size_t lease);
  std::optional<AccountId> local(uint32_t remote) const;
  template <class Body>
  bool post(uint64_t request, const Body& body) {
    return connection_.send(connection_.number(), encode(request, body));
  }

  const Identity identity_;
  Connection connection_;
  std::atomic<size_t> capacity_{0};
  std::weak_ptr<Arena> owner_;
  Arena* arena_ = nullptr;  // the receiving thread ends before the arena does

  mutable std::mutex mutex_;
  std::condition_variable answered_;
  bool stopping_ = false;
  std::map<AccountId, Entry> entries_;
  std::map<AccountId, Entry> left_;  // closed, and a broker that may know them has not been told
  std::map<uint64_t, Call*> calls_;
  std::map<uint64_t, AccountId> openings_;  // of `left_` until the CLOSE of that number is answered
  uint64_t next_request_ = 1;
  std::deque<Chore> chores_;
  std::condition_variable chore_;
  std::thread receiver_, worker_;

  std::map<uint64_t, std::vector<Passed>> passed_;  // by demand, until its grant; the receiving thread's

  std::atomic<bool> dirty_{false};
  Deadline next_report_{}, next_look_{};
};

}  // namespace tem::client
