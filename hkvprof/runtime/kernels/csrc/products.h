// The inner loops: dot products with queries, softmax, weighted sums of values.
#pragma once

#include "vectors.h"

namespace {

constexpr int MAX_DIM = 512;
constexpr int64_t AHEAD = 64;  // tokens between what is used and what is prefetched
constexpr float LOG2E = 1.44269504088896341f;

inline size_t packed_floats(int dim) { return size_t(chunks_of(dim)) * 2 * G * W; }

// Queries [G][dim], clipped to [low, high], as [chunk][half][G][W]; or as [chunk][G][W] pairs.
void pack_query(const T* query, int dim, float low, float high, float* out) {
  for (int g = 0; g < G; g++)
    for (int c = 0; c < chunks_of(dim); c++) {
      vf part[2];
      const T* from = query + size_t(g) * dim + c * 2 * W;
      if ((c + 1) * 2 * W <= dim) widen(from, part[0], part[1]);
      else widen_tail(from, dim - c * 2 * W, part[0], part[1]);
      for (vf& x : part) x = x < low ? splat(low) : x > high ? splat(high) : x;
#ifdef HKV_PAIRS
      store(out + (c * G + g) * W, (vf)((vu)part[0] >> 16 | ((vu)part[1] & 0xffff0000u)));
#else
      for (int half = 0; half < 2; half++) store(out + ((c * 2 + half) * G + g) * W, part[half]);
#endif
    }
}

// out[row][P] (+)= factor * key(row) . query; rows are padded to whole vectors. `coming` is told
// the first of every few rows.
template <bool ADD, class Key, class Coming>
INLINE void dot_any_rows(Key key, Coming coming, int64_t rows, int dim, const float* query,
                         float factor, float* out) {
  const int whole = dim / (2 * W), tail = dim % (2 * W);
  for (int64_t row = 0; row < rows; row += TOKENS) {
    const T* at[TOKENS];
    for (int t = 0; t < TOKENS; t++) at[t] = key(std::min(row + t, rows - 1));
    coming(row);
    for (int first = 0; first < P; first += Q) {
      vf sums[W] = {};
#ifdef HKV_PAIRS
      auto add = [&](int c, auto read) {
        const float* q = query + size_t(c) * G * W;
        vf pairs[TOKENS];
        for (int t = 0; t < TOKENS; t++) pairs[t] = read(at[t] + c * 2 * W);
        for (int g = 0; g < G; g++)
          for (int t = 0; t < TOKENS; t++)
            sums[t * Q + g] = (vf)_mm512_dpbf16_ps((__m512)sums[t * Q + g], (__m512bh)pairs[t],
                                                   (__m512bh)load(q + g * W));
      };
      auto whole_chunk = [](const T* p) { vf v; std::memcpy(&v, p, sizeof v); return v; };
      auto part_chunk = [tail](const T* p) { return read_tail(p, tail); };
#else
      auto add = [&](int c, auto read) {
        const float* q = query + size_t(c) * 2 * G * W + first * W;
        if constexpr (TOKENS <= 4) {
          vf a[TOKENS], b[TOKENS];
          for (int t = 0; t < TOKENS; t++) read(at[t] + c * 2 * W, a[t], b[t]);
          for (int g = 0; g < Q && first + g < G; g++) {
            vf x = load(q + g * W), y = load(q + (G + g) * W);
            for (int t = 0; t < TOKENS; t++) sums[t * Q + g] += a[t] * x;
            for (int t = 0; t < TOKENS; t++) sums[t * Q + g] += b[t] * y;
          }
        } else {
          for (int t = 0; t < TOKENS; t++) {
            vf a, b;
            read(at[t] + c * 2 * W, a, b);
            for (int g = 0; g < Q && first + g < G; g++) {
              sums[t * Q + g] += a * load(q + g * W);
              sums[t * Q + g] += b * load(q + (G + g) * W);
            }
          }
        }
      };
      auto whole_chunk = [](const T* p, vf& a, vf& b) { widen(p, a, b); };
      auto part_chunk = [tail](const T* p, vf& a, vf& b) { widen_tail(p, tail, a, b); };
#endif
      for (int c = 0; c < whole; c++) add(c, whole_chunk);
      if (tail) add(whole, part_chunk);
      float* target = out + row * P + first;
      vf total = fold_all<W>(sums) * factor;
      if constexpr (ADD) total += load(target);
      store(target, total);
    }
  }
}
template <bool ADD>
void dot_rows(const T* key, int64_t rows, int dim, const float* query, float factor, float* out,
              int64_t ahead = 0) {
  auto coming = [=](int64_t row) {
    if (ahead) prefetch(key + row * dim + ahead, TOKENS * dim);
  };
  auto at = [=](int64_t row) { return key + row * dim; };
  dot_any_rows<ADD>(at, coming, rows, dim, query, factor, out);
}
constexpr int64_t padded_rows(int64_t rows) { return (rows + TOKENS - 1) / TOKENS * TOKENS; }

// Running maximum and sum of 2^(logit - maximum), per query head; lanes of one head agree in `top`.
struct Softmax {
  vf top[PARTS], sum[PARTS];
  Softmax() {
    for (int i = 0; i < PARTS; i++) top[i] = splat(-INFINITY), sum[i] = vf{};
  }
  // Logits to weights in place, over rows [rows][P]; earlier weights must be scaled by `decay`.
  void add(float* logits, int64_t rows, vf* decay) {
    for (int64_t i = rows * P; i < padded_rows(rows) * P; i++) logits[i] = -INFINITY;
    const int64_t vectors = padded_rows(rows) * P / W;
    for (int part = 0; part < PARTS; part++) {
      vf best = top[part];
      for (int64_t i = part; i < vectors; i += PARTS) best = larger(load(logits + i * W), best);
      best = max_over_tokens<Q>(best);
      vf base = best == -INFINITY ? vf{} : best;
      decay[part] = exp2_of(top[part] - base);
      vf total = sum[part] * decay[part];
      for (int64_t i = part; i < vectors; i += PARTS) {
        vf weight = exp2_of(load(logits + i * W) - base);
        store(logits + i * W, weight);
        total += weight;
      }
      top[part] = best;
      sum[part] = total;
    }
  }
  void save(float* maximum, float* total) const {
    for (int g = 0; g < P; g++) {
      maximum[g] = top[g / W][g % W];
      total[g] = 0;
      for (int lane = g % W; lane < W; lane += Q) total[g] += sum[g / W][lane];
    }
  }
};

// acc [chunk][half][A][W] += weights [row][P] x value [row][dim].
void add_values(const T* value, int64_t rows, int dim, const float* weights, float* acc,
                int64_t ahead = 0) {
  constexpr int WIDE = STEP <= 7 && W == 16 ? 2 : 1;
  const int whole = dim / (2 * W), tail = dim % (2 * W);
  auto run = [&](int c, int first, auto width, auto read) {
    constexpr int N = decltype(width)::value;
    vf sums[N][2][STEP];
    for (int n = 0; n < N; n++)
      for (int g = 0; g < STEP; g++)
        for (int half = 0; half < 2; half++)
          sums[n][half][g] = load(acc + (((c + n) * 2 + half) * A + first + g) * W);
    for (int64_t row = 0; row < rows; row++) {
      const T* p = value + row * dim + c * 2 * W;
      const float* weight = weights + row * P + first;
      if (ahead) prefetch(p + ahead, N * 2 * W);
      for (int n = 0; n < N; n++) {
        vf a, b;
        read(p + n * 2 * W, a, b);
        for (int g = 0; g < STEP; g++) {
          sums[n][0][g] += a * weight[g];
          sums[n][1][g] += b * weight[g];
        }
      }
    }
    for (int n = 0; n < N; n++)
      for (int g = 0; g < STEP; g++)
        for (int half = 0; half < 2; half++)
          store(acc + (((c + n) * 2 + half) * A + first + g) * W, sums[n][half][g]);
  };
  auto plain = [](const T* p, vf& a, vf& b) { widen(p, a, b); };
  for (int first = 0; first < A; first += STEP) {
    int c = 0;
    for (; c + WIDE <= whole; c += WIDE) run(c, first, std::integral_constant<int, WIDE>{}, plain);
    for (; c < whole; c++) run(c, first, std::integral_constant<int, 1>{}, plain);
    if (tail)
      run(c, first, std::integral_constant<int, 1>{},
          [tail](const T* p, vf& a, vf& b) { widen_tail(p, tail, a, b); });
  }
}

}  // namespace
