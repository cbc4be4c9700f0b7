// Retrieval: what it is told about dynamic heads, and the scores of their items.
#pragma once

#include "quantised.h"
#include "waves.h"

namespace {

enum Kind { MEAN = 0, MINMAX = 1, PROJECTED = 2 };
struct Head {
  int64_t kind, segment, items, hot, chunk, hot_start, codes, channels, rerank;
  int64_t fresh;  // most items that become hot in a step
  int64_t bits;   // of rows of bytes, where hot slots or host items are such
  const void *first, *second;          // means; or low and high; or codes
  const float *projection, *codebook;  // [dim][channels], [256][channels]
  const int32_t* subspaces;            // [codes][2]
  int32_t* slots;
  float* hot_score;
  const void* host;
  uint8_t* held;      // rows of hot slots; null: they are in storage
  int64_t host_rows;  // whether host items are rows
  const void* mean;   // of all rows
  float* score;       // what hkv_retrieve gives without LOAD and takes without SCORE
  Bias bias;          // of a projected head's keys; no pairs without
};
struct RetrieveArgs {
  void *key, *value;
  const void* query;
  const Head* heads;
  int64_t *fetched, *reads, *most;  // per head: items and keys so far, items of one step at most
  int64_t count;
  int32_t dim, threads;
  float scaling, smoothing;
};
constexpr int64_t SPAN = 512, SPANS = 8;  // items per task; such tasks per task of the second pass

struct Work {  // scratch of one head
  float *table, *waves, *weights, *tops, *score, *exact;
  int32_t *missing, *freed, *nominees, *picked, *slot;  // slot of a picked item, -1: not hot
  uint64_t* candidates;
  uint8_t* is_hot;
  Turned turned;  // the query for rows
  int64_t fetched, read;
};
inline Rows rows_of(const RetrieveArgs& a, const Head& h) {
  Rows r{h.held, h.hot * h.chunk, static_cast<const T*>(h.mean), h.segment, int32_t(h.bits), a.dim, 0};
  r.stride = 2 * r.half_bytes();
  return r;
}
inline int64_t spans_of(int64_t items) { return (items + SPAN - 1) / SPAN; }
inline int64_t bundles_of(int64_t items) { return (spans_of(items) + SPANS - 1) / SPANS; }
inline const T* query_of(const RetrieveArgs& a, const Head& h) {
  return static_cast<const T*>(a.query) + h.segment * G * a.dim;
}

// Table of a projected head: [code][256][P], the part of every item's logit that a code decides.
void fill_table(const Head& h, const T* query, int dim, float factor, float* table) {
  pf turned[256];
  const int channels = int(h.channels);
  for (int c = 0; c < channels; c++) turned[c] = pf{};
  for (int d = 0; d < dim; d++) {
    pf q = {};
    for (int g = 0; g < G; g++) q[g] = single(query[g * dim + d]) * factor;
    for (int c = 0; c < channels; c++) turned[c] += q * h.projection[d * channels + c];
  }
  for (int64_t s = 0; s < h.codes; s++)
    for (int j = 0; j < 256; j++) {
      pf x = {};
      for (int c = h.subspaces[2 * s]; c < h.subspaces[2 * s + 1]; c++)
        x += turned[c] * h.codebook[j * channels + c];
      std::memcpy(table + (s * 256 + j) * P, &x, sizeof x);
    }
}
template <int CODES>
void look_up(const uint8_t* codes, int64_t items, const float* table, float* out) {
  for (int64_t i = 0; i < items; i++) {
    uint8_t own[CODES];
    std::memcpy(own, codes + i * CODES, CODES);
    pf sum = {};
    for (int s = 0; s < CODES; s++) {
      pf x;
      std::memcpy(&x, table + (s * 256 + own[s]) * P, sizeof x);
      sum += x;
    }
    std::memcpy(out + i * P, &sum, sizeof sum);
  }
}
void prepare(const RetrieveArgs& a, const Head& h, Work& w) {
  const T* query = query_of(a, h);
  if (h.kind == PROJECTED) {
    fill_waves(h.bias, query, a.dim, a.scaling * LOG2E, w.waves);
    return fill_table(h, query, a.dim, a.scaling * LOG2E, w.table);
  }
  const float edge = h.kind == MINMAX ? 0.f : -INFINITY;
  pack_query(query, a.dim, edge, INFINITY, w.table);
  if (h.kind == MINMAX) pack_query(query, a.dim, -INFINITY, 0.f, w.table + packed_floats(a.dim));
}
// Logits of a span to weights relative to its own maximum.
void weigh(Work& w, float* logits, int64_t rows, int64_t span) {
  Softmax softmax;
  vf decay[PARTS];
  softmax.add(logits, rows, decay);
  softmax.save(w.tops + span * 2 * P, w.tops + span * 2 * P + P);
}
void weigh_span(const RetrieveArgs& a, const Head& h, Work& w, int64_t span) {
  const int64_t begin = span * SPAN, rows = std::min(SPAN, h.items - begin);
  float* out = w.weights + begin * P;
  const float factor = a.scaling * LOG2E;
  const T *first = static_cast<const T*>(h.first), *second = static_cast<const T*>(h.second);
  if (h.kind == PROJECTED) {
    const uint8_t* codes = static_cast<const uint8_t*>(h.first) + begin * h.codes;
    if (h.codes == 2) look_up<2>(codes, rows, w.table, out);
    else if (h.codes == 4) look_up<4>(codes, rows, w.table, out);
    else look_up<8>(codes, rows, w.table, out);
    if (h.bias.pairs) add_waves(h.bias, w.waves, begin, rows, out);
  } else if (h.kind == MEAN) {
    dot_rows<false>(first + begin * a.dim, rows, a.dim, w.table, factor, out, AHEAD * a.dim);
  } else {
    dot_rows<false>(second + begin * a.dim, rows, a.dim, w.table, factor, out, AHEAD * a.dim);
    dot_rows<true>(first + begin * a.dim, rows, a.dim, w.table + packed_floats(a.dim), factor, out,
                   AHEAD * a.dim);
  }
  weigh(w, out, rows, span);
}
template <int... I>
INLINE vf by_item(vf v, std::integer_sequence<int, I...>) {
  return SHUFFLE(v, v, (I % TOKENS * Q + I / TOKENS)...);
}
// Scores of SPANS spans: every span's weights brought to the head's maxima and sums, mean over G.
void mix_bundle(const Work& w, int64_t items, int64_t bundle, float* scores) {
  const int64_t spans = spans_of(items), end = std::min(spans, (bundle + 1) * SPANS);
  float base[P], share[P];
  for (int g = 0; g < P; g++) {
    base[g] = -INFINITY;
    for (int64_t s = 0; s < spans; s++) base[g] = std::max(base[g], w.tops[s * 2 * P + g]);
    if (base[g] == -INFINITY) base[g] = 0;
    share[g] = 0;
  }
  for (int64_t s = 0; s < spans; s++)
    for (int g = 0; g < G; g++)
      share[g] += w.tops[s * 2 * P + P + g] * std::exp2(w.tops[s * 2 * P + g] - base[g]);
  for (int g = 0; g < G; g++) share[g] = 1 / (share[g] * G);
  for (int64_t s = bundle * SPANS; s < end; s++) {
    alignas(64) float lanes[PARTS * W];
    for (int i = 0; i < PARTS * W; i++) {
      int g = i % P;
      lanes[i] = g < G ? std::exp2(w.tops[s * 2 * P + g] - base[g]) * share[g] : 0;
    }
    vf factor[PARTS];
    for (int part = 0; part < PARTS; part++) factor[part] = load(lanes + part * W);
    const int64_t stop = std::min((s + 1) * SPAN, items);
    for (int64_t item = s * SPAN; item < stop; item += W) {
      vf rows[Q];
      for (int n = 0; n < Q; n++) {
        rows[n] = vf{};
        for (int part = 0; part < PARTS; part++)
          rows[n] += load(w.weights + item * P + (n * PARTS + part) * W) * factor[part];
      }
      vf sums = by_item(fold_all<Q>(rows), std::make_integer_sequence<int, W>{});
      store(scores + item, sums);
    }
  }
}

}  // namespace
