#include "ops/path_norm.h"

#include <cstddef>
#include <cstring>

namespace fastprune {
namespace {

constexpr const char* kOp = "path_norm_reach";

using Words = std::vector<uint64_t>;

// Memory that a thread keeps for its next call: fresh pages cost as much as the work on them.
class Arena {
 public:
  static std::shared_ptr<const Scratch> of(int64_t bytes) {
    if (bytes > kMost) return std::make_shared<const Scratch>(bytes);
    thread_local std::shared_ptr<const Scratch> kept;
    thread_local int64_t kept_bytes = 0;
    if (kept == nullptr || kept.use_count() > 1 || kept_bytes < bytes) {
      kept = std::make_shared<const Scratch>(bytes);
      kept_bytes = bytes;
    }
    return kept;
  }

 private:
  static constexpr int64_t kMost = int64_t{16} << 20;
};

// One run of a program on the CPU.
class Reach {
 public:
  Reach(const ReachProgram& program, const std::vector<Tensor>& masks,
        const std::vector<Tensor>& labels, bool keep_active)
      : program_(program), labels_(labels) {
    int64_t words = 0;
    for (const ReachValue& v : program.values) words += 2 * v.words();
    std::vector<int64_t> mask_words(masks.size());
    for (const ReachInstruction& i : program.instructions) {
      if (i.mask >= 0) {
        mask_words[static_cast<size_t>(i.mask)] = i.mask_rows() * words_of(i.mask_cols());
      }
    }
    for (const int64_t n : mask_words) words += n;
    memory_ = Arena::of(words * 8);
    uint64_t* next = memory_->as<uint64_t>();
    for (std::vector<Map>* maps : {&forward_, &backward_}) {
      for (const ReachValue& v : program.values) {
        maps->push_back(Map{v, next, {}, true, false});
        next += v.words();
      }
    }
    for (const int64_t n : mask_words) {
      bits_.push_back(next);
      next += n;
    }
    active_.resize(masks.size());
    counts_.resize(masks.size());
    std::vector<int> uses(masks.size());
    for (const ReachInstruction& i : program.instructions) {
      if (i.mask < 0) continue;
      const size_t m = static_cast<size_t>(i.mask);
      if (uses[m]++ == 0) {
        const auto* bytes = static_cast<const uint8_t*>(masks[m].const_data_ptr());
        FASTPRUNE_PICK(reach_pack)(bytes, i.mask_rows(), i.mask_cols(), bits_[m]);
      }
      // Weights used twice are active where either use is.
      if ((uses[m] == 2 || keep_active) && active_[m].empty()) {
        active_[m].resize(static_cast<size_t>(mask_words[m]));
      }
    }
  }

  void run() {
    do {
      changed_ = false;
      for (const ReachInstruction& i : program_.instructions) step_forward(i);
    } while (program_.cyclic && changed_);
    do {
      changed_ = false;
      for (size_t k = program_.instructions.size(); k-- > 0;) {
        step_backward(program_.instructions[k]);
      }
    } while (program_.cyclic && changed_);
    for (const ReachInstruction& i : program_.instructions) count_active(i);
    for (size_t m = 0; m < active_.size(); ++m) {
      if (active_[m].empty()) continue;
      counts_[m] =
          FASTPRUNE_PICK(reach_count)(active_[m].data(), static_cast<int64_t>(active_[m].size()));
    }
  }

  int64_t count(size_t mask) const { return counts_[mask]; }

  // The active weights of a mask, as bytes; zeros where no instruction uses it.
  void write_active(size_t mask, uint8_t* bytes, int64_t numel) const {
    for (const ReachInstruction& i : program_.instructions) {
      if (i.mask != static_cast<int64_t>(mask)) continue;
      FASTPRUNE_PICK(reach_unpack)(active_[mask].data(), i.mask_rows(), i.mask_cols(), bytes);
      return;
    }
    std::memset(bytes, 0, static_cast<size_t>(numel));
  }

  void write_value(size_t value, bool backward, uint8_t* bytes) {
    Map& map = backward ? backward_[value] : forward_[value];
    FASTPRUNE_PICK(reach_unpack)(read(map), map.value.planes, map.value.bits, bytes);
  }

