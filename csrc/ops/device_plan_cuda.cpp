#include "ops/device_plan.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {
namespace {

constexpr size_t kMostForms = 16;

bool is_capturing(const CudaCall& call, const char* op) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_launch(cudaStreamIsCapturing(call.stream(), &status), op);
  return status != cudaStreamCaptureStatusNone;
}

int64_t bytes_of(const Tensor& t) { return t.numel() * static_cast<int64_t>(t.element_size()); }

int64_t make_plan_cuda(const Tensor& row_ptr, const Tensor& offset,
                       const Tensor& transposed_row_ptr, const Tensor& transposed_offset,
                       std::vector<int64_t> shape) {
  const char* op = "make_plan";
  STD_TORCH_CHECK(shape.size() == 6, op, ": shape: expected 6 values, got ", shape.size());
  const CudaCall call(row_ptr, op);
  return register_plan(std::make_shared<DevicePlan>(
      PatternShape{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5]},
      std::array<Tensor, 4>{row_ptr, offset, transposed_row_ptr, transposed_offset}, call));
}

}  // namespace

DevicePlan::DevicePlan(const PatternShape& shape, const std::array<Tensor, 4>& pattern,
                       const CudaCall& call)
    : shape_(shape),
      pattern_(pattern),
      nnz_(pattern[1].numel()),
      words_(pattern[0]),
      stream_(call.stream()) {
  const char* op = "make_plan";
  const Tensor& row_ptr = pattern[0];
  const PatternView view = this->pattern(false, op);
  constexpr int64_t kMost = int64_t{1} << 31;
  STD_TORCH_CHECK(view.rows < kMost && view.cols() < kMost, op, ": shape: expected less than ",
                  kMost, " rows and columns, got ", view.rows, " and ", view.cols());
  STD_TORCH_CHECK(
      !is_capturing(call, op), op,
      ": expected a call before the capture of a CUDA graph: checking the pattern waits "
      "for the GPU");
  bits_ = BitMatrix{nullptr, view.rows, view.cols()};
  words_ = torch::stable::new_empty(row_ptr, {checked_product(bits_.rows, bits_.row_words(), op)},
                                    ScalarType::Int);
  bits_.words = static_cast<const uint32_t*>(words_.const_data_ptr());
  const Tensor verdict = torch::stable::new_empty(row_ptr, {2}, ScalarType::Long);
  auto* on_device = static_cast<unsigned long long*>(verdict.mutable_data_ptr());
  check_launch(pattern_bits(RawPattern{view.row_ptr, view.offset, view.rows, view.cols(),
                                       view.block_cols(), view.nnz},
                            static_cast<uint32_t*>(words_.mutable_data_ptr()), on_device,
                            call.limits(), call.stream()),
               op);
  unsigned long long found[2];
  check_launch(
      cudaMemcpyAsync(found, on_device, sizeof found, cudaMemcpyDeviceToHost, call.stream()), op);
  check_launch(cudaStreamSynchronize(call.stream()), op);
  STD_TORCH_CHECK((found[0] & kBoundsFault) == 0, op,
                  ": row_ptr: expected bounds that start at 0, never decrease and end at the ",
                  nnz_, " entries of offset, and offsets inside their block");
  STD_TORCH_CHECK(found[0] == kGoodPattern && found[1] == static_cast<unsigned long long>(nnz_), op,
                  ": offset: expected different positions of a row, inside their block");
  check_launch(cudaEventCreateWithFlags(&written_, cudaEventDisableTiming), op);
  check_launch(cudaEventRecord(written_, stream_), op);
}

DevicePlan::~DevicePlan() {
  // Torch hands memory on in the order of the stream that it was made on.
  if (elsewhere_) {
#if !defined(FASTPRUNE_EMULATED)
    const torch::stable::accelerator::DeviceGuard guard(words_.get_device());
#endif
    cudaDeviceSynchronize();
  }
  if (written_ != nullptr) cudaEventDestroy(written_);
}

PatternView DevicePlan::pattern(bool transposed, const char* op) const {
  const size_t first = transposed ? 2 : 0;
  return validate_pattern(pattern_[first], pattern_[first + 1], pattern_[0], shape_, transposed,
                          op);
}

void DevicePlan::check_device(const Tensor& x, const char* op) const {
  check_same_device(x, words_, op, "x", "the plan");
}

// Orders the call behind what another stream wrote. A captured one was preceded by a call that did.
void DevicePlan::order(const CudaCall& call, bool capturing, const char* op) {
  if (call.stream() == stream_) return;
  elsewhere_ = true;
  if (!capturing) check_launch(cudaStreamWaitEvent(call.stream(), written_, 0), op);
}

FormTensors DevicePlan::form(const FormKey& key, const Tensor& weight, int64_t version,
                             const CudaCall& call, const char* op, const FormMaker& make) {
  const bool anew = version >= 0 && (version & kReadAnew) != 0;
  if (anew) version -= kReadAnew;
  const std::lock_guard<std::mutex> lock(mutex_);
  const bool capturing = is_capturing(call, op);
  order(call, capturing, op);
  Slot made{key, {}};
  Slot* slot = &made;
  for (Slot& kept : slots_) {
    if (kept.key == key) slot = &kept;
  }
  FormTensors& tensors = slot->tensors;
  const void* from = weight.const_data_ptr();
  if (slot != &made && version >= 0 && !anew && slot->weight == from && slot->version == version) {
    return tensors;
  }
  if (slot == &made) {
    tensors.structure = make.structure();
    if (make.values) tensors.values = make.values();
  }
  make.fill(tensors);
  // Of the other forms one cannot know whether the weight has changed.
  if (anew) {
    for (Slot& kept : slots_) {
      if (kept.tensors.values.has_value()) kept.version = -1;
    }
  }
  slot->weight = from;
  slot->version = capturing ? -1 : version;  // a capture writes nothing yet
  if (!capturing) {
    stream_ = call.stream();
    check_launch(cudaEventRecord(written_, stream_), op);
    if (slot == &made && slots_.size() < kMostForms) slots_.push_back(made);
  }
  return slot == &made ? made.tensors : tensors;
}

int64_t DevicePlan::bytes() {
  const std::lock_guard<std::mutex> lock(mutex_);
  int64_t total = bytes_of(words_);
  for (const Slot& slot : slots_) {
    for (const Tensor& t : slot.tensors.structure) total += bytes_of(t);
    if (slot.tensors.values.has_value()) total += bytes_of(*slot.tensors.values);
  }
  return total;
}

TransposedBits transposed_bits(const DevicePlan& plan, const CudaCall& call, const char* op) {
  const BitMatrix& from = plan.bits();
  BitMatrix to{nullptr, from.cols, from.rows};
  Tensor words = torch::stable::new_empty(
      plan.words(), {checked_product(to.rows, to.row_words(), op)}, ScalarType::Int);
  auto* data = static_cast<uint32_t*>(words.mutable_data_ptr());
  check_launch(transpose_bits(from, data, call.stream()), op);
  to.words = data;
  return {words, to};
}

std::shared_ptr<DevicePlan> find_device_plan(int64_t id, const PatternShape& shape, const Tensor& x,
                                             const char* op) {
  auto plan = live_plan<DevicePlan>(id, op);
  plan->check_device(x, op);
  check_plan_shape(plan->shape(), shape, op);
  return plan;
}

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE

FASTPRUNE_CUDA_IMPL(m) {
  m.impl("make_plan", TORCH_BOX(&fastprune::FASTPRUNE_CUDA_NAMESPACE::make_plan_cuda));
}
