// Values behind numbers that are never used twice: a stale number is seen, not mistaken for its successor.
// Thread-safety: none; the owner brings the lock.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace tem {

template <class T>
class SlotTable {
 public:
  /// Returns a number that is not zero.
  uint64_t add(T value) {
    if (free_.empty()) {
      // Room for every slot, so that remove() cannot fail.
      if (free_.capacity() <= slots_.size()) free_.reserve(2 * slots_.size() + 8);
      slots_.emplace_back();
      free_.push_back(static_cast<uint32_t>(slots_.size() - 1));
    }
    const uint32_t index = free_.back();
    Slot& slot = slots_[index];
    slot.value = std::move(value);
    free_.pop_back();
    slot.used = true;
    return uint64_t{slot.generation} << 32 | index;
  }

  T* find(uint64_t number) {
    const size_t index = number & 0xffffffffU;
    if (index >= slots_.size()) return nullptr;
    Slot& slot = slots_[index];
    return slot.used && slot.generation == number >> 32 ? &slot.value : nullptr;
  }

  /// `number` must be one that find() knows.
  T remove(uint64_t number) {
    const auto index = static_cast<uint32_t>(number & 0xffffffffU);
    Slot& slot = slots_[index];
    slot.used = false;
    ++slot.generation;
    free_.push_back(index);
    return std::exchange(slot.value, T{});
  }

  /// Calls fn(number, value) for each value.
  template <class Fn>
  void for_each(Fn fn) {
    for (size_t i = 0; i < slots_.size(); ++i) {
      if (slots_[i].used) fn(uint64_t{slots_[i].generation} << 32 | i, slots_[i].value);
    }
  }

  size_t size() const { return slots_.size() - free_.size(); }

 private:
  struct Slot {
    T value{};
    uint32_t generation = 1;
    bool used = false;
  };
  std::vector<Slot> slots_;
  std::vector<uint32_t> free_;
};

}  // namespace tem