 private:
  // The reach of a value in one direction.
  struct Map {
    ReachValue value;
    uint64_t* words;              // not written yet while `clear`, which stands for zeros
    std::vector<uint8_t> states;  // of the planes, while `known`
    bool clear, known;

    size_t bytes() const { return static_cast<size_t>(value.words()) * 8; }
  };

  Map& at(std::vector<Map>& maps, const ReachInstruction& i, size_t k) {
    return maps[static_cast<size_t>(i.values[k])];
  }
  uint64_t* read(Map& map) {
    if (map.clear) std::memset(map.words, 0, map.bytes());
    map.clear = false;
    return map.words;
  }
  const uint64_t* mask_bits(const ReachInstruction& i) const {
    return i.mask < 0 ? nullptr : bits_[static_cast<size_t>(i.mask)];
  }
  uint64_t* scratch(int64_t words) {
    if (scratch_.size() < static_cast<size_t>(words)) scratch_.resize(static_cast<size_t>(words));
    return scratch_.data();
  }

  void merge(Map& to, const uint64_t* from) {
    if (to.clear) {
      std::memcpy(to.words, from, to.bytes());
      note_first(to);
    } else if (FASTPRUNE_PICK(reach_merge)(to.words, from, to.value.words())) {
      changed_ = true;
    }
    to.clear = to.known = false;
  }
  // Where an instruction writes its result: the map itself if nothing is there yet. Zeros, if
  // asked. Asked for after what the instruction reads is read, which may be the same map.
  uint64_t* result_for(Map& to, bool zeros) {
    uint64_t* result = to.words;
    if (!to.clear) {
      if (result_.size() * 8 < to.bytes()) result_.resize(to.bytes() / 8);
      result = result_.data();
    }
    if (zeros) std::memset(result, 0, to.bytes());
    return result;
  }
  void take_result(Map& to) {
    if (!to.clear) {
      merge(to, result_.data());
      return;
    }
    note_first(to);
    to.clear = to.known = false;
  }
  void note_first(const Map& to) {
    if (program_.cyclic && FASTPRUNE_PICK(reach_count)(to.words, to.value.words()) != 0) {
      changed_ = true;
    }
  }
  void fill(Map& map) {
    const ReachValue& v = map.value;
    std::memset(map.words, 0xff, map.bytes());
    const int64_t words = words_of(v.bits);
    for (int64_t p = 0; p < v.planes && v.bits % 64 != 0; ++p) {
      map.words[(p + 1) * words - 1] = (uint64_t{1} << v.bits % 64) - 1;
    }
    map.clear = map.known = false;
  }
  const uint8_t* states(Map& map) {
    if (!map.known) {
      map.states.resize(static_cast<size_t>(map.value.planes));
      FASTPRUNE_PICK(reach_states)
      (read(map), map.value.planes, map.value.bits, map.states.data());
      map.known = true;
    }
    return map.states.data();
  }

  // The covers of a convolution's taps, made once for all layers of the same geometry.
  ReachTaps taps_of(const ReachGeometry& g) {
    Covers* found = nullptr;
    for (Covers& known : covers_) {
      if (std::memcmp(known.geometry.large, g.large, sizeof g - offsetof(ReachGeometry, large)) ==
          0) {
        found = &known;
      }
    }
    const int64_t small = words_of(g.small_bits()), large = words_of(g.large_bits());
    const bool fresh = found == nullptr;
    if (fresh) {
      covers_.push_back(Covers{g, Words(static_cast<size_t>((g.taps() + 1) * (small + large))),
                               std::vector<uint8_t>(static_cast<size_t>(g.taps())),
                               std::vector<int64_t>(static_cast<size_t>(g.taps()))});
      found = &covers_.back();
    }
    uint64_t* at = found->words.data();
    const ReachTaps taps{at,
                         at + g.taps() * small,
                         at + g.taps() * (small + large),
                         at + g.taps() * (small + large) + small,
                         found->joins.data(),
                         found->shifts.data()};
    if (fresh) {
      Words rows(static_cast<size_t>(words_of(g.small[2]) + words_of(g.large[2])));
      FASTPRUNE_PICK(reach_taps)(g, taps, rows.data());
    }
    return taps;
  }

