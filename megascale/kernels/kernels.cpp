// Passes of a training step that torch makes with one kernel, and one temporary, for each
// operation.
//
// Every function is one pass over rows of bf16 or fp32 values that computes in fp32. No header of
// torch is needed: Python hands over addresses (library.py). Loops are plain, so that the compiler
// vectorises them, or go along 16 numbers at a time (values.h); threads are those of torch, whose
// OpenMP runtime the loader finds.

#include <limits>
#include <vector>

#include "values.h"

namespace {

// The normal distribution's function and density; erfc as in Abramowitz and Stegun, 7.1.26.
template <typename V>
inline V normal_cdf(const V& x) {
  const V size = at_least(-1e6f, -larger(x, -x)) * -0.70710678118654752f;  // finite
  const V t = reciprocal(size * 0.3275911f + 1.0f);
  V sum = t * 1.061405429f - 1.453152027f;
  sum = sum * t + 1.421413741f;
  sum = sum * t - 0.284496736f;
  sum = sum * t + 0.254829592f;
  const V tail = sum * t * exponential(-size * size) * 0.5f;
  return x < V{} ? tail : 1.0f - tail;
}

template <typename V>
inline V normal_density(const V& x) {
  return exponential(x * x * -0.5f) * 0.3989422804014327f;
}

struct Erf {
  template <typename V>
  static inline V value(const V& x) {
    return x * normal_cdf(x);
  }
  template <typename V>
  static inline V slope(const V& x) {
    return normal_cdf(x) + x * normal_density(x);
  }
};

struct Tanh {
  // x * sigmoid(2 u) is 0.5 x (1 + tanh(u)), with u the polynomial
  static constexpr float a = 1.5957691216057308f, b = 0.044715f;
  template <typename V>
  static inline V gate(const V& x) {
    const V doubled = (x * x * b + 1.0f) * x * a;
    return reciprocal(exponential(-at_least(-88.0f, doubled)) + 1.0f);
  }
  template <typename V>
  static inline V value(const V& x) {
    return x * gate(x);
  }
  template <typename V>
  static inline V slope(const V& x) {
    const V s = gate(x);
    return s + x * s * (1.0f - s) * (x * x * (3.0f * b) + 1.0f) * a;
  }
};

template <typename T>
inline float largest(const T* row, int64_t n) {
  constexpr float none = -std::numeric_limits<float>::infinity();
  Lanes most = all_of<Lanes>(none);
  float one = none;
  along(0, n, [&](int64_t i, auto value) {
    load(value, row + i);
    if constexpr (sizeof value == sizeof most)
      most = larger(value, most);
    else
      one = larger(value, one);
  });
  for (int64_t i = 0; i < LANES; ++i) one = larger(most[i], one);
  return one;
}

// ---- the head: logits -> probabilities, with what the loss needs

constexpr int64_t WORDS = 1024;

template <typename T>
void probabilities(T* logits, int64_t rows, int64_t n, const int64_t* labels, float* terms) {
  float *log_z = terms, *target = terms + rows, *total = terms + 2 * rows;
#pragma omp parallel if (rows > 1)
  {
    std::vector<float> kept(n);
    float* power = kept.data();
#pragma omp for
    for (int64_t r = 0; r < rows; ++r) {
      T* row = logits + r * n;
      target[r] = widen(row[labels[r]]);
      const float most = largest(row, n);
      double sum = 0.0, plain = 0.0;  // of pieces: fp32 loses digits over a large vocabulary
      for (int64_t begin = 0; begin < n; begin += WORDS) {
        Sum some, some_plain;
        along(begin, begin + WORDS < n ? begin + WORDS : n, [&](int64_t i, auto value) {
          load(value, row + i);
          some_plain.add(value);
          value = exponential(value - most);
          store(power + i, value);
          some.add(value);
        });
        sum += some.total();
        plain += some_plain.total();
      }
      log_z[r] = most + float(std::log(sum));
      total[r] = float(plain);
      const float factor = float(1.0 / sum);
      along(0, n, [&](int64_t i, auto value) {
        load(value, power + i);
        store(row + i, value * factor);
      });
    }
  }
}

// ---- attention: of row r the columns [first[r % period], last[r % period]) are seen

// Loops go over whole vectors: what an interval leaves of its ends is computed one by one
// otherwise, which took longer than the rest.
constexpr int64_t VECTOR = 16;

struct Span {
  int begin, from, to, count;  // first whole vector; from there: what is seen, and all vectors
  Span(int first, int last, int64_t n) {
    const int64_t end = (last + VECTOR - 1) / VECTOR * VECTOR;
    begin = int(first / VECTOR * VECTOR);
    from = first - begin;
    to = last - begin;
    count = int(end < n ? end : n) - begin;
  }
};

template <typename T>
void clear(T* row, int64_t begin, int64_t end) {
  if (begin < end) std::memset(static_cast<void*>(row + begin), 0, (end - begin) * sizeof(T));
}

template <typename T>
void attend(T* scores, int64_t rows, int64_t n, const int32_t* first, const int32_t* last,
            int64_t period, float scale) {
  constexpr float none = -std::numeric_limits<float>::infinity();
#pragma omp parallel if (rows > 64)
  {
    std::vector<float> kept(n);
    float* power = kept.data();
#pragma omp for
    for (int64_t r = 0; r < rows; ++r) {
      const Span span(first[r % period], last[r % period], n);
      T* row = scores + r * n + span.begin;
      const int from = span.from, to = span.to, count = span.count;
      float most = none;
#pragma omp simd reduction(max : most)
      for (int i = 0; i < count; ++i) {
        const float value = i >= from && i < to ? widen(row[i]) : none;
        power[i] = value;
        most = value > most ? value : most;
      }
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int i = 0; i < count; ++i) {
        const float e = exponential((power[i] - most) * scale);
        power[i] = e;
        sum += e;
      }
      const float factor = 1.0f / sum;
#pragma omp simd
      for (int i = 0; i < count; ++i) put(row[i], power[i] * factor);
      clear(row, -span.begin, 0);
      clear(row, count, n - span.begin);
    }
  }
}

