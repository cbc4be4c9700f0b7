// Attention of one new token over ragged segments (flash decoding): exact tokens and quantised ones
// of a segment are parts of it, each with its own softmax, which are merged at the end.
#pragma once

#include "quantised.h"
#include "threads.h"

namespace {

struct AttendArgs {
  const void *key, *value, *query;
  void* out;
  const int64_t *offsets, *lengths;
  int64_t segments;
  const uint8_t* rows;                                     // quantised tokens of all segments,
  const void* mean;                                        // [quantised][2][dim],
  const int64_t *row_segments, *row_starts, *row_counts, *row_bits;  // in order of segments
  int64_t quantised;
  int32_t dim, threads;
  float scaling;
};
struct Part { int64_t segment, begin, rows, which; };  // which: of the quantised ones; -1: exact

struct Attention {
  const AttendArgs& a;
  const int dim, chunks;
  const float factor;
  const size_t acc_floats, stride;  // of a part's result: sums of values, maxima, weights
  std::vector<Part>& parts;
  std::vector<int64_t>& starts;  // first part of every segment
  std::vector<Rows>& rows;
  std::vector<Turned>& turned;
  float* results;

  T* out(int64_t s) const { return static_cast<T*>(a.out) + s * G * dim; }
  const T* query(int64_t s) const { return static_cast<const T*>(a.query) + s * G * dim; }

