// Rows of kept entries on the CPU: do offsets and bits say the same? Without that, memory would be overrun.
#pragma once

#include "checks.h"
#include "cpu/isa.h"

namespace ebft {

// Offsets rise from 0 to `total`, by no more than a row's width: nothing that follows them leaves the entries, whatever the bits say.
inline void check_offsets(const char* op, const KeptRows& kept, int64_t total) {
  const int64_t* offsets = kept.offsets;
  TORCH_CHECK_VALUE(offsets[0] == 0 && offsets[kept.rows] == total, op, " got row offsets from ", offsets[0], " to ",
                    offsets[kept.rows], " for ", total, " values; expected 0 to as many");
  uint64_t longest = 0;  // unsigned, so that a step back is a long one
  for (int64_t row = 0; row < kept.rows; ++row) {
    const uint64_t count = uint64_t(offsets[row + 1]) - uint64_t(offsets[row]);
    longest = count > longest ? count : longest;
  }
  TORCH_CHECK_VALUE(longest <= uint64_t(kept.width), op, " got row offsets that give a row fewer than 0 or more than its ", kept.width,
                    " values");
}

// A row keeps as many as its offsets say, and no bit past its end.
inline void check_row(const char* op, const KeptRows& kept, int64_t row) {
  const int64_t count = count_bits(kept.row(row), kept.stride), given = kept.offsets[row + 1] - kept.offsets[row];
  TORCH_CHECK_VALUE(!(kept.row(row)[kept.stride - 1] & padding_of(kept.width)), op, " got a mask with bits set past the end of row ",
                    row, " of ", kept.width);
  TORCH_CHECK_VALUE(count == given, op, " got row offsets that give row ", row, " ", given, " values; its mask keeps ", count);
}

}  // namespace ebft
