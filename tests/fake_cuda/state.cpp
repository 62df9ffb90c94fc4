// What the entry points share: the one state, the gate, and the lookups.
#include <cstdlib>

#include "fake.hpp"

namespace fake {

State& state() {
  static State* const all = new State;  // never destroyed
  return *all;
}

size_t environment(const char* name, size_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr || *text == '\0' ? otherwise : std::strtoull(text, nullptr, 10);
}

Call::Call(const char* name, Counted counted) : lock_(state().mutex) {
  State& all = state();
  ++all.counts[name];
  if (all.shut_down) {
    verdict_ = kDeinitialized;
  } else if (!all.initialized) {
    verdict_ = kNotInitialized;
  } else if (all.sticky != kSuccess) {
    verdict_ = all.sticky;
  } else if (counted == Counted::kYes && ++all.calls == all.fail_at) {
    all.fail_at = 0;
    verdict_ = all.fail_with;
  }
}

FakeDevice* find_device(int ordinal) {
  auto& devices = state().devices;
  const bool there = ordinal >= 0 && static_cast<size_t>(ordinal) < devices.size();
  return there ? &devices[static_cast<size_t>(ordinal)] : nullptr;
}

// A primary context is its device: the fake has no other kind.
Context context_of(FakeDevice& device) { return reinterpret_cast<Context>(&device); }

FakeDevice* device_in(Context context) {
  for (FakeDevice& device : state().devices) {
    if (context_of(device) == context) return device.primary_references > 0 ? &device : nullptr;
  }
  return nullptr;
}

std::vector<Context>& context_stack() {
  thread_local std::vector<Context> stack;
  return stack;
}

FakeDevice* current_device() {
  const auto& stack = context_stack();
  return stack.empty() ? nullptr : device_in(stack.back());
}

bool is_default(StreamPtr stream) { return number_of(stream) <= 2; }

StreamState* find_stream(StreamPtr stream) {
  return is_default(stream) ? nullptr : state().streams.find(number_of(stream));
}

}  // namespace fake
