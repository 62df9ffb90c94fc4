#include "torch/cuda_history.hpp"

#include <algorithm>
#include <cstdio>
#include <exception>

namespace tem::torch_cuda {
namespace {

// Trivial, and so usable while the thread's other variables are destroyed: blocks are freed then too.
thread_local const Context* current_scope = nullptr;
thread_local std::vector<std::string> compile_contexts;
thread_local std::string metadata_of_thread;

template <typename Entry>
void append(std::deque<Entry>& ring, Entry entry, size_t most) {
  ring.push_back(std::move(entry));
  while (ring.size() > most) ring.pop_front();
}

Context current() { return current_scope == nullptr ? nullptr : *current_scope; }

}  // namespace

History::Scope::Scope(History& history, RecordContext level)
    : context_(history.gather(level)), before_(std::exchange(current_scope, &context_)) {}

History::Scope::~Scope() { current_scope = before_; }

Context History::gather(RecordContext level) {
  const auto recorder = recorder_.load();
  return recorder != nullptr && when_.load() >= level ? recorder() : nullptr;
}

void History::configure(Settings settings, bool clear) {
  TORCH_CHECK(settings.when == RecordContext::NEVER || settings.recorder != nullptr);
  if (!settings.enabled) {
    settings.recorder = nullptr;
    settings.when = RecordContext::NEVER;
  }
  settings.most_entries = std::max<size_t>(settings.most_entries, 1);
  const std::lock_guard guard(mutex_);
  // Unobserved, blocks come and go, so what is known of them is known no longer.
  if (!settings.enabled) live_.clear();
  if (!settings.enabled || clear) {
    annotations_.clear();
    for (auto& each : devices_) each->trace.clear();
  }
  settings_ = std::move(settings);
  enabled_ = settings_.enabled;
  recorder_ = settings_.recorder;
  when_ = settings_.when;
  watching_ = settings_.enabled || !trackers_.empty();
}

void History::add_tracker(caching::AllocatorTraceTracker tracker) {
  const std::lock_guard guard(mutex_);
  trackers_.push_back(std::move(tracker));
  watching_ = true;
}

void History::watch(c10::DeviceIndex index, Malloc& malloc) {
  MallocObserver* observer = nullptr;
  if (watching()) {
    const std::lock_guard guard(mutex_);
    observer = &device(index).observer;
  }
  malloc.observe(observer);
}

History::Device& History::device(c10::DeviceIndex index) {
  while (devices_.size() <= static_cast<size_t>(index)) {
    devices_.push_back(std::make_unique<Device>(*this, static_cast<c10::DeviceIndex>(devices_.size())));
  }
  return *devices_[static_cast<size_t>(index)];
}

void History::on(c10::DeviceIndex index, const MallocEvent& event) noexcept try {
  // An observer that nobody could take off in time.
  if (!watching()) return;
  const auto entry = [&](Action action, Context context) {
    return caching::TraceEntry(action, index, event.address, event.bytes,
                               reinterpret_cast<void*>(event.stream), {event.pool.first, event.pool.second},
                               c10::getApproximateTime(), std::move(context));
  };
  const Context context = current();
  const std::lock_guard guard(mutex_);
  const auto found = live_.find(event.address);
  const Context allocated = found == live_.end() ? nullptr : found->second;
  switch (event.action) {
    case MallocEvent::Action::kAllocate:
      if (context) live_[event.address] = context;
      return insert(entry(Action::ALLOC, context));
    case MallocEvent::Action::kFree:
      return insert(entry(Action::FREE_REQUESTED, context ? context : allocated));
    case MallocEvent::Action::kFreed:
      if (found != live_.end()) live_.erase(found);
      return insert(entry(Action::FREE_COMPLETED, context ? context : allocated));
    case MallocEvent::Action::kMap:
      return insert(entry(Action::SEGMENT_MAP, context));
    case MallocEvent::Action::kUnmap:
      return insert(entry(Action::SEGMENT_UNMAP, context));
      return;
  }
} catch (const std::exception& error) {
  std::fprintf(stderr, "torch_elastic_mem: an entry of the memory history is lost: %s\n", error.what());
}

void History::record(Action action, c10::DeviceIndex index, size_t address, size_t bytes, Stream stream,
                     PoolId pool) {
  if (!watching()) return;
  const std::lock_guard guard(mutex_);
  insert({action,
          index,
          address,
          bytes,
          reinterpret_cast<void*>(stream),
          {pool.first, pool.second},
          c10::getApproximateTime(),
          current()});
}

void History::insert(caching::TraceEntry entry) {
  if (settings_.when < RecordContext::ALLOC) entry.context_ = nullptr;
  // What torch's own allocator says where no compilation is under way.
  entry.compile_context_ = compile_contexts.empty() ? "N/A" : compile_contexts.back();
  if (entry.user_metadata_.empty()) entry.user_metadata_ = metadata_of_thread;
  for (const auto& tracker : trackers_) tracker(entry);
  if (!settings_.enabled || settings_.skipped.count(entry.action_) != 0) return;
  auto& ring = device(entry.device_).trace;
  append(ring, std::move(entry), settings_.most_entries);
}

void History::annotate(c10::DeviceIndex index,
                       const std::vector<std::pair<std::string, std::string>>& metadata) {
  if (!enabled()) return;
  c10::CachingDeviceAllocator::AnnotationEntry entry(index, c10::getApproximateTime());
  for (const auto& [name, value] : metadata) entry.recordUserMetadata(name, value);
  const std::lock_guard guard(mutex_);
  append(annotations_, std::move(entry), settings_.most_entries);
}

#if TEM_TORCH_HAS_ANNOTATE
void History::annotate_block(c10::DeviceIndex index, size_t address, size_t bytes,
                             const std::string& metadata) {
  if (!enabled()) return;
  const std::lock_guard guard(mutex_);
  insert({Action::ANNOTATE,
          index,
          address,
          bytes,
          nullptr,
          {0, 0},
          c10::getApproximateTime(),
          nullptr,
          "",
          metadata});
}
#endif

Context History::context_of(size_t address) {
  const std::lock_guard guard(mutex_);
  const auto found = live_.find(address);
  return found == live_.end() ? nullptr : found->second;
}

std::vector<caching::TraceEntry> History::trace(c10::DeviceIndex index) {
  const auto microseconds = clock_.makeConverter();
  const std::lock_guard guard(mutex_);
  const auto& ring = device(index).trace;
  std::vector<caching::TraceEntry> entries(ring.begin(), ring.end());
  for (auto& entry : entries) entry.time_.t_ = microseconds(entry.time_.approx_t_) / 1000;
  return entries;
}

std::vector<c10::CachingDeviceAllocator::AnnotationEntry> History::annotations() {
  const auto microseconds = clock_.makeConverter();
  const std::lock_guard guard(mutex_);
  std::vector<c10::CachingDeviceAllocator::AnnotationEntry> entries(annotations_.begin(), annotations_.end());
  for (auto& entry : entries) entry.time_.t_ = microseconds(entry.time_.approx_t_) / 1000;
  return entries;
}

void History::push_compile_context(const std::string& name) {
  if (enabled()) compile_contexts.push_back(name);
}

void History::pop_compile_context() {
  if (enabled() && !compile_contexts.empty()) compile_contexts.pop_back();
}

void History::set_user_metadata(const std::string& metadata) { metadata_of_thread = metadata; }

std::string History::user_metadata() const { return metadata_of_thread; }

}  // namespace tem::torch_cuda
