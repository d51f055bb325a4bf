// Two-level accumulation: Hopper's FP8 tensor cores keep about 14 bits of the sum, so the partial sum of every 128 of K
// is scaled and added to FP32 registers here. The scales come with the granularity of the operands:
//
//   SCALE_B_BLOCK = 1   A 1x128, B 128x128   partial * (scale_a[row] * scale_b)               1 FFMA an element
//   SCALE_B_BLOCK = 0   A 1x128, B 1x128     partial * (scale_a[row] * scale_b[column])       1 FMUL + 1 FFMA
//
// A wgmma accumulator of 64 x N gives a thread (lane l of warp w) rows 16 w + l / 4 and + 8, and of each 8 columns the
// pair 2 (l % 4): registers 4 i + {0, 1} hold the first row, 4 i + {2, 3} the second (PTX ISA 9.7.15.5.1).
#pragma once
#include "ptx.cuh"

// Scales of one stage in shared memory: BLOCK_M of A, then those of B.
constexpr int NUM_B_SCALES = SCALE_B_BLOCK ? (BLOCK_N + 127) / 128 : BLOCK_N;
constexpr int SCALE_STAGE = BLOCK_M + (NUM_B_SCALES + 3) / 4 * 4;  // floats

// row: this thread's first row in the tile; column: the first column of `part` in the tile.
template <int REGISTERS>
DEVICE void promote(float (&sum)[REGISTERS], const float (&part)[REGISTERS], float scale_0, float scale_1,
                    const float* scale_b, int column) {
    if (SCALE_B_BLOCK) {
#pragma unroll
        for (int i = 0; i < REGISTERS; i += 4) {
            sum[i] += scale_0 * part[i];
            sum[i + 1] += scale_0 * part[i + 1];
            sum[i + 2] += scale_1 * part[i + 2];
            sum[i + 3] += scale_1 * part[i + 3];
        }
    } else {
        const float2* pairs = reinterpret_cast<const float2*>(scale_b + column) + threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < REGISTERS; i += 4) {
            const float2 b = pairs[i];  // columns 8 (i / 4) + 2 (lane % 4): a float2 every 4 registers is 8 columns on
            sum[i] += scale_0 * b.x * part[i];
            sum[i + 1] += scale_0 * b.y * part[i + 1];
            sum[i + 2] += scale_1 * b.x * part[i + 2];
            sum[i + 3] += scale_1 * b.y * part[i + 3];
        }
    }
}
