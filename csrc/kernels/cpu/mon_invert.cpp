// Gauss-Jordan elimination in place, several pivots at a time, without pivoting.
//
// That is stable here. Let the Hermitian part of M be at least c > 0, and M be cut into
// (P Q; R S). Then |P^-1| <= 1 / c, and for the Schur complement C = S - R P^-1 Q and any x, with
// y = -P^-1 Q x, x* C x = (y; x)* M (y; x): its Hermitian part is at least c again, and
// |C| <= |M| + |M|^2 / c. So no pivot comes near zero, and growth is bounded; the layer's matrices
// have c >= 1 and a norm of a few. Golub and Van Loan 1979, "Unsymmetric positive definite linear
// systems"; Higham 2002, section 10.4.
#include "kernels/cpu/mon_invert.h"

#include "kernels/cpu/simd.h"

namespace fastprune::FASTPRUNE_ISA {
namespace {

// Pivots at a time: the matrix (840 KB at n = 81) comes from L2 once for each such block.
constexpr int64_t kPivots = 8;
// Rows and columns of a register tile, two vectors each; columns whose pivot rows stay in L1.
#if defined(__AVX512F__)
constexpr int kTile = 3;
#else
constexpr int kTile = 2;
#endif
constexpr int64_t kColumns = 12;

// Rows between one and the next part's first; parts of nearly one size.
struct Parts {
  int64_t begin, size, parts;
  Parts(int64_t from, int64_t to, int64_t largest)
      : begin(from), size(to - from), parts((to - from + largest - 1) / largest) {}
  int64_t at(int64_t part) const { return begin + size * part / parts; }
};

// s -= left * right: R x C of `depth` complex products each. s: rows `pitch` vectors apart; left:
// [row][depth]; right: [depth][C].
template <typename T, int R, int C>
void tile_product(Vec<T>* s, int64_t pitch, const Vec<T>* left, const Vec<T>* right,
                  int64_t depth) {
  Vec<T> re[R][C], im[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      re[r][c] = s[r * pitch + 2 * c], im[r][c] = s[r * pitch + 2 * c + 1];
    }
  }
  for (int64_t k = 0; k < depth; ++k, right += 2 * C) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> lr = left[2 * (r * depth + k)], li = left[2 * (r * depth + k) + 1];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const Vec<T> rr = right[2 * c], ri = right[2 * c + 1];
        re[r][c] -= lr * rr, im[r][c] -= lr * ri;
        re[r][c] += li * ri, im[r][c] -= li * rr;
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      s[r * pitch + 2 * c] = re[r][c], s[r * pitch + 2 * c + 1] = im[r][c];
    }
  }
}
template <typename T, int R = kTile, int C = kTile>
void any_tile_product(int64_t rows, int64_t columns, Vec<T>* s, int64_t pitch, const Vec<T>* left,
                      const Vec<T>* right, int64_t depth) {
  if constexpr (R > 1) {
    if (rows < R) {
      return any_tile_product<T, R - 1, C>(rows, columns, s, pitch, left, right, depth);
    }
  }
  if constexpr (C > 1) {
    if (columns < C) {
      return any_tile_product<T, R, C - 1>(rows, columns, s, pitch, left, right, depth);
    }
  }
  tile_product<T, R, C>(s, pitch, left, right, depth);
}

template <typename T>
struct Complex {
  Vec<T> re, im;
};
// Scaled, so that no square overflows to an inverse of zero; 0, infinity and NaN give NaN.
template <typename T>
Complex<T> reciprocal(Vec<T> re, Vec<T> im) {
  const Vec<T> size_re = re < T(0) ? -re : re, size_im = im < T(0) ? -im : im;
  const Vec<T> size = size_re > size_im ? size_re : size_im;
  const Vec<T> r = re / size, i = im / size, factor = T(1) / (r * r + i * i) / size;
  return {r * factor, -i * factor};
}

template <typename T>
class Inverter {
 public:
  static constexpr int W = kLanes<T>;

