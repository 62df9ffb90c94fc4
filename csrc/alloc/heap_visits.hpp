// The walks over a heap that several of its files need. The heap's lock must be held.
#pragma once

#include "alloc/heap.hpp"

namespace tem {

template <class Visit>
void Heap::for_each_lane(Visit visit) {
  const auto all = [&](Pool& pool) {
    for (const auto& lane : pool.lanes) visit(*lane);
  };
  all(shared_);
  for (const auto& [id, pool] : pools_) all(*pool);
  for (const auto& pool : released_) all(*pool);
}

/// Visits spans with memory, lowest first.
template <class Visit>
void Heap::for_each_span(Visit visit) {
  for (const bool small : {true, false}) {
    for (Span* span = spans_.at(spans_.region_begin(small)); span != nullptr; span = spans_.after(span)) {
      if (span->state != SpanState::kAbsent) visit(span);
    }
  }
}

}  // namespace tem
