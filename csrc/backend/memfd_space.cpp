#include "backend/memfd_space.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <string>

#include "backend/cuda_abi.hpp"
#include "core/error.hpp"
#include "core/sizes.hpp"

namespace tem {

namespace {

void* pointer(Address at) { return reinterpret_cast<void*>(at); }

int protection(Access access) {
  if (access == Access::kNone) return PROT_NONE;
  return access == Access::kRead ? PROT_READ : PROT_READ | PROT_WRITE;
}

Refusal system_refusal(const char* call) {
  const int number = errno;
  const bool memory = number == ENOMEM || number == ENOSPC;
  return {memory ? cuda::kOutOfMemory : cuda::kOperatingSystem,
          std::string(call) + ": " + std::strerror(number)};
}

void* map_nothing(void* at, size_t bytes, int fixed) {
  return mmap(at, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | fixed, -1, 0);
}

}  // namespace

MemfdSpace::MemfdSpace(size_t granularity)
    : table_(granularity), granularity_(granularity), fd_(memfd_create("torch_elastic_mem", MFD_CLOEXEC)) {
  if (fd_ < 0) {
    const Refusal why = system_refusal("memfd_create");
    throw Error(Kind::kDriver, "no memory file for the host backend: " + why.reason, why.code);
  }
}

MemfdSpace::~MemfdSpace() {
  for (const auto& [base, bytes] : table_.reservations()) munmap(pointer(base), bytes);
  close(fd_);
}

Refusal MemfdSpace::reserve(size_t bytes, size_t alignment, Address* base) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (auto bad = table_.check_reserve(bytes, alignment)) return bad;
  const size_t unit = std::max(alignment, granularity_);
  size_t padded = 0;
  if (__builtin_add_overflow(bytes, unit, &padded)) {
    return {cuda::kOutOfMemory, "more than there are addresses"};
  }
  void* raw = map_nothing(nullptr, padded, 0);
  if (raw == MAP_FAILED) return system_refusal("mmap");
  const Address start = reinterpret_cast<Address>(raw);
  const Address aligned = round_up(start, unit);
  if (aligned != start) munmap(raw, aligned - start);
  munmap(pointer(aligned + bytes), start + padded - aligned - bytes);
  table_.reserve(aligned, bytes);
  *base = aligned;
  return {};
}

Refusal MemfdSpace::unreserve(Address base, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (auto bad = table_.check_unreserve(base, bytes)) return bad;
  if (munmap(pointer(base), bytes) != 0) return system_refusal("munmap");
  table_.unreserve(base);
  return {};
}

Refusal MemfdSpace::create(size_t bytes, Budget* budget, Handle* handle) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (auto bad = table_.check_create(bytes)) return bad;
  const size_t left = budget->capacity - budget->used;
  if (bytes > left) {
    return {cuda::kOutOfMemory, format_bytes(left) + " free of " + format_bytes(budget->capacity)};
  }
  const size_t offset = next_offset_;
  if (bytes > static_cast<size_t>(std::numeric_limits<off_t>::max()) - offset) {
    return {cuda::kOutOfMemory, "the memory file cannot grow by that much"};
  }
  // A signal interrupts a long fallocate, which has undone its work by then.
  while (fallocate(fd_, 0, static_cast<off_t>(offset), static_cast<off_t>(bytes)) != 0) {
    if (errno != EINTR) return system_refusal("fallocate");
  }
  Allocation made;
  made.bytes = bytes;
  made.offset = offset;
  made.budget = budget;
  *handle = table_.create(made);
  next_offset_ += bytes;
  budget->used += bytes;
  return {};
}

Refusal MemfdSpace::release(Handle handle) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (auto bad = table_.check_release(handle)) return bad;
  return give_back(table_.release(handle));
}

