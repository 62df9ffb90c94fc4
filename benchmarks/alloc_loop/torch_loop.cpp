// Pairs of allocate and free through torch's current CUDA allocator, whichever it is: the calls go through
// its virtual interface, as torch's own do. Threads are made here; nothing needs the interpreter.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>

#include "loop.hpp"

namespace {

namespace allocator = c10::cuda::CUDACachingAllocator;

struct Torch {
  int device;
  cudaStream_t stream;

  // New threads have no context until one is set, and SetDevice leaves out what it takes for done.
  void enter() const {
    const cudaError_t set = c10::cuda::SetDevice(static_cast<c10::DeviceIndex>(device), true);
    if (set != cudaSuccess) throw std::runtime_error("cudaSetDevice failed with " + std::to_string(set));
  }
  void* allocate(size_t bytes) const { return allocator::raw_alloc_with_stream(bytes, stream); }
  void free(void* block) const { allocator::raw_delete(block); }
};

}  // namespace

extern "C" {

double loop_pairs(int device, void* stream, size_t bytes, size_t pairs, size_t threads) {
  return loop::pairs(Torch{device, static_cast<cudaStream_t>(stream)}, bytes, pairs, threads);
}

double loop_mixed(int device, void* stream, const size_t* sizes, const uint32_t* slots, size_t count,
                  size_t most) {
  return loop::mixed(Torch{device, static_cast<cudaStream_t>(stream)}, sizes, slots, count, most);
}

const char* loop_error() { return loop::error().c_str(); }

}  // extern "C"
