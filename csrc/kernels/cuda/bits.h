// A mask as a matrix of bits: what a plan on a GPU makes its other forms from, and reads where a
// product over a dense copy of the weight would multiply absent weights.
#pragma once

#include "kernels/cuda/device.h"

namespace fastprune::FASTPRUNE_CUDA_NAMESPACE {

// Bit c % 32 of word [r * row_words() + c / 32]: whether (r, c) is kept. Bits past the columns are
// 0.
struct BitMatrix {
  const uint32_t* words;
  int64_t rows, cols;
  int64_t row_words() const { return (cols + 31) / 32; }
};

// A packed pattern of a linear weight (kernels/cpu/pattern.h) in memory of the device, not to be
// trusted.
struct RawPattern {
  const int64_t* row_ptr;  // blocks * rows + 1
  const int16_t* offset;   // nnz
  int64_t rows, cols, block_depth, nnz;
};

enum PatternFault : int32_t { kGoodPattern = 0, kBoundsFault = 1, kOffsetFault = 2 };

// words <- the pattern's bits; verdict[0] <- a PatternFault or more of them, verdict[1] <- the
// number of bits. What is out of range is left out. verdict: two words of the device, as words
// need no value before.
cudaError_t pattern_bits(const RawPattern& pattern, uint32_t* words, unsigned long long* verdict,
                         const DeviceLimits& limits, cudaStream_t stream);

// Leaves the mark (device.h) of what a verdict says, for callers that do not wait for it.
cudaError_t report_pattern(const unsigned long long* verdict, uint32_t* fault, cudaStream_t stream);

// to <- the transpose, whole.
cudaError_t transpose_bits(const BitMatrix& from, uint32_t* to, cudaStream_t stream);

// out[i] <- in[i] where the mask keeps it, else an exact 0; rows x cols elements of `dtype`. The
// two may be the same.
cudaError_t keep_masked(const BitMatrix& mask, DType dtype, const void* in, void* out,
                        const DeviceLimits& limits, cudaStream_t stream);

// to[i] <- sum of from[0 .. i), i up to and with n.
cudaError_t exclusive_sums(const uint32_t* from, int64_t n, int64_t* to, cudaStream_t stream);

// flags[n] <- whether row n of x (rows x cols) holds an infinity or a NaN.
cudaError_t find_not_finite(DType dtype, const void* x, int64_t rows, int64_t cols, uint32_t* flags,
                            const DeviceLimits& limits, cudaStream_t stream);

// The product of one activation row with the mask's weights alone, for rows of x that are not
// finite: there, zeros are not what absent weights are.
struct ExactRows {
  BitMatrix mask;
  DType dtype;
  const void* weight;  // dense, of the mask's size
  bool transposed;     // the output is a column of the weight, as in the input gradient
  int64_t batch;
  const void* x;  // batch x inputs()
  int64_t inputs() const { return transposed ? mask.rows : mask.cols; }
  int64_t outputs() const { return transposed ? mask.cols : mask.rows; }
};

// The way out of a product (ops/product.h). bias: outputs elements of the dtype, or null; residual:
// as y, or null.
struct Finish {
  const void* bias;
  const void* residual;
  bool relu;
};

// Mends a product of the masked weight, bias added: rows of y that flags mark are computed anew
// from present weights, then all are finished.
cudaError_t mend_product(const ExactRows& exact, const uint32_t* flags, const Finish& finish,
                         void* y, const DeviceLimits& limits, cudaStream_t stream);

}  // namespace fastprune::FASTPRUNE_CUDA_NAMESPACE
