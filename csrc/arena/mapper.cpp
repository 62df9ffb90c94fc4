#include "arena/mapper.hpp"

#include <thread>
#include <utility>

#include "arena/fence.hpp"
#include "core/clock.hpp"
#include "core/error.hpp"

namespace tem {
namespace {

constexpr double kDrain = 5.0;  // seconds

/// Calls `visit(address, bytes)` for every run of neighbouring places in `[0, n)` that `wanted(i)` holds for.
template <class Wanted, class Visit>
void for_each_run(const std::vector<Place>& places, Wanted wanted, Visit visit) {
  size_t i = 0;
  while (i < places.size()) {
    if (!wanted(i)) {
      ++i;
      continue;
    }
    const Address at = places[i].at();
    size_t bytes = 0;
    while (i < places.size() && wanted(i) && places[i].at() == at + bytes) bytes += places[i++].piece.bytes;
    visit(at, bytes);
  }
}

}  // namespace

Extent Mapper::create(size_t bytes) {
  const size_t room = budget_ > bytes ? budget_ - bytes : 0;
  if (device_.created > room) {
    const size_t excess = device_.created - room;
    spare_.shrink_to(spare_.bytes() > excess ? spare_.bytes() - excess : 0);
  }
  try {
    return Extent(device_, bytes);
  } catch (const Error& error) {
    if (error.kind() != Kind::kOutOfMemory || spare_.bytes() == 0) throw;
  }
  // Others took memory outside the arena: what is spare here is all there is.
  spare_.shrink_to(0);
  return Extent(device_, bytes);
}

Mapper::Taken Mapper::take(size_t bytes) {
  if (auto spare = spare_.take(bytes)) return {std::move(*spare), true};
  return {create(bytes), false};
}

void Mapper::put_back(std::vector<Taken>& taken) noexcept {
  for (Taken& one : taken) {
    // What another process has passed on may not be what it said, and would be refused again.
    const bool proven = one.extent.writer != kSomebody;
    if (one.was_spare && one.extent && proven) spare_.put(std::move(one.extent));
  }
}

void Mapper::zero_foreign(const std::vector<Place>& places, const std::vector<Mapping>& made, WriterId writer,
                          Stream stream) {
  const auto foreign = [&](size_t i) { return made[i].writer() != kNobody && made[i].writer() != writer; };
  for_each_run(places, foreign, [&](Address at, size_t bytes) { device_.backend->zero(at, bytes, stream); });
}

/// Waits until what was queued on the stream has run. Only a refused memset comes here, after others were
/// queued: their memory must not go while the device may still write to it.
bool Mapper::drain(Stream stream) noexcept {
  try {
    Mark mark(device_, stream);
    const Deadline deadline = deadline_in(kDrain);
    while (!mark.passed() && Clock::now() < deadline)
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    return mark.passed();
  } catch (const Error&) {
    return false;
  }
}

void Mapper::map(const std::vector<Place>& places, WriterId writer, Stream stream) {
  std::vector<Taken> taken;
  std::vector<Mapping> made;
  bool zeroing = false;
  taken.reserve(places.size());
  made.reserve(places.size());
  try {
    for (const Place& place : places) taken.push_back(take(place.piece.bytes));
    for (size_t i = 0; i < places.size(); ++i)
      made.emplace_back(device_, places[i].at(), std::move(taken[i].extent));
    for_each_run(
        places, [](size_t) { return true; },
        [&](Address at, size_t bytes) { device_.backend->allow(at, bytes); });
    zeroing = true;
    zero_foreign(places, made, writer, stream);
    for (size_t i = 0; i < places.size(); ++i) {
      made[i].set_writer(writer);
      places[i].range->mappings_.emplace(places[i].piece.offset, std::move(made[i]));
    }
  } catch (...) {
    if (zeroing && !drain(stream)) {
      for (Mapping& mapping : made) mapping.abandon();
      throw;
    }
    for (size_t i = 0; i < made.size(); ++i) {
      try {
        taken[i].extent = made[i].unmap();
      } catch (const Error&) {
        // Still mapped: its destructor tries once more and counts it as lost if that fails too.
      }
    }
    put_back(taken);
    throw;
  }
}

void Mapper::unmap(const std::vector<Place>& places) {
  std::vector<Extent> out;
  out.reserve(places.size());
  try {
    for (const Place& place : places) out.push_back(place.range->mappings_.at(place.piece.offset).unmap());
  } catch (const Error&) {
    for (size_t i = 0; i < out.size(); ++i) {
      places[i].range->mappings_.at(places[i].piece.offset).remap(std::move(out[i]));
      device_.backend->allow(places[i].at(), places[i].piece.bytes);
    }
    throw;
  }
  for (size_t i = 0; i < places.size(); ++i) {
    places[i].range->mappings_.erase(places[i].piece.offset);
    if (!out[i].exported) spare_.put(std::move(out[i]));
  }
}

void Mapper::pass_spare(size_t keep, Passing& passing) {
  while (passing.extents.size() < passing.most && spare_.bytes() > keep) {
    auto extent = spare_.take_largest(spare_.bytes() - keep);
    if (!extent) return;
    passing.extents.push_back(extent->pass());
  }
}

bool Mapper::make_ready(Range& range, size_t extents) {
  for (auto next = range.mappings_.rbegin(); next != range.mappings_.rend() && extents != 0;
       ++next, --extents) {
    if (next->second.unready()) return next->second.make_ready();
  }
  return false;
}

void Mapper::receive(std::vector<Passed> passed) noexcept {
  for (Passed& one : passed) {
    try {
      spare_.put(Extent(device_, std::move(one)));
    } catch (const Error&) {
      // The lease has come all the same: the device has the memory as soon as the descriptor is closed.
    }
  }
}

void Mapper::allow(const Range& range) {
  Address at = 0;
  size_t bytes = 0;
  const auto open = [&] {
    if (bytes != 0) device_.backend->allow(at, bytes);
  };
  for (const auto& [offset, mapping] : range.mappings_) {
    if (mapping.at() != at + bytes) {
      open();
      at = mapping.at();
      bytes = 0;
    }
    bytes += mapping.bytes();
  }
  open();
}

}  // namespace tem
