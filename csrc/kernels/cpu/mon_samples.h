// Equilibria of fully connected monotone layers sample by sample, the features in the lanes.
//
// Beside the form of mon_splitting.cpp, which has samples in the lanes: after ReLU about half of a
// state is zero, which differs from sample to sample. Here the product of a sample is the sum of
// the columns of W at its nonzero features, and none is spent on lanes of a tile that no sample
// fills. For matrices that stay near the core, since every sample reads its columns anew.
#pragma once

#include "kernels/cpu/mon_splitting.h"

namespace fastprune {

FASTPRUNE_PER_ISA(
    // Whether this form may be used, and whether it is the cheaper one. by_sample is not read.
    bool mon_can_go_by_sample(const MonSplittingArgs& args);
    bool mon_cheaper_by_sample(const MonSplittingArgs& args);
    // Elements of the columns that a packed matrix begins with; 0 where this form is never used.
    int64_t mon_columns_size(int64_t n);
    void mon_pack_columns(DType dtype, int64_t n, const void* matrix, void* columns);
    // As mon_state_bytes, ... of mon_splitting.h, for by_sample.
    int64_t mon_samples_state_bytes(const MonSplittingArgs& args);
    int64_t mon_samples_scratch_bytes(const MonSplittingArgs& args);
    void mon_samples_begin(const MonSplittingArgs& args, int64_t tile, void* state);
    int64_t mon_samples_steps(const MonSplittingArgs& args, int64_t tile, void* state,
                              void* scratch, int64_t first, int64_t count, const MonNotes& notes);
    void mon_samples_finish(const MonSplittingArgs& args, int64_t tile, void* state, void* scratch,
                            void* out, void* z);)

}  // namespace fastprune
