// Attention of bf16 heads in one pass over blocks of 64 queries and 64 keys (flash attention,
// arXiv:2307.08691), whose scores never leave the caches.
//
//   forward   S^T = K Q^T,  P^T = 2^(c S^T - m),  O^T += V^T P^T; m and the sums follow online
//   backward  P^T = 2^(c S^T - z), z = log2 of the sum,  dV += P^T dO,  dP^T = V dO^T,
//             dS^T = scale P^T (dP^T - sum(dO O)),  dK += dS^T Q,  dQ^T += K^T dS^T
//
// Scores are kept with a key in each row and the queries beside one another, so that maxima and sums
// of a query are taken lane by lane, and P^T lies as the next product reads it. Products multiply
// pairs of bf16 and add in fp32, as AVX512_BF16 does in one instruction; elsewhere it is written out.

#include <algorithm>
#include <new>

#include "values.h"
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t BLOCK = 64;       // queries, and keys, of a block
constexpr float UNSEEN = -1e30f;    // a score; finite, so that two of them have a difference
constexpr float LOG2_E = 1.44269504089f;

typedef float Lanes __attribute__((vector_size(64)));

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
  const bf16* a;       // rows, each `pairs` pairs of bf16 long
  int64_t a_row;       // elements from one row of it to the next
  const uint32_t* b;   // pairs x columns: the two bf16 of a pair are those of two rows of B
  int64_t pairs;
  int64_t columns;     // a multiple of LANES
  float* c;            // rows of `columns`
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
  for (; column + 4 * LANES <= p.columns; column += 4 * LANES) multiply_tile<ROWS, 4>(p, row, column);
  for (; column < p.columns; column += LANES) multiply_tile<ROWS, 1>(p, row, column);
}

void multiply(const Product& p, int64_t rows) {
  int64_t row = 0;
  for (; row + 4 <= rows; row += 4) multiply_rows<4>(p, row);
  for (; row < rows; ++row) multiply_rows<1>(p, row);
}

// ---- the tensors, and how products want them

struct Heads {
  const bf16* first;
  int64_t of_sample, of_head, of_place;  // strides in elements; those of a head's features are 1

  const bf16* of(int64_t sample, int64_t head) const {
    return first + sample * of_sample + head * of_head;
  }
};

struct Shape {
  int64_t samples, heads, kv_heads, length, width;
};

// Memory of one thread, by pieces that begin at a cache line.
class Room {
 public:
  explicit Room(int64_t bytes) : at_(static_cast<char*>(operator new(bytes, ALIGN))), begin_(at_) {}
  ~Room() { operator delete(begin_, ALIGN); }
  Room(const Room&) = delete;

  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(at_);
    at_ += bytes<T>(count);
    return piece;
  }

  template <typename T>
  static int64_t bytes(int64_t count) {
    return (count * int64_t(sizeof(T)) + 63) / 64 * 64;
  }

 private:
  static constexpr std::align_val_t ALIGN{64};
  char* at_;
  char* begin_;
};

inline uint32_t pair_of(bf16 low, bf16 high) { return low.bits | uint32_t(high.bits) << 16; }

