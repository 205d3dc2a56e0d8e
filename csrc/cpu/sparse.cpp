// ebft_kernels::sparse_linear, ::sparse_linear_dx and ::sparse_linear_dw on the CPU.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "checks.h"
#include "cpu/isa.h"
#include "cpu/sparse.h"
#include "cpu/tables.h"

#define EBFT_KERNELS "cpu/sparse_kernel.h"
#include "cpu/every_isa.h"

namespace ebft {
namespace {

// What sparse_reference.check_walk defines. Contents are read: no number in here may move an address out of a tile or out of the values.
Walk checked_walk(const char* op, const at::Tensor& columns, const at::Tensor& offsets, int64_t width) {
  check_tensor(columns, op, "columns", at::kShort, at::kCPU);
  check_tensor(offsets, op, "offsets", at::kInt, at::kCPU);
  TORCH_CHECK_VALUE(width > 0 && columns.dim() == 1 && offsets.dim() == 1, op, " got columns ", shape_of(columns), " and offsets ",
                    shape_of(offsets), " for rows of ", width, "; expected (kept), (rows * chunks + 1) and at least 1");
  const int64_t chunks = ceil_div(width, kSparseChunk), slices = offsets.numel() - 1, kept = columns.numel();
  TORCH_CHECK_VALUE(slices >= 0 && slices % chunks == 0, op, " got ", offsets.numel(), " offsets for rows of ", width,
                    "; expected 1 and a multiple of ", chunks);
  const Walk w{static_cast<const uint16_t*>(columns.const_data_ptr()), offsets.const_data_ptr<int32_t>(), slices / chunks, chunks};
  TORCH_CHECK_VALUE(w.offsets[0] == 0 && w.offsets[slices] == kept, op, " got offsets from ", w.offsets[0], " to ", w.offsets[slices],
                    " for ", kept, " columns; expected 0 to as many");
  bool rising = true;
  for (int64_t i = 0; i < slices; ++i) rising &= w.offsets[i] <= w.offsets[i + 1];
  TORCH_CHECK_VALUE(rising, op, " got offsets that fall");
  uint16_t all = 0;
  for (int64_t i = 0; i < kept; ++i) all |= w.columns[i];
  bool inside = all < kSparseChunk;  // a power of two
  const int64_t last = width - (chunks - 1) * kSparseChunk;  // inputs of the last chunk
  if (last < kSparseChunk)
    for (int64_t row = 0; row < w.rows; ++row)
      for (int64_t i = w.offsets[(row + 1) * chunks - 1]; i < w.offsets[(row + 1) * chunks]; ++i) inside &= w.columns[i] < last;
  TORCH_CHECK_VALUE(inside, op, " got a column past the end of its chunk of ", kSparseChunk, " or of a row of ", width);
  return w;
}

// The way back, where only a derivative will need it.
void check_back(const char* op, const at::Tensor& columns, const at::Tensor& offsets) {
  check_tensor(columns, op, "columns of the way back", at::kShort, at::kCPU);
  check_tensor(offsets, op, "offsets of the way back", at::kInt, at::kCPU);
}

void check_values(const char* op, const at::Tensor& values, const at::Tensor& columns) {
  check_tensor(values, op, "values", at::kFloat, at::kCPU);
  TORCH_CHECK_VALUE(values.sizes() == columns.sizes(), op, " got values ", shape_of(values), " for columns ", shape_of(columns));
}

void check_x(const char* op, const at::Tensor& x, const char* name, int64_t width) {
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat && x.dim() > 0 && x.size(-1) == width, op, " got ", name, " ", toString(x.scalar_type()),
                    " ", shape_of(x), "; expected float32 (..., ", width, ")");
  check_memory(x, op, name, at::kCPU);
}

// The values of a walk in a chunk of its columns, as the walk back through the transposed weight meets them: column after column, in the
// order of the rows. Whether both meet the same places; if not, nothing is written outside of what the walk back has for these columns.
bool reorder_chunk(const Walk& w, const Walk& back, int64_t chunk, const float* from, float* to) {
  const int64_t first = chunk * kSparseChunk, count = std::min(back.rows - first, kSparseChunk), rows = w.rows, stride = w.chunks;
  const int32_t* offsets = w.offsets + chunk;
  const uint16_t* columns = w.columns;
  int32_t next[kSparseChunk], stop[kSparseChunk];
  for (int64_t k = 0; k < count; ++k) {
    next[k] = back.offsets[(first + k) * back.chunks];
    stop[k] = back.offsets[(first + k + 1) * back.chunks];
  }
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t end = offsets[row * stride + 1], soon = offsets[std::min(row + 8, rows - 1) * stride];
    for (int line = 0; line < 64; line += 16) __builtin_prefetch(from + soon + line);
    __builtin_prefetch(columns + soon);
    __builtin_prefetch(columns + soon + 32);
    for (int32_t i = offsets[row * stride]; i < end; ++i) {
      const uint16_t k = columns[i];
      const int32_t at = next[k];
      if (at >= stop[k]) return false;
      to[at] = from[i];
      next[k] = at + 1;
    }
  }
  return std::equal(next, next + count, stop);
}

