// Attention of one new token over ragged segments (flash decoding).
#pragma once

#include "products.h"
#include "threads.h"

namespace {

struct AttendArgs {
  const void *key, *value, *query;
  void* out;
  const int64_t *offsets, *lengths;
  int64_t segments;
  int32_t dim, threads;
  float scaling;
};
struct Part { int64_t segment, begin, rows; };
constexpr int64_t BLOCK = 64;  // tokens whose logits are held at a time

void attend(const AttendArgs& a) {
  const int chunks = chunks_of(a.dim);
  const float factor = a.scaling * LOG2E;
  const size_t acc_floats = size_t(chunks) * 2 * A * W, part_floats = acc_floats + 2 * P;
  static thread_local std::vector<Part> parts;
  static thread_local std::vector<int64_t> starts;
  parts.clear();
  starts.clear();
  int64_t total = 0;
  for (int64_t s = 0; s < a.segments; s++) total += a.lengths[s];
  const int64_t goal = std::max<int64_t>(256, (total + a.threads * 4 - 1) / (a.threads * 4));
  for (int64_t s = 0; s < a.segments; s++) {
    starts.push_back(int64_t(parts.size()));
    int64_t count = (a.lengths[s] + goal - 1) / goal;
    int64_t rows = count ? ((a.lengths[s] + count - 1) / count + 7) / 8 * 8 : 0;
    for (int64_t begin = 0; begin < a.lengths[s]; begin += rows)
      parts.push_back({s, begin, std::min(rows, a.lengths[s] - begin)});
  }
  starts.push_back(int64_t(parts.size()));
  arena.reserve(parts.size() * Arena::rounded<float>(part_floats) +
                Arena::rounded<std::atomic<int>>(a.segments));
  float* results = arena.take<float>(0);
  const size_t stride = Arena::rounded<float>(part_floats) / sizeof(float);
  arena.used += parts.size() * stride * sizeof(float);
  auto* pending = arena.take<std::atomic<int>>(a.segments);
  for (int64_t s = 0; s < a.segments; s++) {
    new (&pending[s]) std::atomic<int>(int(starts[s + 1] - starts[s]));
    if (!a.lengths[s])
      std::memset(static_cast<T*>(a.out) + s * G * a.dim, 0, sizeof(T) * G * a.dim);
  }
  const Part* all = parts.data();
  const int64_t* begins = starts.data();
  const int count = int(parts.size());

  auto combine = [&](int64_t s) {
    const int64_t first = begins[s], end = begins[s + 1];
    T* out = static_cast<T*>(a.out) + s * G * a.dim;
    for (int g = 0; g < G; g++) {
      float top = -INFINITY, sum = 0;
      for (int64_t i = first; i < end; i++) {
        float x = results[i * stride + acc_floats + g];
        top = x > top ? x : top;
      }
      if (top == -INFINITY) top = 0;
      for (int64_t i = first; i < end; i++) {
        float* mine = results + i * stride + acc_floats;
        mine[g] = std::exp2(mine[g] - top);
        sum += mine[g] * mine[P + g];
      }
      for (int c = 0; c < chunks; c++) {
        vf sums[2] = {};
        for (int half = 0; half < 2; half++) {
          for (int64_t i = first; i < end; i++)
            sums[half] += load(results + i * stride + ((c * 2 + half) * A + g) * W) *
                          results[i * stride + acc_floats + g];
          sums[half] /= splat(sum);
        }
        emit(sums[0], sums[1], std::min(2 * W, a.dim - c * 2 * W), out + g * a.dim + c * 2 * W);
      }
    }
  };
  std::atomic<int> next{0};
  parallel(a.threads, [&] {
    alignas(64) float query[MAX_DIM * G], logits[BLOCK * P + W];
    share(next, count, [&](int i) {
      const Part& part = all[i];
      const T* q = static_cast<const T*>(a.query) + part.segment * G * a.dim;
      pack_query(q, a.dim, -INFINITY, INFINITY, query);
      const int64_t from = (a.offsets[part.segment] + part.begin) * a.dim;
      const T* key = static_cast<const T*>(a.key) + from;
      const T* value = static_cast<const T*>(a.value) + from;
      float* acc = results + i * stride;
      std::memset(acc, 0, sizeof(float) * acc_floats);
      Softmax softmax;
      for (int64_t row = 0; row < part.rows; row += BLOCK) {
        const int64_t rows = std::min(BLOCK, part.rows - row);
        vf decay[PARTS];
        dot_rows<false>(key + row * a.dim, rows, a.dim, query, factor, logits, AHEAD * a.dim);
        softmax.add(logits, rows, decay);
        if (row)
          for (int c = 0; c < 2 * chunks; c++)
            for (int g = 0; g < G; g++) {
              float* x = acc + (c * A + g) * W;
              store(x, load(x) * decay[g / W][g % W]);
            }
        add_values(value + row * a.dim, rows, a.dim, logits, acc, AHEAD * a.dim);
      }
      softmax.save(acc + acc_floats, acc + acc_floats + P);
      if (pending[part.segment].fetch_sub(1, std::memory_order_acq_rel) == 1) combine(part.segment);
    });
  });
}

}  // namespace
