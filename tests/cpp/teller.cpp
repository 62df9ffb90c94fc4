// Tenants at a teller, and the books that take their turns between: for the sanitizers.
//
// Each tenant demands and returns from a thread of its own, says something in between that is the books' to
// answer, and counts what it holds. The books check in every turn that nothing is leased twice, open and
// close the till, let connections go in the middle of everything, and answer what they are handed.
#include "broker/teller.hpp"

#include <poll.h>
#include <sys/socket.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "client/wire.hpp"
#include "core/error.hpp"
#include "core/fd.hpp"
#include "ledger/till.hpp"
#include "threads.hpp"

using namespace tem;  // NOLINT
using broker::Teller;
using client::Bytes;
using client::Type;

namespace {

constexpr size_t kCapacity = 1000;
constexpr size_t kSpare = 50;
constexpr int kRounds = 3000;

struct Ends {
  Fd ours, theirs;
};

Ends ends() {
  int made[2];
  CHECK_EQ(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, made), 0);
  return {Fd(made[0]), Fd(made[1])};
}

template <class Body>
void say(const Fd& socket, uint64_t request, const Body& body) {
  const Bytes message = client::encode(request, body);
  ::send(socket.get(), message.data(), message.size(), MSG_NOSIGNAL);
}

/// The header and bytes of the next message. Nothing at the end.
std::optional<std::pair<client::Header, size_t>> hear(const Fd& socket) {
  std::array<char, client::kLargest> message;
  const ssize_t got = ::recv(socket.get(), message.data(), message.size(), 0);
  if (got <= 0) return {};
  const auto header = client::header_of(message.data(), static_cast<size_t>(got));
  CHECK(header.has_value());
  size_t bytes = 0;
  if (header->type == static_cast<uint16_t>(Type::kGrant))
    bytes = client::body_of<client::Granted>(message.data(), static_cast<size_t>(got)).bytes;
  return std::pair(*header, bytes);
}

struct Done {
  static constexpr Type kType = Type::kDone;
};

/// What a tenant does until it is told to stop, or its connection ends. The bytes that it holds then.
size_t live(const Fd& socket, AccountId account, unsigned seed, const std::atomic<bool>& over) {
  std::mt19937 random(seed);
  size_t held = 0;
  for (uint64_t request = 1; !over; ++request) {
    client::Demand demand{};
    demand.account = account;
    demand.bytes = 1 + random() % 100;
    demand.want = demand.bytes + random() % 50;
    const bool other = random() % 8 == 0;
    if (other)
      say(socket, request, client::Withdraw{});
    else
      say(socket, request, demand);
    const auto answer = hear(socket);
    if (!answer) return held;
    CHECK_EQ(answer->first.request, request);  // in the order of the questions
    CHECK_EQ(answer->first.type == static_cast<uint16_t>(Type::kDone), other);
    if (answer->second != 0) {
      CHECK(answer->second >= demand.bytes && answer->second <= demand.want);
      held += answer->second;
    }
    if (random() % 4 == 0) say(socket, 0, client::Report{account, 1, held, 0, 0, 0, 0, 0});
    if (held != 0 && random() % 4 != 0) {
      const size_t back = 1 + random() % held;
      held -= back;
      say(socket, 0, client::Return{account, 0, back});
    }
  }
  if (held != 0) say(socket, 0, client::Return{account, 0, held});
  ::shutdown(socket.get(), SHUT_WR);
  return 0;
}

class Books {
 public:
  Books() : ledger_(std::make_shared<Ledger>(kCapacity, 0)), till_(std::make_shared<Till>(ledger_)) {}

  uint64_t add(Fd socket) {
    const uint64_t number = ++last_;
    Limits limits;
    limits.max = kCapacity / 2;
    const AccountId account = ledger_->open("account " + std::to_string(number), limits);
    till_->admit(account, number, 1);
    teller_.begin_turn();
    teller_.add(number, socket.get());
    teller_.seat(number, till_, number);
    teller_.end_turn();
    sockets_[number] = std::move(socket);
    return account;
  }

