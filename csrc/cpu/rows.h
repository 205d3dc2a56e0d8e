// Rows of a mask and where their kept entries begin.
#pragma once

#include "checks.h"
#include "cpu/isa.h"

namespace ebft {

// A row's bits and its offsets say the same: without that, memory would be overrun.
inline void check_row(const char* op, const int64_t* row_offsets, int64_t row, const uint32_t* words, int64_t count) {
  const int64_t kept = count_bits(words, count);
  TORCH_CHECK_VALUE(row_offsets[row + 1] - row_offsets[row] == kept, op, " got row offsets that give row ", row, " ",
                    row_offsets[row + 1] - row_offsets[row], " values; its mask keeps ", kept);
}

}  // namespace ebft
