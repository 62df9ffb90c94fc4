// The host backend: memory of this machine as a device, strict as the driver, with streams driven by hand.
#include <sys/mman.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <random>
#include <string>
#include <unordered_map>

#include "backend/backend.hpp"
#include "backend/cuda_abi.hpp"
#include "backend/hand_stream.hpp"
#include "backend/memfd_space.hpp"
#include "backend/slot_table.hpp"
#include "core/error.hpp"
#include "core/sizes.hpp"

namespace tem {

namespace {

// The granularity of every GPU seen so far, so that what is proved here holds there.
constexpr size_t kGranularity = 2 * kMiB;

/// Streams are the process's, as in CUDA, and belong to no one backend.
class HandStreams {
 public:
  Stream create() {
    const std::lock_guard<std::mutex> lock(mutex_);
    streams_.emplace(next_, std::make_shared<HandStream>());
    return next_++;
  }

  std::shared_ptr<HandStream> get(const char* call, Stream stream) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = streams_.find(stream);
    if (found != streams_.end()) return found->second;
    throw Error(Kind::kDriver, std::string(call) + "(stream " + std::to_string(stream) + "): no such stream",
                cuda::kInvalidHandle);
  }

  HandMark mark_all() {
    HandMark mark;
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& entry : streams_) mark.add(entry.second);
    return mark;
  }

  void destroy(Stream stream) {
    // What was submitted to a stream still runs after the stream is gone.
    get("host_stream_destroy", stream)->complete();
    const std::lock_guard<std::mutex> lock(mutex_);
    streams_.erase(stream);
  }

 private:
  std::mutex mutex_;
  std::unordered_map<Stream, std::shared_ptr<HandStream>> streams_;
  Stream next_ = 1;
};

HandStreams& hand_streams() {
  static HandStreams streams;
  return streams;
}

std::string random_uuid() {
  std::random_device random;
  std::array<unsigned, 4> w{};
  for (unsigned& word : w) word = random();
  char text[64];
  std::snprintf(text, sizeof text, "HOST-%08x-%04x-%04x-%04x-%04x%08x", w[0], w[1] >> 16, w[1] & 0xffffU,
                w[2] >> 16, w[2] & 0xffffU, w[3]);
  return text;
}

std::string machine_name() {
  utsname name{};
  return uname(&name) == 0 ? std::string(name.nodename) + " (" + name.machine + ")" : "host memory";
}

size_t physical_memory() {
  return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) * static_cast<size_t>(sysconf(_SC_PAGESIZE));
}

std::string span(Address at, size_t bytes) { return "(" + hex(at) + ", " + format_bytes(bytes); }

/// Gives all pages memory at once. False where the kernel cannot.
bool populate(void* memory, size_t bytes) {
#ifdef MADV_POPULATE_WRITE
  return ::madvise(memory, bytes, MADV_POPULATE_WRITE) == 0;
#else
  return false;
#endif
}

class HostBackend final : public Backend {
 public:
  explicit HostBackend(size_t capacity) : budget_{capacity, 0}, space_(kGranularity) {
    capabilities_.backend = "host";
    capabilities_.device = machine_name();
    capabilities_.uuid = random_uuid();
    capabilities_.granularity = kGranularity;
    capabilities_.exchange = "host";
  }

  const Capabilities& capabilities() const override { return capabilities_; }
  MemoryInfo memory_info() override { return {space_.free_bytes(budget_), budget_.capacity}; }

  Address reserve(size_t bytes, size_t alignment) override {
    Address base = 0;
    if (auto bad = space_.reserve(bytes, alignment, &base)) {
      refuse("reserve(" + format_bytes(bytes) + ", alignment " + format_bytes(alignment) + ")", bad);
    }
    return base;
  }

  void unreserve(Address base, size_t bytes) override {
    if (auto bad = space_.unreserve(base, bytes)) refuse("unreserve" + span(base, bytes) + ")", bad);
  }

  Handle create(size_t bytes) override {
    Handle handle = 0;
    if (auto bad = space_.create(bytes, &budget_, &handle)) {
      if (bad.code == cuda::kOutOfMemory) {
        throw Error(Kind::kOutOfMemory,
                    "out of host memory: asked for " + format_bytes(bytes) + ", " + bad.reason);
      }
      refuse("create(" + format_bytes(bytes) + ")", bad);
    }
    return handle;
  }

  void release(Handle handle) override {
    if (auto bad = space_.release(handle)) refuse("release(handle " + std::to_string(handle) + ")", bad);
  }