at::Tensor in_order_of(const char* op, const Walk& w, const Walk& back, const at::Tensor& values) {
  at::Tensor ordered = at::empty(values.sizes(), values.options());
  const auto* from = values.const_data_ptr<float>();
  auto* to = ordered.mutable_data_ptr<float>();
  at::parallel_for(0, w.chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      TORCH_CHECK_VALUE(reorder_chunk(w, back, chunk, from, to), op, " got a walk and a way back that do not meet the same places");
  });
  return ordered;
}

// So many tiles are packed before they are worked on: few enough to stay in a cache, and enough for all threads.
int64_t tiles_at_once() { return std::max<int64_t>(8, at::get_num_threads()); }

// Rows (tokens, width) in tiles, of which it holds some: (tiles_at_once(), padded, kTile).
struct Tiles {
  at::Tensor rows, room;
  int64_t tokens, width, padded;

  Tiles(const at::Tensor& x, int64_t tokens, int64_t width, int64_t padded)
      : rows(x.reshape({tokens, width}).contiguous()), room(at::empty({std::min(ceil_div(tokens, kTile), tiles_at_once()), padded, kTile}, x.options())),
        tokens(tokens), width(width), padded(padded) {}

  void pack(int64_t first, int64_t count) {
    const auto* from = rows.const_data_ptr<float>() + first * kTile * width;
    auto* to = room.mutable_data_ptr<float>();
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        EBFT_CALL(pack_tile, from + t * kTile * width, here(first + t), width, padded, to + t * padded * kTile);
    });
  }
  const float* tile(int64_t t) const { return room.const_data_ptr<float>() + t * padded * kTile; }
  int64_t here(int64_t t) const { return std::min(tokens - t * kTile, kTile); }  // tokens of a tile
};

at::Tensor product(const Walk& w, const at::Tensor& x, const at::Tensor& values, int64_t width) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = w.rows;
  at::Tensor y = at::empty(sizes, x.options());
  if (y.numel() == 0) return y;
  const int64_t tokens = x.numel() / width, tiles = ceil_div(tokens, kTile), blocks = ceil_div(w.rows, kSparseRows);
  Tiles packed(x, tokens, width, w.padded());
  const auto* from = values.const_data_ptr<float>();
  auto* to = y.mutable_data_ptr<float>();
  for (int64_t first = 0; first < tiles; first += tiles_at_once()) {
    const int64_t count = std::min(tiles - first, tiles_at_once());
    packed.pack(first, count);
    at::parallel_for(0, blocks * count, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> room(static_cast<size_t>(2 * kSparseRows * kTile));
      for (int64_t task = begin; task < end; ++task) {  // the weights of a block stay in the second cache for all tiles
        const int64_t row = task / count * kSparseRows, t = task % count;
        EBFT_CALL(sparse_rows, w, from, packed.tile(t), row, std::min(row + kSparseRows, w.rows), room.data(),
                  to + (first + t) * kTile * w.rows, packed.here(first + t));
      }
    });
  }
  return y;
}

