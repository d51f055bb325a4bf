// One small wrapper per PTX instruction that the GEMM uses, each naming its section of the PTX ISA.
// Header-free on purpose: a cold NVRTC compile then takes a fraction of a second.
#pragma once
#include "numerics.cuh"

// Same size and alignment as CUtensorMap (CUDA 13 declares 128 bytes).
struct alignas(128) TensorMap { u64 opaque[16]; };

#define DEVICE __device__ __forceinline__

DEVICE u32 smem_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// x, which is the same in all lanes of a warp, from a uniform register: redux (9.7.13.8) leaves its result in one.
DEVICE u32 uniform(u32 x) { return __reduce_max_sync(~0u, x); }

// ---- mbarrier (9.7.13.15, Parallel Synchronization: mbarrier) ------------------------------------------------------
DEVICE void mbarrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

DEVICE void mbarrier_arrive_expect_tx(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEVICE void mbarrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// Returns once the phase of this parity has completed.
DEVICE void mbarrier_wait(u32 bar, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(bar), "r"(parity)
        : "memory");
}

// ---- asynchronous copies -------------------------------------------------------------------------------------------
DEVICE void prefetch_tensor_map(const TensorMap* map) {  // 9.7.9.15 prefetch
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// cp.async.bulk.tensor (9.7.9.27.5.2): box at (x, y) -> shared memory, completing on `bar`; x is the contiguous axis.
DEVICE void tma_load(u32 dst, const TensorMap* map, int x, int y, u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
            "r"(dst), "l"(map), "r"(x), "r"(y), "r"(bar)
        : "memory");
}
// The same of maps whose rows are in groups (`row_order` of tma.py, with two and three axes); group: of the first row.
DEVICE void tma_load_groups_4d(u32 dst, const TensorMap* map, int x, int group, u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %3, %4}], "
        "[%5];" ::"r"(dst), "l"(map), "r"(x), "r"(0), "r"(group), "r"(bar)
        : "memory");
}
DEVICE void tma_load_groups_5d(u32 dst, const TensorMap* map, int x, int group, u32 bar) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
        "[%1, {%2, %3, %3, %3, %4}], [%5];" ::"r"(dst), "l"(map), "r"(x), "r"(0), "r"(group), "r"(bar)
        : "memory");
}
// The way back: a box of shared memory to (x, y), in this thread's bulk group (9.7.9.27.5.3).
DEVICE void tma_store(const TensorMap* map, u32 src, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(src),
                 "r"(x), "r"(y)
                 : "memory");
}
// The same, adding to what is there: FP32, done at the L2, one owner per address and so deterministic.
DEVICE void tma_add(const TensorMap* map, u32 src, int x, int y) {
    asm volatile("cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                 "r"(src), "r"(x), "r"(y)
                 : "memory");
}
DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int PENDING>  // returns once at most the newest PENDING groups may still read their sources
DEVICE void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }  // 9.7.13.4 membar
// cp.async (9.7.9.25.3.1): 4 or 16 bytes, zeros where `valid` is false (the source is then not read).
DEVICE void cp_async_4(u32 dst, const void* src, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src), "r"(valid ? 4 : 0) : "memory");
}
DEVICE void cp_async_16(u32 dst, const void* src, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(valid ? 16 : 0) : "memory");
}
// This thread's arrival on `bar` once all its cp.async have landed (9.7.13.15.17; noinc: counted by init).
DEVICE void cp_async_arrive(u32 bar) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}

// ---- wgmma (9.7.15, Asynchronous Warpgroup Level Matrix Instructions) -----------------------------------------------
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Shared-memory matrix descriptor, K-major with 128-byte swizzle (9.7.15.5.1.2). Its low word holds the address in
// units of 16 bytes (below a leading offset that this swizzle ignores), so it moves through a tile by plain addition; the
// high word never changes: 1024 bytes between groups of 8 rows, swizzle mode 1.
DEVICE u32 matrix_address(u32 address) { return address >> 4 | 0x10000u; }
DEVICE u64 matrix_descriptor(u32 low) { return ((u64)0x40000040u << 32) | low; }

