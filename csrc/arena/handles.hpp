// The three owning handles: physical memory, addresses, and the one under the other. A growth that fails
// half-way unwinds by going out of scope. Destructors cannot report; what a driver refuses to take back is
// counted as lost.
#pragma once

#include <atomic>
#include <memory>
#include <utility>
#include <vector>

#include "arena/passed.hpp"
#include "backend/backend.hpp"
#include "core/fork.hpp"
#include "ledger/ledger.hpp"

namespace tem {

/// What handles need of their arena: the device, and the tally of physical bytes. Whatever Python lets go
/// last may outlive the arena, so reservations and marks keep it alive.
struct Device : std::enable_shared_from_this<Device> {
  explicit Device(std::shared_ptr<Backend> the_backend) : backend(std::move(the_backend)) {}

  std::shared_ptr<Backend> backend;
  std::atomic<size_t> created{0};  // bytes of physical memory held, mapped or not
  std::atomic<size_t> lost{0};     // bytes that the driver refused to take back
  std::atomic<uint64_t> marks{0};  // recordings of fences begun and ended
  BornHere born;
};

constexpr AccountId kSomebody = ~AccountId{0};

/// An extent that goes to another process: its descriptor, and what this process still has of it. That is
/// released when it goes, from any thread: who gets the memory need not wait for it.
class Parting {
 public:
  Parting(Device& device, Handle handle, size_t bytes, Fd fd);
  Parting(Parting&& other) noexcept;
  Parting& operator=(Parting&&) = delete;
  ~Parting();

  size_t bytes() const { return bytes_; }
  Fd& fd() { return fd_; }

 private:
  std::shared_ptr<Device> device_;
  Handle handle_;
  size_t bytes_;
  Fd fd_;
};

/// What a demander of another process takes over as it is, and how much of that goes at once.
struct Passing {
  size_t most = 0;  // extents
  std::vector<Parting> extents;
};

/// One physical allocation. Released when it goes.
class Extent {
 public:
  Extent() = default;
  Extent(Device& device, size_t bytes);
  /// Takes over what another process has passed on.
  Extent(Device& device, Passed&& passed);
  Extent(Extent&& other) noexcept;
  Extent& operator=(Extent&& other) noexcept;
  ~Extent();

  size_t bytes() const { return bytes_; }
  Handle handle() const { return handle_; }
  explicit operator bool() const { return bytes_ != 0; }

  /// The account that wrote to it last; kNobody for memory fresh from the device, which reads as zeros;
  /// kSomebody for one of another process.
  AccountId writer = kNobody;
  /// Another process may have it mapped, for all that is known here.
  bool exported = false;

  /// Gives the memory back and reports what a destructor could not.
  void release();
  /// Could have a descriptor at hand with which it can go to another process, and has none.
  bool unready() const { return !fd_ && !imported_; }
  /// Has one. False if none can be spared.
  bool make_ready();
  /// Lets it go to another process.
  Parting pass();
  /// Forgets the memory without giving it back: the driver's state of it is unknown.
  void abandon() noexcept;

 private:
  Device* device_ = nullptr;
  Handle handle_ = 0;
  size_t bytes_ = 0;
  Fd fd_;                  // to pass it on with
  bool imported_ = false;  // it came with its descriptor, and the driver makes no other
};

/// A range of addresses. Given back when it goes.
class Reservation {
 public:
  Reservation(Device& device, size_t bytes, size_t alignment);
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;
  ~Reservation();

  Address base() const { return base_; }
  size_t bytes() const { return bytes_; }
  bool contains(Address at) const { return at - base_ < bytes_; }

 private:
  std::shared_ptr<Device> device_;
  size_t bytes_;
  Address base_;
};

/// An extent at an address. Unmapped when it goes.
class Mapping {
 public:
  /// Takes the extent only if the driver maps it.
  Mapping(Device& device, Address at, Extent&& extent);
  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&&) = delete;
  ~Mapping();

  Address at() const { return at_; }
  size_t bytes() const { return extent_.bytes(); }
  Handle handle() const { return extent_.handle(); }
  AccountId writer() const { return extent_.writer; }
  void set_writer(AccountId account) { extent_.writer = account; }
  bool unready() const { return extent_.unready(); }
  bool make_ready() { return extent_.make_ready(); }

  /// A descriptor of the extent. What was ever exported is released when it is unmapped, and never used
  /// again: another process may still read it.
  Fd export_fd(Access access) {
    Fd fd = device_->backend->export_fd(extent_.handle(), access);
    extent_.exported = true;
    return fd;
  }

  /// Unmaps and hands the extent out. A refusal leaves it mapped.
  Extent unmap();
  /// Maps an extent where unmap() left nothing. Takes it only if the driver maps it.
  void remap(Extent&& extent);
  /// Leaves it mapped for good: the device may still write to it.
  void abandon() noexcept { extent_.abandon(); }

 private:
  Device* device_;
  Address at_;
  Extent extent_;
};

}  // namespace tem
