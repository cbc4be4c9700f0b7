// Retrieval: exact scores of the items whose estimated scores are highest.
#pragma once

#include "select.h"

namespace {

constexpr int64_t SOON = 16;  // picked items between what is read and what is prefetched

// How many items get an exact score; 0: the estimated scores stay.
inline int64_t picked_of(const Head& h) {
  return h.rerank > 0 && h.hot < h.items ? std::min(h.hot + h.rerank, h.items) : 0;
}
// Fills `picked`, in order, with the slots of those that are hot, and the scores of all other items:
// what is hot, and the best of the rest.
void pick(const RetrieveArgs& a, const Head& h, Work& w) {
  settle(w.score, h.items);
  for (int64_t j = 0; j < h.hot; j++) w.score[h.slots[j]] = INFINITY;
  int64_t nominees, picked = 0;
  const uint64_t last = cut(h, w, w.score, picked_of(h), nominees);
  for (int64_t n = 0; n < nominees; n++) {
    w.picked[picked] = w.nominees[n];
    picked += rank(w, w.score, w.nominees[n]) >= last;
  }
  std::fill(w.score, w.score + h.items, -1.f);
  for (int64_t j = 0; j < h.hot; j++) w.score[h.slots[j]] = float(-2 - j);  // exact to 2^24
  for (int64_t n = 0; n < picked; n++) w.slot[n] = int32_t(-2 - w.score[w.picked[n]]);
  for (int64_t j = 0; j < h.hot; j++) w.score[h.slots[j]] = -1.f;
  for (int64_t n = 0; n < picked; n++) w.read += h.scale || w.slot[n] < 0;
  pack_query(query_of(a, h), a.dim, -INFINITY, INFINITY, w.table);
}
// Weights of a span of picked items; a logit that is not finite counts as -infinity.
void weigh_picked(const RetrieveArgs& a, const Head& h, Work& w, int64_t span) {
  const int64_t count = picked_of(h), begin = span * SPAN, rows = std::min(SPAN, count - begin);
  const int32_t* picked = w.picked + begin;
  float* out = w.weights + begin * P;
  const float factor = a.scaling * LOG2E;
  if (h.scale) {
    constexpr int64_t BLOCK_ROWS = 16;
    alignas(64) T keys[BLOCK_ROWS * MAX_DIM];
    const int8_t* host = static_cast<const int8_t*>(h.host);
    for (int64_t row = 0; row < rows; row += BLOCK_ROWS) {
      const int64_t end = std::min(rows, row + BLOCK_ROWS);
      for (int64_t n = row; n < end; n++) {
        const int64_t later = w.picked[std::min(begin + n + SOON, count - 1)];
        for (int i = 0; i < a.dim; i += 64) __builtin_prefetch(host + 2 * a.dim * later + i);
        const float* scale = h.scale + picked[n] / h.items_per_group * 2 * a.dim;
        restore(host + 2 * a.dim * int64_t(picked[n]), scale, a.dim, keys + (n - row) * a.dim);
      }
      dot_rows<false>(keys, end - row, a.dim, w.table, factor, out + row * P);
    }
  } else {
    const T* host = static_cast<const T*>(h.host);
    const T* hot = static_cast<const T*>(a.key) + h.hot_start * a.dim;
    const int32_t* slot = w.slot + begin;
    auto key = [&](int64_t row) {
      return slot[row] < 0 ? host + 2 * a.dim * int64_t(picked[row]) : hot + a.dim * slot[row];
    };
    auto coming = [&](int64_t row) {
      for (int64_t n = begin + row + SOON, end = n + TOKENS; n < end; n++)
        prefetch(key(std::min(n, count - 1) - begin), a.dim);
    };
    dot_any_rows<false>(key, coming, rows, a.dim, w.table, factor, out);
  }
  for (int64_t i = 0; i < rows * P; i++) out[i] = std::isfinite(out[i]) ? out[i] : -INFINITY;
  weigh(w, out, rows, span);
}
void mix_picked(const Head& h, Work& w, int64_t bundle) {
  const int64_t count = picked_of(h), begin = bundle * SPANS * SPAN;
  mix_bundle(w, count, bundle, w.exact);
  for (int64_t n = begin; n < std::min(count, begin + SPANS * SPAN); n++)
    w.score[w.picked[n]] = w.exact[n];
}

}  // namespace
