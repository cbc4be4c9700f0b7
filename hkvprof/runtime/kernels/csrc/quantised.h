// Quantised tokens (selection.residents.RowFormat): their logits, and weighted sums of their values,
// in the rotated space, by products of 16-bit integers.
//
// Codes are exact as they are. Rotated queries, and weights times scales of a block of tokens, are
// rounded to LIMBS integers of 16 bits: 2^-16 of the largest where the output has 16 bits, 2^-31
// where it has 32. Channels that share a scale are a run, padded to whole chunks of 2 W.
#pragma once

#include "rows.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t BLOCK = 64;  // tokens whose logits are held at a time
constexpr int LIMBS = sizeof(T) == 4 ? 2 : 1;
constexpr float MOST = LIMBS == 1 ? 32767.f : 16384.f, LIMB = 32768.f;

#define SEPARATE __attribute__((noinline))  // a loop that wants all registers for itself

typedef int16_t vs __attribute__((vector_size(W * 4)));
typedef uint32_t pu __attribute__((vector_size(P * 4)));
typedef int8_t Codes __attribute__((vector_size(2 * W)));
typedef int8_t FewCodes __attribute__((vector_size(W)));

// sum + products of 16-bit integers, of which neighbours are added.
INLINE vi add_products(vi sum, vs a, vs b) {
#if defined(__AVX512VNNI__)
  return (vi)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
  return sum + (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return sum + (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && !defined(__AVX2__)
  return sum + (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
  return sum + ((vi)a << 16 >> 16) * ((vi)b << 16 >> 16) + ((vi)a >> 16) * ((vi)b >> 16);
#endif
}
// 2 W codes as integers of 16 bits; and W of each of two tokens, side by side.
INLINE vs widen_codes(Codes a) {
#if defined(__AVX512BW__)
  return (vs)_mm512_cvtepi8_epi16((__m256i)a);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  return (vs)_mm256_cvtepi8_epi16((__m128i)a);
#else
  return __builtin_convertvector(a, vs);
#endif
}
INLINE vs widen_codes(FewCodes a, FewCodes b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m128i x = _mm_cvtsi64_si128((long long)a), y = _mm_cvtsi64_si128((long long)b);
  return (vs)_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(x, y));
#elif defined(__AVX512BW__)
  const __m128i x = (__m128i)a, y = (__m128i)b;
  return (vs)_mm512_cvtepi8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(x, y), _mm_unpacklo_epi8(x, y)));
#else
  return (vs)((__builtin_convertvector(a, vi) & 0xffff) | __builtin_convertvector(b, vi) << 16);
#endif
}
INLINE vf floats(vi v) { return __builtin_convertvector(v, vf); }
// A query in the rotated space: q . key = unit * (integers . codes) * scale + bias, per query head.
struct Turned {
  int16_t* limbs;     // [LIMBS][run][chunk][G][2 W], or for nibble_logits [LIMBS][run][16][G][2]
  int32_t* offsets;   // [LIMBS][run][G] of the latter: 15 times the sum of integers
  float *unit, *bias;  // [P], both times scaling and LOG2E
};
inline size_t limb_shorts(const Rows& r) {
  return size_t(r.runs()) * r.run_chunks() * G * 2 * W;
}

