// Demands at the speed of C++: what a broker takes, without what a tenant's interpreter would add.
//
// client SOCKET DEVICE TOTAL IDLE BUSY PAUSE_US SIZE ROUNDS GAP_US
//
// DEVICE is a UUID, or HOST, of TOTAL bytes. It is only named, never touched.
// IDLE connections say nothing after they have opened an account. BUSY ones, a thread each, demand and return
// for ever, and rest PAUSE_US after each; the last connection does so ROUNDS times with GAP_US in between,
// and prints for each the nanoseconds from the sending of DEMAND to the receiving of GRANT. At the end it
// prints "busy" and the demands a second of all the others together. All is free: nobody is asked to yield.
//
// client echo ROUNDS: the same message and an answer of a grant's size, from a thread that answers at once.
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "client/connection.hpp"
#include "client/wire.hpp"
#include "core/clock.hpp"

using namespace tem;
using namespace tem::client;

namespace {

class Tenant {
 public:
  Tenant(const std::string& path, const std::string& device, uint64_t total, size_t number)
      : connection_(path) {
    connection_.connect();
    Hello hello{};
    hello.device = Text<64>(device);
    hello.backend = Text<16>(device == "HOST" ? "host" : "cuda");
    hello.label = Text<64>(device);
    hello.process = Text<64>("bench");
    hello.total = total;
    hello.granularity = uint64_t{2} << 20;
    ask(hello, Type::kWelcome);
    Open open{};
    open.name = Text<64>("client " + std::to_string(number));
    open.priority = Text<32>("training");
    open.limits = WireLimits(Limits{});
    ask(open, Type::kOpened);
    account_ = body_of<Opened>(message_.data(), message_.size()).account;
  }

  /// Nanoseconds from the demand to its grant.
  int64_t turn(uint64_t bytes) {
    Demand demand{};
    demand.account = account_;
    demand.bytes = demand.want = bytes;
    demand.timeout = 1000000;
    demand.members = 1;
    const auto start = Clock::now();
    ask(demand, Type::kGrant);
    const auto end = Clock::now();
    connection_.send(connection_.number(), encode(0, Return{account_, 0, bytes}));
    return std::chrono::nanoseconds(end - start).count();
  }

 private:
  template <class Body>
  void ask(const Body& body, Type wanted) {
    const uint64_t number = ++request_;
    connection_.send(connection_.number(), encode(number, body));
    for (;;) {
      const auto event = connection_.wait(deadline_in(10), message_, descriptors_);
      if (event != Connection::Event::kMessage)
        throw Error(Kind::kBroker,
                    event == Connection::Event::kGone ? "the broker has gone" : "the broker does not answer");
      const auto header = header_of(message_.data(), message_.size());
      if (!header || header->request != number) continue;
      if (header->type == static_cast<uint16_t>(wanted)) return;
      throw refusal_of(message_.data(), message_.size());
    }
  }

  Connection connection_;
  Bytes message_;
  std::vector<Fd> descriptors_;
  uint64_t request_ = 0;
  uint32_t account_ = 0;
};

void rest(int64_t microseconds) {
  if (microseconds > 0) std::this_thread::sleep_for(std::chrono::microseconds(microseconds));
}

/// A connection has two descriptors; thousands are more than a process gets unasked.
void raise_descriptors() {
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

void echo(size_t rounds) {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, ends) != 0) throw Error(Kind::kBroker, "no sockets");
  char demand[sizeof(Header) + sizeof(Demand)] = {}, grant[sizeof(Header) + sizeof(Granted)] = {};
  std::thread answering([&] {
    char got[sizeof demand];
    while (recv(ends[1], got, sizeof got, 0) > 0) send(ends[1], grant, sizeof grant, MSG_NOSIGNAL);
  });
  for (size_t round = 0; round != rounds; ++round) {
    const auto start = Clock::now();
    send(ends[0], demand, sizeof demand, MSG_NOSIGNAL);
    char got[sizeof grant];
    recv(ends[0], got, sizeof got, 0);
    std::printf("%lld\n", static_cast<long long>(std::chrono::nanoseconds(Clock::now() - start).count()));
  }
  close(ends[0]);
  answering.join();
}

void measure(char** words) {
  const std::string path = words[1];
  const std::string device = words[2];
  const uint64_t total = std::stoull(words[3]);
  const size_t idle = std::stoull(words[4]), busy = std::stoull(words[5]);
  const int64_t pause = std::stoll(words[6]);
  const uint64_t bytes = std::stoull(words[7]);
  const size_t rounds = std::stoull(words[8]);
  const int64_t gap = std::stoll(words[9]);
  raise_descriptors();
  std::vector<std::unique_ptr<Tenant>> tenants;
  for (size_t number = 0; number <= idle + busy; ++number)
    tenants.push_back(std::make_unique<Tenant>(path, device, total, number));
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> others{0};
  std::vector<std::thread> threads;
  for (size_t number = 0; number != busy; ++number) {
    threads.emplace_back([&, number] {
      // They are not in step.
      rest(pause * static_cast<int64_t>(number) / static_cast<int64_t>(busy));
      while (!stop) {
        tenants[idle + number]->turn(bytes);
        ++others;
        rest(pause);
      }
    });
  }
  std::vector<int64_t> found;
  found.reserve(rounds);
  const auto start = Clock::now();
  for (size_t round = 0; round != rounds; ++round) {
    found.push_back(tenants.back()->turn(bytes));
    rest(gap);
  }
  const double seconds = -seconds_until(start);
  stop = true;
  for (std::thread& thread : threads) thread.join();
  for (const int64_t each : found) std::printf("%lld\n", static_cast<long long>(each));
  std::printf("busy %.1f\n", static_cast<double>(others) / seconds);
  std::printf("all %.9f\n", seconds);
  std::fflush(stdout);
  // Its connections live until whoever started it has looked at the broker.
  (void)std::getchar();
}

}  // namespace

int main(int count, char** words) {
  try {
    if (count == 3 && std::string(words[1]) == "echo") {
      echo(std::stoull(words[2]));
    } else if (count == 10) {
      measure(words);
    } else {
      return 2;
    }
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