  /// One turn, after there was something to do or a moment has passed.
  void turn(std::mt19937& random) {
    pollfd bell{teller_.descriptor(), POLLIN, 0};
    ::poll(&bell, 1, 1);
    teller_.begin_turn();
    const Till::Notes notes = till_->take_notes();
    granted_ += notes.grants.size();
    for (const auto& [account, report] : notes.reports) CHECK(report.held <= kCapacity);
    size_t sum = 0;
    for (const auto& [account, holding] : ledger_->accounts()) sum += holding.held;
    CHECK_EQ(sum, ledger_->leased());
    CHECK(sum <= kCapacity);
    for (int some = 0; some < 4; ++some) {
      const auto letter = teller_.take();
      if (!letter) break;
      answer(*letter);
    }
    const uint64_t any = 1 + random() % last_;
    teller_.mute(any, random() % 4 == 0);
    if (random() % 8 == 0)
      till_->close();
    else
      till_->open(kSpare);
    teller_.end_turn();
  }

  /// In the middle of everything. What was held stays leased.
  void drop(uint64_t number) {
    teller_.begin_turn();
    teller_.remove(number);
    till_->dismiss(static_cast<AccountId>(number));
    teller_.end_turn();
    sockets_.erase(number);
  }

  size_t connections() const { return sockets_.size(); }
  size_t granted() const { return granted_; }
  size_t forwarded() const { return forwarded_; }
  size_t held(AccountId account) const { return ledger_->at(account).held; }

 private:
  void answer(const Teller::Letter& letter) {
    ++forwarded_;
    const Fd& socket = sockets_.at(letter.number);
    const Bytes& message = letter.message;
    if (message.empty()) {
      teller_.remove(letter.number);
      sockets_.erase(letter.number);
      return;
    }
    const auto header = client::header_of(message.data(), message.size());
    CHECK(header.has_value());
    switch (static_cast<Type>(header->type)) {
      case Type::kDemand: {
        const auto demand = client::body_of<client::Demand>(message.data(), message.size());
        const bool fits = ledger_->grant(demand.account, demand.bytes);
        say(socket, header->request, client::Granted{demand.account, 0, fits ? demand.bytes : 0});
        break;
      }
      case Type::kReturn: {
        const auto back = client::body_of<client::Return>(message.data(), message.size());
        ledger_->give_back(back.account, back.bytes);
        break;
      }
      case Type::kWithdraw:
        say(socket, header->request, Done{});
        break;
      default:
        CHECK(header->type == static_cast<uint16_t>(Type::kReport));
    }
    teller_.resume(letter.number);
  }

  const std::shared_ptr<Ledger> ledger_;
  const std::shared_ptr<Till> till_;
  std::map<uint64_t, Fd> sockets_;
  uint64_t last_ = 0;
  size_t granted_ = 0, forwarded_ = 0;
  Teller teller_;
};

void many_tenants() {
  Books books;
  std::mt19937 random(3);
  std::atomic<bool> over{false};
  std::vector<Fd> theirs;
  std::vector<size_t> held(6);
  std::vector<AccountId> accounts;
  for (size_t i = 0; i < held.size(); ++i) {
    Ends made = ends();
    accounts.push_back(static_cast<AccountId>(books.add(std::move(made.ours))));
    theirs.push_back(std::move(made.theirs));
  }
  check::Threads threads;
  for (size_t i = 0; i < held.size(); ++i) {
    threads.start([&, i] {
      try {
        held[i] = live(theirs[i], accounts[i], static_cast<unsigned>(i), over);
      } catch (...) {
        ::shutdown(theirs[i].get(), SHUT_RDWR);
        throw;
      }
    });
  }
  for (int round = 0; round < kRounds; ++round) {
    books.turn(random);
    if (round == kRounds / 2) books.drop(1);
  }
  over = true;
  while (books.connections() != 0) books.turn(random);
  threads.join();
  CHECK_EQ(threads.failed(), 0);
  CHECK(books.held(accounts[0]) >= held[0]);
  for (size_t i = 1; i < accounts.size(); ++i) CHECK_EQ(books.held(accounts[i]), 0U);
  CHECK(books.granted() > 100);
  CHECK(books.forwarded() > 100);
}

struct Alone {
  std::shared_ptr<Ledger> ledger = std::make_shared<Ledger>(kCapacity, 0);
  std::shared_ptr<Till> till = std::make_shared<Till>(ledger);
  AccountId account = ledger->open("a", Limits{});
  Ends socket = ends();
  Teller teller;

  Alone() {
    till->admit(account, 7, 1);
    till->open(0);
    teller.begin_turn();
    teller.add(1, socket.ours.get());
    teller.seat(1, till, 7);
    teller.end_turn();
  }

  /// The message that the teller hands over next.
  Teller::Letter handed() {
    for (;;) {
      pollfd bell{teller.descriptor(), POLLIN, 0};
      ::poll(&bell, 1, -1);
      teller.begin_turn();
      auto letter = teller.take();
      teller.end_turn();
      if (letter) return std::move(*letter);
    }
  }