// Integers in the order of nibble_logits: channels 0 and 2, 16 and 18, 1 and 3, 17 and 19, 4 and 6 ...
void pair_up(const Rows& r, const Turned& q) {
  const int chunks = 16 / W > 0 ? 16 / W : 1;
  for (int n = 0; n < LIMBS * r.runs(); n++) {
    int16_t own[32 * G], *limbs = q.limbs + n * 32 * G;
    std::memcpy(own, limbs, sizeof own);
    for (int g = 0; g < G; g++) {
      int32_t sum = 0;
      for (int pair = 0; pair < 16; pair++)
        for (int which = 0; which < 2; which++) {
          const int d = pair / 4 * 4 + pair % 4 / 2 + pair % 2 * 16 + which * 2;
          const int16_t x = own[(d / (32 / chunks) * G + g) * (32 / chunks) + d % (32 / chunks)];
          limbs[(pair * G + g) * 2 + which] = x;
          sum += x;
        }
      q.offsets[n * G + g] = 15 * sum;
    }
  }
}
void turn_query(const Rows& r, const T* query, float factor, const Turned& out) {
  alignas(64) float x[MAX_DIM + 2 * W] = {}, mean[MAX_DIM + 2 * W] = {};
  typedef int16_t Few __attribute__((vector_size(2 * W)));
  const int runs = r.runs(), group = r.group();
  std::memset(out.limbs, 0, LIMBS * limb_shorts(r) * sizeof(int16_t));
  for (int g = 0; g < P; g++) out.unit[g] = out.bias[g] = 0;
  for (int d = 0; d < r.dim; d++) mean[d] = single(r.mean[d]);
  for (int g = 0; g < G; g++) {
    vf along = {}, most = {};
    for (int d = 0; d < r.dim; d++) x[d] = single(query[g * r.dim + d]);
    for (int d = 0; d < r.dim; d += W) along += load(x + d) * load(mean + d);
    turn(x, r.dim);
    for (int d = 0; d < r.dim; d += W) {
      const vf size = (vf)((vu)load(x + d) & 0x7fffffffu);
      most = size <= most ? most : size;  // NaN stays
    }
    float bias = 0, largest = 0;
    for (int lane = 0; lane < W; lane++) {
      bias += along[lane];
      largest = most[lane] <= largest ? largest : most[lane];
    }
    out.bias[g] = bias * factor;
    out.unit[g] = largest / MOST * factor;
    const float scale = largest > 0 && std::isfinite(largest) ? MOST / largest : 0;
    int16_t* to = out.limbs + g * 2 * W;
    for (int run = 0; run < runs; run++)
      for (int at = 0; at < group; at += 2 * W, to += G * 2 * W)
        for (int i = 0; i < 2 * W && at + i < group; i += W) {
          vf value = load(x + run * group + at + i) * scale;
          for (int limb = 0; limb < LIMBS; limb++, value *= LIMB) {
            const Few few = __builtin_convertvector((vi)whole_floats(value, value), Few);
            const int channels = std::min(W, group - at - i);
            std::memcpy(to + limb * limb_shorts(r) + i, &few, channels * sizeof(int16_t));
          }
        }
  }
  if (r.nibbles()) pair_up(r, out);
}

// ---- blocks of rows

