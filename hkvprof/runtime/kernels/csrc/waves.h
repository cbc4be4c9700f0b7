// The part of logits that comes of a key bias which rotary embeddings turn: waves over positions.
#pragma once

#include "products.h"

namespace {

// What a head's bias adds to a logit at position p: over pairs, x cos(p w) + y sin(p w), with x and
// y of the query (selection/rotary.py). Positions count up from `first`, or are told per axis.
struct Bias {
  int64_t pairs, first, told_stride;
  const float* constants;  // [3][stride]: the bias's two components, radians per position
  const int32_t* places;   // [3][stride]: its two channels, the axis of its positions
  const int32_t* told;     // null, or [axes][told_stride]
  int64_t stride;
};

// Relative to 1 below 2e-7 for |x| < 1e5 (three-part reduction by pi / 2; Cody and Waite, 1980).
INLINE void sine_and_cosine(vf x, vf& sine, vf& cosine) {
  const vf shifter = splat(12582912.f);
  vf whole = x * 0.636619772367581f + shifter;
  const vi quarter = (vi)whole;
  whole = whole - shifter;
  vf r = x - whole * 1.5703125f;
  r = r - whole * 4.837512969970703e-4f;
  r = r - whole * 7.549789948768648e-8f;
  const vf z = r * r;
  vf s = ((z * -1.9515295891e-4f + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
  vf c = ((z * 2.443315711809948e-5f - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * z * z -
         z * 0.5f + 1.f;
  const vi odd = (quarter & 1) != 0;
  sine = pick(odd, c, s);
  cosine = pick(odd, s, c);
  sine = (vf)((vi)sine ^ ((quarter & 2) << 30));
  cosine = (vf)((vi)cosine ^ (((quarter + 1) & 2) << 30));
}

// Of every pair and query head: [pair][2][G], what multiplies cosine and sine.
void fill_waves(const Bias& b, const T* query, int dim, float factor, float* waves) {
  for (int64_t j = 0; j < b.pairs; j++) {
    const float u = b.constants[j], v = b.constants[b.stride + j];
    for (int g = 0; g < G; g++) {
      const float x = single(query[g * dim + b.places[j]]) * factor;
      const float y = single(query[g * dim + b.places[b.stride + j]]) * factor;
      waves[2 * j * G + g] = x * u + y * v;
      waves[(2 * j + 1) * G + g] = y * u - x * v;
    }
  }
}

// Positions of the items from number `at` on, on an axis; those past `left` items are the last's.
INLINE vf positions_of(const Bias& b, int64_t axis, int64_t at, int64_t left) {
  alignas(64) float lanes[W];
  for (int64_t i = 0; i < W; i++) {
    const int64_t item = at + std::min(i, left - 1);
    lanes[i] = float(b.told ? b.told[axis * b.told_stride + item] : b.first + item);
  }
  return load(lanes);
}

// out[item][P] += the waves, for `rows` items from number `begin` on.
void add_waves(const Bias& b, const float* waves, int64_t begin, int64_t rows, float* out) {
  vf cosine[MAX_DIM / 2], sine[MAX_DIM / 2], step_cosine[MAX_DIM / 2], step_sine[MAX_DIM / 2];
  const float* turn = b.constants + 2 * b.stride;
  const int32_t* axes = b.places + 2 * b.stride;
  if (!b.told)
    for (int64_t j = 0; j < b.pairs; j++) {
      sine_and_cosine(positions_of(b, 0, begin, W) * turn[j], sine[j], cosine[j]);
      sine_and_cosine(splat(W * turn[j]), step_sine[j], step_cosine[j]);
    }
  for (int64_t row = 0; row < rows; row += W) {
    const int64_t left = std::min<int64_t>(W, rows - row);
    vf sums[G] = {}, position = {};
    for (int64_t j = 0; j < b.pairs; j++) {
      vf c, s;
      if (b.told) {
        if (!j || axes[j] != axes[j - 1])
          position = positions_of(b, axes[j], begin + row, left);
        sine_and_cosine(position * turn[j], s, c);
      } else {
        c = cosine[j], s = sine[j];
        cosine[j] = c * step_cosine[j] - s * step_sine[j];
        sine[j] = s * step_cosine[j] + c * step_sine[j];
      }
      const float *x = waves + 2 * j * G, *y = x + G;
      for (int g = 0; g < G; g++) sums[g] += c * x[g] + s * y[g];
    }
    alignas(64) float lanes[G][W];
    for (int g = 0; g < G; g++) store(lanes[g], sums[g]);
    for (int64_t i = 0; i < left; i++)
      for (int g = 0; g < G; g++) out[(row + i) * P + g] += lanes[g][i];
  }
}

}  // namespace
