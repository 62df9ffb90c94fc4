#include "client/connection.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <chrono>
#include <utility>

namespace tem::client {
namespace {

/// A broker that has stopped reading is as good as gone.
constexpr size_t kMostUnsent = 4096;

[[noreturn]] void fail(const std::string& path, int number) {
  const std::string why = number == ENOENT || number == ECONNREFUSED ? "no broker listens there"
                                                                     : std::string(std::strerror(number));
  throw Error(Kind::kBroker, "broker at " + path + ": " + why +
                                 "; start one with `tem serve`, or set TEM_BROKER to its socket");
}

}  // namespace

Connection::Connection(std::string path)
    : path_(std::move(path)), wake_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
  if (!wake_) fail(path_, errno);
}

uint64_t Connection::number() const {
  const std::lock_guard<std::mutex> guard(mutex_);
  return number_;
}

void Connection::connect() {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path_.empty() || path_.size() >= sizeof address.sun_path) fail(path_, ENAMETOOLONG);
  path_.copy(address.sun_path, sizeof address.sun_path);
  Fd made(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!made) fail(path_, errno);
  if (::connect(made.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
    fail(path_, errno);
  const std::lock_guard<std::mutex> guard(mutex_);
  socket_ = std::move(made);
  unsent_.clear();
  number_ = ++last_number_;
}

void Connection::disconnect() noexcept {
  const std::lock_guard<std::mutex> guard(mutex_);
  // A child of fork() may have the socket too. There nobody comes here: the arena is left be.
  if (socket_) ::shutdown(socket_.get(), SHUT_RDWR);
  socket_.close();
  unsent_.clear();
  number_ = 0;
}

void Connection::shut() noexcept {
  const std::lock_guard<std::mutex> guard(mutex_);
  if (socket_) ::shutdown(socket_.get(), SHUT_RDWR);
}

bool Connection::flush() noexcept {
  while (!unsent_.empty()) {
    Letter& letter = unsent_.front();
    const int error =
        send_message(socket_.get(), letter.message.data(), letter.message.size(), letter.descriptors);
    if (error == EAGAIN || error == EINTR || error == ENOBUFS) return true;
    // Whoever has closed the other end may have said why before: that is still to be received. With too many
    // descriptors under way these are closed: the device then has what they were of.
    const bool survives = error == 0 || error == EPIPE || error == ECONNRESET ||
                          (error == ETOOMANYREFS && !letter.descriptors.empty());
    if (!survives) return false;
    unsent_.pop_front();
  }
  return true;
}

bool Connection::send(uint64_t number, Bytes message, std::vector<Fd> descriptors) noexcept {
  bool waiting = false;
  {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (number == 0 || number != number_) return false;
    unsent_.push_back({std::move(message), std::move(descriptors)});
    // Whoever receives sees the end of the connection, and connects again.
    if (!flush() || unsent_.size() > kMostUnsent) ::shutdown(socket_.get(), SHUT_RDWR);
    waiting = !unsent_.empty();
  }
  if (waiting) wake();
  return true;
}

Connection::Event Connection::wait(Deadline deadline, Bytes& message, std::vector<Fd>& descriptors) {
  pollfd entries[2] = {{wake_.get(), POLLIN, 0}, {-1, POLLIN, 0}};
  {
    const std::lock_guard<std::mutex> guard(mutex_);
    entries[1].fd = socket_.get();
    if (!unsent_.empty()) entries[1].events |= POLLOUT;
  }
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
  if (::poll(entries, 2, static_cast<int>(std::clamp<int64_t>(left, 0, 1 << 30))) <= 0)
    return Event::kNothing;
  if ((entries[0].revents & POLLIN) != 0) {
    uint64_t count = 0;
    [[maybe_unused]] const ssize_t got = ::read(wake_.get(), &count, sizeof count);
  }
  if ((entries[1].revents & POLLOUT) != 0) {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (!flush()) ::shutdown(socket_.get(), SHUT_RDWR);
  }
  if ((entries[1].revents & (POLLIN | POLLHUP | POLLERR)) == 0) return Event::kNothing;
  message.resize(kLargest + 1);
  Received got = receive_message(socket_.get(), message.data(), message.size());
  // Told once, before what was sent: the other end closed with something unread.
  if (got.error == ECONNRESET) got = receive_message(socket_.get(), message.data(), message.size());
  if (got.error == EAGAIN) return Event::kNothing;
  if (got.error != 0 || got.bytes == 0) return Event::kGone;
  message.resize(got.bytes);
  descriptors = std::move(got.fds);
  return Event::kMessage;
}

void Connection::wake() noexcept {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t sent = ::write(wake_.get(), &one, sizeof one);
}

}  // namespace tem::client
