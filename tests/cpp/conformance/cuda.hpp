// What only a CUDA backend promises: the thread's context, captures of graphs, and no driver at all.
#pragma once

#include <string>
#include <thread>

#include "backend/backend.hpp"
#include "check.hpp"
#include "conformance/cuda_rung.hpp"
#include "conformance/pages.hpp"

namespace conformance {

using namespace tem;  // NOLINT: properties of that namespace
using check::property;

/// Runs `body` on a thread that has no context yet, and hands on what it throws.
template <class Body>
void on_new_thread(Body body) {
  std::exception_ptr thrown;
  std::thread([&] {
    try {
      body();
    } catch (...) {
      thrown = std::current_exception();
    }
  }).join();
  if (thrown) std::rethrow_exception(thrown);
}

inline void contexts(CudaRung& rung, Backend& floor) {
  const auto current = [&rung] {
    cuda::Context now = nullptr;
    rung.expect("cuCtxGetCurrent", &now);
    return now;
  };
  const auto use = [&] {
    Pages pages(floor, 1);
    pages.map(0, 1);
    floor.memory_info();
    floor.zero(pages.at(0), 4096, 0);
    const EventId event = floor.record(0);
    while (!floor.passed(event)) std::this_thread::yield();
    floor.forget(event);
  };
  property("cuda: a thread without a context may call, and has none afterwards", [&] {
    on_new_thread([&] {
      use();
      CHECK(current() == nullptr);
      ERROR_OF(floor.zero(0, 4, 0));
      CHECK(current() == nullptr);
    });
  });
  property("cuda: a thread keeps the context it has", [&] {
    on_new_thread([&] {
      rung.enter();
      use();
      CHECK(current() == rung.context());
    });
  });
  property("cuda: memory is counted for the whole device, and the uuid is the driver's", [&] {
    size_t free = 0, total = 0;
    rung.enter();
    rung.expect("cuMemGetInfo_v2", &free, &total);
    CHECK_EQ(floor.memory_info().total, total);
    CHECK_EQ(floor.memory_info().free, free);
    cuda::Uuid uuid{};
    rung.expect("cuDeviceGetUuid_v2", &uuid, 0);
    char text[3];
    std::snprintf(text, sizeof text, "%02x", uuid.bytes[15]);
    const std::string& ours = floor.capabilities().uuid;
    CHECK(ours.compare(0, 4, "GPU-") == 0);
    CHECK(ours.compare(ours.size() - 2, 2, text) == 0);
    CHECK_EQ(ours.size(), 40U);
  });
}

inline void captures(CudaRung& rung, Backend& floor) {
  // What follows is asked of a thread other than the capturing one, and of that one too.
  const auto during_capture = [&](auto body) {
    const Stream stream = rung.stream();
    const EventId before = floor.record(0);
    rung.settle();
    rung.expect("cuStreamBeginCapture_v2", CudaRung::pointer(stream), cuda::kCaptureModeGlobal);
    on_new_thread([&] { body(stream, before); });
    body(stream, before);
    void* graph = nullptr;
    rung.expect("cuStreamEndCapture", CudaRung::pointer(stream), &graph);
    floor.forget(before);
    rung.destroy(stream);
  };
  property("cuda: a capture of a graph survives mapping, fences and queries beside it", [&] {
    during_capture([&](Stream, EventId before) {
      Pages pages(floor, 1);
      pages.map(0, 1);
      floor.memory_info();
      const EventId event = floor.record(0);
      floor.passed(event);
      CHECK(floor.passed(before));
      floor.forget(event);
    });
  });
  property("cuda: a fence on a capturing stream is refused, and the capture goes on", [&] {
    during_capture(
        [&](Stream stream, EventId) { CHECK_REFUSED(floor.record(stream), cuda::kCaptureUnsupported); });
  });
}

inline void missing_drivers(CudaRung& rung) {
  property("cuda: no library, or one that is no driver", [] {
    CHECK_THROWS(make_cuda_backend(0, "/nowhere/libcuda.so.1"), Kind::kDriverMissing);
    CHECK_THROWS(make_cuda_backend(0, "libm.so.6"), Kind::kDriverMissing);
  });
  property("cuda: an ordinal that no device has is named with how many there are", [&] {
    int count = 0;
    rung.expect("cuDeviceGetCount", &count);
    for (const int ordinal : {-1, count, 1000}) {
      const Error error = ERROR_OF(make_cuda_backend(ordinal, rung.library));
      CHECK(error.kind() == Kind::kDriverMissing);
      CHECK(std::string(error.what()).find(std::to_string(count)) != std::string::npos);
    }
  });
}

inline void cuda_alone(CudaRung& rung, Backend& floor) {
  contexts(rung, floor);
  captures(rung, floor);
  missing_drivers(rung);
}

}  // namespace conformance
