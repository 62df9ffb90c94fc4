// Who may map what where: reservations, handles, mappings and access, and what is refused.
#pragma once

#include <algorithm>
#include <cstdio>
#include <string>

#include "backend/backend.hpp"
#include "backend/cuda_abi.hpp"
#include "check.hpp"
#include "conformance/pages.hpp"
#include "conformance/rung.hpp"
#include "core/sizes.hpp"

namespace conformance {

using namespace tem;  // NOLINT: properties of that namespace
using check::property;

class Mapping {
 public:
  Mapping(Rung& rung, Backend& floor)
      : rung_(rung),
        floor_(floor),
        page_(floor.capabilities().granularity),
        start_(floor.memory_info().free) {}

  void run() {
    facts();
    reservations();
    memory();
    mappings();
    access();
    refusals_change_nothing();
  }

 private:
  size_t free() { return floor_.memory_info().free; }

  void facts() {
    property("capabilities name the device, and its granularity is a power of two", [&] {
      const Capabilities& facts = floor_.capabilities();
      CHECK(facts.backend == "host" || facts.backend == "cuda");
      CHECK(!facts.device.empty());
      CHECK_EQ(facts.uuid.size(), (facts.backend == "host" ? 5U : 4U) + 36U);
      CHECK(is_pow2(facts.granularity));
      CHECK(floor_.memory_info().total >= floor_.memory_info().free);
    });
  }

  void reservations() {
    property("reserve: aligned as asked, apart from each other, costs no memory", [&] {
      for (const size_t alignment : {size_t{0}, page_, 16 * page_, 512 * page_}) {
        Pages one(floor_, 3, alignment);
        Pages two(floor_, 3, alignment);
        CHECK_EQ(one.at(0) % std::max(alignment, page_), 0U);
        CHECK(one.at(0) + one.bytes() <= two.at(0) || two.at(0) + two.bytes() <= one.at(0));
      }
      CHECK_EQ(free(), start_);
    });
    property("reserve: far more than there is memory", [&] {
      const Address base = floor_.reserve(size_t{1} << 40, 0);
      floor_.unreserve(base, size_t{1} << 40);
    });
    property("reserve refuses a size that is zero or no multiple, and an alignment that is no power of two",
             [&] {
               CHECK_REFUSED(floor_.reserve(0, 0), cuda::kInvalidValue);
               CHECK_REFUSED(floor_.reserve(page_ + 4096, 0), cuda::kInvalidValue);
               CHECK_REFUSED(floor_.reserve(page_, 3 * page_), cuda::kInvalidValue);
             });
    property("reserve refuses more than there are addresses", [&] {
      CHECK_REFUSED(floor_.reserve(size_t{1} << 60, 0), cuda::kOutOfMemory);
      CHECK_REFUSED(floor_.reserve(~size_t{0} - page_ + 1, 0), cuda::kOutOfMemory);
    });
    property("unreserve takes a reservation whole, once, and empty", [&] {
      const Address base = floor_.reserve(4 * page_, 0);
      CHECK_REFUSED(floor_.unreserve(base, page_), cuda::kInvalidValue);
      CHECK_REFUSED(floor_.unreserve(base, 5 * page_), cuda::kInvalidValue);
      CHECK_REFUSED(floor_.unreserve(base + page_, 3 * page_), cuda::kInvalidValue);
      const Handle handle = floor_.create(page_);
      floor_.map(base + page_, page_, handle);
      CHECK_REFUSED(floor_.unreserve(base, 4 * page_), cuda::kInvalidValue);
      floor_.unmap(base + page_, page_);
      floor_.release(handle);
      floor_.unreserve(base, 4 * page_);
      CHECK_REFUSED(floor_.unreserve(base, 4 * page_), cuda::kInvalidValue);
    });
  }