// grad <- scale * p * (grad - sum(grad * p)); p is 0 where nothing was seen
template <typename T>
void attend_backward(T* grad, const T* weights, int64_t rows, int64_t n, const int32_t* first,
                     const int32_t* last, int64_t period, float scale) {
#pragma omp parallel for if (rows > 64)
  for (int64_t r = 0; r < rows; ++r) {
    const Span span(first[r % period], last[r % period], n);
    T* g = grad + r * n + span.begin;
    const T* p = weights + r * n + span.begin;
    const int count = span.count;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < count; ++i) sum += widen(g[i]) * widen(p[i]);
#pragma omp simd
    for (int i = 0; i < count; ++i) put(g[i], scale * widen(p[i]) * (widen(g[i]) - sum));
    clear(g, -span.begin, 0);
    clear(g, count, n - span.begin);
  }
}

// ---- sums in fp32 of what products left in the type of the model

constexpr int64_t PIECE = 1 << 14;

template <typename T>
void accumulate(float* total, const T* values, int64_t n) {
#pragma omp parallel for if (n > PIECE)
  for (int64_t begin = 0; begin < n; begin += PIECE) {
    const int64_t end = begin + PIECE < n ? begin + PIECE : n;
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) total[i] += widen(values[i]);
  }
}

// ---- AdamW: clipping, update and rounding

struct AdamW {
  float factor;        // of the gradient
  float shrink;        // of the master: 1 - lr * decay
  float from1, from2;  // 1 - beta of the moments
  float lr;            // divided by the first moment's bias correction
  float root;          // of the second moment's
  float eps;
};

// Each sum has one product at most, so that a compiler that makes one operation of both has no
// choice which: a number's bits do not depend on whether it is one of 16 or one of the rest.
template <typename T>
void adamw(float* master, float* first, float* second, const float* grad, T* weight, int64_t n,
           const AdamW& by) {
#pragma omp parallel for if (n > PIECE)
  for (int64_t begin = 0; begin < n; begin += PIECE)
    along(begin, begin + PIECE < n ? begin + PIECE : n, [&](int64_t i, auto number) {
      auto g = number, m = number, v = number;
      load(number, master + i);
      load(g, grad + i);
      load(m, first + i);
      load(v, second + i);
      g = g * by.factor;
      m = m + (g - m) * by.from1;
      v = v + (g * g - v) * by.from2;
      number = number * by.shrink - (m * by.lr) / (root(v) / by.root + by.eps);
      store(first + i, m);
      store(second + i, v);
      store(master + i, number);
      store(weight + i, number);
    });
}

// ---- GELU

