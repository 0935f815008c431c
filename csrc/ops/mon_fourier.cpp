// The convolutional monotone network solved in the Fourier domain.
#include "kernels/cpu/mon_fourier.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "ops/mon_activation.h"
#include "ops/mon_fourier_plan.h"

namespace fastprune {
namespace {

constexpr const char* kOp = "mon_splitting_fourier";

struct Options {
  MonActivation activation;
  int64_t ring;
  double alpha, tol;
  int64_t max_iter;
  bool per_sample;
};

// Images in the lanes, or channels where those fill the lanes better. Costs in vector instructions
// per frequency: of the maps of a pair, and of the products.
MonFourierLayout choose_layout(const Tensor& bias) {
  const DType dtype = dtype_of(bias, kOp, "bias");
  const int64_t lanes = FASTPRUNE_PICK(mon_fourier_lanes)(dtype);
  const int64_t channels = bias.size(1), points = checked_product(bias.size(2), bias.size(3), kOp);
  MonFourierLayout layout{dtype, false, bias.size(0), channels, points, lanes};
  const auto cost = [&layout](double product) {
    const int64_t pairs = (layout.per_block() + 1) / 2;
    return static_cast<double>(layout.blocks()) * (400.0 * static_cast<double>(pairs) + product);
  };
  const double square = static_cast<double>(channels) * static_cast<double>(channels);
  const double by_images = cost(3 * square);
  layout.channel_lanes = true;
  layout.channel_lanes = cost(5 * square / static_cast<double>(lanes)) < by_images;
  return layout;
}

class FourierSolve {
 public:
  FourierSolve(const Tensor& bias, const std::optional<Tensor>& slope, const Tensor& matrix,
               const std::optional<Tensor>& resolvent, const Options& options)
      : options_(options),
        layout_(choose_layout(bias)),
        element_(layout_.dtype == DType::f64 ? 8 : 4),
        pitch_(bias.size(3) | 1),
        row_(bias.size(3), 2, layout_.dtype),
        column_(bias.size(2), 2 * pitch_, layout_.dtype),
        frequencies_(fourier_frequencies(bias.size(2), bias.size(3))),
        matrix_(matrix.const_data_ptr()),
        resolvent_(resolvent.has_value() ? resolvent->const_data_ptr() : nullptr) {
    MonFourierMaps& m = maps_;
    m.dtype = layout_.dtype;
    m.activation = options.activation;
    m.adjoint = slope.has_value();
    m.resolvent = resolvent_ != nullptr;
    m.alpha = options.alpha;
    m.groups = layout_.groups();
    m.per_block = layout_.per_block();
    m.height = bias.size(2), m.width = bias.size(3);
    m.ring = options.ring;
    m.pitch = pitch_;
    m.work = std::max(row_.work(), column_.work());
    m.row = row_.line(), m.column = column_.line();
    const bool keeps_z = mon_fourier_keeps_z(m);
    const int64_t vector = layout_.lanes * element_;
    const int64_t map_bytes =
        checked_product(m.groups, checked_product(layout_.points, vector, kOp), kOp);
    m.spectrum =
        allocate(checked_product(checked_product(frequencies_, m.groups, kOp), 2 * vector, kOp));
    m.bias = allocate(map_bytes);
    m.slope = m.adjoint ? allocate(map_bytes) : m.bias;
    m.u = m.resolvent ? allocate(map_bytes) : m.bias;
    m.z = keeps_z ? allocate(map_bytes) : m.bias;
    z_ = keeps_z ? m.z : m.u;
    if (m.resolvent) clear(m.u, map_bytes);
    if (keeps_z) clear(m.z, map_bytes);
    active_ = allocate(m.groups * vector);
    m.active = active_;
    const int64_t sums = m.groups * 2 * layout_.lanes * 8;
    m.sums = static_cast<double*>(allocate(sums));
    clear(m.sums, sums);
    moves_.assign(static_cast<size_t>(layout_.blocks()), 1);
    move(std::vector<uint8_t>(static_cast<size_t>(layout_.batch), 1));
    products_ = {layout_, m.spectrum, nullptr, moves_.data()};

    const int64_t needs = std::max(FASTPRUNE_PICK(mon_fourier_maps_scratch)(maps_),
                                   FASTPRUNE_PICK(mon_fourier_products_scratch)(products_));
    slot_ = (needs + 63) / 64 * 64;
    threads_ = thread_count();
    scratch_ = static_cast<char*>(allocate(checked_product(slot_, threads_, kOp)));

    from_maps(bias, m.bias, nullptr);
    if (slope.has_value()) from_maps(*slope, m.slope, &options_.alpha);
  }

