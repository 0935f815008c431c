#include "kernels/cuda/masked_linear_sampled.h"

#include "kernels/cuda/warp.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr int kThreads = 448;   // of the product: 72 registers for each of two blocks
constexpr int kGroupLanes = 8;  // of a unit, and the lanes that shared memory serves at once
constexpr int kGroups = kThreads / kGroupLanes;
constexpr int kMostUnits = 14;  // a group's: an accumulator register for each
constexpr int kColumnBytes = kSampledSlice * 4;
constexpr int kStandBytes = 128;  // before the panel, whose columns begin at multiples of it
constexpr int kIndexThreads = 256, kIndexWarps = kIndexThreads / 32;

static_assert(kSampledUnit == kGroupLanes, "lane i of a group keeps the sum of entry i");
static_assert(kSampledSlice == 2 * 4 * kGroupLanes, "two 16-byte loads of a lane per column");

// Words of a row's bits inside a panel.
struct RowWords {
  const uint32_t* at;
  int count;
};
__device__ RowWords row_words(const BitMatrix& bits, const SampledShape& s, int64_t panel,
                              int64_t row) {
  const int64_t words = (bits.cols + 31) / 32, first = panel * (s.panel_cols / 32);
  const int64_t left = words - first, most = s.panel_cols / 32;
  return {bits.words + row * words + first,
          row < bits.rows ? static_cast<int>(left < most ? left : most) : 0};
}

__device__ unsigned count_units(const RowWords& words) {
  unsigned entries = 0;
  for (int i = 0; i < words.count; ++i) entries += static_cast<unsigned>(__popc(words.at[i]));
  return (entries + kSampledUnit - 1) / kSampledUnit;
}

// Units of every panel and chunk of 32 rows, a warp for each.
__global__ void count_kernel(BitMatrix bits, SampledShape s, SampledIndex index) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kIndexWarps;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kIndexWarps + threadIdx.x / 32;
       i < s.panels * s.row_chunks; i += step) {
    const int64_t panel = i / s.row_chunks, row = (i - panel * s.row_chunks) * 32 + lane;
    const unsigned units =
        __reduce_add_sync(kAllLanes, count_units(row_words(bits, s, panel, row)));
    if (lane == 0) index.of_chunk[i] = units;
  }
}

// Numbers of units to places, by one block.
__global__ void place_kernel(SampledShape s, SampledIndex index) {
  auto* sums = shared_memory<long long>();  // kIndexWarps
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t per_block = int64_t{kGroups} * s.units_per_group;
  int64_t total = 0;
  for (int64_t p = 0; p < s.panels; ++p) {
    total = (total + per_block - 1) / per_block * per_block;
    if (threadIdx.x == 0) index.first[p] = total;
    int64_t* chunks = index.of_chunk + p * s.row_chunks;
    for (int64_t base = 0; base < s.row_chunks; base += kIndexThreads) {
      const int64_t i = base + threadIdx.x;
      const long long mine = i < s.row_chunks ? chunks[i] : 0;
      long long sum = mine;
      for (int o = 1; o < 32; o *= 2) {
        const long long other = __shfl_up_sync(kAllLanes, sum, o);
        if (lane >= o) sum += other;
      }
      if (lane == 31) sums[warp] = sum;
      __syncthreads();
      long long before = total + sum - mine;
      for (int w = 0; w < kIndexWarps; ++w) {
        if (w < warp) before += sums[w];
        total += sums[w];
      }
      if (i < s.row_chunks) chunks[i] = before;
      __syncthreads();
    }
    if (threadIdx.x == 0) index.end[p] = total;
  }
  if (threadIdx.x == 0) index.first[s.panels] = (total + per_block - 1) / per_block * per_block;
}

