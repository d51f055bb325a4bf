// The backward pass of SwiGLU and every cast of its results as the epilogue of da = dy w2: da itself is never stored.
//
// The bits are those of the GEMM with OUTPUT_BF16 followed by swiglu_backward.cuh on h in E4M3: da is rounded to bf16
// before anything else. Each half of the accumulators, over both warpgroups, is one 128 x 128 block of da, which belongs to
// one group: groups end at multiples of 128. Built for POW2 = 0 | 1.
//
// A warp has 16 rows of the block, a thread pairs of columns of two of them. h of the warp's rows comes to shared memory
// while the tensor cores are busy. By rows each warp works alone, see panel.cuh. By columns all eight work together: they
// leave their maxima in shared memory, a thread finds the scale of one column, and the casts are transposed in two buffers
// of 128 columns x 128 rows in turn, one being written while the other is copied out.
#pragma once
#include "activation.cuh"
#include "panel.cuh"
#include "scheduler.cuh"

constexpr bool kPow2 = POW2;
static_assert(GROUPING == M_GROUPED && BLOCK_M == 128 && BLOCK_N == 256, "two blocks of 128 x 128");

struct Destination {
    const u8* h;           // [rows, 2 n]
    const float* h_scale;  // scale of row r, columns 128 b ..: [b * h_scale_stride + r]
    const float* topk_weights;
    const int* slot_of_row;  // negative: padding, zeros are written for it
    u8* dh;                  // [rows, 2 n]
    float* dh_scale;
    u8* dh_t;           // [2 n, rows]
    float* dh_t_scale;  // scale of column c, rows 128 b ..: [b * dh_t_scale_stride + c]
    u8* aw_t;           // [n, rows]
    float* aw_t_scale;  // [n / 128, rows / 128]
    float* dprob;       // [n / 128, rows]
    int h_scale_stride, dh_scale_stride, dh_t_scale_stride;
};

// What a warp keeps of its 16 rows. A padding row has zeros but for its slot.
struct Rows {
    char panels[2][PANEL_BYTES];  // gate and up of h, then dg and du
    float weight[16];
    float scale[2][16];  // of gate and up
    int slot[16];
};

constexpr int WARPS = 8;
constexpr int COLUMN_THREADS = WARPS * 32;  // one for each column of dg and du
constexpr int TRANSPOSED_BYTES = 128 * 128;

struct Staging {
    Rows rows[WARPS];
    char transposed[2][TRANSPOSED_BYTES];
    u32 column_max[WARPS][2][64];  // of a warp's rows: dg, du; pairs of bf16 patterns
    float inverse[2][128];         // of the columns' scales
    u32 aw_max[WARPS];
};
constexpr int STAGING_BYTES = sizeof(Staging) / WARPS;
static_assert(sizeof(Staging) % 16 == 0 && sizeof(Rows) % 16 == 0, "read and written in 16-byte pieces");

DEVICE void consumer_barrier() { named_barrier<COLUMN_THREADS>(1); }

// Bad group_ends, which fill_group_table reports, could ask for blocks that lie across groups.
DEVICE bool is_block(const Tile& t) { return t.d_row % 128 == 0 && t.rows >= 128; }

// One half's h and its scales, in the background. padding: a bit for each of the warp's rows.
DEVICE void load_h(Rows& rows, const Destination& d, const Problem& p, int column, i64 first_row, u32 padding) {
    const int lane = threadIdx.x % 32;
    const u8* h = d.h + first_row * (2 * p.n) + column + lane % 8 * 16;
#pragma unroll
    for (int r = lane / 8; r < 16; r += 4) {
        const bool valid = !(padding >> r & 1);
#pragma unroll
        for (int m = 0; m < 2; ++m)
            cp_async_16(smem_address(rows.panels[m] + swizzle(r, lane % 8)), h + (i64)r * (2 * p.n) + m * p.n, valid);
    }
    const int r = lane % 16, m = lane / 16;
    const float* scale = d.h_scale + (i64)(column + m * p.n) / 128 * d.h_scale_stride + first_row + r;
    cp_async_4(smem_address(&rows.scale[m][r]), scale, !(padding >> r & 1));
    copy_async_commit();
}

// What the first half needs, asked for while the tensor cores work on the tile. row: the warp's first within the tile.
DEVICE void prefetch(char* memory, const Destination& d, const Problem& p, const Tile& t, int row) {
    if (!is_block(t)) return;
    Rows& rows = reinterpret_cast<Staging*>(memory)->rows[row / 16];
    const int lane = threadIdx.x % 32;
    const i64 first_row = t.d_row + row;
    const int slot = __ldg(d.slot_of_row + first_row + lane % 16);
    const u32 padding = __ballot_sync(kFullWarp, slot < 0);
    if (lane < 16) {
        rows.slot[lane] = slot;
        cp_async_4(smem_address(&rows.weight[lane]), d.topk_weights + slot, slot >= 0);
    }
    load_h(rows, d, p, t.column, first_row, padding);
}

