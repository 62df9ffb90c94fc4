// Streams, events, and as much of stream capture as forbids things.
#include <algorithm>

#include "fake.hpp"

using namespace fake;  // NOLINT

namespace {

thread_local int capture_mode = kCaptureModeGlobal;

StreamPtr stream_pointer(uint64_t number) { return reinterpret_cast<StreamPtr>(number); }

bool pending(const StreamState& stream) {
  return stream.order->completed.load() < stream.order->submitted.load();
}

void spoil(State& all) {
  for (const uint64_t number : all.capturing) {
    StreamState& stream = *all.streams.find(number);
    if (stream.capture_mode == kCaptureModeGlobal) stream.capture = kCaptureStatusInvalidated;
  }
}

}  // namespace

Result fake::forbid_in_capture(State& all) {
  if (capture_mode == kCaptureModeRelaxed) return kSuccess;
  const bool global = std::any_of(all.capturing.begin(), all.capturing.end(), [&](uint64_t number) {
    return all.streams.find(number)->capture_mode == kCaptureModeGlobal;
  });
  if (!global) return kSuccess;
  spoil(all);
  return kCaptureUnsupported;
}

FAKE_EXPORT Result cuStreamCreate(StreamPtr* stream, unsigned flags) {
  FAKE_ENTER(cuStreamCreate, kNo);
  const FakeDevice* current = current_device();
  if (stream == nullptr || flags > 1) return kInvalidValue;
  if (current == nullptr) return kInvalidContext;
  StreamState made;
  made.device = current->ordinal;
  *stream = stream_pointer(call->streams.add(std::move(made)));
  return kSuccess;
}

FAKE_EXPORT Result cuStreamDestroy_v2(StreamPtr stream) {
  FAKE_ENTER(cuStreamDestroy, kNo);
  StreamState* found = find_stream(stream);
  if (found == nullptr) return kInvalidHandle;
  // What was submitted still runs after its stream is gone.
  run_pending(*call, *found);
  call->streams.remove(number_of(stream));
  return kSuccess;
}

FAKE_EXPORT Result cuStreamQuery(StreamPtr stream) {
  FAKE_ENTER(cuStreamQuery, kNo);
  if (is_default(stream)) return current_device() == nullptr ? kInvalidContext : forbid_in_capture(*call);
  const StreamState* found = find_stream(stream);
  if (found == nullptr) return kInvalidHandle;
  if (const Result bad = forbid_in_capture(*call); bad != kSuccess) return bad;
  return pending(*found) ? kNotReady : kSuccess;
}

FAKE_EXPORT Result cuStreamSynchronize(StreamPtr stream) {
  FAKE_ENTER(cuStreamSynchronize, kNo);
  if (is_default(stream)) return current_device() == nullptr ? kInvalidContext : forbid_in_capture(*call);
  StreamState* found = find_stream(stream);
  if (found == nullptr) return kInvalidHandle;
  if (const Result bad = forbid_in_capture(*call); bad != kSuccess) return bad;
  run_pending(*call, *found);
  return call->sticky;
}

FAKE_EXPORT Result cuThreadExchangeStreamCaptureMode(int* mode) {
  FAKE_ENTER(cuThreadExchangeStreamCaptureMode, kNo);
  if (mode == nullptr || *mode < 0 || *mode > kCaptureModeRelaxed) return kInvalidValue;
  std::swap(*mode, capture_mode);
  return kSuccess;
}

FAKE_EXPORT Result cuStreamIsCapturing(StreamPtr stream, int* status) {
  FAKE_ENTER(cuStreamIsCapturing, kNo);
  if (status == nullptr) return kInvalidValue;
  if (is_default(stream)) {
    if (current_device() == nullptr) return kInvalidContext;
    *status = kCaptureNone;
    return kSuccess;
  }
  const StreamState* found = find_stream(stream);
  if (found == nullptr) return kInvalidHandle;
  *status = found->capture;
  return kSuccess;
}

