// The convolutional monotone network with few weights, solved in space by forward-backward.
//
// The border of z is zero, so that nothing that wraps around ever reaches the interior: there
// W z = diagonal z - g A^T A z + K z with ordinary convolutions of the interior, zero outside.
#include "kernels/cpu/mon_direct.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "ops/conv_products.h"
#include "ops/layout.h"
#include "ops/mon_activation.h"
#include "ops/mon_iterations.h"
#include "ops/mon_splitting.h"

namespace fastprune {
namespace {

using IntList = torch::headeronly::IntHeaderOnlyArrayRef;
constexpr const char* kOp = "mon_splitting_direct";

struct Sizes {
  DType dtype;
  int64_t batch, channels, height, width, ring;  // of whole maps
  int64_t inner_height() const { return std::max<int64_t>(height - 2 * ring, 0); }
  int64_t inner_width() const { return std::max<int64_t>(width - 2 * ring, 0); }
  int64_t taps() const { return (2 * ring + 1) * (2 * ring + 1); }
};

// The interior of whole maps, or whole maps of an interior with zeros around it.
Tensor copy_interior(const Tensor& from, const Sizes& s, bool crop) {
  const int64_t h = crop ? s.inner_height() : s.height, w = crop ? s.inner_width() : s.width;
  Tensor to = new_activations(from, s.batch, s.channels, h, w, false);
  const int64_t element = from.element_size();
  const int64_t whole = s.height * s.width * element;
  const int64_t inner = s.inner_height() * s.inner_width() * element;
  const int64_t run = s.inner_width() * element, corner = (s.ring * s.width + s.ring) * element;
  const char* source = static_cast<const char*>(from.const_data_ptr());
  char* target = static_cast<char*>(to.mutable_data_ptr());
  for_each_range(s.batch * s.channels, 0, [&](int64_t begin, int64_t end, void*) {
    for (int64_t p = begin; p < end; ++p) {
      if (!crop) std::memset(target + p * whole, 0, static_cast<size_t>(whole));
      for (int64_t y = 0; y < s.inner_height(); ++y) {
        const int64_t outside = p * whole + corner + y * s.width * element;
        const int64_t inside = p * inner + y * run;
        std::memcpy(target + (crop ? inside : outside), source + (crop ? outside : inside),
                    static_cast<size_t>(run));
      }
    }
  });
  return to;
}

// One of the three convolutions, all of n to n channels: of the batch innermost, or of one image.
MaskedConv2dCall convolution(const Sizes& s, const PatternShape& shape, int64_t padding,
                             bool last) {
  const int64_t k = 2 * s.ring + 1, grown = 2 * padding - 2 * s.ring;
  MaskedConv2dCall c{};
  c.shape = shape;
  c.geometry = ConvGeometry{{1, 1}, {padding, padding}, {1, 1}, 1};
  c.dtype = s.dtype;
  c.batch = last ? s.batch : 1, c.channels = s.channels;
  c.height = s.inner_height(), c.width = s.inner_width();
  c.kernel_height = c.kernel_width = k;
  c.out_height = c.height + grown, c.out_width = c.width + grown;
  return c;
}

struct Products {
  std::unique_ptr<ConvProduct> down, up, single;
  bool all_last() const {
    for (const auto* p : {&down, &up, &single}) {
      if (*p != nullptr && !(*p)->batch_last()) return false;
    }
    return true;
  }
};

class DirectSolve {
 public:
  // interior, contiguous: b or g, and J.
  DirectSolve(const Sizes& sizes, const Tensor& bias, const std::optional<Tensor>& slope,
              Products products, MonActivation activation, double diagonal, double alpha, bool last)
      : sizes_(sizes), products_(std::move(products)), last_(last), bias_(bias) {
    const int64_t points = sizes.inner_height() * sizes.inner_width();
    if (last_) bias_ = copy_in_layout(bias, true, kOp);
    MonDirectMaps& m = maps_;
    m.dtype = sizes.dtype;
    m.activation = activation;
    m.alpha = alpha, m.diagonal = diagonal;
    m.rows = last_ ? points : 1, m.width = last_ ? sizes.batch : points;
    m.batch_last = last_;
    m.per_sample = sizes.channels;
    items_ = last_ ? sizes.channels : sizes.channels * sizes.batch;
    element_ = bias.element_size();
    const int64_t bytes = sizes.batch * sizes.channels * points * element_;
    z_ = torch::stable::empty_like(bias_);
    value_ = torch::stable::empty_like(bias_);
    std::memset(z_->mutable_data_ptr(), 0, static_cast<size_t>(bytes));
    m.z = z_->mutable_data_ptr();
    blocks_ = last_ ? 1 : sizes.batch;
    block_bytes_ = bytes / blocks_;
    workers_ = std::min(blocks_, thread_count());
    if (products_.down != nullptr) {
      between_bytes_ = sizes.height * sizes.width * sizes.channels * element_;
      if (last_) between_bytes_ *= sizes.batch;
      between_ = std::make_unique<Scratch>(checked_product(between_bytes_, workers_, kOp));
    }
    if (slope.has_value()) {
      slope_ = last_ ? copy_in_layout(*slope, true, kOp) : *slope;
      scale_ = torch::stable::empty_like(*slope_);
      const void* from = slope_->const_data_ptr();
      void* to = scale_->mutable_data_ptr();
      for_each_range(bytes / element_, 0, [&](int64_t begin, int64_t end, void*) {
        FASTPRUNE_PICK(mon_direct_scale)(m.dtype, alpha, from, to, begin, end);
      });
      m.slope = to;
    }
    active_.assign(static_cast<size_t>(sizes.batch * element_), 0xff);
    m.active = active_.data();
    sums_.assign(static_cast<size_t>(items_ * m.sums_per_item()), 0.0);
    m.sums = sums_.data();
  }