at::Tensor sparse_linear(const at::Tensor& x, const at::Tensor& values, const at::Tensor& columns, const at::Tensor& offsets,
                         const at::Tensor& back_columns, const at::Tensor& back_offsets, const std::optional<at::Tensor>& bias,
                         int64_t width) {
  const char* op = "sparse_linear";
  const Walk w = checked_walk(op, columns, offsets, width);
  check_back(op, back_columns, back_offsets);
  check_values(op, values, columns);
  check_x(op, x, "x", width);
  if (bias) {
    check_tensor(*bias, op, "bias", at::kFloat, at::kCPU);
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == w.rows, op, " got bias ", shape_of(*bias), "; expected (", w.rows, ")");
  }
  at::Tensor y = product(w, x, values, width);
  if (bias) y.add_(*bias);
  return y;
}

at::Tensor sparse_linear_dx(const at::Tensor& dy, const at::Tensor& values, const at::Tensor& columns, const at::Tensor& offsets,
                            const at::Tensor& back_columns, const at::Tensor& back_offsets, int64_t width) {
  const char* op = "sparse_linear_dx";
  const Walk w = checked_walk(op, columns, offsets, width), back = checked_walk(op, back_columns, back_offsets, w.rows);
  check_values(op, values, columns);
  check_x(op, dy, "dy", w.rows);
  TORCH_CHECK_VALUE(back.rows == width && back_columns.sizes() == columns.sizes(), op, " got a way back through ", back.rows, " rows and ",
                    back_columns.numel(), " places; expected ", width, " and ", columns.numel());
  return product(back, dy, in_order_of(op, w, back, values), w.rows);
}

at::Tensor sparse_linear_dw(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& columns, const at::Tensor& offsets,
                            const at::Tensor& back_columns, const at::Tensor& back_offsets) {
  const char* op = "sparse_linear_dw";
  TORCH_CHECK_VALUE(x.dim() > 0 && x.dim() == dy.dim() && x.sizes().slice(0, x.dim() - 1) == dy.sizes().slice(0, x.dim() - 1), op,
                    " got dy ", shape_of(dy), " and x ", shape_of(x), "; expected (..., N) and (..., K)");
  const int64_t width = x.size(-1);
  const Walk w = checked_walk(op, columns, offsets, width);
  check_back(op, back_columns, back_offsets);
  check_x(op, x, "x", width);
  check_x(op, dy, "dy", w.rows);
  at::Tensor gradient = at::zeros(columns.sizes(), x.options());
  const int64_t tokens = x.numel() / width, tiles = ceil_div(tokens, kTile);
  if (tokens == 0 || w.rows == 0) return gradient;
  const int64_t threads = at::get_num_threads(), turns = ceil_div(w.rows, kSparseRows * threads);
  const int64_t rows = ceil_div(w.rows, turns * threads), blocks = ceil_div(w.rows, rows);  // as many for each thread
  Tiles x_packed(x, tokens, width, w.padded()), dy_packed(dy, tokens, w.rows, w.rows);
  auto* to = gradient.mutable_data_ptr<float>();
  for (int64_t first = 0; first < tiles; first += tiles_at_once()) {
    const int64_t count = std::min(tiles - first, tiles_at_once());
    x_packed.pack(first, count);
    dy_packed.pack(first, count);
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {  // each gradient is one thread's, tile after tile
      for (int64_t block = begin; block < end; ++block)
        for (int64_t t = 0; t < count; ++t)
          EBFT_CALL(sparse_dw_rows, w, dy_packed.tile(t), x_packed.tile(t), block * rows, std::min((block + 1) * rows, w.rows), to);
    });
  }
  return gradient;
}

}  // namespace

TORCH_LIBRARY_IMPL(ebft_kernels, CPU, m) {
  m.impl("sparse_linear.native", sparse_linear);
  m.impl("sparse_linear_dx.native", sparse_linear_dx);
  m.impl("sparse_linear_dw.native", sparse_linear_dw);
}

}  // namespace ebft