  // A convolution's result in one direction, added to `to`.
  void conv(const ReachInstruction& i, Map& from, Map& to, bool gathers) {
    const ReachGeometry& g = i.geometry;
    const int64_t words = words_of(g.cols());
    const ReachTaps taps = taps_of(g);
    const uint8_t* from_states = states(from);
    uint64_t* result = result_for(to, !gathers);
    if (gathers) {
      FASTPRUNE_PICK(reach_gather)
      (g, taps, mask_bits(i), from.words, from_states, result, scratch(words + words_of(g.taps())),
       0, g.rows);
    } else {
      FASTPRUNE_PICK(reach_spread)
      (g, taps, mask_bits(i), from.words, from_states, result, scratch(3 * words));
    }
    take_result(to);
  }

  void step_forward(const ReachInstruction& i) {
    if (i.op == ReachOp::input) {
      fill(at(forward_, i, 0));
    } else if (i.op == ReachOp::join) {
      for (size_t k = 1; k < i.values.size(); ++k) {
        merge(at(forward_, i, 0), read(at(forward_, i, k)));
      }
    } else if (i.op == ReachOp::conv) {
      conv(i, at(forward_, i, 0), at(forward_, i, 1), !i.transposed);
    } else if (i.op == ReachOp::linear) {
      Map &in = at(forward_, i, 0), &out = at(forward_, i, 1);
      const uint64_t* given = read(in);
      FASTPRUNE_PICK(reach_linear)
      (mask_bits(i), i.rows, i.cols, i.tokens, given, result_for(out, false));
      take_result(out);
    } else if (i.op == ReachOp::copy) {
      copy(at(forward_, i, 0), at(forward_, i, 1));
    } else if (i.op == ReachOp::groups) {
      groups(i, at(forward_, i, 0), i.in_labels, at(forward_, i, 1), i.out_labels);
    }
  }

  void step_backward(const ReachInstruction& i) {
    if (i.op == ReachOp::output) {
      fill(at(backward_, i, 0));
    } else if (i.op == ReachOp::join) {
      for (size_t k = 1; k < i.values.size(); ++k) {
        merge(at(backward_, i, k), read(at(backward_, i, 0)));
      }
    } else if (i.op == ReachOp::conv) {
      conv(i, at(backward_, i, 1), at(backward_, i, 0), i.transposed);
    } else if (i.op == ReachOp::linear) {
      Map &in = at(backward_, i, 0), &out = at(backward_, i, 1);
      const uint64_t* given = read(out);
      FASTPRUNE_PICK(reach_linear_back)
      (mask_bits(i), i.rows, i.cols, i.tokens, given, result_for(in, false));
      take_result(in);
    } else if (i.op == ReachOp::copy) {
      copy(at(backward_, i, 1), at(backward_, i, 0));
    } else if (i.op == ReachOp::groups) {
      groups(i, at(backward_, i, 1), i.out_labels, at(backward_, i, 0), i.in_labels);
    }
  }

  void count_active(const ReachInstruction& i) {
    if (i.mask < 0) return;
    const size_t m = static_cast<size_t>(i.mask);
    uint64_t* active = active_[m].empty() ? nullptr : active_[m].data();
    Map &in = at(forward_, i, 0), &out = at(backward_, i, 1);
    if (i.op == ReachOp::linear) {
      counts_[m] +=
          FASTPRUNE_PICK(reach_linear_active)(mask_bits(i), i.rows, i.cols, i.tokens, read(in),
                                              read(out), active, scratch(2 * words_of(i.cols)));
      return;
    }
    const ReachGeometry& g = i.geometry;
    Map &large = i.transposed ? out : in, &small = i.transposed ? in : out;
    counts_[m] += FASTPRUNE_PICK(reach_active)(g, taps_of(g), mask_bits(i), read(large),
                                               states(large), read(small), states(small), active,
                                               scratch((g.groups + 1) * words_of(g.cols())));
  }

  // f(element) for every set bit.
  template <typename F>
  void for_each_set(Map& map, const F& f) {
    const uint64_t* from = read(map);
    const int64_t words = words_of(map.value.bits);
    for (int64_t p = 0; p < map.value.planes; ++p) {
      for (int64_t w = 0; w < words; ++w) {
        for (uint64_t left = from[p * words + w]; left != 0; left &= left - 1) {
          f(p * map.value.bits + 64 * w + __builtin_ctzll(left));
        }
      }
    }
  }
  void set(Map& map, int64_t element) {
    const ReachValue& v = map.value;
    uint64_t& word = read(map)[element / v.bits * words_of(v.bits) + element % v.bits / 64];
    const uint64_t bit = uint64_t{1} << element % v.bits % 64;
    changed_ = changed_ || (word & bit) == 0;
    word |= bit;
    map.known = false;
  }

