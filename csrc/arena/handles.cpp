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

Extent::Extent(Device& device, size_t bytes)
    : device_(&device), handle_(device.backend->create(bytes)), bytes_(bytes) {
  device.created += bytes;
}

Extent::Extent(Device& device, Passed&& passed)
    : writer(kSomebody),
      device_(&device),
      handle_(device.backend->import_fd(passed.fd)),
      bytes_(passed.bytes),
      origin_(spares_descriptor(passed.fd) ? std::move(passed.fd) : Fd()) {
  device.created += bytes_;
}

Extent::Extent(Extent&& other) noexcept
    : writer(other.writer),
      exported(other.exported),
      device_(other.device_),
      handle_(other.handle_),
      bytes_(std::exchange(other.bytes_, 0)),
      origin_(std::move(other.origin_)) {}

Extent& Extent::operator=(Extent&& other) noexcept {
  std::swap(writer, other.writer);
  std::swap(exported, other.exported);
  std::swap(device_, other.device_);
  std::swap(handle_, other.handle_);
  std::swap(bytes_, other.bytes_);
  std::swap(origin_, other.origin_);
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
  origin_.close();
  device_->created -= std::exchange(bytes_, 0);
}

Passed Extent::pass() {
  Passed passed{bytes_, origin_ ? std::move(origin_) : device_->backend->export_fd(handle_)};
  release();
  return passed;
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
