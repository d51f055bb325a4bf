// Which token goes to which rank of an expert-parallel group, and what travels beside its row.
//
// Rank r holds the experts r * per_rank to (r + 1) * per_rank - 1. A token goes once to each rank that
// has one of its experts: its first slot there starts a row, later ones share it. Rows and slots are
// counted per rank and placed as slots.cuh says, so in the order of tokens within a rank.
//
// Expert num_experts drops the slot, and so does an id out of range, which is also counted.
#include "slots.cuh"

static constexpr int kMaxRanks = kThreads;
static constexpr int kMaxAlike = 8;

struct Alike {
  int value[kMaxAlike];
};

// Calls visit(slot, rank, peers, firsts, inside) for the slots of this warp, 32 at a time and in order;
// rank is num_ranks for a dropped slot. `peers` are the lanes with the same rank, `firsts` those whose
// slot is its token's first one there. Every lane makes every call. Adds wrong ids to `bad`.
template <class Visit>
__device__ __forceinline__ void walk(const Id* ids, int num_slots, int slots_per_warp, int topk,
                                     int num_experts, int per_rank, int& bad, Visit visit) {
  int num_ranks = num_experts / per_rank;
  walk_slots(ids, num_slots, slots_per_warp, num_experts, [&](int slot, Id id, bool inside) {
    bool kept = id >= 0 && id < (Id)num_experts;
    bad += !kept && id != (Id)num_experts;
    int rank = kept ? (int)id / per_rank : num_ranks;
    bool first = kept;
    if (kept) {
      Id begin = (Id)rank * per_rank, end = begin + per_rank;
      for (int i = slot - slot % topk; i < slot; ++i) {
        Id other = __ldg(ids + i);
        if (other >= begin && other < end) first = false;
      }
    }
    u32 firsts = __ballot_sync(kFullWarp, first);
    visit(slot, rank, __match_any_sync(kFullWarp, rank), firsts, inside);
  });
}

// Adds this warp's rows of rank r to count[r] and its slots to count[num_ranks + r].
__device__ __forceinline__ void count_slots(const Id* ids, int num_slots, int slots_per_warp, int topk,
                                            int num_experts, int per_rank, int* count, int& bad) {
  int lane = threadIdx.x & 31, num_ranks = num_experts / per_rank;
  walk(ids, num_slots, slots_per_warp, topk, num_experts, per_rank, bad,
       [&](int, int rank, u32 peers, u32 firsts, bool) {
         if (rank < num_ranks && (peers >> lane) == 1) {
           count[rank] += __popc(peers & firsts);
           count[num_ranks + rank] += __popc(peers);
         }
         __syncwarp();
       });
}

// partial[cta] = [rows of each rank, slots of each rank, wrong ids] of the CTA's slice. Without the
// occupancy asked for the assembler stops at 32 registers and spills.
extern "C" __global__ void __launch_bounds__(kThreads, 4)
    dispatch_count(const Id* __restrict__ ids, int num_slots, int slots_per_warp, int topk,
                   int num_experts, int per_rank, int* __restrict__ partial) {
  __shared__ int count[kWarps][2 * kMaxRanks];
  __shared__ int bad;
  int counts = 2 * (num_experts / per_rank);
  for (int i = threadIdx.x; i < counts; i += kThreads)
#pragma unroll
    for (int w = 0; w < kWarps; ++w) count[w][i] = 0;
  if (threadIdx.x == 0) bad = 0;
  __syncthreads();

  int own_bad = 0;
  count_slots(ids, num_slots, slots_per_warp, topk, num_experts, per_rank, count[threadIdx.x / 32],
              own_bad);
  if (own_bad != 0) atomicAdd(&bad, own_bad);
  __syncthreads();

  int* out = partial + (i64)blockIdx.x * (counts + 1);
  for (int i = threadIdx.x; i < counts; i += kThreads) {
    int sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += count[w][i];
    out[i] = sum;
  }
  if (threadIdx.x == 0) out[counts] = bad;
}

