// What a tenant gives up, from cheap to dear. Trim needs no asking; the others are reclaimers.
#pragma once

namespace tem {

enum class Rung { kTrim, kEvict, kSpill, kShrink, kPause };
const char* rung_name(Rung rung);

}  // namespace tem
