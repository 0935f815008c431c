#include "kernels/cuda/masked_linear_bitmap.h"

#include "kernels/cuda/exact.cuh"
#include "kernels/cuda/tiles.cuh"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;  // one strip per warp
constexpr int kGroupElements = static_cast<int>(kStripRows * kGroupCols);
constexpr int64_t kTargetBlocks = 264;  // two for each of 132 multiprocessors
constexpr int64_t kLeastGroups = 8;     // of a split

// What a block keeps in shared memory: a ring of stages, each one group of columns.
template <typename T, int NT>
struct Stages {
  static constexpr int kCount = sizeof(T) == 2 ? 4 : 3;
  static constexpr int kBatch = 8 * NT;
  // Rows of x lie 16 bytes apart in the banks, so that fragments are read without conflicts.
  static constexpr int kPitch = static_cast<int>(kGroupCols) + 16 / static_cast<int>(sizeof(T));
  static constexpr int kPerPiece = 16 / static_cast<int>(sizeof(T));  // elements of 16 bytes
  // Threads across the columns of a stage of x, and rows that the block copies at a time.
  static constexpr int kAcross = static_cast<int>(kGroupCols) / kPerPiece;
  static constexpr int kRowStep = kThreads / kAcross;
  // A dense group, and what copies of 16 aligned bytes bring before and behind it.
  static constexpr int kValues = kGroupElements + 2 * kPerPiece;
  static constexpr int kXBytes = kCount * kBatch * kPitch * static_cast<int>(sizeof(T));
  static constexpr int kValueBytes = kCount * kWarps * kValues * static_cast<int>(sizeof(T));
  static constexpr int kWordBytes = kCount * kWarps * 32 * 4;
  static constexpr int kBytes = kXBytes + kValueBytes + kWordBytes + (kCount * kWarps + kBatch) * 4;
};

// Copies a 16-byte piece of x: 8 or 4 columns of one activation row, of which `left` exist.
template <typename T>
__device__ __forceinline__ void copy_piece(const T* x, const T* from, int left, bool aligned,
                                           T* to) {
  constexpr int kPerPiece = 16 / static_cast<int>(sizeof(T));
  const int n = left < 0 ? 0 : left < kPerPiece ? left : kPerPiece;
  if (aligned) {
    copy_async<16>(to, n == 0 ? x : from, n * static_cast<int>(sizeof(T)));
  } else {
    for (int i = 0; i < kPerPiece; ++i) to[i] = i < n ? from[i] : T{};
  }
}

// The bits of a 16-bit value at `at` in shared memory, where `kept`: then `at` moves on. By hand:
// the compiler copies a pointer that moves under a condition once more for each element, and
// instructions are what bounds this kernel. (Not volatile: what is read follows from the words that
// were read behind the same barrier.)
#if defined(__CUDACC__)
__device__ __forceinline__ uint32_t next_kept(uint32_t& at, uint32_t kept) {
  uint32_t value = 0;
  asm("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p ld.shared.u16 %0, [%1]; @p add.u32 %1, %1, 2; }"
      : "+r"(value), "+r"(at)
      : "r"(kept));
  return value;
}
#else
template <typename T>
uint32_t next_kept(const T*& at, uint32_t kept) {
  return kept != 0 ? (at++)->bits : 0;
}
template <typename T>
const T* shared_address(const T* at) {
  return at;
}
#endif

// A lane's elements of a tile: four registers of a fragment of 16-bit elements, or eight of two
// fragments of tf32.
template <typename T>
__device__ __forceinline__ void decode(uint32_t bits, const T* values, uint32_t* a) {
  if constexpr (sizeof(T) == 2) {
    auto at = shared_address(values);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const uint32_t low = next_kept(at, bits & 1u << (2 * r));
      const uint32_t high = next_kept(at, bits & 2u << (2 * r));
      a[r] = __byte_perm(low, high, 0x5410);
    }
  } else {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      float value = 0;
      if ((bits >> e & 1u) != 0) value = *values++;
      a[e] = __float_as_uint(value);
    }
  }
}

