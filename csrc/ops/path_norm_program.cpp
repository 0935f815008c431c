#include <string>

#include "ops/path_norm.h"

namespace fastprune {
namespace {

constexpr const char* kOp = "path_norm_reach";

// The arguments of one instruction, read in order.
class Reader {
 public:
  Reader(const int64_t* at, int64_t left) : at_(at), left_(left) {}
  int64_t next() {
    STD_TORCH_CHECK(left_ > 0, kOp, ": program: expected more values, got its end");
    --left_;
    return *at_++;
  }
  int64_t least(int64_t low, const char* what) {
    const int64_t value = next();
    STD_TORCH_CHECK(value >= low, kOp, ": program: ", what, ": expected at least ", low, ", got ",
                    value);
    return value;
  }
  int64_t index(int64_t size, const char* what) {
    const int64_t value = next();
    STD_TORCH_CHECK(value >= 0 && value < size, kOp, ": program: ", what, ": expected 0 to ",
                    size - 1, ", got ", value);
    return value;
  }
  int64_t left() const { return left_; }
  Reader part(int64_t n) {
    STD_TORCH_CHECK(n >= 0 && n <= left_, kOp, ": program: expected ", n, " arguments, got ",
                    left_);
    const Reader inner(at_, n);
    at_ += n;
    left_ -= n;
    return inner;
  }

