// The way back from expert order to token order.
//
// gather_sum is built for ROWS = 1, 2, 4, 8, the rows of a token whose loads are issued together.
#include "tile.cuh"

static constexpr int kRows = ROWS;
static constexpr int kChunks = ROWS == 1 ? 4 : 8 / ROWS;   // 16-byte columns of a lane
static constexpr int kWarps = 4;

// out[t] = sum_k rows[row_of_slot[t, k]], FP32 from +0 in the order of k, rounded once.
// A warp sums one token over 32 * kChunks chunks of 16 bytes. The occupancy asked for lets the
// assembler use 64 registers: left alone it saves them by having two loads in flight instead of eight.
extern "C" __global__ void __launch_bounds__(kWarps * 32, 8)
    gather_sum(const u16* __restrict__ rows, const int* __restrict__ row_of_slot, int tokens,
               int topk, int columns, u16* __restrict__ out) {
  i64 token = (i64)blockIdx.x * kWarps + threadIdx.x / 32;
  if (token >= tokens) return;
  int first = blockIdx.y * (256 * kChunks) + (threadIdx.x & 31) * 8;
  const int* map = row_of_slot + token * topk;

  float sum[kChunks][8];
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[c][i] = 0.0f;

  // The host picks ROWS >= topk where there is one: only the widest kernel needs several rounds, and
  // only it has to keep sums across them.
  int rounds_end = kRows < 8 ? 1 : topk;
  for (int k0 = 0; k0 < rounds_end; k0 += kRows) {
    int row[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) row[k] = k0 + k < topk ? __ldg(map + k0 + k) : -1;
    uint4 v[kRows][kChunks];
#pragma unroll
    for (int k = 0; k < kRows; ++k)
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        int column = first + 256 * c;
        v[k][c] = load_stream_16_if(rows + (i64)row[k] * columns + column,
                                    row[k] >= 0 && column < columns);
      }
    // Adding the +0 of a missing row changes nothing: a sum that began at +0 is never -0.
#pragma unroll
    for (int k = 0; k < kRows; ++k)
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        u32 word[4] = {v[k][c].x, v[k][c].y, v[k][c].z, v[k][c].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sum[c][2 * i] += bf16_low(word[i]);
          sum[c][2 * i + 1] += bf16_high(word[i]);
        }
      }
  }
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    int column = first + 256 * c;
    if (column < columns) {
      uint4 packed = make_uint4(pack_bf16(sum[c][0], sum[c][1]), pack_bf16(sum[c][2], sum[c][3]),
                                pack_bf16(sum[c][4], sum[c][5]), pack_bf16(sum[c][6], sum[c][7]));
      *reinterpret_cast<uint4*>(out + token * columns + column) = packed;
    }
  }
}

// out[slot] = sum_p partials[p][row_of_slot[slot]], FP32 from +0 in the order of p; 0 for a dropped
// slot. The partials were written just before and are small: they come from L2.
extern "C" __global__ void __launch_bounds__(256)
    gather_slots(const float* __restrict__ partials, const int* __restrict__ row_of_slot,
                 int num_slots, int count, int capacity, float* __restrict__ out) {
  i64 slot = (i64)blockIdx.x * 256 + threadIdx.x;
  if (slot >= num_slots) return;
  int row = __ldg(row_of_slot + slot);
  float sum = 0.0f;
  if (row >= 0) {
#pragma unroll 8
    for (int p = 0; p < count; ++p) sum += __ldg(partials + (i64)p * capacity + row);
  }
  out[slot] = sum;
}