  void memory() {
    property("create refuses a size that is zero or no multiple", [&] {
      CHECK_REFUSED(floor_.create(0), cuda::kInvalidValue);
      CHECK_REFUSED(floor_.create(page_ + 4096), cuda::kInvalidValue);
    });
    property("want of memory is an error that names what was asked and what is free", [&] {
      const size_t all = round_down(floor_.memory_info().total, page_);
      for (const size_t bytes : {all + page_, size_t{1} << 50, size_t{1} << 63}) {
        const Error error = ERROR_OF(floor_.create(bytes));
        CHECK(error.kind() == Kind::kOutOfMemory);
        const std::string text = error.what();
        CHECK(text.find(format_bytes(bytes)) != std::string::npos);
        CHECK(text.find("free of") != std::string::npos);
      }
      CHECK_EQ(free(), start_);
    });
    property("release takes a handle once", [&] {
      const Handle handle = floor_.create(page_);
      floor_.release(handle);
      if (rung_.strict) CHECK_REFUSED(floor_.release(handle), cuda::kInvalidValue);
      CHECK_REFUSED(floor_.release(0), cuda::kInvalidValue);
    });
    property("release of mapped memory gives it back with its last mapping", [&] {
      Pages pages(floor_, 64);
      const Handle handle = floor_.create(32 * page_);
      floor_.map(pages.at(0), 32 * page_, handle);
      floor_.map(pages.at(32), 32 * page_, handle);
      floor_.release(handle);
      CHECK_EQ(free(), start_ - 32 * page_);
      floor_.unmap(pages.at(0), 32 * page_);
      CHECK_EQ(free(), start_ - 32 * page_);
      floor_.unmap(pages.at(32), 32 * page_);
      CHECK_EQ(free(), start_);
    });
  }

  void mappings() {
    property("map takes an allocation whole, from its start", [&] {
      Pages pages(floor_, 4);
      const Handle handle = floor_.create(2 * page_);
      CHECK_REFUSED(floor_.map(pages.at(0), page_, handle), cuda::kNotSupported);
      CHECK_REFUSED(floor_.map(pages.at(0), 3 * page_, handle), cuda::kNotSupported);
      CHECK_REFUSED(floor_.map(pages.at(0), page_ + 4096, handle), cuda::kNotSupported);
      CHECK_REFUSED(floor_.map(pages.at(0), 0, handle), cuda::kInvalidValue);
      floor_.release(handle);
    });
    property("map refuses an address that is no multiple, taken, or not reserved", [&] {
      Pages pages(floor_, 4);
      pages.map(1, 1);
      const Handle handle = floor_.create(2 * page_);
      CHECK_REFUSED(floor_.map(pages.at(2) + 4096, 2 * page_, handle), cuda::kInvalidValue);
      CHECK_REFUSED(floor_.map(pages.at(0), 2 * page_, handle), cuda::kInvalidValue);
      CHECK_REFUSED(floor_.map(pages.at(1), 2 * page_, handle), cuda::kInvalidValue);
      CHECK_REFUSED(floor_.map(page_, 2 * page_, handle), cuda::kInvalidValue);
      CHECK_REFUSED(floor_.map(0, 2 * page_, handle), cuda::kInvalidValue);
      if (rung_.strict) CHECK_REFUSED(floor_.map(pages.at(3), 2 * page_, handle), cuda::kInvalidValue);
      floor_.release(handle);
    });
    property("map refuses a handle that is none", [&] {
      Pages pages(floor_, 1);
      CHECK_REFUSED(floor_.map(pages.at(0), page_, 0), cuda::kInvalidValue);
      if (!rung_.strict) return;  // the driver crashes
      const Handle handle = floor_.create(page_);
      floor_.release(handle);
      CHECK_REFUSED(floor_.map(pages.at(0), page_, handle), cuda::kInvalidValue);
    });
    property("unmap takes mappings whole, and neighbours in one call", [&] {
      Pages pages(floor_, 5);
      const Handle two = floor_.create(2 * page_);
      const Handle one = floor_.create(page_);
      floor_.map(pages.at(0), 2 * page_, two);
      floor_.map(pages.at(2), page_, one);
      CHECK_REFUSED(floor_.unmap(pages.at(0), page_), cuda::kInvalidValue);
      CHECK_REFUSED(floor_.unmap(pages.at(1), page_), cuda::kInvalidValue);
      CHECK_REFUSED(floor_.unmap(pages.at(1), 2 * page_), cuda::kInvalidValue);
      CHECK_REFUSED(floor_.unmap(pages.at(0), 0), cuda::kInvalidValue);
      CHECK_REFUSED(floor_.unmap(page_, page_), cuda::kInvalidValue);
      if (rung_.strict) {
        CHECK_REFUSED(floor_.unmap(pages.at(2), 2 * page_), cuda::kInvalidValue);
        CHECK_REFUSED(floor_.unmap(pages.at(4), page_), cuda::kInvalidValue);
      }
      floor_.unmap(pages.at(0), 3 * page_);
      if (rung_.strict) CHECK_REFUSED(floor_.unmap(pages.at(0), 2 * page_), cuda::kInvalidValue);
      floor_.map(pages.at(1), 2 * page_, two);
      floor_.unmap(pages.at(1), 2 * page_);
      floor_.release(one);
      floor_.release(two);
    });
  }

