// Retrieval: scores of a dynamic head's items, selection, loading.
#pragma once

#include "products.h"
#include "threads.h"

namespace {

enum Kind { MEAN = 0, MINMAX = 1, PROJECTED = 2 };
struct Head {
  int64_t kind, segment, items, hot, chunk, hot_start, codes, channels, items_per_group;
  const void *first, *second;          // means; or low and high; or codes
  const float *projection, *codebook;  // [dim][channels], [256][channels]
  const int32_t* subspaces;            // [codes][2]
  int32_t* slots;
  float* hot_score;
  const void* host;
  const float* scale;  // null unless the host holds int8
  float* score;        // what hkv_retrieve gives without LOAD and takes without SCORE
};
struct RetrieveArgs {
  void *key, *value;
  const void* query;
  const Head* heads;
  int64_t* fetched;
  int64_t count;
  int32_t dim, threads, successors;
  float scaling, smoothing;
};
enum What { SCORE = 1, LOAD = 2 };
constexpr int64_t NEXT = 8;  // items between what is copied and what is prefetched
constexpr int64_t SPAN = 512, SPANS = 8;  // items per task; such tasks per task of the second pass

struct Work {  // scratch of one head
  float *table, *weights, *tops, *score;
  int32_t *missing, *freed, *nominees;
  uint64_t* candidates;
  uint8_t* is_hot;
  int64_t fetched;
};
inline int64_t spans_of(const Head& h) { return (h.items + SPAN - 1) / SPAN; }
inline int64_t bundles_of(const Head& h) { return (spans_of(h) + SPANS - 1) / SPANS; }

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
  const T* query = static_cast<const T*>(a.query) + h.segment * G * a.dim;
  if (h.kind == PROJECTED) return fill_table(h, query, a.dim, a.scaling * LOG2E, w.table);
  const float edge = h.kind == MINMAX ? 0.f : -INFINITY;
  pack_query(query, a.dim, edge, INFINITY, w.table);
  if (h.kind == MINMAX) pack_query(query, a.dim, -INFINITY, 0.f, w.table + packed_floats(a.dim));
}
// Weights of one span relative to its own maximum.
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
  } else if (h.kind == MEAN) {
    dot_rows<false>(first + begin * a.dim, rows, a.dim, w.table, factor, out, AHEAD * a.dim);
  } else {
    dot_rows<false>(second + begin * a.dim, rows, a.dim, w.table, factor, out, AHEAD * a.dim);
    dot_rows<true>(first + begin * a.dim, rows, a.dim, w.table + packed_floats(a.dim), factor, out,
                   AHEAD * a.dim);
  }
  Softmax softmax;
  vf decay[PARTS];
  softmax.add(out, rows, decay);
  softmax.save(w.tops + span * 2 * P, w.tops + span * 2 * P + P);
}
template <int... I>
INLINE vf by_item(vf v, std::integer_sequence<int, I...>) {
  return SHUFFLE(v, v, (I % TOKENS * Q + I / TOKENS)...);
}
// Scores of SPANS spans: every span's weights brought to the head's maxima and sums, mean over G.
void mix_bundle(const Head& h, Work& w, int64_t bundle) {
  const int64_t spans = spans_of(h), end = std::min(spans, (bundle + 1) * SPANS);
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
    const int64_t stop = std::min((s + 1) * SPAN, h.items);
    for (int64_t item = s * SPAN; item < stop; item += W) {
      vf rows[Q];
      for (int n = 0; n < Q; n++) {
        rows[n] = vf{};
        for (int part = 0; part < PARTS; part++)
          rows[n] += load(w.weights + item * P + (n * PARTS + part) * W) * factor[part];
      }
      vf sums = by_item(fold_all<Q>(rows), std::make_integer_sequence<int, W>{});
      store(w.score + item, sums);
    }
  }
}

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
// A superset of the best `hot` items, usually not much larger: a sample tells where to cut.
int64_t nominate(const float* due, int64_t items, int64_t hot, int32_t* out) {
  constexpr int64_t SAMPLE = 1024;
  if (items >= 8 * SAMPLE) {
    float sample[SAMPLE];
    for (int64_t n = 0; n < SAMPLE; n++) sample[n] = due[n * items / SAMPLE];
    const int64_t place = hot * SAMPLE * 5 / (items * 4) + SAMPLE / 64;
    if (place < SAMPLE) {
      std::nth_element(sample, sample + place, sample + SAMPLE, std::greater<float>());
      const int64_t count = collect(due, items, sample[place], out);
      if (count >= hot) return count;
    }
  }
  return collect(due, items, -INFINITY, out);
}
// Which items are wanted (Retrieval.load): fills missing, freed, slots, hot_score.
void choose(const RetrieveArgs& a, const Head& h, Work& w) {
  float* due = w.score;
  for (int64_t i = 0; i < h.items; i++) due[i] = due[i] == due[i] ? due[i] + 0.f : -1.f;
  if (a.successors > 0)
    for (int64_t i = h.items - 1; i > 0; i--)
      for (int64_t j = std::max<int64_t>(0, i - a.successors); j < i; j++)
        due[i] = std::max(due[i], due[j]);
  if (a.smoothing > 0)
    for (int64_t j = 0; j < h.hot; j++)
      due[h.slots[j]] = std::max(due[h.slots[j]], a.smoothing * h.hot_score[j]);
  w.fetched = 0;
  if (h.hot < h.items) {
    std::memset(w.is_hot, 0, h.items);
    for (int64_t j = 0; j < h.hot; j++) w.is_hot[h.slots[j]] = 1;
    const int64_t count = nominate(due, h.items, h.hot, w.nominees);
    static thread_local uint32_t counts[4096];
    std::memset(counts, 0, sizeof counts);
    for (int64_t n = 0; n < count; n++) counts[ordered(due[w.nominees[n]]) >> 20]++;
    int bin = 4096;
    int64_t above = 0, within = 0;  // items in higher bins; and in this one
    while (above + within < h.hot) {
      above += within;
      within = counts[--bin];
    }
    // Of this bin the best hot - above: larger d, then hot ones, then lower numbers.
    auto rank = [&](int64_t i) {
      const uint32_t second = uint32_t(w.is_hot[i]) << 31 | (0x7fffffffu - uint32_t(i));
      return uint64_t(ordered(due[i])) << 32 | second;
    };
    int64_t missing = 0, found = 0, freed = 0;
    for (int64_t n = 0; n < count; n++) {
      const int32_t i = w.nominees[n];
      const int mine = int(ordered(due[i]) >> 20);
      w.missing[missing] = i;
      missing += (mine > bin) & !w.is_hot[i];
      w.candidates[found] = rank(i);
      found += mine == bin;
    }
    uint64_t* last = w.candidates + (h.hot - above - 1);
    std::nth_element(w.candidates, last, w.candidates + found, std::greater<uint64_t>());
    for (uint64_t* c = w.candidates; c <= last; c++)
      if (!(*c & 0x80000000u)) w.missing[missing++] = int32_t(0x7fffffff - (*c & 0x7fffffff));
    for (int64_t j = 0; j < h.hot; j++)
      if (rank(h.slots[j]) < *last) w.freed[freed++] = int32_t(j);
    w.fetched = std::min(missing, freed);
    for (int64_t j = 0; j < w.fetched; j++) h.slots[w.freed[j]] = w.missing[j];
  }
  if (a.smoothing > 0)
    for (int64_t j = 0; j < h.hot; j++) h.hot_score[j] = due[h.slots[j]];
}

