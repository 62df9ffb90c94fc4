// The CUDA backend as a rung of the conformance suite, over a GPU's driver or the fake one.
#pragma once

#include <dlfcn.h>

#include <atomic>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>

#include "backend/backend.hpp"
#include "backend/cuda_abi.hpp"
#include "conformance/rung.hpp"

namespace conformance {

namespace cuda = tem::cuda;

class CudaRung final : public Rung {
 public:
  CudaRung(const std::string& path, bool is_real) : library(path), real(is_real) {
    strict = touchable = !real;
    handle_ = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (handle_ == nullptr) throw std::runtime_error(dlerror());
  }

  std::shared_ptr<tem::Backend> open() override {
    auto floor = tem::make_cuda_backend(0, library);
    if (context_ == nullptr) expect("cuDevicePrimaryCtxRetain", &context_, 0);
    return floor;
  }

  // A copy from pageable memory returns when the bytes are staged, and may still be on its way: without the
  // wait, an unmap right after it is a fault on the device.
  void write(tem::Address at, const void* from, size_t bytes) override {
    enter();
    expect("cuMemcpyHtoD_v2", cuda::DevicePtr{at}, from, bytes);
    settle();
  }
  void read(void* to, tem::Address at, size_t bytes) override {
    enter();
    expect("cuMemcpyDtoH_v2", to, cuda::DevicePtr{at}, bytes);
  }

  tem::Stream stream() override {
    enter();
    cuda::StreamPtr made = nullptr;
    expect("cuStreamCreate", &made, kNonBlocking);
    const auto stream = reinterpret_cast<tem::Stream>(made);
    if (real) gates_.emplace(stream, make_gate());
    return stream;
  }

  void submit(tem::Stream stream) override {
    if (!real) return expect("fake_cuda_stream_submit", pointer(stream));
    enter();
    Gate& gate = gates_.at(stream);
    expect("cuStreamWaitValue32_v2", pointer(stream), gate.device, ++gate.submitted, kGreaterOrEqual);
  }

  void complete(tem::Stream stream) override {
    if (!real) return expect("fake_cuda_stream_complete", pointer(stream));
    Gate& gate = gates_.at(stream);
    gate.word->store(gate.submitted);
    settle_stream(stream);
  }

  void destroy(tem::Stream stream) override {
    enter();
    expect("cuStreamDestroy_v2", pointer(stream));
    const auto gate = gates_.find(stream);
    if (gate == gates_.end()) return;
    expect("cuMemFreeHost", static_cast<void*>(gate->second.word));
    gates_.erase(gate);
  }

  void settle() override { settle_stream(0); }
  void settle_stream(tem::Stream stream) override {
    enter();
    expect("cuStreamSynchronize", pointer(stream));
  }

  /// Calls an entry point by its exported name, with the arguments' own types.
  template <class Return = cuda::Result, class... Arguments>
  Return call(const char* name, Arguments... arguments) const {
    void* found = dlsym(handle_, name);
    if (found == nullptr) throw std::runtime_error(library + " has no " + name);
    return reinterpret_cast<Return (*)(Arguments...)>(found)(arguments...);
  }

  template <class... Arguments>
  void expect(const char* name, Arguments... arguments) const {
    const cuda::Result code = call(name, arguments...);
    if (code != cuda::kSuccess)
      throw std::runtime_error(std::string(name) + " answers " + std::to_string(code));
  }

  /// Makes the device's primary context current on this thread, as it is on one of torch's.
  void enter() const { expect("cuCtxSetCurrent", context_); }
  cuda::Context context() const { return context_; }
  static cuda::StreamPtr pointer(tem::Stream stream) { return reinterpret_cast<cuda::StreamPtr>(stream); }

  const std::string library;
  const bool real;

 private:
  /// A word in pinned memory that a stream waits for.
  struct Gate {
    std::atomic<uint32_t>* word = nullptr;
    cuda::DevicePtr device = 0;
    uint32_t submitted = 0;
  };

  Gate make_gate() const {
    void* word = nullptr;
    Gate gate;
    expect("cuMemHostAlloc", &word, sizeof(std::atomic<uint32_t>), kDeviceMapped);
    gate.word = new (word) std::atomic<uint32_t>(0);
    expect("cuMemHostGetDevicePointer_v2", &gate.device, word, 0U);
    return gate;
  }

  static constexpr unsigned kNonBlocking = 1;
  static constexpr unsigned kGreaterOrEqual = 0;
  static constexpr unsigned kDeviceMapped = 2;

  void* handle_;
  cuda::Context context_ = nullptr;
  std::map<tem::Stream, Gate> gates_;
};

}  // namespace conformance
