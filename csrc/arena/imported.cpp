#include "arena/imported.hpp"

#include "core/error.hpp"

namespace tem {

Imported::~Imported() {
  if (mapped_ == 0 || !device_->born.here()) return;
  try {
    device_->backend->unmap(base(), mapped_);
  } catch (const Error&) {
    // It stays mapped, which costs its owner the memory until this process ends.
  }
}

void Imported::add(const Fd& fd, size_t bytes) {
  Backend& backend = *device_->backend;
  const Handle handle = backend.import_fd(fd);
  try {
    backend.map(base() + mapped_, bytes, handle);
  } catch (const Error&) {
    backend.release(handle);
    throw;
  }
  mapped_ += bytes;
  backend.release(handle);  // the mapping keeps the memory
}

void Imported::allow(Access access) {
  if (mapped_ != 0) device_->backend->allow(base(), mapped_, access);
}

}  // namespace tem