  void run(double tol, int64_t max_iter, bool per_sample, int64_t* iterations, double* residuals) {
    const int64_t count = per_sample ? sizes_.batch : 1;
    std::vector<uint8_t> moving(static_cast<size_t>(count), 1);
    std::vector<double> norms(static_cast<size_t>(2 * count));
    int64_t left = count;
    for (int64_t i = 1; i <= max_iter && left > 0; ++i) {
      const bool first = i == 1;  // W 0 = 0
      each_block([&](int64_t block, std::optional<int64_t> worker) {
        if (at_rest(block)) return;
        if (!first) multiply(block, worker);
        const void* value = first ? bias_.const_data_ptr() : value_->const_data_ptr();
        items_of(block, worker, [&](int64_t begin, int64_t end) {
          FASTPRUNE_PICK(mon_direct_step)(maps_, value, begin, end);
        });
      });
      add_up(per_sample, norms);
      for (int64_t s = 0; s < count; ++s) {
        const auto at = static_cast<size_t>(s);
        if (moving[at] == 0) continue;
        iterations[s] = i;
        residuals[s] = relative_residual(norms[2 * at], norms[2 * at + 1]);
        if (residuals[s] > tol && std::isfinite(residuals[s])) continue;
        moving[at] = 0;
        --left;
        if (per_sample) {
          std::memset(active_.data() + s * element_, 0, static_cast<size_t>(element_));
        }
      }
    }
  }

  // One more application; the results as whole maps.
  std::tuple<Tensor, Tensor> finish() {
    if (slope_.has_value()) maps_.slope = slope_->const_data_ptr();
    void* value = value_->mutable_data_ptr();
    each_block([&](int64_t block, std::optional<int64_t> worker) {
      multiply(block, worker);
      items_of(block, worker, [&](int64_t begin, int64_t end) {
        FASTPRUNE_PICK(mon_direct_finish)(maps_, value, begin, end);
      });
    });
    const auto whole = [&](const Tensor& t) {
      return copy_interior(last_ ? copy_in_layout(t, false, kOp) : t, sizes_, false);
    };
    return {whole(*value_), whole(*z_)};
  }

