// Retrieval: which items are the best, and which of them must be fetched.
#pragma once

#include "scores.h"

namespace {

INLINE uint32_t ordered(float x) {  // unsigned integers that compare as the floats do
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u ^ (uint32_t(int32_t(u) >> 31) | 0x80000000u);
}
// Numbers of items, in order, whose `due` is not below `least`.
int64_t collect(const float* due, int64_t items, float least, int32_t* out) {
  int64_t count = 0, i = 0;
#ifdef __AVX512F__
  __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + 16 <= items; i += 16) {
    const __m512 own = _mm512_loadu_ps(due + i);
    const __mmask16 mask = _mm512_cmp_ps_mask(own, _mm512_set1_ps(least), _CMP_GE_OQ);
    _mm512_storeu_si512(out + count, _mm512_maskz_compress_epi32(mask, numbers));
    count += __builtin_popcount(mask);
    numbers = _mm512_add_epi32(numbers, _mm512_set1_epi32(16));
  }
#endif
  for (; i < items; i++) {
    out[count] = int32_t(i);
    count += due[i] >= least;
  }
  return count;
}
// A superset of the best `hot` items, usually not much larger: a sample tells where to cut, above
// the items without a score (-1).
int64_t nominate(const float* due, int64_t items, int64_t hot, int32_t* out) {
  constexpr int64_t SAMPLE = 1024;
  if (items >= 8 * SAMPLE) {
    float sample[SAMPLE];
    for (int64_t n = 0; n < SAMPLE; n++) sample[n] = due[n * items / SAMPLE];
    const int64_t place = hot * SAMPLE * 5 / (items * 4) + SAMPLE / 64;
    if (place < SAMPLE) {
      std::nth_element(sample, sample + place, sample + SAMPLE, std::greater<float>());
      const float least = std::max(sample[place], std::nextafter(-1.f, 0.f));
      const int64_t count = collect(due, items, least, out);
      if (count >= hot) return count;
    }
  }
  return collect(due, items, -INFINITY, out);
}
// NaN counts as -1; there is no -0.
INLINE void settle(float* due, int64_t items) {
  for (int64_t i = 0; i < items; i++) due[i] = due[i] == due[i] ? due[i] + 0.f : -1.f;
}
// Larger `due` first, then hot ones, then lower numbers.
INLINE uint64_t rank(const Work& w, const float* due, int64_t i) {
  return uint64_t(ordered(due[i])) << 32 | uint32_t(w.is_hot[i]) << 31 |
         (0x7fffffffu - uint32_t(i));
}
// Fills is_hot and nominees, among which are the `count` best items; the rank of the last of these.
uint64_t cut(const Head& h, Work& w, const float* due, int64_t count, int64_t& nominees) {
  std::memset(w.is_hot, 0, h.items);
  for (int64_t j = 0; j < h.hot; j++) w.is_hot[h.slots[j]] = 1;
  nominees = nominate(due, h.items, count, w.nominees);
  static thread_local uint32_t counts[4096];
  std::memset(counts, 0, sizeof counts);
  for (int64_t n = 0; n < nominees; n++) counts[ordered(due[w.nominees[n]]) >> 20]++;
  int bin = 4096;
  int64_t above = 0, within = 0;  // items in higher bins; and in this one
  while (above + within < count) {
    above += within;
    within = counts[--bin];
  }
  int64_t found = 0;
  for (int64_t n = 0; n < nominees; n++) {
    w.candidates[found] = rank(w, due, w.nominees[n]);
    found += int(w.candidates[found] >> 52) == bin;
  }
  uint64_t* last = w.candidates + (count - above - 1);
  std::nth_element(w.candidates, last, w.candidates + found, std::greater<uint64_t>());
  return *last;
}
// Leaves those `count` of the entries, which follow each other, whose keys are largest.
template <class F>
void keep_largest(int32_t* entries, int64_t all, int64_t count, uint64_t* keys, F key) {
  for (int64_t n = 0; n < all; n++) keys[n] = key(entries[n]);
  std::nth_element(keys, keys + count - 1, keys + all, std::greater<uint64_t>());
  const uint64_t last = keys[count - 1];
  for (int64_t n = 0, kept = 0; kept < count; n++) {
    const int32_t entry = entries[n];
    entries[kept] = entry;
    kept += key(entry) >= last;
  }
}
// Which items are wanted (Retrieval.load): fills missing, freed, slots, hot_score.
void choose(const RetrieveArgs& a, const Head& h, Work& w) {
  float* due = w.score;
  settle(due, h.items);
  if (a.smoothing > 0)
    for (int64_t j = 0; j < h.hot; j++)
      due[h.slots[j]] = std::max(due[h.slots[j]], a.smoothing * h.hot_score[j]);
  w.fetched = 0;
  if (h.hot < h.items) {
    int64_t nominees, missing = 0, freed = 0;
    const uint64_t last = cut(h, w, due, h.hot, nominees);
    for (int64_t n = 0; n < nominees; n++) {
      const int32_t i = w.missing[missing] = w.nominees[n];
      missing += (rank(w, due, i) >= last) & !w.is_hot[i];
    }
    for (int64_t j = 0; j < h.hot; j++) {
      w.freed[freed] = int32_t(j);
      freed += rank(w, due, h.slots[j]) < last;
    }
    w.fetched = std::min(missing, freed);
    if (w.fetched > h.fresh) {
      auto best = [&](int32_t item) { return rank(w, due, item); };
      auto worst = [&](int32_t slot) { return ~rank(w, due, h.slots[slot]); };
      keep_largest(w.missing, missing, h.fresh, w.candidates, best);
      keep_largest(w.freed, freed, h.fresh, w.candidates, worst);
      w.fetched = h.fresh;
    }
    for (int64_t j = 0; j < w.fetched; j++) h.slots[w.freed[j]] = w.missing[j];
  }
  if (a.smoothing > 0)
    for (int64_t j = 0; j < h.hot; j++) h.hot_score[j] = due[h.slots[j]];
}

}  // namespace
