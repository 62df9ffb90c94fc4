// The bare cost of moving physical memory under addresses: loops of driver calls, timed around nothing else.
//
// A Driver is a class with reserve, unreserve, create, release, map, allow and unmap, each one call to the
// system that throws std::runtime_error when it is refused. Calls that may cover many mappings at once do:
// the floor is the best the driver can do for extents of one size, not a straw man.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace tem_floor {

class Floor {
 public:
  virtual ~Floor() = default;
  virtual int64_t take() = 0;
  virtual int64_t give() = 0;
  virtual int64_t hold() = 0;
  virtual int64_t take_pooled() = 0;
  virtual int64_t give_pooled() = 0;
  virtual int64_t handover() = 0;
};

template <class Driver>
class FloorOn final : public Floor {
 public:
  FloorOn(int ordinal, size_t size, size_t extent) : driver_(ordinal), size_(size), extent_(extent) {
    // Multiples, so that every call covers whole mappings.
    if (extent == 0 || size == 0 || size % extent != 0)
      throw std::runtime_error("size must be a multiple of extent");
    handles_.reserve(size / extent);
    here_ = driver_.reserve(size);
    there_ = driver_.reserve(size);
  }

  ~FloorOn() override {
    // What fails now has failed before, and was reported then.
    try {
      if (mapped_) driver_.unmap(here_, size_);
      release_all();
      driver_.unreserve(here_, size_);
      driver_.unreserve(there_, size_);
    } catch (const std::runtime_error&) {
    }
  }

  FloorOn(const FloorOn&) = delete;
  FloorOn& operator=(const FloorOn&) = delete;

  int64_t take() override {
    expect(handles_.empty(), "take: memory is held already");
    return timed([this] {
      for (size_t at = 0; at < size_; at += extent_) {
        handles_.push_back(driver_.create(extent_));
        driver_.map(here_ + at, extent_, handles_.back());
      }
      driver_.allow(here_, size_);
      mapped_ = true;
    });
  }

  int64_t give() override {
    expect(mapped_, "give: nothing is mapped");
    return timed([this] {
      unmap_all();
      release_all();
    });
  }

  int64_t hold() override {
    expect(handles_.empty(), "hold: memory is held already");
    return timed([this] {
      for (size_t at = 0; at < size_; at += extent_) handles_.push_back(driver_.create(extent_));
    });
  }

  int64_t take_pooled() override {
    expect(!handles_.empty() && !mapped_, "take_pooled: no extents are held unmapped");
    return timed([this] { map_all(); });
  }

  int64_t give_pooled() override {
    expect(mapped_, "give_pooled: nothing is mapped");
    return timed([this] { unmap_all(); });
  }

  int64_t handover() override {
    expect(mapped_, "handover: nothing is mapped");
    return timed([this] {
      unmap_all();
      std::swap(here_, there_);
      map_all();
    });
  }

 private:
  static void expect(bool holds, const char* message) {
    if (!holds) throw std::runtime_error(message);
  }

  template <class Work>
  static int64_t timed(Work work) {
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
  }

  void map_all() {
    uintptr_t at = here_;
    for (const auto handle : handles_) {
      driver_.map(at, extent_, handle);
      at += extent_;
    }
    driver_.allow(here_, size_);
    mapped_ = true;
  }

  void unmap_all() {
    driver_.unmap(here_, size_);
    mapped_ = false;
  }

  void release_all() {
    for (const auto handle : handles_) driver_.release(handle, extent_);
    handles_.clear();
  }

  Driver driver_;
  size_t size_;
  size_t extent_;
  uintptr_t here_ = 0;
  uintptr_t there_ = 0;
  bool mapped_ = false;
  std::vector<uint64_t> handles_;
};

}  // namespace tem_floor