Refusal MemfdSpace::export_fd(Handle handle, Access access, Fd* fd) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (auto bad = table_.check_release(handle)) return bad;
  const Allocation& memory = table_.allocation(handle);
  const std::string path = "/proc/self/fd/" + std::to_string(file_of(memory));
  Fd opened(open(path.c_str(), (access == Access::kRead ? O_RDONLY : O_RDWR) | O_CLOEXEC));
  if (!opened) return system_refusal("open");
  if (lseek(opened.get(), static_cast<off_t>(memory.offset + memory.bytes / granularity_), SEEK_SET) < 0) {
    return system_refusal("lseek");
  }
  table_.set_exported(handle);
  *fd = std::move(opened);
  return {};
}

Refusal MemfdSpace::import_fd(const Fd& fd, Handle* handle) {
  const std::lock_guard<std::mutex> lock(mutex_);
  struct stat file{};
  const off_t position = lseek(fd.get(), 0, SEEK_CUR);
  const size_t place = position < 0 ? 0 : static_cast<size_t>(position);
  Allocation made;
  made.offset = round_down(place, granularity_);
  made.bytes = (place - made.offset) * granularity_;
  // Only memory files have seals to ask for.
  if (made.bytes == 0 || fcntl(fd.get(), F_GET_SEALS) < 0 || fstat(fd.get(), &file) != 0 ||
      made.offset + made.bytes > static_cast<size_t>(file.st_size)) {
    return {cuda::kInvalidValue, "the descriptor is of no exported memory"};
  }
  made.exported = true;
  made.file = fcntl(fd.get(), F_DUPFD_CLOEXEC, 0);
  if (made.file < 0) return system_refusal("fcntl");
  *handle = table_.create(made);
  return {};
}

Refusal MemfdSpace::map(Address at, size_t bytes, size_t offset, Handle handle) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (auto bad = table_.check_map(at, bytes, offset, handle)) return bad;
  table_.map(at, bytes, handle);
  const Allocation& memory = table_.allocation(handle);
  if (mmap(pointer(at), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, file_of(memory),
           static_cast<off_t>(memory.offset)) == MAP_FAILED) {
    Refusal bad = system_refusal("mmap");
    table_.unmap(at, bytes);
    return bad;
  }
  // The pages are shared, so a forked child that wrote here would scribble on the parent's memory without a
  // sign. Without the mapping it faults.
  if (madvise(pointer(at), bytes, MADV_DONTFORK) != 0) {
    Refusal bad = system_refusal("madvise");
    map_nothing(pointer(at), bytes, MAP_FIXED);
    table_.unmap(at, bytes);
    return bad;
  }
  return {};
}

Refusal MemfdSpace::allow(Address at, size_t bytes, Access access) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (auto bad = table_.check_run(at, bytes)) return bad;
  if (mprotect(pointer(at), bytes, protection(access)) != 0) {
    Refusal bad = system_refusal("mprotect");
    // The kernel may have changed a part before it gave up.
    table_.for_each_mapping(at, bytes, [](Address start, size_t size, Access before) {
      mprotect(pointer(start), size, protection(before));
    });
    return bad;
  }
  table_.set_access(at, bytes, access);
  return {};
}

Refusal MemfdSpace::unmap(Address at, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (auto bad = table_.check_run(at, bytes)) return bad;
  if (map_nothing(pointer(at), bytes, MAP_FIXED) == MAP_FAILED) return system_refusal("mmap");
  return give_back(table_.unmap(at, bytes));
}

Refusal MemfdSpace::give_back(const std::vector<Allocation>& freed) {
  Refusal failed;
  for (const Allocation& gone : freed) {
    if (gone.budget == nullptr) {
      close(gone.file);
      continue;
    }
    gone.budget->used -= gone.bytes;
    if (gone.exported) continue;
    if (fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(gone.offset),
                  static_cast<off_t>(gone.bytes)) != 0) {
      failed = system_refusal("fallocate");
    }
  }
  return failed;
}

Refusal MemfdSpace::check_access(Address at, size_t bytes, Access needed) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return table_.check_access(at, bytes, needed);
}

size_t MemfdSpace::free_bytes(const Budget& budget) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return budget.capacity - budget.used;
}

MemfdSpace::Live MemfdSpace::live() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {table_.handle_count(), table_.mapping_count(), table_.reservations().size()};
}

}  // namespace tem
