#include "core/fd_table.hpp"

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/resource.h>

#include <algorithm>

#include "core/fd.hpp"

namespace tem {

void widen_descriptor_table(size_t descriptors) noexcept {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  const Fd any(::eventfd(0, EFD_CLOEXEC));
  const rlim_t wanted = std::min<rlim_t>(limit.rlim_cur, descriptors);
  // The table has a place for the number, and keeps it.
  if (any && wanted > 0) Fd(::fcntl(any.get(), F_DUPFD_CLOEXEC, static_cast<int>(wanted - 1))).close();
}

}  // namespace tem
