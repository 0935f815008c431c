#include "kernels/cuda/masked_linear_bitmap.h"

#include "kernels/cuda/exact.cuh"
#include "kernels/cuda/tiles.cuh"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr int64_t kTargetBlocks = 264;  // two for each of 132 multiprocessors
constexpr int64_t kLeastCols = 256;     // of a split
constexpr int64_t kMostGroups = 32;     // of a split: a lane knows where each ends

// Blocks: (kWarps bands) x (splits of the groups) x (8 NT activation rows). Writes partial sums,
// [split][band row][activation row]; blocks of the first bands also look for what is not finite.
template <typename T, int NT>
__global__ void __launch_bounds__(kThreads, 2)
    product_kernel(TilesView w, int64_t bands, int64_t groups, const char* values, const T* x,
                   int64_t batch, uint32_t ring_bytes, float* partial, uint32_t* flags) {
  using S = Stages<NT>;
  constexpr int kPerPiece = 16 / static_cast<int>(sizeof(T));
  constexpr int kGroupCols = kRowBytes / static_cast<int>(sizeof(T));
  // Threads across the columns of a stage of x, and rows that the block copies at a time.
  constexpr int kAcross = kRowBytes / 16, kRowStep = kThreads / kAcross;
  const int lane = static_cast<int>(threadIdx.x % 32), warp = static_cast<int>(threadIdx.x / 32);
  char* xs = shared_memory<char>();
  auto* places = reinterpret_cast<uint2*>(xs + S::kXBytes) + warp * kPlaces;
  auto* found = reinterpret_cast<uint32_t*>(xs + S::kXBytes + S::kPlaceBytes);
  char* ring = xs + S::kFixedBytes + warp * static_cast<int>(ring_bytes);
  const int64_t band = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  const int64_t read_band = band < bands ? band : bands - 1;  // one too many does as the last one
  const int64_t first = groups * blockIdx.y / gridDim.y;
  const int count = static_cast<int>(groups * (blockIdx.y + 1) / gridDim.y - first);
  const int64_t batch_begin = static_cast<int64_t>(blockIdx.z) * S::kBatch;
  const bool aligned = w.cols % kPerPiece == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0;
  const bool looks = blockIdx.x == 0;
  if (looks) {
    if (threadIdx.x < S::kBatch) found[threadIdx.x] = 0;
    __syncthreads();
  }
  // This thread's pieces of x: one in every kRowStep rows, from x_row on, which has x_rows left.
  const int x_row = static_cast<int>(threadIdx.x) / kAcross;
  const int x_piece = static_cast<int>(threadIdx.x) % kAcross;
  const int x_rows =
      static_cast<int>(batch - batch_begin < S::kBatch ? batch - batch_begin : S::kBatch) - x_row;
  const T* x_from = x + (batch_begin + x_row) * w.cols + first * kGroupCols + x_piece * kPerPiece;
  int x_left = static_cast<int>(w.cols - first * kGroupCols) - x_piece * kPerPiece;
  const int x_to = x_row * S::kPitch + x_piece * 16;
  // Lane i holds the piece after group i, in pieces from the split's first.
  const int64_t* start = w.start + read_band * groups + first;
  const int64_t origin = start[0];
  const auto ends = static_cast<uint32_t>(start[lane < count ? lane + 1 : count] - origin);
  const char* heads_from =
      reinterpret_cast<const char*>(w.heads + (read_band * groups + first) * kHeadWords) +
      lane * 16;
  const char* values_from = values + origin * kPieceBytes + lane * 16;
  // Groups whose copies were started; where the next one's values begin, and where it goes.
  int issued = 0;
  uint32_t begin = 0;
  RingPlace next{0, 0};
  // Bit i: whether, i + 1 fills ago, all groups that were wanted were started.
  uint32_t in_time = 0;
  // Starts the next group's copies, where there is room beside the groups from `read` on. Room is
  // counted in larger units: groups of much the same size then fit into each other's places.
  const auto start_group = [&](uint32_t read) {
    const uint32_t after = __shfl_sync(kAllLanes, ends, issued);
    const uint32_t bytes = (after - begin) * static_cast<uint32_t>(kPieceBytes);
    const uint32_t room = (bytes + kHeadBytes + kRoomBytes - 1) / kRoomBytes * kRoomBytes;
    RingPlace place = next;
    if (place.offset + room > ring_bytes)
      place = RingPlace{0, next.passed + ring_bytes - next.offset};
    if (place.passed + room - read > ring_bytes) return false;
    if (lane == 0) places[issued % kPlaces] = make_uint2(place.offset, place.passed);
    char* to = ring + place.offset + lane * 16;
    if (lane < kHeadBytes / 16) copy_async<16>(to, heads_from);
    // Copies stand together, for before each run of them the compiler puts three instructions.
    const char* from = values_from;
    to += kHeadBytes;
#pragma unroll 1
    for (auto at = static_cast<uint32_t>(lane) * 16; at < bytes; at += 4 * kWarpBytes) {
      copy_async<16>(to, from);
#pragma unroll
      for (uint32_t i = 1; i < 4; ++i) {
        if (at + i * kWarpBytes < bytes) copy_async<16>(to + i * kWarpBytes, from + i * kWarpBytes);
      }
      to += 4 * kWarpBytes;
      from += 4 * kWarpBytes;
    }
    heads_from += kHeadBytes;
    values_from += bytes;
    next = RingPlace{place.offset + room, place.passed + room};
    begin = after;
    ++issued;
    return true;
  };
  // Starts the copies that are wanted while group g is read, which `read` bytes came before.
  const auto fill = [&](int g, int into, uint32_t read) {
    if (g + S::kAhead < count && x_row < S::kBatch) {
      char* to = xs + into * S::kStageBytes + x_to;
      const T* from = x_from;
#pragma unroll
      for (int r = 0; r < S::kBatch; r += kRowStep) {
        if (aligned) {
          copy_async_or_zero<16>(to, from, x_left > 0 && r < x_rows);
        } else {
          copy_piece(from, r < x_rows ? x_left : 0, reinterpret_cast<T*>(to));
        }
        from += kRowStep * w.cols;
        to += kRowStep * S::kPitch;
      }
      x_from += kGroupCols;
      x_left -= kGroupCols;
    }
    const int wanted = g + 1 + S::kAhead < count ? g + 1 + S::kAhead : count;
#pragma unroll 1
    while (issued < wanted && start_group(read)) {
    }
    in_time = in_time << 1 | (issued == wanted ? 1u : 0u);
    commit_copies();
  };
  float sum[2][NT][4] = {};
#pragma unroll 1
  for (int g = -S::kAhead; g < 0; ++g) fill(g, g + S::kAhead, 0);
  int slot = 0;
  for (int g = 0; g < count; ++g) {
    if ((in_time >> (S::kAhead - 1) & 1u) != 0) {
      wait_for_copies<S::kAhead - 1>();
    } else {
      if (issued == g) {  // it did not fit beside the group before
        __syncwarp();
        next.offset = 0;
        start_group(next.passed);
        commit_copies();
      }
      wait_for_copies<0>();
    }
    char* x_stage = xs + slot * S::kStageBytes;
    if (looks && x_row < S::kBatch) {
#pragma unroll
      for (int r = 0; r < S::kBatch; r += kRowStep) {  // what it copied itself
        const uint4 v = *reinterpret_cast<const uint4*>(x_stage + x_to + r * S::kPitch);
        if ((not_finite_bits<T>(v.x) | not_finite_bits<T>(v.y) | not_finite_bits<T>(v.z) |
             not_finite_bits<T>(v.w)) != 0) {
          atomicOr(&found[x_row + r], 1u);
        }
      }
    }
    __syncthreads();  // copies for this group are there; all are done with the group before
    const uint2 place = places[g % kPlaces];
    fill(g, slot == 0 ? S::kCount - 1 : slot - 1, place.y);
    slot = slot + 1 == S::kCount ? 0 : slot + 1;
    const char* mine = ring + place.x;
    uint2 head = *reinterpret_cast<const uint2*>(mine + lane * 8);
    const auto kept = static_cast<uint32_t>(__popc(head.x));
    const uint32_t before = sum_before_lane(kept + static_cast<uint32_t>(__popc(head.y)));
    auto at = shared_address(mine + kHeadBytes + 4 * before);
    auto second = at + 4 * kept;
#pragma unroll 1
    for (int from = 0; from < 8; from += S::kUnrolled) {
      uint32_t b[4];
#pragma unroll
      for (int step = 0; step < S::kUnrolled; ++step) {
        uint32_t a[2][4];
        kept_words(a[0], at, head.x, 4 * step);
        kept_words(a[1], second, head.y, 4 * step);
        if constexpr (NT == 1) {
          if (step % 2 == 0) load_x<T, NT>(b, x_stage, step, 0);
          const int half = step % 2 * 2;
          multiply_step<T>(sum[0][0], a[0], b[half], b[half + 1]);
          multiply_step<T>(sum[1][0], a[1], b[half], b[half + 1]);
        } else {
#pragma unroll
          for (int j = 0; j < NT; j += 2) {
            load_x<T, NT>(b, x_stage, step, j);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              multiply_step<T>(sum[0][j + i], a[0], b[2 * i], b[2 * i + 1]);
              multiply_step<T>(sum[1][j + i], a[1], b[2 * i], b[2 * i + 1]);
            }
          }
        }
      }
      if constexpr (S::kUnrolled < 8) {
        head.x >>= 4 * S::kUnrolled;
        head.y >>= 4 * S::kUnrolled;
        x_stage += 32 * S::kUnrolled;
      }
    }
  }
  wait_for_copies<0>();
  if (band < bands) {
    const int64_t width = static_cast<int64_t>(gridDim.z) * S::kBatch;
    float* to = partial + (blockIdx.y * bands + band) * kBandRows * width + batch_begin +
                lane / 4 * width + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // rows eight apart
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        const float (&c)[4] = sum[i / 2][j];
        *reinterpret_cast<float2*>(to + 8 * i * width + 8 * j) =
            make_float2(c[i % 2 * 2], c[i % 2 * 2 + 1]);
      }
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
                              int64_t splits, int64_t padded_rows, int64_t width, T* y) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t rows = e.transposed ? e.mask.cols : e.mask.rows;
  const int64_t base = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x - lane;
  const int64_t row = base + lane, n0 = 4 * static_cast<int64_t>(blockIdx.y);
  const int64_t read_row = row < rows ? row : 0;
  float sum[4] = {};
  uint4 any = make_uint4(0, 0, 0, 0);
