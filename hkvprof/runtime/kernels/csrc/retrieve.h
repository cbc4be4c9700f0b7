// Retrieval: scores of dynamic heads' items, selection, loading.
#pragma once

#include "rerank.h"
#include "threads.h"

namespace {

enum What { SCORE = 1, LOAD = 2 };
constexpr int64_t NEXT = 8;  // items between what is copied and what is prefetched

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
      for (int64_t at = 0; at < half; at += a.dim) restore(from + at, scale, a.dim, to + at);
    }
  }
}

void retrieve(const RetrieveArgs& a, int what) {
  static thread_local std::vector<Work> works;
  works.assign(a.count, Work{});
  size_t bytes = 0;
  bool reranks = false;
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
      reranks |= picked_of(h) > 0;
      const size_t picked = what & SCORE ? size_t(picked_of(h)) : 0;
      const size_t tables = h.kind == PROJECTED ? h.codes * 256 * P : 0;
      take(w.table, std::max(tables, 2 * packed_floats(a.dim)));
      take(w.waves, what & SCORE && h.kind == PROJECTED ? size_t(h.bias.pairs) * 2 * G : 0);
      take(w.weights, what & SCORE ? rows * P : 0);
      take(w.tops, size_t(spans_of(h.items)) * 2 * P);
      take(w.score, rows);
      take(w.exact, picked + 2 * W);
      take(w.picked, picked + 1);
      take(w.slot, picked + 1);
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
  std::atomic<int> next[8] = {};
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
      each(next[1], [&](int64_t i) { return spans_of(a.heads[i].items); },
           [&](int64_t i, int64_t n) { weigh_span(a, a.heads[i], all[i], n); });
      barrier(a.threads);
      each(next[2], [&](int64_t i) { return bundles_of(a.heads[i].items); },
           [&](int64_t i, int64_t n) { mix_bundle(all[i], a.heads[i].items, n, all[i].score); });
      barrier(a.threads);
    }
    if (what & SCORE && reranks) {
      each(next[3], [&](int64_t i) { return int64_t(picked_of(a.heads[i]) > 0); },
           [&](int64_t i, int64_t) { pick(a, a.heads[i], all[i]); });
      barrier(a.threads);
      each(next[4], [&](int64_t i) { return spans_of(picked_of(a.heads[i])); },
           [&](int64_t i, int64_t n) { weigh_picked(a, a.heads[i], all[i], n); });
      barrier(a.threads);
      each(next[5], [&](int64_t i) { return bundles_of(picked_of(a.heads[i])); },
           [&](int64_t i, int64_t n) { mix_picked(a.heads[i], all[i], n); });
      barrier(a.threads);
    }
    each(next[6], one, [&](int64_t i, int64_t) {
      const Head& h = a.heads[i];
      const size_t size = sizeof(float) * h.items;
      if (!(what & LOAD)) std::memcpy(h.score, all[i].score, size);
      if (!(what & SCORE)) std::memcpy(all[i].score, h.score, size);
      if (what & LOAD) choose(a, h, all[i]);
    });
    if (what & LOAD) {
      barrier(a.threads);
      each(next[7], [&](int64_t i) { return batches_of(a.heads[i], all[i]); },
           [&](int64_t i, int64_t n) { fetch_batch(a, a.heads[i], all[i], n); });
    }
  });
  for (int64_t i = 0; i < a.count; i++) {
    a.fetched[i] += all[i].fetched;
    a.reads[i] += all[i].read;
    a.most[i] = std::max(a.most[i], all[i].fetched);
  }
}

}  // namespace
