// Memory of another process under addresses of this one. It is charged to no account, for its owner pays, and
// counts in no figure of the arena. Unmapped when it goes, without a wait: its owner brings the fence.
#pragma once

#include <cstddef>
#include <memory>

#include "arena/growth.hpp"
#include "arena/handles.hpp"
#include "core/fd.hpp"

namespace tem {

class Imported {
 public:
  /// Reserves addresses for so many bytes.
  Imported(Device& device, size_t bytes)
      : device_(device.shared_from_this()), reservation_(device, bytes, kMaxExtent) {}
  Imported(const Imported&) = delete;
  Imported& operator=(const Imported&) = delete;
  ~Imported();

  Address base() const { return reservation_.base(); }
  /// Maps the memory behind a descriptor beside what is mapped already. After an error it is not.
  void add(const Fd& fd, size_t bytes);
  /// Opens all that is mapped to the device and its peers.
  void allow(Access access = Access::kReadWrite);

 private:
  const std::shared_ptr<Device> device_;
  Reservation reservation_;
  size_t mapped_ = 0;
};

}  // namespace tem
