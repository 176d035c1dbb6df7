// Products of whole matrices of bf16, added up in fp32: those of a linear layer and its backward.
//
//   output           Y  = X W^T + b     rows of X are tokens: A as it lies; W^T is packed
//   input gradient   dX = dY W          likewise
//   weight gradient  dW += dY^T X       in fp32, to the sum of all micro-batches; dY^T is packed
//
// B is packed by panels of 64 columns, a pair of its rows in each word, as tiles (blocks.h) read
// it; of A 64 or 128 rows meet a panel, at most 4,096 of the inner dimension at a time, so that
// what they share stays in the second-level cache.

#include <algorithm>
#include <memory>

#include "blocks.h"
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int64_t DEPTH = 4096;               // of the inner dimension at a time
constexpr int64_t PACKED = int64_t{1} << 20;  // words of B that are packed at a time
constexpr int64_t TOKENS = 2048;              // that a weight gradient adds up at a time

constexpr int64_t AHEAD = 16;  // rows that are fetched before they are packed

struct Matrix {
  const bf16* at;
  int64_t row;  // elements from one row to the next

  const bf16* place(int64_t r, int64_t c) const { return at + r * row + c; }
};

struct Result {
  void* at;
  int64_t row;
  bool wide, add;    // fp32 instead of bf16; added to what is there
  const bf16* bias;  // of each column, or null
};

int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

// Memory of a thread that stays from call to call, so that none is mapped and zeroed for each.
template <typename T>
class Room {
 public:
  T* of(int64_t count) {
    if (count > count_) {
      piece_.reset();
      piece_.reset(new Piece<T>(count));
      count_ = count;
    }
    return *piece_;
  }

 private:
  std::unique_ptr<Piece<T>> piece_;
  int64_t count_ = 0;
};

// ---- packing

// `depth` rows of at most BLOCK columns as a panel, out[pair of rows][BLOCK]; 0 beyond both.
void pack_rows(const Matrix& b, int64_t depth, int64_t columns, uint32_t* out) {
  for (int64_t k = 0; k < depth; k += 2, out += BLOCK) {
    const bf16 *low = b.place(k, 0), *high = b.place(k + 1, 0);
    if (columns == BLOCK && k + 1 < depth) {
      for (int64_t c = 0; c < BLOCK; c += 2 * LANES) {
        __builtin_prefetch(b.place(k + AHEAD, c));
        __builtin_prefetch(b.place(k + AHEAD + 1, c));
      }
      for (int64_t c = 0; c < BLOCK; ++c) out[c] = pair_of(low[c], high[c]);
      continue;
    }
    std::fill_n(out, BLOCK, 0);
    for (int64_t c = 0; c < columns; ++c)
      out[c] = pair_of(low[c], k + 1 < depth ? high[c] : bf16{0});
  }
}

// The same panel of B^T: at most BLOCK rows of `depth` elements each.
void pack_columns(const Matrix& b, int64_t depth, int64_t columns, uint32_t* out) {
  uint32_t room[LANES * LANES], turned[LANES * LANES];
  for (int64_t c = 0; c < BLOCK; c += LANES)
    for (int64_t k = 0; k < depth; k += 2 * LANES) {
      const int64_t rows = std::min(LANES, columns - c), count = std::min(2 * LANES, depth - k);
      uint32_t* to = out + k / 2 * BLOCK + c;
      if (rows == LANES && count == 2 * LANES && b.row % 2 == 0) {
        for (int64_t r = 0; r < LANES; ++r) __builtin_prefetch(b.place(c + LANES + r, k));
        turn_tile(reinterpret_cast<const uint32_t*>(b.place(c, k)), b.row / 2, to, BLOCK);
        continue;
      }
      std::fill_n(room, LANES * LANES, 0);
      for (int64_t r = 0; r < rows; ++r)
        std::memcpy(room + r * LANES, b.place(c + r, k), count * sizeof(bf16));
      turn_tile(room, LANES, turned, LANES);
      for (int64_t p = 0; p < pieces(count, 2); ++p)
        std::memcpy(to + p * BLOCK, turned + p * LANES, LANES * sizeof *to);
    }
}

