// Products of small blocks of bf16, added up in fp32, and the orders in which they read them.
//
// C += A B, where A lies by rows and B by pairs of its rows, next to one another in one word: so
// AVX512_BF16 multiplies and adds 32 of them in one instruction. Elsewhere it is written out.

#pragma once

#include <algorithm>
#include <new>

#include "values.h"

namespace {

constexpr int64_t BLOCK = 64;  // queries, and keys, of a block

// ---- products: C (rows x columns, fp32) = or += A B

// sum + a[0] b[0] + a[1] b[1] of the two bf16 in a and in each lane of b
inline Lanes add_products(Lanes sum, const void* a, const uint32_t* b) {
  uint32_t pair;
  std::memcpy(&pair, a, sizeof pair);
#ifdef __AVX512BF16__
  const __m512i both = _mm512_loadu_si512(b);
  return (Lanes)_mm512_dpbf16_ps((__m512)sum, (__m512bh)both, (__m512bh)_mm512_set1_epi32(pair));
#else
  const float low = bits_to_float(pair << 16), high = bits_to_float(pair & 0xffff0000u);
  for (int i = 0; i < LANES; ++i)
    sum[i] += low * bits_to_float(b[i] << 16) + high * bits_to_float(b[i] & 0xffff0000u);
  return sum;
#endif
}

struct Product {
  const bf16* a;      // rows, each `pairs` pairs of bf16 long
  int64_t a_row;      // elements from one row of it to the next
  const uint32_t* b;  // pairs x columns: the two bf16 of a pair are those of two rows of B
  int64_t pairs;
  int64_t columns;  // a multiple of LANES
  float* c;         // rows of `columns`
  bool add;
};

template <int ROWS, int VECTORS>
inline void multiply_tile(const Product& p, int64_t row, int64_t column) {
  Lanes sum[ROWS][VECTORS];
  float* c = p.c + row * p.columns + column;
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v)
      if (p.add)
        std::memcpy(&sum[r][v], c + r * p.columns + v * LANES, sizeof(Lanes));
      else
        sum[r][v] = Lanes{};
  const bf16* a = p.a + row * p.a_row;
  const uint32_t* b = p.b + column;
  for (int64_t k = 0; k < p.pairs; ++k) {
    for (int r = 0; r < ROWS; ++r)
      for (int v = 0; v < VECTORS; ++v)
        sum[r][v] = add_products(sum[r][v], a + r * p.a_row + 2 * k, b + v * LANES);
    b += p.columns;
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < VECTORS; ++v)
      std::memcpy(c + r * p.columns + v * LANES, &sum[r][v], sizeof(Lanes));
}

template <int ROWS>
inline void multiply_rows(const Product& p, int64_t row) {
  int64_t column = 0;
  for (; column + 4 * LANES <= p.columns; column += 4 * LANES)
    multiply_tile<ROWS, 4>(p, row, column);
  for (; column < p.columns; column += LANES) multiply_tile<ROWS, 1>(p, row, column);
}

void multiply(const Product& p, int64_t rows) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) multiply_rows<4>(p, row);
  for (; row < rows; ++row) multiply_rows<1>(p, row);
}

// ---- tensors as products want them

// Memory that begins at a cache line.
template <typename T>
class Piece {
 public:
  explicit Piece(int64_t count) : at_(static_cast<T*>(operator new(count * sizeof(T), ALIGN))) {}
  ~Piece() { operator delete(at_, ALIGN); }
  Piece(const Piece&) = delete;
  Piece& operator=(const Piece&) = delete;
  operator T*() const { return at_; }

 private:
  static constexpr std::align_val_t ALIGN{64};
  T* at_;
};

inline uint32_t pair_of(bf16 low, bf16 high) { return low.bits | uint32_t(high.bits) << 16; }

// The two numbers of each lane, rounded, in one word.
inline void store_pairs(uint32_t* to, const Lanes& low, const Lanes& high) {
#ifdef __AVX512BF16__
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, both));
#else
  bf16 one, two;
  for (int64_t i = 0; i < LANES; ++i) {
    put(one, low[i]);
    put(two, high[i]);
    to[i] = pair_of(one, two);
  }
