// The host backend as a rung, and what it alone promises.
#pragma once

#include <cstring>
#include <memory>
#include <string>

#include "backend/backend.hpp"
#include "backend/cuda_abi.hpp"
#include "check.hpp"
#include "conformance/rung.hpp"
#include "core/sizes.hpp"

namespace conformance {

using namespace tem;  // NOLINT: properties of that namespace
using check::property;

constexpr size_t kCapacity = 64 * kMiB;

/// The host backend as a rung: its memory is this process's, its streams are driven by hand.
class HostRung final : public Rung {
 public:
  std::shared_ptr<Backend> open() override { return make_host_backend(kCapacity); }
  void write(Address at, const void* from, size_t bytes) override {
    std::memcpy(reinterpret_cast<void*>(at), from, bytes);
  }
  void read(void* to, Address at, size_t bytes) override {
    std::memcpy(to, reinterpret_cast<const void*>(at), bytes);
  }
  Stream stream() override { return host_stream_create(); }
  void submit(Stream stream) override { host_stream_submit(stream); }
  void complete(Stream stream) override { host_stream_complete(stream); }
  void destroy(Stream stream) override { host_stream_destroy(stream); }
};

inline void host_alone() {
  property("host: all of the capacity can be created, and no page more", [] {
    const auto floor = make_host_backend(5 * kMiB);
    const Handle one = floor->create(2 * kMiB);
    const Handle two = floor->create(2 * kMiB);
    CHECK_THROWS(floor->create(2 * kMiB), Kind::kOutOfMemory);
    CHECK_EQ(floor->memory_info().free, kMiB);
    CHECK_EQ(floor->memory_info().total, 5 * kMiB);
    floor->release(one);
    floor->release(two);
    CHECK_EQ(floor->memory_info().free, 5 * kMiB);
  });
  property("host: a capacity of nothing, or beyond the machine, is refused", [] {
    CHECK_THROWS(make_host_backend(0), Kind::kInvalid);
    CHECK_THROWS(make_host_backend(kMiB), Kind::kInvalid);
    CHECK_THROWS(make_host_backend(size_t{1} << 60), Kind::kInvalid);
  });
  property("host: each backend has its own uuid", [] {
    const auto one = make_host_backend(kCapacity);
    const auto two = make_host_backend(kCapacity);
    CHECK(one->capabilities().uuid != two->capabilities().uuid);
    CHECK(one->capabilities().uuid.compare(0, 5, "HOST-") == 0);
    CHECK(one->capabilities().uuid == one->capabilities().uuid);
  });
  property("host: a stream that is none is refused", [] {
    const auto floor = make_host_backend(kCapacity);
    CHECK_REFUSED(host_stream_submit(12345), cuda::kInvalidHandle);
    CHECK_REFUSED(host_stream_complete(12345), cuda::kInvalidHandle);
    CHECK_REFUSED(host_stream_destroy(12345), cuda::kInvalidHandle);
    CHECK_REFUSED(floor->record(12345), cuda::kInvalidHandle);
  });
}

}  // namespace conformance
