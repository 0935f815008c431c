#include "kernels/cuda/path_norm.h"

#include <cstddef>
#include <cstring>
#include <utility>

#include "ops/cuda_op.h"
#include "ops/path_norm.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr const char* kOp = "path_norm_reach";

// Words of one allocation, given out in turn before it is made.
class Arena {
 public:
  int64_t take(int64_t words) {
    const int64_t at = size_;
    STD_TORCH_CHECK(!__builtin_add_overflow(size_, words, &size_), kOp,
                    ": sizes: the maps do not fit 64 bits");
    return at;
  }
  int64_t size() const { return size_; }

 private:
  int64_t size_ = 0;
};

// One run of a program: the steps (kernels/cuda/path_norm.h) are put on the stream, and nothing is
// waited for. The CPU's counterpart is Reach in path_norm.cpp.
class GpuReach {
 public:
  // masks: dense; labels: dense, on the device, null where no instruction names them.
  GpuReach(const ReachProgram& program, const std::vector<Tensor>& masks,
           const std::vector<const int32_t*>& labels, const Tensor& like, const CudaCall& call)
      : program_(program), labels_(labels), call_(call), uses_(masks.size()) {
    Arena arena;
    // What starts as zeros comes first.
    for (const ReachValue& v : program.values) {
      maps_[0].push_back(arena.take(v.words()));
      maps_[1].push_back(arena.take(v.words()));
    }
    std::vector<int64_t> active(masks.size()), bits(masks.size()), covers;
    int64_t states = 0, snapshot = 0, labelled = 0;
    for (const ReachInstruction& i : program.instructions) {
      if (i.mask >= 0 && uses_[static_cast<size_t>(i.mask)].rows < 0) {
        const size_t m = static_cast<size_t>(i.mask);
        uses_[m] = Use{i.mask_rows(), i.mask_cols(), nullptr, nullptr};
        active[m] = arena.take(i.mask_rows() * words_of(i.mask_cols()));
      }
      if (i.op == ReachOp::conv && find_covers(i.geometry) == covers_.size()) {
        const ReachGeometry& g = i.geometry;
        checked_product(g.taps() + 2, words_of(g.small_bits()) + words_of(g.large_bits()), kOp);
        covers_.emplace_back(g, ReachCovers{});
        covers.push_back(arena.take(ReachCovers::words(g)));
      }
      if (i.op == ReachOp::groups) labelled = larger(labelled, words_of(i.groups));
      for (const int64_t v : i.values) {
        const ReachValue& value = program.values[static_cast<size_t>(v)];
        states = larger(states, (value.planes + 7) / 8);
        if (i.values.size() == 2 && i.values[0] == i.values[1]) {
          snapshot = larger(snapshot, value.words());
        }
      }
    }
    const int64_t zeros = arena.size();
    for (size_t m = 0; m < masks.size(); ++m) {
      if (uses_[m].rows >= 0) bits[m] = arena.take(uses_[m].rows * words_of(uses_[m].cols));
    }
    const int64_t states_at = arena.take(states), more_states_at = arena.take(states);
    const int64_t snapshot_at = arena.take(snapshot), labelled_at = arena.take(labelled);
    // Per instruction: a snapshot, states or cleared labels, and up to two more.
    int64_t steps = 0;
    for (const ReachInstruction& i : program.instructions) {
      steps += static_cast<int64_t>(i.values.size()) + 4;
    }
    const int64_t step_words = static_cast<int64_t>(sizeof(ReachStep) / 8);
    const int64_t kept_at = arena.take(program.cyclic ? steps * step_words : 0);

    memory_.emplace(torch::stable::new_empty(like, {larger(arena.size(), 1)}, ScalarType::Long));
    base_ = static_cast<uint64_t*>(memory_->mutable_data_ptr());
    states_ = reinterpret_cast<uint8_t*>(base_ + states_at);
    more_states_ = reinterpret_cast<uint8_t*>(base_ + more_states_at);
    snapshot_ = base_ + snapshot_at;
    labelled_ = base_ + labelled_at;
    kept_ = reinterpret_cast<ReachStep*>(base_ + kept_at);
    clear(base_, zeros * 8);
    for (size_t c = 0; c < covers_.size(); ++c) {
      covers_[c].second = ReachCovers::at(base_ + covers[c], covers_[c].first);
      check(reach_covers(covers_[c].first, covers_[c].second, call_.limits(), call_.stream()));
    }
    for (size_t m = 0; m < masks.size(); ++m) {
      if (uses_[m].rows < 0) continue;
      uses_[m].bits = base_ + bits[m];
      uses_[m].active = base_ + active[m];
      check(reach_pack(static_cast<const uint8_t*>(masks[m].const_data_ptr()), bits_of(m),
                       call_.limits(), call_.stream()));
    }
  }

