// The floor: everything the arena asks of a device, and nothing else.
//
// Facts every backend keeps, because the CUDA driver does:
//  - A physical allocation is mapped whole, at offset 0, or not at all.
//  - A mapping is unmapped whole. Neighbouring mappings may be unmapped in one call; a part of one may not.
//  - A mapping is not accessible until allow().
//  - unmap() does not wait for work on the device. The caller brings the fence.
//  - release() of memory that is still mapped gives it back when the last mapping goes.
//  - Memory from create() reads as zeros.
//  - A descriptor from export_fd() keeps the memory, in flight to another process too. So do its imports:
//    there is no way to take them back.
// A backend refuses a call that breaks one of these with Error{kDriver}, and leaves everything as it was.
//
// Thread-safety: every function may be called from any thread; a backend serialises what needs it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "core/fd.hpp"

namespace tem {

using Address = uintptr_t;
using Handle = uint64_t;   // a physical allocation
using Stream = uintptr_t;  // CUstream as an integer; 0 is the default stream
using EventId = uint64_t;  // a recorded event

struct Capabilities {
  std::string backend;     // "host" or "cuda"
  std::string device;      // a name for people
  std::string uuid;        // "GPU-xxxxxxxx-...", the key of a device; "HOST-..." for the host backend
  int ordinal = 0;         // torch's index of the device in this process
  size_t granularity = 0;  // bytes; every size and address below is a multiple of it
  std::string exchange;    // backends of the same exchange may import each other's memory; empty: none may
};

/// What a device may do with mapped memory.
enum class Access { kNone, kRead, kReadWrite };

struct MemoryInfo {
  size_t free = 0;   // bytes that create() could still hand out, all processes considered
  size_t total = 0;  // bytes of the device
};

class Backend {
 public:
  virtual ~Backend() = default;

  virtual const Capabilities& capabilities() const = 0;
  virtual MemoryInfo memory_info() = 0;

  /// Reserves addresses with nothing behind them, aligned to `alignment` (a power of two).
  virtual Address reserve(size_t bytes, size_t alignment) = 0;
  /// Returns a whole reservation; refused while anything is mapped in it.
  virtual void unreserve(Address base, size_t bytes) = 0;

  /// Takes physical memory. Error{kOutOfMemory} when the device has none left.
  virtual Handle create(size_t bytes) = 0;
  virtual void release(Handle handle) = 0;

  /// A descriptor of physical memory, for another process. With kRead it serves for reading alone where the
  /// system knows such descriptors; CUDA has none.
  virtual Fd export_fd(Handle handle, Access access = Access::kReadWrite) = 0;
  /// The memory behind a descriptor, to be mapped and released like one's own. Twice imported it is one
  /// memory.
  virtual Handle import_fd(const Fd& fd) = 0;

  virtual void map(Address at, size_t bytes, Handle handle) = 0;
  /// Makes a run of whole mappings accessible by the device and its peers. A driver that knows no read-only
  /// mappings refuses kRead.
  virtual void allow(Address at, size_t bytes, Access access = Access::kReadWrite) = 0;
  /// Another device of this process is a peer from now on: what is allowed afterwards is its too. Refused for
  /// one that cannot reach this device's memory.
  virtual void add_peer(int ordinal) = 0;
  virtual void unmap(Address at, size_t bytes) = 0;

  /// Queues zeroing of accessible memory on `stream`; the caller orders later streams behind it.
  virtual void zero(Address at, size_t bytes, Stream stream) = 0;

  /// Marks the point `stream` has reached in its order of submission.
  virtual EventId record(Stream stream) = 0;
  /// Marks the point that all streams of this process have reached.
  virtual EventId record_all() = 0;
  /// True once everything submitted before the mark has run.
  virtual bool passed(EventId event) = 0;
  /// Gives an event back. Legal before it has passed.
  virtual void forget(EventId event) = 0;
};

/// Memory of this machine as a device of `capacity` bytes: memfd and MAP_FIXED, strict as the driver.
std::shared_ptr<Backend> make_host_backend(size_t capacity);

/// The CUDA device with torch's index `ordinal`. `library` is what dlopen is given.
/// Error{kDriverMissing} without a driver, with one too old, or on a device without VMM.
std::shared_ptr<Backend> make_cuda_backend(int ordinal, const std::string& library = "libcuda.so.1");

/// Streams of the host backend that a caller drives by hand: work submitted stays pending until completed.
Stream host_stream_create();
void host_stream_submit(Stream stream);
void host_stream_complete(Stream stream, uint64_t count = UINT64_MAX);
void host_stream_destroy(Stream stream);

}  // namespace tem
