#include "torch/cuda_allocator.hpp"

#include <c10/core/impl/GPUTrace.h>
#include <c10/cuda/CUDAAllocatorConfig.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/util/env.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>

namespace tem::torch_cuda {
namespace {

constexpr size_t kExbibyte = size_t{1} << 60;

CudaAllocator* instance = nullptr;

c10::Device device_of(const void* block) {
  cudaPointerAttributes attributes{};
  C10_CUDA_CHECK(cudaPointerGetAttributes(&attributes, block));
  return {c10::DeviceType::CUDA, static_cast<DeviceIndex>(attributes.device)};
}

/// What torch's profiler is told of a block that was allocated, or freed with a negative size.
void report(Malloc* malloc, void* block, int64_t bytes, c10::Device device) {
  const MallocStats stats = malloc == nullptr ? MallocStats{} : malloc->stats();
  c10::reportMemoryUsageToProfiler(block, bytes, static_cast<size_t>(stats.allocated_bytes.all.current),
                                   static_cast<size_t>(stats.reserved_bytes.all.current), device);
}

bool run_free_memory_callbacks() {
  bool any = false;
  for (const auto& name : c10::FreeCudaMemoryCallbacksRegistry()->Keys()) {
    any |= c10::FreeCudaMemoryCallbacksRegistry()->Create(name)->Execute();
  }
  return any;
}

void trace_allocation(const void* block) {
  if (const auto* const interpreter = c10::impl::GPUTrace::get_trace()) {
    (*interpreter)->trace_gpu_memory_allocation(c10::kCUDA, reinterpret_cast<uintptr_t>(block));
  }
}

void trace_deallocation(const void* block) {
  if (const auto* const interpreter = c10::impl::GPUTrace::get_trace()) {
    (*interpreter)->trace_gpu_memory_deallocation(c10::kCUDA, reinterpret_cast<uintptr_t>(block));
  }
}

// As with torch's own allocator, enable(false) sends every request to the driver, for tools that look for
// errors in memory.
void* uncached_allocate(size_t bytes) {
  void* block = nullptr;
  C10_CUDA_CHECK(cudaMalloc(&block, bytes));
  trace_allocation(block);
  return block;
}

void uncached_release(void* block) noexcept {
  trace_deallocation(block);
  C10_CUDA_CHECK_WARN(cudaFree(block));
}

}  // namespace

void raise(const Error& error) {
  TORCH_CHECK_WITH(OutOfMemoryError, error.kind() != Kind::kOutOfMemory, "CUDA out of memory. ",
                   error.what());
  TORCH_CHECK(false, "torch_elastic_mem: ", error.what());
}

CudaAllocator& CudaAllocator::over(MallocDirectory& directory) {
  if (instance == nullptr) instance = new CudaAllocator(directory);
  return *instance;
}

CudaAllocator::CudaAllocator(MallocDirectory& directory)
    : directory_(directory),
      born_in_(::getpid()),
      enabled_(c10::utils::check_env("PYTORCH_NO_CUDA_MEMORY_CACHING") != true),
      pools_(directory, history_) {}

void CudaAllocator::init(int device_count) {
  device_count_ = std::max(device_count_.load(), device_count);
  // torch.accelerator looks here, where changing the current allocator leaves torch's own.
  c10::SetAllocator(c10::kCUDA, this);
}

c10::DataPtr CudaAllocator::allocate(size_t bytes) {
  TORCH_CHECK_WITH(OutOfMemoryError, bytes < kExbibyte,
                   "CUDA out of memory. Tried to allocate more than 1EB memory.");
  const DeviceIndex index = c10::cuda::current_device();
  const c10::Device device(c10::DeviceType::CUDA, index);
  // Looked at once: a block must go the way it came.
  const bool cached = enabled_;
  const auto deleter = cached ? &release : &uncached_release;
  if (bytes == 0) return {nullptr, nullptr, deleter, device};
  void* const block = cached ? obtain(bytes, index, c10::cuda::getCurrentCUDAStream(index).stream())
                             : uncached_allocate(bytes);
  return {block, block, deleter, device};
}

#if TEM_TORCH_HAS_ALLOCATE_AT
c10::DataPtr CudaAllocator::allocateWithAddress(size_t bytes, void* address) {
  const DeviceIndex index = c10::cuda::current_device();
  const c10::Device device(c10::DeviceType::CUDA, index);
  if (bytes == 0) return {nullptr, nullptr, &release, device};
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(index).stream();
  const History::Scope scope(history_, RecordContext::STATE);
  const Pools::Source source = pools_.claiming(index, stream);
  TORCH_CHECK(enabled_ && !source.provider,
              "torch_elastic_mem: an address can be asked for only of an account: not while the caching "
              "allocator is off, nor in a MemPool with an allocator of its own");
  Malloc& malloc = source.malloc != nullptr ? *source.malloc : serving(index);
  if (history_.watching()) history_.watch(index, malloc);
  const bool had =
      translated([&] { return malloc.allocate_at(address, bytes, reinterpret_cast<Stream>(stream)); });
  TORCH_CHECK(had, "Could not allocate CUDA storage at exact address ", address, ": its ", bytes,
              " bytes are not all free for this stream");
  if (c10::memoryProfilingEnabled()) {
    report(&malloc, address, static_cast<int64_t>(malloc.block_at(address).bytes), device);
  }
  trace_allocation(address);
  return {address, address, &release, device};
}
#endif

c10::DeleterFnPtr CudaAllocator::raw_deleter() const { return enabled_ ? &release : &uncached_release; }

void* CudaAllocator::raw_alloc(size_t bytes) {
  return bytes == 0 ? nullptr : raw_alloc_with_stream(bytes, c10::cuda::getCurrentCUDAStream().stream());
}

void* CudaAllocator::raw_alloc_with_stream(size_t bytes, cudaStream_t stream) {
  if (bytes == 0) return nullptr;
  return enabled_ ? obtain(bytes, c10::cuda::current_device(), stream) : uncached_allocate(bytes);
}

void* CudaAllocator::obtain(size_t bytes, DeviceIndex device, cudaStream_t stream) {
  const History::Scope scope(history_, RecordContext::STATE);
  const Pools::Source source = pools_.claiming(device, stream);
  void* block = nullptr;
  if (source.provider) {
    block = obtain_from(*source.provider, bytes, device, stream);
  } else {
    block = obtain_from(source.malloc != nullptr ? *source.malloc : serving(device), bytes, device, stream);
  }
  trace_allocation(block);
  return block;
}

void* CudaAllocator::obtain_from(Malloc& malloc, size_t bytes, DeviceIndex device, cudaStream_t stream) {
  if (history_.watching()) history_.watch(device, malloc);
  void* block = nullptr;
  std::string why;
  const auto attempt = [&] {
    try {
      block = malloc.allocate(bytes, reinterpret_cast<Stream>(stream));
      return true;
    } catch (const Error& error) {
      if (error.kind() != Kind::kOutOfMemory) raise(error);
      why = error.what();
      return false;
    }
  };
  const auto wait = [&] {
    return translated([&] {
      malloc.count_retry();
      if (!malloc.wait_for_streams()) return false;
      malloc.empty_cache();
      return true;
    });
  };
  if (!attempt() && !(run_free_memory_callbacks() && attempt()) && !(wait() && attempt())) {
#if TEM_TORCH_HAS_OOM_REJECTION
    reject_over_fraction(malloc, bytes, device);
#endif
    refuse(&malloc, why, bytes, device, stream);
  }
  if (c10::memoryProfilingEnabled()) {
    const size_t taken = malloc.block_at(block).bytes;
    report(&malloc, block, static_cast<int64_t>(taken), {c10::DeviceType::CUDA, device});
  }
  return block;
}

void* CudaAllocator::obtain_from(ProviderPool& pool, size_t bytes, DeviceIndex device, cudaStream_t stream) {
  void* block = pool.allocate(bytes, reinterpret_cast<Stream>(stream));
  if (block == nullptr && run_free_memory_callbacks()) {
    block = pool.allocate(bytes, reinterpret_cast<Stream>(stream));
  }
  if (block == nullptr) {
    if (pool.counted_in() != nullptr) pool.counted_in()->count_retry();
    pool.empty_cache();
    block = pool.allocate(bytes, reinterpret_cast<Stream>(stream));
  }
  if (block == nullptr) {
    const auto why = "the allocator of the pool has no " + std::to_string(bytes) + " bytes";
    refuse(pool.counted_in(), why, bytes, device, stream);
  }
  if (c10::memoryProfilingEnabled()) {
    const auto taken = static_cast<int64_t>(pool.block_at(block).second);
    report(pool.counted_in(), block, taken, {c10::DeviceType::CUDA, device});
  }
  return block;
}

#if TEM_TORCH_HAS_OOM_REJECTION
/// With throw_on_cudamalloc_oom, what the memory fraction refuses is a rejection, and no out-of-memory.
void CudaAllocator::reject_over_fraction(Malloc& malloc, size_t bytes, DeviceIndex device) {
  if (!caching::CUDAAllocatorConfig::throw_on_cudamalloc_oom()) return;
  const size_t limit = malloc.limit();
  const auto reserved = static_cast<size_t>(malloc.stats().reserved_bytes.all.current);
  const size_t total = getMemoryInfo(device).second;
  if (limit >= total || (reserved <= limit && bytes <= limit - reserved)) return;
  malloc.count_rejection();
  std::vector<caching::OomRejectionObserver> observers;
  {
    const std::lock_guard guard(observers_mutex_);
    observers = rejection_observers_;
  }
  // With no lock held: they may be Python.
  for (const auto& observer : observers) observer(device, bytes, reserved, total);
  TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. Rejected a request of ", bytes,
                   " bytes: ", reserved, " are reserved of the ", limit,
                   " that the memory fraction allows, and throw_on_cudamalloc_oom is set");
}
#endif

