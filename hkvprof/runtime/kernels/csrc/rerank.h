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
  for (int64_t n = 0; n < picked; n++) w.read += w.slot[n] < 0;
  pack_query(query_of(a, h), a.dim, -INFINITY, INFINITY, w.table);
  if (h.bits) turn_query(rows_of(a, h), query_of(a, h), a.scaling * LOG2E, w.turned);
}
// Up to a span of picked items whose keys are alike: all rows of bytes, or none.
struct Alike {
  const int32_t *picked, *slot;  // of the whole span
  int32_t place[SPAN];           // of these within it
  int64_t count = 0;
  float* out;  // logits of the whole span
  // `logits_of` fills those of up to BLOCK items.
  template <class Logits>
  void by_blocks(Logits logits_of) const {
    alignas(64) float logits[BLOCK * P + W];
    for (int64_t at = 0; at < count; at += BLOCK) {
      const int64_t rows = std::min(BLOCK, count - at);
      logits_of(at, rows, logits);
      for (int64_t n = 0; n < rows; n++)
        std::memcpy(out + place[at + n] * P, logits + n * P, P * sizeof(float));
    }
  }
};
void weigh_exact(const RetrieveArgs& a, const Head& h, const Work& w, const Alike& some) {
  const T *host = static_cast<const T*>(h.host), *keys = static_cast<const T*>(a.key);
  auto key = [&](int64_t n) {
    const int64_t place = some.place[std::min(n, some.count - 1)], slot = some.slot[place];
    return slot < 0 ? host + 2 * a.dim * int64_t(some.picked[place])
                    : keys + (h.hot_start + slot) * a.dim;
  };
  some.by_blocks([&](int64_t at, int64_t rows, float* logits) {
    auto coming = [&](int64_t row) {
      for (int64_t n = at + row + SOON, end = n + TOKENS; n < end; n++) prefetch(key(n), a.dim);
    };
    auto own = [&](int64_t row) { return key(at + row); };
    dot_any_rows<false>(own, coming, rows, a.dim, w.table, a.scaling * LOG2E, logits);
  });
}
// Keys are brought together first.
void weigh_rows(const RetrieveArgs& a, const Head& h, const Work& w, const Alike& some) {
  Rows r = rows_of(a, h);
  const int64_t bytes = r.half_bytes(), whole = 2 * bytes;
  const uint8_t* host = static_cast<const uint8_t*>(h.host);
  auto key = [&](int64_t n) {
    const int64_t place = some.place[std::min(n, some.count - 1)], slot = some.slot[place];
    return slot < 0 ? host + whole * int64_t(some.picked[place]) : h.held + whole * slot;
  };
  alignas(64) uint8_t together[BLOCK * (MAX_DIM + 2)];
  Scratch scratch;
  r.first = together, r.stride = bytes;
  some.by_blocks([&](int64_t at, int64_t rows, float* logits) {
    for (int64_t n = 0; n < rows; n++) {
      const uint8_t* later = key(at + n + SOON);
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(later + i);
      std::memcpy(together + n * bytes, key(at + n), bytes);
    }
    key_logits(r, w.turned, 0, rows, scratch, logits);
  });
}
// Weights of a span of picked items; a logit that is not finite counts as -infinity.
void weigh_picked(const RetrieveArgs& a, const Head& h, Work& w, int64_t span) {
  const int64_t begin = span * SPAN, rows = std::min(SPAN, picked_of(h) - begin);
  float* out = w.weights + begin * P;
  Alike exact{w.picked + begin, w.slot + begin}, few{w.picked + begin, w.slot + begin};
  exact.out = few.out = out;
  for (int64_t n = 0; n < rows; n++) {
    Alike& own = (w.slot[begin + n] < 0 ? h.host_rows != 0 : h.held != nullptr) ? few : exact;
    own.place[own.count++] = int32_t(n);
  }
  weigh_exact(a, h, w, exact);
  if (few.count) weigh_rows(a, h, w, few);
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
