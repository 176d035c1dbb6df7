// Attention of bf16 heads in one pass over blocks of 64 queries and 64 keys (flash attention,
// arXiv:2307.08691), whose scores never leave the caches.
//
//   forward   S^T = K Q^T,  P^T = 2^(c S^T - m),  O^T += V^T P^T; m and the sums follow online
//   backward  P^T = 2^(c (S^T - m)) / sum,  dV += P^T dO,  dP^T = V dO^T,
//             dS^T = scale P^T (dP^T - sum(dO O)),  dK += dS^T Q,  dQ^T += K^T dS^T
//
// Scores are kept with a key in each row and the queries beside one another, so that maxima and
// sums of a query are taken lane by lane, and P^T lies as the next product reads it. Products
// multiply pairs of bf16 and add in fp32, as AVX512_BF16 does in one instruction; elsewhere it is
// written out.

#include <algorithm>
#include <limits>

#include "blocks.h"

namespace {

// Instead of a product; finite, so that two of them have a difference.
constexpr float UNSEEN = -std::numeric_limits<float>::max();
constexpr float LOG2_E = 1.44269504089f;

constexpr int64_t VECTORS = BLOCK / LANES;

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

// Put UNSEEN for the scores of keys, [keys][BLOCK] from `key` on, that a query does not see.
void hide(float* scores, int64_t key, int64_t keys, const Seen& seen) {
  if (seen.all(key, key + keys)) return;
  for (int64_t k = 0; k < keys; ++k) {
    float* row = scores + k * BLOCK;
    const int32_t place = int32_t(key + k);
    for (int64_t q = 0; q < BLOCK; ++q)
      row[q] = seen.first[q] <= place && place < seen.last[q] ? row[q] : UNSEEN;
  }
}

// A tensor of heads, whose features are neighbours in memory.
template <typename T>
struct Heads {
  T* at;
  int64_t of_sample, of_head, row;  // strides in elements

  Heads(T* first, const int64_t* strides)
      : at(first), of_sample(strides[0]), of_head(strides[1]), row(strides[2]) {}

  Heads of(int64_t sample, int64_t head) const {
    Heads one = *this;
    one.at += sample * of_sample + head * of_head;
    return one;
  }
  T* place(int64_t index) const { return at + index * row; }
};

struct Shape {
  int64_t samples, heads, kv_heads, length, width;

  explicit Shape(const int64_t* sizes)
      : samples(sizes[0]), heads(sizes[1]), kv_heads(sizes[2]), length(sizes[3]), width(sizes[4]) {}
  // Elements of a head, filled up to whole blocks.
  int64_t all() const { return (length + BLOCK - 1) / BLOCK * BLOCK * width; }
  // Where the norms of a head begin.
  int64_t norms_of(int64_t sample, int64_t head) const {
    return (sample * heads + head) * 2 * length;
  }
  // Words of a block.
  int64_t block() const { return half_of(width) * BLOCK; }
};

constexpr int64_t NOWHERE[3] = {0, 0, 0};

using Inputs = Heads<const bf16>;
using Outputs = Heads<bf16>;

// ---- forward: one thread's work on a head

class Forward {
 public:
  Forward(const Shape& shape, float scale)
      : width_(shape.width),
        length_(shape.length),
        factor_(scale * LOG2_E),
        turned_value_(shape.all()),
        query_(shape.block()),
        turning_(shape.block()),
        weights_(BLOCK / 2 * BLOCK),
        out_(2 * shape.block()),
        rows_(2 * shape.block()),
        scores_(BLOCK * BLOCK) {}

  void begin(const Inputs& key, const Inputs& value) {
    key_ = key;
    turned(value.at, value.row, length_, width_, turning_, turned_value_);
  }

