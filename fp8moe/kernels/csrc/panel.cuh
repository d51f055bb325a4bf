// A warp's 16 rows x 128 columns of an accumulator, as bf16 pairs: row maxima, and the cast to rows of E4M3.
//
// An accumulator gives a thread two neighbouring columns of eight, a matrix of stmatrix wants four neighbouring bytes: a
// word is made of the pairs of two runs of eight columns, so that the bytes of a 16-byte chunk come out of shared memory
// in an order that four byte permutations put right.
#pragma once
#include "bf16.cuh"
#include "scheduler.cuh"

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

// Casts chunks c and c + 1 of the warp's 16 rows into a panel, bytes in the order described above.
DEVICE void write_chunks(u32 panel, const Pairs& w, int c, const BlockScale (&scale)[2]) {
    u32 q[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const u32 left = w[4 * (c + j / 2) + j % 2], right = w[4 * (c + j / 2) + 2 + j % 2];
        const float inv = scale[j % 2].inv;
        q[j] = pack_e4m3x4(bf16_low(left) * inv, bf16_high(left) * inv, bf16_low(right) * inv, bf16_high(right) * inv);
    }
    const int lane = threadIdx.x % 32;
    store_matrix_x4(panel + swizzle(lane % 16, c + lane / 16), q[0], q[1], q[2], q[3]);
}

// 16 bytes where `valid`. No branch, so that the arithmetic around it can be scheduled across.
DEVICE void store_16_if(void* address, uint4 v, bool valid) {
    asm volatile(
        "{\n.reg .pred valid;\nsetp.ne.s32 valid, %5, 0;\n"
        "@valid st.global.v4.u32 [%0], {%1, %2, %3, %4};\n}" ::"l"(address),
        "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"((int)valid)
        : "memory");
}

// A panel to 16 rows of global memory, `pitch` bytes apart, of which the first `rows` exist.
DEVICE void copy_panel(const char* panel, u8* out, int pitch, int rows) {
    const int first = threadIdx.x % 32 / 8, chunk = threadIdx.x % 8;
#pragma unroll
    for (int r = first; r < first + 16; r += 4) {
        const uint4 v = *reinterpret_cast<const uint4*>(panel + swizzle(r, chunk));
        // Word i: columns 2 i, 2 i + 1, 8 + 2 i and 9 + 2 i of the chunk.
        const uint4 ordered = make_uint4(__byte_perm(v.x, v.y, 0x5410), __byte_perm(v.z, v.w, 0x5410),
                                         __byte_perm(v.x, v.y, 0x7632), __byte_perm(v.z, v.w, 0x7632));
        store_16_if(out + (i64)r * pitch + chunk * 16, ordered, r < rows);
    }
}