void CudaAllocator::refuse(Malloc* malloc, const std::string& why, size_t bytes, DeviceIndex device,
                           cudaStream_t stream) {
  if (malloc != nullptr) malloc->count_out_of_memory();
  const auto [free, total] = getMemoryInfo(device);
  const MallocStats stats = malloc == nullptr ? MallocStats{} : malloc->stats();
  const size_t allowed = malloc == nullptr ? total : std::min(total, malloc->limit());
  history_.record(Action::OOM, device, free, bytes, reinterpret_cast<Stream>(stream));
  c10::reportOutOfMemoryToProfiler(
      static_cast<int64_t>(bytes), static_cast<size_t>(stats.allocated_bytes.all.current),
      static_cast<size_t>(stats.reserved_bytes.all.current), {c10::DeviceType::CUDA, device});
  std::vector<caching::OutOfMemoryObserver> observers;
  {
    const std::lock_guard guard(observers_mutex_);
    observers = observers_;
  }
  // With no lock held: they may be Python.
  for (const auto& observer : observers) observer(device, bytes, allowed, free);
  TORCH_CHECK_WITH(OutOfMemoryError, false, "CUDA out of memory. ", why);
}

void CudaAllocator::raw_delete(void* block) {
  if (!enabled_) return uncached_release(block);
  try {
    give_back(block);
  } catch (const Error& error) {
    TORCH_CHECK(error.kind() != Kind::kInvalid, "invalid device pointer: ", error.what());
    raise(error);
  }
}

