// How a test drives the fake: pending work, calls that fail, and what is alive.
#include "fake.hpp"

using namespace fake;  // NOLINT

/// Leaves work on a stream that stays pending until it is completed. Returns 400 for no such stream.
FAKE_EXPORT Result fake_cuda_stream_submit(StreamPtr stream) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  StreamState* found = find_stream(stream);
  if (found == nullptr) return kInvalidHandle;
  found->order->submit();
  return kSuccess;
}

/// Runs all that is pending on a stream.
FAKE_EXPORT Result fake_cuda_stream_complete(StreamPtr stream) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  StreamState* found = find_stream(stream);
  if (found == nullptr) return kInvalidHandle;
  run_pending(state(), *found);
  return kSuccess;
}

/// Makes the n-th counted call from now answer `code` and do nothing; 0 disarms. Counted are calls of memory
/// management, memsets and events.
FAKE_EXPORT void fake_cuda_fail_nth(size_t n, Result code) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  state().calls = 0;
  state().fail_at = n;
  state().fail_with = code;
}

/// Counted calls since fake_cuda_fail_nth.
FAKE_EXPORT size_t fake_cuda_calls() {
  const std::lock_guard<std::mutex> lock(state().mutex);
  return state().calls;
}

FAKE_EXPORT void fake_cuda_reset_counts() {
  const std::lock_guard<std::mutex> lock(state().mutex);
  state().counts.clear();
}

/// How often an entry point was called, by its plain name ("cuMemGetInfo").
FAKE_EXPORT size_t fake_cuda_count(const char* name) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  const auto found = state().counts.find(name);
  return found == state().counts.end() ? 0 : found->second;
}

/// What exists now. Any pointer may be null.
FAKE_EXPORT void fake_cuda_live(size_t* handles, size_t* mappings, size_t* reservations, size_t* events) {
  const std::lock_guard<std::mutex> lock(state().mutex);
  const auto live = state().space.live();
  if (handles != nullptr) *handles = live.handles;
  if (mappings != nullptr) *mappings = live.mappings;
  if (reservations != nullptr) *reservations = live.reservations;
  if (events != nullptr) *events = state().events.size();
}

/// From now on every call answers CUDA_ERROR_DEINITIALIZED, as at the exit of a process. For good.
FAKE_EXPORT void fake_cuda_shutdown() {
  const std::lock_guard<std::mutex> lock(state().mutex);
  state().shut_down = true;
}