// Scales of keys (which = 0) or values of a block, as floats [row][run],
// and zeros up to a whole vector.
void read_scales(const Rows& r, int64_t begin, int64_t rows, int which, float* out) {
  typedef uint16_t Short __attribute__((vector_size(8)));
  typedef uint32_t Long __attribute__((vector_size(16)));
  alignas(64) uint32_t halves[BLOCK * MAX_DIM / 8 + W];
  uint32_t* to = halves;
  const int runs = r.runs();
  const uint8_t* from = r.row(begin) + which * r.half_bytes() + r.code_bytes();
  for (int64_t n = 0; n < rows; n++, from += r.stride, to += runs) {
    int i = 0;
    for (; i + 4 <= runs; i += 4) {
      Short few;
      std::memcpy(&few, from + 2 * i, sizeof few);
      const Long wide = __builtin_convertvector(few, Long);
      std::memcpy(to + i, &wide, sizeof wide);
    }
    for (; i < runs; i++) to[i] = uint32_t(from[2 * i] | from[2 * i + 1] << 8);
  }
  std::memset(halves + rows * runs, 0, W * sizeof(uint32_t));
  const float step = r.bits == 8 ? 1.f : 0.5f;  // codes of 4 bits are used as 2 c - 15
  for (int64_t i = 0; i < rows * runs; i += W)
    store(out + i, from_half((vu)load(reinterpret_cast<float*>(halves) + i)) * step);
}
// Codes of 4 bits as odd integers 2 c - 15, in the order of channels.
void spread(const uint8_t* from, int dim, int group, int8_t* out) {
  typedef uint8_t Packed __attribute__((vector_size(16)));
  const int half = group / 2;
  for (int d = 0; d < dim; d += group, from += half, out += group)
    if (half == 16) {
      Packed x;
      std::memcpy(&x, from, 16);
      const Packed low = ((x + x) & 30) - 15, high = ((x >> 3) & 30) - 15;
      std::memcpy(out, &low, 16);
      std::memcpy(out + 16, &high, 16);
    } else {
      for (int j = 0; j < half; j++) {
        out[j] = int8_t((from[j] & 15) * 2 - 15);
        out[half + j] = int8_t((from[j] >> 4) * 2 - 15);
      }
    }
}
struct Block {  // codes and scales of keys or values of up to BLOCK rows
  const uint8_t* first;
  const int8_t* codes;
  int64_t stride;
  const float* scales;  // [row][run]
  const uint8_t* later;  // what follows BLOCK rows after the first
  int64_t apart, half_bytes;  // of rows, as they are in memory
  INLINE void prefetch(int64_t row, int64_t rows) const {
    for (int64_t n = row; n < row + rows; n++)
      for (int64_t i = 0; i < half_bytes; i += 64)
        __builtin_prefetch(later + n * apart + i);
  }
};
struct Scratch {
  alignas(64) int8_t codes[BLOCK * MAX_DIM + 2 * W];
  alignas(64) float scales[BLOCK * MAX_DIM / 8 + W];
  alignas(64) uint32_t pairs[BLOCK / 2 * P];
};
Block read_block(const Rows& r, int64_t begin, int64_t rows, int which, Scratch& s) {
  read_scales(r, begin, rows, which, s.scales);
  const int64_t bytes = r.half_bytes();
  const uint8_t *first = r.row(begin) + which * bytes, *later = first + BLOCK * r.stride;
  if (r.bits == 8)
    return {first, reinterpret_cast<const int8_t*>(first), r.stride, s.scales, later, r.stride, bytes};
  for (int64_t n = 0; n < rows && (which || !r.nibbles()); n++)
    spread(first + n * r.stride, r.dim, r.group(), s.codes + n * r.dim);
  return {first, s.codes, r.dim, s.scales, later, r.stride, bytes};
}
template <bool WHOLE, class V> INLINE V read_codes(const int8_t* from, int channels) {
  V v = {};
  if (WHOLE || channels >= int(sizeof v)) std::memcpy(&v, from, sizeof v);
  else for (int i = 0; i < channels; i += 8) std::memcpy((char*)&v + i, from + i, 8);
  return v;
}
// Logits [row][P] of a block of keys; WHOLE: a run is whole chunks.
template <bool WHOLE>
SEPARATE void quantised_logits(const Rows& r, const Turned& q, const Block& b, int64_t rows, float* out) {
  const int runs = r.runs(), group = r.group();
  alignas(64) float unit[PARTS * W], bias[PARTS * W];
  for (int lane = 0; lane < PARTS * W; lane++) {
    unit[lane] = q.unit[lane / W * Q + lane % Q];
    bias[lane] = q.bias[lane / W * Q + lane % Q];
  }
  for (int64_t row = 0; row < rows; row += TOKENS) {
    b.prefetch(row, TOKENS);
    for (int first = 0; first < P; first += Q) {
      vf sums[W] = {};
      for (int t = 0; t < TOKENS; t++) {
        const int64_t n = std::min(row + t, rows - 1);
        const int8_t* codes = b.codes + n * b.stride;
        const int16_t* limbs = q.limbs + first * 2 * W;
        for (int limb = 0; limb < LIMBS; limb++)
          for (int run = 0; run < runs; run++) {
            vi products[Q] = {};
            auto add = [&](const int8_t* from, int channels) {
              const vs k = widen_codes(read_codes<WHOLE, Codes>(from, channels));
              for (int g = 0; g < Q && first + g < G; g++) {
                vs x;
                std::memcpy(&x, limbs + g * 2 * W, sizeof x);
                products[g] = add_products(products[g], k, x);
              }
              limbs += G * 2 * W;
            };
            const int8_t* from = codes + run * group;
            int at = 0;
            for (; at + 4 * W <= group; at += 4 * W)
              add(from + at, 2 * W), add(from + at + 2 * W, 2 * W);
            for (; at < group; at += 2 * W) add(from + at, group - at);
            const float scale = b.scales[n * runs + run] * (limb ? 1 / LIMB : 1.f);
            for (int g = 0; g < Q && first + g < G; g++)
              sums[t * Q + g] += floats(products[g]) * scale;
          }
      }
      const vf total = fold_all<W>(sums);
      store(out + row * P + first, total * load(unit + first / Q * W) + load(bias + first / Q * W));
    }
  }
}
typedef uint32_t Four __attribute__((vector_size(16)));
INLINE vu side_by_side(const Four* v) {
#if defined(__AVX512F__)
  const __m256i low = _mm256_set_m128i((__m128i)v[1], (__m128i)v[0]);
  const __m256i high = _mm256_set_m128i((__m128i)v[3], (__m128i)v[2]);
  return (vu)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#elif defined(__AVX2__)
  return (vu)_mm256_set_m128i((__m128i)v[1], (__m128i)v[0]);
#else
  return v[0];
#endif
}
#if defined(__clang__) || __GNUC__ >= 12
#define MIX(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define MIX(a, b, ...) __builtin_shuffle(a, b, Four{__VA_ARGS__})
#endif
// 16 bytes of W rows, of which each has a lane: bytes 0 to 3, 4 to 7 ...
INLINE void read_lanes(const uint8_t* const* from, int offset, vu* out) {
  Four turned[4][W / 4];
  for (int quad = 0; quad < W / 4; quad++) {
    Four v[4];
    for (int i = 0; i < 4; i++) std::memcpy(&v[i], from[quad * 4 + i] + offset, 16);
    const Four a = MIX(v[0], v[1], 0, 4, 1, 5), b = MIX(v[2], v[3], 0, 4, 1, 5);
    const Four c = MIX(v[0], v[1], 2, 6, 3, 7), d = MIX(v[2], v[3], 2, 6, 3, 7);
    turned[0][quad] = MIX(a, b, 0, 1, 4, 5);
    turned[1][quad] = MIX(a, b, 2, 3, 6, 7);
    turned[2][quad] = MIX(c, d, 0, 1, 4, 5);
    turned[3][quad] = MIX(c, d, 2, 3, 6, 7);
  }
  for (int i = 0; i < 4; i++) out[i] = side_by_side(turned[i]);
}
// Logits of keys of 4 bits whose runs have 32 channels: a token per lane.
SEPARATE void nibble_logits(const Rows& r, const Turned& q, const Block& b, int64_t rows,
                            float* out) {
  const int runs = r.runs();
  for (int64_t row = 0; row < rows; row += W) {
    const uint8_t* from[W];
    for (int lane = 0; lane < W; lane++)
      from[lane] = b.first + std::min(row + lane, rows - 1) * b.apart;
    b.prefetch(row, W);
    vf sums[G] = {};
    for (int run = 0; run < runs; run++) {
      vu lanes[4];
      vf scale;
      read_lanes(from, run * 16, lanes);
      for (int lane = 0; lane < W; lane++)
        scale[lane] = b.scales[std::min(row + lane, rows - 1) * runs + run];
      for (int limb = 0; limb < LIMBS; limb++, scale *= 1 / LIMB) {
        const int n = limb * runs + run;
        const int16_t* limbs = q.limbs + n * 32 * G;
        vi products[G] = {};
        for (int pair = 0; pair < 16; pair++) {
          const vs codes = (vs)(lanes[pair / 4] >> pair % 4 * 4 & 0x000f000fu);
          for (int g = 0; g < G; g++, limbs += 2) {
            uint32_t both;
            std::memcpy(&both, limbs, 4);
            products[g] = add_products(products[g], codes, (vs)(vu{} + both));
          }
        }
        for (int g = 0; g < G; g++)
          sums[g] += floats(products[g] + products[g] - q.offsets[n * G + g]) * scale;
      }
    }
    for (int g = 0; g < G; g++) {
      const vf logit = sums[g] * q.unit[g] + q.bias[g];
      for (int lane = 0; lane < W; lane++) out[(row + lane) * P + g] = logit[lane];
    }
    for (int g = G; g < P; g++)
      for (int lane = 0; lane < W; lane++) out[(row + lane) * P + g] = 0;
  }
}

