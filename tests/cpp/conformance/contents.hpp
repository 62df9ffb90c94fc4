// What the memory holds, who can touch it, and from which threads.
#pragma once

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <string>
#include <thread>
#include <vector>

#include "backend/backend.hpp"
#include "backend/cuda_abi.hpp"
#include "check.hpp"
#include "conformance/pages.hpp"
#include "conformance/rung.hpp"
#include "core/sizes.hpp"

namespace conformance {

using namespace tem;  // NOLINT: properties of that namespace
using check::property;

class Contents {
 public:
  Contents(Rung& rung, Backend& floor)
      : rung_(rung), floor_(floor), page_(floor.capabilities().granularity) {}

  void run() {
    contents();
    touches();
    threads();
  }

 private:
  void contents() {
    property("memory from create reads as zeros, also where another's bytes were", [&] {
      std::vector<unsigned char> bytes(page_);
      for (int round = 0; round < 3; ++round) {
        Pages pages(floor_, 1);
        pages.map(0, 1);
        rung_.read(bytes.data(), pages.at(0), page_);
        for (const unsigned char byte : bytes) CHECK(byte == 0);
        std::fill(bytes.begin(), bytes.end(), static_cast<unsigned char>(0xa5));
        rung_.write(pages.at(0), bytes.data(), page_);
      }
    });
    property("bytes stay with their memory: seen through two mappings, and after it moved", [&] {
      Pages pages(floor_, 4);
      const Handle handle = floor_.create(page_);
      floor_.map(pages.at(0), page_, handle);
      floor_.map(pages.at(1), page_, handle);
      floor_.allow(pages.at(0), 2 * page_);
      rung_.put(pages.at(0), 0x5eed);
      CHECK_EQ(rung_.get(pages.at(1)), 0x5eedU);
      floor_.unmap(pages.at(0), 2 * page_);
      floor_.map(pages.at(3), page_, handle);
      floor_.allow(pages.at(3), page_);
      CHECK_EQ(rung_.get(pages.at(3)), 0x5eedU);
      floor_.unmap(pages.at(3), page_);
      floor_.release(handle);
    });
    property("zero clears exactly the bytes it is given, over neighbouring mappings", [&] {
      Pages pages(floor_, 2);
      pages.map(0, 1);
      pages.map(1, 1);
      std::vector<unsigned char> bytes(2 * page_, 0xff);
      const size_t spans[][2] = {{0, 2 * page_}, {page_ - 8, 16}, {3, 6}, {page_ + 1, 1}, {4, 0}};
      for (const auto& [from, count] : spans) {
        rung_.write(pages.at(0), std::vector<unsigned char>(2 * page_, 0xff).data(), 2 * page_);
        floor_.zero(pages.at(0) + from, count, 0);
        rung_.read(bytes.data(), pages.at(0), 2 * page_);
        for (size_t i = 0; i < bytes.size(); ++i) {
          CHECK_EQ(int{bytes[i]}, i >= from && i < from + count ? 0 : 0xff);
        }
      }
    });
  }

  void touches() {
    if (!rung_.touchable) return;
    property("the CPU can touch what is allowed, and nothing else of a reservation", [&] {
      Pages pages(floor_, 4);
      pages.map(0, 1, false);
      pages.map(2, 1);
      CHECK(!touchable(pages.at(0)));
      CHECK(!touchable(pages.at(1)));
      CHECK(touchable(pages.at(2)));
      CHECK(!touchable(pages.at(3)));
    });
    property("a forked child cannot write the parent's memory", [&] {
      Pages pages(floor_, 1);
      pages.map(0, 1);
      auto* const word = reinterpret_cast<volatile uint32_t*>(pages.at(0));
      *word = 0x5eed;
      const pid_t child = fork();
      if (child == 0) {
        std::signal(SIGSEGV, SIG_DFL);
        *word = 0xbad;
        _exit(0);
      }
      waitpid(child, nullptr, 0);
      CHECK_EQ(uint32_t{*word}, 0x5eedU);
    });
  }

  void threads() {
    property("any thread may call, four at once, and nothing is lost", [&] {
      std::array<std::string, 4> failed;
      std::vector<std::thread> workers;
      for (size_t worker = 0; worker < failed.size(); ++worker) {
        workers.emplace_back([&, worker] {
          try {
            for (uint32_t round = 0; round < 20; ++round) churn(worker, round);
          } catch (const std::exception& error) {
            failed[worker] = error.what();
          }
        });
      }
      for (std::thread& worker : workers) worker.join();
      for (const std::string& what : failed) {
        if (!what.empty()) throw check::Failure(what);
      }
    });
  }

  void churn(size_t worker, uint32_t round) {
    Pages pages(floor_, 3);
    pages.map(0, 1);
    pages.map(1, 2);
    const auto mark = static_cast<uint32_t>(worker << 16) | round;
    rung_.put(pages.at(2), mark);
    const EventId event = floor_.record(0);
    floor_.memory_info();
    floor_.passed(event);
    floor_.forget(event);
    CHECK_EQ(rung_.get(pages.at(2)), mark);
    CHECK_REFUSED(floor_.unmap(pages.at(1), page_), cuda::kInvalidValue);
  }

  /// Lets the kernel read a byte there, which answers EFAULT where a touch would be a signal.
  static bool touchable(Address at) {
    std::array<int, 2> ends{};
    CHECK(pipe(ends.data()) == 0);
    const bool read = write(ends[1], reinterpret_cast<const void*>(at), 1) == 1;
    close(ends[0]);
    close(ends[1]);
    return read;
  }

  Rung& rung_;
  Backend& floor_;
  size_t page_;
};

}  // namespace conformance