// A lane writes the units of a row.
__global__ void fill_kernel(BitMatrix bits, SampledShape s, SampledIndex index) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kIndexWarps;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kIndexWarps + threadIdx.x / 32;
       i < s.panels * s.row_chunks; i += step) {
    const int64_t panel = i / s.row_chunks, row = (i - panel * s.row_chunks) * 32 + lane;
    const RowWords words = row_words(bits, s, panel, row);
    const unsigned units = count_units(words);
    unsigned before = units;
    for (int o = 1; o < 32; o *= 2) {
      const unsigned other = __shfl_up_sync(kAllLanes, before, static_cast<unsigned>(o));
      if (lane >= o) before += other;
    }
    int64_t unit = index.of_chunk[i] + before - units;
    // The last eight columns, the latest in the highest bits.
    uint64_t low = 0, high = 0;
    int held = 0;
    const auto push = [&](uint32_t column) {
      low = low >> 16 | high << 48;
      high = high >> 16 | static_cast<uint64_t>(column) << 48;
      if (++held < kSampledUnit) return;
      held = 0;
      if (unit >= s.units) return;  // more bits than entries: bounds that overlap, reported before
      index.row[unit] = static_cast<int32_t>(row);
      index.columns[unit++] =
          make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32),
                     static_cast<uint32_t>(high), static_cast<uint32_t>(high >> 32));
    };
    for (int w = 0; w < words.count; ++w) {
      for (uint32_t left = words.at[w]; left != 0; left &= left - 1) {
        push(static_cast<uint32_t>(32 * w + __ffs(static_cast<int>(left)) - 1));
      }
    }
    while (held != 0) push(static_cast<uint32_t>(high >> 48));
  }
}

// A block: kSampledSlice batch entries by 32 columns, through shared memory.
__global__ void slices_kernel(SlicesArgs a, int64_t column_tiles) {
  constexpr int kPitch = 33;
  float* tile = shared_memory<float>();
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  const int64_t slice = blockIdx.x / column_tiles;
  const int64_t first = (blockIdx.x - slice * column_tiles) * 32, column = first + lane;
  for (int n = warp; n < kSampledSlice; n += kIndexWarps) {
    const int64_t at = slice * kSampledSlice + n;
    tile[n * kPitch + lane] = column < a.columns && at < a.batch
                                  ? a.from[at * a.batch_stride + column * a.column_stride]
                                  : 0.0f;
  }
  __syncthreads();
  for (int c = warp; c < 32 && first + c < a.columns; c += kIndexWarps) {
    float* to = a.to + (slice * a.columns + first + c) * kSampledSlice;
    to[lane] = tile[lane * kPitch + c];
    to[lane + 32] = tile[(lane + 32) * kPitch + c];
  }
}

// A lane's part of one sum: four batch entries, and four that lie 32 further.
__device__ __forceinline__ float multiply(const char* column, const float4& g, const float4& h) {
  const float4 x = *reinterpret_cast<const float4*>(column);
  const float4 y = *reinterpret_cast<const float4*>(column + kColumnBytes / 2);
  float sum = g.x * x.x;
  sum += g.y * x.y;
  sum += g.z * x.z;
  sum += g.w * x.w;
  sum += h.x * y.x;
  sum += h.y * y.y;
  sum += h.z * y.z;
  sum += h.w * y.w;
  return sum;
}

// Two sums over the lanes that differ in `bit`: a where the bit is 0, b where it is 1.
__device__ __forceinline__ float combine(float a, float b, int bit) {
  const bool upper = (static_cast<int>(threadIdx.x) & bit) != 0;
  const float mine = upper ? b : a, other = upper ? a : b;
  return mine + __shfl_xor_sync(kAllLanes, other, bit);
}

// Offsets in bytes of the two columns in a word.
__device__ __forceinline__ uint32_t low_column(uint32_t word) {
  static_assert(kColumnBytes == 256, "a column number is moved up by a byte");
  return __byte_perm(word, 0, 0x4104);
}
__device__ __forceinline__ uint32_t high_column(uint32_t word) {
  return __byte_perm(word, 0, 0x4324);
}

// One slice of a unit: lane i of the group gets the sum of entry i. `panel`: at the lane's place.
__device__ __forceinline__ float multiply_unit(const char* panel, const uint4& columns,
                                               const float4& g, const float4& h) {
  const auto low = [&](uint32_t word) { return multiply(panel + low_column(word), g, h); };
  const auto high = [&](uint32_t word) { return multiply(panel + high_column(word), g, h); };
  const float even = combine(combine(low(columns.x), low(columns.z), 4),
                             combine(low(columns.y), low(columns.w), 4), 2);
  const float odd = combine(combine(high(columns.x), high(columns.z), 4),
                            combine(high(columns.y), high(columns.w), 4), 2);
  return combine(even, odd, 1);
}

// Where a block stands. In shared memory: registers are what the kernel is short of.
struct alignas(16) Stand {
  int64_t first_column;  // of the panel
  int width;             // columns of the panel
  int units;             // of the block; 0: none
};

