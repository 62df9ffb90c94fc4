// What only the fake driver can show: calls that fail, an old driver, a fault on the device, the end.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "backend/backend.hpp"
#include "check.hpp"
#include "conformance/cuda_rung.hpp"
#include "conformance/pages.hpp"

namespace conformance {

/// The library copied, which the loader takes for another: a driver in its first state.
class FreshDriver {
 public:
  explicit FreshDriver(const CudaRung& rung) {
    std::string name = (std::filesystem::temp_directory_path() / "fake_cuda_XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("no folder for a copy of the library");
    folder_ = name;
    path = folder_ / "libcuda.so.1";
    std::filesystem::copy_file(rung.library, path);
  }
  ~FreshDriver() { std::filesystem::remove_all(folder_); }
  FreshDriver(const FreshDriver&) = delete;
  FreshDriver& operator=(const FreshDriver&) = delete;

  std::filesystem::path path;

 private:
  std::filesystem::path folder_;
};

/// An environment variable for the length of a scope.
class Setting {
 public:
  Setting(const char* name, const char* value) : name_(name) { setenv(name, value, 1); }
  ~Setting() { unsetenv(name_); }
  Setting(const Setting&) = delete;
  Setting& operator=(const Setting&) = delete;

 private:
  const char* name_;
};

inline size_t count_of(const CudaRung& rung, const char* name) {
  return rung.call<size_t>("fake_cuda_count", name);
}

struct Live {
  explicit Live(const CudaRung& rung) {
    rung.call<void>("fake_cuda_live", &handles, &mappings, &reservations, &events);
  }
  size_t handles = 0, mappings = 0, reservations = 0, events = 0;
};

inline void economy(CudaRung& rung) {
  property("fake: mapping, giving back and asking for a fence never touch the thread's context", [&] {
    const auto floor = rung.open();
    const EventId event = floor->record(0);
    rung.call<void>("fake_cuda_reset_counts");
    {
      Pages pages(*floor, 1);
      pages.map(0, 1);
      floor->passed(event);
    }
    for (const char* name : {"cuCtxGetCurrent", "cuCtxPushCurrent", "cuCtxPopCurrent", "cuCtxSetCurrent"}) {
      CHECK_EQ(count_of(rung, name), 0U);
    }
    floor->forget(event);
  });
  property("fake: forgotten events are recorded again, and all go with the backend", [&] {
    const Live before(rung);
    rung.call<void>("fake_cuda_reset_counts");
    {
      const auto floor = rung.open();
      for (int i = 0; i < 1000; ++i) floor->forget(floor->record(0));
      CHECK_EQ(count_of(rung, "cuEventCreate"), 1U);
      floor->record(0);
    }
    CHECK_EQ(Live(rung).events, before.events);
  });
  property("fake: each device has its own uuid and its own memory", [&] {
    const auto first = rung.open();
    const auto second = make_cuda_backend(1, rung.library);
    CHECK(first->capabilities().uuid != second->capabilities().uuid);
    CHECK_EQ(second->capabilities().ordinal, 1);
    const Handle all = second->create(second->memory_info().total);
    CHECK_EQ(second->memory_info().free, 0U);
    CHECK_EQ(first->memory_info().free, first->memory_info().total);
    CHECK_THROWS(second->create(second->capabilities().granularity), Kind::kOutOfMemory);
    second->release(all);
  });
}

/// One life of an extent, a step at a time. A step that fails has done nothing and can be tried again.
inline std::vector<std::function<void()>> life(Backend& floor) {
  struct Track {
    Address base = 0;
    Handle handle = 0;
    Handle imported = 0;
    EventId event = 0;
  };
  const auto track = std::make_shared<Track>();
  const size_t page = floor.capabilities().granularity;
  return {
      [=, &floor] { track->base = floor.reserve(2 * page, 0); },
      [=, &floor] { track->handle = floor.create(2 * page); },
      [=, &floor] { floor.map(track->base, 2 * page, track->handle); },
      [=, &floor] { track->imported = floor.import_fd(floor.export_fd(track->handle)); },
      [=, &floor] { floor.release(track->imported); },
      [=, &floor] { floor.allow(track->base, 2 * page); },
      [=, &floor] { floor.zero(track->base, 2 * page, 0); },
      [=, &floor] { track->event = floor.record(0); },
      [=, &floor] { floor.passed(track->event); },
      [=, &floor] { floor.forget(track->event); },
      [=, &floor] { floor.memory_info(); },
      [=, &floor] { floor.unmap(track->base, 2 * page); },
      [=, &floor] { floor.release(track->handle); },
      [=, &floor] { floor.unreserve(track->base, 2 * page); },
  };
}

inline void failing_calls(CudaRung& rung) {
  property("fake: whichever call fails, with whatever code, it is told and nothing is left behind", [&] {
    for (const cuda::Result code : {cuda::kOutOfMemory, cuda::kInvalidValue, cuda::kIllegalAddress}) {
      for (size_t n = 1;; ++n) {
        const Live before(rung);
        int failed = 0;
        {
          const auto floor = rung.open();
          rung.call<void>("fake_cuda_fail_nth", n, code);
          for (const auto& step : life(*floor)) {
            try {
              step();
            } catch (const Error& error) {
              ++failed;
              CHECK(error.kind() == Kind::kOutOfMemory || error.code() == code);
              CHECK(std::string(error.what()).find("cuda:0") != std::string::npos);
              step();
            }
          }
          rung.call<void>("fake_cuda_fail_nth", size_t{0}, cuda::kSuccess);
          CHECK_EQ(floor->memory_info().free, floor->memory_info().total);
        }
        const Live after(rung);
        CHECK_EQ(after.handles, before.handles);
        CHECK_EQ(after.mappings, before.mappings);
        CHECK_EQ(after.reservations, before.reservations);
        CHECK_EQ(after.events, before.events);
        if (failed == 0) {
          CHECK(n > 10);
          break;
        }
      }
    }
  });
  property("fake: out of memory from create alone is a want of memory", [&] {
    const auto floor = rung.open();
    rung.call<void>("fake_cuda_fail_nth", size_t{1}, cuda::kOutOfMemory);
    CHECK_THROWS(floor->create(floor->capabilities().granularity), Kind::kOutOfMemory);
    rung.call<void>("fake_cuda_fail_nth", size_t{1}, cuda::kOutOfMemory);
    CHECK_REFUSED(floor->reserve(floor->capabilities().granularity, 0), cuda::kOutOfMemory);
  });
}

inline void unfit_drivers(CudaRung& rung) {
  property("fake: a driver older than 12.0, without devices, or a device without VMM", [&] {
    {
      const Setting old("FAKE_CUDA_VERSION", "11080");
      const Error error = ERROR_OF(make_cuda_backend(0, rung.library));
      CHECK(error.kind() == Kind::kDriverMissing);
      CHECK(std::string(error.what()).find("11.8") != std::string::npos);
      CHECK(std::string(error.what()).find("12.0") != std::string::npos);
    }
    {
      const Setting none("FAKE_CUDA_NO_VMM", "1");
      CHECK_THROWS(make_cuda_backend(0, rung.library), Kind::kDriverMissing);
    }
    const Setting empty("FAKE_CUDA_DEVICES", "0");
    const FreshDriver fresh(rung);
    const Error error = ERROR_OF(make_cuda_backend(0, fresh.path));
    CHECK(error.kind() == Kind::kDriverMissing);
    CHECK_EQ(error.code(), cuda::kNoDevice);
  });
}

inline void ends(CudaRung& rung) {
  property("fake: memory unmapped before a memset that is queued on it is a fault, for every later call",
           [&] {
             const FreshDriver fresh(rung);
             CudaRung other(fresh.path, false);
             const auto floor = other.open();
             const Stream stream = other.stream();
             {
               Pages pages(*floor, 1);
               pages.map(0, 1);
               other.submit(stream);
               floor->zero(pages.at(0), 4096, stream);
             }
             const EventId event = floor->record(stream);
             CHECK(!floor->passed(event));
             other.complete(stream);
             CHECK_REFUSED(floor->passed(event), cuda::kIllegalAddress);
             CHECK_REFUSED(floor->create(floor->capabilities().granularity), cuda::kIllegalAddress);
           });
  property("fake: after the driver's end giving back succeeds, and taking does not", [&] {
    const FreshDriver fresh(rung);
    CudaRung other(fresh.path, false);
    const auto floor = other.open();
    const size_t page = floor->capabilities().granularity;
    const Address base = floor->reserve(page, 0);
    const Handle handle = floor->create(page);
    floor->map(base, page, handle);
    const EventId event = floor->record(0);
    other.call<void>("fake_cuda_shutdown");
    CHECK(floor->passed(event));
    floor->forget(event);
    floor->unmap(base, page);
    floor->release(handle);
    floor->unreserve(base, page);
    CHECK_REFUSED(floor->create(page), cuda::kDeinitialized);
    CHECK_REFUSED(floor->record(0), cuda::kDeinitialized);
  });
}

inline void peers(CudaRung& rung) {
  const auto access = [&](Address at, int device) {
    unsigned long long flags = 0;
    const cuda::MemLocation location{cuda::kLocationDevice, device};
    rung.expect("cuMemGetAccess", &flags, &location, cuda::DevicePtr{at});
    return flags == cuda::kAccessReadWrite;
  };
  property("fake: what is allowed once a device is a peer is that device's too, imports included", [&] {
    const auto floor = rung.open();
    const size_t page = floor->capabilities().granularity;
    Pages pages(*floor, 3);
    pages.map(0, 1);
    floor->add_peer(1);
    floor->add_peer(1);
    floor->add_peer(0);
    pages.map(1, 1);
    const Handle own = floor->create(page);
    const Handle imported = floor->import_fd(floor->export_fd(own));
    floor->map(pages.at(2), page, imported);
    floor->allow(pages.at(2), page);
    CHECK(access(pages.at(0), 0) && !access(pages.at(0), 1));
    floor->allow(pages.at(0), page);
    for (const size_t at : {0U, 1U, 2U}) CHECK(access(pages.at(at), 0) && access(pages.at(at), 1));
    floor->unmap(pages.at(2), page);
    CHECK(!access(pages.at(2), 1));
    floor->release(own);
    floor->release(imported);
  });
  property("fake: a device that is no peer, or none at all, is refused and stays outside", [&] {
    const Setting none("FAKE_CUDA_NO_PEERS", "1");
    const auto floor = rung.open();
    CHECK_REFUSED(floor->add_peer(1), cuda::kNotSupported);
    CHECK_REFUSED(floor->add_peer(7), cuda::kInvalidDevice);
    Pages pages(*floor, 1);
    pages.map(0, 1);
    CHECK(!access(pages.at(0), 1));
  });
}

inline void fake_alone(CudaRung& rung) {
  economy(rung);
  failing_calls(rung);
  unfit_drivers(rung);
  peers(rung);
  ends(rung);
}

}  // namespace conformance
