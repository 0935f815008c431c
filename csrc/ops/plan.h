// Plans: private copies of packed patterns, checked once, with what repeated calls would make anew.
//
// A plan owns its pattern (rows sorted by length, see kernels/cpu/pattern.h), so that an op which
// is given one needs to check nothing but sizes. It keeps the weight's values in the pattern's
// order while the weight does not change, and the entries' places in the panels of the geometries
// that were used last. Plans may be used from several threads.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "ops/masked_linear_forms.h"
#include "ops/plan_registry.h"

namespace fastprune {

// Part of a version: changes that it does not count shall be seen.
constexpr int64_t kReadAnew = int64_t{1} << 62;

// Where the entries of a product stand in the panel of one geometry.
struct Translation {
  std::vector<int64_t> key;
  int way;
  Shared offset;
};

class Plan : public KeptPlan {
 public:
  Plan(const PatternShape& shape, const Tensor& row_ptr, const Tensor& offset,
       const Tensor& transposed_row_ptr, const Tensor& transposed_offset);

  const PatternShape& shape() const { return shape_; }
  const PatternView& forward() const { return forward_.view; }
  // Made at the first call.
  const PatternView& transposed();

  // The weight's values in the order of a direction. `version` counts the weight's changes in
  // place; -1: unknown, the values are read anew. With kReadAnew in it they are read too, but what
  // was made of the same values is kept.
  Shared values(bool transposed, const Tensor& weight, int64_t version, const char* op);

  // The same for a linear weight in other forms.
  std::shared_ptr<const BitmapWeight> bitmap(const Tensor& weight, int64_t version, const char* op);
  std::shared_ptr<const PairsWeight> pairs(bool transposed, const Tensor& weight, int64_t version,
                                           const char* op);

  // The translation for a key; make() fills in way and offset when it is not kept.
  std::shared_ptr<const Translation> translation(bool transposed, std::vector<int64_t> key,
                                                 const std::function<void(Translation*)>& make);

  // First rows of `parts` parts of about the same number of entries, cut at windows; parts + 1
  // values.
  std::vector<int64_t> balanced(bool transposed, int64_t parts);

  int64_t bytes() override;

 private:
  struct Direction {
    PatternView view{};
    std::unique_ptr<Scratch> row_ptr, offset, row_at, place_of;
    Windows windows;
    Shared values;
    std::vector<std::shared_ptr<const Translation>> translations;  // latest last
  };
  // The weight that the kept values are from.
  struct Source {
    const void* weight;
    int64_t version;
    DType dtype;
  };
  // An element of the dense weight, and its bits when the values were read.
  struct Probe {
    int64_t at;
    uint64_t bits;
  };

  static void sort(const PatternView& from, Direction* to);
  // Forgets the kept values unless they are from this weight as it is now. True where they seem to
  // be, and the version asks for a comparison.
  bool follow(const void* weight, int64_t version, DType dtype);
  void forget_values();
  // What is kept, or what read() makes; same() compares the two.
  template <typename T, typename Read, typename Same>
  std::shared_ptr<const T> refreshed(std::shared_ptr<const T> kept, bool compare, const Read& read,
                                     const Same& same);
  Shared read_values(bool transposed, DType dtype, const void* weight, int64_t bytes,
                     const char* op);

  PatternShape shape_;
  Tensor transposed_row_ptr_, transposed_offset_;
  std::mutex mutex_;
  Direction forward_, transposed_;
  LinearForms forms_;
  bool transpose_agrees_ = false;  // seen once; both are private
  Source source_{nullptr, -1, DType::f32};
  std::vector<Probe> probes_;
};

// The plan of that number and of that kind of device; an error names the op.
template <typename P>
std::shared_ptr<P> live_plan(int64_t id, const char* op) {
  const std::shared_ptr<KeptPlan> plan = kept_plan(id);
  STD_TORCH_CHECK(plan != nullptr, op, ": plan: expected the number of a live plan, got ", id);
  auto of_kind = std::dynamic_pointer_cast<P>(plan);
  STD_TORCH_CHECK(of_kind != nullptr, op,
                  ": plan: expected one that was made on the device of the tensors, got ", id);
  return of_kind;
}
void check_plan_shape(const PatternShape& has, const PatternShape& shape, const char* op);

// The plan of that number, checked against the weight's sizes; an error names the op.
std::shared_ptr<Plan> find_plan(int64_t id, const PatternShape& shape, const char* op);

}  // namespace fastprune
