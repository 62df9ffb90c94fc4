// A mutex for critical sections of some tens of nanoseconds: whoever meets it taken looks again for a moment
// before it sleeps, for waking up costs more than such a section lasts.
#pragma once

#include <mutex>

namespace tem {

class ShortLock {
 public:
  void lock() {
    for (int i = 0; i < kSpins; ++i) {
      if (mutex_.try_lock()) return;
      for (int pause = 0; pause < kPauses; ++pause) relax();
    }
    mutex_.lock();
  }
  bool try_lock() { return mutex_.try_lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  static constexpr int kSpins = 64;
  static constexpr int kPauses = 8;

  static void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::mutex mutex_;
};

}  // namespace tem