  void access() {
    property("a mapping is not accessible until allowed, and not after it is mapped anew", [&] {
      Pages pages(floor_, 1);
      const Handle handle = floor_.create(page_);
      floor_.map(pages.at(0), page_, handle);
      CHECK_REFUSED(floor_.zero(pages.at(0), page_, 0), cuda::kInvalidValue);
      floor_.allow(pages.at(0), page_);
      floor_.allow(pages.at(0), page_);
      floor_.zero(pages.at(0), page_, 0);
      rung_.settle();
      floor_.unmap(pages.at(0), page_);
      CHECK_REFUSED(floor_.zero(pages.at(0), page_, 0), cuda::kInvalidValue);
      floor_.map(pages.at(0), page_, handle);
      CHECK_REFUSED(floor_.zero(pages.at(0), page_, 0), cuda::kInvalidValue);
      floor_.unmap(pages.at(0), page_);
      floor_.release(handle);
    });
    property("allow takes whole mappings without a gap", [&] {
      Pages pages(floor_, 6);
      pages.map(0, 2, false);
      pages.map(2, 1, false);
      pages.map(4, 1, false);
      CHECK_REFUSED(floor_.allow(pages.at(0), page_), cuda::kInvalidValue);
      CHECK_REFUSED(floor_.allow(pages.at(1), page_), cuda::kInvalidValue);
      CHECK_REFUSED(floor_.allow(pages.at(0), 4 * page_), cuda::kInvalidValue);
      CHECK_REFUSED(floor_.allow(pages.at(3), page_), cuda::kInvalidValue);
      CHECK_REFUSED(floor_.allow(page_, page_), cuda::kInvalidValue);
      if (rung_.strict) CHECK_REFUSED(floor_.allow(pages.at(0), 5 * page_), cuda::kInvalidValue);
      floor_.allow(pages.at(0), 3 * page_);
      floor_.zero(pages.at(0), 3 * page_, 0);
      rung_.settle();
      CHECK_REFUSED(floor_.zero(pages.at(0), 4 * page_, 0), cuda::kInvalidValue);
    });
  }

  void refusals_change_nothing() {
    property("a refused call leaves mappings, contents and free memory as they were", [&] {
      Pages pages(floor_, 4);
      pages.map(0, 2);
      rung_.put(pages.at(0), 0xfeed);
      const Handle handle = floor_.create(page_);
      const size_t before = free();
      ERROR_OF(floor_.map(pages.at(1), page_, handle));
      ERROR_OF(floor_.map(pages.at(2), 2 * page_, handle));
      ERROR_OF(floor_.unmap(pages.at(0), page_));
      ERROR_OF(floor_.allow(pages.at(0), page_));
      ERROR_OF(floor_.create(size_t{1} << 50));
      ERROR_OF(floor_.unreserve(pages.at(0), pages.bytes()));
      CHECK_EQ(free(), before);
      CHECK_EQ(rung_.get(pages.at(0)), 0xfeedU);
      floor_.map(pages.at(2), page_, handle);
      floor_.unmap(pages.at(2), page_);
      floor_.release(handle);
    });
    property("an error names the call, the address, the size and what is wrong", [&] {
      Pages pages(floor_, 2);
      pages.map(0, 2);
      char address[32];
      std::snprintf(address, sizeof address, "0x%zx", static_cast<size_t>(pages.at(1)));
      const std::string text = ERROR_OF(floor_.unmap(pages.at(1), page_)).what();
      CHECK(text.find(address) != std::string::npos);
      CHECK(text.find(format_bytes(page_)) != std::string::npos);
      CHECK(text.find("nmap(") != std::string::npos);
      CHECK(text.size() > 60);
    });
  }

  Rung& rung_;
  Backend& floor_;
  size_t page_;
  size_t start_;
};

}  // namespace conformance
