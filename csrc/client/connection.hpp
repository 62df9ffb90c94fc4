// The socket to the broker: whole messages, nothing that blocks, and a way to wake whoever waits on it.
//
// Sending is for any thread; connecting and receiving for one.
#pragma once

#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <vector>

#include "client/wire.hpp"
#include "core/clock.hpp"
#include "core/fd_message.hpp"

namespace tem::client {

class Connection {
 public:
  /// Error{kBroker} if the system has no descriptors left.
  explicit Connection(std::string path);

  const std::string& path() const { return path_; }
  /// Counts connections: what was said on an earlier one means nothing on the next. 0 while there is none.
  uint64_t number() const;

  /// Replaces the connection. Error{kBroker}: nobody listens there, or the path cannot be one.
  void connect();
  void disconnect() noexcept;
  /// Ends the connection for both sides, from any thread: the descriptor stays, for whoever receives may be
  /// reading from it, and finds the end behind what has come.
  void shut() noexcept;

  /// Sends now or as soon as the broker reads. False if the connection is not `number`: the message is gone,
  /// and its descriptors are closed.
  bool send(uint64_t number, Bytes message, std::vector<Fd> descriptors = {}) noexcept;

  enum class Event { kNothing, kMessage, kGone };
  /// Waits for a message, a wake() or the deadline, and sends what could not be sent before.
  Event wait(Deadline deadline, Bytes& message, std::vector<Fd>& descriptors);
  void wake() noexcept;

 private:
  struct Letter {
    Bytes message;
    std::vector<Fd> descriptors;
  };
  bool flush() noexcept;

  const std::string path_;
  Fd wake_;
  mutable std::mutex mutex_;  // a leaf
  Fd socket_;
  uint64_t number_ = 0;
  uint64_t last_number_ = 0;
  std::deque<Letter> unsent_;
};

}  // namespace tem::client
