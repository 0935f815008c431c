// Equilibria of fully connected monotone operator layers, and their adjoint equations.
#include "ops/mon_splitting.h"

#include <cmath>
#include <cstring>

#include "kernels/cpu/mon_samples.h"
#include "ops/mon_form.h"
#include "ops/mon_iterations.h"

namespace fastprune {
namespace {

using IntList = torch::headeronly::IntHeaderOnlyArrayRef;

void check_values(const Tensor& values, int64_t entries, const Tensor& bias, const char* op,
                  const char* name) {
  check_same_device(values, bias, op, name, "bias");
  check_dtype(values, bias.scalar_type(), op, name);
  check_dim(values, 1, op, name);
  check_size(values, 0, entries, op, name);
}

}  // namespace

void check_mon_options(double alpha, double tol, int64_t max_iter, const char* op) {
  STD_TORCH_CHECK(std::isfinite(alpha) && alpha > 0, op,
                  ": alpha: expected a positive finite number, got ", alpha);
  STD_TORCH_CHECK(std::isfinite(tol) && tol >= 0, op,
                  ": tol: expected a finite number of at least 0, got ", tol);
  STD_TORCH_CHECK(max_iter >= 1, op, ": max_iter: expected a positive number, got ", max_iter);
}

MonSplittingCall validate_mon_splitting(const Tensor& bias, const std::optional<Tensor>& slope,
                                        const std::optional<Tensor>& matrix,
                                        const std::optional<Tensor>& resolvent,
                                        const std::vector<Tensor>& pair,
                                        const std::vector<Tensor>& single, IntList blocks,
                                        const std::string& activation, double alpha, double tol,
                                        int64_t max_iter, const char* op) {
  MonSplittingCall c{};
  c.dtype = dtype_of(bias, op, "bias");
  STD_TORCH_CHECK(c.dtype == DType::f32 || c.dtype == DType::f64, op,
                  ": bias: expected float32 or float64");
  check_dim(bias, 2, op, "bias");
  c.batch = bias.size(0);
  c.n = bias.size(1);
  c.activation = mon_activation_of(activation, op);
  check_mon_options(alpha, tol, max_iter, op);
  const auto check_like_bias = [&](const std::optional<Tensor>& t, const char* name) {
    if (!t.has_value()) return;
    check_same_device(*t, bias, op, name, "bias");
    check_dtype(*t, bias.scalar_type(), op, name);
  };
  check_like_bias(slope, "slope");
  check_like_bias(matrix, "matrix");
  check_like_bias(resolvent, "resolvent");
  if (slope.has_value()) {
    check_dim(*slope, 2, op, "slope");
    check_size(*slope, 0, c.batch, op, "slope");
    check_size(*slope, 1, c.n, op, "slope");
  }
  STD_TORCH_CHECK(pair.empty() || pair.size() == 6, op, ": pair: expected no or 6 tensors, got ",
                  pair.size());
  STD_TORCH_CHECK(single.empty() || single.size() == 3, op,
                  ": single: expected no or 3 tensors, got ", single.size());
  STD_TORCH_CHECK(!matrix.has_value() || (pair.empty() && single.empty()), op,
                  ": matrix: expected either a dense matrix or sparse ones");
  STD_TORCH_CHECK(blocks.size() == 3, op, ": blocks: expected 3 numbers, got ", blocks.size());
  if (!pair.empty()) c.pair = PatternShape{c.n, 1, c.n, 1, blocks[0], blocks[1]};
  if (!single.empty()) c.single = PatternShape{c.n, 1, c.n, 1, blocks[2], blocks[2]};
  if (!pair.empty()) {
    check_values(pair[2], pair[1].numel(), bias, op, "pair[2]");
    check_values(pair[5], pair[4].numel(), bias, op, "pair[5]");
  }
  if (!single.empty()) {
    check_values(single[2], single[1].numel(), bias, op, "single[2]");
  }
  return c;
}

namespace {

// The steps of all tiles until the rule over the batch is met.
class BatchRun {
 public:
  BatchRun(const MonSplittingArgs& args, int64_t max_iter)
      : a_(args),
        max_iter_(max_iter),
        element_(args.dtype == DType::f64 ? 8 : 4),
        state_bytes_(FASTPRUNE_PICK(mon_state_bytes)(args)),
        scratch_bytes_(FASTPRUNE_PICK(mon_scratch_bytes)(args)),
        state_(checked_product(state_bytes_, args.tiles(), "mon_splitting")),
        norms_(checked_product(args.tiles() * kLongestChunk, 2 * args.tile * element_,
                               "mon_splitting")) {}

  void begin() {
    each_tile([&](int64_t tile, void*) { FASTPRUNE_PICK(mon_begin)(a_, tile, state(tile)); });
  }