  Inverter(const MonInvert& args, void* scratch)
      : a_(args),
        n_(args.n),
        // Rows an odd number of complex vectors apart: columns then spread over the cache's sets.
        pitch_(2 * (args.n | 1)),
        panel_(static_cast<Vec<T>*>(scratch)),
        left_(panel_ + n_ * pitch_),
        right_(left_ + 2 * n_ * kPivots) {}

  static int64_t vectors(int64_t n) { return 2 * n * (n | 1) + 4 * n * kPivots; }

  void run(int64_t group) {
    const int64_t first = group * W, left = a_.count - first;
    filled_ = left < W ? static_cast<int>(left) : W;
    read(static_cast<const T*>(a_.from) + first * 2 * n_ * n_);
    const Parts blocks(0, n_, kPivots);
    for (int64_t b = 0; b < blocks.parts; ++b) eliminate(blocks.at(b), blocks.at(b + 1));
    write(static_cast<T*>(a_.to) + first * 2 * n_ * n_);
  }

 private:
  Vec<T>* at(int64_t row, int64_t column) const { return panel_ + row * pitch_ + 2 * column; }

  // Element by element of a row, the matrices into the lanes. Lanes without a matrix get the first.
  void read(const T* from) {
    const Vec<T> scale = broadcast(static_cast<T>(a_.scale));
    for (int64_t i = 0; i < n_; ++i, from += 2 * n_) {
      for (int64_t e = 0; e < 2 * n_; e += W) {
        const int count = 2 * n_ - e < W ? static_cast<int>(2 * n_ - e) : W;
        Vec<T> v[W];
        for (int l = 0; l < W; ++l) {
          const T* p = from + (l < filled_ ? l : 0) * 2 * n_ * n_ + e;
          v[l] = count == W ? load(p) : load_part(p, count);
        }
        transpose<T>(v);
        for (int l = 0; l < count; ++l) at(i, 0)[e + l] = v[l] * scale;
      }
      *at(i, i) += static_cast<T>(a_.shift);
    }
  }
  void write(T* to) const {
    for (int64_t i = 0; i < n_; ++i, to += 2 * n_) {
      for (int64_t e = 0; e < 2 * n_; e += W) {
        const int count = 2 * n_ - e < W ? static_cast<int>(2 * n_ - e) : W;
        Vec<T> v[W];
        for (int l = 0; l < W; ++l) v[l] = at(i, 0)[e + (l < count ? l : 0)];
        transpose<T>(v);
        for (int l = 0; l < filled_; ++l) store_part(to + l * 2 * n_ * n_ + e, v[l], count);
      }
    }
  }

