// Plans on a GPU: a private copy of a packed pattern, checked once, and the forms of the weight
// that products read, each made when first wanted and kept.
//
// A form has a structure, from the pattern alone, and values, which follow the weight. Values are
// refreshed in place, on the stream of the call, when `version` (ops/plan.h) says that the weight
// is another: with kReadAnew in it or at -1 always. A form of the pattern alone has no values and
// is filled once. On the CPU probes of the weight catch changes that no counter sees; here they
// would need a synchronisation.
//
// Calls on several streams: one that uses what another stream made waits for it there. As with the
// weight itself, it is the caller's to order a change of the weight against calls on other streams.
//
// CUDA graphs: the addresses of structure and values never change while the plan lives. A captured
// call reads the kept values when they are those of the weight at capture (make one call before),
// and later replays see what later calls refresh; a call in training (kReadAnew) refreshes them
// inside the graph, at each replay. What is not there at capture is made inside the graph, for that
// call alone. Nothing kept is ever let go, so a plan keeps a bounded number of forms: those of
// further geometries are made for one call. make_plan itself cannot be captured: it waits for the
// checks of the pattern.
#pragma once

#include <array>
#include <functional>
#include <mutex>
#include <vector>

#include "kernels/cuda/bits.h"
#include "ops/cuda_form.h"
#include "ops/cuda_op.h"
#include "ops/plan.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

struct FormKey {
  CudaForm form;
  bool transposed;
  DType dtype;
  // What else the form is made for: the columns of a panel, the geometry of a convolution.
  std::vector<int64_t> sizes = {};
  bool operator==(const FormKey& o) const {
    return form == o.form && transposed == o.transposed && dtype == o.dtype && sizes == o.sizes;
  }
};

struct FormTensors {
  std::vector<Tensor> structure;
  std::optional<Tensor> values;
};

// How a form is made. fill() writes the values of the weight that the call was given; where the
// form has none (no `values`), the structure.
struct FormMaker {
  std::function<std::vector<Tensor>()> structure;
  std::function<Tensor()> values;  // uninitialized
  std::function<void(const FormTensors&)> fill;
};

class DevicePlan : public KeptPlan {
 public:
  // Waits for the checks of the forward pattern; an error where it is bad.
  DevicePlan(const PatternShape& shape, const std::array<Tensor, 4>& pattern, const CudaCall& call);
  ~DevicePlan() override;

  const PatternShape& shape() const { return shape_; }
  int64_t nnz() const { return nnz_; }
  // Rows x (depth * taps).
  const BitMatrix& bits() const { return bits_; }
  // The pattern as the caller packed it, not a copy: kernels that read it check what they read.
  PatternView pattern(bool transposed, const char* op) const;
  // On the plan's device; to be made new tensors from.
  const Tensor& words() const { return words_; }
  void check_device(const Tensor& x, const char* op) const;

  // What is kept under the key, its values those of `weight`, which must be contiguous. Where the
  // form has no values: `weight` is words(), `version` 0.
  FormTensors form(const FormKey& key, const Tensor& weight, int64_t version, const CudaCall& call,
                   const char* op, const FormMaker& make);

  int64_t bytes() override;

 private:
  struct Slot {
    FormKey key;
    FormTensors tensors;
    const void* weight = nullptr;  // that the values are from
    int64_t version = -1;          // -1: no values are known to be there
  };
  void order(const CudaCall& call, bool capturing, const char* op);

  PatternShape shape_;
  std::array<Tensor, 4> pattern_;  // row_ptr, offset, and of the transpose
  int64_t nnz_;
  Tensor words_;
  BitMatrix bits_{};
  std::mutex mutex_;
  std::vector<Slot> slots_;
  cudaStream_t stream_;  // that what is kept was written on last
  cudaEvent_t written_ = nullptr;
  bool elsewhere_ = false;  // some call ran on another stream
};

// The transposed bits, for forms of the input gradient: made for one call.
struct TransposedBits {
  Tensor words;
  BitMatrix bits;
};
TransposedBits transposed_bits(const DevicePlan& plan, const CudaCall& call, const char* op);

std::shared_ptr<DevicePlan> find_device_plan(int64_t id, const PatternShape& shape, const Tensor& x,
                                             const char* op);

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
