// A weight of which only kept places are stored, as a product for many tokens walks it.
#pragma once

#include <cstdint>

namespace ebft {

inline constexpr int64_t kSparseChunk = 128;  // inputs, sparse_reference.SPARSE_CHUNK: a chunk of a tile has the size of a first-level cache
inline constexpr int64_t kTile = 64;          // tokens that are worked on at a time
inline constexpr int64_t kSparseRows = 256;   // rows that all tiles walk before the next ones

struct Walk {
  const uint16_t* columns;  // of every kept place: its input, counted from the beginning of its chunk
  const int32_t* offsets;   // (rows * chunks + 1): where the places of a row in a chunk begin
  int64_t rows, chunks;

  int64_t padded() const { return chunks * kSparseChunk; }
};

}  // namespace ebft
