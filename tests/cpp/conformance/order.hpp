// Streams and events: when a fence has passed, and when it has not.
#pragma once

#include <set>

#include "backend/backend.hpp"
#include "backend/cuda_abi.hpp"
#include "check.hpp"
#include "conformance/pages.hpp"
#include "conformance/rung.hpp"
#include "core/sizes.hpp"

namespace conformance {

using namespace tem;  // NOLINT: properties of that namespace
using check::property;

class Order {
 public:
  Order(Rung& rung, Backend& floor) : rung_(rung), floor_(floor) {}

  void run() {
    fences();
    life_of_events();
  }

 private:
  void fences() {
    property("an event of the default stream passes, and an event serves once", [&] {
      const EventId event = floor_.record(0);
      rung_.settle();
      CHECK(floor_.passed(event));
      floor_.forget(event);
      CHECK_REFUSED(floor_.passed(event), cuda::kInvalidHandle);
      CHECK_REFUSED(floor_.forget(event), cuda::kInvalidHandle);
      const EventId next = floor_.record(0);
      CHECK(next != event);
      CHECK_REFUSED(floor_.passed(event), cuda::kInvalidHandle);
      floor_.forget(next);
    });
    property("an event passes when what was submitted before it has run, not later", [&] {
      const Stream stream = rung_.stream();
      const EventId idle = floor_.record(stream);
      rung_.submit(stream);
      const EventId busy = floor_.record(stream);
      const EventId same = floor_.record(stream);
      CHECK(floor_.passed(idle));
      CHECK(!floor_.passed(busy));
      CHECK(!floor_.passed(same));
      rung_.complete(stream);
      CHECK(floor_.passed(busy));
      rung_.submit(stream);
      CHECK(floor_.passed(same));
      rung_.complete(stream);
      for (const EventId event : {idle, busy, same}) floor_.forget(event);
      rung_.destroy(stream);
    });
    property("streams do not wait for each other", [&] {
      const Stream one = rung_.stream();
      const Stream two = rung_.stream();
      rung_.submit(one);
      const EventId slow = floor_.record(one);
      const EventId quick = floor_.record(two);
      rung_.settle_stream(two);
      CHECK(floor_.passed(quick));
      CHECK(!floor_.passed(slow));
      rung_.complete(one);
      CHECK(floor_.passed(slow));
      floor_.forget(slow);
      floor_.forget(quick);
      rung_.destroy(one);
      rung_.destroy(two);
    });
  }

  void life_of_events() {
    property("an event may be forgotten before it has passed, and its successor is not confused with it",
             [&] {
               const Stream one = rung_.stream();
               const Stream two = rung_.stream();
               rung_.submit(one);
               std::set<EventId> seen;
               for (int i = 0; i < 100; ++i) {
                 const EventId pending = floor_.record(one);
                 CHECK(!floor_.passed(pending));
                 CHECK(seen.insert(pending).second);
                 floor_.forget(pending);
                 const EventId passed = floor_.record(two);
                 rung_.settle_stream(two);
                 CHECK(floor_.passed(passed));
                 CHECK(seen.insert(passed).second);
                 floor_.forget(passed);
               }
               rung_.complete(one);
               rung_.destroy(one);
               rung_.destroy(two);
             });
    property("unmap and release do not wait for work that is pending", [&] {
      const Stream stream = rung_.stream();
      rung_.submit(stream);
      {
        Pages pages(floor_, 1);
        pages.map(0, 1);
      }
      const EventId event = floor_.record(stream);
      CHECK(!floor_.passed(event));
      rung_.complete(stream);
      floor_.forget(event);
      rung_.destroy(stream);
    });
    if (!rung_.strict) return;
    property("an event outlives its stream, whose work still runs", [&] {
      const Stream stream = rung_.stream();
      rung_.submit(stream);
      const EventId event = floor_.record(stream);
      rung_.destroy(stream);
      CHECK(floor_.passed(event));
      floor_.forget(event);
      CHECK_REFUSED(floor_.record(stream), cuda::kInvalidHandle);
    });
  }

  Rung& rung_;
  Backend& floor_;
};

}  // namespace conformance