template <typename T, int NT>
__device__ __forceinline__ void multiply_tile(const uint32_t* a, const T* x, int tile,
                                              float (&sum)[NT][4]) {
  using S = Stages<T, NT>;
  const int lane = static_cast<int>(threadIdx.x % 32);
  if constexpr (sizeof(T) == 2) {
    const uint32_t fragment[4] = {a[0], a[1], a[2], a[3]};
    if constexpr (NT == 1) {
      uint32_t b[2];
      load_matrices<T, false, 2>(b, x + lane % 8 * S::kPitch + 16 * tile + 8 * (lane / 8 % 2));
      multiply_fragments<T>(sum[0], fragment, b);
    } else {
#pragma unroll
      for (int j = 0; j < NT; j += 2) {
        uint32_t b[4];
        const int row = 8 * (j + lane / 16) + lane % 8;
        load_matrices<T, false, 4>(b, x + row * S::kPitch + 16 * tile + 8 * (lane / 8 % 2));
        const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
        multiply_fragments<T>(sum[j], fragment, first);
        multiply_fragments<T>(sum[j + 1], fragment, second);
      }
    }
  } else {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t fragment[4] = {a[4 * h], a[4 * h + 1], a[4 * h + 2], a[4 * h + 3]};
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        const T* at = x + (8 * j + lane / 4) * S::kPitch + 16 * tile + 8 * h + lane % 4;
        const uint32_t b[2] = {to_tf32(at[0]), to_tf32(at[4])};
        multiply_fragments_tf32(sum[j], fragment, b);
      }
    }
  }
}

// Blocks: (kWarps strips) x (splits of the groups) x (8 NT activation rows). Writes partial sums,
// [split][strip row][activation row]; blocks of the first strips also look for what is not finite.
template <typename T, int NT>
__global__ void __launch_bounds__(kThreads)
    product_kernel(TilesView w, int64_t strips, int64_t groups, const T* values, const T* x,
                   int64_t batch, float* partial, uint32_t* flags) {
  using S = Stages<T, NT>;
  auto* xs = shared_memory<T>();
  T* all_values = xs + S::kXBytes / sizeof(T);
  auto* all_words = reinterpret_cast<uint32_t*>(all_values + S::kValueBytes / sizeof(T));
  // Values of a group before the first one of a stage: the copies are aligned, it is not.
  auto* skews = reinterpret_cast<int*>(all_words + S::kWordBytes / 4);    // kCount * kWarps
  auto* found = reinterpret_cast<uint32_t*>(skews + S::kCount * kWarps);  // kBatch
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t strip = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  const bool exists = strip < strips;
  const int64_t first = groups * blockIdx.y / gridDim.y,
                end = groups * (blockIdx.y + 1) / gridDim.y;
  const int64_t batch_begin = static_cast<int64_t>(blockIdx.z) * S::kBatch;
  const bool aligned = w.cols % S::kPerPiece == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const bool looks = blockIdx.x == 0;
  if (looks) {
    if (threadIdx.x < S::kBatch) found[threadIdx.x] = 0;
    __syncthreads();
  }
  // This thread's pieces of x: one in every kRowStep rows, from x_row on.
  const int x_row = static_cast<int>(threadIdx.x) / S::kAcross;
  const int x_col = static_cast<int>(threadIdx.x) % S::kAcross * S::kPerPiece;
  const int x_rows =
      static_cast<int>(batch - batch_begin < S::kBatch ? batch - batch_begin : S::kBatch);
  const T* x_from = x + (batch_begin + x_row) * w.cols + first * kGroupCols + x_col;
  int x_left = static_cast<int>(w.cols - first * kGroupCols) - x_col;
  // Lane i holds the first value of group i, counted from the last multiple of 32 groups, in values
  // from the last aligned one before the strip.
  const int64_t* start = w.start + strip * groups;
  const uint32_t* words_from = w.words + (strip * groups + first) * 32 + lane;
  int64_t aligned_start = 0;
  uint32_t starts = 0, next_starts = 0;
  const auto load_starts = [&](int64_t g) {
    return static_cast<uint32_t>(start[g + lane < groups ? g + lane : groups] - aligned_start);
  };
  if (exists) {
    aligned_start = start[0] / S::kPerPiece * S::kPerPiece;
    starts = load_starts(first);
    next_starts = load_starts(first + 32);
  }
  const T* strip_values = values + aligned_start;
  int issued = 0, into = 0;  // stages, and the slot of the next
  const auto issue = [&] {
    if (first + issued < end) {
      T* x_to = xs + into * S::kBatch * S::kPitch + x_col;
#pragma unroll
      for (int r = 0; r < S::kBatch; r += S::kRowStep) {
        const int row = x_row + r;
        if (row < S::kBatch) {
          copy_piece(x, x_from + r * w.cols, row < x_rows ? x_left : 0, aligned,
                     x_to + row * S::kPitch);
        }
      }
      x_from += kGroupCols;
      x_left -= static_cast<int>(kGroupCols);
      if (exists) {
        const int i = issued % 32;
        const uint32_t from = __shfl_sync(kAllLanes, starts, i);
        const uint32_t after = __shfl_sync(kAllLanes, i == 31 ? next_starts : starts, (i + 1) % 32);
        const uint32_t begin = from / S::kPerPiece * S::kPerPiece;
        const int slot = into * kWarps + warp;
        if (lane == 0) skews[slot] = static_cast<int>(from - begin);
        const int n = static_cast<int>(after - begin);
#pragma unroll 1
        for (int v = lane * S::kPerPiece; v < n; v += 32 * S::kPerPiece) {
          copy_async<16>(all_values + slot * S::kValues + v, strip_values + begin + v);
        }
        copy_async<4>(all_words + slot * 32 + lane, words_from);
        words_from += 32;
        if (i == 31) {
          starts = next_starts;
          next_starts = load_starts(first + issued + 33);
        }
      }
    }
    commit_copies();
    ++issued;
    into = into + 1 == S::kCount ? 0 : into + 1;
  };
  float sum[NT][4] = {};
  for (int i = 0; i < S::kCount - 1; ++i) issue();
  int slot = 0;
  for (int64_t g = first; g < end; ++g, slot = slot + 1 == S::kCount ? 0 : slot + 1) {
    wait_for_copies<S::kCount - 2>();
    if (looks) {
      for (int row = x_row; row < S::kBatch; row += S::kRowStep) {  // what it copied itself
        const T* at = xs + (slot * S::kBatch + row) * S::kPitch + x_col;
        bool bad = false;
        for (int i = 0; i < S::kPerPiece; ++i) bad = bad || not_finite(at[i]);
        if (bad) atomicOr(&found[row], 1u);
      }
    }
    __syncthreads();  // copies of this stage are there; all are done with the stage before
    issue();
    if (!exists) continue;
    const uint32_t word = all_words[(slot * kWarps + warp) * 32 + lane];
    const GroupStarts at = group_starts(word);
    const T* mine = all_values + (slot * kWarps + warp) * S::kValues + skews[slot * kWarps + warp];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      uint32_t a[sizeof(T) == 2 ? 4 : 8];
      decode(word >> (8 * q) & 255u, mine + at.at[q], a);
      multiply_tile<T, NT>(a, xs + slot * S::kBatch * S::kPitch, q, sum);
    }
  }
  wait_for_copies<0>();
  if (exists) {
    const int64_t width = static_cast<int64_t>(gridDim.z) * S::kBatch;
    float* to = partial + (blockIdx.y * strips + strip) * kStripRows * width + batch_begin;
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      *reinterpret_cast<float2*>(to + g * width + 8 * j + 2 * t) =
          make_float2(sum[j][0], sum[j][1]);
      *reinterpret_cast<float2*>(to + (g + 8) * width + 8 * j + 2 * t) =
          make_float2(sum[j][2], sum[j][3]);
    }
  }
  if (looks) {
    __syncthreads();
    if (threadIdx.x < S::kBatch) {
      flags[blockIdx.y * gridDim.z * S::kBatch + batch_begin + threadIdx.x] = found[threadIdx.x];
    }
  }
}

