// The CUDA backend: virtual memory management of one device through the driver's entry points.
//
// Facts:
//  - The calls of virtual memory management name their device in their arguments and need no current context,
//    nor does a query. New events, the default stream and memory_info do: they borrow the primary context,
//    the one torch uses, and leave the thread's own as it was.
//  - While any thread captures a CUDA graph in the global mode, torch's default, a cuEventQuery elsewhere
//    fails and spoils the capture, unless its own thread is in the relaxed mode. Whatever could block is
//    called in that mode; recording is let through without.
//  - An event recorded on a capturing stream belongs to the graph, and to ask for it spoils the capture too.
//  - At exit the driver shuts down before the last owner lets go. What it answers then is
//    CUDA_ERROR_DEINITIALIZED, and everything it held is gone: giving back has succeeded.
//  - An event may be recorded again before it has passed, so a forgotten one serves the next record.
//  - An import leaves the descriptor to its caller, who may close it at once.
#include <fcntl.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <mutex>
#include <string>
#include <vector>

#include "backend/address_table.hpp"
#include "backend/backend.hpp"
#include "backend/cuda_abi.hpp"
#include "backend/driver.hpp"
#include "backend/slot_table.hpp"
#include "core/error.hpp"
#include "core/sizes.hpp"

namespace tem {

namespace {

using cuda::Result;

std::string uuid_text(const cuda::Uuid& uuid) {
  std::string text = "GPU-";
  for (size_t i = 0; i < sizeof uuid.bytes; ++i) {
    if (i == 4 || i == 6 || i == 8 || i == 10) text += '-';
    char pair[3];
    std::snprintf(pair, sizeof pair, "%02x", uuid.bytes[i]);
    text += pair;
  }
  return text;
}

std::string span(Address at, size_t bytes) { return hex(at) + ", " + format_bytes(bytes); }

std::string named(Stream stream) { return "(stream " + hex(stream) + ")"; }

class CudaBackend final : public Backend {
 public:
  CudaBackend(int ordinal, const std::string& library) : driver_(cuda::load_driver(library)) {
    open_device(ordinal);
    describe_device(ordinal);
    check(driver_.cuDevicePrimaryCtxRetain(&context_, device_),
          [] { return std::string("cuDevicePrimaryCtxRetain()"); });
  }

  ~CudaBackend() override {
    // A destructor has nobody to tell; what fails here is gone with the context anyway.
    cuda::Context before = nullptr;
    if (driver_.cuCtxPushCurrent(context_) == cuda::kSuccess) {
      for (cuda::Event event : all_events_) driver_.cuEventDestroy(event);
      if (side_stream_ != nullptr) driver_.cuStreamDestroy(side_stream_);
      driver_.cuCtxPopCurrent(&before);
    }
    driver_.cuDevicePrimaryCtxRelease(device_);
  }

  const Capabilities& capabilities() const override { return capabilities_; }

  MemoryInfo memory_info() override {
    const InContext current(*this);
    const cuda::RelaxedCapture relaxed(driver_);
    MemoryInfo info;
    check(driver_.cuMemGetInfo(&info.free, &info.total), [] { return std::string("cuMemGetInfo()"); });
    return info;
  }

  Address reserve(size_t bytes, size_t alignment) override {
    cuda::DevicePtr base = 0;
    check(driver_.cuMemAddressReserve(&base, bytes, alignment, 0, 0), [&] {
      return "cuMemAddressReserve(" + format_bytes(bytes) + ", alignment " + format_bytes(alignment) + ")";
    });
    return static_cast<Address>(base);
  }

  void unreserve(Address base, size_t bytes) override {
    check_return(driver_.cuMemAddressFree(base, bytes),
                 [&] { return "cuMemAddressFree(" + span(base, bytes) + ")"; });
  }

  Handle create(size_t bytes) override {
    const cuda::RelaxedCapture relaxed(driver_);
    cuda::AllocationHandle handle = 0;
    const Result code = driver_.cuMemCreate(&handle, bytes, &prop_, 0);
    if (code == cuda::kOutOfMemory) throw Error(Kind::kOutOfMemory, out_of_memory(bytes));
    check(code, [&] { return "cuMemCreate(" + format_bytes(bytes) + ")"; });
    return handle;
  }