  void run() {
    std::vector<ReachStep> steps;
    for (const ReachInstruction& i : program_.instructions) add(i, true, &steps);
    put(steps, program_.cyclic);
    steps.clear();
    for (size_t k = program_.instructions.size(); k-- > 0;) {
      add(program_.instructions[k], false, &steps);
    }
    put(steps, program_.cyclic);
    steps.clear();
    for (const ReachInstruction& i : program_.instructions) add_active(i, &steps);
    put(steps, false);
  }

  void count(int64_t* counts) const {
    for (size_t m = 0; m < uses_.size(); ++m) {
      if (uses_[m].rows < 0) continue;
      check(reach_count(active_of(m), counts + m, call_.limits(), call_.stream()));
    }
  }
  // The active weights of a mask, as bytes; zeros where no instruction uses it.
  void write_active(size_t mask, uint8_t* bytes, int64_t numel) const {
    if (uses_[mask].rows < 0) {
      clear(bytes, numel);
    } else {
      check(reach_unpack(active_of(mask), bytes, call_.limits(), call_.stream()));
    }
  }
  void write_value(int64_t value, bool backward, uint8_t* bytes) const {
    check(reach_unpack(map(!backward, value), bytes, call_.limits(), call_.stream()));
  }
  void clear(void* at, int64_t bytes) const {
    if (bytes > 0) check(cudaMemsetAsync(at, 0, static_cast<size_t>(bytes), call_.stream()));
  }

 private:
  struct Use {  // of a mask
    int64_t rows = -1, cols = 0;
    uint64_t *bits = nullptr, *active = nullptr;
  };