#pragma unroll 8
  for (int64_t s = 0; s < splits; ++s) {  // loads of several splits are under way at once
    const uint4 flag = *reinterpret_cast<const uint4*>(flags + s * width + n0);
    const float4 part =
        *reinterpret_cast<const float4*>(partial + (s * padded_rows + read_row) * width + n0);
    any = make_uint4(any.x | flag.x, any.y | flag.y, any.z | flag.z, any.w | flag.w);
    sum[0] += part.x;
    sum[1] += part.y;
    sum[2] += part.z;
    sum[3] += part.w;
  }
  const uint32_t flagged = (any.x != 0 ? 1u : 0u) | (any.y != 0 ? 2u : 0u) |
                           (any.z != 0 ? 4u : 0u) | (any.w != 0 ? 8u : 0u);
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
  DeviceLimits limits;
  cudaError_t error = device_limits(&limits);
  if (error != cudaSuccess) return error;
  const int ring = Stages<NT>::ring_bytes(limits.shared_bytes);
  error = launch(product_kernel<T, NT>,
                 dim3(static_cast<unsigned>(cut.row_blocks), static_cast<unsigned>(cut.splits),
                      static_cast<unsigned>(cut.batch_blocks)),
                 dim3(kThreads), static_cast<size_t>(Stages<NT>::kFixedBytes + kWarps * ring),
                 stream, w, w.bands(), w.groups(), static_cast<const char*>(a.values),
                 static_cast<const T*>(a.exact.x), a.exact.batch, static_cast<uint32_t>(ring),
                 a.partial, a.flags);
  if (error != cudaSuccess) return error;
  return launch(finish_kernel<T>,
                dim3(static_cast<unsigned>((w.rows + kThreads - 1) / kThreads),
                     static_cast<unsigned>((a.exact.batch + 3) / 4)),
                dim3(kThreads), 0, stream, a.exact, a.finish, a.partial, a.flags, cut.splits,
                w.bands() * kBandRows, cut.batch_blocks * Stages<NT>::kBatch, static_cast<T*>(a.y));
}