  void release(Handle handle) override {
    const cuda::RelaxedCapture relaxed(driver_);
    check_return(driver_.cuMemRelease(handle),
                 [&] { return "cuMemRelease(handle " + std::to_string(handle) + ")"; });
  }

  Fd export_fd(Handle handle, Access) override {
    const cuda::RelaxedCapture relaxed(driver_);
    return Fd::not_for_children([&] {
      int fd = -1;
      check(driver_.cuMemExportToShareableHandle(&fd, handle, cuda::kHandleTypePosixFd, 0),
            [&] { return "cuMemExportToShareableHandle(handle " + std::to_string(handle) + ")"; });
      // The driver does not say whether a child started by exec inherits it.
      ::fcntl(fd, F_SETFD, FD_CLOEXEC);
      return fd;
    });
  }

  Handle import_fd(const Fd& fd) override {
    const cuda::RelaxedCapture relaxed(driver_);
    cuda::AllocationHandle handle = 0;
    auto* const number = reinterpret_cast<void*>(static_cast<uintptr_t>(fd.get()));
    check(driver_.cuMemImportFromShareableHandle(&handle, number, cuda::kHandleTypePosixFd),
          [&] { return "cuMemImportFromShareableHandle(descriptor " + std::to_string(fd.get()) + ")"; });
    return handle;
  }

  void map(Address at, size_t bytes, Handle handle) override {
    const cuda::RelaxedCapture relaxed(driver_);
    check(driver_.cuMemMap(at, bytes, 0, handle, 0),
          [&] { return "cuMemMap(" + span(at, bytes) + ", handle " + std::to_string(handle) + ")"; });
  }

  void allow(Address at, size_t bytes, Access level) override {
    const cuda::RelaxedCapture relaxed(driver_);
    std::vector<cuda::AccessDesc> access;
    {
      const std::lock_guard<std::mutex> lock(peers_mutex_);
      access = access_;
    }
    for (cuda::AccessDesc& each : access) each.flags = flags_of(level);
    check(driver_.cuMemSetAccess(at, bytes, access.data(), access.size()),
          [&] { return "cuMemSetAccess(" + span(at, bytes) + ")"; });
  }

  void add_peer(int ordinal) override {
    const auto call = [&] { return "access by cuda:" + std::to_string(ordinal) + " to memory"; };
    cuda::Device peer = 0;
    int can = 0;
    check(driver_.cuDeviceGet(&peer, ordinal), call);
    if (peer == device_) return;
    check(driver_.cuDeviceCanAccessPeer(&can, peer, device_), call);
    if (can == 0)
      throw Error(Kind::kDriver, call() + where() + ": the two are no peers", cuda::kNotSupported);
    const std::lock_guard<std::mutex> lock(peers_mutex_);
    const bool known = std::any_of(access_.begin(), access_.end(),
                                   [&](const cuda::AccessDesc& each) { return each.location.id == peer; });
    if (!known) access_.push_back({{cuda::kLocationDevice, peer}, cuda::kAccessReadWrite});
  }

  void unmap(Address at, size_t bytes) override {
    const cuda::RelaxedCapture relaxed(driver_);
    check_return(driver_.cuMemUnmap(at, bytes), [&] { return "cuMemUnmap(" + span(at, bytes) + ")"; });
  }

  void zero(Address at, size_t bytes, Stream stream) override {
    const InContext current(*this);
    auto queue = reinterpret_cast<cuda::StreamPtr>(stream);
    // On a stream that is captured it would run at every replay, and not now.
    const bool apart = capturing(queue);
    const cuda::RelaxedCapture relaxed(driver_);
    if (apart) queue = side_stream();
    const bool words = at % 4 == 0 && bytes % 4 == 0;
    check(words ? driver_.cuMemsetD32Async(at, 0, bytes / 4, queue)
                : driver_.cuMemsetD8Async(at, 0, bytes, queue),
          [&] { return "cuMemsetAsync(" + span(at, bytes) + ", stream " + hex(stream) + ")"; });
    if (apart) check(driver_.cuStreamSynchronize(queue), [] { return std::string("cuStreamSynchronize()"); });
  }

