#include "ops/masked_linear_forms.h"

#include <cstring>
#include <mutex>

namespace fastprune {

#if defined(__x86_64__)

namespace {

// A panel of 512 columns takes 32 KB. Rows that would find few groups in it get blocks of 1024,
// which spill to the L2 cache but fill fewer groups up with zeros.
constexpr int kWidthShift = 9, kWideShift = 10;
constexpr double kWideBelowDensity = 0.03;

int pairs_shift(const PatternView& p) {
  const double density =
      static_cast<double>(p.nnz) / static_cast<double>(p.rows) / static_cast<double>(p.depth);
  return density < kWideBelowDensity ? kWideShift : kWidthShift;
}

std::shared_ptr<BitmapWeight> bitmap_of(const PatternView& forward, DType dtype) {
  auto made = std::make_shared<BitmapWeight>();
  BitmapView& v = made->view;
  v.rows = forward.rows;
  v.cols = forward.depth;
  v.dtype = dtype;
  const auto masks = std::make_shared<const Scratch>(v.mask_bytes());
  const auto start = std::make_shared<const Scratch>((v.groups() + 1) * 8);
  FASTPRUNE_PICK_AVX512(bitmap_index)
  (forward, dtype, masks->as<void>(), start->as<int64_t>());
  v.masks = masks->as<void>();
  v.start = start->as<int64_t>();
  made->masks = masks;
  made->start = start;
  return made;
}

std::shared_ptr<PairsWeight> pairs_of(const PatternView& forward, bool transposed) {
  auto made = std::make_shared<PairsWeight>();
  PairsView& v = made->view;
  v.rows = transposed ? forward.depth : forward.rows;
  v.cols = transposed ? forward.rows : forward.depth;
  v.width_shift = pairs_shift(forward);
  const int64_t places = v.blocks() * v.rows;
  const auto group_ptr = std::make_shared<const Scratch>((places + 1) * 8);
  const auto row_at = std::make_shared<const Scratch>(places * 4);
  const Scratch cursor(places * 8);
  const PairsIndex index{group_ptr->as<int64_t>(), row_at->as<int32_t>(), cursor.as<int64_t>()};
  const int64_t groups = avx512_bf16::pairs_bounds(forward, transposed, v, index);
  const auto entries = std::make_shared<const Scratch>(groups * kPairsStride * 2);
  avx512_bf16::pairs_entries(forward, transposed, v, index, entries->as<uint16_t>());
  v.group_ptr = index.group_ptr;
  v.row_at = index.row_at;
  v.entries = entries->as<uint16_t>();
  int64_t before = 0;
  for (int64_t row = 0; row < v.rows;) {
    const int64_t end = row + kRowWindow < v.rows ? row + kRowWindow : v.rows;
    for (int64_t b = 0; b < v.blocks(); ++b) {
      before += v.group_ptr[b * v.rows + end] - v.group_ptr[b * v.rows + row];
    }
    made->windows.push_back(end, before);
    row = end;
  }
  made->group_ptr = group_ptr;
  made->row_at = row_at;
  made->entries = entries;
  return made;
}

}  // namespace

int64_t pairs_width(const PatternView& forward) { return int64_t{1} << pairs_shift(forward); }

std::shared_ptr<const BitmapWeight> LinearForms::read_bitmap(const PatternView& forward,
                                                             DType dtype, const void* weight) {
  if (bitmap_index_ == nullptr || bitmap_index_->view.dtype != dtype) {
    bitmap_index_ = bitmap_of(forward, dtype);
  }
  auto made = std::make_shared<BitmapWeight>(*bitmap_index_);
  const BitmapView& v = made->view;
  // The last expanding load is as wide as a vector.
  const auto values = std::make_shared<const Scratch>(made->value_bytes() + 64);
  std::mutex mutex;
  for_each_range(v.groups(), 0, [&](int64_t begin, int64_t end, void*) {
    const Magnitudes here =
        FASTPRUNE_PICK_AVX512(bitmap_values)(v, weight, values->as<void>(), begin, end);
    const std::lock_guard<std::mutex> lock(mutex);
    made->magnitudes.merge(here);
  });
  made->view.values = values->as<void>();
  made->values = values;
  return made;
}

std::shared_ptr<const PairsWeight> LinearForms::read_pairs(const PatternView& forward,
                                                           bool transposed, const void* weight) {
  auto& index = pairs_index_[transposed];
  if (index == nullptr) index = pairs_of(forward, transposed);
  auto made = std::make_shared<PairsWeight>(*index);
  const PairsView& v = made->view;
  const auto entries = std::make_shared<const Scratch>(made->entry_bytes());
  const WeightStrides strides =
      transposed ? WeightStrides{1, forward.depth} : WeightStrides{forward.depth, 1};
  std::mutex mutex;
  made->smallest = ~uint32_t{0};
  for_each_range(v.blocks() * v.rows, 0, [&](int64_t begin, int64_t end, void*) {
    const uint32_t here =
        avx512_bf16::pairs_values(v, weight, strides, entries->as<uint16_t>(), begin, end);
    const std::lock_guard<std::mutex> lock(mutex);
    made->smallest = here < made->smallest ? here : made->smallest;
  });
  made->view.entries = entries->as<uint16_t>();
  made->entries = entries;
  return made;
}

#else

std::shared_ptr<const BitmapWeight> LinearForms::read_bitmap(const PatternView&, DType,
                                                             const void*) {
  return nullptr;
}
std::shared_ptr<const PairsWeight> LinearForms::read_pairs(const PatternView&, bool, const void*) {
  return nullptr;
}

#endif

int64_t BitmapWeight::value_bytes() const {
  return view.start[view.groups()] * (view.dtype == DType::f32 ? 4 : 2);
}

bool BitmapWeight::same_values(const BitmapWeight& other) const {
  return std::memcmp(view.values, other.view.values, static_cast<size_t>(value_bytes())) == 0;
}

int64_t PairsWeight::entry_bytes() const {
  return view.group_ptr[view.blocks() * view.rows] * kPairsStride * 2;
}

bool PairsWeight::same_values(const PairsWeight& other) const {
  return std::memcmp(view.entries, other.view.entries, static_cast<size_t>(entry_bytes())) == 0;
}

void LinearForms::keep(bool transposed, std::shared_ptr<const PairsWeight> form) {
  pairs_[transposed] = pairs_index_[transposed] = std::move(form);
}

void LinearForms::forget_values() {
  bitmap_ = nullptr;
  for (auto& kept : pairs_) kept = nullptr;
}

int64_t LinearForms::bytes() const {
  int64_t total = 0;
  if (bitmap_index_ != nullptr) {
    const BitmapView& v = bitmap_index_->view;
    total += v.mask_bytes() + (v.groups() + 1) * 8;
  }
  if (bitmap_ != nullptr) total += bitmap_->value_bytes();
  for (const auto& index : pairs_index_) {
    if (index == nullptr) continue;
    total += index->view.blocks() * index->view.rows * 12 + 8 + index->entry_bytes();
  }
  return total;
}

}  // namespace fastprune
