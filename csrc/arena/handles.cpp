#include "arena/handles.hpp"

#include <sys/resource.h>

#include <utility>

#include "core/error.hpp"

namespace tem {
namespace {

/// Numbers are given out lowest first, so a high one says that a process has many open.
bool spares_descriptor(const Fd& fd) {
  rlimit limit{};
  return ::getrlimit(RLIMIT_NOFILE, &limit) == 0 && static_cast<rlim_t>(fd.get()) < limit.rlim_cur / 2;
}

}  // namespace

Parting::Parting(Device& device, Handle handle, size_t bytes, Fd fd)
    : device_(device.shared_from_this()), handle_(handle), bytes_(bytes), fd_(std::move(fd)) {}

Parting::Parting(Parting&& other) noexcept
    : device_(std::move(other.device_)),
      handle_(other.handle_),
      bytes_(std::exchange(other.bytes_, 0)),
      fd_(std::move(other.fd_)) {}

Parting::~Parting() {
  if (bytes_ == 0 || !device_->born.here()) return;
  try {
    device_->backend->release(handle_);
  } catch (const Error&) {
    device_->created += bytes_;
    device_->lost += bytes_;
  }
}

Extent::Extent(Device& device, size_t bytes)
    : device_(&device), handle_(device.backend->create(bytes)), bytes_(bytes) {
  device.created += bytes;
}

Extent::Extent(Device& device, Passed&& passed)
    : writer(kSomebody),
      device_(&device),
      handle_(device.backend->import_fd(passed.fd)),
      bytes_(passed.bytes),
      fd_(spares_descriptor(passed.fd) ? std::move(passed.fd) : Fd()),
      imported_(true) {
  device.created += bytes_;
}

Extent::Extent(Extent&& other) noexcept
    : writer(other.writer),
      exported(other.exported),
      device_(other.device_),
      handle_(other.handle_),
      bytes_(std::exchange(other.bytes_, 0)),
      fd_(std::move(other.fd_)),
      imported_(other.imported_) {}

Extent& Extent::operator=(Extent&& other) noexcept {
  std::swap(writer, other.writer);
  std::swap(exported, other.exported);
  std::swap(device_, other.device_);
  std::swap(handle_, other.handle_);
  std::swap(bytes_, other.bytes_);
  std::swap(fd_, other.fd_);
  std::swap(imported_, other.imported_);
  return *this;
}

Extent::~Extent() {
  if (bytes_ == 0 || !device_->born.here()) return;
  try {
    release();
  } catch (const Error&) {
    abandon();
  }
}

void Extent::release() {
  device_->backend->release(handle_);
  fd_.close();
  device_->created -= std::exchange(bytes_, 0);
}

bool Extent::make_ready() {
  Fd fd = device_->backend->export_fd(handle_);
  if (!spares_descriptor(fd)) return false;
  fd_ = std::move(fd);
  return true;
}

Parting Extent::pass() {
  Fd fd = fd_ ? std::move(fd_) : device_->backend->export_fd(handle_);
  device_->created -= bytes_;
  return Parting(*device_, handle_, std::exchange(bytes_, 0), std::move(fd));
}

void Extent::abandon() noexcept { device_->lost += std::exchange(bytes_, 0); }

Reservation::Reservation(Device& device, size_t bytes, size_t alignment)
    : device_(device.shared_from_this()), bytes_(bytes), base_(device.backend->reserve(bytes, alignment)) {}

Reservation::~Reservation() {
  if (!device_->born.here()) return;
  try {
    device_->backend->unreserve(base_, bytes_);
  } catch (const Error&) {
    // Addresses are plentiful and nothing is mapped under these: leaving them reserved harms nobody.
  }
}

Mapping::Mapping(Device& device, Address at, Extent&& extent) : device_(&device), at_(at) {
  remap(std::move(extent));
}

Mapping::Mapping(Mapping&& other) noexcept
    : device_(other.device_), at_(other.at_), extent_(std::move(other.extent_)) {}

Mapping::~Mapping() {
  if (!extent_ || !device_->born.here()) return;
  try {
    Extent extent = unmap();
  } catch (const Error&) {
    extent_.abandon();
  }
}

Extent Mapping::unmap() {
  device_->backend->unmap(at_, extent_.bytes());
  return std::move(extent_);
}

void Mapping::remap(Extent&& extent) {
  device_->backend->map(at_, extent.bytes(), extent.handle());
  extent_ = std::move(extent);
}

}  // namespace tem