inline int64_t batch_of(const Head& h) { return std::max<int64_t>(1, 64 / h.chunk); }
inline int64_t batches_of(const Head& h, const Work& w) {
  return (w.fetched + batch_of(h) - 1) / batch_of(h);
}
void fetch_batch(const RetrieveArgs& a, const Head& h, const Work& w, int64_t batch) {
  const int64_t end = std::min(w.fetched, (batch + 1) * batch_of(h)), half = h.chunk * a.dim;
  const int64_t size = h.scale ? 1 : int64_t(sizeof(T)), bytes = 2 * half * size;
  const char* host = static_cast<const char*>(h.host);
  T* targets[2] = {static_cast<T*>(a.key), static_cast<T*>(a.value)};
  for (int64_t n = batch * batch_of(h); n < end; n++) {
    const int64_t item = w.missing[n], next = n + NEXT;
    const char* source = host + item * bytes;
    if (next < w.fetched && bytes <= 4096) {
      const char* later = host + w.missing[next] * bytes;
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(later + i);
      for (T* target : targets)
        for (int64_t i = 0; i < half; i += 64 / int64_t(sizeof(T)))
          __builtin_prefetch(target + (h.hot_start + w.freed[next] * h.chunk) * a.dim + i, 1);
    }
    for (int which = 0; which < 2; which++) {
      T* to = targets[which] + (h.hot_start + w.freed[n] * h.chunk) * a.dim;
      if (!h.scale) {
        std::memcpy(to, source + which * half * size, half * size);
        continue;
      }
      const int8_t* from = reinterpret_cast<const int8_t*>(source) + which * half;
      const float* scale = h.scale + (item / h.items_per_group * 2 + which) * a.dim;
      for (int64_t token = 0; token < h.chunk; token++)
        for (int d = 0; d < a.dim; d++)
          narrow(float(from[token * a.dim + d]) * scale[d], to[token * a.dim + d]);
    }
  }
}