// At most BLOCK columns of A as rows, out[column][depth], filled up with 0 to `row` elements each.
void pack_turned(const Matrix& a, int64_t depth, int64_t columns, bf16* out, int64_t row) {
  uint32_t panel[LANES * BLOCK];
  uint32_t* words = reinterpret_cast<uint32_t*>(out);
  for (int64_t k = 0; k < depth; k += 2 * LANES) {
    const int64_t count = std::min(2 * LANES, depth - k);
    if (count < 2 * LANES) std::fill_n(panel, LANES * BLOCK, 0);
    pack_rows({a.place(k, 0), a.row}, count, columns, panel);
    for (int64_t c = 0; c < BLOCK; c += LANES)
      turn_tile(panel + c, BLOCK, words + (c * row + k) / 2, row / 2);
  }
}

// ---- blocks

// Where rows of a block go: `columns` of each.
void put_rows_of_block(const float* block, int64_t rows, int64_t columns, const Result& out,
                       int64_t r0, int64_t c0) {
  for (int64_t r = 0; r < rows; ++r, block += BLOCK) {
    const int64_t at = (r0 + r) * out.row + c0;
    float* wide = static_cast<float*>(out.at) + at;
    bf16* narrow = static_cast<bf16*>(out.at) + at;
    along(0, columns, [&](int64_t c, auto number) {
      auto there = number;
      load(number, block + c);
      if (out.bias) {
        load(there, out.bias + c0 + c);
        number += there;
      }
      if (out.wide && out.add) {
        load(there, wide + c);
        number += there;
      }
      if (out.wide)
        store(wide + c, number);
      else
        store(narrow + c, number);
    });
  }
}

// Fetch the lines that rows of a block are written to.
void expect(const Result& out, int64_t r0, int64_t rows, int64_t c0) {
  const int64_t size = out.wide ? sizeof(float) : sizeof(bf16);
  for (int64_t r = r0; r < r0 + rows; ++r)
    for (int64_t line = 0; line < BLOCK * size; line += 64)
      __builtin_prefetch(static_cast<char*>(out.at) + (r * out.row + c0) * size + line, 1);
}

// A block of C: A times a panel. Rows are written as they are ready, so that stores to memory
// lie between products.
void multiply_block(const bf16* a, int64_t a_row, const uint32_t* panel, int64_t depth,
                    int64_t rows, int64_t columns, float* room, const Result& out, int64_t r0,
                    int64_t c0) {
  for (int64_t k = 0; k < depth; k += DEPTH) {
    const int64_t pairs = pieces(std::min(DEPTH, depth - k), 2);
    const bool last = k + DEPTH >= depth;
    for (int64_t r = 0; r < rows; r += 4) {
      const int64_t some = std::min<int64_t>(4, rows - r);
      float* sums = depth > DEPTH ? room + r * BLOCK : room;
      if (last) expect(out, r0 + r, some, c0);
      multiply({a + r * a_row + k, a_row, panel + k / 2 * BLOCK, pairs, BLOCK, sums, k > 0}, some);
      if (last) put_rows_of_block(sums, some, columns, out, r0 + r, c0);
    }
  }
}

// The sums of at most BLOCK columns.
void sum_columns(const Matrix& a, int64_t depth, int64_t columns, float* out, bool add) {
  float sums[BLOCK] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const bf16* row = a.place(k, 0);
    if (columns == BLOCK)
      for (int64_t c = 0; c < BLOCK; ++c) sums[c] += widen(row[c]);
    else
      for (int64_t c = 0; c < columns; ++c) sums[c] += widen(row[c]);
  }
  for (int64_t c = 0; c < columns; ++c) out[c] = add ? out[c] + sums[c] : sums[c];
}

struct Sizes {
  int64_t rows, columns, depth;
};

struct Factors {
  Matrix a, b;
  bool a_turned, b_turned;  // given as its transpose
};

// How many panels of `all` go to one thread with a block of rows, so that there is enough for all.
int64_t panels_of_task(int64_t blocks, int64_t all) {
#ifdef _OPENMP
  const int64_t wanted = omp_get_max_threads() > 1 ? 2 * omp_get_max_threads() : 1;
#else
  const int64_t wanted = 1;
#endif
  return pieces(all, std::min(all, pieces(wanted, blocks)));
}

