// SwiGLU and its casts as the epilogue of h = x w13^T = [g | u]: h itself is never stored.
//
//   act = e4m3(bf16(p * silu(g) * u) / act_scale), p the routing weight of the row's slot; h = e4m3([g | u] / h_scale)
//
// The bits are those of the GEMM with OUTPUT_BF16 followed by swiglu.cuh: h is rounded to bf16 before anything else.
// The first half of the accumulators is g and the second u, so both of a position are in one thread, in registers of
// the same index, and a row of a scale's 128 columns is in four lanes. Built for POW2 = 0 | 1.
//
// Each warp works alone on its 16 rows. An accumulator gives a thread two neighbouring columns of eight, a matrix of
// stmatrix wants four neighbouring bytes: a word is made of the pairs of two runs of eight columns, so that the bytes of
// a 16-byte chunk come out of shared memory in an order that four byte permutations put right.
#pragma once
#include "activation.cuh"
#include "pairs.cuh"
#include "scheduler.cuh"

constexpr bool kPow2 = POW2;
constexpr int STAGING_BYTES = 2 * PANEL_BYTES;  // a consumer warp's; a panel's row is 128 columns of E4M3
static_assert(GROUPING == M_GROUPED && BLOCK_M == 128 && BLOCK_N == 256, "halves of 128 columns: gate and up");

struct Destination {
    u8* act;           // [rows, n / 2]
    float* act_scale;  // scale of row r, columns 128 b ..: [b * scale_stride + r]
    u8* h;             // [rows, n]
    float* h_scale;
    const float* topk_weights;
    const int* slot_of_row;  // negative: padding, zeros are written for it
    int scale_stride;
};

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

// The warp's 16 rows of both halves. row: its first one within the tile; staging: its own memory.
template <int HALVES, int REGISTERS>
DEVICE void store(const float (&sum)[HALVES][REGISTERS], char* staging, const TensorMap*, const Destination& d,
                  const Problem& p, const Tile& t, int row, int) {
    static_assert(HALVES == 2 && REGISTERS == 64, "the gate and up");
    const int rows = t.rows - row;  // of the warp's 16, those before the group ends
    if (rows <= 0) return;
    const int lane = threadIdx.x % 32, half_n = p.n / 2;
    const i64 first_row = t.d_row + row;
    const int slot = lane % 16 < rows ? __ldg(d.slot_of_row + first_row + lane % 16) : kPad;

    Pairs g, u;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        g[i] = pack_bf16(sum[0][2 * i], sum[0][2 * i + 1]);
        u[i] = pack_bf16(sum[1][2 * i], sum[1][2 * i + 1]);
    }
    u32 maxima[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) maxima[r] = reduce_quad_max(amax_of_row(g, r) | amax_of_row(u, r) << 16);

    // The h of a padding row is garbage, and garbage times 0 may be NaN.
    const float weight = slot < 0 ? 0.0f : __ldg(d.topk_weights + slot);
    const u32 padding = __ballot_sync(kFullWarp, slot < 0);
    if (padding) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            if (padding >> (lane / 4 + 8 * r) & 1) {
                maxima[r] = 0;
#pragma unroll
                for (int i = r; i < 32; i += 2) g[i] = u[i] = 0;
            }
        }
    }

    BlockScale gate[2], up[2], act[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        gate[r] = block_scale<kPow2>(maxima[r] << 16);
        up[r] = block_scale<kPow2>(maxima[r] & 0xFFFF0000u);
    }
    // Casts and exponentials use different units: the compiler may mix them. The routing weight, whose load began above,
    // comes in afterwards.
    const u32 panels = smem_address(staging);
    float a[64];
#pragma unroll
    for (int c = 0; c < 8; c += 2) {
        write_chunks(panels, g, c, gate);
        write_chunks(panels + PANEL_BYTES, u, c, up);
#pragma unroll
        for (int i = 4 * c; i < 4 * c + 8; ++i) {
            a[2 * i] = swiglu(bf16_low(g[i]), bf16_low(u[i]));
            a[2 * i + 1] = swiglu(bf16_high(g[i]), bf16_high(u[i]));
        }
    }
    __syncwarp();
    u8* h = d.h + first_row * p.n + t.column;
    copy_panel(staging, h, p.n, rows);
    copy_panel(staging + PANEL_BYTES, h + half_n, p.n, rows);

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float weight_of_row = __shfl_sync(kFullWarp, weight, lane / 4 + 8 * r);
#pragma unroll
        for (int i = r; i < 32; i += 2) g[i] = pack_bf16(weight_of_row * a[2 * i], weight_of_row * a[2 * i + 1]);
    }
    const u32 act_maxima = reduce_quad_max(amax_of_row(g, 0) | amax_of_row(g, 1) << 16);
    act[0] = block_scale<kPow2>(act_maxima << 16);
    act[1] = block_scale<kPow2>(act_maxima & 0xFFFF0000u);
    __syncwarp();
#pragma unroll
    for (int c = 0; c < 8; c += 2) write_chunks(panels, g, c, act);
    __syncwarp();
    copy_panel(staging, d.act + first_row * half_n + t.column, half_n, rows);
    __syncwarp();  // the next tile writes here

    // Of the four lanes of a row, the first three write one scale each.
    const int which = lane % 4, block = t.column / 128 + (which == 1 ? half_n / 128 : 0);
    float* scale = (which == 2 ? d.act_scale : d.h_scale) + (i64)block * d.scale_stride + first_row;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float own = which == 0 ? gate[r].scale : which == 1 ? up[r].scale : act[r].scale;
        if (which < 3 && lane / 4 + 8 * r < rows) scale[lane / 4 + 8 * r] = own;
    }
}
