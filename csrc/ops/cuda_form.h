// How products on a GPU read a weight, and which way tests and benches insist on. Knows nothing of
// torch or CUDA: one switch for the module, the GPU's ops and their emulation.
#pragma once

namespace fastprune {

enum class CudaForm {
  automatic,    // by the table in ops/masked_linear_choice_cuda.cpp
  deltas,       // values and gaps, streamed: batches to 32 (kernels/cuda/masked_linear_deltas.h)
  bitmap,       // tiles of bits on tensor cores (kernels/cuda/masked_linear_bitmap.h), batches to 8
  tensor_core,  // the same tiles, batches to 128
  panel,        // CUDA cores over a panel of activations in shared memory
  dense,        // torch's product of the masked weight; of a weight gradient: then the mask
  sampled,      // weight gradients: at the mask alone (kernels/cuda/masked_linear_sampled.h)
};

// False for unknown names. For the whole process, for the calls that begin later.
bool set_cuda_form(const char* name);
CudaForm wanted_cuda_form();

}  // namespace fastprune
