#include "ops/conv_products.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels/cpu/masked_conv2d.h"
#include "ops/layout.h"

namespace fastprune {
namespace {

// The taps of a grid, and the memory behind them.
struct Taps {
  std::vector<int64_t> y, x;
  std::vector<uint8_t> live;
};

// The grid of the forward product and of the weight gradient: the output's points.
ConvGrid output_grid(const MaskedConv2dCall& c, Taps* taps) {
  for (int64_t ky = 0; ky < c.kernel_height; ++ky) {
    for (int64_t kx = 0; kx < c.kernel_width; ++kx) {
      taps->y.push_back(ky * c.geometry.dilation[0] - c.geometry.padding[0]);
      taps->x.push_back(kx * c.geometry.dilation[1] - c.geometry.padding[1]);
      taps->live.push_back(1);
    }
  }
  ConvGrid g{c.batch,        c.out_height,         c.out_width,          c.height,
             c.width,        c.geometry.stride[0], c.geometry.stride[1], c.kernel_height,
             c.kernel_width, taps->y.data(),       taps->x.data(),       taps->live.data()};
  const bool pointwise = c.shape.taps == 1 && g.step_y == 1 && g.step_x == 1 &&
                         c.geometry.padding[0] == 0 && c.geometry.padding[1] == 0;
  if (pointwise) {  // one long row per image: the tiles' copies are whole vectors
    g.width *= g.height;
    g.source_width *= g.source_height;
    g.height = g.source_height = 1;
  }
  return g;
}

// The inputs whose coordinates leave the residue (py, px) modulo the stride, and the taps that
// reach them (the others are not live).
void residue_grid(const MaskedConv2dCall& c, int64_t py, int64_t px, Taps* taps, ConvGrid* grid) {
  const int64_t *stride = c.geometry.stride, *pad = c.geometry.padding,
                *dilation = c.geometry.dilation;
  for (int64_t ky = 0; ky < c.kernel_height; ++ky) {
    for (int64_t kx = 0; kx < c.kernel_width; ++kx) {
      const int64_t y = py + pad[0] - ky * dilation[0], x = px + pad[1] - kx * dilation[1];
      const bool live = y % stride[0] == 0 && x % stride[1] == 0;
      taps->y.push_back(y / stride[0]);
      taps->x.push_back(x / stride[1]);
      taps->live.push_back(live ? 1 : 0);
    }
  }
  *grid = ConvGrid{c.batch,
                   (c.height - py + stride[0] - 1) / stride[0],
                   (c.width - px + stride[1] - 1) / stride[1],
                   c.out_height,
                   c.out_width,
                   1,
                   1,
                   c.kernel_height,
                   c.kernel_width,
                   taps->y.data(),
                   taps->x.data(),
                   taps->live.data()};
}

// What the entries' places in the panel depend on, besides the pattern.
std::vector<int64_t> geometry_key(const ConvGrid& g, DType dtype, bool lanes) {
  std::vector<int64_t> key{static_cast<int64_t>(current_isa()),
                           static_cast<int64_t>(dtype == DType::f64),
                           lanes,
                           g.batch,
                           g.height,
                           g.width,
                           g.source_height,
                           g.source_width,
                           g.step_y,
                           g.step_x};
  const int64_t taps = g.kernel_height * g.kernel_width;
  key.reserve(key.size() + static_cast<size_t>(3 * taps));
  for (int64_t t = 0; t < taps; ++t) {
    key.push_back(g.tap_y[t]);
    key.push_back(g.tap_x[t]);
    key.push_back(g.live_tap[t]);
  }
  return key;
}

std::shared_ptr<const Translation> translate(const ConvWeight& w, bool transposed,
                                             const ConvGrid& grid, DType dtype, bool lanes) {
  const auto make = [&](Translation* t) {
    auto offset = std::make_shared<const Scratch>(w.pattern.nnz * 2);
    t->way = static_cast<int>(
        FASTPRUNE_PICK(conv_way)(grid, w.pattern, dtype, lanes, offset->as<uint16_t>()));
    t->offset = std::move(offset);
  };
  if (w.plan != nullptr) {
    return w.plan->translation(transposed, geometry_key(grid, dtype, lanes), make);
  }
  auto made = std::make_shared<Translation>();
  make(made.get());
  return made;
}

Cuts balanced_cuts(const ConvWeight& w, bool transposed, Cuts cuts) {
  if (w.plan != nullptr && cuts.parts > 1) cuts.bounds = w.plan->balanced(transposed, cuts.parts);
  return cuts;
}

Cuts cuts_of(const ConvWeight& w, bool transposed, const MaskedConv2dArgs& args) {
  return balanced_cuts(w, transposed,
                       cut_product(FASTPRUNE_PICK(masked_conv2d_items)(args.grid, args.pattern,
                                                                       args.dtype, args.way),
                                   args.pattern.rows));
}
int64_t scratch_of(const Cuts& cuts, const MaskedConv2dArgs& args) {
  return FASTPRUNE_PICK(masked_conv2d_scratch)(args.grid, args.pattern, args.dtype, args.way,
                                               cuts.rows_per_part());
}

void multiply(const ConvWeight& w, bool transposed, const Translation& translation,
              MaskedConv2dArgs args) {
  if (args.pattern.rows == 0 || args.grid.points() == 0) return;
  args.way = static_cast<ConvWay>(translation.way);
  args.panel_offset = translation.offset->as<uint16_t>();
  const Cuts cuts = cuts_of(w, transposed, args);
  for_each_cut(cuts, scratch_of(cuts, args),
               [&](int64_t begin, int64_t end, int64_t row_begin, int64_t row_end, void* memory) {
                 FASTPRUNE_PICK(masked_conv2d)(args, begin, end, row_begin, row_end, memory);
               });
}

}  // namespace

Tensor conv_forward(const MaskedConv2dCall& c, const ConvWeight& weight, const Tensor& x_in,
                    const Epilogue& epilogue, Layout layout) {
  Taps taps;
  const ConvGrid grid = output_grid(c, &taps);
  const bool wanted = is_batch_last(x_in) || layout == Layout::batch_last;
  const auto translation = translate(weight, false, grid, c.dtype, wanted);
  const bool lanes = static_cast<ConvWay>(translation->way) == ConvWay::lanes;
  const bool from_last = lanes && is_batch_last(x_in);
  const bool to_last =
      lanes && (layout == Layout::batch_last || (layout == Layout::like_input && from_last));
  const Tensor x = from_last ? x_in : dense(x_in);
  Tensor y = new_activations(x, c.batch, c.shape.rows, c.out_height, c.out_width, to_last);
  std::optional<Tensor> residual = epilogue.residual;
  if (residual.has_value() && is_batch_last(*residual) != to_last) {
    residual = copy_in_layout(*residual, to_last, "masked_conv2d");
  } else if (residual.has_value() && !to_last) {
    residual = dense(*residual);
  }
  multiply(weight, false, *translation,
           MaskedConv2dArgs{
               weight.pattern, c.dtype, grid, ConvTarget{grid.height, grid.width, 0, 0, 1, 1},
               x.const_data_ptr(), weight.values, ConvWay::points, nullptr,
               epilogue.bias.has_value() ? epilogue.bias->const_data_ptr() : nullptr,
               y.mutable_data_ptr(), from_last, to_last,
               residual.has_value() ? residual->const_data_ptr() : nullptr, epilogue.relu});
  return y;
}

Tensor conv_input_grad(const MaskedConv2dCall& c, const ConvWeight& weight, const Tensor& grad_in,
                       Layout layout) {
  const PatternView& pattern = weight.pattern;
  const int64_t residues = c.geometry.stride[0] * c.geometry.stride[1];
  // At stride 1 there is one residue and every tap reaches it; otherwise each residue's product
  // reads the entries of its own taps only.
  const bool split = residues > 1;
  const int64_t bounds = pattern.blocks() * pattern.rows + 1;
  const Scratch kept_bounds(split ? bounds * 8 : 0), kept_offset(split ? pattern.nnz * 2 : 0);
  const Scratch kept_values(split ? pattern.nnz * 8 : 0);
  const auto for_each_residue = [&](auto f) {
    for (int64_t py = 0; py < c.geometry.stride[0] && py < c.height; ++py) {
      for (int64_t px = 0; px < c.geometry.stride[1] && px < c.width; ++px) {
        Taps taps;
        ConvGrid grid{};
        residue_grid(c, py, px, &taps, &grid);
        f(py, px, taps, grid);
      }
    }
  };
  // The residues write one tensor: all of them must be able to use its layout.
  bool last = is_batch_last(grad_in) || layout == Layout::batch_last;
  for_each_residue([&](int64_t, int64_t, const Taps&, const ConvGrid& grid) {
    last = last && FASTPRUNE_PICK(lanes_fit)(grid, pattern, c.dtype);
  });
  const bool from_last = last && is_batch_last(grad_in);
  const bool to_last = last && layout != Layout::contiguous;
  const Tensor grad = from_last ? grad_in : dense(grad_in);
  Tensor x_grad = new_activations(grad, c.batch, c.channels, c.height, c.width, to_last);
  for_each_residue([&](int64_t py, int64_t px, const Taps& taps, const ConvGrid& grid) {
    ConvWeight part = weight;
    if (split) {
      part.pattern.row_ptr = kept_bounds.as<int64_t>();
      part.pattern.offset = kept_offset.as<int16_t>();
      part.pattern.nnz = FASTPRUNE_PICK(filter_taps)(
          pattern, c.dtype, weight.values, taps.live.data(),
          PatternBuffers{kept_bounds.as<int64_t>(), kept_offset.as<int16_t>()},
          kept_values.as<void>());
      part.values = kept_values.as<void>();
    }
    multiply(part, true, *translate(part, true, grid, c.dtype, last),
             MaskedConv2dArgs{
                 part.pattern, c.dtype, grid,
                 ConvTarget{c.height, c.width, py, px, c.geometry.stride[0], c.geometry.stride[1]},
                 grad.const_data_ptr(), part.values, ConvWay::points, nullptr, nullptr,
                 x_grad.mutable_data_ptr(), from_last, to_last, nullptr, false});
  });
  return x_grad;
}

Tensor conv_weight_grad(const MaskedConv2dCall& c, const ConvWeight& weight, const Tensor& grad_in,
                        const Tensor& x_in) {
  const PatternView& pattern = weight.pattern;
  Taps taps;
  const ConvGrid grid = output_grid(c, &taps);
  const bool last = (is_batch_last(grad_in) || is_batch_last(x_in)) &&
                    FASTPRUNE_PICK(lanes_fit)(grid, pattern, c.dtype);
  const bool grad_last = last && is_batch_last(grad_in), x_last = last && is_batch_last(x_in);
  const Tensor grad = grad_last ? grad_in : dense(grad_in), x = x_last ? x_in : dense(x_in);
  const auto translation = translate(weight, false, grid, c.dtype, last);
  const Scratch values(pattern.nnz * 8);
  std::memset(values.as<void>(), 0, static_cast<size_t>(pattern.nnz * 8));
  const MaskedConv2dWeightGradArgs args{pattern,
                                        c.dtype,
                                        grid,
                                        grad.const_data_ptr(),
                                        x.const_data_ptr(),
                                        static_cast<ConvWay>(translation->way),
                                        translation->offset->as<uint16_t>(),
                                        values.as<void>(),
                                        grad_last,
                                        x_last};
  const Cuts cuts = balanced_cuts(weight, false, cut_rows(pattern.rows));
  const int64_t scratch =
      FASTPRUNE_PICK(masked_conv2d_scratch)(grid, pattern, c.dtype, args.way, cuts.rows_per_part());
  for_each_cut(cuts, scratch,
               [&](int64_t, int64_t, int64_t row_begin, int64_t row_end, void* memory) {
                 FASTPRUNE_PICK(masked_conv2d_weight_grad)(args, row_begin, row_end, memory);
               });
  Tensor weight_grad =
      torch::stable::new_empty(x, {c.shape.rows, c.shape.depth, c.kernel_height, c.kernel_width});
  scatter_to_dense(pattern, c.dtype, values.as<void>(), weight_grad);
  return weight_grad;
}

// What one product of stride 1 reads, made once.
struct ConvProduct::Prepared {
  Taps taps;
  ConvGrid grid{};
  std::shared_ptr<const Translation> translation;
  MaskedConv2dArgs args{};
  Cuts cuts{};
  int64_t slot = 0;
  std::unique_ptr<Scratch> memory;  // of all threads
};

ConvProduct::ConvProduct(const MaskedConv2dCall& c, const ConvWeight& weight, bool transposed,
                         bool lanes)
    : prepared_(std::make_unique<Prepared>()) {
  Prepared& p = *prepared_;
  if (transposed) {
    residue_grid(c, 0, 0, &p.taps, &p.grid);
  } else {
    p.grid = output_grid(c, &p.taps);
  }
  p.translation = translate(weight, transposed, p.grid, c.dtype, lanes);
  MaskedConv2dArgs& a = p.args;
  a.pattern = weight.pattern;
  a.dtype = c.dtype;
  a.grid = p.grid;
  a.place = ConvTarget{p.grid.height, p.grid.width, 0, 0, 1, 1};
  a.values = weight.values;
  a.way = static_cast<ConvWay>(p.translation->way);
  a.panel_offset = p.translation->offset->as<uint16_t>();
  a.source_batch_last = a.target_batch_last = lanes && a.way == ConvWay::lanes;
  p.cuts = cuts_of(weight, transposed, a);
  Cuts whole = p.cuts;  // a worker alone holds all rows
  whole.parts = 1;
  whole.bounds.clear();
  p.slot = (std::max(scratch_of(p.cuts, a), scratch_of(whole, a)) + 63) / 64 * 64;
  p.memory = std::make_unique<Scratch>(checked_product(p.slot, thread_count(), "fastprune"));
}
ConvProduct::~ConvProduct() = default;

bool ConvProduct::batch_last() const { return prepared_->args.source_batch_last; }

void ConvProduct::run(const void* source, void* target, const void* residual,
                      std::optional<int64_t> worker) const {
  const Prepared& p = *prepared_;
  if (p.args.pattern.rows == 0 || p.grid.points() == 0) return;
  MaskedConv2dArgs args = p.args;
  args.source = source;
  args.target = target;
  args.residual = residual;
  const auto part = [&](int64_t first, int64_t last, int64_t row_begin, int64_t row_end,
                        void* scratch) {
    FASTPRUNE_PICK(masked_conv2d)(args, first, last, row_begin, row_end, scratch);
  };
  if (worker.has_value()) {
    part(0, p.cuts.items, 0, p.cuts.rows, p.memory->as<char>() + *worker * p.slot);
    return;
  }
  for_each_range(p.cuts.items * p.cuts.parts, p.slot, p.memory->as<void>(),
                 [&](int64_t begin, int64_t end, void* memory) {
                   walk_cuts(p.cuts, begin, end, memory, part);
                 });
}

}  // namespace fastprune
