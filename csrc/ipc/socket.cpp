#include "ipc/socket.hpp"

#include <poll.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <string>
#include <thread>

#include "backend/cuda_abi.hpp"
#include "core/error.hpp"

namespace tem::ipc {
namespace {

constexpr int kBacklog = 128;
constexpr int kKind = SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK;

[[noreturn]] void fail(const char* call, int number) {
  throw Error(
      Kind::kDriver,
      std::string("memory cannot be shared between processes here: ") + call + ": " + std::strerror(number),
      cuda::kOperatingSystem);
}

struct Place {
  sockaddr_un address{};
  socklen_t bytes = 0;
};

Place place_of(const SocketName& name) {
  std::string text(1, '\0');
  text += "torch_elastic_mem-";
  for (const unsigned char byte : name) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  Place place;
  place.address.sun_family = AF_UNIX;
  text.copy(place.address.sun_path, sizeof place.address.sun_path);
  place.bytes = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + text.size());
  return place;
}

const sockaddr* generic(const Place& place) { return reinterpret_cast<const sockaddr*>(&place.address); }

Fd make_socket() {
  Fd made(::socket(AF_UNIX, kKind, 0));
  if (!made) fail("socket", errno);
  return made;
}

}  // namespace

std::array<unsigned char, 16> random_bytes() {
  std::array<unsigned char, 16> bytes{};
  if (::getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
    fail("getrandom", errno);
  }
  return bytes;
}

Fd listen_at(const SocketName& name, const NoFork& no_fork) {
  Fd made = make_socket();
  const Place place = place_of(name);
  if (::bind(made.get(), generic(place), place.bytes) != 0) fail("bind", errno);
  if (::listen(made.get(), kBacklog) != 0) fail("listen", errno);
  made.keep_from_children(no_fork);
  return made;
}

Fd accept_from(const Fd& listening) {
  return Fd::not_for_children(
      [&] { return ::accept4(listening.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK); });
}

Fd connect_to(const SocketName& name, Deadline deadline) {
  const Place place = place_of(name);
  for (;;) {
    Fd made = make_socket();
    if (::connect(made.get(), generic(place), place.bytes) == 0) return made;
    if (errno == ECONNREFUSED) return {};
    if (errno != EAGAIN && errno != EINTR) fail("connect", errno);
    if (Clock::now() >= deadline) fail("connect", ETIMEDOUT);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));  // more wait there than may
  }
}

std::optional<uid_t> peer_of(const Fd& socket) {
  ucred peer{};
  socklen_t bytes = sizeof peer;
  if (::getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &peer, &bytes) != 0) return std::nullopt;
  return peer.uid;
}

bool wait_readable(const Fd& socket, Deadline deadline) {
  for (;;) {
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
    pollfd entry{socket.get(), POLLIN, 0};
    const int ready = ::poll(&entry, 1, static_cast<int>(std::clamp<int64_t>(left, 0, 1 << 30)));
    if (ready > 0) return true;
    if (ready < 0 && errno != EINTR) fail("poll", errno);
    if (Clock::now() >= deadline) return false;
  }
}

}  // namespace tem::ipc
