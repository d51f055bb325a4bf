// Enough of a GPU to run the kernels on the CPU: one thread block at a time, every CUDA
// thread a coroutine that runs until it meets a barrier or a warp-wide exchange.
//
// What it shows: that indices, masks, exchanges and arithmetic are right, and that no read checked
// below leaves its tensor. What it cannot show: races that need threads to run at the same time,
// missing waits for asynchronous copies, and speed.
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

using std::max;
using std::min;

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emulator {

struct Dim3 { unsigned x, y, z; };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
};

// Meeting point of some threads; a second round cannot overwrite what is still being read.
struct Meeting {
  int present = 0;
  unsigned round = 0;
  uint64_t value[2][32];
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned progress;  // arrivals so far: when a pass over all threads adds none, none will ever come
void start_block();
inline std::function<void()> body;
inline int current, threads;
inline Meeting warps[32], block, named[16];
inline Dim3 thread_index, block_index, grid_size, block_size;
inline std::vector<std::pair<uintptr_t, uintptr_t>> readable;
inline bool failed;
inline char message[256];
alignas(1024) inline unsigned char dynamic_shared[232448];

// Ends the run at the next switch to the scheduler; this thread never continues.
[[noreturn]] inline void fail(const char* what, const void* address, size_t bytes) {
  failed = true;
  snprintf(message, sizeof message, "%s: %zu bytes at %p, block (%u, %u, %u), thread %u", what, bytes,
           address, block_index.x, block_index.y, block_index.z, thread_index.x);
  for (;;) swapcontext(&fibers[current].context, &scheduler);
}

inline void check_read(const void* address, size_t bytes) {
  uintptr_t at = (uintptr_t)address;
  if (at % bytes) fail("misaligned read", address, bytes);
  for (auto& range : readable)
    if (at >= range.first && at + bytes <= range.second) return;
  fail("read outside the arguments", address, bytes);
}

// Called by code compiled with -fsanitize=alignment for an access whose address is not a multiple of its size: the GPU
// faults there.
extern "C" __attribute__((weak, visibility("hidden"))) void __ubsan_handle_type_mismatch_v1_abort(
    void*, const void* address) {
  fail("misaligned access", address, 0);
}

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

inline void meet(Meeting& m, int expected) {
  ++progress;
  unsigned round = m.round;
  if (++m.present == expected) {
    m.present = 0;
    ++m.round;
  } else {
    while (m.round == round) yield();
  }
}

// Every lane of the warp gives a value; returns all 32 of them.
inline const uint64_t* exchange(uint64_t value) {
  Meeting& m = warps[current / 32];
  uint64_t* values = m.value[m.round & 1];
  values[current % 32] = value;
  meet(m, 32);
  return values;
}

template <class T> uint64_t raw(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T> T cooked(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline void thread_main() {
  body();
  fibers[current].done = true;
  ++progress;
  for (;;) swapcontext(&fibers[current].context, &scheduler);
}

// True, or false with `message` when a thread failed or the threads wait for each other for ever.
inline bool launch(Dim3 grid, int num_threads, std::function<void()> kernel) {
  body = std::move(kernel);
  threads = num_threads;
  grid_size = grid;
  block_size = {(unsigned)num_threads, 1, 1};
  failed = false;
  fibers.resize(num_threads);
  for (auto& fiber : fibers)
    if (!fiber.stack) fiber.stack.reset(new char[65536]);
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        block_index = {x, y, z};
        block = Meeting();
        for (auto& warp : warps) warp = Meeting();
        for (auto& barrier : named) barrier = Meeting();
        memset(dynamic_shared, 0xA5, sizeof dynamic_shared);
        start_block();
        for (auto& fiber : fibers) {
          fiber.done = false;
          getcontext(&fiber.context);
          fiber.context.uc_stack.ss_sp = fiber.stack.get();
          fiber.context.uc_stack.ss_size = 65536;
          fiber.context.uc_link = nullptr;
          makecontext(&fiber.context, thread_main, 0);
        }
        bool running = true;
        while (running) {
          running = false;
          unsigned before = progress;
          for (current = 0; current < num_threads; ++current) {
            if (fibers[current].done) continue;
            thread_index = {(unsigned)current, 0, 0};
            swapcontext(&scheduler, &fibers[current].context);
            if (failed) return false;
            running = running || !fibers[current].done;
          }
          if (progress == before) {
            snprintf(message, sizeof message, "deadlock in block (%u, %u, %u)", x, y, z);
            return false;
          }
        }
      }
  return true;
}

template <class T> T load(const void* from) {  // aligned for the driver, which may be less than T
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}
// Calls a kernel with arguments given as the driver takes them: an array of addresses.
template <class... Args, size_t... I>
bool call(void (*kernel)(Args...), void** args, Dim3 grid, int num_threads,
          std::index_sequence<I...>) {
  auto values = std::make_tuple(load<std::remove_cv_t<Args>>(args[I])...);
  return launch(grid, num_threads, [=] { std::apply(kernel, values); });
}
template <class... Args>
bool run(void (*kernel)(Args...), void** args, Dim3 grid, int num_threads) {
  return call(kernel, args, grid, num_threads, std::index_sequence_for<Args...>());
}
template <class... Args> int parameter_sizes(void (*)(Args...), int* sizes) {
  int all[] = {(int)sizeof(Args)...};
  std::copy(std::begin(all), std::end(all), sizes);
  return sizeof...(Args);
}

// ---- number formats -------------------------------------------------------------------------

inline bool is_nan(float value) { return value != value; }

inline uint16_t to_f16(float value) {
  if (is_nan(value)) return 0x7FFF;
  uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  float size = std::fabs(value);
  if (size >= 65520.0f) return sign | 0x7C00;
  if (size < 0x1p-14f) return sign | (uint16_t)std::lrintf(std::ldexp(size, 24));
  int exponent = std::ilogb(size);
  int mantissa = (int)std::lrintf(std::ldexp(size, 10 - exponent));   // 1024..2048
  return sign | (uint16_t)(((exponent + 15) << 10) + (mantissa - 1024));
}
inline float from_f16(uint16_t bits) {
  int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
               : exponent ? std::ldexp(1024.0f + mantissa, exponent - 25)
                          : std::ldexp((float)mantissa, -24);
  return bits & 0x8000 ? -size : size;
}

inline uint16_t to_bf16(float value) {
  if (is_nan(value)) return 0x7FFF;
  uint32_t bits = (uint32_t)raw(value);
  return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline float from_bf16(uint16_t bits) { return cooked<float>((uint64_t)bits << 16); }

inline uint8_t to_e4m3(float value) {
  if (is_nan(value)) return 0x7F;
  uint8_t sign = std::signbit(value) ? 0x80 : 0;
  float size = std::fabs(value);
  if (size >= 448.0f) return sign | 0x7E;
  if (size < 0x1p-6f) return sign | (uint8_t)std::lrintf(std::ldexp(size, 9));
  int exponent = std::ilogb(size);
  int mantissa = (int)std::lrintf(std::ldexp(size, 3 - exponent));   // 8..16
  return sign | (uint8_t)(((exponent + 7) << 3) + (mantissa - 8));
}
inline float from_e4m3(uint8_t byte) {
  int exponent = (byte >> 3) & 15, mantissa = byte & 7;
  float size = (byte & 0x7F) == 0x7F ? NAN
               : exponent ? std::ldexp(8.0f + mantissa, exponent - 10)
                          : std::ldexp((float)mantissa, -9);
  return byte & 0x80 ? -size : size;
}

// ---- instructions: what the PTX in the kernels means ------------------------------------------

inline uint32_t pair16(uint16_t low, uint16_t high) { return low | (uint32_t)high << 16; }
template <class F> uint32_t each16(uint32_t a, uint32_t b, F f) {
  return pair16(f((uint16_t)a, (uint16_t)b), f((uint16_t)(a >> 16), (uint16_t)(b >> 16)));
}
inline uint16_t e4m3x2(float low, float high) { return to_e4m3(low) | to_e4m3(high) << 8; }
inline uint32_t f16x2_of_e4m3x2(uint16_t bytes) {
  return pair16(to_f16(from_e4m3((uint8_t)bytes)), to_f16(from_e4m3(bytes >> 8)));
}
inline uint16_t e4m3x2_of_f16x2(uint32_t pair) {
  return e4m3x2(from_f16((uint16_t)pair), from_f16(pair >> 16));
}
inline uint32_t max_u16x2(uint32_t a, uint32_t b) {
  return each16(a, b, [](uint16_t x, uint16_t y) { return max(x, y); });
}
inline uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  return each16(a, b, [](uint16_t x, uint16_t y) {
    return to_f16(from_f16(x) * from_f16(y));   // the product is exact in FP32
  });
}
inline uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  return each16(a, b, [](uint16_t x, uint16_t y) {
    return to_bf16(from_bf16(x) * from_bf16(y));   // the product is exact in FP32
  });
}
// max.NaN of magnitudes: the larger one, or the canonical NaN; the sign is left out.
inline uint32_t max_abs_16x2(uint32_t a, uint32_t b, uint16_t inf) {
  return each16(a, b, [=](uint16_t x, uint16_t y) {
    uint16_t larger = max<uint16_t>(x & 0x7FFF, y & 0x7FFF);
    return larger > inf ? (uint16_t)0x7FFF : larger;
  });
}
inline uint32_t max_xorsign_abs_bf16x2(uint32_t a, uint32_t b) {
  return max_abs_16x2(a, b, 0x7F80) | ((a ^ b) & 0x80008000u);
}
template <class T> T read(const void* address) {
  check_read(address, sizeof(T));
  return *(const T*)address;
}
template <class T> void write(void* address, T value) {
  if ((uintptr_t)address % sizeof(T)) fail("misaligned write", address, sizeof(T));
  *(T*)address = value;
}
inline uint4 read_if(const void* address, int wanted) {
  return wanted ? read<uint4>(address) : uint4{0, 0, 0, 0};
}
// Shared addresses have 32 bits: all of them lie within 2 GiB of this array.
inline unsigned shared_address(const void* p) {
  return (unsigned)((intptr_t)p - (intptr_t)dynamic_shared);
}
// Four 8 x 8 matrices of 16-bit values: lane 8 i + r has the address of row r of matrix i, and each
// lane two neighbouring values of row lane / 4 of all four.
inline void store_matrix(unsigned address, const std::array<unsigned, 4>& values) {
  const uint64_t* rows = exchange(address);
  int lane = current % 32;
  for (int i = 0; i < 4; ++i) {
    unsigned row = (unsigned)rows[8 * i + lane / 4];
    if (row % 16) fail("misaligned row of a matrix", nullptr, row);
    write((char*)dynamic_shared + (int)row + lane % 4 * 4, values[i]);
  }
}
// The same with each matrix transposed: lane 8 i + r has the address of column r.
inline void store_matrix_transposed(unsigned address, const std::array<unsigned, 4>& values) {
  const uint64_t* columns = exchange(address);
  int lane = current % 32;
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      unsigned column = (unsigned)columns[8 * i + lane % 4 * 2 + j];
      if (column % 16) fail("misaligned column of a matrix", nullptr, column);
      write((char*)dynamic_shared + (int)column + lane / 4 * 2, (uint16_t)(values[i] >> 16 * j));
    }
}
template <class T> void copy_async(unsigned shared, const void* global, int bytes) {
  T value = bytes ? read<T>(global) : T{};
  write((char*)dynamic_shared + (int)shared, value);
}

}  // namespace emulator