  static void check(cudaError_t error) { check_launch(error, kOp); }
  static int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }

  ReachMap bits_of(size_t m) const { return {uses_[m].bits, uses_[m].rows, uses_[m].cols}; }
  ReachMap active_of(size_t m) const { return {uses_[m].active, uses_[m].rows, uses_[m].cols}; }
  // The reach of a value: from the inputs (forward), or to the outputs.
  ReachMap map(bool forward, int64_t value) const {
    const ReachValue& v = program_.values[static_cast<size_t>(value)];
    return {base_ + maps_[forward ? 0 : 1][static_cast<size_t>(value)], v.planes, v.bits};
  }
  // Layers of the same sizes and taps share their covers, whatever their planes.
  size_t find_covers(const ReachGeometry& g) const {
    size_t c = 0;
    while (c < covers_.size() && std::memcmp(covers_[c].first.large, g.large,
                                             sizeof g - offsetof(ReachGeometry, large)) != 0) {
      ++c;
    }
    return c;
  }

  ReachStep step(ReachStepKind kind, const ReachMap& from, const ReachMap& to) const {
    ReachStep s{};
    s.kind = kind;
    s.from = from;
    s.to = to;
    s.states = states_;
    s.more_states = more_states_;
    return s;
  }
  ReachStep states_step(const ReachMap& from, uint8_t* states) const {
    ReachStep s = step(ReachStepKind::states, from, {});
    s.states = states;
    return s;
  }
  ReachStep weight_step(ReachStepKind kind, const ReachInstruction& i, const ReachMap& from,
                        const ReachMap& to) const {
    ReachStep s = step(kind, from, to);
    s.mask = i.mask < 0 ? ReachMap{nullptr, i.mask_rows(), i.mask_cols()}
                        : bits_of(static_cast<size_t>(i.mask));
    if (i.op == ReachOp::conv) {
      s.geometry = i.geometry;
      s.covers = covers_[find_covers(i.geometry)].second;
    }
    return s;
  }

  // The steps of an instruction in one direction.
  void add(const ReachInstruction& i, bool forward, std::vector<ReachStep>* steps) const {
    if (i.op == ReachOp::input || i.op == ReachOp::output) {
      if (forward == (i.op == ReachOp::input)) {
        steps->push_back(step(ReachStepKind::fill, {}, map(forward, i.values[0])));
      }
      return;
    }
    if (i.op == ReachOp::join) {
      const ReachMap whole = map(forward, i.values[0]);
      for (size_t k = 1; k < i.values.size(); ++k) {
        const ReachMap part = map(forward, i.values[k]);
        if (i.values[k] == i.values[0]) continue;
        steps->push_back(forward ? step(ReachStepKind::merge, part, whole)
                                 : step(ReachStepKind::merge, whole, part));
      }
      return;
    }
    ReachMap from = map(forward, i.values[forward ? 0 : 1]);
    const ReachMap to = map(forward, i.values[forward ? 1 : 0]);
    if (i.values[0] == i.values[1]) {
      // Into itself: what it brings must not depend on what it has brought already.
      const ReachMap before = from;
      from.words = snapshot_;
      steps->push_back(step(ReachStepKind::store, before, from));
    }
    if (i.op == ReachOp::conv) {
      const bool gathers = forward != i.transposed;
      steps->push_back(states_step(from, states_));
      steps->push_back(
          weight_step(gathers ? ReachStepKind::gather : ReachStepKind::spread, i, from, to));
    } else if (i.op == ReachOp::linear) {
      steps->push_back(
          weight_step(forward ? ReachStepKind::linear : ReachStepKind::linear_back, i, from, to));
    } else if (i.op == ReachOp::copy) {
      steps->push_back(step(ReachStepKind::copy, from, to));
    } else if (i.op == ReachOp::groups) {
      const ReachMap marks{labelled_, 1, i.groups};
      steps->push_back(step(ReachStepKind::clear, {}, marks));
      steps->push_back(step(ReachStepKind::mark, from, marks));
      steps->back().labels = labels_[static_cast<size_t>(forward ? i.in_labels : i.out_labels)];
      steps->push_back(step(ReachStepKind::take, marks, to));
      steps->back().labels = labels_[static_cast<size_t>(forward ? i.out_labels : i.in_labels)];
    }
  }

  void add_active(const ReachInstruction& i, std::vector<ReachStep>* steps) const {
    if (i.mask < 0) return;
    const ReachMap in = map(true, i.values[0]), out = map(false, i.values[1]);
    const ReachMap active = active_of(static_cast<size_t>(i.mask));
    if (i.op == ReachOp::linear) {
      steps->push_back(weight_step(ReachStepKind::linear_active, i, in, active));
      steps->back().other = out;
      return;
    }
    const ReachMap &large = i.transposed ? out : in, &small = i.transposed ? in : out;
    steps->push_back(states_step(large, states_));
    steps->push_back(states_step(small, more_states_));
    steps->push_back(weight_step(ReachStepKind::conv_active, i, large, active));
    steps->back().other = small;
  }

  void put(const std::vector<ReachStep>& steps, bool until_settled) const {
    if (until_settled) {
      check(reach_settle(steps.data(), static_cast<int64_t>(steps.size()), kept_, call_.stream()));
      return;
    }
    for (const ReachStep& s : steps) check(reach_step(s, call_.limits(), call_.stream()));
  }

  const ReachProgram& program_;
  const std::vector<const int32_t*>& labels_;
  const CudaCall& call_;
  std::vector<int64_t> maps_[2];  // words of the memory: forward, backward
  std::vector<Use> uses_;
  std::vector<std::pair<ReachGeometry, ReachCovers>> covers_;
  std::optional<Tensor> memory_;
  uint64_t *base_ = nullptr, *snapshot_ = nullptr, *labelled_ = nullptr;
  uint8_t *states_ = nullptr, *more_states_ = nullptr;
  ReachStep* kept_ = nullptr;
};