  Fd export_fd(Handle handle, Access access) override {
    return Fd::not_for_children([&] {
      Fd fd;
      if (auto bad = space_.export_fd(handle, access, &fd))
        refuse("export(handle " + std::to_string(handle) + ")", bad);
      return fd.release();
    });
  }

  Handle import_fd(const Fd& fd) override {
    Handle handle = 0;
    if (auto bad = space_.import_fd(fd, &handle)) {
      refuse("import(descriptor " + std::to_string(fd.get()) + ")", bad);
    }
    return handle;
  }

  void map(Address at, size_t bytes, Handle handle) override {
    if (auto bad = space_.map(at, bytes, 0, handle)) {
      refuse("map" + span(at, bytes) + ", handle " + std::to_string(handle) + ")", bad);
    }
  }

  void allow(Address at, size_t bytes, Access access) override {
    if (auto bad = space_.allow(at, bytes, access)) refuse("allow" + span(at, bytes) + ")", bad);
  }

  void add_peer(int ordinal) override {
    refuse("access by device " + std::to_string(ordinal) + " to host memory",
           {cuda::kNotSupported, "the host backend has no peers"});
  }

  void unmap(Address at, size_t bytes) override {
    if (auto bad = space_.unmap(at, bytes)) refuse("unmap" + span(at, bytes) + ")", bad);
  }

  // At once, whatever is pending: work on a hand-driven stream is a count that writes nothing.
  void zero(Address at, size_t bytes, Stream stream) override {
    if (stream != 0) hand_streams().get("zero", stream);
    if (auto bad = space_.check_access(at, bytes)) refuse("zero" + span(at, bytes) + ")", bad);
    // New pages in place of the old ones, all at once: memset would fault for each.
    auto* const memory = reinterpret_cast<void*>(at);
    if (::madvise(memory, bytes, MADV_REMOVE) == 0 && populate(memory, bytes)) return;
    std::memset(memory, 0, bytes);
  }

  EventId record(Stream stream) override {
    HandMark mark;
    if (stream != 0) mark.add(hand_streams().get("record", stream));
    const std::lock_guard<std::mutex> lock(events_mutex_);
    return events_.add(std::move(mark));
  }

  EventId record_all() override {
    HandMark mark = hand_streams().mark_all();
    const std::lock_guard<std::mutex> lock(events_mutex_);
    return events_.add(std::move(mark));
  }

  bool passed(EventId event) override {
    const std::lock_guard<std::mutex> lock(events_mutex_);
    return known("passed", event).passed();
  }

  void forget(EventId event) override {
    const std::lock_guard<std::mutex> lock(events_mutex_);
    known("forget", event);
    events_.remove(event);
  }

 private:
  [[noreturn]] static void refuse(const std::string& call, const Refusal& why) {
    throw Error(Kind::kDriver, call + ": " + why.reason + " (error " + std::to_string(why.code) + ")",
                why.code);
  }

  HandMark& known(const char* call, EventId event) {
    HandMark* mark = events_.find(event);
    if (mark != nullptr) return *mark;
    refuse(std::string(call) + "(event " + std::to_string(event) + ")",
           {cuda::kInvalidHandle, "no such event, or forgotten before"});
  }

  Capabilities capabilities_;
  Budget budget_;
  MemfdSpace space_;
  std::mutex events_mutex_;
  SlotTable<HandMark> events_;
};

}  // namespace

std::shared_ptr<Backend> make_host_backend(size_t capacity) {
  if (capacity < kGranularity) {
    throw Error(Kind::kInvalid, "a host backend of " + format_bytes(capacity) +
                                    ": the least is one extent of " + format_bytes(kGranularity));
  }
  // Beyond this the kernel would kill somebody rather than answer that there is no more.
  if (capacity > physical_memory()) {
    throw Error(Kind::kInvalid, "a host backend of " + format_bytes(capacity) + ": this machine has " +
                                    format_bytes(physical_memory()) + " of memory");
  }
  return std::make_shared<HostBackend>(capacity);
}

Stream host_stream_create() { return hand_streams().create(); }
void host_stream_submit(Stream stream) { hand_streams().get("host_stream_submit", stream)->submit(); }
void host_stream_complete(Stream stream, uint64_t count) {
  hand_streams().get("host_stream_complete", stream)->complete(count);
}
void host_stream_destroy(Stream stream) { hand_streams().destroy(stream); }

}  // namespace tem
