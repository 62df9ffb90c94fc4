// Memory that leaves its process as a descriptor, and comes back in.
#pragma once

#include <fcntl.h>

#include "backend/backend.hpp"
#include "backend/cuda_abi.hpp"
#include "check.hpp"
#include "conformance/pages.hpp"
#include "conformance/rung.hpp"
#include "core/fd.hpp"

namespace conformance {

using namespace tem;  // NOLINT: properties of that namespace
using check::property;

class Sharing {
 public:
  Sharing(Rung& rung, Backend& floor) : rung_(rung), floor_(floor), page_(floor.capabilities().granularity) {}

  void run() {
    property("what is imported, once or twice, is the memory that was exported", [&] {
      Pages pages(floor_, 6);
      const Handle own = floor_.create(2 * page_);
      put_at(pages.at(0), own);
      rung_.put(pages.at(1), 0x5eed);
      const Fd fd = floor_.export_fd(own);
      CHECK((fcntl(fd.get(), F_GETFD) & FD_CLOEXEC) != 0);
      const Handle first = floor_.import_fd(fd);
      const Handle second = floor_.import_fd(floor_.export_fd(own));
      put_at(pages.at(2), first);
      put_at(pages.at(4), second);
      CHECK_EQ(rung_.get(pages.at(3)), 0x5eedU);
      rung_.put(pages.at(5), 0xbeef);
      CHECK_EQ(rung_.get(pages.at(1)), 0xbeefU);
      floor_.unmap(pages.at(0), 6 * page_);
      for (const Handle handle : {own, first, second}) floor_.release(handle);
    });
    property("an import outlives the memory's first handle, and its own", [&] {
      Pages pages(floor_, 2);
      const Handle own = floor_.create(2 * page_);
      put_at(pages.at(0), own);
      rung_.put(pages.at(1), 0x5eed);
      const Handle imported = floor_.import_fd(floor_.export_fd(own));
      floor_.unmap(pages.at(0), 2 * page_);
      floor_.release(own);
      put_at(pages.at(0), imported);
      floor_.release(imported);
      CHECK_EQ(rung_.get(pages.at(1)), 0x5eedU);
      floor_.unmap(pages.at(0), 2 * page_);
    });
    if (!rung_.strict) return;
    property("a handle that is none, a descriptor of something else and a wrong size are refused", [&] {
      const Handle gone = floor_.create(page_);
      floor_.release(gone);
      CHECK_REFUSED(floor_.export_fd(gone), cuda::kInvalidValue);
      CHECK_REFUSED(floor_.import_fd(Fd()), cuda::kInvalidValue);
      CHECK_REFUSED(floor_.import_fd(Fd(open("/dev/null", O_RDWR | O_CLOEXEC))), cuda::kInvalidValue);
      Pages pages(floor_, 2);
      const Handle own = floor_.create(page_);
      const Handle imported = floor_.import_fd(floor_.export_fd(own));
      CHECK_REFUSED(floor_.map(pages.at(0), 2 * page_, imported), cuda::kNotSupported);
      floor_.release(own);
      floor_.release(imported);
    });
    property("what was allowed to be read is read and not written, by whoever may write elsewhere", [&] {
      Pages pages(floor_, 4);
      const Handle own = floor_.create(2 * page_);
      put_at(pages.at(0), own);
      const Handle imported = floor_.import_fd(floor_.export_fd(own, Access::kRead));
      floor_.map(pages.at(2), 2 * page_, imported);
      floor_.allow(pages.at(2), 2 * page_, Access::kRead);
      rung_.put(pages.at(0), 0x5eed);
      CHECK_EQ(rung_.get(pages.at(2)), 0x5eedU);
      CHECK_REFUSED(floor_.zero(pages.at(2), page_, 0), cuda::kInvalidValue);
      floor_.zero(pages.at(0), page_, 0);
      CHECK_EQ(rung_.get(pages.at(2)), 0U);
      floor_.unmap(pages.at(0), 4 * page_);
      floor_.release(own);
      floor_.release(imported);
    });
  }

 private:
  void put_at(Address at, Handle handle) {
    floor_.map(at, 2 * page_, handle);
    floor_.allow(at, 2 * page_);
  }

  Rung& rung_;
  Backend& floor_;
  size_t page_;
};

}  // namespace conformance