  // The output of `queries` rows from `first` on, and the norms of each: its largest product and
  // what an exponential is multiplied with to be a weight.
  void run(const Inputs& query, int64_t first, int64_t queries, const Seen& seen,
           const Outputs& out, float* norms) {
    pairs_of_features(query.place(first), query.row, queries, width_, turning_, query_);
    std::fill_n(+out_, width_ * BLOCK, 0.0f);
    std::fill_n(most_, BLOCK, UNSEEN);
    std::fill_n(sum_, BLOCK, 0.0f);
    for (int64_t begin = seen.begin; begin < seen.end; begin += BLOCK) {
      const int64_t keys = std::min(BLOCK, seen.end - begin);
      multiply({key_.place(begin), key_.row, query_, width_ / 2, BLOCK, scores_, false}, keys);
      hide(scores_, begin, keys, seen);
      follow(keys);
      const int64_t pairs = (keys + 1) / 2;
      multiply({turned_value_ + begin * width_, BLOCK, weights_, pairs, BLOCK, out_, true}, width_);
    }
    float *most = norms + first, *share = most + length_;
    for (int64_t q = 0; q < queries; ++q) {
      most[q] = most_[q];
      share[q] = 1.0f / sum_[q];
    }
    put_rows(out_, queries, width_, share, rows_, out.place(first), out.row);
  }

 private:
  // Scores of some keys -> their weights by the largest so far, to which sum and output are
  // brought.
  void follow(int64_t keys) {
    Lanes most[VECTORS], sum[VECTORS];
    for (int64_t v = 0; v < VECTORS; ++v) load(most[v], most_ + v * LANES);
    for (int64_t k = 0; k < keys; ++k)
      for (int64_t v = 0; v < VECTORS; ++v) {
        Lanes score;
        load(score, scores_ + k * BLOCK + v * LANES);
        most[v] = larger(score, most[v]);
      }
    for (int64_t v = 0; v < VECTORS; ++v) sum[v] = shrink(v * LANES, most[v]);
    if (keys % 2) std::fill_n(scores_ + keys * BLOCK, BLOCK, UNSEEN);
    for (int64_t k = 0; k < keys; k += 2)
      for (int64_t v = 0; v < VECTORS; ++v) {
        Lanes low, high;
        load(low, scores_ + k * BLOCK + v * LANES);
        load(high, scores_ + (k + 1) * BLOCK + v * LANES);
        low = short_power_of_two((low - most[v]) * factor_);
        high = short_power_of_two((high - most[v]) * factor_);
        sum[v] += low + high;
        store_pairs(weights_ + k / 2 * BLOCK + v * LANES, low, high);
      }
    for (int64_t v = 0; v < VECTORS; ++v) store(sum_ + v * LANES, sum[v]);
  }

  // Bring the output of 16 queries to the largest score now; gives their sum brought there.
  Lanes shrink(int64_t q, const Lanes& most) {
    Lanes before, sum;
    load(before, most_ + q);
    load(sum, sum_ + q);
    const Lanes factor = short_power_of_two((before - most) * factor_);
    bool same = true;
    for (int64_t i = 0; i < LANES; ++i) same &= before[i] == most[i];
    if (same) return sum;
    for (int64_t d = 0; d < width_; ++d) {
      Lanes out;
      load(out, out_ + d * BLOCK + q);
      store(out_ + d * BLOCK + q, out * factor);
    }
    store(most_ + q, most);
    return sum * factor;
  }

  const int64_t width_, length_;
  const float factor_;
  Inputs key_{nullptr, NOWHERE};
  Piece<bf16> turned_value_;
  Piece<uint32_t> query_, turning_, weights_;
  Piece<float> out_, rows_, scores_;
  float most_[BLOCK], sum_[BLOCK];
};

// ---- backward: likewise

class Backward {
 public:
  Backward(const Shape& shape, float scale)
      : width_(shape.width),
        length_(shape.length),
        scale_(scale),
        turned_key_(shape.all()),
        weights_(BLOCK * BLOCK),
        of_scores_(BLOCK * BLOCK),
        query_(shape.block()),
        grad_(shape.block()),
        query_rows_(shape.block()),
        grad_rows_(shape.block()),
        of_scores_pairs_(BLOCK / 2 * BLOCK),
        turning_(shape.block()),
        of_key_(shape.all()),
        of_value_(shape.all()),
        of_query_(2 * shape.block()),
        rows_(2 * shape.block()),
        scores_(BLOCK * BLOCK),
        of_weights_(BLOCK * BLOCK) {
    std::fill_n(ones_, BLOCK, 1.0f);
  }

