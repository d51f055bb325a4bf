// The backward pass of SwiGLU and every cast of its results as the epilogue of da = dy w2: da itself is never stored.
//
// The bits are those of the GEMM with OUTPUT_BF16 followed by swiglu_backward.cuh on h in E4M3: da is rounded to bf16
// before anything else. Each half of the accumulators, over both warpgroups, is one 128 x 128 block of da, which belongs to
// one group: groups end at multiples of 128. Built for POW2 = 0 | 1.
//
// A warp has 16 rows of the block. The operands' rows come to shared memory in an order in which a thread's part of an
// accumulator is what memory wants: its two rows follow each other, 2 (lane / 4) and + 1, and of each 64 columns it has 16
// that do, from 16 (lane % 4); run i of eight columns is pair i of them. So a thread reads its own 16-byte chunks of h and
// writes its own of dg and du. h is fetched while the tensor cores are busy, by the thread that reads it.
//
// By rows each warp works alone. By columns all eight work together: they leave their maxima in shared memory, a thread
// finds the scale of one column, and the casts are transposed in two buffers of 128 columns x 128 rows in turn, one being
// written while the other is copied out.
#pragma once
#include "activation.cuh"
#include "pairs.cuh"
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
    uint4 h[2][2][2][32];  // gate and up; a lane's two rows; its columns of each 64; lane
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
    float inverse[2][128];         // of the columns' scales; POW2: as bf16
    u32 aw_max[WARPS];
};
constexpr int STAGING_BYTES = sizeof(Staging) / WARPS;
static_assert(sizeof(Staging) % 16 == 0 && sizeof(Rows) % 16 == 0, "read and written in 16-byte pieces");

DEVICE void consumer_barrier() { named_barrier<COLUMN_THREADS>(1); }

// Bad group_ends, which fill_group_table reports, could ask for blocks that lie across groups.
DEVICE bool is_block(const Tile& t) { return t.d_row % 128 == 0 && t.rows >= 128; }

// The first of a lane's 16 columns of a group of 64.
DEVICE int own_column(int group) { return group * 64 + threadIdx.x % 4 * 16; }

// One half's h and its scales, in the background. padding: a bit for each of the warp's rows.
DEVICE void load_h(Rows& rows, const Destination& d, const Problem& p, int column, i64 first_row, u32 padding) {
    const int lane = threadIdx.x % 32;
    const int row = first_row_of(lane);
    const u8* h = d.h + (first_row + row) * (2 * p.n) + column + own_column(0);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const bool valid = !(padding >> (row + r) & 1);
#pragma unroll
            for (int group = 0; group < 2; ++group)
                cp_async_16(smem_address(&rows.h[m][r][group][lane]), h + (r * 2 + m) * (i64)p.n + group * 64, valid);
        }
    }
    const int r = lane % 16, m = lane / 16;
    const float* scale = d.h_scale + (i64)(column / 128 + m * (p.n / 128)) * d.h_scale_stride + first_row + r;
    cp_async_4(smem_address(&rows.scale[m][r]), scale, !(padding >> r & 1));
    copy_async_commit();
}

// What the first half of a tile needs is asked for while the tensor cores work on it, in two steps: where the routing
// weights are takes a read of its own. row: the warp's first within the tile.
DEVICE int load_slot(const Destination& d, const Tile& t, int row) {
    return is_block(t) ? __ldg(d.slot_of_row + t.d_row + row + threadIdx.x % 16) : kUnused;
}
DEVICE void prefetch(char* memory, const Destination& d, const Problem& p, const Tile& t, int row, int slot) {
    if (!is_block(t)) return;
    Rows& rows = reinterpret_cast<Staging*>(memory)->rows[row / 16];
    const int lane = threadIdx.x % 32;
    const u32 padding = __ballot_sync(kFullWarp, slot < 0);
    if (lane < 16) {
        rows.slot[lane] = slot;
        cp_async_4(smem_address(&rows.weight[lane]), d.topk_weights + slot, slot >= 0);
    }
    load_h(rows, d, p, t.column, t.d_row + row, padding);
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
    *reinterpret_cast<uint2*>(out + own_column(lane / 16) / 2 + lane / 4 % 4 * 2) =
        make_uint2(abs_bits_16x2(m[0]), abs_bits_16x2(m[1]));
}

