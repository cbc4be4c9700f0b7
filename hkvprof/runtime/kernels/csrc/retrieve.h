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
// Ask for what is copied soon.
INLINE void come(const char* from, int64_t bytes, int write) {
  for (int64_t i = 0; i < bytes; i += 64)
    write ? __builtin_prefetch(from + i, 1) : __builtin_prefetch(from + i);
}
// An item, as the host holds it, into a hot slot.
void fetch(const RetrieveArgs& a, const Head& h, const Rows& r, const char* item, int64_t slot) {
  const int64_t half = h.chunk * a.dim, first = h.hot_start * a.dim + slot * half;
  const T* from[2] = {reinterpret_cast<const T*>(item), reinterpret_cast<const T*>(item) + half};
  T* to[2] = {static_cast<T*>(a.key) + first, static_cast<T*>(a.value) + first};
  uint8_t* rows = h.held + slot * h.chunk * r.stride;
  if (h.held && h.host_rows) std::memcpy(rows, item, h.chunk * r.stride);
  for (int64_t at = 0; h.held && !h.host_rows && at < half; at += a.dim, rows += r.stride)
    encode_row(r, from[0] + at, from[1] + at, rows);
  if (h.held) return;
  const uint8_t* row = reinterpret_cast<const uint8_t*>(item);
  for (int64_t at = 0; h.host_rows && at < half; at += a.dim, row += r.stride)
    decode_row(r, row, to[0] + at, to[1] + at);
  for (int which = 0; which < 2 && !h.host_rows; which++)
    std::memcpy(to[which], from[which], half * sizeof(T));
}
void fetch_batch(const RetrieveArgs& a, const Head& h, const Work& w, int64_t batch) {
  const Rows r = rows_of(a, h);
  const int64_t end = std::min(w.fetched, (batch + 1) * batch_of(h));
  const int64_t exact = h.chunk * a.dim * int64_t(sizeof(T)), few = h.chunk * r.stride;
  const int64_t bytes = h.host_rows ? few : 2 * exact;
  const char* host = static_cast<const char*>(h.host);
  for (int64_t n = batch * batch_of(h); n < end; n++) {
    const int64_t next = n + NEXT;
    if (next < w.fetched && bytes <= 4096) {
      const int64_t slot = w.freed[next];
      come(host + w.missing[next] * bytes, bytes, 0);
      if (h.held) come(reinterpret_cast<const char*>(h.held) + slot * few, few, 1);
      else for (void* target : {a.key, a.value})
        come(static_cast<const char*>(target) + h.hot_start * a.dim * sizeof(T) + slot * exact, exact, 1);
    }
    fetch(a, h, r, host + w.missing[n] * bytes, w.freed[n]);
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
      const Rows r = rows_of(a, h);
      const bool turns = h.bits && picked;
      take(w.turned.limbs, turns ? LIMBS * limb_shorts(r) : 0);
      take(w.turned.offsets, turns ? size_t(LIMBS * r.runs() * G) : 0);
      take(w.turned.unit, turns ? P : 0);
      take(w.turned.bias, turns ? P : 0);
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