template <typename T>
cudaError_t product_of(const TilesArgs& a, cudaStream_t stream) {
  const TilesCut cut = tiles_cut(a.weight, a.exact.batch);
  return cut.columns == 1   ? product<T, 1>(a, cut, stream)
         : cut.columns == 2 ? product<T, 2>(a, cut, stream)
         : cut.columns == 4 ? product<T, 4>(a, cut, stream)
                            : product<T, 8>(a, cut, stream);
}

int ring_for(int columns, int shared_bytes) {
  return columns == 1   ? Stages<1>::ring_bytes(shared_bytes)
         : columns == 2 ? Stages<2>::ring_bytes(shared_bytes)
         : columns == 4 ? Stages<4>::ring_bytes(shared_bytes)
                        : Stages<8>::ring_bytes(shared_bytes);
}

int columns_for(int64_t batch) { return batch <= 8 ? 1 : batch <= 16 ? 2 : batch <= 32 ? 4 : 8; }

}  // namespace

TilesCut tiles_cut(const TilesView& view, int64_t batch) {
  TilesCut cut;
  cut.columns = columns_for(batch);
  cut.row_blocks = (view.bands() + kWarps - 1) / kWarps;
  cut.batch_blocks = (batch + 8 * cut.columns - 1) / (8 * cut.columns);
  // Splits cost a partial sum each; without them few rows leave most of a GPU idle, and the last
  // wave of blocks some of it.
  const int64_t blocks_each = cut.row_blocks * cut.batch_blocks;
  const int64_t least = (view.groups() + kMostGroups - 1) / kMostGroups;
  double best = -1e9;
  cut.splits = least;
  for (int64_t s = least; s <= view.cols / kLeastCols || s == least; ++s) {
    const int64_t waves = (blocks_each * s + kTargetBlocks - 1) / kTargetBlocks;
    const double use =
        static_cast<double>(blocks_each * s) / static_cast<double>(waves * kTargetBlocks);
    const double worth = use - 0.0003 * static_cast<double>(blocks_each * s);
    if (worth > best) {
      best = worth;
      cut.splits = s;
    }
    if (waves > 8) break;
  }
  const int64_t width = cut.batch_blocks * 8 * cut.columns;
  cut.partials = cut.splits * view.bands() * kBandRows * width;
  cut.flags = cut.splits * width;
  return cut;
}

bool tiles_fit(DType dtype, int64_t batch, const DeviceLimits& limits) {
  if (dtype == DType::f64 || batch > kTilesMaxBatch) return false;
  return ring_for(columns_for(batch), limits.shared_bytes) >= kLeastRing;
}

cudaError_t tiles_product(const TilesArgs& args, cudaStream_t stream) {
  if (args.dtype == DType::f32) return product_of<float>(args, stream);
  return args.dtype == DType::bf16 ? product_of<BFloat16>(args, stream)
                                   : product_of<Float16>(args, stream);
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
