// Rows of bytes (selection.residents.RowFormat): what a token in fewer bits is made of.
#pragma once

#include "products.h"

namespace {

constexpr float SHIFTER = 12582912.f;
template <class V> INLINE V whole_floats(V x, V& left) {  // to the nearest; what is left over
  const V shifted = x + SHIFTER;
  left = x - (shifted - SHIFTER);
  return shifted;  // its low 16 bits are the integer
}

struct Rows {  // quantised tokens of one segment, of which each is half of a row or all of it
  const uint8_t* first;
  int64_t count;
  const T* mean;  // [2][dim]
  int64_t segment;
  int32_t bits, dim;
  int64_t stride;  // bytes from a token to the next

  int group() const { return bits == 8 ? dim : std::min(32, dim & -dim); }
  int runs() const { return dim / group(); }
  int run_chunks() const { return (group() + 2 * W - 1) / (2 * W); }
  bool nibbles() const { return bits == 4 && group() == 32; }
  int code_bytes() const { return dim * bits / 8; }
  int half_bytes() const { return code_bytes() + 2 * runs(); }
  const uint8_t* row(int64_t n) const { return first + n * stride; }
};
inline int padded(int dim) { return chunks_of(dim) * 2 * W; }

// ---- the Hadamard matrix of blocks as long as the largest power of two that divides `dim`

template <int D, int... I>
INLINE vf butterfly(vf v, std::integer_sequence<int, I...> lanes) {
  return exchange<D>(v, lanes) + v * vf{((I & D) ? -1.f : 1.f)...};
}
template <int D = 1>
void turn_lanes(float* x, int dim, int block) {
  if constexpr (D < W)
    if (D < block) {
      for (int i = 0; i < dim; i += W)
        store(x + i, butterfly<D>(load(x + i), std::make_integer_sequence<int, W>{}));
      turn_lanes<2 * D>(x, dim, block);
    }
}
void turn(float* x, int dim) {  // padded(dim) floats in place; its own inverse
  const int block = dim & -dim;
  turn_lanes(x, dim, block);
  for (int d = W; d < block; d *= 2)
    for (int i = 0; i < dim; i += 2 * d)
      for (int j = i; j < i + d; j += W) {
        const vf a = load(x + j), b = load(x + j + d);
        store(x + j, a + b);
        store(x + j + d, a - b);
      }
  const float root = 1 / std::sqrt(float(block));
  for (int i = 0; i < dim; i += W) store(x + i, load(x + i) * root);
}

// ---- one token to a row, and back

INLINE int8_t nearest(float x, float least, float most) {
  return int8_t((x < least ? least : x > most ? most : x) + SHIFTER - SHIFTER);
}
// Codes and scales of a centred, rotated key or value. NaN counts as 0, infinity as the largest.
void encode_half(const Rows& r, float* x, uint8_t* out) {
  const int group = r.group(), half = group / 2;
  const float most = r.bits == 8 ? 127.f : 7.5f, largest = std::numeric_limits<float>::max();
  for (int d = 0; d < r.dim; d++)
    x[d] = x[d] != x[d] ? 0.f : std::min(std::max(x[d], -largest), largest);
  for (int run = 0; run < r.runs(); run++, x += group) {
    float wide = 0;
    for (int d = 0; d < group; d++) wide = std::max(wide, std::fabs(x[d]));
    Half scale;
    narrow(std::min(std::max(wide / most, 0x1p-24f), 65504.f), scale);
    std::memcpy(out + r.code_bytes() + 2 * run, &scale, 2);
    const float unit = single(scale);
    if (r.bits == 8)
      for (int d = 0; d < group; d++) out[run * group + d] = uint8_t(nearest(x[d] / unit, -127, 127));
    else
      for (int j = 0; j < half; j++)
        out[run * half + j] = uint8_t(nearest(x[j] / unit + 7.5f, 0, 15) |
                                      nearest(x[half + j] / unit + 7.5f, 0, 15) << 4);
  }
}
void decode_half(const Rows& r, const uint8_t* from, float* x) {
  const int group = r.group(), half = group / 2;
  for (int run = 0; run < r.runs(); run++, x += group) {
    Half scale;
    std::memcpy(&scale, from + r.code_bytes() + 2 * run, 2);
    const float unit = single(scale);
    for (int d = 0; d < group; d++) {
      const int byte = r.bits == 8 ? 0 : from[run * half + d % half];
      x[d] = unit * (r.bits == 8 ? float(int8_t(from[run * group + d]))
                                 : float(d < half ? byte & 15 : byte >> 4) - 7.5f);
    }
  }
}
void encode_row(const Rows& r, const T* key, const T* value, uint8_t* out) {
  for (int which = 0; which < 2; which++) {
    alignas(64) float x[MAX_DIM + 2 * W] = {};
    const T *from = which ? value : key, *mean = r.mean + which * r.dim;
    for (int d = 0; d < r.dim; d++) x[d] = single(from[d]) - single(mean[d]);
    turn(x, r.dim);
    encode_half(r, x, out + which * r.half_bytes());
  }
}
void decode_row(const Rows& r, const uint8_t* row, T* key, T* value) {
  for (int which = 0; which < 2; which++) {
    alignas(64) float x[MAX_DIM + 2 * W] = {};
    const T* mean = r.mean + which * r.dim;
    decode_half(r, row + which * r.half_bytes(), x);
    turn(x, r.dim);
    for (int d = 0; d < r.dim; d++) narrow(x[d] + single(mean[d]), (which ? value : key)[d]);
  }
}

}  // namespace
