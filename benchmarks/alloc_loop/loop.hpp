// Loops of allocate and free over anything with enter(), allocate() and free(). Both give nanoseconds, or -1
// with error() saying why.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace loop {

inline std::string& error() {
  static std::string text;
  return text;
}

inline double nanoseconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - start).count();
}

/// What a pair takes one thread while `threads` of them do nothing else.
template <class Allocator>
double pairs(const Allocator& allocator, size_t bytes, size_t count, size_t threads) {
  std::mutex mutex;
  bool failed = false;
  std::atomic<size_t> ready{0};
  std::atomic<bool> go{false};
  const auto run = [&](size_t number) {
    for (size_t i = 0; i < number; ++i) allocator.free(allocator.allocate(bytes));
  };
  const auto work = [&] {
    // A thread that cannot start must be counted all the same: the others wait for it.
    bool counted = false;
    try {
      allocator.enter();
      run(count / 16 + 1);
      counted = true;
      ++ready;
      while (!go.load(std::memory_order_acquire)) std::this_thread::yield();
      run(count);
    } catch (const std::exception& problem) {
      if (!counted) ++ready;
      const std::lock_guard<std::mutex> guard(mutex);
      failed = true;
      error() = problem.what();
    }
  };
  std::vector<std::thread> workers;
  for (size_t i = 0; i < threads; ++i) workers.emplace_back(work);
  while (ready.load() < threads) std::this_thread::yield();
  const auto start = std::chrono::steady_clock::now();
  go.store(true, std::memory_order_release);
  for (std::thread& worker : workers) worker.join();
  const double spent = nanoseconds_since(start);
  return failed ? -1 : spent / static_cast<double>(count);
}

/// What a step takes: a slot's block is freed, and one of another size put there.
template <class Allocator>
double mixed(const Allocator& allocator, const size_t* sizes, const uint32_t* slots, size_t count,
             size_t most) {
  std::vector<void*> live(most, nullptr);
  const auto drop = [&] {
    for (void*& block : live) {
      if (block != nullptr) allocator.free(block);
      block = nullptr;
    }
  };
  const auto run = [&] {
    for (size_t i = 0; i < count; ++i) {
      void*& block = live[slots[i]];
      if (block != nullptr) allocator.free(block);
      block = nullptr;
      block = allocator.allocate(sizes[i]);
    }
  };
  try {
    allocator.enter();
    // The first time the cache grows to what the pattern needs; what is timed finds it there.
    run();
    const auto start = std::chrono::steady_clock::now();
    run();
    const double spent = nanoseconds_since(start);
    drop();
    return spent / static_cast<double>(count);
  } catch (const std::exception& problem) {
    error() = problem.what();
    try {
      drop();
    } catch (const std::exception&) {
    }
    return -1;
  }
}

}  // namespace loop