// Logits [row][P] of keys.
void key_logits(const Rows& r, const Turned& q, int64_t begin, int64_t rows, Scratch& scratch,
                float* out) {
  const Block keys = read_block(r, begin, rows, 0, scratch);
  if (r.nibbles()) nibble_logits(r, q, keys, rows, out);
  else if (r.group() % (2 * W)) quantised_logits<false>(r, q, keys, rows, out);
  else quantised_logits<true>(r, q, keys, rows, out);
}

// Sums over rows of weights, as pairs [row / 2][P] of integers, times W codes; for STEP query heads.
template <bool WHOLE>
SEPARATE void sum_products(const int8_t* codes, int64_t stride, int64_t rows,
                           const uint32_t* pairs, int channels, vi* out) {
  vi sums[STEP] = {};
  auto add = [&](const int8_t* next) {
    const vs both = widen_codes(read_codes<WHOLE, FewCodes>(codes, channels),
                                read_codes<WHOLE, FewCodes>(next, channels));
    for (int g = 0; g < STEP; g++) sums[g] = add_products(sums[g], both, (vs)(vu{} + pairs[g]));
    codes += 2 * stride, pairs += P;
  };
  for (int64_t row = 0; row + 1 < rows; row += 2) add(codes + stride);
  if (rows % 2) add(codes);  // whose second weight is 0
  for (int g = 0; g < STEP; g++) out[g] = sums[g];
}
// acc [G][padded dim] += weights [row][P] x a block of values.
template <bool WHOLE>
SEPARATE void add_quantised(const Rows& r, const Block& b, int64_t rows, const float* weights,
                   Scratch& scratch, float* acc) {
  const int runs = r.runs(), group = r.group(), stride = padded(r.dim);
  auto weight = [&](int64_t row) { pf w; std::memcpy(&w, weights + row * P, sizeof w); return w; };
  pf most = {};
  vf widest = {};
  for (int64_t row = 0; row < rows; row++) most = weight(row) > most ? weight(row) : most;
  for (int64_t i = 0; i < rows * runs; i += W) widest = larger(load(b.scales + i), widest);
  float largest = 0;
  for (int lane = 0; lane < W; lane++) largest = std::max(largest, widest[lane]);
  const pf bound = most * largest;
  const pf factor = bound > 0x1p-100f ? MOST / bound : pf{};
  for (int run = 0; run < runs; run++) {
    float power = 1 / MOST;
    for (int limb = 0; limb < LIMBS; limb++, power /= LIMB) {
      for (int64_t row = 0; row < rows; row += 2) {
        pu both[2] = {};
        for (int t = 0; t < 2 && row + t < rows; t++) {
          pf left, x = weight(row + t) * b.scales[(row + t) * runs + run] * factor;
          both[t] = (pu)whole_floats(x, left);
          if (limb) both[t] = (pu)whole_floats(left * LIMB, left);
        }
        const pu pair = (both[0] & 0xffffu) | both[1] << 16;
        std::memcpy(scratch.pairs + row / 2 * P, &pair, sizeof pair);
      }
      for (int d = run * group; d < (run + 1) * group; d += W)
        for (int start = 0; start < A; start += STEP) {
          if (!limb && !start) b.prefetch(d * BLOCK / r.dim, W * BLOCK / r.dim + 1);
          vi sums[STEP];
          sum_products<WHOLE>(b.codes + d, b.stride, rows, scratch.pairs + start,
                              (run + 1) * group - d, sums);
          for (int g = start; g < std::min(start + STEP, G); g++) {
            float* x = acc + g * stride + d;
            store(x, load(x) + floats(sums[g - start]) * (bound[g] * power));
          }
        }
    }
  }
}

}  // namespace
