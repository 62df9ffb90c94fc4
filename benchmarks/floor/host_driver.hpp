// The kernel calls that memory of this machine costs when it is moved under addresses: memfd, fallocate,
// MAP_FIXED. A handle is an offset in the memory file.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>

namespace tem_floor {

class HostDriver {
 public:
  explicit HostDriver(int) : file_(memfd_create("tem_floor", MFD_CLOEXEC)) {
    if (file_ < 0) fail("memfd_create");
  }
  ~HostDriver() { close(file_); }

  HostDriver(const HostDriver&) = delete;
  HostDriver& operator=(const HostDriver&) = delete;

  uintptr_t reserve(size_t bytes) {
    void* base = mmap(nullptr, bytes, PROT_NONE, kNothing, -1, 0);
    if (base == MAP_FAILED) fail("mmap");
    return reinterpret_cast<uintptr_t>(base);
  }
  void unreserve(uintptr_t base, size_t bytes) {
    if (munmap(pointer(base), bytes) != 0) fail("munmap");
  }

  uint64_t create(size_t bytes) {
    const auto offset = static_cast<off_t>(next_);
    if (fallocate(file_, 0, offset, static_cast<off_t>(bytes)) != 0) fail("fallocate");
    next_ += bytes;
    return static_cast<uint64_t>(offset);
  }
  void release(uint64_t handle, size_t bytes) {
    const int hole = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
    if (fallocate(file_, hole, static_cast<off_t>(handle), static_cast<off_t>(bytes)) != 0) fail("fallocate");
  }
  void map(uintptr_t at, size_t bytes, uint64_t handle) {
    const auto offset = static_cast<off_t>(handle);
    if (mmap(pointer(at), bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, file_, offset) == MAP_FAILED)
      fail("mmap");
  }
  void allow(uintptr_t at, size_t bytes) {
    if (mprotect(pointer(at), bytes, PROT_READ | PROT_WRITE) != 0) fail("mprotect");
  }
  void unmap(uintptr_t at, size_t bytes) {
    if (mmap(pointer(at), bytes, PROT_NONE, kNothing | MAP_FIXED, -1, 0) == MAP_FAILED) fail("mmap");
  }

 private:
  static constexpr int kNothing = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;

  static void* pointer(uintptr_t at) { return reinterpret_cast<void*>(at); }
  [[noreturn]] static void fail(const char* call) {
    throw std::runtime_error(std::string(call) + ": " + std::strerror(errno));
  }

  int file_;
  size_t next_ = 0;
};

}  // namespace tem_floor
