// Equilibria z = sigma(W z + b) of monotone operator layers by operator splitting, and the adjoint
// equations u = J (g + W^T u): whole runs of iterations on one tile of the batch.
//
// A tile's state is stored feature by feature, the samples of the tile in the lanes, so that every
// product is one of a matrix with a panel (panel.h) that needs no packing between iterations.
// Tiles share nothing but the matrices; what couples them, the stopping rule over the batch, works
// on the squared norms that every step leaves behind.
#pragma once

#include <cstdint>

#include "kernels/cpu/mon_activations.h"
#include "kernels/cpu/pattern.h"

namespace fastprune {

// W as the products read it: dense, or diagonal * z + up (down z) + single z.
struct MonMatrix {
  const void* dense;  // packed by mon_pack_matrix, or null
  bool has_pair, has_single;
  PatternView down, up, single;
  const void *down_values, *up_values, *single_values;
  double diagonal;
};

struct MonSplittingArgs {
  DType dtype;  // f32 or f64
  int64_t n, batch;
  MonMatrix matrix;
  const void* resolvent;  // packed; null: forward-backward
  const void* bias;       // batch x n: b, or g of the adjoint equation
  const void* slope;      // batch x n: J; null: forward
  MonActivation activation;
  double alpha, tol;
  bool per_sample;
  int64_t tile;    // samples of a tile; the last tile may have fewer. No result depends on it
  bool by_sample;  // the state sample by sample (mon_samples.h): where it may be

  int64_t tiles() const { return (batch + tile - 1) / tile; }
};

// Where the steps of one tile leave what they found.
struct MonNotes {
  // Per step, per lane: squared norms of the change and of the new state, 2 * tile values each, in
  // the accumulator type. Null if per_sample.
  void* norms;
  // per_sample: of every sample of the tile.
  int64_t* iterations;
  double* residuals;
};

FASTPRUNE_PER_ISA(
    // Elements of a packed n x n matrix.
    int64_t mon_packed_size(int64_t n);
    // The rows of the matrix interleaved in groups; the groups [begin, end).
    int64_t mon_pack_groups(int64_t n);
    void mon_pack_matrix(DType dtype, int64_t n, const void* matrix, void* packed, int64_t begin,
                         int64_t end);
    // Samples of the widest tile that a batch fills; half or a quarter of it, at least 64 bytes, is
    // legal too.
    int64_t mon_widest_tile(DType dtype, int64_t batch);
    // Bytes of a tile's state and of a worker's scratch, aligned to 64.
    int64_t mon_state_bytes(const MonSplittingArgs& args);
    int64_t mon_scratch_bytes(const MonSplittingArgs& args);
    // Transposes the inputs of the tile into its state; the start is zero.
    void mon_begin(const MonSplittingArgs& args, int64_t tile, void* state);
    // The steps [first, first + count), notes.norms from its beginning. With per_sample until all
    // samples have met the tolerance. Returns how many steps the tile has made in all.
    int64_t mon_steps(const MonSplittingArgs& args, int64_t tile, void* state, void* scratch,
                      int64_t first, int64_t count, const MonNotes& notes);
    // One more application after `steps` steps; out and z are batch x n.
    void mon_finish(const MonSplittingArgs& args, int64_t tile, void* state, void* scratch,
                    int64_t steps, void* out, void* z);)

}  // namespace fastprune
