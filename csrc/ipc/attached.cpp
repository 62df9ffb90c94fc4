#include "ipc/attached.hpp"

#include <cerrno>
#include <cstring>
#include <utility>

#include "backend/cuda_abi.hpp"
#include "core/error.hpp"
#include "core/sizes.hpp"
#include "ipc/leaving.hpp"
#include "ipc/socket.hpp"

namespace tem::ipc {
namespace {

constexpr size_t kMostBytes = 4096;

size_t total(const std::vector<size_t>& extents, size_t granularity) {
  size_t sum = 0;
  for (const size_t bytes : extents) {
    if (!is_pow2(bytes) || bytes % granularity != 0 || bytes > kMaxExtent || sum % bytes != 0) {
      throw Error(Kind::kInvalid, "no extent is of " + format_bytes(bytes) + " at " + format_bytes(sum));
    }
    sum = checked_add(sum, bytes);
  }
  if (sum == 0) throw Error(Kind::kInvalid, "no extents are no memory");
  return sum;
}

[[noreturn]] void refuse(const std::string& why, int code = cuda::kOperatingSystem) {
  throw Error(Kind::kDriver, "shared memory cannot be mapped: " + why, code);
}

}  // namespace

Attached::Attached(std::shared_ptr<Backend> backend, std::vector<size_t> extents)
    : device_(std::make_shared<Device>(std::move(backend))), extents_(std::move(extents)) {
  unmap_what_was_left();
  bytes_ = total(extents_, device().granularity);
  memory_ = std::make_unique<Imported>(*device_, bytes_);
}

Attached::~Attached() {
  unmap_behind(std::move(memory_), device_, [socket = socket_, message = message_] {
    // A broker that has gone, or has no room for it, sees the end of the connection or of the process.
    if (socket) send_message(socket->get(), message.data(), message.size(), {});
  });
}

std::string Attached::receive(const Fd& socket, Deadline deadline) {
  device_->born.check("shared memory");
  for (;;) {
    if (!wait_readable(socket, deadline)) return {};
    std::string message(kMostBytes, '\0');
    const Received got = receive_message(socket.get(), message.data(), message.size());
    if (got.error == EAGAIN) continue;
    if (got.error != 0) return {};
    if (got.lost) refuse("this process may open no more files; raise its limit (ulimit -n)");
    if (got.fds.size() > extents_.size() - next_) {
      refuse("more extents came than it has, " + std::to_string(extents_.size()));
    }
    for (const Fd& fd : got.fds) memory_->add(fd, extents_[next_++]);
    message.resize(got.bytes);
    return message;
  }
}

void Attached::open() {
  device_->born.check("shared memory");
  if (next_ != extents_.size()) {
    refuse(std::to_string(next_) + " extents of " + std::to_string(extents_.size()) + " have come");
  }
  try {
    memory_->allow(Access::kRead);
    read_only_ = true;
  } catch (const Error& error) {
    const bool unknown = error.code() == cuda::kNotSupported || error.code() == cuda::kInvalidValue;
    if (error.kind() != Kind::kDriver || !unknown) throw;
    memory_->allow();
  }
}

void Attached::set_farewell(Fd socket, std::string message) {
  socket_ = std::make_shared<Fd>(std::move(socket));
  message_ = std::move(message);
}

}  // namespace tem::ipc
