// Rows gathered from token order into expert order, with their per_token scales.
//
// Built for STRIP_BYTES = 1024 | 256 and WITH_SCALE = 0 | 1. A CTA moves 32 KB: 32 rows x 1 KB or
// 128 rows x 256 bytes, all loads issued before the first store. The grid walks all rows of one column
// strip before the next: the strip of every token then stays in L2 while the K rows of a token read
// it, so DRAM delivers each token once. The strip is the wider one while it fits.
#include "tile.cuh"

static constexpr int kThreads = 256;
static constexpr int kStrip = STRIP_BYTES;
static constexpr int kLanes = kStrip / 16;             // lanes that share a row
static constexpr int kRowsPerPass = kThreads / kLanes;
static constexpr int kPasses = 8;
static constexpr int kRows = kRowsPerPass * kPasses;
static constexpr bool kWithScale = WITH_SCALE;
static_assert(128 % kRows == 0, "a CTA's rows lie in one 128-row block, which is used or not");
static_assert(kRows * (kStrip / 128) == kThreads, "one scale per thread");

// out[r] = source[slot_of_row[r] / topk], rows of row_bytes (a multiple of 16) bytes; zero in padding.
// With scales (rows are then E4M3): scale_out[b * out_ld + r] = scale[b * scale_ld + token].
extern "C" __global__ void __launch_bounds__(kThreads)
    permute_rows(const u8* __restrict__ source, u8* __restrict__ out,
                 const int* __restrict__ slot_of_row, int row_bytes, u32 multiplier, int shift,
                 const float* __restrict__ scale, int scale_ld, float* __restrict__ scale_out,
                 int out_ld) {
  int row0 = blockIdx.x * kRows;
  int strip = blockIdx.y * kStrip;
  // Rows of this thread: row0 + first + kRowsPerPass * i.
  int first = threadIdx.x / kLanes;
  int column = strip + (threadIdx.x % kLanes) * 16;
  bool inside = column < row_bytes;

  int slot[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) slot[i] = __ldg(slot_of_row + row0 + first + kRowsPerPass * i);
  if (slot[0] == kUnused) return;

  uint4 v[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    i64 token = divide(slot[i], multiplier, shift);
    v[i] = load_stream_16_if(source + token * row_bytes + column, inside && slot[i] >= 0);
  }
  if (kWithScale) {
    // Neighbouring threads take neighbouring rows: the stores are whole 128-byte lines.
    int row = row0 + threadIdx.x % kRows;
    int block = strip / 128 + threadIdx.x / kRows;
    if (block * 128 < row_bytes) {
      int s = __ldg(slot_of_row + row);
      float value = kPadScale;
      if (s >= 0) value = __ldg(scale + (i64)block * scale_ld + divide(s, multiplier, shift));
      store_stream(scale_out + (i64)block * out_ld + row, value);
    }
  }
  if (inside) {
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      i64 row = row0 + first + kRowsPerPass * i;
      store_stream(out + row * row_bytes + column, v[i]);
    }
  }
}
