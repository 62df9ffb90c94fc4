// Memory that a broker keeps for several processes, under addresses of this one: read-only where the driver
// knows such mappings. It is charged to nobody here.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "arena/imported.hpp"
#include "core/clock.hpp"
#include "core/fd.hpp"

namespace tem::ipc {

class Attached {
 public:
  /// Reserves addresses for extents of these sizes; all are powers of two, aligned to their size.
  Attached(std::shared_ptr<Backend> backend, std::vector<size_t> extents);
  Attached(const Attached&) = delete;
  Attached& operator=(const Attached&) = delete;
  /// Unmaps once all that was submitted on the device has run, and says farewell then.
  ~Attached();

  const Capabilities& device() const { return device_->backend->capabilities(); }
  Address base() const { return memory_->base(); }
  size_t bytes() const { return bytes_; }
  size_t mapped() const { return next_; }  // extents

  /// Receives a message of at most 4,096 bytes and maps the descriptors that come with it. Empty: the other
  /// side has gone, or nothing came by the deadline. Error{kDriver} where a descriptor is of no such memory,
  /// or found no room in this process's table.
  std::string receive(const Fd& socket, Deadline deadline);

  /// Opens all of it for reading; for writing too, where the driver has no read-only mappings. Error{kDriver}
  /// if extents are missing.
  void open();
  bool read_only() const { return read_only_; }

  /// What is sent when the memory has been unmapped.
  void set_farewell(Fd socket, std::string message);

 private:
  const std::shared_ptr<Device> device_;
  const std::vector<size_t> extents_;
  size_t bytes_ = 0;
  size_t next_ = 0;
  bool read_only_ = false;
  std::unique_ptr<Imported> memory_;
  std::shared_ptr<Fd> socket_;
  std::string message_;
};

}  // namespace tem::ipc