// The tensor whose device the call is for: programs, and labels if need be, come from the host.
const Tensor& first_on_device(const std::vector<Tensor>& masks, const std::vector<Tensor>& labels,
                              const Tensor& program) {
  for (const std::vector<Tensor>* list : {&masks, &labels}) {
    for (const Tensor& t : *list) {
      if (!t.is_cpu()) return t;
    }
  }
  return masks.empty() ? program : masks[0];
}

std::vector<Tensor> path_norm_reach_cuda(const std::vector<Tensor>& masks_in,
                                         const std::vector<Tensor>& labels_in,
                                         const Tensor& program_in,
                                         const std::vector<int64_t>& inspect, bool write) {
  const ReachProgram program = checked_program(program_in, masks_in, labels_in, inspect);
  const Tensor& on = first_on_device(masks_in, labels_in, program_in);
  for (size_t m = 0; m < masks_in.size(); ++m) {
    STD_TORCH_CHECK(same_device(masks_in[m], on), kOp, ": masks[", m,
                    "]: expected all masks on one device");
  }
  const CudaCall call(on, kOp);
  std::vector<Tensor> masks, labels;
  for (const Tensor& m : masks_in) masks.push_back(dense(m));
  std::vector<const int32_t*> label_words(labels_in.size());
  for (const ReachInstruction& i : program.instructions) {
    for (const int64_t l : {i.in_labels, i.out_labels}) {
      if (l < 0 || label_words[static_cast<size_t>(l)] != nullptr) continue;
      const Tensor& given = labels_in[static_cast<size_t>(l)];
      STD_TORCH_CHECK(given.is_cpu() || same_device(given, on), kOp, ": labels[", l,
                      "]: expected the CPU or the device of masks");
      labels.push_back(dense(given));
      if (!same_device(given, on)) {
        Tensor moved = torch::stable::new_empty(on, {given.numel()}, ScalarType::Int);
        torch::stable::copy_(moved, labels.back());
        labels.back() = moved;
      }
      label_words[static_cast<size_t>(l)] =
          static_cast<const int32_t*>(labels.back().const_data_ptr());
    }
  }
  GpuReach reach(program, masks, label_words, on, call);
  reach.run();
  const int64_t n_masks = static_cast<int64_t>(masks.size());
  Tensor counts = torch::stable::new_empty(on, {n_masks}, ScalarType::Long);
  reach.clear(counts.mutable_data_ptr(), n_masks * 8);
  reach.count(static_cast<int64_t*>(counts.mutable_data_ptr()));
  std::vector<Tensor> results{counts};
  for (size_t m = 0; write && m < masks.size(); ++m) {
    Tensor active = torch::stable::empty_like(masks[m]);
    reach.write_active(m, static_cast<uint8_t*>(active.mutable_data_ptr()), active.numel());
    results.push_back(active);
  }
  for (const int64_t v : inspect) {
    for (const bool backward : {false, true}) {
      const int64_t elements = program.values[static_cast<size_t>(v)].elements();
      Tensor reached = torch::stable::new_empty(on, {elements}, ScalarType::Bool);
      reach.write_value(v, backward, static_cast<uint8_t*>(reached.mutable_data_ptr()));
      results.push_back(reached);
    }
  }
  return results;
}

}  // namespace
}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE

FASTPRUNE_CUDA_IMPL(m) {
  m.impl("path_norm_reach", TORCH_BOX(&fastprune::FASTPRUNE_CUDA_NAMESPACE::path_norm_reach_cuda));
}