  // Writes iterations and residuals: of each sample, or of all.
  void run(int64_t* iterations, double* residuals) {
    const int64_t count = options_.per_sample ? layout_.batch : 1;
    std::vector<uint8_t> moving(static_cast<size_t>(count), 1);
    std::vector<double> sums(static_cast<size_t>(2 * count));
    std::fill_n(iterations, count, 0);
    std::fill_n(residuals, count, 0.0);
    // The first product is of zeros, but where a right-hand side is not 0 at the start.
    bool inverse = maps_.resolvent && !maps_.adjoint;
    if (inverse) pass(MonFourierStep::start, false, true);
    int64_t left = count;
    for (int64_t i = 1; i <= options_.max_iter && left > 0; ++i, inverse = true) {
      if (inverse) multiply(maps_.resolvent ? resolvent_ : matrix_);
      // The last right-hand side serves forward-backward only: it is z.
      pass(MonFourierStep::iterate, inverse, !maps_.resolvent || i < options_.max_iter);
      add_up(sums);
      for (int64_t s = 0; s < count; ++s) {
        if (moving[s] == 0) continue;
        iterations[s] = i;
        residuals[s] = std::sqrt(sums[2 * s]) / (1e-6 + std::sqrt(sums[2 * s + 1]));
        if (residuals[s] > options_.tol) continue;  // not so for NaN
        moving[s] = 0;
        --left;
      }
      for (int64_t s = 0; s < count; ++s) {
        if (moving[s] != 0 && std::isinf(residuals[s])) moving[s] = 0, --left;
      }
      if (options_.per_sample && left < count) move(moving);
    }
    std::fill(moves_.begin(), moves_.end(), uint8_t{1});
    if (maps_.resolvent) pass(MonFourierStep::prepare, false, true);
    multiply(matrix_);
  }

  void finish(const std::optional<Tensor>& slope, Tensor& out, Tensor& z) {
    if (slope.has_value() && options_.alpha != 1.0) from_maps(*slope, maps_.slope, nullptr);
    pass(MonFourierStep::finish, true, false);
    to_maps(maps_.bias, out);
    to_maps(z_, z);
  }

 private:
  void* allocate(int64_t bytes) {
    owned_.push_back(std::make_unique<Scratch>(bytes));
    return owned_.back()->as<void>();
  }
  void clear(void* p, int64_t bytes) { std::memset(p, 0, static_cast<size_t>(bytes)); }

  // f(begin, end, scratch); nothing is allocated.
  template <typename F>
  void parallel(int64_t items, const F& f) {
    const int64_t workers = std::min(items, threads_);
    for_each_range(workers, 0, [&](int64_t first, int64_t last, void*) {
      for (int64_t w = first; w < last; ++w) {
        f(items * w / workers, items * (w + 1) / workers, scratch_ + w * slot_);
      }
    });
  }
  void pass(MonFourierStep step, bool inverse, bool forward) {
    parallel(mon_fourier_pairs(maps_), [&](int64_t begin, int64_t end, void* scratch) {
      FASTPRUNE_PICK(mon_fourier_maps)(maps_, step, inverse, forward, begin, end, scratch);
    });
  }
  void multiply(const void* matrix) {
    products_.matrix = matrix;
    parallel(frequencies_, [&](int64_t begin, int64_t end, void* scratch) {
      FASTPRUNE_PICK(mon_fourier_products)(products_, begin, end, scratch);
    });
  }
  void from_maps(const Tensor& t, void* groups, const double* slope_alpha) {
    const void* data = t.const_data_ptr();
    parallel(maps_.groups, [&](int64_t begin, int64_t end, void*) {
      FASTPRUNE_PICK(mon_fourier_from_maps)(layout_, slope_alpha, data, groups, begin, end);
    });
  }
  void to_maps(const void* groups, Tensor& t) {
    void* data = t.mutable_data_ptr();
    parallel(maps_.groups, [&](int64_t begin, int64_t end, void*) {
      FASTPRUNE_PICK(mon_fourier_to_maps)(layout_, groups, data, begin, end);
    });
  }

