// Torch side of path_norm: a network as a list of instructions over maps of bits.
//
// A program is an int64 tensor: flags, the number of values, then planes and bits of each value,
// then instructions: opcode, number of arguments, arguments. Values are maps
// (kernels/cpu/path_norm.h); element e of a value is bit e % bits of plane e / bits. Masks are
// named by their index, -1 stands for a weight without one (all there).
#pragma once

#include <vector>

#include "kernels/cpu/path_norm.h"
#include "ops/common.h"

namespace fastprune {

enum class ReachOp : int64_t {
  input = 0,   // value: an input of the network
  output = 1,  // value: an output
  join = 2,    // out, ins...: elementwise union (sums, products, concatenations of whole values)
  conv = 3,    // in, out, mask, transposed, then a geometry in the order of ReachGeometry
  linear = 4,  // in, out, mask, rows, cols, tokens
  copy = 5,    // in, out: the same elements in the same order, cut into other planes
  groups = 6,  // in, out, labels of in, labels of out (indices of tensors), number of groups: an
               // element of out is reached by all elements of in with its label; -1: none
};

struct ReachInstruction {
  ReachOp op;
  std::vector<int64_t> values;  // joins: out, ins...; others: in, out; input and output: one
  int64_t mask = -1;
  bool transposed = false;
  ReachGeometry geometry{};
  int64_t rows = 0, cols = 0, tokens = 0;  // linear
  int64_t in_labels = -1, out_labels = -1, groups = 0;

  int64_t mask_rows() const { return op == ReachOp::conv ? geometry.rows : rows; }
  int64_t mask_cols() const { return op == ReachOp::conv ? geometry.cols() : cols; }
};

struct ReachValue {
  int64_t planes, bits;
  int64_t words() const { return planes * words_of(bits); }
  int64_t elements() const { return planes * bits; }
};

struct ReachProgram {
  bool
      cyclic;  // values may be read before they are written: sweeps are repeated until none changes
  std::vector<ReachValue> values;
  std::vector<ReachInstruction> instructions;
};

// Reads and checks a program against its masks and labels, for every device: whatever runs it need
// check nothing but the labels themselves.
ReachProgram checked_program(const Tensor& program, const std::vector<Tensor>& masks,
                             const std::vector<Tensor>& labels,
                             const std::vector<int64_t>& inspect);

}  // namespace fastprune
