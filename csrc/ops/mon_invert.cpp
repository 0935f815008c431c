// The inverses of many small complex matrices: a convolution's resolvent, frequency by frequency.
#include "kernels/cpu/mon_invert.h"

#include "ops/common.h"
#include "ops/mon_fourier_plan.h"

namespace fastprune {
namespace {

Tensor mon_invert_cpu(const Tensor& blocks_in, double scale, double shift) {
  const char* op = "mon_invert";
  check_real(blocks_in, op, "blocks");
  check_dim(blocks_in, 4, op, "blocks");
  const int64_t n = blocks_in.size(1);
  check_size(blocks_in, 2, n, op, "blocks");
  check_size(blocks_in, 3, 2, op, "blocks");
  const Tensor blocks = dense(blocks_in);
  Tensor inverses = torch::stable::new_empty(blocks, blocks.sizes());
  if (inverses.numel() == 0) return inverses;
  advise_huge_pages(inverses);
  // A group of matrices is 16 vectors for each of 4 bytes at most: no overflow below.
  checked_product(checked_product(n, n, op), 4096, op);
  const MonInvert args{
      dtype_of(blocks, op, "blocks"), blocks.size(0), n, scale, shift, blocks.const_data_ptr(),
      inverses.mutable_data_ptr()};
  const int64_t scratch_bytes = FASTPRUNE_PICK(mon_invert_scratch)(args);
  for_each_range(FASTPRUNE_PICK(mon_invert_groups)(args), scratch_bytes,
                 [&](int64_t begin, int64_t end, void* scratch) {
                   FASTPRUNE_PICK(mon_invert)(args, begin, end, scratch);
                 });
  return inverses;
}

}  // namespace
}  // namespace fastprune

STABLE_TORCH_LIBRARY_FRAGMENT(fastprune, m) {
  m.def("mon_invert(Tensor blocks, float scale=1.0, float shift=0.0) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastprune, CPU, m) {
  m.impl("mon_invert", TORCH_BOX(&fastprune::mon_invert_cpu));
}