void CudaAllocator::give_back(void* block) {
  if (block == nullptr) return;
  // Before the directory: a provider's memory may be an account's, which would take the block back from it.
  const auto provider = pools_.provider_of(block);
  Malloc* const owner = provider ? nullptr : directory_.owner(block);
  TORCH_CHECK(owner != nullptr || provider, "invalid device pointer: ", block);
  trace_deallocation(block);
  const History::Scope scope(history_, RecordContext::ALL);
  const auto free = [&] {
    if (!provider) return owner->free(block);
    TORCH_CHECK(provider->free(block), "invalid device pointer: ", block);
  };
  if (C10_LIKELY(!c10::memoryProfilingEnabled())) return free();
  const size_t bytes = provider ? provider->block_at(block).second : owner->block_at(block).bytes;
  const c10::Device device =
      provider ? c10::Device(c10::DeviceType::CUDA, provider->device()) : device_of(block);
  free();
  report(provider ? provider->counted_in() : owner, block, -static_cast<int64_t>(bytes), device);
}

void CudaAllocator::release(void* block) noexcept {
  try {
    instance->give_back(block);
  } catch (const std::exception& error) {
    // What a child of fork() inherits it drops: it is the parent's.
    if (::getpid() != instance->born_in_) return;
    const auto* const torchs = dynamic_cast<const c10::Error*>(&error);
    std::fprintf(stderr, "torch_elastic_mem: free of %p: %s\n", block,
                 torchs != nullptr ? torchs->what_without_backtrace() : error.what());
  }
}