FAKE_EXPORT Result cuStreamBeginCapture_v2(StreamPtr stream, int mode) {
  FAKE_ENTER(cuStreamBeginCapture, kNo);
  StreamState* found = find_stream(stream);
  if (mode < 0 || mode > kCaptureModeRelaxed) return kInvalidValue;
  if (found == nullptr) return is_default(stream) ? kCaptureUnsupported : kInvalidHandle;
  if (found->capture != kCaptureNone) return kInvalidValue;
  call->capturing.push_back(number_of(stream));
  found->capture = kCaptureActive;
  found->capture_mode = mode;
  return kSuccess;
}

// The graph itself is nothing: the fake runs no kernels.
FAKE_EXPORT Result cuStreamEndCapture(StreamPtr stream, void** graph) {
  FAKE_ENTER(cuStreamEndCapture, kNo);
  StreamState* found = find_stream(stream);
  if (graph == nullptr || found == nullptr || found->capture == kCaptureNone) return kInvalidValue;
  auto& capturing = call->capturing;
  capturing.erase(std::find(capturing.begin(), capturing.end(), number_of(stream)));
  *graph = nullptr;
  return std::exchange(found->capture, kCaptureNone) == kCaptureActive ? kSuccess : kCaptureInvalidated;
}

FAKE_EXPORT Result cuEventCreate(Event* event, unsigned flags) {
  FAKE_ENTER(cuEventCreate, kYes);
  if (event == nullptr || flags > 7) return kInvalidValue;
  if (current_device() == nullptr) return kInvalidContext;
  *event = reinterpret_cast<Event>(call->events.add(EventState{}));
  return kSuccess;
}

FAKE_EXPORT Result cuEventDestroy_v2(Event event) {
  FAKE_ENTER(cuEventDestroy, kYes);
  if (call->events.find(number_of(event)) == nullptr) return kInvalidHandle;
  call->events.remove(number_of(event));
  return kSuccess;
}

FAKE_EXPORT Result cuEventRecord(Event event, StreamPtr stream) {
  FAKE_ENTER(cuEventRecord, kYes);
  EventState* found = call->events.find(number_of(event));
  if (found == nullptr) return kInvalidHandle;
  if (is_default(stream)) {
    if (current_device() == nullptr) return kInvalidContext;
    *found = EventState{};
    return kSuccess;
  }
  const StreamState* queue = find_stream(stream);
  if (queue == nullptr) return kInvalidHandle;
  *found = EventState{};
  found->mark.add(queue->order);
  if (queue->capture != kCaptureNone) found->captured_by = number_of(stream);
  return kSuccess;
}

FAKE_EXPORT Result cuCtxRecordEvent(Context context, Event event) {
  FAKE_ENTER(cuCtxRecordEvent, kYes);
  EventState* found = call->events.find(number_of(event));
  if (context == nullptr || found == nullptr) return kInvalidHandle;
  if (!call->capturing.empty()) return kCaptureUnsupported;
  *found = EventState{};
  call->streams.for_each([&](uint64_t, StreamState& stream) { found->mark.add(stream.order); });
  return kSuccess;
}

FAKE_EXPORT Result cuEventQuery(Event event) {
  FAKE_ENTER(cuEventQuery, kYes);
  const EventState* found = call->events.find(number_of(event));
  if (found == nullptr) return kInvalidHandle;
  StreamState* captured = call->streams.find(found->captured_by);
  if (captured != nullptr && captured->capture != kCaptureNone) {
    captured->capture = kCaptureStatusInvalidated;
    return kCapturedEvent;
  }
  if (const Result bad = forbid_in_capture(*call); bad != kSuccess) return bad;
  return found->mark.passed() ? kSuccess : kNotReady;
}

FAKE_EXPORT Result cuEventSynchronize(Event event) {
  FAKE_ENTER(cuEventSynchronize, kYes);
  const EventState* found = call->events.find(number_of(event));
  if (found == nullptr) return kInvalidHandle;
  if (const Result bad = forbid_in_capture(*call); bad != kSuccess) return bad;
  for (const auto& position : tem::HandMark(found->mark).positions) {
    call->streams.for_each([&](uint64_t, StreamState& stream) {
      if (stream.order == position.first) run_pending(*call, stream);
    });
  }
  return call->sticky;
}
