// One suite for every backend: what backend.hpp promises, shown on the host, on the fake driver and on a GPU.
//   backend_conformance               the host backend
//   backend_conformance LIBRARY       the CUDA backend over the fake driver at this path
//   backend_conformance --cuda        the CUDA backend over this machine's driver
// Prints a line per property; its status is not zero when one failed.
#include <cstdlib>
#include <string>

#include "check.hpp"
#include "conformance/contents.hpp"
#include "conformance/cuda.hpp"
#include "conformance/fake.hpp"
#include "conformance/host.hpp"
#include "conformance/mapping.hpp"
#include "conformance/order.hpp"
#include "conformance/sharing.hpp"

using namespace conformance;  // NOLINT

namespace {

/// The first use of a device takes memory for itself: this use comes before anything is counted.
void warm_up(Rung& rung, Backend& floor) {
  Pages pages(floor, 1);
  pages.map(0, 1);
  rung.put(pages.at(0), 1);
  rung.get(pages.at(0));
  floor.zero(pages.at(0), 3, 0);
  floor.zero(pages.at(0), 4, 0);
  const Stream stream = rung.stream();
  rung.submit(stream);
  floor.forget(floor.record(stream));
  rung.complete(stream);
  rung.destroy(stream);
  rung.settle();
}

void run_properties(Rung& rung, Backend& floor) {
  Mapping(rung, floor).run();
  Order(rung, floor).run();
  Contents(rung, floor).run();
  Sharing(rung, floor).run();
}

void run_suite(Rung& rung, Backend& floor) {
  warm_up(rung, floor);
  // A GPU's driver still takes a page for itself in the first pass. What it takes in the second is a leak.
  if (!rung.strict) run_properties(rung, floor);
  const size_t start = floor.memory_info().free;
  run_properties(rung, floor);
  property("every byte that was created is free again", [&] { CHECK_EQ(floor.memory_info().free, start); });
}

}  // namespace

int main(int argc, char** argv) {
  const std::string which = argc > 1 ? argv[1] : "";
  if (which.empty()) {
    HostRung rung;
    run_suite(rung, *rung.open());
    host_alone();
  } else {
    const bool real = which == "--cuda";
    if (!real) setenv("FAKE_CUDA_MEMORY", std::to_string(kCapacity).c_str(), 1);
    CudaRung rung(real ? "libcuda.so.1" : which, real);
    const auto floor = rung.open();
    run_suite(rung, *floor);
    cuda_alone(rung, *floor);
    if (!real) fake_alone(rung);
  }
  std::printf("%d failed\n", check::failures());
  return check::failures() == 0 ? 0 : 1;
}
