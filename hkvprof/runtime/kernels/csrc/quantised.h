// Quantised tokens (selection.residents.RowFormat): their logits, and weighted sums of their values,
// in the rotated space, by products of 16-bit integers.
//
// Codes are exact as they are. Rotated queries, and weights times scales of a block of tokens, are
// rounded to LIMBS integers of 16 bits: 2^-16 of the largest where the output has 16 bits, 2^-31
// where it has 32. Channels that share a scale are a run, padded to whole chunks of 2 W.
#pragma once

#include "products.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t BLOCK = 64;  // tokens whose logits are held at a time
constexpr int LIMBS = sizeof(T) == 4 ? 2 : 1;
constexpr float MOST = LIMBS == 1 ? 32767.f : 16384.f, LIMB = 32768.f;

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
#if defined(__clang__) || __GNUC__ >= 12
template <int... I>
INLINE Codes zip(FewCodes a, FewCodes b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I / 2 + (I & 1) * W)...);
}
INLINE vs interleave(FewCodes a, FewCodes b) {
  return __builtin_convertvector(zip(a, b, std::make_integer_sequence<int, 2 * W>{}), vs);
}
#else
INLINE vs interleave(FewCodes a, FewCodes b) {
  return (vs)((__builtin_convertvector(a, vi) & 0xffff) | __builtin_convertvector(b, vi) << 16);
}
#endif
INLINE vf floats(vi v) { return __builtin_convertvector(v, vf); }
template <class V> INLINE V whole_floats(V x, V& left) {  // to the nearest; what is left over
  const V shifted = x + 12582912.f;
  left = x - (shifted - 12582912.f);
  return shifted;  // its low 16 bits are the integer
}

struct Rows {  // one segment's quantised tokens
  const uint8_t* first;
  int64_t count;
  const T* mean;  // [2][dim]
  int64_t segment;
  int32_t bits, dim;

  int group() const { return bits == 8 ? dim : std::min(32, dim & -dim); }
  int runs() const { return dim / group(); }
  int run_chunks() const { return (group() + 2 * W - 1) / (2 * W); }
  int code_bytes() const { return dim * bits / 8; }
  int half_bytes() const { return code_bytes() + 2 * runs(); }
  const uint8_t* row(int64_t n) const { return first + n * 2 * half_bytes(); }
};
// A query in the rotated space: q . key = unit * (integers . codes) * scale + bias, per query head.
struct Turned {
  int16_t* limbs;     // [LIMBS][run][chunk][G][2 W]
  float *unit, *bias;  // [P], both times scaling and LOG2E
};
inline size_t limb_shorts(const Rows& r) {
  return size_t(r.runs()) * r.run_chunks() * G * 2 * W;
}
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
void turn_query(const Rows& r, const T* query, float factor, const Turned& out) {
  alignas(64) float x[MAX_DIM + 2 * W];
  std::memset(out.limbs, 0, LIMBS * limb_shorts(r) * sizeof(int16_t));
  for (int g = 0; g < P; g++) out.unit[g] = out.bias[g] = 0;
  for (int g = 0; g < G; g++) {
    float along = 0, most = 0;
    for (int d = 0; d < padded(r.dim); d++) x[d] = d < r.dim ? single(query[g * r.dim + d]) : 0;
    for (int d = 0; d < r.dim; d++) along += x[d] * single(r.mean[d]);
    turn(x, r.dim);
    for (int d = 0; d < r.dim; d++) most = std::fabs(x[d]) <= most ? most : std::fabs(x[d]);
    out.bias[g] = along * factor;
    out.unit[g] = most / MOST * factor;
    const float scale = most > 0 && std::isfinite(most) ? MOST / most : 0;
    for (int d = 0; d < r.dim; d++) {
      const int run = d / r.group(), within = d % r.group();
      const int chunk = run * r.run_chunks() + within / (2 * W);
      float value = x[d] * scale;
      for (int limb = 0; limb < LIMBS; limb++, value *= LIMB) {
        const float whole = std::nearbyint(value);
        out.limbs[limb * limb_shorts(r) + (chunk * G + g) * 2 * W + within % (2 * W)] =
            int16_t(whole);
        value -= whole;
      }
    }
  }
}

// ---- blocks of rows