 private:
  // f(block, worker): one thread per image where there are enough, else all threads on each. A
  // block's maps stay in the cache from product to product.
  template <typename F>
  void each_block(const F& f) const {
    if (workers_ < thread_count() || workers_ == 1) {
      for (int64_t b = 0; b < blocks_; ++b) f(b, std::nullopt);
      return;
    }
    for_each_range(workers_, 0, [&](int64_t first, int64_t end, void*) {
      for (int64_t w = first; w < end; ++w) {
        for (int64_t b = blocks_ * w / workers_; b < blocks_ * (w + 1) / workers_; ++b) f(b, w);
      }
    });
  }
  template <typename F>
  void items_of(int64_t block, std::optional<int64_t> worker, const F& f) const {
    const int64_t count = items_ / blocks_, first = block * count;
    if (worker.has_value()) return f(first, first + count);
    for_each_range(count, 0,
                   [&](int64_t begin, int64_t end, void*) { f(first + begin, first + end); });
  }
  bool at_rest(int64_t block) const {
    return !last_ && active_[static_cast<size_t>(block * element_)] == 0;
  }
  // value = b - g A^T A z + K z.
  void multiply(int64_t block, std::optional<int64_t> worker) const {
    const auto part = [&](const Tensor& t) {
      return static_cast<char*>(t.mutable_data_ptr()) + block * block_bytes_;
    };
    const void* sum = part(bias_);
    const void* z = part(*z_);
    void* value = part(*value_);
    if (products_.single != nullptr) {
      products_.single->run(z, value, sum, worker);
      sum = value;
    }
    if (products_.down != nullptr) {
      char* between = between_->as<char>() + worker.value_or(0) * between_bytes_;
      products_.down->run(z, between, nullptr, worker);
      products_.up->run(between, value, sum, worker);
      sum = value;
    }
    if (sum != value) std::memcpy(value, sum, static_cast<size_t>(block_bytes_));
  }
  // Items in order: the same sums for any number of threads.
  void add_up(bool per_sample, std::vector<double>& norms) const {
    std::fill(norms.begin(), norms.end(), 0.0);
    const int64_t width = last_ ? sizes_.batch : 1;
    for (int64_t item = 0; item < items_; ++item) {
      const double* from = sums_.data() + item * 2 * width;
      for (int64_t j = 0; j < width; ++j) {
        const int64_t sample = last_ ? j : item / sizes_.channels;
        double* to = norms.data() + (per_sample ? 2 * sample : 0);
        to[0] += from[j];
        to[1] += from[width + j];
      }
    }
  }

