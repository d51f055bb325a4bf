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

// Whether the scales of rows `row` on may be copied 16 bytes at a time.
DEVICE bool wide_scales(const float* scale, int stride, int rows, int row) {
    return reinterpret_cast<u64>(scale) % 16 == 0 && (stride | rows | row) % 4 == 0;
}

// COUNT scales by one warp, zeros from `valid` on.
template <int COUNT>
DEVICE void copy_scales(u32 dst, const float* src, int valid, bool wide) {
    const int lane = threadIdx.x % 32;
    if (wide) {
#pragma unroll 1  // the producers have few registers
        for (int i = lane * 4; i < COUNT; i += 128) cp_async_16(dst + i * 4, src + i, i < valid);
    } else {
#pragma unroll 2
        for (int i = lane; i < COUNT; i += 32) cp_async_4(dst + i * 4, src + i, i < valid);
    }
}

// Columns of an accumulator that are sure to share one scale of B. A tile of 192 columns may start in the middle of a
// 128-block.
constexpr int SCALE_RUN = BLOCK_N % 128 != 0 && BLOCK_N > 128 ? 64 : 128;

// The row scales of one accumulator, loaded while the tensor cores work; those of B's columns, two for each pair of
// columns that a thread holds, would not fit beside them and are read as the promotion needs them.
template <int COLUMNS>
struct Scales {
    static constexpr int RUNS = SCALE_B_BLOCK && COLUMNS > SCALE_RUN ? COLUMNS / SCALE_RUN : 1;
    float row_0[RUNS], row_1[RUNS];

    // row: this thread's first row in the tile; column: the accumulator's first; offset: the tile's within its block.
    DEVICE void load(const float* scale_a, const float* scale_b, int row, int column, int offset) {
#pragma unroll
        for (int run = 0; run < RUNS; ++run) {
            const float block = SCALE_B_BLOCK ? scale_b[(offset + column + run * SCALE_RUN) / 128] : 1.0f;
            row_0[run] = scale_a[row] * block;
            row_1[run] = scale_a[row + 8] * block;
        }
    }
};

template <int REGISTERS>
DEVICE void promote(float (&sum)[REGISTERS], const float (&part)[REGISTERS], const Scales<REGISTERS * 2>& scales,
                    const float* scale_b, int column) {
#pragma unroll
    for (int i = 0; i < REGISTERS; i += 4) {
        if (SCALE_B_BLOCK) {
            const float s0 = scales.row_0[i * 2 / SCALE_RUN], s1 = scales.row_1[i * 2 / SCALE_RUN];
            sum[i] += s0 * part[i];
            sum[i + 1] += s0 * part[i + 1];
            sum[i + 2] += s1 * part[i + 2];
            sum[i + 3] += s1 * part[i + 3];
        } else {
            // Columns 2 i + 2 (lane % 4) + {0, 1} of the accumulator.
            const float2 b = reinterpret_cast<const float2*>(scale_b + column)[i + threadIdx.x % 4];
            sum[i] += scales.row_0[0] * b.x * part[i];
            sum[i + 1] += scales.row_0[0] * b.y * part[i + 1];
            sum[i + 2] += scales.row_1[0] * b.x * part[i + 2];
            sum[i + 3] += scales.row_1[0] * b.y * part[i + 3];
        }
    }
}
