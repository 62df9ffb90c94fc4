// What small blocks are rounded up to: every size gets a class that holds it and wastes little.
#include "alloc/size_class.hpp"
#include "check.hpp"

using namespace tem;  // NOLINT

namespace {

void every_size() {
  for (size_t bytes = 1; bytes <= kSlabBlock; ++bytes) {
    const size_t number = size_class_of(bytes);
    CHECK(number < kSizeClasses);
    CHECK(class_bytes(number) >= bytes);
    CHECK(class_bytes(number) - bytes < bytes / 4 + kAlignment);
    CHECK(number == 0 || class_bytes(number - 1) < bytes);
  }
}

void every_class() {
  for (size_t number = 0; number < kSizeClasses; ++number) {
    const size_t bytes = class_bytes(number);
    CHECK_EQ(size_class_of(bytes), number);
    CHECK_EQ(bytes % kAlignment, 0U);
    CHECK(number == 0 || class_bytes(number - 1) < bytes);
    const size_t blocks = slab_bytes(number) / bytes;
    CHECK(blocks >= 8 && blocks <= kSlabBlocks);
    CHECK(slab_bytes(number) - blocks * bytes < bytes);
  }
}

}  // namespace

int main(int, char**) {
  check::property("every size has the smallest class that holds it, and wastes less than a quarter",
                  every_size);
  check::property("every class is its own, aligned, and a slab holds eight of it or more", every_class);
  std::printf("%d failed\n", check::failures());
  return check::failures() == 0 ? 0 : 1;
}