  void demand(uint64_t request, size_t bytes) {
    client::Demand message{};
    message.account = account;
    message.bytes = message.want = bytes;
    say(socket.theirs, request, message);
  }
};

void order() {
  Alone alone;
  say(alone.socket.theirs, 1, client::Withdraw{});
  alone.demand(2, 10);
  alone.handed();
  // The demand waits behind what the books have in hand, also when others are answered.
  pollfd answer{alone.socket.theirs.get(), POLLIN, 0};
  CHECK_EQ(::poll(&answer, 1, 50), 0);
  alone.teller.begin_turn();
  CHECK_EQ(alone.ledger->leased(), 0U);
  alone.teller.resume(1);
  alone.teller.end_turn();
  CHECK_EQ(hear(alone.socket.theirs)->second, 10U);
}

void lies() {
  Alone alone;
  alone.demand(1, 10);
  CHECK_EQ(hear(alone.socket.theirs)->second, 10U);
  say(alone.socket.theirs, 0, client::Return{alone.account, 0, 11});
  CHECK_EQ(alone.handed().message.size(), sizeof(client::Header) + sizeof(client::Return));
  CHECK_EQ(alone.ledger->leased(), 10U);
}

void somebody_elses() {
  Alone alone;
  const AccountId other = alone.ledger->open("b", Limits{});
  alone.till->admit(other, 8, 1);
  client::Demand message{};
  message.account = other;
  message.bytes = message.want = 1;
  say(alone.socket.theirs, 0, message);
  alone.handed();
  CHECK_EQ(alone.ledger->leased(), 0U);
}

void no_message() {
  for (const size_t size : {1, 16, 20, 4096, 5000}) {
    Alone alone;
    const Bytes bytes(size, 1);
    ::send(alone.socket.theirs.get(), bytes.data(), bytes.size(), 0);
    CHECK_EQ(alone.handed().message.size(), std::min<size_t>(size, client::kLargest + 1));
  }
}

void end_of_a_connection() {
  Alone alone;
  alone.demand(1, 10);
  CHECK_EQ(hear(alone.socket.theirs)->second, 10U);
  say(alone.socket.theirs, 0, client::Return{alone.account, 0, 10});
  alone.socket.theirs.close();
  CHECK(alone.handed().message.empty());
  CHECK_EQ(alone.ledger->leased(), 0U);
}

void muted() {
  Alone alone;
  alone.teller.begin_turn();
  alone.teller.mute(1, true);
  alone.teller.end_turn();
  alone.demand(1, 10);
  alone.handed();
  alone.demand(2, 10);
  alone.teller.begin_turn();
  CHECK_EQ(alone.ledger->leased(), 0U);
  alone.teller.mute(1, false);
  alone.teller.resume(1);
  alone.teller.end_turn();
  CHECK_EQ(hear(alone.socket.theirs)->first.request, 2U);
}

void full_socket() {
  Alone alone;
  client::Demand demand{};
  demand.account = alone.account;
  demand.bytes = demand.want = 1;
  const Bytes message = client::encode(1, demand);
  size_t granted = 0;
  for (std::optional<Teller::Letter> letter; !letter;) {
    ::send(alone.socket.theirs.get(), message.data(), message.size(), MSG_DONTWAIT);
    alone.teller.begin_turn();
    granted += alone.till->take_notes().grants.size();
    if (alone.ledger->free() == 0) alone.ledger->give_back(alone.account, alone.ledger->leased());
    letter = alone.teller.take();
    alone.teller.end_turn();
  }
  for (size_t heard = 0; heard != granted; ++heard) CHECK_EQ(hear(alone.socket.theirs)->second, 1U);
  pollfd more{alone.socket.theirs.get(), POLLIN, 0};
  CHECK_EQ(::poll(&more, 1, 0), 0);
}

}  // namespace

int main() {
  check::property("many tenants are granted no more than there is, each in its order", many_tenants);
  check::property("no message overtakes one that the books have in hand", order);
  check::property("who returns more than it holds is the books' to judge", lies);
  check::property("an account is its own connection's alone", somebody_elses);
  check::property("what is no message is the books' to judge", no_message);
  check::property("the end of a connection is told, behind all that was said", end_of_a_connection);
  check::property("a grant overtakes no letter that waits with the books", muted);
  check::property("a socket that is full is the books' to mind", full_socket);
  std::printf("%d failed\n", check::failures());
  return check::failures() == 0 ? 0 : 1;
}