// The inverse scales of a pair of columns, and pairs multiplied by one or two. Powers of two multiply bf16 exactly.
#if POW2
struct Inverses {
    u32 pair;
};
typedef u16 StoredInverse;
DEVICE StoredInverse stored(float inverse) { return (u16)(__float_as_uint(inverse) >> 16); }
DEVICE Inverses both(float inverse) { return {__byte_perm(__float_as_uint(inverse), 0, 0x3232)}; }
DEVICE float2 scaled(u32 pair, Inverses s) {
    pair = multiply_bf16x2(pair, s.pair);
    return make_float2(bf16_low(pair), bf16_high(pair));
}
DEVICE float2 scaled(u32 pair, float inverse) { return scaled(pair, both(inverse)); }
#else
struct Inverses {
    float low, high;
};
typedef float StoredInverse;
DEVICE StoredInverse stored(float inverse) { return inverse; }
DEVICE Inverses both(float inverse) { return {inverse, inverse}; }
// Unpacked by other instructions than for a row: the compiler would do it once for both, and hold two floats for a word.
DEVICE float2 scaled(u32 pair, Inverses s) {
    return make_float2(__uint_as_float(__byte_perm(pair, 0, 0x1044)) * s.low,
                       __uint_as_float(__byte_perm(pair, 0, 0x3244)) * s.high);
}
DEVICE float2 scaled(u32 pair, float inverse) { return make_float2(bf16_low(pair) * inverse, bf16_high(pair) * inverse); }
#endif

// A thread's part of rows 0 and 1 of its two to memory: 16 bytes of each 64 columns. out: that of the first.
DEVICE void write_rows(u8* out, i64 pitch, const Pairs& w, const BlockScale (&scale)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float inv = scale[r].inv;
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            u32 q[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int i = 8 * group + 2 * j;
                const float2 left = scaled(w[2 * i + r], inv), right = scaled(w[2 * i + 2 + r], inv);
                q[j] = pack_e4m3x4(left.x, left.y, right.x, right.y);
            }
            *reinterpret_cast<uint4*>(out + r * pitch + group * 64) = make_uint4(q[0], q[1], q[2], q[3]);
        }
    }
}

// Where 16 rows' chunk of a column lies in a transposed buffer: free of bank conflicts along a column, and over the eight
// columns whose chunks are a matrix of stmatrix.
DEVICE int transposed_at(int column, int chunk) {
    return column * 128 + ((chunk ^ (column / 16 % 4 * 2 + column % 2)) << 4);
}

// Casts the warp's 16 rows into its chunks of a transposed buffer: 16 bytes of each of 128 columns. A 16-bit value of
// stmatrix is one column of the thread's two rows. inv(k): the inverse scales of runs 4 k .. 4 k + 3.
struct alignas(16) FourInverses {
    Inverses run[4];
};
template <class Inverse>
DEVICE void write_transposed(char* buffer, const Pairs& w, int warp, Inverse inv) {
    // The lane's address is that of column lane % 8 of run lane / 8 of four.
    const int lane = threadIdx.x % 32;
    const u32 to = smem_address(buffer) + transposed_at(lane % 8 / 2 * 16 + lane / 8 * 2 + lane % 2, warp);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const FourInverses four = inv(k);
        u32 q[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int i = 4 * k + j;
            const float2 first = scaled(w[2 * i], four.run[j]), second = scaled(w[2 * i + 1], four.run[j]);
            q[j] = pack_e4m3x4(first.x, second.x, first.y, second.y);
        }
        store_matrix_x4_transposed(to + (k / 2 * 64 + k % 2 * 8) * 128, q[0], q[1], q[2], q[3]);
    }
}

// A transposed buffer to 128 rows of global memory, `pitch` bytes apart; thread: among the consumers.
DEVICE void copy_transposed(const char* buffer, u8* out, i64 pitch, int thread) {
    const int first = thread / 8, chunk = thread % 8;
    out += first * pitch + chunk * 16;
#pragma unroll
    for (int c = 0; c < 128; c += COLUMN_THREADS / 8)
        store_stream(out + c * pitch, *reinterpret_cast<const uint4*>(buffer + transposed_at(first + c, chunk)));
}