// Scales of keys (which = 0) or values of a block, as floats [row][run].
void read_scales(const Rows& r, int64_t begin, int64_t rows, int which, float* out) {
  alignas(64) uint16_t halves[BLOCK * MAX_DIM / 8 + W];
  const int runs = r.runs();
  for (int64_t n = 0; n < rows; n++) {
    const uint8_t* from = r.row(begin + n) + which * r.half_bytes() + r.code_bytes();
    if (runs == 1) std::memcpy(halves + n, from, 2);
    else std::memcpy(halves + n * runs, from, 2 * runs);
  }
  const float step = r.bits == 8 ? 1.f : 0.5f;  // codes of 4 bits are used as 2 c - 15
  for (int64_t i = 0; i < rows * runs; i += W) {
    vu wide;
    for (int lane = 0; lane < W; lane++) wide[lane] = halves[i + lane];
    store(out + i, from_half(wide) * step);
  }
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
  const int8_t* codes;
  int64_t stride;
  const float* scales;  // [row][run]
};
struct Scratch {
  alignas(64) int8_t codes[BLOCK * MAX_DIM + 2 * W];
  alignas(64) float scales[BLOCK * MAX_DIM / 8 + W];
  alignas(64) uint32_t pairs[BLOCK / 2 * P];
};
Block read_block(const Rows& r, int64_t begin, int64_t rows, int which, Scratch& s) {
  read_scales(r, begin, rows, which, s.scales);
  const uint8_t* first = r.row(begin) + which * r.half_bytes();
  if (r.bits == 8)
    return {reinterpret_cast<const int8_t*>(first), 2 * r.half_bytes(), s.scales};
  for (int64_t n = 0; n < rows; n++)
    spread(first + n * 2 * r.half_bytes(), r.dim, r.group(), s.codes + n * r.dim);
  return {s.codes, r.dim, s.scales};
}
template <class V> INLINE V read_codes(const int8_t* from, int channels) {
  V v = {};
  if (channels >= int(sizeof v)) std::memcpy(&v, from, sizeof v);
  else for (int i = 0; i < channels; i += 8) std::memcpy((char*)&v + i, from + i, 8);
  return v;
}

// Logits [row][P] of a block of keys.
void quantised_logits(const Rows& r, const Turned& q, const Block& b, int64_t rows, float* out) {
  const int runs = r.runs(), chunks = r.run_chunks(), group = r.group();
  for (int64_t row = 0; row < rows; row += TOKENS)
    for (int first = 0; first < P; first += Q) {
      vf sums[W] = {};
      for (int t = 0; t < TOKENS; t++) {
        const int64_t n = std::min(row + t, rows - 1);
        const int8_t* codes = b.codes + n * b.stride;
        const int16_t* limbs = q.limbs + first * 2 * W;
        for (int limb = 0; limb < LIMBS; limb++)
          for (int run = 0; run < runs; run++) {
            vi products[Q] = {};
            for (int c = 0; c < chunks; c++, limbs += G * 2 * W) {
              const int8_t* from = codes + run * group + c * 2 * W;
              const vs k = __builtin_convertvector(read_codes<Codes>(from, group - c * 2 * W), vs);
              for (int g = 0; g < Q && first + g < G; g++) {
                vs x;
                std::memcpy(&x, limbs + g * 2 * W, sizeof x);
                products[g] = add_products(products[g], k, x);
              }
            }
            const float scale = b.scales[n * runs + run] * (limb ? 1 / LIMB : 1.f);
            for (int g = 0; g < Q && first + g < G; g++)
              sums[t * Q + g] += floats(products[g]) * scale;
          }
      }
      alignas(64) float unit[W], bias[W];
      for (int lane = 0; lane < W; lane++) {
        unit[lane] = q.unit[first + lane % Q];
        bias[lane] = q.bias[first + lane % Q];
      }
      store(out + row * P + first, fold_all<W>(sums) * load(unit) + load(bias));
    }
}
// acc [G][padded dim] += weights [row][P] x a block of values.
void add_quantised(const Rows& r, const Block& b, int64_t rows, const float* weights,
                   Scratch& scratch, float* acc) {
  const int runs = r.runs(), group = r.group(), stride = padded(r.dim);
  auto weight = [&](int64_t row) { pf w; std::memcpy(&w, weights + row * P, sizeof w); return w; };
  pf most = {};
  for (int64_t row = 0; row < rows; row++) most = weight(row) > most ? weight(row) : most;
  for (int run = 0; run < runs; run++) {
    float largest = 0;
    for (int64_t row = 0; row < rows; row++)
      largest = std::max(largest, b.scales[row * runs + run]);
    const pf bound = most * largest;
    const pf factor = bound > 0x1p-100f ? MOST / bound : pf{};
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
          vi sums[STEP] = {};
          const int channels = (run + 1) * group - d;
          for (int64_t row = 0; row < rows; row += 2) {
            const int8_t* from = b.codes + row * b.stride + d;
            const FewCodes one = read_codes<FewCodes>(from, channels);
            const FewCodes two =
                row + 1 < rows ? read_codes<FewCodes>(from + b.stride, channels) : FewCodes{};
            const vs codes = interleave(one, two);
            for (int g = 0; g < STEP; g++)
              sums[g] = add_products(sums[g], codes,
                                     (vs)(vu{} + scratch.pairs[row / 2 * P + start + g]));
          }
          for (int g = start; g < std::min(start + STEP, G); g++) {
            float* x = acc + g * stride + d;
            store(x, load(x) + floats(sums[g - start]) * (bound[g] * power));
          }
        }
    }
  }
}

}  // namespace