  // Calls f(sample, group, lane) for all lanes that hold a map, in order.
  template <typename F>
  void each_lane(F f) const {
    for (int64_t g = 0; g < maps_.groups; ++g) {
      const MonFourierLayout::Group group = layout_.group(g);
      for (int64_t lane = 0; lane < group.filled; ++lane) {
        f((group.first + lane * group.step) / layout_.channels, g, lane);
      }
    }
  }
  void add_up(std::vector<double>& sums) const {
    std::fill(sums.begin(), sums.end(), 0.0);
    each_lane([&](int64_t sample, int64_t g, int64_t lane) {
      double* to = sums.data() + (options_.per_sample ? 2 * sample : 0);
      to[0] += maps_.sums[g * 2 * layout_.lanes + lane];
      to[1] += maps_.sums[(g * 2 + 1) * layout_.lanes + lane];
    });
  }
  // The samples that still move; lanes that hold no map never do.
  void move(const std::vector<uint8_t>& moving) {
    std::fill(moves_.begin(), moves_.end(), uint8_t{0});
    char* active = static_cast<char*>(active_);
    std::memset(active, 0, static_cast<size_t>(maps_.groups * layout_.lanes * element_));
    each_lane([&](int64_t sample, int64_t g, int64_t lane) {
      if (moving[static_cast<size_t>(sample)] == 0) return;
      std::memset(active + (g * layout_.lanes + lane) * element_, 0xff,
                  static_cast<size_t>(element_));
      moves_[static_cast<size_t>(g / maps_.per_block)] = 1;
    });
  }