  EventId record(Stream stream) override {
    const InContext current(*this);
    const auto queue = reinterpret_cast<cuda::StreamPtr>(stream);
    if (capturing(queue)) {
      throw Error(
          Kind::kDriver,
          "record" + named(stream) + where() + ": the stream is capturing a graph, which a fence would spoil",
          cuda::kCaptureUnsupported);
    }
    const cuda::Event event = take_event();
    return recorded(event, driver_.cuEventRecord(event, queue),
                    [&] { return "cuEventRecord" + named(stream); });
  }

  EventId record_all() override {
    const InContext current(*this);
    const cuda::Event event = take_event();
    const cuda::RelaxedCapture relaxed(driver_);
    // Before CUDA 12.5 no event spans streams. Then it takes a wait, and the event passes at once.
    const Result code = driver_.cuCtxRecordEvent != nullptr ? driver_.cuCtxRecordEvent(context_, event)
                                                            : driver_.cuCtxSynchronize();
    return recorded(event, code, [] { return std::string("cuCtxRecordEvent()"); });
  }

  bool passed(EventId id) override {
    cuda::Event event = nullptr;
    {
      const std::lock_guard<std::mutex> lock(events_mutex_);
      event = known("passed", id);
    }
    const cuda::RelaxedCapture relaxed(driver_);
    const Result code = driver_.cuEventQuery(event);
    if (code == cuda::kNotReady) return false;
    check_return(code, [&] { return "cuEventQuery(event " + std::to_string(id) + ")"; });
    return true;
  }

  void forget(EventId id) override {
    const std::lock_guard<std::mutex> lock(events_mutex_);
    known("forget", id);
    spare_events_.push_back(events_.remove(id));
  }

 private:
  /// The device's primary context for one scope. A thread of torch's has it already and pays one look.
  class InContext {
   public:
    explicit InContext(const CudaBackend& owner) : driver_(owner.driver_) {
      cuda::Context now = nullptr;
      owner.check(driver_.cuCtxGetCurrent(&now), [] { return std::string("cuCtxGetCurrent()"); });
      if (now == owner.context_) return;
      owner.check(driver_.cuCtxPushCurrent(owner.context_), [] { return std::string("cuCtxPushCurrent()"); });
      pushed_ = true;
    }
    ~InContext() {
      cuda::Context popped = nullptr;
      if (pushed_) driver_.cuCtxPopCurrent(&popped);
    }
    InContext(const InContext&) = delete;
    InContext& operator=(const InContext&) = delete;

   private:
    const cuda::Driver& driver_;
    bool pushed_ = false;
  };

  bool capturing(cuda::StreamPtr stream) const {
    int status = cuda::kCaptureNone;
    check(driver_.cuStreamIsCapturing(stream, &status),
          [&] { return "cuStreamIsCapturing" + named(reinterpret_cast<Stream>(stream)); });
    return status != cuda::kCaptureNone;
  }

  /// A stream that nobody captures. Called within the context.
  cuda::StreamPtr side_stream() {
    const std::lock_guard<std::mutex> lock(events_mutex_);
    if (side_stream_ == nullptr)
      check(driver_.cuStreamCreate(&side_stream_, cuda::kStreamNonBlocking),
            [] { return std::string("cuStreamCreate()"); });
    return side_stream_;
  }

  void open_device(int ordinal) {
    int count = 0;
    check(driver_.cuDeviceGetCount(&count), [] { return std::string("cuDeviceGetCount()"); });
    if (ordinal < 0 || ordinal >= count) {
      throw Error(Kind::kDriverMissing, "no CUDA device " + std::to_string(ordinal) + ": the driver shows " +
                                            std::to_string(count) + " to this process");
    }
    check(driver_.cuDeviceGet(&device_, ordinal),
          [&] { return "cuDeviceGet(" + std::to_string(ordinal) + ")"; });
    capabilities_.ordinal = ordinal;
    if (attribute(cuda::kAttributeVmmSupported) == 0) {
      throw Error(Kind::kDriverMissing,
                  "CUDA device " + std::to_string(ordinal) + " does not support virtual memory management");
    }
  }

