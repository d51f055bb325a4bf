// What the permutation and SwiGLU kernels share: the routing map's markers, asynchronous copies into
// a swizzled tile of 128 rows, and the largest magnitude of each column of a warp's share of it.
//
// Why tiles are read by columns this way: a warp takes 16 bytes (16 E4M3 or 8 bf16 columns) of all
// 128 rows, four consecutive rows a lane. A column then lies inside one warp, so its maximum needs
// shuffles only, and four rows of one column are four adjacent bytes of the transposed output: a
// store of one word per lane writes 128 contiguous bytes. The transposition costs no second tile.
#pragma once
#include "numerics.cuh"

static constexpr int kPad = -1;      // slot of a padding row inside a group
static constexpr int kUnused = -2;   // of a row past the last group: whole blocks of 128 rows
static constexpr int kTileRows = 128;
static constexpr int kTilePitch = 256;   // bytes of a row of the tile
static constexpr u32 kFullWarp = 0xFFFFFFFFu;
static constexpr float kPadScale = 0x1p-56f;   // of a padding row: finite and a power of two

__device__ __forceinline__ int element_of(int4 v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// n / d for 0 <= n < 2^31: the host found multiplier and shift; multiplier 0 stands for d = 1.
__device__ __forceinline__ int divide(int n, u32 multiplier, int shift) {
  return multiplier == 0 ? n : (int)(__umulhi((u32)n, multiplier) >> shift);
}

// Byte offset of 16-byte chunk `chunk` (0..15) of row `row`. Both walks are free of bank conflicts:
// 16 lanes along a row (the xor permutes the chunks of one row), and 32 lanes four rows apart at one
// chunk (the xor sends any eight neighbouring lanes to the eight 16-byte columns of the banks).
__device__ __forceinline__ int tile_offset(int row, int chunk) {
  return row * kTilePitch + ((chunk ^ ((row >> 2) & 7)) << 4);
}

// ---- copies ---------------------------------------------------------------------------------------

// 16 bytes from global to shared memory, or 16 zero bytes.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, bool zero) {
  u32 address = (u32)__cvta_generic_to_shared(shared);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(zero ? 0 : 16)
               : "memory");
}
// The same for 8 or 16 bytes.
template <int kBytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool zero) {
  static_assert(kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if constexpr (kBytes == 16) {
    copy_async_16(shared, global, zero);
  } else {
    u32 address = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(address), "l"(global),
                 "r"(zero ? 0 : 8)
                 : "memory");
  }
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending> __device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 16 bytes that are read once, or zeros: one predicated load, so that many can be in flight.
__device__ __forceinline__ uint4 load_stream_16_if(const void* p, bool valid) {
  uint4 v;
  asm volatile(
      "{\n.reg .pred valid;\nsetp.ne.s32 valid, %5, 0;\n"
      "mov.u32 %0, 0;\nmov.u32 %1, 0;\nmov.u32 %2, 0;\nmov.u32 %3, 0;\n"
      "@valid ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
      : "l"(p), "r"((int)valid));
  return v;
}

// Stores that should not push what is being re-read out of L2.
__device__ __forceinline__ void store_stream(void* p, uint4 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
__device__ __forceinline__ void store_stream(void* p, u32 v) {
  asm volatile("st.global.cs.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void store_stream(void* p, float v) {
  asm volatile("st.global.cs.f32 [%0], %1;" ::"l"(p), "f"(v) : "memory");
}

// ---- column maxima ----------------------------------------------------------------------------------

struct MaxU32 {
  __device__ __forceinline__ u32 operator()(u32 a, u32 b) const { return max_u32(a, b); }
};
struct MaxU16x2 {
  __device__ __forceinline__ u32 operator()(u32 a, u32 b) const { return max_u16x2(a, b); }
};

// Reduces kCount values over the 32 lanes of a warp by recursive halving: at each step a lane gives
// away half of its values, so kCount values cost kCount - 1 shuffles plus one for each step that has
// nothing left to halve. Lane L ends with the maximum of value L / (32 / kCount).
template <int kStep = 16, int kCount, class Max>
__device__ __forceinline__ u32 reduce_columns(const u32 (&v)[kCount], Max max_of) {
  if constexpr (kStep == 0) {
    return v[0];
  } else {
    constexpr int kLeft = kCount > 1 ? kCount / 2 : 1;
    u32 kept[kLeft];
    bool upper = threadIdx.x & kStep;
#pragma unroll
    for (int j = 0; j < kLeft; ++j) {
      u32 keep = v[j], give = v[j];
      if (kCount > 1) {
        keep = upper ? v[(j + kLeft) % kCount] : v[j];
        give = upper ? v[j] : v[(j + kLeft) % kCount];
      }
      kept[j] = max_of(keep, __shfl_xor_sync(kFullWarp, give, kStep));
    }
    return reduce_columns<kStep / 2>(kept, max_of);
  }
}

// The four values of one column as one word of E4M3, rows in address order.
__device__ __forceinline__ u32 join_halves(u32 low, u32 high) {
  return __byte_perm(low, high, 0x5410);
}