  // The pivots [begin, end), P of (P Q; R S): becomes (P^-1, P^-1 Q; -R P^-1, S - R P^-1 Q). With
  // the identity in place of P and zeros in place of R, all of it is two products:
  // (P^-1)(I Q), and (0 S) - R times that.
  void eliminate(int64_t begin, int64_t end) {
    const int64_t b = end - begin;
    Vec<T> negative[2 * kPivots * kPivots];
    invert_pivots(begin, b, negative);
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t j = begin; j < end; ++j) {
        at(k, j)[0] = broadcast(T(k == j ? 1 : 0)), at(k, j)[1] = Vec<T>{};
      }
    }
    take_rows(begin, b);
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t e = 0; e < 2 * n_; ++e) at(k, 0)[e] = Vec<T>{};
    }
    subtract(begin, end, negative, b);
    take_rows(begin, b);
    for (int64_t i = 0; i < n_; ++i) {
      if (i == begin) i = end;
      if (i == n_) break;
      for (int64_t e = 0; e < 2 * b; ++e) {
        left_[2 * i * b + e] = at(i, begin)[e];
        at(i, begin)[e] = Vec<T>{};
      }
    }
    subtract(0, begin, left_, b);
    subtract(end, n_, left_ + 2 * end * b, b);
  }

  // -P^-1, [row][column].
  void invert_pivots(int64_t begin, int64_t b, Vec<T>* p) const {
    for (int64_t i = 0; i < b; ++i) {
      for (int64_t e = 0; e < 2 * b; ++e) p[2 * i * b + e] = at(begin + i, begin)[e];
    }
    for (int64_t k = 0; k < b; ++k) {
      Vec<T>* row = p + 2 * k * b;
      const Complex<T> inverse = reciprocal<T>(row[2 * k], row[2 * k + 1]);
      row[2 * k] = broadcast(T(1)), row[2 * k + 1] = Vec<T>{};
      for (int64_t j = 0; j < b; ++j) {
        const Vec<T> re = row[2 * j], im = row[2 * j + 1];
        row[2 * j] = re * inverse.re - im * inverse.im;
        row[2 * j + 1] = re * inverse.im + im * inverse.re;
      }
      for (int64_t i = 0; i < b; ++i) {
        if (i == k) continue;
        Vec<T>* other = p + 2 * i * b;
        const Vec<T> re = other[2 * k], im = other[2 * k + 1];
        other[2 * k] = other[2 * k + 1] = Vec<T>{};
        for (int64_t j = 0; j < b; ++j) {
          other[2 * j] -= re * row[2 * j] - im * row[2 * j + 1];
          other[2 * j + 1] -= re * row[2 * j + 1] + im * row[2 * j];
        }
      }
    }
    for (int64_t e = 0; e < 2 * b * b; ++e) p[e] = -p[e];
  }

  // The pivot rows into right_, by register tiles: [tile][row][column of the tile].
  void take_rows(int64_t begin, int64_t b) {
    const Parts tiles(0, n_, kTile);
    Vec<T>* to = right_;
    for (int64_t t = 0; t < tiles.parts; ++t) {
      const int64_t first = tiles.at(t), count = 2 * (tiles.at(t + 1) - first);
      for (int64_t k = 0; k < b; ++k) {
        for (int64_t e = 0; e < count; ++e) *to++ = at(begin + k, first)[e];
      }
    }
  }

  // The rows [from, to) -= left * right_; left: [row - from][b].
  void subtract(int64_t from, int64_t to, const Vec<T>* left, int64_t b) {
    const Parts rows(from, to, kTile), tiles(0, n_, kTile);
    for (int64_t t = 0; t < tiles.parts; t += kColumns / kTile) {
      const int64_t stop = t + kColumns / kTile < tiles.parts ? t + kColumns / kTile : tiles.parts;
      for (int64_t r = 0; r < rows.parts; ++r) {
        const int64_t row = rows.at(r), height = rows.at(r + 1) - row;
        for (int64_t u = t; u < stop; ++u) {
          const int64_t column = tiles.at(u), width = tiles.at(u + 1) - column;
          any_tile_product<T>(height, width, at(row, column), pitch_, left + 2 * (row - from) * b,
                              right_ + 2 * column * b, b);
        }
      }
    }
  }

  const MonInvert& a_;
  const int64_t n_, pitch_;
  Vec<T>* const panel_;
  Vec<T>* const left_;   // [row][pivot]: what was in the columns of the pivots
  Vec<T>* const right_;  // the rows of the pivots
  int filled_ = 0;
};

template <typename T>
void invert_groups(const MonInvert& args, int64_t begin, int64_t end, void* scratch) {
  Inverter<T> inverter(args, scratch);
  for (int64_t g = begin; g < end; ++g) inverter.run(g);
}

int64_t lanes_of(DType dtype) { return dtype == DType::f64 ? kLanes<double> : kLanes<float>; }

}  // namespace

int64_t mon_invert_groups(const MonInvert& args) {
  const int64_t lanes = lanes_of(args.dtype);
  return (args.count + lanes - 1) / lanes;
}

int64_t mon_invert_scratch(const MonInvert& args) {
  return Inverter<float>::vectors(args.n) * kVectorBytes;
}

void mon_invert(const MonInvert& args, int64_t begin, int64_t end, void* scratch) {
  if (args.dtype == DType::f64) {
    invert_groups<double>(args, begin, end, scratch);
  } else {
    invert_groups<float>(args, begin, end, scratch);
  }
}

}  // namespace fastprune::FASTPRUNE_ISA