  // Over the whole batch.
  void run(int64_t* iterations, double* residual) {
    StepForecast forecast(a_.tol);
    // A state that stays in the cache from step to step, on one thread: nothing to gain.
    const bool one_by_one =
        (a_.tiles() == 1 || thread_count() == 1) && state_bytes_ * a_.tiles() <= kCacheBytes;
    std::unique_ptr<Scratch> before;
    int64_t made = 0;
    while (true) {
      int64_t count = one_by_one ? 1 : forecast.steps(kLongestChunk);
      if (count > max_iter_ - made) count = max_iter_ - made;
      if (count > 1) {
        if (before == nullptr) before = std::make_unique<Scratch>(state_bytes_ * a_.tiles());
        std::memcpy(before->as<void>(), state_.as<void>(),
                    static_cast<size_t>(state_bytes_ * a_.tiles()));
      }
      steps(made, count);
      for (int64_t i = 0; i < count; ++i) {
        const double now = residual_of(i);
        forecast.saw(now);
        const bool stop = !(now > a_.tol && std::isfinite(now)) || made + i + 1 == max_iter_;
        if (!stop) continue;
        *iterations = made + i + 1;
        *residual = now;
        if (i + 1 < count) {  // later steps were made in vain: back, and only as far as this one
          std::memcpy(state_.as<void>(), before->as<void>(),
                      static_cast<size_t>(state_bytes_ * a_.tiles()));
          steps(made, i + 1);
        }
        return;
      }
      made += count;
    }
  }

  // Each sample for itself.
  void run_samples(int64_t* iterations, double* residuals) {
    for (int64_t i = 0; i < a_.batch; ++i) {
      iterations[i] = 0;
      residuals[i] = 0;
    }
    made_.assign(static_cast<size_t>(a_.tiles()), 0);
    each_tile([&](int64_t tile, void* scratch) {
      const MonNotes notes{nullptr, iterations + tile * a_.tile, residuals + tile * a_.tile};
      made_[static_cast<size_t>(tile)] =
          FASTPRUNE_PICK(mon_steps)(a_, tile, state(tile), scratch, 0, max_iter_, notes);
    });
  }

  void finish(int64_t iterations, void* out, void* z) {
    each_tile([&](int64_t tile, void* scratch) {
      const int64_t made = made_.empty() ? iterations : made_[static_cast<size_t>(tile)];
      FASTPRUNE_PICK(mon_finish)(a_, tile, state(tile), scratch, made, out, z);
    });
  }

 private:
  static constexpr int64_t kLongestChunk = 16;
  static constexpr int64_t kCacheBytes = int64_t{512} << 10;

  template <typename F>
  void each_tile(const F& f) {
    for_each_range(a_.tiles(), scratch_bytes_, [&](int64_t begin, int64_t end, void* scratch) {
      for (int64_t tile = begin; tile < end; ++tile) f(tile, scratch);
    });
  }
  char* state(int64_t tile) const { return state_.as<char>() + tile * state_bytes_; }
  char* norms(int64_t tile) const {
    return norms_.as<char>() + tile * kLongestChunk * 2 * a_.tile * element_;
  }
  void steps(int64_t first, int64_t count) {
    each_tile([&](int64_t tile, void* scratch) {
      FASTPRUNE_PICK(mon_steps)(a_, tile, state(tile), scratch, first, count,
                                MonNotes{norms(tile), nullptr, nullptr});
    });
  }
  // After step i of the chunk; samples are added in order, whatever the tiles are.
  double residual_of(int64_t i) const {
    double change = 0, norm = 0;
    for (int64_t tile = 0; tile < a_.tiles(); ++tile) {
      const int64_t left = a_.batch - tile * a_.tile;
      const int64_t here = left < a_.tile ? left : a_.tile;
      const int64_t lanes = FASTPRUNE_PICK(mon_widest_tile)(a_.dtype, here);
      const auto add = [&](const auto* values) {
        values += i * 2 * lanes;
        for (int64_t j = 0; j < here; ++j) {
          change += static_cast<double>(values[j]);
          norm += static_cast<double>(values[lanes + j]);
        }
      };
      if (a_.dtype == DType::f64) {
        add(reinterpret_cast<const double*>(norms(tile)));
      } else {
        add(reinterpret_cast<const float*>(norms(tile)));
      }
    }
    return relative_residual(change, norm);
  }