// Largest magnitudes over lanes STEP apart of COUNT pairs: each lane gives away half of them, the rest replaces the first
// half.
template <int STEP, int COUNT>
DEVICE void halve_max(u32 (&v)[16]) {
    const bool upper = threadIdx.x & STEP;
#pragma unroll
    for (int j = 0; j < COUNT / 2; ++j) {
        const u32 keep = upper ? v[j + COUNT / 2] : v[j], give = upper ? v[j] : v[j + COUNT / 2];
        v[j] = max_magnitude_bf16x2(keep, __shfl_xor_sync(kFullWarp, give, STEP));
    }
}

// The largest magnitudes of the warp's 16 rows by columns, pair c / 2 at out[c / 2].
DEVICE void write_column_max(const Pairs& w, u32* out) {
    u32 m[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) m[i] = max_magnitude_bf16x2(w[2 * i], w[2 * i + 1]);
    halve_max<16, 16>(m);
    halve_max<8, 8>(m);
    halve_max<4, 4>(m);
    // Left are the runs of eight columns 2 (lane / 4) + {0, 1}.
    const int lane = threadIdx.x % 32;
    out[lane / 4 * 8 + lane % 4] = abs_bits_16x2(m[0]);
    out[lane / 4 * 8 + lane % 4 + 4] = abs_bits_16x2(m[1]);
}

// Keeps the compiler from unpacking a word once for all of its casts: it would hold two floats in place of a word.
DEVICE void forget(u32& word) { asm volatile("" : "+r"(word)); }

// Casts the warp's 16 rows into its chunks of a transposed buffer: 16 bytes of each of 128 columns. A 16-bit value of
// stmatrix is one column of the thread's two rows, so that rows 0, 8, 1, 9 .. 7, 15 follow each other in a chunk.
// inv(i): the inverse scales of columns 8 i + 2 (lane % 4) + {0, 1}.
template <class Inverse>
DEVICE void write_transposed(char* buffer, const Pairs& w, int warp, Inverse inv) {
    const int lane = threadIdx.x % 32;
    const u32 to = smem_address(buffer) + swizzle(lane, warp);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        u32 q[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int i = 4 * k + j;
            const float2 s = inv(i);
            u32 top = w[2 * i], bottom = w[2 * i + 1];
            forget(top);
            forget(bottom);
            q[j] = pack_e4m3x4(bf16_low(top) * s.x, bf16_low(bottom) * s.x, bf16_high(top) * s.y, bf16_high(bottom) * s.y);
        }
        store_matrix_x4_transposed(to + k * 32 * 128, q[0], q[1], q[2], q[3]);
    }
}

// A transposed buffer to 128 rows of global memory, `pitch` bytes apart; thread: among the consumers.
DEVICE void copy_transposed(const char* buffer, u8* out, i64 pitch, int thread) {
    const int chunk = thread % 8;
#pragma unroll
    for (int c = thread / 8; c < 128; c += COLUMN_THREADS / 8) {
        const uint4 v = *reinterpret_cast<const uint4*>(buffer + swizzle(c, chunk));
        const uint4 ordered = make_uint4(__byte_perm(v.x, v.y, 0x6420), __byte_perm(v.z, v.w, 0x6420),
                                         __byte_perm(v.x, v.y, 0x7531), __byte_perm(v.z, v.w, 0x7531));
        store_stream(out + c * pitch + chunk * 16, ordered);
    }
}

// One half of the warp's 16 rows: da to dg, du and aw, and the row sums of da * a, which are returned for both rows.
DEVICE void backward(const Pairs& da, const Rows& rows, Pairs& dg, Pairs& du, Pairs& aw, float (&dprob)[2]) {
    const int lane = threadIdx.x % 32;
    const int start = swizzle(lane / 4, 0) + lane % 4 * 2;  // chunk c is at start ^ c << 4
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int local = lane / 4 + 8 * r;
        const float weight = rows.weight[local], gate = rows.scale[0][local], up = rows.scale[1][local];
        const auto pair = [&](int i) {
            const char* at = rows.panels[0] + (start ^ i / 2 << 4) + i % 2 * 8 + r * 8 * 128;
            const int w = 2 * i + r;
            float sum;
            backward_pair(pair_of_e4m3(*reinterpret_cast<const u16*>(at), gate),
                          pair_of_e4m3(*reinterpret_cast<const u16*>(at + PANEL_BYTES), up), da[w], weight,
                          dg[w], du[w], aw[w], sum);
            return sum;
        };
        // In the order of reduce_row_sum in swiglu_backward.cuh: run i of eight columns is its lane i.
        float sum[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float left = pair(i);
            sum[i] = left + pair(i + 8);
        }
#pragma unroll
        for (int step = 4; step > 0; step /= 2) {
#pragma unroll
            for (int i = 0; i < step; ++i) sum[i] += sum[i + step];
        }
        dprob[r] = sum[0] + __shfl_xor_sync(kFullWarp, sum[0], 1);
        dprob[r] += __shfl_xor_sync(kFullWarp, dprob[r], 2);
    }
}

