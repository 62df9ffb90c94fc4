// A strict CUDA driver without a device: what stands behind the C entry points of the other files here.
//
// Memory is the project's MemfdSpace, so an address of the fake is a real one that a test can read and write.
// It refuses what the driver refuses and with its codes, and more: see csrc/backend/address_table.hpp.
//
// Environment, read when asked for:
//   FAKE_CUDA_DEVICES   how many devices there are (2), read by cuInit
//   FAKE_CUDA_MEMORY    bytes of each (1 GiB), read by cuInit
//   FAKE_CUDA_VERSION   what cuDriverGetVersion says (13000)
//   FAKE_CUDA_NO_PEERS  not empty: no device can reach another's memory
//   FAKE_CUDA_NO_READ_ONLY  not 0: no mapping can be read-only
//   FAKE_CUDA_NO_VMM    not empty: no device supports virtual memory management
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "backend/cuda_abi.hpp"
#include "backend/hand_stream.hpp"
#include "backend/memfd_space.hpp"
#include "backend/slot_table.hpp"

#define FAKE_EXPORT extern "C" __attribute__((visibility("default")))

namespace fake {

using tem::cuda::Result;
using namespace tem::cuda;  // NOLINT: this library is that interface

constexpr size_t kGranularity = size_t{2} << 20;

struct FakeDevice {
  int ordinal = 0;
  Uuid uuid{};
  tem::Budget budget;
  int primary_references = 0;
};

/// A memset that waits for its turn on a stream.
struct Fill {
  tem::Address at = 0;
  size_t count = 0;
  size_t width = 1;
  unsigned value = 0;
};

/// Device work is what a test submits and completes by hand. A memset behind pending work waits with it.
struct StreamState {
  std::shared_ptr<tem::HandStream> order = std::make_shared<tem::HandStream>();
  std::deque<Fill> fills;
  int device = 0;
  int capture = kCaptureNone;
  int capture_mode = kCaptureModeGlobal;
};

struct EventState {
  tem::HandMark mark;
  uint64_t captured_by = 0;  // the stream whose capture it belongs to, or 0
};

/// All there is, behind one mutex. Never destroyed: calls may come after exit handlers.
struct State {
  std::mutex mutex;
  bool initialized = false;
  bool shut_down = false;
  Result sticky = kSuccess;  // what a fault on the device leaves: every later call answers it
  std::deque<FakeDevice> devices;
  tem::MemfdSpace space{kGranularity};
  std::set<AllocationHandle> exportable;            // handles that were asked for with a type to export
  std::map<std::pair<DevicePtr, int>, int> access;  // of pages by devices: flags of cuMemSetAccess
  tem::SlotTable<StreamState> streams;
  tem::SlotTable<EventState> events;
  std::vector<uint64_t> capturing;  // streams in a capture

  std::map<std::string, size_t> counts;
  size_t calls = 0;  // of the kind that fail_at counts, since it was last set
  size_t fail_at = 0;
  Result fail_with = kSuccess;
};

State& state();

enum class Counted { kNo, kYes };

/// The gate of every entry point: counts it, lets it fail when a test asked for that, and refuses calls
/// before cuInit and after the end. Holds the mutex for the scope of the call.
class Call {
 public:
  Call(const char* name, Counted counted);
  /// Not kSuccess: the entry point answers this and does nothing.
  Result verdict() const { return verdict_; }
  State& operator*() const { return state(); }
  State* operator->() const { return &state(); }

 private:
  std::unique_lock<std::mutex> lock_;
  Result verdict_ = kSuccess;
};

FakeDevice* find_device(int ordinal);
Context context_of(FakeDevice& device);
FakeDevice* device_in(Context context);

/// The device of this thread's current context, or nullptr.
FakeDevice* current_device();
std::vector<Context>& context_stack();

/// The stream behind a CUstream. Null for the default streams (0, 1 and 2), which are always idle.
StreamState* find_stream(StreamPtr stream);
bool is_default(StreamPtr stream);
inline uint64_t number_of(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); }

/// Runs what is pending on a stream. A memset that finds its memory gone is a fault on the device.
void run_pending(State& all, StreamState& stream);
/// kSuccess, or the code of a query or a synchronisation that a capture forbids; it spoils the capture.
Result forbid_in_capture(State& all);

size_t environment(const char* name, size_t otherwise);

}  // namespace fake

// Opens an entry point: FAKE_ENTER(cuMemCreate, kYes) leaves `call` behind.
#define FAKE_ENTER(name, counted)                       \
  const fake::Call call(#name, fake::Counted::counted); \
  if (call.verdict() != tem::cuda::kSuccess) return call.verdict()