// Adds the splits in order and finishes; a lane per row of the weight, a block row per four
// activation rows.
template <typename T>
__global__ void finish_kernel(ExactRows e, Finish f, const float* partial, const uint32_t* flags,
                              int64_t splits, int64_t strip_rows, int64_t width, T* y) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t rows = e.transposed ? e.mask.cols : e.mask.rows;
  const int64_t base = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x - lane;
  const int64_t row = base + lane, n0 = 4 * static_cast<int64_t>(blockIdx.y);
  float sum[4] = {};
  uint32_t flagged = 0;
  for (int64_t s = 0; s < splits; ++s) {
    for (int i = 0; i < 4; ++i) {
      if (flags[s * width + n0 + i] != 0) flagged |= 1u << i;
    }
    if (row >= rows) continue;
    const float4 part =
        *reinterpret_cast<const float4*>(partial + (s * strip_rows + row) * width + n0);
    sum[0] += part.x;
    sum[1] += part.y;
    sum[2] += part.z;
    sum[3] += part.w;
  }
  const T* residual = static_cast<const T*>(f.residual);
  for (int i = 0; i < 4 && n0 + i < e.batch; ++i) {
    if ((flagged >> i & 1u) != 0) {
      for (int j = 0; j < 32 && base + j < rows; ++j) {
        const float exact = exact_element<T>(e, n0 + i, base + j);
        if (j == lane) sum[i] = exact;
      }
    }
    if (row >= rows) continue;
    if (f.bias != nullptr) sum[i] += widen(static_cast<const T*>(f.bias)[row]);
    const int64_t at = (n0 + i) * rows + row;
    finish(sum[i], y + at, residual == nullptr ? nullptr : residual + at, f.relu);
  }
}