// C = or += A B; sums: of A's rows, where A is given turned, or null.
void product(const Factors& f, const Sizes& n, const Result& out, float* sums, bool add_sums) {
  if (n.rows == 0 || n.columns == 0) return;
  const int64_t pairs = pieces(n.depth, 2), panels = pieces(n.columns, BLOCK);
  const int64_t height = f.a_turned ? BLOCK : 2 * BLOCK, blocks = pieces(n.rows, height);
  const int64_t group = std::max<int64_t>(1, std::min(panels, PACKED / (pairs * BLOCK)));
  const int64_t padded = pieces(n.depth, 2 * LANES) * 2 * LANES;
  thread_local Room<uint32_t> kept;
  uint32_t* packed = kept.of(group * pairs * BLOCK);
  for (int64_t begin = 0; begin < panels; begin += group) {
    const int64_t end = std::min(panels, begin + group);
    const int64_t span = panels_of_task(blocks, end - begin);
#pragma omp parallel if (n.rows * n.columns > 4096)
    {
#pragma omp for
      for (int64_t p = begin; p < end; ++p) {
        const int64_t c = p * BLOCK, columns = std::min(BLOCK, n.columns - c);
        uint32_t* panel = packed + (p - begin) * pairs * BLOCK;
        if (f.b_turned)
          pack_columns({f.b.place(c, 0), f.b.row}, n.depth, columns, panel);
        else
          pack_rows({f.b.place(0, c), f.b.row}, n.depth, columns, panel);
      }
      thread_local Room<bf16> kept_turned;
      thread_local Room<float> kept_sums;
      bf16* turned = f.a_turned ? kept_turned.of(BLOCK * padded) : nullptr;
      float* room = kept_sums.of(height * BLOCK);
#pragma omp for collapse(2)
      for (int64_t task = 0; task < blocks; ++task)
        for (int64_t first = begin; first < end; first += span) {
          const int64_t r = task * height, rows = std::min(height, n.rows - r);
          if (f.a_turned) {
            const Matrix columns{f.a.place(0, r), f.a.row};
            pack_turned(columns, n.depth, rows, turned, padded);
            if (sums && first == 0) sum_columns(columns, n.depth, rows, sums + r, add_sums);
          }
          for (int64_t p = first; p < std::min(end, first + span); ++p) {
            const int64_t c = p * BLOCK;
            multiply_block(f.a_turned ? turned : f.a.place(r, 0), f.a_turned ? padded : f.a.row,
                           packed + (p - begin) * pairs * BLOCK, n.depth, rows,
                           std::min(BLOCK, n.columns - c), room, out, r, c);
          }
        }
    }
  }
}

}  // namespace

// Whether the processor multiplies pairs of bf16 in one instruction, and has no faster way that the
// library takes: AMX multiplies tiles.
extern "C" int products_are_fast() {
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
  return 1;
#else
  return 0;
#endif
}

// out (rows x columns) = or += A B + bias. sizes: rows, columns, depth (even), A's, B's and out's
// row. b_turned: B is given as columns x depth. wide: out is fp32.
extern "C" void product_bfloat16(const int64_t* sizes, const bf16* a, const bf16* b,
                                 int64_t b_turned, const bf16* bias, void* out, int64_t wide,
                                 int64_t add) {
  product({{a, sizes[3]}, {b, sizes[4]}, false, b_turned != 0}, {sizes[0], sizes[1], sizes[2]},
          {out, sizes[5], wide != 0, add != 0, bias}, nullptr, false);
}

// total (outputs x inputs, fp32) = or += grad^T x, and likewise the sums of grad over tokens, if
// wanted. sizes: outputs, inputs, tokens, the row of grad, of x.
extern "C" void weight_gradient_bfloat16(const int64_t* sizes, const bf16* grad, const bf16* x,
                                         float* total, int64_t add, float* sums, int64_t add_sums) {
  const int64_t tokens = sizes[2];
  if (tokens == 0 && !add) std::fill_n(total, sizes[0] * sizes[1], 0.0f);
  if (tokens == 0 && sums && !add_sums) std::fill_n(sums, sizes[0], 0.0f);
  for (int64_t t = 0; t < tokens; t += TOKENS)
    product({{grad + t * sizes[3], sizes[3]}, {x + t * sizes[4], sizes[4]}, true, false},
            {sizes[0], sizes[1], std::min(TOKENS, tokens - t)},
            {total, sizes[1], true, add || t > 0, nullptr}, sums, add_sums || t > 0);
}
