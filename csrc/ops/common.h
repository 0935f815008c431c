// What every op's torch side shares: argument checks, element types, work split over threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>

#include "kernels/cpu/scalar_types.h"

namespace fastprune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The element type of a floating tensor; the message names the op and the argument.
inline DType dtype_of(const Tensor& t, const char* op, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, op, ": ", name,
                      ": expected float32, float64, bfloat16 or float16, got dtype ",
                      torch::headeronly::toString(t.scalar_type()));
  }
}

inline ScalarType accumulator_type(DType dtype) {
  return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
}

inline void check_cpu(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, ": expected a CPU tensor");
}

// What the ops of every device check: the tensors of a call lie on one device.
inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cpu() == b.is_cpu() && a.get_device() == b.get_device();
}
inline void check_same_device(const Tensor& t, const Tensor& first, const char* op,
                              const char* name, const char* first_name) {
  STD_TORCH_CHECK(same_device(t, first), op, ": ", name, ": expected the device of ", first_name);
}

inline void check_dtype(const Tensor& t, ScalarType expected, const char* op, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == expected, op, ": ", name, ": expected dtype ",
                  torch::headeronly::toString(expected), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

inline void check_dim(const Tensor& t, int64_t dim, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == dim, op, ": ", name, ": expected ", dim, " dimensions, got ", t.dim());
}

inline void check_size(const Tensor& t, int64_t dim, int64_t expected, const char* op,
                       const char* name) {
  STD_TORCH_CHECK(t.size(dim) == expected, op, ": ", name, ": expected size ", expected,
                  " in dimension ", dim, ", got ", t.size(dim));
}

// a * b, refusing to overflow: sizes come from the caller.
inline int64_t checked_product(int64_t a, int64_t b, const char* op) {
  int64_t product = 0;
  STD_TORCH_CHECK(!__builtin_mul_overflow(a, b, &product) && product >= 0, op,
                  ": sizes: the product of ", a, " and ", b, " does not fit 64 bits");
  return product;
}

// Asks for huge pages behind fresh memory that is about to be written. The first touch of 4 KB
// pages costs six times as much as the writing; most systems give huge pages to those who ask only.
constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
inline void advise_huge_pages([[maybe_unused]] const void* memory,
                              [[maybe_unused]] uintptr_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), end = begin + bytes;
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = end / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}
inline void advise_huge_pages(const Tensor& t) {
  advise_huge_pages(t.const_data_ptr(), static_cast<uintptr_t>(t.numel()) * t.element_size());
}

// Uninitialized CPU memory of the dtype of `like`, without going through a view: autograd forbids
// changes in place of views that an op returns.
inline Tensor empty_strided(const Tensor& like, const int64_t* sizes, const int64_t* strides,
                            int64_t dims) {
  int32_t dtype = 0;
  AtenTensorHandle made = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_dtype(like.get(), &dtype) == 0 &&
                      aoti_torch_empty_strided(dims, sizes, strides, dtype,
                                               aoti_torch_device_type_cpu(), 0, &made) == 0,
                  "fastprune: a result could not be allocated");
  return Tensor(made);
}

// Contiguous; the data pointer is what a kernel reads.
inline Tensor dense(const Tensor& t) { return torch::stable::contiguous(t); }

// Memory for one call of an op, or for several; aligned to 64 bytes.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    const size_t wanted = static_cast<size_t>(bytes < 64 ? 64 : bytes);
    const size_t align = wanted >= 2 * kHugePage ? kHugePage : 64;
    data_.reset(std::aligned_alloc(align, (wanted + align - 1) / align * align));
    if (data_ == nullptr) throw std::bad_alloc();
    advise_huge_pages(data_.get(), wanted);
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> data_;
};

// Memory that calls share; it outlives its owner while a call uses it.
using Shared = std::shared_ptr<const Scratch>;

inline int64_t thread_count() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

// As below, with scratch that the caller keeps: a slot, a multiple of 64 bytes, for each of
// thread_count() threads.
template <typename F>
void for_each_range(int64_t items, int64_t slot, void* scratch, const F& f) {
  const int64_t threads = thread_count();
  const int64_t workers = items < threads ? items : threads;
  if (workers <= 0) return;
  if (workers == 1) {
    f(int64_t{0}, items, scratch);
    return;
  }
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t w = first; w < last; ++w) {
      f(items * w / workers, items * (w + 1) / workers, static_cast<char*>(scratch) + w * slot);
    }
  });
}

// Calls f(begin, end, scratch) over [0, items) from at most thread_count() threads of torch's pool,
// each with scratch_bytes of its own, aligned to 64. Results must not depend on the cuts.
template <typename F>
void for_each_range(int64_t items, int64_t scratch_bytes, const F& f) {
  if (items <= 0) return;
  const int64_t threads = thread_count();
  const int64_t workers = items < threads ? items : threads;
  const int64_t slot = (scratch_bytes + 63) / 64 * 64;
  if (workers == 1 && slot == 0) {
    f(int64_t{0}, items, nullptr);
    return;
  }
  const Scratch scratch(checked_product(slot, workers, "fastprune"));
  for_each_range(items, slot, scratch.as<void>(), f);
}

}  // namespace fastprune