  void begin(const Inputs& key, const Inputs& value) {
    key_ = key;
    value_ = value;
    turned(key.at, key.row, length_, width_, turning_, turned_key_);
    std::fill_n(+of_key_, length_ * width_, 0.0f);
    std::fill_n(+of_value_, length_ * width_, 0.0f);
  }

  // The gradient of `queries` rows from `first` on; those of keys and values are added up.
  void run(const Inputs& query, const Inputs& out, const Inputs& grad, int64_t first,
           int64_t queries, const Seen& seen, const float* norms, const Outputs& of_query) {
    pairs_of_features(query.place(first), query.row, queries, width_, turning_, query_);
    pairs_of_features(grad.place(first), grad.row, queries, width_, turning_, grad_);
    pairs_of_rows(query.place(first), query.row, queries, width_, query_rows_);
    pairs_of_rows(grad.place(first), grad.row, queries, width_, grad_rows_);
    for (int64_t q = 0; q < BLOCK; ++q) {
      mean_[q] = q < queries ? dot(grad.place(first + q), out.place(first + q)) : 0.0f;
      most_[q] = q < queries ? norms[first + q] : -UNSEEN;  // no weight beyond the last
      share_[q] = q < queries ? norms[length_ + first + q] : 0.0f;
    }
    std::fill_n(+of_query_, width_ * BLOCK, 0.0f);
    for (int64_t begin = seen.begin; begin < seen.end; begin += BLOCK)
      add(begin, std::min(BLOCK, seen.end - begin), seen);
    put_rows(of_query_, queries, width_, ones_, rows_, of_query.place(first), of_query.row);
  }

  void end(const Outputs& of_key, const Outputs& of_value) const {
    for (int64_t k = 0; k < length_; ++k) {
      bf16 *key = of_key.place(k), *value = of_value.place(k);
      along(0, width_, [&](int64_t d, auto number) {
        load(number, of_key_ + k * width_ + d);
        store(key + d, number);
        load(number, of_value_ + k * width_ + d);
        store(value + d, number);
      });
    }
  }

 private:
  float dot(const bf16* a, const bf16* b) const {
    Sum sum;
    along(0, width_, [&](int64_t d, auto one) {
      auto other = one;
      load(one, a + d);
      load(other, b + d);
      sum.add(one * other);
    });
    return sum.total();
  }

  // The part of `keys` keys from `begin` on.
  void add(int64_t begin, int64_t keys, const Seen& seen) {
    const int64_t half = width_ / 2, at = begin * width_, pairs = (keys + 1) / 2;
    multiply({key_.place(begin), key_.row, query_, half, BLOCK, scores_, false}, keys);
    hide(scores_, begin, keys, seen);
    multiply({value_.place(begin), value_.row, grad_, half, BLOCK, of_weights_, false}, keys);
    differentiate(keys);
    multiply({weights_, BLOCK, grad_rows_, BLOCK / 2, width_, of_value_ + at, true}, keys);
    multiply({of_scores_, BLOCK, query_rows_, BLOCK / 2, width_, of_key_ + at, true}, keys);
    multiply({turned_key_ + at, BLOCK, of_scores_pairs_, pairs, BLOCK, of_query_, true}, width_);
  }

  // Scores and the weights' gradient -> weights, and the scores' gradient in both orders.
  void differentiate(int64_t keys) {
    for (int64_t k = 0; k < keys; k += 2)
      for (int64_t q = 0; q < BLOCK; q += LANES) {
        const Lanes low = differentiate(k, q);
        const Lanes high = k + 1 < keys ? differentiate(k + 1, q) : Lanes{};
        store_pairs(of_scores_pairs_ + k / 2 * BLOCK + q, low, high);
      }
  }

  // Of a key and 16 queries; gives the gradient of their scores.
  Lanes differentiate(int64_t key, int64_t q) {
    const int64_t at = key * BLOCK + q;
    Lanes score, of_weight, most, share, mean;
    load(score, scores_ + at);
    load(of_weight, of_weights_ + at);
    load(most, most_ + q);
    load(share, share_ + q);
    load(mean, mean_ + q);
    const Lanes weight = share * short_power_of_two((score - most) * (scale_ * LOG2_E));
    const Lanes of_score = weight * (of_weight - mean) * scale_;
    store(weights_ + at, weight);
    store(of_scores_ + at, of_score);
    return of_score;
  }

