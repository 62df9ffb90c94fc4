// A broker of a page, for programs: it grants what is free, asks at random, and drops connections.
#pragma once

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <random>
#include <string>
#include <thread>

#include "check.hpp"
#include "client/wire.hpp"
#include "core/fd.hpp"

namespace check {

class SmallBroker {
 public:
  SmallBroker(std::string path, size_t capacity) : path_(std::move(path)), capacity_(capacity) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    path_.copy(address.sun_path, sizeof address.sun_path - 1);
    ::unlink(path_.c_str());
    listening_ = tem::Fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    CHECK_EQ(::bind(listening_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
    CHECK_EQ(::listen(listening_.get(), 4), 0);
    thread_ = std::thread([this] { serve(); });
  }
  ~SmallBroker() {
    over_ = true;
    thread_.join();
    ::unlink(path_.c_str());
  }

  /// From now on nobody is asked and no connection is dropped.
  void rest() { resting_ = true; }
  size_t charged() const { return charged_; }
  int dropped() const { return dropped_; }
  int asked() const { return asked_; }
  int wrong() const { return wrong_; }

 private:
  template <class Body>
  Body body(const char* data, size_t bytes) {
    return tem::client::body_of<Body>(data, bytes);
  }
  template <class Body>
  void send(uint64_t request, const Body& message) {
    const auto bytes = tem::client::encode(request, message);
    ::send(client_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
  }

  void serve() {
    std::mt19937 random(1);
    while (!over_) {
      pollfd entries[2] = {{listening_.get(), POLLIN, 0}, {client_.get(), POLLIN, 0}};
      ::poll(entries, 2, 1);
      if ((entries[0].revents & POLLIN) != 0) {
        client_ = tem::Fd(::accept(listening_.get(), nullptr, nullptr));
        accounts_.clear();
        sum();
        continue;
      }
      if (!client_) continue;
      if ((entries[1].revents & (POLLIN | POLLHUP)) != 0 && !receive()) continue;
      if (resting_ || accounts_.empty()) continue;
      if (random() % 4 == 0) ask(random);
      if (random() % 3000 == 0) {
        client_.close();
        ++dropped_;
      }
    }
  }

  void ask(std::mt19937& random) {
    auto account = accounts_.begin();
    std::advance(account, random() % accounts_.size());
    tem::client::Ask ask{};
    ask.account = account->first;
    ask.rung = random() % 2;
    ask.bytes = (1 + random() % 8) << 21;
    ask.timeout = 20000;
    ask.demander = tem::client::Text<64>("somebody");
    send(next_++, ask);
    ++asked_;
  }

  bool receive() {
    char data[8192];
    const ssize_t got = ::recv(client_.get(), data, sizeof data, 0);
    if (got <= 0) {
      client_.close();
      return false;
    }
    const auto bytes = static_cast<size_t>(got);
    tem::client::Header header;
    std::memcpy(&header, data, sizeof header);
    using tem::client::Type;
    switch (static_cast<Type>(header.type)) {
      case Type::kHello:
        send(header.request, tem::client::Welcome{1, capacity_});
        break;
      case Type::kOpen: {
        const auto open = body<tem::client::Open>(data, bytes);
        const uint32_t number = ++last_;
        accounts_[number] = open.lease;
        send(header.request, tem::client::Opened{number, 0, open.limits});
        break;
      }
      case Type::kClose: {
        const uint32_t number = body<tem::client::Close>(data, bytes).account;
        if (accounts_[number] != 0) {
          send(header.request, Refused{{7, 0}});
          break;
        }
        accounts_.erase(number);
        send(header.request, Done{});
        break;
      }
      case Type::kDemand: {
        const auto demand = body<tem::client::Demand>(data, bytes);
        const size_t free = capacity_ > charged_ ? capacity_ - charged_ : 0;
        if (demand.bytes > free) {
          send(header.request, Denied{{3, 0}});
        } else {
          const size_t given = std::min<size_t>(demand.want, free);
          accounts_[demand.account] += given;
          send(header.request, tem::client::Granted{demand.account, 0, given});
        }
        break;
      }
      case Type::kReturn: {
        const auto back = body<tem::client::Return>(data, bytes);
        discharge(back.account, back.bytes);
        break;
      }
      case Type::kGave: {
        const auto gave = body<tem::client::Gave>(data, bytes);
        discharge(gave.account, gave.bytes);
        break;
      }
      default:
        break;
    }
    sum();
    return true;
  }

  void discharge(uint32_t account, size_t bytes) {
    const auto found = accounts_.find(account);
    if (found == accounts_.end() ? bytes != 0 : found->second < bytes) {
      ++wrong_;
      return;
    }
    if (found != accounts_.end()) found->second -= bytes;
  }

  void sum() {
    size_t total = 0;
    for (const auto& [number, lease] : accounts_) total += lease;
    charged_ = total;
  }

  struct Done {
    static constexpr tem::client::Type kType = tem::client::Type::kDone;
  };
  struct Refused {
    static constexpr tem::client::Type kType = tem::client::Type::kRefused;
    tem::client::Refusal refusal;
  };
  struct Denied {
    static constexpr tem::client::Type kType = tem::client::Type::kDenied;
    tem::client::Refusal refusal;
  };

  const std::string path_;
  const size_t capacity_;
  tem::Fd listening_, client_;
  std::map<uint32_t, size_t> accounts_;
  uint32_t last_ = 0;
  uint64_t next_ = 1;
  std::atomic<size_t> charged_{0};
  std::atomic<int> dropped_{0}, asked_{0}, wrong_{0};
  std::atomic<bool> over_{false}, resting_{false};
  std::thread thread_;
};

}  // namespace check