void retrieve(const RetrieveArgs& a, int what) {
  static thread_local std::vector<Work> works;
  works.assign(a.count, Work{});
  size_t bytes = 0;
  auto plan = [&](bool real) {  // measures, then hands out
    auto take = [&](auto*& p, size_t n) {
      using E = std::remove_reference_t<decltype(*p)>;
      if (real) p = arena.take<E>(n);
      else bytes += Arena::rounded<E>(n);
    };
    for (int64_t i = 0; i < a.count; i++) {
      const Head& h = a.heads[i];
      Work& w = works[i];
      const size_t rows = size_t(h.items) + 2 * W;
      take(w.table, h.kind == PROJECTED ? h.codes * 256 * P : 2 * packed_floats(a.dim));
      take(w.weights, what & SCORE ? rows * P : 0);
      take(w.tops, size_t(spans_of(h)) * 2 * P);
      take(w.score, rows);
      take(w.missing, h.hot + 1);
      take(w.freed, h.hot + 1);
      take(w.nominees, rows);
      take(w.candidates, h.items + 1);
      take(w.is_hot, h.items);
    }
  };
  plan(false);
  arena.reserve(bytes);
  plan(true);
  Work* all = works.data();
  std::atomic<int> next[5] = {};
  // Tasks of all heads, head by head.
  auto each = [&](std::atomic<int>& counter, auto count, auto task) {
    int total = 0;
    for (int64_t i = 0; i < a.count; i++) total += int(count(i));
    share(counter, total, [&](int number) {
      int64_t i = 0, rest = number;
      while (rest >= count(i)) rest -= count(i++);
      task(i, rest);
    });
  };
  auto one = [](int64_t) { return int64_t(1); };
  parallel(a.threads, [&] {
    if (what & SCORE) {
      each(next[0], one, [&](int64_t i, int64_t) { prepare(a, a.heads[i], all[i]); });
      barrier(a.threads);
      each(next[1], [&](int64_t i) { return spans_of(a.heads[i]); },
           [&](int64_t i, int64_t n) { weigh_span(a, a.heads[i], all[i], n); });
      barrier(a.threads);
      each(next[2], [&](int64_t i) { return bundles_of(a.heads[i]); },
           [&](int64_t i, int64_t n) { mix_bundle(a.heads[i], all[i], n); });
      barrier(a.threads);
    }
    each(next[3], one, [&](int64_t i, int64_t) {
      const Head& h = a.heads[i];
      const size_t size = sizeof(float) * h.items;
      if (!(what & LOAD)) std::memcpy(h.score, all[i].score, size);
      if (!(what & SCORE)) std::memcpy(all[i].score, h.score, size);
      if (what & LOAD) choose(a, h, all[i]);
    });
    if (what & LOAD) {
      barrier(a.threads);
      each(next[4], [&](int64_t i) { return batches_of(a.heads[i], all[i]); },
           [&](int64_t i, int64_t n) { fetch_batch(a, a.heads[i], all[i], n); });
    }
  });
  for (int64_t i = 0; i < a.count; i++) a.fetched[i] = all[i].fetched;
}

}  // namespace