// One half of the warp's 16 rows: da to dg, du and aw, and the row sums of da * a, which are returned for both rows.
DEVICE void backward(const Pairs& da, const Rows& rows, Pairs& dg, Pairs& du, Pairs& aw, float (&dprob)[2]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = first_row_of(lane) + r;
        const float weight = rows.weight[row], gate = rows.scale[0][row], up = rows.scale[1][row];
        float sum[4] = {};  // of runs of eight columns of memory, as the lanes of swiglu_backward.cuh have them
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            const uint4 g = rows.h[0][r][group][lane], u = rows.h[1][r][group][lane];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                u32 g_halves[2], u_halves[2];
                e4m3x4_to_f16(word_of(g, j), g_halves[0], g_halves[1]);
                e4m3x4_to_f16(word_of(u, j), u_halves[0], u_halves[1]);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int w = 2 * (8 * group + 2 * j + i) + r;
                    backward_pair(pair_of_f16(g_halves[i], gate), pair_of_f16(u_halves[i], up), da[w], weight, dg[w], du[w],
                                  aw[w], sum[2 * group + j / 2]);
                }
            }
        }
        // In the order of reduce_row_sum there.
        dprob[r] = (sum[0] + sum[2]) + (sum[1] + sum[3]);
        dprob[r] += __shfl_xor_sync(kFullWarp, dprob[r], 2);
        dprob[r] += __shfl_xor_sync(kFullWarp, dprob[r], 1);
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
                if (padding >> (first_row_of(lane) + r) & 1) {
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
        u8* dh = d.dh + (first_row + first_row_of(lane)) * (2 * p.n) + column + own_column(0);
        write_rows(dh, 2 * p.n, dg, gate);
        write_rows(dh + p.n, 2 * p.n, du, up);
        __syncwarp();  // every lane has read the scales of h
        if (half == 0 && column + 128 < p.n) load_h(rows, d, p, column + 128, first_row, padding);

        // Of the four lanes of a row, the first three write one value each.
        const int which = lane % 4;
        float* of_row = which == 2 ? d.dprob + block * capacity
                                   : d.dh_scale + (i64)(block + (which == 1 ? p.n / 128 : 0)) * d.dh_scale_stride;
        const float2 own = which == 0   ? make_float2(gate[0].scale, gate[1].scale)
                           : which == 1 ? make_float2(up[0].scale, up[1].scale)
                                        : make_float2(dprob[0], dprob[1]);
        if (which < 3) *reinterpret_cast<float2*>(of_row + first_row + first_row_of(lane)) = own;

        write_column_max(dg, s.column_max[warp][0]);
        write_column_max(du, s.column_max[warp][1]);
        u32 aw_max = __reduce_max_sync(kFullWarp, max_u32(amax_of_row(aw, 0), amax_of_row(aw, 1)));
        if (lane == 0) s.aw_max[warp] = aw_max;
        consumer_barrier();  // the maxima are there; the buffers have been copied out

        aw_max = __reduce_max_sync(kFullWarp, s.aw_max[lane % WARPS]);
        const BlockScale aw_scale = block_scale<kPow2>(aw_max << 16);
        {
            const int matrix = thread / 128, c = thread % 128;
            u32 m = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) m = max_u32(m, reinterpret_cast<const u16*>(s.column_max[w][matrix])[c]);
            const BlockScale scale = block_scale<kPow2>(m << 16);
            reinterpret_cast<StoredInverse*>(s.inverse[matrix])[c] = stored(scale.inv);
            d.dh_t_scale[(i64)row_block * d.dh_t_scale_stride + column + matrix * p.n + c] = scale.scale;
        }
        const Inverses aw_inverses = both(aw_scale.inv);
        write_transposed(s.transposed[0], aw, warp, [&](int) {
            return FourInverses{aw_inverses, aw_inverses, aw_inverses, aw_inverses};
        });
        if (thread == 0) d.aw_t_scale[block * (capacity / 128) + row_block] = aw_scale.scale;
        const auto inverse = [&s](int m) {
            return [&s, m](int k) {
                const StoredInverse* of_matrix = reinterpret_cast<const StoredInverse*>(s.inverse[m]);
                return *reinterpret_cast<const FourInverses*>(of_matrix + own_column(k / 2) + k % 2 * 8);
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