  const int64_t width_, length_;
  const float scale_;
  Inputs key_{nullptr, NOWHERE}, value_{nullptr, NOWHERE};
  Piece<bf16> turned_key_, weights_, of_scores_;
  Piece<uint32_t> query_, grad_, query_rows_, grad_rows_, of_scores_pairs_, turning_;
  Piece<float> of_key_, of_value_, of_query_, rows_, scores_, of_weights_;
  float mean_[BLOCK], most_[BLOCK], share_[BLOCK], ones_[BLOCK];
};

// What each key head of each sample, with the heads that read it, goes through on one thread.
// seen: (samples or 1, 2, length), as `own` says: first and last + 1 of each query's keys.
template <typename Work, typename Run, typename End>
void for_heads(const Shape& shape, float scale, const Inputs& key, const Inputs& value,
               const int32_t* seen, bool own, Run run, End end) {
  const int64_t group = shape.heads / shape.kv_heads, length = shape.length;
#pragma omp parallel
  {
    Work work(shape, scale);
#pragma omp for collapse(2)
    for (int64_t sample = 0; sample < shape.samples; ++sample)
      for (int64_t kv = 0; kv < shape.kv_heads; ++kv) {
        const int32_t* first = seen + (own ? sample * 2 * length : 0);
        work.begin(key.of(sample, kv), value.of(sample, kv));
        for (int64_t head = kv * group; head < (kv + 1) * group; ++head)
          for (int64_t q = 0; q < length; q += BLOCK) {
            const int64_t queries = std::min(BLOCK, length - q);
            run(work, sample, head, q, queries, Seen(first + q, first + length + q, queries));
          }
        end(work, sample, kv);
      }
  }
}

}  // namespace

// sizes: of a Shape. strides: of sample, head and place, of each tensor of heads in order.
// norms: (samples, heads, 2, length), see Forward::run.
extern "C" void attention_bfloat16(const int64_t* sizes, const int64_t* strides, const bf16* q,
                                   const bf16* k, const bf16* v, bf16* o, float* norms,
                                   const int32_t* seen, int64_t own, float scale) {
  const Shape shape(sizes);
  const Inputs query(q, strides), key(k, strides + 3), value(v, strides + 6);
  const Outputs out(o, strides + 9);
  for_heads<Forward>(
      shape, scale, key, value, seen, own,
      [&](Forward& work, int64_t sample, int64_t head, int64_t first, int64_t queries,
          const Seen& sees) {
        work.run(query.of(sample, head), first, queries, sees, out.of(sample, head),
                 norms + shape.norms_of(sample, head));
      },
      [](Forward&, int64_t, int64_t) {});
}

extern "C" void attention_backward_bfloat16(const int64_t* sizes, const int64_t* strides,
                                            const bf16* q, const bf16* k, const bf16* v,
                                            const bf16* o, const bf16* g, bf16* of_q, bf16* of_k,
                                            bf16* of_v, const float* norms, const int32_t* seen,
                                            int64_t own, float scale) {
  const Shape shape(sizes);
  const Inputs query(q, strides), key(k, strides + 3), value(v, strides + 6), out(o, strides + 9),
      grad(g, strides + 12);
  const Outputs of_query(of_q, strides + 15), of_key(of_k, strides + 18),
      of_value(of_v, strides + 21);
  for_heads<Backward>(
      shape, scale, key, value, seen, own,
      [&](Backward& work, int64_t sample, int64_t head, int64_t first, int64_t queries,
          const Seen& sees) {
        work.run(query.of(sample, head), out.of(sample, head), grad.of(sample, head), first,
                 queries, sees, norms + shape.norms_of(sample, head), of_query.of(sample, head));
      },
      [&](const Backward& work, int64_t sample, int64_t kv) {
        work.end(of_key.of(sample, kv), of_value.of(sample, kv));
      });
}