__device__ Stand find_stand(const SampledArgs& a, int64_t first) {
  const SampledShape& s = a.shape;
  if (first >= a.index.first[s.panels]) return {0, 0, 0};
  int64_t p = 0;  // the last panel that begins here or before
  for (int64_t high = s.panels; high - p > 1;) {
    const int64_t middle = p + (high - p) / 2;
    if (a.index.first[middle] <= first) {
      p = middle;
    } else {
      high = middle;
    }
  }
  const int64_t units = a.index.end[p] - first, most = int64_t{kGroups} * s.units_per_group;
  const int64_t left = s.cols - p * s.panel_cols;
  return {p * s.panel_cols, static_cast<int>(left < s.panel_cols ? left : s.panel_cols),
          static_cast<int>(units < most ? units : most)};
}

// The units of a group, in a block of `units`: the same number for each; some have less, or none.
__device__ __forceinline__ int units_of_group(int units) { return (units + kGroups - 1) / kGroups; }

// f(u, place in the result of the lane's entry of the group's unit u).
template <typename F>
__device__ __forceinline__ void for_each_place(const SampledArgs& a, const volatile Stand& stand,
                                               const F& f) {
  const int group = static_cast<int>(threadIdx.x / kGroupLanes);
  const int units = stand.units, each = units_of_group(units), left = units - group * each;
  const int64_t begin =
      static_cast<int64_t>(blockIdx.x) * kGroups * a.shape.units_per_group + group * each;
  const int32_t* row = a.index.row + begin;
  const auto* column =
      reinterpret_cast<const uint16_t*>(a.index.columns + begin) + threadIdx.x % kGroupLanes;
  float* out = a.out + stand.first_column;
#pragma unroll
  for (int u = 0; u < kMostUnits; ++u) {
    if (u < each && u < left) f(u, out + row[u] * a.shape.cols + column[u * kSampledUnit]);
  }
}

// Moves the first sum behind the others. Registers have no index at run time, and a loop unrolled
// over all sums leaves the compiler without registers.
__device__ __forceinline__ void turn(float (&sum)[kMostUnits]) {
  const float first = sum[0];
#pragma unroll
  for (int i = 1; i < kMostUnits; ++i) sum[i - 1] = sum[i];
  sum[kMostUnits - 1] = first;
}

// A block: kGroups * units_per_group units of one panel.
__global__ void __launch_bounds__(kThreads, 2) product_kernel(SampledArgs a) {
  char* memory = shared_memory<char>();
  Stand& stand = *reinterpret_cast<Stand*>(memory);
  char* panel = memory + kStandBytes;
  const SampledShape& s = a.shape;
  const int first = static_cast<int>(blockIdx.x) * kGroups * s.units_per_group;
  if (threadIdx.x == 0) stand = find_stand(a, first);
  __syncthreads();
  const int units = units_of_group(stand.units);
  if (units == 0) return;

  float sum[kMostUnits] = {};
  if (a.more) for_each_place(a, stand, [&](int u, const float* at) { sum[u] = *at; });
  const int begin = first + static_cast<int>(threadIdx.x / kGroupLanes) * units;
  const int lane_place = static_cast<int>(threadIdx.x % kGroupLanes) * 16;
  const float* grad = a.grad + lane_place / 4;
  const int slices = static_cast<int>(a.slices), rows = static_cast<int>(s.rows);
  for (int slice = 0; slice < slices; ++slice) {
    const float* from = a.x + (slice * s.cols + stand.first_column) * kSampledSlice;
    const int pieces = stand.width * (kColumnBytes / 16);
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < pieces; i += kThreads) {
      copy_async<16>(panel + 16 * i, from + 4 * i);
    }
    commit_copies();
    wait_for_copies<0>();
    __syncthreads();
    int32_t row = -1;
    float4 g{}, h{};
#pragma unroll 1
    for (int u = 0; u < kMostUnits; ++u) {
      if (u < units) {
        // Those past the last unit are zeros: all lanes meet in the shuffles.
        const uint4 columns = __ldg(a.index.columns + begin + u);
        const int32_t r = __ldg(a.index.row + begin + u);
        if (r != row) {
          row = r;
          const float* g_row = grad + int64_t{kSampledSlice} * (slice * rows + r);
          g = __ldg(reinterpret_cast<const float4*>(g_row));
          h = __ldg(reinterpret_cast<const float4*>(g_row + kSampledSlice / 2));
        }
        sum[0] += multiply_unit(panel + lane_place, columns, g, h);
      }
      turn(sum);
    }
    __syncthreads();
  }
  // The entries that fill a unit up are its last one: the same value to the same place.
  for_each_place(a, stand, [&](int u, float* at) { *at = sum[u]; });
}