#endif
}

// Pairs of features of a row, filled up to whole vectors.
inline int64_t half_of(int64_t width) { return (width / 2 + LANES - 1) / LANES * LANES; }

// Turn 16 x 16 words: out[j][i] = in[i][j]; strides in words.
void turn_tile(const uint32_t* in, int64_t in_row, uint32_t* out, int64_t out_row) {
#ifdef __AVX512F__
  __m512i a[LANES], b[LANES];
  for (int i = 0; i < LANES; ++i) a[i] = _mm512_loadu_si512(in + i * in_row);
  for (int i = 0; i < LANES; i += 2) {  // pairs of rows: words 0, 1 of each quarter, then 2, 3
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < LANES; i += 4)  // four rows: word j of each quarter is in a[i + j]
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  // the quarters themselves: quarter q of a[4 i + j] is column 4 q + j
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88);
    const __m512i odd_low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    const __m512i even_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    const __m512i odd_high = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    _mm512_storeu_si512(out + j * out_row, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
    _mm512_storeu_si512(out + (4 + j) * out_row, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_si512(out + (8 + j) * out_row, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
    _mm512_storeu_si512(out + (12 + j) * out_row, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
  }
#else
  for (int64_t i = 0; i < LANES; ++i)
    for (int64_t j = 0; j < LANES; ++j) out[j * out_row + i] = in[i * in_row + j];
#endif
}

// The same of any number of tiles: `rows` and `columns` are multiples of LANES.
void turn(const uint32_t* in, int64_t rows, int64_t columns, uint32_t* out) {
  for (int64_t r = 0; r < rows; r += LANES)
    for (int64_t c = 0; c < columns; c += LANES)
      turn_tile(in + r * columns + c, columns, out + c * rows + r, rows);
}

// A block of rows as B: out[pair of rows][feature]; rows beyond `count` are 0.
void pairs_of_rows(const bf16* rows, int64_t stride, int64_t count, int64_t width, uint32_t* out) {
  if (count < BLOCK) std::memset(out, 0, BLOCK / 2 * width * sizeof *out);
  for (int64_t r = 0; r < count; r += 2) {
    const bf16* low = rows + r * stride;
    const bf16* high = low + stride;
    uint32_t* line = out + r / 2 * width;
    if (r + 1 < count)
      for (int64_t d = 0; d < width; ++d) line[d] = pair_of(low[d], high[d]);
    else
      for (int64_t d = 0; d < width; ++d) line[d] = pair_of(low[d], bf16{0});
  }
}

// The same rows as B^T: out[pair of features][row]; `room` has BLOCK rows of `half_of(width)`
// words.
void pairs_of_features(const bf16* rows, int64_t stride, int64_t count, int64_t width,
                       uint32_t* room, uint32_t* out) {
  const int64_t half = half_of(width);
  if (count < BLOCK || 2 * half > width) std::memset(room, 0, BLOCK * half * sizeof *room);
  for (int64_t r = 0; r < count; ++r)
    std::memcpy(room + r * half, rows + r * stride, width * sizeof *rows);
  turn(room, BLOCK, half, out);
}

// A head's rows by blocks of keys, each turned: out[block][feature][key]; 0 beyond the last key.
void turned(const bf16* rows, int64_t stride, int64_t length, int64_t width, uint32_t* room,
            bf16* out) {
  for (int64_t begin = 0; begin < length; begin += BLOCK) {
    pairs_of_rows(rows + begin * stride, stride, std::min(BLOCK, length - begin), width, room);
    turn(room, BLOCK / 2, width, reinterpret_cast<uint32_t*>(out + begin * width));
  }
}

// Turned fp32 of a block of queries -> their rows, each times its factor.
void put_rows(const float* turned, int64_t count, int64_t width, const float* factors, float* room,
              bf16* out, int64_t stride) {
  turn(reinterpret_cast<const uint32_t*>(turned), width, BLOCK, reinterpret_cast<uint32_t*>(room));
  for (int64_t r = 0; r < count; ++r)
    along(0, width, [&](int64_t d, auto number) {
      load(number, room + r * width + d);
      store(out + r * stride + d, number * factors[r]);
    });
}

}  // namespace
