// The same loops over this machine's malloc: the floor of the host backend.
#include <cstdlib>

#include "loop.hpp"

namespace {

struct Malloc {
  void enter() const {}
  void* allocate(size_t bytes) const {
    void* block = std::malloc(bytes);
    // Without this the compiler leaves the pair out.
    asm volatile("" : : "r"(block) : "memory");
    return block;
  }
  void free(void* block) const { std::free(block); }
};

}  // namespace

extern "C" {

double loop_pairs(int, void*, size_t bytes, size_t pairs, size_t threads) {
  return loop::pairs(Malloc{}, bytes, pairs, threads);
}

double loop_mixed(int, void*, const size_t* sizes, const uint32_t* slots, size_t count, size_t most) {
  return loop::mixed(Malloc{}, sizes, slots, count, most);
}

const char* loop_error() { return loop::error().c_str(); }

}  // extern "C"