template <typename F, typename T>
void gelu(const T* x, T* out, int64_t n) {
#pragma omp parallel for if (n > PIECE)
  for (int64_t begin = 0; begin < n; begin += PIECE)
    along(begin, begin + PIECE < n ? begin + PIECE : n, [&](int64_t i, auto value) {
      load(value, x + i);
      store(out + i, F::value(value));
    });
}

// out, which may be grad itself, becomes the gradient of x; again, unless null, its GELU once more.
template <typename F, typename T>
void gelu_backward(const T* x, const T* grad, T* out, T* again, int64_t n) {
#pragma omp parallel for if (n > PIECE)
  for (int64_t begin = 0; begin < n; begin += PIECE)
    along(begin, begin + PIECE < n ? begin + PIECE : n, [&](int64_t i, auto value) {
      auto of_value = value;
      load(value, x + i);
      load(of_value, grad + i);
      if (again) store(again + i, F::value(value));
      store(out + i, of_value * F::slope(value));
    });
}

// ---- dropout: which elements are kept, as models/dropout.py defines it

// One output of SplitMix64 (OOPSLA 2014) for a state.
constexpr uint64_t STEP = 0x9E3779B97F4A7C15u;

inline uint64_t splitmix(uint64_t state) {
  uint64_t z = state + STEP;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

}  // namespace

// keep[b, r, i] is of element (rows[r], places[i]) of sample b, whose rows have `full` elements
extern "C" void keep_mask_int64(const int64_t* keys, int64_t samples, int64_t site,
                                const int64_t* rows, int64_t row_count, const int64_t* places,
                                int64_t n, int64_t full, int64_t bound, uint8_t* keep) {
  const uint64_t salt = splitmix(uint64_t(site));
#pragma omp parallel for if (samples * row_count * n > PIECE)
  for (int64_t line = 0; line < samples * row_count; ++line) {
    const uint64_t stream = splitmix(uint64_t(keys[line / row_count]) ^ salt);
    const uint64_t first = uint64_t(rows[line % row_count]) * uint64_t(full);
    uint8_t* out = keep + line * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const uint64_t bits = splitmix(stream + (first + uint64_t(places[i])) * STEP);
      out[i] = (bits >> 11) >= uint64_t(bound);
    }
  }
}

#define FOR_TYPE(NAME, T)                                                                         \
  extern "C" void probabilities_##NAME(T* logits, int64_t rows, int64_t n, const int64_t* labels, \
                                       float* terms) {                                            \
    probabilities(logits, rows, n, labels, terms);                                                \
  }                                                                                               \
  extern "C" void attend_##NAME(T* scores, int64_t rows, int64_t n, const int32_t* first,         \
                                const int32_t* last, int64_t period, float scale) {               \
    attend(scores, rows, n, first, last, period, scale);                                          \
  }                                                                                               \
  extern "C" void attend_backward_##NAME(T* grad, const T* weights, int64_t rows, int64_t n,      \
                                         const int32_t* first, const int32_t* last,               \
                                         int64_t period, float scale) {                           \
    attend_backward(grad, weights, rows, n, first, last, period, scale);                          \
  }                                                                                               \
  extern "C" void accumulate_##NAME(float* total, const T* values, int64_t n) {                   \
    accumulate(total, values, n);                                                                 \
  }                                                                                               \
  extern "C" void gelu_##NAME(const T* x, T* out, int64_t n) { gelu<Erf>(x, out, n); }            \
  extern "C" void gelu_tanh_##NAME(const T* x, T* out, int64_t n) { gelu<Tanh>(x, out, n); }      \
  extern "C" void gelu_backward_##NAME(const T* x, const T* grad, T* out, T* again, int64_t n) {  \
    gelu_backward<Erf>(x, grad, out, again, n);                                                   \
  }                                                                                               \
  extern "C" void gelu_tanh_backward_##NAME(const T* x, const T* grad, T* out, T* again,          \
                                            int64_t n) {                                          \
    gelu_backward<Tanh>(x, grad, out, again, n);                                                  \
  }

extern "C" void adamw_bfloat16(float* master, float* first, float* second, const float* grad,
                               bf16* weight, int64_t n, const float* by) {
  adamw(master, first, second, grad, weight, n, {by[0], by[1], by[2], by[3], by[4], by[5], by[6]});
}

FOR_TYPE(float32, float)
FOR_TYPE(bfloat16, bf16)
