#include "broker/teller.hpp"

#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <string>
#include <system_error>
#include <utility>

#include "core/clock.hpp"
#include "core/error.hpp"
#include "core/fd_message.hpp"

namespace tem::broker {
namespace {

// No connection has it: theirs begin at 1.
constexpr uint64_t kStop = 0;
constexpr int kEvents = 64;

Fd made(int descriptor) {
  if (descriptor < 0)
    throw Error(Kind::kBroker, std::string("the broker cannot serve: ") + std::strerror(errno));
  return Fd(descriptor);
}

/// The body of a message that is as long as it should be.
template <class Body>
std::optional<Body> body(const char* message, size_t bytes) {
  if (bytes != sizeof(client::Header) + sizeof(Body)) return {};
  return client::body_of<Body>(message, bytes);
}

bool blank(const client::Text<64>& text) {
  const char* bytes = text.bytes;
  return std::all_of(bytes, bytes + sizeof text.bytes, [](char each) { return each == 0; });
}

Received receive(int socket, char* buffer, size_t bytes) {
  Received got = receive_message(socket, buffer, bytes);
  // Told once, before what was sent: the other end closed with something unread.
  return got.error == ECONNRESET ? receive_message(socket, buffer, bytes) : std::move(got);
}

}  // namespace

Teller::Teller()
    : epoll_(made(::epoll_create1(EPOLL_CLOEXEC))),
      bell_(made(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK))),
      stop_(made(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK))) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = kStop;
  ::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, stop_.get(), &event);
  // Signals are for the thread that runs Python's loop.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::thread([this] { serve(); });
  } catch (const std::system_error& error) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw Error(Kind::kBroker, std::string("the broker cannot serve: ") + error.what());
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Teller::~Teller() {
  if (!born_.here()) {
    thread_.detach();
    return;
  }
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t sent = ::write(stop_.get(), &one, sizeof one);
  thread_.join();
}

// The teller takes the lock anew for every message, and a mutex is not fair: without `wanted_`, a busy teller
// would keep the books waiting.
void Teller::begin_turn() {
  wanted_ = true;
  mutex_.lock();
}

void Teller::end_turn() {
  wanted_ = false;
  mutex_.unlock();
  free_.notify_one();
}

void Teller::add(uint64_t number, int socket) {
  Connection made;
  made.socket = socket;
  watch(number, made);
  connections_.emplace(number, std::move(made));
}

void Teller::seat(uint64_t number, std::shared_ptr<Till> till, uint64_t session) {
  const auto found = connections_.find(number);
  if (found == connections_.end()) return;
  found->second.till = std::move(till);
  found->second.session = session;
}

void Teller::mute(uint64_t number, bool muted) {
  const auto found = connections_.find(number);
  if (found != connections_.end()) found->second.muted = muted;
}

void Teller::resume(uint64_t number) {
  const auto found = connections_.find(number);
  if (found != connections_.end() && !found->second.reading) watch(number, found->second);
}

std::optional<Teller::Letter> Teller::remove(uint64_t number) {
  const auto found = connections_.find(number);
  if (found == connections_.end()) return {};
  unwatch(found->second);
  connections_.erase(found);
  const auto letter = std::find_if(letters_.begin(), letters_.end(),
                                   [number](const Letter& each) { return each.number == number; });
  if (letter == letters_.end()) return {};
  std::optional<Letter> taken = std::move(*letter);
  letters_.erase(letter);
  return taken;
}

std::optional<Teller::Letter> Teller::take() {
  if (letters_.empty()) {
    uint64_t count = 0;
    [[maybe_unused]] const ssize_t got = ::read(bell_.get(), &count, sizeof count);
    return {};
  }
  std::optional<Letter> taken = std::move(letters_.front());
  letters_.pop_front();
  return taken;
}

void Teller::serve() {
  std::array<epoll_event, kEvents> events{};
  for (;;) {
    const int found = ::epoll_wait(epoll_.get(), events.data(), kEvents, -1);
    for (int i = 0; i < found; ++i) {
      const uint64_t number = events[static_cast<size_t>(i)].data.u64;
      if (number == kStop) return;
      std::unique_lock<std::mutex> lock(mutex_);
      free_.wait(lock, [this] { return !wanted_; });
      attend(number);
    }
  }
}

/// The event may be older than the last turn of the books: a number that is not read here means nothing.
void Teller::attend(uint64_t number) {
  const auto found = connections_.find(number);
  if (found == connections_.end() || !found->second.reading) return;
  Connection& connection = found->second;
  std::array<char, client::kLargest + 1> message;
  Received got = receive(connection.socket, message.data(), message.size());
  if (got.error == EAGAIN) return;
  if (answer(connection, message.data(), got.bytes)) return;
  unwatch(connection);
  letters_.push_back({number, Bytes(message.data(), message.data() + got.bytes), std::move(got.fds)});
  if (letters_.size() == 1) ring();
}

/// False: it is the books' to answer, and nothing has been done.
bool Teller::answer(Connection& connection, const char* message, size_t bytes) {
  const std::optional<client::Header> header = client::header_of(message, bytes);
  if (!connection.till || !header) return false;
  Till& till = *connection.till;
  switch (static_cast<client::Type>(header->type)) {
    case client::Type::kDemand: {
      const auto demand = body<client::Demand>(message, bytes);
      return demand && grant(connection, header->request, *demand);
    }
    case client::Type::kReturn: {
      const auto back = body<client::Return>(message, bytes);
      return back && back->pad == 0 && till.take_back(connection.session, back->account, back->bytes);
    }
    case client::Type::kReport: {
      const auto report = body<client::Report>(message, bytes);
      return report && till.report(connection.session, report->account,
                                   {report->rungs,
                                    report->held,
                                    report->idle,
                                    {report->in_use, report->cached, report->free, report->parked}});
    }
    default:
      return false;
  }
}

bool Teller::grant(Connection& connection, uint64_t request, const client::Demand& demand) {
  const bool known_rung = demand.rung <= client::kDearestRung || demand.rung == client::kNoRung;
  if (connection.muted || !known_rung || demand.pad != 0 || !blank(demand.group)) return false;
  Till& till = *connection.till;
  const auto bytes =
      till.grant(connection.session, demand.account, demand.bytes, demand.want, nanoseconds(Clock::now()));
  if (!bytes) return false;
  const Bytes told = client::encode(request, client::Granted{demand.account, 0, *bytes});
  if (::send(connection.socket, told.data(), told.size(), MSG_DONTWAIT | MSG_NOSIGNAL) < 0) {
    till.undo();
    return false;
  }
  if (till.many()) ring();
  return true;
}

void Teller::watch(uint64_t number, Connection& connection) {
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = number;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, connection.socket, &event) != 0) {
    throw Error(Kind::kBroker, std::string("a connection cannot be read: ") + std::strerror(errno));
  }
  connection.reading = true;
}

void Teller::unwatch(Connection& connection) {
  // Not only without events to wait for: the end of a connection is always told.
  if (connection.reading) ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, connection.socket, nullptr);
  connection.reading = false;
}

void Teller::ring() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t sent = ::write(bell_.get(), &one, sizeof one);
}

}  // namespace tem::broker
