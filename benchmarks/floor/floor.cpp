// The C interface that ctypes calls. A timed function returns nanoseconds, or -1 with floor_error() saying
// why.
#include "floor.hpp"

#include <memory>
#include <string>

#include "cuda_driver.hpp"
#include "host_driver.hpp"

using tem_floor::Floor;

namespace {

thread_local std::string last_error;

int64_t run(void* floor, int64_t (Floor::*step)()) noexcept {
  try {
    return (static_cast<Floor*>(floor)->*step)();
  } catch (const std::exception& error) {
    last_error = error.what();
    return -1;
  }
}

}  // namespace

extern "C" {

/// `ordinal` is a CUDA device, or negative for memory of this machine. Null on failure.
void* floor_open(int ordinal, size_t size, size_t extent) {
  try {
    std::unique_ptr<Floor> floor;
    if (ordinal < 0) {
      floor = std::make_unique<tem_floor::FloorOn<tem_floor::HostDriver>>(ordinal, size, extent);
    } else {
      floor = std::make_unique<tem_floor::FloorOn<tem_floor::CudaDriver>>(ordinal, size, extent);
    }
    return floor.release();
  } catch (const std::exception& error) {
    last_error = error.what();
    return nullptr;
  }
}

void floor_close(void* floor) { delete static_cast<Floor*>(floor); }

/// Why the last call of this thread failed.
const char* floor_error() { return last_error.c_str(); }

int64_t floor_take(void* floor) { return run(floor, &Floor::take); }
int64_t floor_give(void* floor) { return run(floor, &Floor::give); }
int64_t floor_hold(void* floor) { return run(floor, &Floor::hold); }
int64_t floor_take_pooled(void* floor) { return run(floor, &Floor::take_pooled); }
int64_t floor_give_pooled(void* floor) { return run(floor, &Floor::give_pooled); }
int64_t floor_handover(void* floor) { return run(floor, &Floor::handover); }

}  // extern "C"
