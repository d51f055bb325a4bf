// A warp's 16 rows x 128 columns of an accumulator, as bf16 pairs.
#pragma once
#include "bf16.cuh"
#include "ptx.cuh"

// A thread's bf16 pairs of one half: words 2 i and 2 i + 1 are columns 8 i + 2 (lane % 4) + {0, 1} of its two rows.
typedef u32 Pairs[32];

// Largest magnitude of row r (0 | 1) among this thread's pairs.
DEVICE u32 amax_of_row(const Pairs& w, int r) {
    u32 m = w[r];
#pragma unroll
    for (int i = 1; i < 16; ++i) m = max_magnitude_bf16x2(m, w[2 * i + r]);
    return fold_max_16x2(abs_bits_16x2(m));
}

// Maxima over the four lanes that share a row, two at once.
DEVICE u32 reduce_quad_max(u32 pair) {
    pair = max_u16x2(pair, __shfl_xor_sync(kFullWarp, pair, 1));
    return max_u16x2(pair, __shfl_xor_sync(kFullWarp, pair, 2));
}