  void copy(Map& from, Map& to) {
    const uint64_t* given = read(from);
    FASTPRUNE_PICK(reach_copy)
    (given, from.value.planes, from.value.bits, result_for(to, true), to.value.bits);
    take_result(to);
  }

  void groups(const ReachInstruction& i, Map& from, int64_t from_labels, Map& to,
              int64_t to_labels) {
    const auto labels = [&](int64_t which) {
      return static_cast<const int32_t*>(labels_[static_cast<size_t>(which)].const_data_ptr());
    };
    const int32_t *of = labels(from_labels), *wanted = labels(to_labels);
    reached_.assign(static_cast<size_t>(i.groups), 0);
    for_each_set(from, [&](int64_t e) {
      if (of[e] >= 0 && of[e] < i.groups) reached_[static_cast<size_t>(of[e])] = 1;
    });
    for (int64_t e = 0; e < to.value.elements(); ++e) {
      const int32_t l = wanted[e];
      if (l >= 0 && l < i.groups && reached_[static_cast<size_t>(l)] != 0) set(to, e);
    }
  }

  struct Covers {
    ReachGeometry geometry;
    Words words;
    std::vector<uint8_t> joins;
    std::vector<int64_t> shifts;
  };

  const ReachProgram& program_;
  const std::vector<Tensor>& labels_;
  std::shared_ptr<const Scratch> memory_;  // of the maps and the masks' bits
  std::vector<Map> forward_, backward_;    // reached from an input; reaching an output
  std::vector<uint64_t*> bits_;            // of the masks
  std::vector<Words> active_;
  std::vector<int64_t> counts_;
  std::vector<Covers> covers_;
  Words scratch_, result_;
  std::vector<uint8_t> reached_;
  bool changed_ = false;
};

std::vector<Tensor> path_norm_reach_cpu(const std::vector<Tensor>& masks_in,
                                        const std::vector<Tensor>& labels_in,
                                        const Tensor& program_in,
                                        const std::vector<int64_t>& inspect, bool write) {
  const ReachProgram program = checked_program(program_in, masks_in, labels_in, inspect);
  std::vector<Tensor> masks, labels;
  for (size_t m = 0; m < masks_in.size(); ++m) {
    check_cpu(masks_in[m], kOp, "masks");
    masks.push_back(dense(masks_in[m]));
  }
  for (const Tensor& l : labels_in) {
    check_cpu(l, kOp, "labels");
    labels.push_back(dense(l));
  }
  Reach reach(program, masks, labels, write);
  reach.run();
  Tensor counts = torch::stable::new_empty(program_in, {static_cast<int64_t>(masks.size())});
  for (size_t m = 0; m < masks.size(); ++m) {
    static_cast<int64_t*>(counts.mutable_data_ptr())[m] = reach.count(m);
  }
  std::vector<Tensor> results{counts};
  for (size_t m = 0; write && m < masks.size(); ++m) {
    Tensor active = torch::stable::empty_like(masks[m]);
    advise_huge_pages(active);
    reach.write_active(m, static_cast<uint8_t*>(active.mutable_data_ptr()), active.numel());
    results.push_back(active);
  }
  for (const int64_t v : inspect) {
    for (const bool backward : {false, true}) {
      const int64_t elements = program.values[static_cast<size_t>(v)].elements();
      Tensor map = torch::stable::new_empty(program_in, {elements}, ScalarType::Bool);
      reach.write_value(static_cast<size_t>(v), backward,
                        static_cast<uint8_t*>(map.mutable_data_ptr()));
      results.push_back(map);
    }
  }
  return results;
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) {
  m.def(
      "path_norm_reach(Tensor[] masks, Tensor[] labels, Tensor program, int[] inspect, bool write) "
      "-> Tensor[]");
}
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("path_norm_reach", TORCH_BOX(&fastprune::path_norm_reach_cpu));
}