// d[64 x N] (+)= a[64 x 32] b[N x 32]^T with E4M3 inputs and FP32 accumulators; accumulate = 0 overwrites d. One
// overload per N, told apart by the N / 2 accumulators that a thread holds.
#define ACC8(d, i) \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define ACC32(d, i) ACC8(d, i), ACC8(d, i + 8), ACC8(d, i + 16), ACC8(d, i + 24)
DEVICE void wgmma(float (&d)[8], u64 a, u64 b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %10, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7"
        "}, %8, %9, p, 1, 1;\n}"
        : ACC8(d, 0)
        : "l"(a), "l"(b), "r"(accumulate));
}
DEVICE void wgmma(float (&d)[16], u64 a, u64 b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n32k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
        "}, %16, %17, p, 1, 1;\n}"
        : ACC8(d, 0), ACC8(d, 8)
        : "l"(a), "l"(b), "r"(accumulate));
}
DEVICE void wgmma(float (&d)[32], u64 a, u64 b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
        "}, %32, %33, p, 1, 1;\n}"
        : ACC32(d, 0)
        : "l"(a), "l"(b), "r"(accumulate));
}
DEVICE void wgmma(float (&d)[64], u64 a, u64 b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
        "}, %64, %65, p, 1, 1;\n}"
        : ACC32(d, 0), ACC32(d, 32)
        : "l"(a), "l"(b), "r"(accumulate));
}
DEVICE void wgmma(float (&d)[96], u64 a, u64 b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
        "}, %96, %97, p, 1, 1;\n}"
        : ACC32(d, 0), ACC32(d, 32), ACC32(d, 64)
        : "l"(a), "l"(b), "r"(accumulate));
}
#undef ACC8
#undef ACC32

// ---- registers -------------------------------------------------------------------------------------------------------
template <int REGISTERS>
DEVICE void take_registers() {  // 9.7.19.5 setmaxnreg
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
DEVICE void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// ---- clusters (9.7.13.4 barrier.cluster; 7.9 mapa) -------------------------------------------------------------------
DEVICE int cluster_rank() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
// All threads of all CTAs that have not ended; what they wrote before is seen after it.
DEVICE void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
DEVICE u32 cluster_address(u32 address, int rank) {  // of the same place in the shared memory of CTA `rank`
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}
DEVICE float4 load_cluster_v4(u32 address) {
    float4 v;
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(address)
                 : "memory");
    return v;
}
DEVICE void store_shared_v4(u32 address, float4 v) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
                 : "memory");
}

// ---- epilogue -------------------------------------------------------------------------------------------------------
DEVICE void store_matrix_x4(u32 dst, u32 r0, u32 r1, u32 r2, u32 r3) {  // 9.7.14.5.16 stmatrix
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(dst), "r"(r0), "r"(r1),
                 "r"(r2), "r"(r3)
                 : "memory");
}
// Each matrix is transposed on the way: the address of lane 8 i + r is that of column r of matrix i.
DEVICE void store_matrix_x4_transposed(u32 dst, u32 r0, u32 r1, u32 r2, u32 r3) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(dst), "r"(r0), "r"(r1),
                 "r"(r2), "r"(r3)
                 : "memory");
}
template <int COUNT>  // 9.7.13.1 barrier, one of the 16 of a CTA other than __syncthreads's, for COUNT threads
DEVICE void named_barrier(int id) {
    asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "n"(COUNT) : "memory");
}
DEVICE void reduce_add_v4(float* dst, float4 v) {  // 9.7.13.13 red; one owner per address, so deterministic
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(dst), "f"(v.x), "f"(v.y), "f"(v.z),
                 "f"(v.w)
                 : "memory");
}