inline uint32_t rounded(float value) {
  bf16 kept;
  put(kept, value);
  return kept.bits;
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
  for (int j = 0; j < 4; ++j) {  // the quarters themselves: quarter q of a[4 i + j] is column 4 q + j
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

// The same rows as B^T: out[pair of features][row]; `room` has BLOCK rows of `half_of(width)` words.
void pairs_of_features(const bf16* rows, int64_t stride, int64_t count, int64_t width, uint32_t* room,
                       uint32_t* out) {
  const int64_t half = half_of(width);
  if (count < BLOCK || 2 * half > width) std::memset(room, 0, BLOCK * half * sizeof *room);
  for (int64_t r = 0; r < count; ++r) std::memcpy(room + r * half, rows + r * stride, width * sizeof *rows);
  turn(room, BLOCK, half, out);
}

// A head's rows by blocks of keys, each turned: out[block][feature][key]; 0 beyond the last key.
void turned(const bf16* rows, int64_t stride, int64_t length, int64_t width, uint32_t* room, bf16* out) {
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
    for (int64_t d = 0; d < width; ++d) put(out[r * stride + d], room[r * width + d] * factors[r]);
}

// 2^x to 2 ulp; 0 at and below -127, and at most 2^127.
inline float power_of_two(float x) {
  const float bounded = x < -127.0f ? -127.0f : (x > 127.0f ? 127.0f : x);
  const float whole = std::nearbyint(bounded);
  const float rest = bounded - whole;
  float sum = 1.5403530394e-4f;
  sum = sum * rest + 1.3333558146e-3f;
  sum = sum * rest + 9.6181291076e-3f;
  sum = sum * rest + 5.5504108665e-2f;
  sum = sum * rest + 2.4022650696e-1f;
  sum = sum * rest + 6.9314718056e-1f;
  sum = sum * rest + 1.0f;
  return sum * bits_to_float(uint32_t(int32_t(whole) + 127) << 23);
}

// ---- which keys the queries of a block see: of query q those in [first[q], last[q])

struct Seen {
  int32_t first[BLOCK], last[BLOCK];  // beyond the last query as of it
  int64_t begin, end;                 // of any query, from the beginning of a block of keys

  Seen(const int32_t* firsts, const int32_t* lasts, int64_t queries) {
    for (int64_t q = 0; q < BLOCK; ++q) {
      first[q] = firsts[std::min(q, queries - 1)];
      last[q] = lasts[std::min(q, queries - 1)];
    }
    begin = *std::min_element(first, first + BLOCK) / BLOCK * BLOCK;
    end = *std::max_element(last, last + BLOCK);
  }

  bool all(int64_t from, int64_t to) const {
    return *std::max_element(first, first + BLOCK) <= from &&
           *std::min_element(last, last + BLOCK) >= to;
  }
};

// Scores of the keys from `key` on, [keys][BLOCK], times the factor; UNSEEN where they are not seen.
void scale_scores(float* scores, int64_t key, int64_t keys, const Seen& seen, float factor) {
  const bool all = seen.all(key, key + keys);
  for (int64_t k = 0; k < keys; ++k) {
    float* row = scores + k * BLOCK;
    const int32_t place = int32_t(key + k);
    if (all)
      for (int64_t q = 0; q < BLOCK; ++q) row[q] *= factor;
    else
      for (int64_t q = 0; q < BLOCK; ++q)
        row[q] = seen.first[q] <= place && place < seen.last[q] ? row[q] * factor : UNSEEN;
  }
}

// ---- forward

class Forward {
 public:
  Forward(const Shape& shape, float scale) : shape_(shape), factor_(scale * LOG2_E), room_(size(shape)) {
    turned_value_ = room_.take<bf16>(padded(shape) * shape.width);
    query_ = room_.take<uint32_t>(half_of(shape.width) * BLOCK);
    for (float** piece : {&out_, &turning_}) *piece = room_.take<float>(2 * half_of(shape.width) * BLOCK);
    scores_ = room_.take<float>(BLOCK * BLOCK);
    weights_ = room_.take<uint32_t>(BLOCK / 2 * BLOCK);
  }

  void set_value(const bf16* value, int64_t stride) {
    turned(value, stride, shape_.length, shape_.width, words(), turned_value_);
  }

  // `queries` rows of a head -> as many of its output, and their log2 of the sum
  void run(const bf16* query, int64_t query_row, int64_t queries, const bf16* key, int64_t key_row,
           const Seen& seen, bf16* out, int64_t out_row, float* log_sum) {
    const int64_t width = shape_.width;
    pairs_of_features(query, query_row, queries, width, words(), query_);
    std::fill(out_, out_ + width * BLOCK, 0.0f);
    std::fill(most_, most_ + BLOCK, UNSEEN);
    std::fill(sum_, sum_ + BLOCK, 0.0f);
    for (int64_t begin = seen.begin; begin < seen.end; begin += BLOCK) {
      const int64_t keys = std::min(BLOCK, seen.end - begin);
      multiply({key + begin * key_row, key_row, query_, width / 2, BLOCK, scores_, false}, keys);
      scale_scores(scores_, begin, keys, seen, factor_);
      follow(keys);
      const int64_t pairs = (keys + 1) / 2;
      multiply({turned_value_ + begin * width, BLOCK, weights_, pairs, BLOCK, out_, true}, width);
    }
    for (int64_t q = 0; q < queries; ++q) {
      log_sum[q] = most_[q] + std::log2(sum_[q]);
      sum_[q] = 1.0f / sum_[q];
    }
    put_rows(out_, queries, width, sum_, turning_, out, out_row);
  }

 private:
  static int64_t padded(const Shape& shape) { return (shape.length + BLOCK - 1) / BLOCK * BLOCK; }

  static int64_t size(const Shape& shape) {
    return Room::bytes<bf16>(padded(shape) * shape.width) +
           Room::bytes<uint32_t>(half_of(shape.width) * BLOCK) +
           2 * Room::bytes<float>(2 * half_of(shape.width) * BLOCK) + Room::bytes<float>(BLOCK * BLOCK) + Room::bytes<uint32_t>(BLOCK / 2 * BLOCK);
  }

  uint32_t* words() { return reinterpret_cast<uint32_t*>(turning_); }

  // Scores of some keys -> their weights by the largest so far, to which sum and output are brought.
  void follow(int64_t keys) {
    float most[BLOCK], shrink[BLOCK];
    std::copy(most_, most_ + BLOCK, most);
    for (int64_t k = 0; k < keys; ++k) {
      const float* row = scores_ + k * BLOCK;
      for (int64_t q = 0; q < BLOCK; ++q) most[q] = row[q] > most[q] ? row[q] : most[q];
    }
    bool same = true;
    for (int64_t q = 0; q < BLOCK; ++q) {
      shrink[q] = power_of_two(most_[q] - most[q]);
      same &= most_[q] == most[q];
      sum_[q] *= shrink[q];
      most_[q] = most[q];
    }
    if (!same)
      for (int64_t d = 0; d < shape_.width; ++d)
        for (int64_t q = 0; q < BLOCK; ++q) out_[d * BLOCK + q] *= shrink[q];
    if (keys % 2) std::fill(scores_ + keys * BLOCK, scores_ + (keys + 1) * BLOCK, UNSEEN);
    for (int64_t k = 0; k < keys; k += 2) {
      const float *low = scores_ + k * BLOCK, *high = low + BLOCK;
      uint32_t* pair = weights_ + k / 2 * BLOCK;
      for (int64_t q = 0; q < BLOCK; ++q) {
        const float one = power_of_two(low[q] - most[q]), two = power_of_two(high[q] - most[q]);
        sum_[q] += one + two;
        pair[q] = rounded(one) | rounded(two) << 16;
      }
    }
  }

  const Shape& shape_;
  const float factor_;
  Room room_;
  bf16* turned_value_;
  uint32_t *query_, *weights_;
  float *out_, *turning_, *scores_;
  float most_[BLOCK], sum_[BLOCK];
};

// ---- backward

class Backward {
 public:
  Backward(const Shape& shape, float scale) : shape_(shape), scale_(scale), room_(size(shape)) {
    const int64_t all = padded(shape) * shape.width, block = half_of(shape.width) * BLOCK;
    turned_key_ = room_.take<bf16>(all);
    of_key_ = room_.take<float>(all);
    of_value_ = room_.take<float>(all);
    for (uint32_t** piece : {&query_, &grad_, &query_rows_, &grad_rows_}) *piece = room_.take<uint32_t>(block);
    for (float** piece : {&of_query_, &turning_}) *piece = room_.take<float>(2 * block);
    std::fill(ones_, ones_ + BLOCK, 1.0f);
    for (float** piece : {&scores_, &of_weights_}) *piece = room_.take<float>(BLOCK * BLOCK);
    for (bf16** piece : {&weights_, &of_scores_}) *piece = room_.take<bf16>(BLOCK * BLOCK);
    of_scores_pairs_ = room_.take<uint32_t>(BLOCK / 2 * BLOCK);
  }

  void begin(const bf16* key, int64_t key_row, const bf16* value, int64_t value_row) {
    key_ = key, key_row_ = key_row, value_ = value, value_row_ = value_row;
    const int64_t all = padded(shape_) * shape_.width;
    turned(key, key_row, shape_.length, shape_.width, words(), turned_key_);
    std::fill(of_key_, of_key_ + all, 0.0f);
    std::fill(of_value_, of_value_ + all, 0.0f);
  }

  // `queries` rows of a head: their gradient is written, those of keys and values are added up
  void run(const bf16* query, int64_t query_row, int64_t queries, const bf16* out, int64_t out_row,
           const bf16* grad, int64_t grad_row, const float* log_sum, const Seen& seen,
           bf16* of_query, int64_t of_query_row) {
    const int64_t width = shape_.width;
    pairs_of_features(query, query_row, queries, width, words(), query_);
    pairs_of_features(grad, grad_row, queries, width, words(), grad_);
    pairs_of_rows(query, query_row, queries, width, query_rows_);
    pairs_of_rows(grad, grad_row, queries, width, grad_rows_);
    for (int64_t q = 0; q < BLOCK; ++q) {
      float sum = 0.0f;
      if (q < queries)
#pragma omp simd reduction(+ : sum)
        for (int64_t d = 0; d < width; ++d) sum += widen(grad[q * grad_row + d]) * widen(out[q * out_row + d]);
      mean_[q] = sum;
      log_sum_[q] = q < queries ? log_sum[q] : -UNSEEN;
    }
    std::fill(of_query_, of_query_ + width * BLOCK, 0.0f);
    for (int64_t begin = seen.begin; begin < seen.end; begin += BLOCK)
      add(begin, std::min(BLOCK, seen.end - begin), seen);
    put_rows(of_query_, queries, width, ones_, turning_, of_query, of_query_row);
  }

  void end(bf16* of_key, int64_t of_key_row, bf16* of_value, int64_t of_value_row) const {
    for (int64_t k = 0; k < shape_.length; ++k)
      for (int64_t d = 0; d < shape_.width; ++d) {
        put(of_key[k * of_key_row + d], of_key_[k * shape_.width + d]);
        put(of_value[k * of_value_row + d], of_value_[k * shape_.width + d]);
      }
  }

 private:
  static int64_t padded(const Shape& shape) { return (shape.length + BLOCK - 1) / BLOCK * BLOCK; }

  static int64_t size(const Shape& shape) {
    const int64_t all = padded(shape) * shape.width, block = half_of(shape.width) * BLOCK;
    return Room::bytes<bf16>(all) + 2 * Room::bytes<float>(all) + 4 * Room::bytes<uint32_t>(block) +
           2 * Room::bytes<float>(2 * block) + 2 * Room::bytes<float>(BLOCK * BLOCK) +
           2 * Room::bytes<bf16>(BLOCK * BLOCK) + Room::bytes<uint32_t>(BLOCK / 2 * BLOCK);
  }

  uint32_t* words() { return reinterpret_cast<uint32_t*>(turning_); }

  // The part of `keys` keys from `begin` on.
  void add(int64_t begin, int64_t keys, const Seen& seen) {
    const int64_t width = shape_.width, first = begin * width;
    multiply({key_ + begin * key_row_, key_row_, query_, width / 2, BLOCK, scores_, false}, keys);
    scale_scores(scores_, begin, keys, seen, scale_ * LOG2_E);
    multiply({value_ + begin * value_row_, value_row_, grad_, width / 2, BLOCK, of_weights_, false}, keys);
    differentiate(keys);
    multiply({weights_, BLOCK, grad_rows_, BLOCK / 2, width, of_value_ + first, true}, keys);
    multiply({of_scores_, BLOCK, query_rows_, BLOCK / 2, width, of_key_ + first, true}, keys);
    const int64_t pairs = (keys + 1) / 2;
    multiply({turned_key_ + first, BLOCK, of_scores_pairs_, pairs, BLOCK, of_query_, true}, width);
  }

  // Scores and the weights' gradient -> weights, and the scores' gradient in both orders.
  void differentiate(int64_t keys) {
    for (int64_t k = 0; k < keys; ++k) {
      const float *score = scores_ + k * BLOCK, *of_weight = of_weights_ + k * BLOCK;
      bf16 *weight = weights_ + k * BLOCK, *of_score = of_scores_ + k * BLOCK;
      for (int64_t q = 0; q < BLOCK; ++q) {
        const float p = power_of_two(score[q] - log_sum_[q]);
        put(weight[q], p);
        put(of_score[q], scale_ * p * (of_weight[q] - mean_[q]));
      }
    }
    if (keys % 2) std::memset(static_cast<void*>(of_scores_ + keys * BLOCK), 0, BLOCK * sizeof(bf16));
    for (int64_t k = 0; k < keys; k += 2) {
      const bf16 *low = of_scores_ + k * BLOCK, *high = low + BLOCK;
      for (int64_t q = 0; q < BLOCK; ++q) of_scores_pairs_[k / 2 * BLOCK + q] = pair_of(low[q], high[q]);
    }
  }

  const Shape& shape_;
  const float scale_;
  Room room_;
  const bf16 *key_, *value_;
  int64_t key_row_, value_row_;
  bf16 *turned_key_, *weights_, *of_scores_;
  uint32_t *query_, *grad_, *query_rows_, *grad_rows_, *of_scores_pairs_;
  float *of_key_, *of_value_, *of_query_, *turning_, *scores_, *of_weights_;
  float mean_[BLOCK], log_sum_[BLOCK], ones_[BLOCK];
};

const int32_t* seen_of(const int32_t* seen, int64_t own, int64_t sample, int64_t length) {
  return seen + (own ? sample * 2 * length : 0);
}

}  // namespace

// Whether the processor multiplies pairs of bf16 in one instruction.
extern "C" int attention_is_fast() {
#ifdef __AVX512BF16__
  return 1;
#else
  return 0;
#endif
}

// `sizes` are a Shape; `views` sample, head and place strides of each tensor in the order given.
// seen: (samples or 1, 2, length), as `own` says: first and last + 1 of each query's keys.
// log_sum: (samples, heads, length).
extern "C" void attention_bfloat16(const int64_t* sizes, const int64_t* strides, const bf16* query,
                                   const bf16* key, const bf16* value, bf16* out, float* log_sum,
                                   const int32_t* seen, int64_t own, float scale) {
  const Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  const auto view = [&](const bf16* first, int i) {
    return Heads{first, strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
  };
  const Heads queries = view(query, 0), keys = view(key, 1), values = view(value, 2), outs = view(out, 3);
  const int64_t group = shape.heads / shape.kv_heads;
#pragma omp parallel
  {
    Forward forward(shape, scale);
#pragma omp for collapse(2)
    for (int64_t s = 0; s < shape.samples; ++s)
      for (int64_t kv = 0; kv < shape.kv_heads; ++kv) {
        const int32_t* of_sample = seen_of(seen, own, s, shape.length);
        forward.set_value(values.of(s, kv), values.of_place);
        for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
          for (int64_t q = 0; q < shape.length; q += BLOCK) {
            const int64_t count = std::min(BLOCK, shape.length - q);
            forward.run(queries.of(s, h) + q * queries.of_place, queries.of_place, count,
                        keys.of(s, kv), keys.of_place, Seen(of_sample + q, of_sample + shape.length + q, count),
                        const_cast<bf16*>(outs.of(s, h)) + q * outs.of_place, outs.of_place,
                        log_sum + (s * shape.heads + h) * shape.length + q);
          }
      }
  }
}

extern "C" void attention_backward_bfloat16(const int64_t* sizes, const int64_t* strides,
                                            const bf16* query, const bf16* key, const bf16* value,
                                            const bf16* out, const bf16* grad, bf16* of_query,
                                            bf16* of_key, bf16* of_value, const float* log_sum,
                                            const int32_t* seen, int64_t own, float scale) {
  const Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  const auto view = [&](const bf16* first, int i) {
    return Heads{first, strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
  };
  const Heads queries = view(query, 0), keys = view(key, 1), values = view(value, 2), outs = view(out, 3),
              grads = view(grad, 4), of_queries = view(of_query, 5), of_keys = view(of_key, 6),
              of_values = view(of_value, 7);
  const int64_t group = shape.heads / shape.kv_heads;
#pragma omp parallel
  {
    Backward backward(shape, scale);
#pragma omp for collapse(2)
    for (int64_t s = 0; s < shape.samples; ++s)
      for (int64_t kv = 0; kv < shape.kv_heads; ++kv) {
        const int32_t* of_sample = seen_of(seen, own, s, shape.length);
        backward.begin(keys.of(s, kv), keys.of_place, values.of(s, kv), values.of_place);
        for (int64_t h = kv * group; h < (kv + 1) * group; ++h)
          for (int64_t q = 0; q < shape.length; q += BLOCK) {
            const int64_t count = std::min(BLOCK, shape.length - q);
            backward.run(queries.of(s, h) + q * queries.of_place, queries.of_place, count,
                         outs.of(s, h) + q * outs.of_place, outs.of_place,
                         grads.of(s, h) + q * grads.of_place, grads.of_place,
                         log_sum + (s * shape.heads + h) * shape.length + q,
                         Seen(of_sample + q, of_sample + shape.length + q, count),
                         const_cast<bf16*>(of_queries.of(s, h)) + q * of_queries.of_place, of_queries.of_place);
          }
        backward.end(const_cast<bf16*>(of_keys.of(s, kv)), of_keys.of_place,
                     const_cast<bf16*>(of_values.of(s, kv)), of_values.of_place);
      }
  }
}