 private:
  const int64_t* at_;
  int64_t left_;
};

void check_value(const ReachValue& v, int64_t planes, int64_t bits, const char* what) {
  STD_TORCH_CHECK(v.planes == planes && v.bits == bits, kOp, ": program: ", what, ": expected ",
                  planes, " planes of ", bits, " bits, got ", v.planes, " of ", v.bits);
}

void read_geometry(Reader& reader, ReachGeometry& g) {
  g.rows = reader.least(1, "rows");
  g.groups = reader.least(1, "groups");
  g.depth = reader.least(1, "depth");
  STD_TORCH_CHECK(g.rows % g.groups == 0, kOp, ": program: groups: expected a divisor of ", g.rows,
                  " rows, got ", g.groups);
  for (int64_t* dims : {g.large, g.small, g.kernel, g.stride}) {
    for (int i = 0; i < 3; ++i) dims[i] = reader.least(1, "sizes");
  }
  for (int i = 0; i < 3; ++i) g.padding[i] = reader.least(0, "padding");
  for (int i = 0; i < 3; ++i) g.dilation[i] = reader.least(1, "dilation");
  for (const int64_t* dims : {g.large, g.small, g.kernel}) {
    checked_product(checked_product(dims[0], dims[1], kOp), dims[2], kOp);
  }
  checked_product(checked_product(g.depth, g.groups, kOp), g.large_bits(), kOp);
  checked_product(g.rows, g.small_bits(), kOp);
}

void check_mask(const ReachInstruction& i, const std::vector<Tensor>& masks) {
  if (i.mask < 0) return;
  const Tensor& mask = masks[static_cast<size_t>(i.mask)];
  const int64_t wanted = checked_product(i.mask_rows(), i.mask_cols(), kOp);
  STD_TORCH_CHECK(mask.numel() == wanted, kOp, ": masks[", i.mask, "]: expected ", wanted,
                  " elements, got ", mask.numel());
}

// A mask has one layout, however many instructions use it.
void check_uses(const ReachProgram& program, size_t masks) {
  std::vector<const ReachInstruction*> first(masks);
  for (const ReachInstruction& i : program.instructions) {
    if (i.mask < 0) continue;
    const ReachInstruction*& use = first[static_cast<size_t>(i.mask)];
    if (use == nullptr) use = &i;
    STD_TORCH_CHECK(use->mask_rows() == i.mask_rows() && use->mask_cols() == i.mask_cols(), kOp,
                    ": masks[", i.mask, "]: expected the same rows and columns at every use");
  }
}

ReachInstruction read_instruction(int64_t opcode, Reader reader, const ReachProgram& program,
                                  const std::vector<Tensor>& masks,
                                  const std::vector<Tensor>& labels) {
  const int64_t n_values = static_cast<int64_t>(program.values.size());
  const auto value = [&] { return reader.index(n_values, "value"); };
  const auto of = [&](int64_t v) -> const ReachValue& {
    return program.values[static_cast<size_t>(v)];
  };
  STD_TORCH_CHECK(opcode >= 0 && opcode <= 6, kOp, ": program: unknown instruction ", opcode);
  ReachInstruction i{};
  i.op = static_cast<ReachOp>(opcode);
  i.mask = -1;
  if (i.op == ReachOp::input || i.op == ReachOp::output) {
    i.values = {value()};
  } else if (i.op == ReachOp::join) {
    i.values = {value()};
    while (reader.left() > 0) {
      i.values.push_back(value());
      const ReachValue& out = of(i.values[0]);
      check_value(of(i.values.back()), out.planes, out.bits, "join");
    }
  } else {
    const int64_t in = value();
    i.values = {in, value()};
  }
  if (i.op == ReachOp::conv || i.op == ReachOp::linear) {
    i.mask = reader.next();
    STD_TORCH_CHECK(i.mask >= -1 && i.mask < static_cast<int64_t>(masks.size()), kOp,
                    ": program: mask: expected -1 to ", masks.size(), " - 1, got ", i.mask);
  }
  if (i.op == ReachOp::conv) {
    i.transposed = reader.next() != 0;
    read_geometry(reader, i.geometry);
    const ReachGeometry& g = i.geometry;
    check_value(of(i.values[i.transposed ? 1 : 0]), g.planes(), g.large_bits(), "large side");
    check_value(of(i.values[i.transposed ? 0 : 1]), g.rows, g.small_bits(), "small side");
  } else if (i.op == ReachOp::linear) {
    i.rows = reader.least(0, "rows");
    i.cols = reader.least(0, "cols");
    i.tokens = reader.least(0, "tokens");
    check_value(of(i.values[0]), i.tokens, i.cols, "linear input");
    check_value(of(i.values[1]), i.tokens, i.rows, "linear output");
  } else if (i.op == ReachOp::copy) {
    STD_TORCH_CHECK(of(i.values[0]).elements() == of(i.values[1]).elements(), kOp,
                    ": program: copy: expected as many elements in as out, got ",
                    of(i.values[0]).elements(), " and ", of(i.values[1]).elements());
  } else if (i.op == ReachOp::groups) {
    i.in_labels = reader.index(static_cast<int64_t>(labels.size()), "labels");
    i.out_labels = reader.index(static_cast<int64_t>(labels.size()), "labels");
    i.groups = reader.least(0, "number of groups");
    for (const int side : {0, 1}) {
      const Tensor& l = labels[static_cast<size_t>(side == 0 ? i.in_labels : i.out_labels)];
      const std::string name =
          "labels[" + std::to_string(side == 0 ? i.in_labels : i.out_labels) + "]";
      check_dtype(l, ScalarType::Int, kOp, name.c_str());
      check_dim(l, 1, kOp, name.c_str());
      check_size(l, 0, of(i.values[static_cast<size_t>(side)]).elements(), kOp, name.c_str());
    }
  }
  STD_TORCH_CHECK(reader.left() == 0, kOp, ": program: instruction ", opcode, ": expected ",
                  reader.left(), " arguments fewer");
  check_mask(i, masks);
  return i;
}

}  // namespace

ReachProgram checked_program(const Tensor& program, const std::vector<Tensor>& masks,
                             const std::vector<Tensor>& labels,
                             const std::vector<int64_t>& inspect) {
  STD_TORCH_CHECK(program.is_cpu(), kOp, ": program: expected a CPU tensor");
  check_dtype(program, ScalarType::Long, kOp, "program");
  check_dim(program, 1, kOp, "program");
  const Tensor code = dense(program);
  Reader reader(static_cast<const int64_t*>(code.const_data_ptr()), code.numel());
  for (size_t m = 0; m < masks.size(); ++m) {
    const std::string name = "masks[" + std::to_string(m) + "]";
    check_dtype(masks[m], ScalarType::Bool, kOp, name.c_str());
  }
  ReachProgram read{};
  read.cyclic = reader.next() != 0;
  const int64_t n_values = reader.least(0, "number of values");
  STD_TORCH_CHECK(n_values <= reader.left(), kOp, ": program: expected the sizes of ", n_values,
                  " values");
  for (int64_t v = 0; v < n_values; ++v) {
    const int64_t planes = reader.least(0, "planes");
    const int64_t bits = reader.least(0, "bits");
    checked_product(planes, bits + 64, kOp);
    read.values.push_back(ReachValue{planes, bits});
  }
  while (reader.left() > 0) {
    const int64_t opcode = reader.next(), arguments = reader.next();
    read.instructions.push_back(
        read_instruction(opcode, reader.part(arguments), read, masks, labels));
  }
  check_uses(read, masks.size());
  for (const int64_t v : inspect) {
    STD_TORCH_CHECK(v >= 0 && v < n_values, kOp, ": inspect: expected values 0 to ", n_values - 1,
                    ", got ", v);
  }
  return read;
}

}  // namespace fastprune
