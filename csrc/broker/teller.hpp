// The broker's thread that reads what tenants say, and answers by itself what needs no decision (Till). All
// else it hands to the books, which are Python.
//
// The books and the teller take turns: one lock, which the books come first to. Tills, their ledgers and this
// class are touched in a turn only, and so is a tenant's socket. A connection is read by one of the two at a
// time: who was handed a message of it reads it until resume(). So no message overtakes another, and what a
// tenant says without being heard waits in its socket.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_map>
#include <vector>

#include "client/wire.hpp"
#include "core/fd.hpp"
#include "core/fork.hpp"
#include "ledger/till.hpp"

namespace tem::broker {

using client::Bytes;

class Teller {
 public:
  /// Error{kBroker}: the system has no descriptors or no threads left.
  Teller();
  Teller(const Teller&) = delete;
  Teller& operator=(const Teller&) = delete;
  ~Teller();

  /// Readable while letters wait for the books, and when notes should be taken. take() makes it quiet once
  /// there is nothing to take.
  int descriptor() const { return bell_.get(); }

  // The books' turn. For one thread; what follows is called in a turn.

  void begin_turn();
  void end_turn();

  /// Begins to read a socket, which stays the caller's; `number` is never used again. Error{kBroker}: the
  /// system watches no more.
  void add(uint64_t number, int socket);
  /// Whose accounts the connection may name, and at which till.
  void seat(uint64_t number, std::shared_ptr<Till> till, uint64_t session);
  /// While the books have letters that the tenant has not room for, the teller sends none.
  void mute(uint64_t number, bool muted);
  /// Reads on behind the message that was taken. Error{kBroker} as above.
  void resume(uint64_t number);
  /// Lets a connection go: its socket is not touched any more. What was read of it and not taken, if
  /// anything.
  struct Letter {
    uint64_t number;
    Bytes message;  // none: the connection has ended
    std::vector<Fd> descriptors;
  };
  std::optional<Letter> remove(uint64_t number);

  /// The oldest message that is the books' to answer, if any. Who takes it reads that connection.
  std::optional<Letter> take();

 private:
  struct Connection {
    int socket = -1;
    bool reading = false;  // by the teller
    bool muted = false;
    std::shared_ptr<Till> till;
    uint64_t session = 0;
  };

  void serve();
  void attend(uint64_t number);
  bool answer(Connection& connection, const char* message, size_t bytes);
  bool grant(Connection& connection, uint64_t request, const client::Demand& demand);
  void watch(uint64_t number, Connection& connection);
  void unwatch(Connection& connection);
  void ring();

  const BornHere born_;
  Fd epoll_, bell_, stop_;

  std::mutex mutex_;
  std::condition_variable free_;
  std::atomic<bool> wanted_{false};  // by the books
  std::unordered_map<uint64_t, Connection> connections_;
  std::deque<Letter> letters_;

  std::thread thread_;
};

}  // namespace tem::broker