// sizes[rank] = [rows, slots, wrong ids, num_alike values that must be the same on all ranks].
extern "C" __global__ void __launch_bounds__(kThreads, 4)
    dispatch_place(const Id* __restrict__ ids, int num_slots, int slots_per_warp, int topk,
                   int num_experts, int per_rank, const int* __restrict__ partial, int capacity,
                   int* __restrict__ row_of_slot, int* __restrict__ first_row_of_slot,
                   int* __restrict__ position_of_slot, int* __restrict__ slot_of_row,
                   int* __restrict__ sizes, Alike alike, int num_alike) {
  __shared__ int next[kWarps][2 * kMaxRanks];   // first counts, then the next free row and position
  __shared__ int total[2 * kMaxRanks + 1];
  __shared__ int earlier[2 * kMaxRanks + 1];   // in the CTAs before this one
  __shared__ int warp_sums[2][kWarps];
  int warp = threadIdx.x / 32, num_ranks = num_experts / per_rank, counts = 2 * num_ranks;
  for (int i = threadIdx.x; i <= counts; i += kThreads) {
    total[i] = earlier[i] = 0;
    if (i < counts)
#pragma unroll
      for (int w = 0; w < kWarps; ++w) next[w][i] = 0;
  }
  __syncthreads();

  sum_ctas(partial, counts + 1, total, earlier);
  int ignored = 0;
  count_slots(ids, num_slots, slots_per_warp, topk, num_experts, per_rank, next[warp], ignored);
  __syncthreads();

  // Thread r: where the rows and the slots of rank r start.
  bool is_rank = (int)threadIdx.x < num_ranks;
  int used;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int i = half * num_ranks + threadIdx.x, all;
    int place = scan_threads(is_rank ? total[i] : 0, warp_sums[half], all);
    if (half == 0) used = all;
    if (!is_rank) continue;
    place += earlier[i];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      int n = next[w][i];
      next[w][i] = place;
      place += n;
    }
  }
  if (is_rank && blockIdx.x == 0) {
    int* out = sizes + threadIdx.x * (3 + num_alike);
    out[0] = total[threadIdx.x];
    out[1] = total[num_ranks + threadIdx.x];
    out[2] = total[counts];
    for (int i = 0; i < num_alike; ++i) out[3 + i] = alike.value[i];
  }
  __syncthreads();

  int* next_row = next[warp];
  int* next_position = next_row + num_ranks;
  int lane = threadIdx.x & 31;
  walk(ids, num_slots, slots_per_warp, topk, num_experts, per_rank, ignored,
       [&](int slot, int rank, u32 peers, u32 firsts, bool inside) {
         bool kept = rank < num_ranks, first = (firsts >> lane) & 1;
         int row = kDropped, position = kDropped;
         if (kept) {
           // The last row begun for this rank is this token's own if another slot began it.
           row = next_row[rank] + __popc(peers & firsts & lanes_before()) - (first ? 0 : 1);
           position = next_position[rank] + __popc(peers & lanes_before());
         }
         __syncwarp();
         if (kept && (peers >> lane) == 1) {
           next_row[rank] = row + 1;
           next_position[rank] = position + 1;
         }
         __syncwarp();
         if (inside) {
           row_of_slot[slot] = row;
           first_row_of_slot[slot] = first ? row : kDropped;
           position_of_slot[slot] = position;
         }
         if (first) slot_of_row[row] = slot;
       });

  for (i64 r = used + (i64)blockIdx.x * kThreads + threadIdx.x; r < capacity;
       r += (i64)gridDim.x * kThreads)
    slot_of_row[r] = kUnused;
}

// out[row * out_pitch] = [the token's weights (their bits), its experts as the row's rank numbers them],
// per_rank for an expert that is elsewhere; `row` of each slot that starts one.
extern "C" __global__ void __launch_bounds__(kThreads)
    dispatch_routing(const Id* __restrict__ ids, const int* __restrict__ weights,
                     const int* __restrict__ first_row_of_slot, int num_slots, int topk, int per_rank,
                     int* __restrict__ out, int out_pitch) {
  i64 slot = (i64)blockIdx.x * kThreads + threadIdx.x;
  if (slot >= num_slots) return;
  int row = __ldg(first_row_of_slot + slot);
  if (row < 0) return;
  Id begin = __ldg(ids + slot) / per_rank * per_rank;
  i64 token = slot - slot % topk;
  int* to = out + (i64)row * out_pitch;
  for (int k = 0; k < topk; ++k) {
    Id local = __ldg(ids + token + k) - begin;
    to[k] = __ldg(weights + token + k);
    to[topk + k] = local >= 0 && local < per_rank ? (int)local : per_rank;
  }
}
