// Another wall clock than the machine's. Preloaded by tests; TEM_WALL_CLOCK is a file with the nanoseconds
// that it is ahead, which the test changes while the process runs.
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>

namespace {

constexpr int64_t kSecond = 1'000'000'000;

int64_t ahead() {
  static const auto* const shared = [] {
    const int file = open(std::getenv("TEM_WALL_CLOCK"), O_RDONLY | O_CLOEXEC);
    void* const mapped = mmap(nullptr, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    return mapped == MAP_FAILED ? nullptr : static_cast<const std::atomic<int64_t>*>(mapped);
  }();
  if (shared == nullptr) std::abort();
  return *shared;
}

timespec later(const timespec& at, int64_t by) {
  const int64_t sum = at.tv_sec * kSecond + at.tv_nsec + by;
  return {sum / kSecond, sum % kSecond};
}

template <class Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" int clock_gettime(clockid_t clock, timespec* out) noexcept {
  static auto* const real = next<int(clockid_t, timespec*)>("clock_gettime");
  const int failed = real(clock, out);
  if (failed == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) *out = later(*out, ahead());
  return failed;
}

extern "C" int gettimeofday(timeval* out, void*) noexcept {
  timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  *out = {now.tv_sec, now.tv_nsec / 1000};
  return 0;
}

extern "C" time_t time(time_t* out) noexcept {
  timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (out != nullptr) *out = now.tv_sec;
  return now.tv_sec;
}