#include "tensor_core.h"

#define threadIdx emulator::thread_index
#define blockIdx emulator::block_index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

inline void __syncthreads() { emulator::meet(emulator::block, emulator::threads); }
inline void __syncwarp(unsigned = ~0u) { emulator::exchange(0); }
inline void __threadfence_system() {}
template <class T> T __ldg(const T* p) { return emulator::read<T>(p); }

template <class T> T shuffle(T value, int source) {
  return emulator::cooked<T>(emulator::exchange(emulator::raw(value))[source & 31]);
}
template <class T> T __shfl_sync(unsigned, T value, int lane) { return shuffle(value, lane); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
  return shuffle(value, (emulator::current & 31) ^ mask);
}
template <class T> T __shfl_up_sync(unsigned, T value, int delta) {
  int lane = emulator::current & 31;
  return shuffle(value, lane >= delta ? lane - delta : lane);
}
template <class F> unsigned lanes_where(uint64_t value, F f) {
  const uint64_t* values = emulator::exchange(value);
  unsigned mask = 0;
  for (int i = 0; i < 32; ++i) mask |= (unsigned)f(values[i]) << i;
  return mask;
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  return lanes_where(vote, [](uint64_t v) { return v != 0; });
}
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == ~0u; }
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
template <class T> unsigned __match_any_sync(unsigned, T value) {
  uint64_t own = emulator::raw(value);
  return lanes_where(own, [=](uint64_t v) { return v == own; });
}
template <class T> T __reduce_max_sync(unsigned, T value) {
  const uint64_t* values = emulator::exchange(emulator::raw(value));
  T result = value;
  for (int i = 0; i < 32; ++i) result = max(result, emulator::cooked<T>(values[i]));
  return result;
}
template <class T> T atomicAdd(T* p, T value) { return std::exchange(*p, *p + value); }
template <class T> T atomicMin(T* p, T value) { return std::exchange(*p, min(*p, value)); }

inline int __ffs(unsigned v) { return __builtin_ffs((int)v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline float __uint_as_float(unsigned u) { return emulator::cooked<float>(u); }
inline unsigned __float_as_uint(float f) { return (unsigned)emulator::raw(f); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= (unsigned)(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return result;
}
inline unsigned __cvta_generic_to_shared(const void* p) { return emulator::shared_address(p); }
