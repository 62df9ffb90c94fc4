// The history that torch.cuda.memory records: a ring of what happened on each device, and where each live
// block was allocated. It costs nothing while nobody records: mallocs are observed only then.
//
// A stack must be gathered before a malloc's lock is taken, since gathering one may need the GIL, so a Scope
// keeps it for the thread until the observer is told. Lock order: malloc, then this.
#pragma once

#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/util/ApproximateClock.h>

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "alloc/malloc.hpp"
#include "torch/compat.hpp"

namespace tem::torch_cuda {

namespace caching = c10::cuda::CUDACachingAllocator;
using Context = std::shared_ptr<c10::GatheredContext>;
using Action = caching::TraceEntry::Action;
using caching::RecordContext;

class History {
 public:
  struct Settings {
    bool enabled = false;
    caching::CreateContextFn recorder = nullptr;
    size_t most_entries = 1;
    RecordContext when = RecordContext::NEVER;
    std::set<Action> skipped;
  };

  /// The stack of this thread, where `level` is recorded, for what mallocs do until the end of the scope.
  class Scope {
   public:
    Scope(History& history, RecordContext level);
    ~Scope();
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    const Context context_;
    const Context* const before_;
  };

  void configure(Settings settings, bool clear);
  void add_tracker(caching::AllocatorTraceTracker tracker);
  bool enabled() const { return enabled_.load(std::memory_order_relaxed); }
  /// Whether anybody wants to be told what mallocs do.
  bool watching() const { return watching_.load(std::memory_order_relaxed); }
  /// Has a device's malloc observed for as long as somebody watches.
  void watch(c10::DeviceIndex device, Malloc& malloc);

  void record(Action action, c10::DeviceIndex device, size_t address, size_t bytes, Stream stream,
              PoolId pool = {});
  void annotate(c10::DeviceIndex device, const std::vector<std::pair<std::string, std::string>>& metadata);
#if TEM_TORCH_HAS_ANNOTATE
  void annotate_block(c10::DeviceIndex device, size_t address, size_t bytes, const std::string& metadata);
#endif
  /// Where a live block was allocated, or null.
  Context context_of(size_t address);
  std::vector<caching::TraceEntry> trace(c10::DeviceIndex device);
  std::vector<c10::CachingDeviceAllocator::AnnotationEntry> annotations();

  void push_compile_context(const std::string& name);
  void pop_compile_context();
  void set_user_metadata(const std::string& metadata);
  std::string user_metadata() const;

 private:
  class Observer final : public MallocObserver {
   public:
    Observer(History& history, c10::DeviceIndex device) : history_(history), device_(device) {}
    void on(const MallocEvent& event) noexcept override { history_.on(device_, event); }

   private:
    History& history_;
    c10::DeviceIndex device_;
  };
  struct Device {
    explicit Device(History& history, c10::DeviceIndex index) : observer(history, index) {}
    Observer observer;
    std::deque<caching::TraceEntry> trace;
  };

  Context gather(RecordContext level);
  void on(c10::DeviceIndex device, const MallocEvent& event) noexcept;
  Device& device(c10::DeviceIndex index);
  void insert(caching::TraceEntry entry);
  time_t unix_microseconds(c10::approx_time_t time);

  std::atomic<bool> enabled_{false};
  std::atomic<bool> watching_{false};
  std::atomic<RecordContext> when_{RecordContext::NEVER};
  std::atomic<caching::CreateContextFn> recorder_{nullptr};
  c10::ApproximateClockToUnixTimeConverter clock_;

  std::mutex mutex_;
  Settings settings_;
  std::vector<caching::AllocatorTraceTracker> trackers_;
  std::vector<std::unique_ptr<Device>> devices_;
  std::unordered_map<size_t, Context> live_;
  std::deque<c10::CachingDeviceAllocator::AnnotationEntry> annotations_;
};

}  // namespace tem::torch_cuda
