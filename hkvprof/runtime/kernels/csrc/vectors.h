// Vectors of floats, and the element type of keys and values that this compilation is for.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#if HKV_TYPE == 1 && defined(__AVX512BF16__)
#define HKV_PAIRS 1  // dot products of pairs of bfloat16 in one instruction
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats per vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));

#define INLINE inline __attribute__((always_inline))

INLINE vf splat(float x) { return vf{} + x; }
INLINE vf load(const float* p) { vf v; std::memcpy(&v, p, sizeof v); return v; }
INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
INLINE vf pick(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
INLINE vf larger(vf a, vf b) { return a > b ? a : b; }  // b where a is NaN

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif

// Lane i of the sum: bit D of i says which of a and b, whose lanes i and i ^ D are added.
template <int D, int... I>
INLINE vf fold(vf a, vf b, std::integer_sequence<int, I...>) {
  return SHUFFLE(a, b, ((I & D) ? W + I - D : I)...) + SHUFFLE(a, b, ((I & D) ? W + I : I + D)...);
}
template <int D, int... I>
INLINE vf exchange(vf a, std::integer_sequence<int, I...>) { return SHUFFLE(a, a, (I ^ D)...); }
// Vector n of N = 2^k, lane (t, g): after folding bits D = 1 .. N / 2, lane (t, n) sums n over g.
template <int N, int D = 1>
INLINE vf fold_all(vf* v) {
  if constexpr (N == 1) {
    return v[0];
  } else {
    for (int i = 0; i < N / 2; i++)
      v[i] = fold<D>(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, W>{});
    return fold_all<N / 2, 2 * D>(v);
  }
}
template <int D>
INLINE vf max_over_tokens(vf v) {  // over lanes that differ in bits D and above
  if constexpr (D >= W) {
    return v;
  } else {
    return max_over_tokens<2 * D>(larger(exchange<D>(v, std::make_integer_sequence<int, W>{}), v));
  }
}

// 2^x: relative error below 3e-7; 0 below 2^-126; NaN stays NaN.
INLINE vf exp2_of(vf x) {
  const vf shifter = splat(12582912.f);
  vf whole = x + shifter;
  vf f = x - (whole - shifter);
  vf p = splat(1.535336188319500e-4f);
  p = p * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.f;
  vf result = (vf)((vu)p + ((vu)whole << 23));
  result = x < -126.f ? vf{} : result;
  return x == x ? result : x;
}

// ---- element types: `widen` reads 2 W elements as two vectors, `place` says which lane is which

struct Bf16 { uint16_t bits; };
struct Half { uint16_t bits; };

INLINE vf from_half(vu h) {
  vu magnitude = (h & 0x7fffu) << 13;
  vf v = (vf)magnitude * 5.192296858534828e33f;  // 2^112
  vu special = (vu)(magnitude >= 0x0f800000u) & 0x7f800000u;
  return (vf)((vu)v | special | ((h & 0x8000u) << 16));
}
INLINE void widen(const Bf16* p, vf& a, vf& b) {
  vu u;
  std::memcpy(&u, p, sizeof u);
  a = (vf)(u << 16);
  b = (vf)(u & 0xffff0000u);
}
INLINE void widen(const Half* p, vf& a, vf& b) {
  vu u;
  std::memcpy(&u, p, sizeof u);
  a = from_half(u & 0xffffu);
  b = from_half(u >> 16);
}
INLINE void widen(const float* p, vf& a, vf& b) { a = load(p); b = load(p + W); }
#if HKV_TYPE == 0
typedef float T;
#elif HKV_TYPE == 1
typedef Bf16 T;
#else
typedef Half T;
#endif
constexpr int G = HKV_GROUP;
constexpr int P = G <= 1 ? 1 : G <= 2 ? 2 : G <= 4 ? 4 : G <= 8 ? 8 : 16;
constexpr int Q = P < W ? P : W, TOKENS = W / Q, PARTS = P / Q;  // query heads, tokens per vector
constexpr int STEP = G <= 8 ? G : (G + 1) / 2, A = G <= 8 ? G : 2 * STEP;  // accumulators
typedef float pf __attribute__((vector_size(P * 4)));

INLINE float single(float x) { return x; }
INLINE float single(Bf16 x) {
  uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
INLINE float single(Half x) { return from_half(vu{} + uint32_t(x.bits))[0]; }

INLINE void narrow(float x, float& out) { out = x; }
INLINE void narrow(float x, Bf16& out) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  out.bits = x != x ? 0x7fc0 : uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
INLINE void narrow(float x, Half& out) {  // round to nearest even, as IEEE 754 asks
  uint32_t u;
  std::memcpy(&u, &x, 4);
  uint32_t sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  if (u >= 0x47800000u) {
    out.bits = uint16_t(sign | (u > 0x7f800000u ? 0x7e00u : 0x7c00u));
  } else if (u < 0x38800000u) {
    float shifted;
    std::memcpy(&shifted, &u, 4);
    shifted += 0.5f;
    std::memcpy(&u, &shifted, 4);
    out.bits = uint16_t(sign | (u - 0x3f000000u));
  } else {
    out.bits = uint16_t(sign | ((u - 0x38000000u + 0xfffu + ((u >> 13) & 1)) >> 13));
  }
}

INLINE int place(int half, int lane) { return sizeof(T) == 2 ? 2 * lane + half : half * W + lane; }

// A chunk is 2 W channels of a row; the last one of a row may be part of one, filled with zeros.
INLINE void widen_tail(const T* p, int channels, vf& a, vf& b) {
  alignas(64) T whole[2 * W] = {};
  for (int i = 0; i < channels; i += 8) std::memcpy(whole + i, p + i, 8 * sizeof(T));
  widen(whole, a, b);
}
// The opposite of widen: the first `channels` of a chunk, rounded to nearest even.
INLINE void emit(vf a, vf b, int channels, T* p) {
  alignas(64) T whole[2 * W];
#if HKV_TYPE == 1
  auto rounded = [](vf x) {
    vu u = (vu)x;
    return (vu)pick(x == x, (vf)(u + 0x7fffu + ((u >> 16) & 1u)), (vf)(vu{} + 0x7fc00000u));
  };
  vu both = rounded(a) >> 16 | (rounded(b) & 0xffff0000u);
  std::memcpy(whole, &both, sizeof both);
#else
  for (int lane = 0; lane < W; lane++) {
    narrow(a[lane], whole[place(0, lane)]);
    narrow(b[lane], whole[place(1, lane)]);
  }
#endif
  for (int i = 0; i < channels; i += 8) std::memcpy(p + i, whole + i, 8 * sizeof(T));
}
#ifdef HKV_PAIRS
INLINE vf read_tail(const T* p, int channels) {
  alignas(64) T whole[2 * W] = {};
  for (int i = 0; i < channels; i += 8) std::memcpy(whole + i, p + i, 8 * sizeof(T));
  vf v;
  std::memcpy(&v, whole, sizeof v);
  return v;
}
#endif
INLINE void prefetch(const T* p, int count) {
  for (int i = 0; i < count; i += 64 / int(sizeof(T))) __builtin_prefetch(p + i);
}
inline int chunks_of(int dim) { return (dim + 2 * W - 1) / (2 * W); }

}  // namespace
