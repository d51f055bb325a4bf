// Two-level accumulation: Hopper's FP8 tensor cores keep about 14 bits of the sum, so the partial sum of every 128 of K
// is scaled and added to FP32 registers here:
//
//   sum += partial * (scale_a[row] * scale_b)      A has 1x128 scales, B 128x128 ones: one FFMA an element
//
// A wgmma accumulator of 64 x N gives a thread (lane l of warp w) rows 16 w + l / 4 and + 8, and of each 8 columns the
// pair 2 (l % 4): registers 4 i + {0, 1} hold the first row, 4 i + {2, 3} the second (PTX ISA 9.7.15.5.1).
#pragma once
#include "scheduler.cuh"

// Scales of one stage in shared memory: BLOCK_M of A, then those of B.
constexpr int NUM_B_SCALES = (BLOCK_N + 127) / 128;
constexpr int SCALE_STAGE = BLOCK_M + (NUM_B_SCALES + 3) / 4 * 4;  // floats

// The scales of A's rows first .. first + BLOCK_M - 1 by one warp, zeros from row `rows` on; 16 bytes at a time where
// everything is aligned, else 4: groups may start at any row.
DEVICE void copy_scales(u32 dst, const float* scale, int stride, int first, int rows) {
    const int lane = threadIdx.x % 32;
    if (reinterpret_cast<u64>(scale) % 16 == 0 && (stride | first | rows) % 4 == 0) {
#pragma unroll 1  // the producers have few registers
        for (int i = lane * 4; i < BLOCK_M; i += 128) cp_async_16(dst + i * 4, scale + first + i, first + i < rows);
    } else {
#pragma unroll 2
        for (int i = lane; i < BLOCK_M; i += 32) cp_async_4(dst + i * 4, scale + first + i, first + i < rows);
    }
}

// Columns of an accumulator that are sure to share one scale of B. A tile of 192 columns may start in the middle of a
// 128-block.
constexpr int SCALE_RUN = BLOCK_N % 128 != 0 && BLOCK_N > 128 ? 64 : 128;

// Which of a warp's 16 rows are a thread's two: the accumulator's order, unless A's rows were loaded in another one.
constexpr int SECOND_ROW = OUTPUT == OUTPUT_SWIGLU_BACKWARD ? 1 : 8;
DEVICE int first_row_of(int lane) { return lane / 4 * (SECOND_ROW == 1 ? 2 : 1); }

// The products of the scales of one accumulator, made while the tensor cores work.
template <int COLUMNS>
struct Scales {
    static constexpr int RUNS = COLUMNS > SCALE_RUN ? COLUMNS / SCALE_RUN : 1;
    float row_0[RUNS], row_1[RUNS];

    // row: this thread's first row in the tile; column: the accumulator's first; offset: the tile's within its block.
    DEVICE void load(const float* scale_a, const float* scale_b, int row, int column, int offset) {
#pragma unroll
        for (int run = 0; run < RUNS; ++run) {
            const float block = scale_b[(offset + column + run * SCALE_RUN) / 128];
            row_0[run] = scale_a[row] * block;
            row_1[run] = scale_a[row + SECOND_ROW] * block;
        }
    }
};

template <int REGISTERS>
DEVICE void promote(float (&sum)[REGISTERS], const float (&part)[REGISTERS], const Scales<REGISTERS * 2>& scales) {
#pragma unroll
    for (int i = 0; i < REGISTERS; i += 4) {
        const float s0 = scales.row_0[i * 2 / SCALE_RUN], s1 = scales.row_1[i * 2 / SCALE_RUN];
        sum[i] += s0 * part[i];
        sum[i + 1] += s0 * part[i + 1];
        sum[i + 2] += s1 * part[i + 2];
        sum[i + 3] += s1 * part[i + 3];
    }
}