  void split(int64_t segment, int64_t length, int64_t which, int64_t goal) {
    const int64_t count = (length + goal - 1) / goal;
    const int64_t size = count ? ((length + count - 1) / count + 7) / 8 * 8 : 0;
    for (int64_t begin = 0; begin < length; begin += size)
      parts.push_back({segment, begin, std::min(size, length - begin), which});
  }
  void plan() {
    int64_t total = 0, n = 0;
    for (int64_t s = 0; s < a.segments; s++) total += a.lengths[s];
    for (int64_t i = 0; i < a.quantised; i++) {
      rows.push_back({a.rows + a.row_starts[i], a.row_counts[i],
                      static_cast<const T*>(a.mean) + i * 2 * dim, a.row_segments[i],
                      int32_t(a.row_bits[i]), dim, 0});
      rows.back().stride = 2 * rows.back().half_bytes();
      total += a.row_counts[i];
    }
    const int64_t goal = std::max<int64_t>(256, (total + a.threads * 4 - 1) / (a.threads * 4));
    for (int64_t s = 0; s < a.segments; s++) {
      starts.push_back(int64_t(parts.size()));
      split(s, a.lengths[s], -1, goal);
      for (; n < a.quantised && rows[n].segment == s; n++) split(s, rows[n].count, n, goal);
    }
    starts.push_back(int64_t(parts.size()));
  }
  template <class Logits, class Add>
  void run(const Part& part, float* acc, Logits logits_of, Add add) const {
    alignas(64) float logits[BLOCK * P + W];
    std::memset(acc, 0, sizeof(float) * acc_floats);
    Softmax softmax;
    for (int64_t row = 0; row < part.rows; row += BLOCK) {
      const int64_t count = std::min(BLOCK, part.rows - row);
      vf decay[PARTS];
      logits_of(part.begin + row, count, logits);
      softmax.add(logits, count, decay);
      if (row) fade(acc, decay, part.which >= 0);
      add(part.begin + row, count, logits, acc);
    }
    softmax.save(acc + acc_floats, acc + acc_floats + P);
  }
  void fade(float* acc, const vf* decay, bool quantised) const {
    for (int i = 0; i < 2 * chunks; i++)
      for (int g = 0; g < G; g++) {
        float* x = acc + (quantised ? g * 2 * chunks + i : i * A + g) * W;
        store(x, load(x) * decay[g / W][g % W]);
      }
  }
  void run_exact(const Part& part, float* acc) const {
    alignas(64) float packed[MAX_DIM * G];
    pack_query(query(part.segment), dim, -INFINITY, INFINITY, packed);
    const T* key = static_cast<const T*>(a.key) + a.offsets[part.segment] * dim;
    const T* value = static_cast<const T*>(a.value) + a.offsets[part.segment] * dim;
    run(part, acc,
        [&](int64_t row, int64_t count, float* logits) {
          dot_rows<false>(key + row * dim, count, dim, packed, factor, logits, AHEAD * dim);
        },
        [&](int64_t row, int64_t count, const float* weights, float* sums) {
          add_values(value + row * dim, count, dim, weights, sums, AHEAD * dim);
        });
  }
  template <bool WHOLE>
  void run_quantised(const Part& part, float* acc, Scratch& scratch) const {
    const Rows& r = rows[part.which];
    run(part, acc,
        [&](int64_t row, int64_t count, float* logits) {
          key_logits(r, turned[part.which], row, count, scratch, logits);
        },
        [&](int64_t row, int64_t count, const float* weights, float* sums) {
          const Block values = read_block(r, row, count, 1, scratch);
          add_quantised<WHOLE>(r, values, count, weights, scratch, sums);
        });
  }
  // Every part's factor for query head g, in place of its maximum; the sum of all weights.
  float level(int64_t first, int64_t end, int g) const {
    float top = -INFINITY, sum = 0;
    for (int64_t i = first; i < end; i++) {
      const float x = results[i * stride + acc_floats + g];
      top = x > top ? x : top;
    }
    if (top == -INFINITY) top = 0;
    for (int64_t i = first; i < end; i++) {
      float* mine = results + i * stride + acc_floats;
      mine[g] = std::exp2(mine[g] - top);
      sum += mine[g] * mine[P + g];
    }
    return sum;
  }
  // Adds what quantised parts have summed up, back from the rotated space.
  void add_turned(int64_t first, int64_t end, int g, float* total) const {
    alignas(64) float sums[MAX_DIM + 2 * W];
    while (first < end) {
      const int64_t which = parts[first].which;
      float weight = 0;
      std::memset(sums, 0, sizeof(float) * padded(dim));
      for (; first < end && parts[first].which == which; first++) {
        const float* mine = results + first * stride;
        const float share = mine[acc_floats + g];
        weight += share * mine[acc_floats + P + g];
        for (int d = 0; d < dim; d += W)
          store(sums + d, load(sums + d) + load(mine + g * padded(dim) + d) * share);
      }
      turn(sums, dim);
      for (int d = 0; d < dim; d++)
        total[d] += sums[d] + single(rows[which].mean[dim + d]) * weight;
    }
  }
  void merge(int64_t s) const {
    const int64_t first = starts[s], end = starts[s + 1];
    int64_t exact = first;
    while (exact < end && parts[exact].which < 0) exact++;
    for (int g = 0; g < G; g++) {
      const float sum = level(first, end, g);
      alignas(64) float total[MAX_DIM + 2 * W] = {};
      if (exact < end) add_turned(exact, end, g, total);
      for (int c = 0; c < chunks; c++) {
        vf sums[2] = {};
        for (int half = 0; half < 2; half++) {
          for (int lane = 0; exact < end && lane < W; lane++)
            sums[half][lane] = total[c * 2 * W + place(half, lane)];
          for (int64_t i = first; i < exact; i++)
            sums[half] += load(results + i * stride + ((c * 2 + half) * A + g) * W) *
                          results[i * stride + acc_floats + g];
          sums[half] /= splat(sum);
        }
        emit(sums[0], sums[1], std::min(2 * W, dim - c * 2 * W), out(s) + g * dim + c * 2 * W);
      }
    }
  }
};

void attend(const AttendArgs& a) {
  static thread_local std::vector<Part> parts;
  static thread_local std::vector<int64_t> starts;
  static thread_local std::vector<Rows> rows;
  static thread_local std::vector<Turned> turned;
  parts.clear(), starts.clear(), rows.clear();
  const int chunks = chunks_of(a.dim);
  const size_t acc_floats = size_t(chunks) * 2 * A * W;
  const size_t stride = Arena::rounded<float>(acc_floats + 2 * P) / sizeof(float);
  Attention job{a,     a.dim,  chunks, a.scaling * LOG2E, acc_floats, stride,
                parts, starts, rows,   turned,            nullptr};
  job.plan();
  size_t bytes = parts.size() * stride * sizeof(float);
  for (const Rows& r : rows)
    bytes += Arena::rounded<int16_t>(LIMBS * limb_shorts(r)) + 2 * Arena::rounded<float>(P) +
             Arena::rounded<int32_t>(LIMBS * r.runs() * G);
  arena.reserve(bytes + Arena::rounded<std::atomic<int>>(a.segments));
  job.results = arena.take<float>(parts.size() * stride);
  turned.resize(rows.size());
  for (size_t n = 0; n < rows.size(); n++) {
    turned[n].limbs = arena.take<int16_t>(LIMBS * limb_shorts(rows[n]));
    turned[n].offsets = arena.take<int32_t>(LIMBS * rows[n].runs() * G);
    turned[n].unit = arena.take<float>(P);
    turned[n].bias = arena.take<float>(P);
  }
  auto* pending = arena.take<std::atomic<int>>(a.segments);
  for (int64_t s = 0; s < a.segments; s++) {
    new (&pending[s]) std::atomic<int>(int(starts[s + 1] - starts[s]));
    if (starts[s + 1] == starts[s]) std::memset(job.out(s), 0, sizeof(T) * G * a.dim);
  }
  std::atomic<int> next[2] = {};
  parallel(a.threads, [&] {
    if (!job.rows.empty()) {
      share(next[0], int(job.rows.size()), [&](int n) {
        turn_query(job.rows[n], job.query(job.rows[n].segment), job.factor, job.turned[n]);
      });
      barrier(a.threads);
    }
    Scratch scratch;
    share(next[1], int(job.parts.size()), [&](int i) {
      const Part& part = job.parts[i];
      float* acc = job.results + i * stride;
      if (part.which < 0) job.run_exact(part, acc);
      else if (job.rows[part.which].group() % (2 * W)) job.run_quantised<false>(part, acc, scratch);
      else job.run_quantised<true>(part, acc, scratch);
      if (pending[part.segment].fetch_sub(1, std::memory_order_acq_rel) == 1)
        job.merge(part.segment);
    });
  });
}

}  // namespace