// Both halves of the tile, by all consumer warps. row: the warp's first one within the tile.
template <int HALVES, int REGISTERS>
DEVICE void store(const float (&sum)[HALVES][REGISTERS], char* memory, const Destination& d, const Problem& p,
                  const Tile& t, int row) {
    static_assert(HALVES == 2 && REGISTERS == 64, "128 columns a half");
    if (!is_block(t)) return;
    Staging& s = *reinterpret_cast<Staging*>(memory);
    const int lane = threadIdx.x % 32, warp = row / 16, thread = warp * 32 + lane;
    Rows& rows = s.rows[warp];
    const i64 first_row = t.d_row + row, capacity = p.m;
    const int row_block = (int)(t.d_row / 128);

    Pairs da, next;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        da[i] = pack_bf16(sum[0][2 * i], sum[0][2 * i + 1]);
        next[i] = pack_bf16(sum[1][2 * i], sum[1][2 * i + 1]);
    }
#pragma unroll 1  // nothing of the second half may be computed, and kept in registers, during the first
    for (int half = 0; half < 2; ++half) {
        const int column = t.column + half * 128, block = column / 128;
        if (column >= p.n) break;
        copy_async_wait<0>();
        __syncwarp();
        // The da of a padding row is garbage, and garbage times 0 may be NaN.
        const u32 padding = __ballot_sync(kFullWarp, rows.slot[lane % 16] < 0);
        if (padding) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                if (padding >> (lane / 4 + 8 * r) & 1) {
#pragma unroll
                    for (int i = r; i < 32; i += 2) da[i] = 0;
                }
            }
        }
        Pairs dg, du, aw;
        float dprob[2];
        backward(da, rows, dg, du, aw, dprob);

        BlockScale gate[2], up[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const u32 maxima = reduce_quad_max(amax_of_row(dg, r) | amax_of_row(du, r) << 16);
            gate[r] = block_scale<kPow2>(maxima << 16);
            up[r] = block_scale<kPow2>(maxima & 0xFFFF0000u);
        }
        __syncwarp();  // every lane has read its g and u
#pragma unroll
        for (int c = 0; c < 8; c += 2) {
            write_chunks(smem_address(rows.panels[0]), dg, c, gate);
            write_chunks(smem_address(rows.panels[1]), du, c, up);
        }
        __syncwarp();
        u8* dh = d.dh + first_row * (2 * p.n) + column;
        copy_panel(rows.panels[0], dh, 2 * p.n, 16);
        copy_panel(rows.panels[1], dh + p.n, 2 * p.n, 16);
        __syncwarp();  // the panels have been copied
        if (half == 0 && column + 128 < p.n) load_h(rows, d, p, column + 128, first_row, padding);

        // Of the four lanes of a row, the first three write one value each.
        const int which = lane % 4;
        float* of_row = which == 2 ? d.dprob + block * capacity
                                   : d.dh_scale + (i64)(block + (which == 1 ? p.n / 128 : 0)) * d.dh_scale_stride;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float own = which == 0 ? gate[r].scale : which == 1 ? up[r].scale : dprob[r];
            if (which < 3) of_row[first_row + lane / 4 + 8 * r] = own;
        }

        write_column_max(dg, s.column_max[warp][0]);
        write_column_max(du, s.column_max[warp][1]);
        u32 aw_max = __reduce_max_sync(kFullWarp, max_u32(amax_of_row(aw, 0), amax_of_row(aw, 1)));
        if (lane == 0) s.aw_max[warp] = aw_max;
        consumer_barrier();  // the maxima are there; the buffers have been copied out

        aw_max = __reduce_max_sync(kFullWarp, s.aw_max[lane % WARPS]);
        const BlockScale aw_scale = block_scale<kPow2>(aw_max << 16);
        write_transposed(s.transposed[0], aw, warp, [&](int) { return make_float2(aw_scale.inv, aw_scale.inv); });
        {
            const int matrix = thread / 128, c = thread % 128;
            u32 m = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) m = max_u32(m, reinterpret_cast<const u16*>(s.column_max[w][matrix])[c]);
            const BlockScale scale = block_scale<kPow2>(m << 16);
            s.inverse[matrix][c] = scale.inv;
            d.dh_t_scale[(i64)row_block * d.dh_t_scale_stride + column + matrix * p.n + c] = scale.scale;
        }
        if (thread == 0) d.aw_t_scale[block * (capacity / 128) + row_block] = aw_scale.scale;
        const auto inverse = [&](int m) {
            return [&s, m, lane](int i) {
                return *reinterpret_cast<const float2*>(&s.inverse[m][8 * i + lane % 4 * 2]);
            };
        };
        const i64 at = column * capacity + t.d_row;
        consumer_barrier();
        copy_transposed(s.transposed[0], d.aw_t + at, capacity, thread);
        write_transposed(s.transposed[1], dg, warp, inverse(0));
        consumer_barrier();
        copy_transposed(s.transposed[1], d.dh_t + at, capacity, thread);
        write_transposed(s.transposed[0], du, warp, inverse(1));
        consumer_barrier();
        copy_transposed(s.transposed[0], d.dh_t + p.n * capacity + at, capacity, thread);
#pragma unroll
        for (int i = 0; i < 32; ++i) da[i] = next[i];
    }
}
