// Threads of a test. What one throws is printed and counted.
#pragma once

#include <atomic>
#include <cstdio>
#include <exception>
#include <thread>
#include <utility>
#include <vector>

namespace check {

class Threads {
 public:
  Threads() = default;
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  template <class Body>
  void start(Body body) {
    threads_.emplace_back([this, body = std::move(body)] {
      try {
        body();
      } catch (const std::exception& error) {
        ++failed_;
        std::printf("        %s\n", error.what());
      }
    });
  }
  void join() {
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }
  int failed() const { return failed_; }

 private:
  std::atomic<int> failed_{0};
  std::vector<std::thread> threads_;
};

}  // namespace check