int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

SampledShape sampled_shape(int64_t rows, int64_t cols, int64_t nnz, const DeviceLimits& limits) {
  SampledShape s{};
  s.rows = rows;
  s.cols = cols;
  s.row_chunks = up(rows, 32);
  // As many entries to a block as still give every multiprocessor two: they share a panel.
  const int64_t group_entries = int64_t{kGroups} * kSampledUnit;
  const int64_t wanted = up(nnz, 2 * group_entries * limits.multiprocessors);
  s.units_per_group = static_cast<int>(wanted < 1            ? 1
                                       : wanted > kMostUnits ? int64_t{kMostUnits}
                                                             : wanted);
  // A block's entries lie in about as many rows as columns where that is least to read; more
  // columns, as rows then fill their last units better. Two blocks to a multiprocessor, each with a
  // kilobyte that the system takes.
  const int64_t most = (limits.shared_bytes / 2 - 1024 - kStandBytes) / kColumnBytes / 32 * 32;
  const int64_t needed = up(cols < 1 ? 1 : cols, 32) * 32;
  const double area = static_cast<double>(group_entries * s.units_per_group) *
                      static_cast<double>(rows) * static_cast<double>(cols) /
                      static_cast<double>(nnz < 1 ? 1 : nnz);
  int64_t panel = 64;
  while (panel < most && static_cast<double>(panel) * static_cast<double>(panel) < 2.0 * area) {
    panel += 32;
  }
  s.panel_cols = static_cast<int>(panel < needed ? panel : needed);
  s.panels = up(cols, s.panel_cols);
  const int64_t segments = s.panels * rows < nnz ? s.panels * rows : nnz;
  const int64_t per_block = kGroups * s.units_per_group;
  s.blocks = (nnz + (kSampledUnit - 1) * segments) / kSampledUnit / per_block + s.panels;
  s.units = s.blocks * per_block;
  return s;
}

cudaError_t build_sampled_index(const BitMatrix& bits, const SampledShape& s,
                                const SampledIndex& index, const DeviceLimits& limits,
                                cudaStream_t stream) {
  const int64_t wanted = up(s.panels * s.row_chunks, kIndexWarps);
  if (wanted == 0) return cudaSuccess;
  const int64_t most = int64_t{16} * limits.multiprocessors;
  const dim3 grid(static_cast<unsigned>(wanted < most ? wanted : most));
  cudaError_t error =
      cudaMemsetAsync(index.row, 0, static_cast<size_t>(s.units) * sizeof(int32_t), stream);
  if (error != cudaSuccess) return error;
  error = cudaMemsetAsync(index.columns, 0, static_cast<size_t>(s.units) * sizeof(uint4), stream);
  if (error != cudaSuccess) return error;
  error = launch(count_kernel, grid, dim3(kIndexThreads), 0, stream, bits, s, index);
  if (error != cudaSuccess) return error;
  error = launch(place_kernel, dim3(1), dim3(kIndexThreads), kIndexWarps * sizeof(long long),
                 stream, s, index);
  if (error != cudaSuccess) return error;
  return launch(fill_kernel, grid, dim3(kIndexThreads), 0, stream, bits, s, index);
}

cudaError_t write_slices(const SlicesArgs& a, cudaStream_t stream) {
  const int64_t tiles = up(a.columns, 32), slices = sampled_slices(a.batch);
  if (tiles == 0 || slices == 0) return cudaSuccess;
  if (slices > 2147483647 / tiles) return cudaErrorInvalidValue;
  return launch(slices_kernel, dim3(static_cast<unsigned>(slices * tiles)), dim3(kIndexThreads),
                size_t{kSampledSlice} * 33 * sizeof(float), stream, a, tiles);
}

cudaError_t sampled_weight_grad(const SampledArgs& a, cudaStream_t stream) {
  if (a.shape.rows == 0 || a.shape.cols == 0 || a.slices == 0) return cudaSuccess;
  if (a.shape.units > 2147483647 || a.slices > 2147483647 / a.shape.rows) {
    return cudaErrorInvalidValue;
  }
  return launch(product_kernel, dim3(static_cast<unsigned>(a.shape.blocks)), dim3(kThreads),
                kStandBytes + static_cast<size_t>(a.shape.panel_cols) * kColumnBytes, stream, a);
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