  void describe_device(int ordinal) {
    std::array<char, 256> name{};
    check(driver_.cuDeviceGetName(name.data(), static_cast<int>(name.size()), device_),
          [] { return std::string("cuDeviceGetName()"); });
    cuda::Uuid uuid{};
    check(driver_.cuDeviceGetUuid(&uuid, device_), [] { return std::string("cuDeviceGetUuid()"); });
    prop_.type = cuda::kAllocationPinned;
    prop_.location = {cuda::kLocationDevice, device_};
    const bool exports = attribute(cuda::kAttributePosixFdSupported) != 0;
    prop_.requested_handle_types = exports ? cuda::kHandleTypePosixFd : cuda::kHandleTypeNone;
    size_t granularity = 0;
    check(driver_.cuMemGetAllocationGranularity(&granularity, &prop_, cuda::kGranularityMinimum),
          [] { return std::string("cuMemGetAllocationGranularity()"); });
    access_ = {{prop_.location, cuda::kAccessReadWrite}};
    capabilities_ = {"cuda", name.data(), uuid_text(uuid), ordinal, granularity, {}};
    if (exports) capabilities_.exchange = capabilities_.uuid;
  }

  static int flags_of(Access access) {
    if (access == Access::kNone) return cuda::kAccessNone;
    return access == Access::kRead ? cuda::kAccessRead : cuda::kAccessReadWrite;
  }

  int attribute(int which) const {
    int value = 0;
    check(driver_.cuDeviceGetAttribute(&value, which, device_),
          [&] { return "cuDeviceGetAttribute(" + std::to_string(which) + ")"; });
    return value;
  }

  /// `call` is asked for the words only when there is something to say.
  template <class Call>
  void check(Result code, const Call& call) const {
    if (code != cuda::kSuccess) fail(code, call());
  }

  /// For calls that give back or wait: after the driver's end there is nothing left to hold or to wait for.
  template <class Call>
  void check_return(Result code, const Call& call) const {
    if (code != cuda::kDeinitialized) check(code, call);
  }

  [[noreturn]] void fail(Result code, const std::string& call) const {
    throw Error(Kind::kDriver, call + where() + ": " + driver_.describe(code), code);
  }

  std::string where() const { return " on cuda:" + std::to_string(capabilities_.ordinal); }

  std::string out_of_memory(size_t bytes) {
    const std::string asked = "cuda:" + std::to_string(capabilities_.ordinal) +
                              " is out of memory: asked for " + format_bytes(bytes);
    try {
      const MemoryInfo info = memory_info();
      return asked + ", " + format_bytes(info.free) + " free of " + format_bytes(info.total);
    } catch (const Error&) {
      return asked;  // the want of memory is the news, not that its size is unknown
    }
  }

  template <class Call>
  EventId recorded(cuda::Event event, Result code, const Call& call) {
    const std::lock_guard<std::mutex> lock(events_mutex_);
    if (code == cuda::kSuccess) return events_.add(event);
    spare_events_.push_back(event);
    fail(code, call());
  }

  cuda::Event take_event() {
    {
      const std::lock_guard<std::mutex> lock(events_mutex_);
      if (!spare_events_.empty()) {
        const cuda::Event event = spare_events_.back();
        spare_events_.pop_back();
        return event;
      }
    }
    cuda::Event event = nullptr;
    check(driver_.cuEventCreate(&event, cuda::kEventDisableTiming),
          [] { return std::string("cuEventCreate()"); });
    const std::lock_guard<std::mutex> lock(events_mutex_);
    all_events_.push_back(event);
    spare_events_.reserve(all_events_.capacity());  // so that forget() cannot fail
    return event;
  }

  cuda::Event known(const char* call, EventId id) {
    const cuda::Event* event = events_.find(id);
    if (event != nullptr) return *event;
    throw Error(Kind::kDriver,
                std::string(call) + "(event " + std::to_string(id) + ")" + where() +
                    ": no such event, or forgotten before",
                cuda::kInvalidHandle);
  }

  cuda::Driver driver_;
  cuda::Device device_ = 0;
  cuda::Context context_ = nullptr;
  cuda::AllocationProp prop_{};
  Capabilities capabilities_;

  std::mutex peers_mutex_;
  std::vector<cuda::AccessDesc> access_;  // this device's, and its peers'

  std::mutex events_mutex_;
  SlotTable<cuda::Event> events_;
  std::vector<cuda::Event> spare_events_;
  std::vector<cuda::Event> all_events_;
  cuda::StreamPtr side_stream_ = nullptr;  // guarded by the same
};

}  // namespace

std::shared_ptr<Backend> make_cuda_backend(int ordinal, const std::string& library) {
  return std::make_shared<CudaBackend>(ordinal, library);
}

}  // namespace tem
