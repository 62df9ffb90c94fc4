// What the suite needs beside a backend: a way to look at its memory and to keep its streams busy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "backend/backend.hpp"

class Rung {
 public:
  virtual ~Rung() = default;
  virtual std::shared_ptr<tem::Backend> open() = 0;
  virtual void write(tem::Address at, const void* from, size_t bytes) = 0;
  virtual void read(void* to, tem::Address at, size_t bytes) = 0;

  virtual tem::Stream stream() = 0;
  /// Leaves work on the stream that stays pending until complete().
  virtual void submit(tem::Stream stream) = 0;
  virtual void complete(tem::Stream stream) = 0;
  virtual void destroy(tem::Stream stream) = 0;
  /// Waits until the default stream, or this one, has run what it can.
  virtual void settle() {}
  virtual void settle_stream(tem::Stream) {}

  void put(tem::Address at, uint32_t value) { write(at, &value, sizeof value); }
  uint32_t get(tem::Address at) {
    uint32_t value = 0;
    read(&value, at, sizeof value);
    return value;
  }

  bool strict = true;     // refuses also where the driver crashes or shrugs
  bool touchable = true;  // the CPU can touch its addresses
};