void CudaAllocator::recordStream(const c10::DataPtr& data, c10::cuda::CUDAStream stream) {
  void* const block = data.get();
  // Memory of another process has another deleter, and its owner keeps it until all have done with it.
  if (block == nullptr || data.get_deleter() != &release) return;
  const auto handle = reinterpret_cast<Stream>(stream.stream());
  if (const auto provider = pools_.provider_of(block)) {
    provider->record_stream(block, handle);
  } else if (Malloc* const owner = directory_.owner(block)) {
    translated([&] { owner->record_stream(block, handle); });
  }
}

void CudaAllocator::copy_data(void* to, const void* from, std::size_t bytes) const {
  C10_CUDA_CHECK(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToDevice));
}

cudaError_t CudaAllocator::memcpyAsync(void* to, int to_device, const void* from, int from_device,
                                       size_t bytes, cudaStream_t stream, bool) {
  // Right whether or not the devices are peers, and as fast where they are.
  if (to_device == from_device) return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
  return cudaMemcpyPeerAsync(to, to_device, from, from_device, bytes, stream);
}

/// torch asks once a pair of devices, and reads across it from then on, even if this raises.
void CudaAllocator::enablePeerAccess(DeviceIndex device, DeviceIndex accessed) {
  if (device == accessed) return;
  {
    // What is not an account's: NCCL's buffers, other allocators' pools.
    const c10::cuda::CUDAGuard guard(device);
    const cudaError_t enabled = cudaDeviceEnablePeerAccess(accessed, 0);
    if (enabled == cudaErrorPeerAccessAlreadyEnabled) {
      (void)cudaGetLastError();
    } else {
      C10_CUDA_CHECK(enabled);
    }
  }
  translated([&] { directory_.allow_peer(accessed, device); });
}

void CudaAllocator::check_device(DeviceIndex device) const {
  TORCH_CHECK(0 <= device && device < device_count_, "Invalid device argument ", static_cast<int>(device),
              ": did you call init?");
}

Malloc* CudaAllocator::maybe_serving(DeviceIndex device) {
  check_device(device);
  return directory_.serving(device);
}

Malloc& CudaAllocator::serving(DeviceIndex device) {
  Malloc* const malloc = directory_.serving(device);
  TORCH_CHECK(malloc != nullptr, "torch_elastic_mem: no account serves device ", static_cast<int>(device),
              "; pass it to torch_allocator() or enter account.allocations() first");
  return *malloc;
}

void CudaAllocator::attachOutOfMemoryObserver(caching::OutOfMemoryObserver observer) {
  const std::lock_guard guard(observers_mutex_);
  observers_.push_back(std::move(observer));
}

#if TEM_TORCH_HAS_OOM_REJECTION
void CudaAllocator::attachOomRejectionObserver(caching::OomRejectionObserver observer) {
  const std::lock_guard guard(observers_mutex_);
  rejection_observers_.push_back(std::move(observer));
}
#endif

}  // namespace tem::torch_cuda