template <typename T, int NT>
cudaError_t product(const TilesArgs& a, const TilesCut& cut, cudaStream_t stream) {
  const TilesView& w = a.weight;
  cudaError_t error =
      launch(product_kernel<T, NT>,
             dim3(static_cast<unsigned>(cut.row_blocks), static_cast<unsigned>(cut.splits),
                  static_cast<unsigned>(cut.batch_blocks)),
             dim3(kThreads), static_cast<size_t>(Stages<T, NT>::kBytes), stream, w, w.strips(),
             w.groups(), static_cast<const T*>(a.values), static_cast<const T*>(a.exact.x),
             a.exact.batch, a.partial, a.flags);
  if (error != cudaSuccess) return error;
  return launch(finish_kernel<T>,
                dim3(static_cast<unsigned>((w.rows + kThreads - 1) / kThreads),
                     static_cast<unsigned>((a.exact.batch + 3) / 4)),
                dim3(kThreads), 0, stream, a.exact, a.finish, a.partial, a.flags, cut.splits,
                w.strips() * kStripRows, cut.batch_blocks * Stages<T, NT>::kBatch,
                static_cast<T*>(a.y));
}

template <typename T>
cudaError_t product_of(const TilesArgs& a, cudaStream_t stream) {
  const TilesCut cut = tiles_cut(a.weight, a.exact.batch);
  return cut.columns == 1   ? product<T, 1>(a, cut, stream)
         : cut.columns == 2 ? product<T, 2>(a, cut, stream)
         : cut.columns == 4 ? product<T, 4>(a, cut, stream)
                            : product<T, 8>(a, cut, stream);
}

template <typename T>
int64_t bytes_for(int columns) {
  return columns == 1   ? Stages<T, 1>::kBytes
         : columns == 2 ? Stages<T, 2>::kBytes
         : columns == 4 ? Stages<T, 4>::kBytes
                        : Stages<T, 8>::kBytes;
}

int columns_for(int64_t batch) { return batch <= 8 ? 1 : batch <= 16 ? 2 : batch <= 32 ? 4 : 8; }

}  // namespace

TilesCut tiles_cut(const TilesView& view, int64_t batch) {
  TilesCut cut;
  cut.columns = columns_for(batch);
  cut.row_blocks = (view.strips() + kWarps - 1) / kWarps;
  cut.batch_blocks = (batch + 8 * cut.columns - 1) / (8 * cut.columns);
  // Splits cost a partial sum each; without them few rows leave most of a GPU idle, and the last
  // wave of blocks some of it.
  const int64_t most = view.groups() / kLeastGroups;
  double best = -1e9;
  cut.splits = 1;
  for (int64_t s = 1; s <= most || s == 1; ++s) {
    const int64_t blocks = cut.row_blocks * cut.batch_blocks * s;
    const int64_t waves = (blocks + kTargetBlocks - 1) / kTargetBlocks;
    const double use = static_cast<double>(blocks) / static_cast<double>(waves * kTargetBlocks);
    const double worth = use - 0.02 * static_cast<double>(s);
    if (worth > best) {
      best = worth;
      cut.splits = s;
    }
    if (waves > 8) break;
  }
  const int64_t width = cut.batch_blocks * 8 * cut.columns;
  cut.partials = cut.splits * view.strips() * kStripRows * width;
  cut.flags = cut.splits * width;
  return cut;
}

bool tiles_fit(DType dtype, int64_t batch, const DeviceLimits& limits) {
  if (dtype == DType::f64 || batch > kTilesMaxBatch) return false;
  const int columns = columns_for(batch);
  return (dtype == DType::f32 ? bytes_for<float>(columns) : bytes_for<BFloat16>(columns)) <=
         limits.shared_bytes;
}

cudaError_t tiles_product(const TilesArgs& args, cudaStream_t stream) {
  if (args.dtype == DType::f32) return product_of<float>(args, stream);
  return args.dtype == DType::bf16 ? product_of<BFloat16>(args, stream)
                                   : product_of<Float16>(args, stream);
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