  const Options options_;
  const MonFourierLayout layout_;
  const int64_t element_, pitch_;
  const FourierTables row_, column_;
  const int64_t frequencies_;
  const void *matrix_, *resolvent_;
  std::vector<std::unique_ptr<Scratch>> owned_;
  std::vector<uint8_t> moves_;  // [block]
  MonFourierMaps maps_{};
  MonFourierProducts products_{};
  void *z_ = nullptr, *active_ = nullptr;
  char* scratch_ = nullptr;
  int64_t slot_ = 0, threads_ = 1;
};

void check_like(const Tensor& t, const Tensor& bias, const char* name) {
  check_cpu(t, kOp, name);
  check_dtype(t, bias.scalar_type(), kOp, name);
  check_dim(t, bias.dim(), kOp, name);
  for (int64_t i = 0; i < bias.dim(); ++i) check_size(t, i, bias.size(i), kOp, name);
}
void check_packed(const Tensor& t, const Tensor& bias, const char* name) {
  check_cpu(t, kOp, name);
  check_dtype(t, bias.scalar_type(), kOp, name);
  check_dim(t, 2, kOp, name);
  check_size(t, 0, fourier_frequencies(bias.size(2), bias.size(3)), kOp, name);
  const int64_t channels = bias.size(1);
  check_size(t, 1, checked_product(2 * channels, channels, kOp), kOp, name);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mon_splitting_fourier_cpu(
    const Tensor& bias_in, const std::optional<Tensor>& slope_in, const Tensor& matrix_in,
    const std::optional<Tensor>& resolvent_in, int64_t ring, std::string activation, double alpha,
    double tol, int64_t max_iter, bool per_sample) {
  check_real(bias_in, kOp, "bias");
  check_dim(bias_in, 4, kOp, "bias");
  for (int64_t i = 1; i < 4; ++i) {
    STD_TORCH_CHECK(bias_in.size(i) > 0, kOp, ": bias: expected a size above 0 in dimension ", i);
  }
  const int64_t height = bias_in.size(2), width = bias_in.size(3);
  const int64_t places = checked_product(checked_product(height, width + 1, kOp), 2, kOp);
  STD_TORCH_CHECK(places <= std::numeric_limits<int32_t>::max(), kOp,
                  ": bias: expected maps of fewer than 2^30 points, got ", height, " x ", width);
  for (int64_t length : {height, width}) {
    STD_TORCH_CHECK(FourierTables::largest_odd(length) <= FourierTables::kLargestOdd, kOp,
                    ": bias: expected a height and width without powers of odd primes above ",
                    FourierTables::kLargestOdd, ", got ", length);
  }
  if (slope_in.has_value()) check_like(*slope_in, bias_in, "slope");
  check_packed(matrix_in, bias_in, "matrix");
  if (resolvent_in.has_value()) check_packed(*resolvent_in, bias_in, "resolvent");
  STD_TORCH_CHECK(ring >= 0, kOp, ": ring: expected at least 0, got ", ring);
  STD_TORCH_CHECK(alpha > 0 && std::isfinite(alpha), kOp,
                  ": alpha: expected a finite number above 0, got ", alpha);
  STD_TORCH_CHECK(tol >= 0, kOp, ": tol: expected at least 0, got ", tol);
  STD_TORCH_CHECK(max_iter >= 1, kOp, ": max_iter: expected at least 1, got ", max_iter);
  const Options options{mon_activation_of(activation, kOp), ring, alpha, tol, max_iter, per_sample};

  const auto dense_of = [](const std::optional<Tensor>& t) {
    return t.has_value() ? std::optional<Tensor>(dense(*t)) : std::nullopt;
  };
  const Tensor bias = dense(bias_in), matrix = dense(matrix_in);
  const std::optional<Tensor> slope = dense_of(slope_in), resolvent = dense_of(resolvent_in);
  const int64_t count[1] = {bias.size(0)};
  const auto of_samples = [&](ScalarType kind) {
    return torch::stable::new_empty(bias, {count, per_sample ? size_t{1} : size_t{0}}, kind);
  };
  Tensor out = torch::stable::new_empty(bias, bias.sizes());
  Tensor z = torch::stable::new_empty(bias, bias.sizes());
  Tensor iterations = of_samples(ScalarType::Long), residual = of_samples(ScalarType::Double);
  FourierSolve solve(bias, slope, matrix, resolvent, options);
  solve.run(static_cast<int64_t*>(iterations.mutable_data_ptr()),
            static_cast<double*>(residual.mutable_data_ptr()));
  solve.finish(slope, out, z);
  return {out, z, iterations, residual};
}

// (height * (width / 2 + 1), C, C, 2) to (frequencies, 2 C C). adjoint: conjugate transposes.
Tensor mon_fourier_pack_cpu(const Tensor& matrix_in, int64_t height, int64_t width, bool adjoint) {
  const char* op = "mon_fourier_pack";
  check_real(matrix_in, op, "matrix");
  check_dim(matrix_in, 4, op, "matrix");
  STD_TORCH_CHECK(height > 0, op, ": height: expected at least 1, got ", height);
  STD_TORCH_CHECK(width > 0, op, ": width: expected at least 1, got ", width);
  check_size(matrix_in, 0, checked_product(height, width / 2 + 1, op), op, "matrix");
  const int64_t channels = matrix_in.size(1), columns = width / 2 + 1;
  check_size(matrix_in, 2, channels, op, "matrix");
  check_size(matrix_in, 3, 2, op, "matrix");
  const Tensor matrix = dense(matrix_in);
  const int64_t square = checked_product(2 * channels, channels, op);
  Tensor packed = torch::stable::new_empty(matrix, {fourier_frequencies(height, width), square});
  advise_huge_pages(packed);
  std::vector<int64_t> sources;
  for (int64_t kx = 0; kx < columns; ++kx) {
    for (int64_t ky = 0; ky < fourier_column_height(height, width, kx); ++ky) {
      sources.push_back(ky * columns + kx);
    }
  }
  const auto copy = [&](const auto* from, auto* to, int64_t f) {
    from += sources[static_cast<size_t>(f)] * square, to += f * square;
    for (int64_t b = 0; b < matrix_blocks(channels); ++b) {
      const int64_t first = matrix_block_begin(channels, b);
      const int64_t last = matrix_block_begin(channels, b + 1);
      for (int64_t j = 0; j < channels; ++j) {
        for (int64_t r = first; r < last; ++r) {
          const auto* at = from + 2 * (adjoint ? j * channels + r : r * channels + j);
          *to++ = at[0];
          *to++ = adjoint ? -at[1] : at[1];
        }
      }
    }
  };
  const void* from = matrix.const_data_ptr();
  void* to = packed.mutable_data_ptr();
  const bool wide = matrix.scalar_type() == ScalarType::Double;
  for_each_range(packed.size(0), 0, [&](int64_t begin, int64_t end, void*) {
    for (int64_t f = begin; f < end; ++f) {
      if (wide) {
        copy(static_cast<const double*>(from), static_cast<double*>(to), f);
      } else {
        copy(static_cast<const float*>(from), static_cast<float*>(to), f);
      }
    }
  });
  return packed;
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) {
  m.def("mon_fourier_pack(Tensor matrix, int height, int width, bool adjoint=False) -> Tensor");
  m.def(
      "mon_splitting_fourier(Tensor bias, Tensor? slope, Tensor matrix, Tensor? resolvent, int "
      "ring, str activation, float alpha, float tol, int max_iter, bool per_sample) -> (Tensor, "
      "Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("mon_fourier_pack", TORCH_BOX(&fastprune::mon_fourier_pack_cpu));
  m.impl("mon_splitting_fourier", TORCH_BOX(&fastprune::mon_splitting_fourier_cpu));
}