  const MonSplittingArgs& a_;
  int64_t max_iter_, element_, state_bytes_, scratch_bytes_;
  Scratch state_, norms_;
  std::vector<int64_t> made_;
};

// Widest tiles, but for threads that would have none.
int64_t tile_of(DType dtype, int64_t batch) {
  int64_t tile = FASTPRUNE_PICK(mon_widest_tile)(dtype, batch);
  const int64_t least = FASTPRUNE_PICK(mon_widest_tile)(dtype, 1);
  while (tile > least && (batch + tile - 1) / tile < thread_count()) tile /= 2;
  return tile;
}

bool by_sample(const MonSplittingArgs& args) {
  const MonForm wanted = wanted_mon_form();
  if (wanted == MonForm::by_feature) return false;
  return (wanted == MonForm::by_sample || FASTPRUNE_PICK(mon_cheaper_by_sample)(args)) &&
         FASTPRUNE_PICK(mon_can_go_by_sample)(args);
}

const void* packed_data(const std::optional<Tensor>& t, int64_t n, const char* op,
                        const char* name) {
  if (!t.has_value()) return nullptr;
  check_dim(*t, 1, op, name);
  check_size(*t, 0, FASTPRUNE_PICK(mon_packed_size)(n), op, name);
  STD_TORCH_CHECK(t->is_contiguous(), op, ": ", name, ": expected a contiguous tensor");
  return t->const_data_ptr();
}

Tensor mon_pack_cpu(const Tensor& matrix_in) {
  const char* op = "mon_pack";
  check_cpu(matrix_in, op, "matrix");
  const DType dtype = dtype_of(matrix_in, op, "matrix");
  STD_TORCH_CHECK(dtype == DType::f32 || dtype == DType::f64, op,
                  ": matrix: expected float32 or float64");
  check_dim(matrix_in, 2, op, "matrix");
  const int64_t n = matrix_in.size(0);
  check_size(matrix_in, 1, n, op, "matrix");
  const Tensor matrix = dense(matrix_in);
  Tensor packed = torch::stable::new_empty(matrix, {FASTPRUNE_PICK(mon_packed_size)(n)});
  const void* from = matrix.const_data_ptr();
  void* to = packed.mutable_data_ptr();
  for_each_range(FASTPRUNE_PICK(mon_pack_groups)(n), 0, [&](int64_t begin, int64_t end, void*) {
    FASTPRUNE_PICK(mon_pack_matrix)(dtype, n, from, to, begin, end);
  });
  return packed;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mon_splitting_cpu(
    const Tensor& bias_in, const std::optional<Tensor>& slope_in,
    const std::optional<Tensor>& matrix, const std::optional<Tensor>& resolvent,
    const std::vector<Tensor>& pair, const std::vector<Tensor>& single, IntList blocks,
    double diagonal, std::string activation, double alpha, double tol, int64_t max_iter,
    bool per_sample) {
  const char* op = "mon_splitting";
  check_cpu(bias_in, op, "bias");
  const MonSplittingCall c =
      validate_mon_splitting(bias_in, slope_in, matrix, resolvent, pair, single, blocks, activation,
                             alpha, tol, max_iter, op);
  const Tensor bias = dense(bias_in);
  std::optional<Tensor> slope = slope_in;
  if (slope.has_value()) slope = dense(*slope);
  MonSplittingArgs args{};
  args.dtype = c.dtype;
  args.n = c.n;
  args.batch = c.batch;
  args.matrix.dense = packed_data(matrix, c.n, op, "matrix");
  args.matrix.diagonal = diagonal;
  std::vector<Tensor> values;  // contiguous
  const auto value_data = [&](const Tensor& t) {
    values.push_back(dense(t));
    return values.back().const_data_ptr();
  };
  if (!pair.empty()) {
    args.matrix.has_pair = true;
    args.matrix.down = checked_pattern(pair[0], pair[1], c.pair, false, op);
    args.matrix.up = checked_pattern(pair[3], pair[4], c.pair, true, op);
    args.matrix.down_values = value_data(pair[2]);
    args.matrix.up_values = value_data(pair[5]);
  }
  if (!single.empty()) {
    args.matrix.has_single = true;
    args.matrix.single = checked_pattern(single[0], single[1], c.single, false, op);
    args.matrix.single_values = value_data(single[2]);
  }
  args.resolvent = packed_data(resolvent, c.n, op, "resolvent");
  args.bias = bias.const_data_ptr();
  args.slope = slope.has_value() ? slope->const_data_ptr() : nullptr;
  args.activation = c.activation;
  args.alpha = alpha;
  args.tol = tol;
  args.per_sample = per_sample;
  args.tile = tile_of(c.dtype, c.batch < 1 ? 1 : c.batch);
  args.by_sample = by_sample(args);
  if (args.matrix.dense != nullptr) {
    note_mon_form(args.by_sample ? MonForm::by_sample : MonForm::by_feature);
  }

  Tensor out = torch::stable::empty_like(bias), z = torch::stable::empty_like(bias);
  MonVerdict verdict(bias, c.batch, per_sample);
  if (c.batch == 0 || c.n == 0) {
    verdict.nothing_to_do();
    return {out, z, verdict.iterations, verdict.residual};
  }
  BatchRun run(args, max_iter);
  run.begin();
  if (per_sample) {
    run.run_samples(verdict.counts(), verdict.residuals());
  } else {
    run.run(verdict.counts(), verdict.residuals());
  }
  run.finish(verdict.counts()[0], out.mutable_data_ptr(), z.mutable_data_ptr());
  return {out, z, verdict.iterations, verdict.residual};
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) {
  m.def("mon_pack(Tensor matrix) -> Tensor");
  m.def(
      "mon_splitting(Tensor bias, Tensor? slope, Tensor? matrix, Tensor? resolvent, Tensor[] pair, "
      "Tensor[] single, int[] blocks, float diagonal, str activation, float alpha, float tol, int "
      "max_iter, bool per_sample) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("mon_pack", TORCH_BOX(&fastprune::mon_pack_cpu));
  m.impl("mon_splitting", TORCH_BOX(&fastprune::mon_splitting_cpu));
}