  const Sizes sizes_;
  const Products products_;
  const bool last_;
  Tensor bias_;
  std::optional<Tensor> slope_, scale_, z_, value_;
  std::unique_ptr<Scratch> between_;  // A z, on whole maps
  std::vector<uint8_t> active_;
  std::vector<double> sums_;
  MonDirectMaps maps_{};
  int64_t items_ = 0, element_ = 4;
  // With the batch innermost there is one block, else one per image.
  int64_t blocks_ = 1, block_bytes_ = 0, between_bytes_ = 0, workers_ = 1;
};

// Lanes that the batch leaves empty cost as much as the others, and maps of all images that leave
// the cache more than lanes that a narrow image leaves empty.
bool fills_lanes(const Sizes& s) {
  constexpr int64_t kMostBytes = int64_t{2} << 20;
  const int64_t lanes = FASTPRUNE_PICK(mon_direct_lanes)(s.dtype);
  const int64_t taken = (s.batch + lanes - 1) / lanes * lanes;
  const int64_t points = s.inner_height() * s.inner_width();
  const int64_t bytes = s.batch * s.channels * points * (s.dtype == DType::f64 ? 8 : 4);
  return s.batch > 1 && 5 * s.batch >= 3 * taken && points > 1 && bytes <= kMostBytes;
}

Tensor checked_values(const Tensor& t, const PatternView& pattern, const Tensor& bias,
                      const char* name) {
  check_cpu(t, kOp, name);
  check_dtype(t, bias.scalar_type(), kOp, name);
  check_dim(t, 1, kOp, name);
  check_size(t, 0, pattern.nnz, kOp, name);
  return dense(t);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mon_splitting_direct_cpu(
    const Tensor& bias_in, const std::optional<Tensor>& slope_in, const std::vector<Tensor>& pair,
    const std::vector<Tensor>& single, IntList blocks, double diagonal, int64_t ring,
    std::string activation_name, double alpha, double tol, int64_t max_iter, bool per_sample) {
  check_cpu(bias_in, kOp, "bias");
  Sizes s{};
  s.dtype = dtype_of(bias_in, kOp, "bias");
  STD_TORCH_CHECK(s.dtype == DType::f32 || s.dtype == DType::f64, kOp,
                  ": bias: expected float32 or float64, got dtype ",
                  torch::headeronly::toString(bias_in.scalar_type()));
  check_dim(bias_in, 4, kOp, "bias");
  s.batch = bias_in.size(0), s.channels = bias_in.size(1);
  s.height = bias_in.size(2), s.width = bias_in.size(3);
  STD_TORCH_CHECK(ring >= 0 && ring <= 90, kOp, ": ring: expected 0 to 90, got ", ring);
  s.ring = ring;
  if (slope_in.has_value()) {
    check_cpu(*slope_in, kOp, "slope");
    check_dtype(*slope_in, bias_in.scalar_type(), kOp, "slope");
    check_dim(*slope_in, 4, kOp, "slope");
    for (int64_t i = 0; i < 4; ++i) check_size(*slope_in, i, bias_in.size(i), kOp, "slope");
  }
  STD_TORCH_CHECK(pair.empty() || pair.size() == 6, kOp, ": pair: expected no or 6 tensors, got ",
                  pair.size());
  STD_TORCH_CHECK(single.empty() || single.size() == 3, kOp,
                  ": single: expected no or 3 tensors, got ", single.size());
  STD_TORCH_CHECK(blocks.size() == 3, kOp, ": blocks: expected 3 numbers, got ", blocks.size());
  STD_TORCH_CHECK(std::isfinite(diagonal), kOp, ": diagonal: expected a finite number, got ",
                  diagonal);
  const MonActivation activation = mon_activation_of(activation_name, kOp);
  check_mon_options(alpha, tol, max_iter, kOp);

  const int64_t n = s.channels;
  const PatternShape pair_shape{n, 1, n, s.taps(), blocks[0], blocks[1]};
  const PatternShape single_shape{n, 1, n, s.taps(), blocks[2], blocks[2]};
  std::vector<Tensor> kept;  // what the weights point at
  const auto weight_of = [&](const std::vector<Tensor>& t, size_t first, const PatternShape& shape,
                             bool transposed, const char* name) {
    ConvWeight w{};
    w.pattern = checked_pattern(t[first], t[first + 1], shape, transposed, kOp);
    kept.push_back(checked_values(t[first + 2], w.pattern, bias_in, name));
    w.values = kept.back().const_data_ptr();
    return w;
  };
  ConvWeight down{}, up{}, skew{};
  if (!pair.empty()) {
    down = weight_of(pair, 0, pair_shape, false, "pair[2]");
    up = weight_of(pair, 3, pair_shape, true, "pair[5]");
  }
  if (!single.empty()) skew = weight_of(single, 0, single_shape, false, "single[2]");

  MonVerdict verdict(bias_in, s.batch, per_sample);
  if (s.batch * s.channels * s.inner_height() * s.inner_width() == 0) {
    const Tensor bias = dense(bias_in);
    verdict.nothing_to_do();
    Tensor out = torch::stable::empty_like(bias), z = torch::stable::empty_like(bias);
    for (Tensor* t : {&out, &z}) {
      if (t->numel() > 0) {
        std::memset(t->mutable_data_ptr(), 0, static_cast<size_t>(t->numel() * t->element_size()));
      }
    }
    return {out, z, verdict.iterations, verdict.residual};
  }
  const auto prepare = [&](bool last) {
    Products made;
    if (!pair.empty()) {
      const MaskedConv2dCall c = convolution(s, pair_shape, 2 * s.ring, last);
      made.down = std::make_unique<ConvProduct>(c, down, false, last);
      made.up = std::make_unique<ConvProduct>(c, up, true, last);
    }
    if (!single.empty()) {
      const MaskedConv2dCall c = convolution(s, single_shape, s.ring, last);
      made.single = std::make_unique<ConvProduct>(c, skew, false, last);
    }
    return made;
  };
  bool last = fills_lanes(s);
  Products products = prepare(last);
  if (last && !products.all_last()) {
    last = false;
    products = prepare(false);
  }
  const Tensor bias = copy_interior(dense(bias_in), s, true);
  std::optional<Tensor> slope;
  if (slope_in.has_value()) slope = copy_interior(dense(*slope_in), s, true);
  DirectSolve solve(s, bias, slope, std::move(products), activation, diagonal, alpha, last);
  solve.run(tol, max_iter, per_sample, verdict.counts(), verdict.residuals());
  auto [out, z] = solve.finish();
  return {out, z, verdict.iterations, verdict.residual};
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) {
  m.def(
      "mon_splitting_direct(Tensor bias, Tensor? slope, Tensor[] pair, Tensor[] single, int[] "
      "blocks, float diagonal, int ring, str activation, float alpha, float tol, int max_iter, "
      "bool per_sample) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("mon_splitting_direct", TORCH_BOX(&fastprune::mon_splitting_direct_cpu));
}
