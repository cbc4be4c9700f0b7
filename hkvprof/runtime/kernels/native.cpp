// Decode kernels of hkvprof for CPUs: GCC/Clang vector extensions, float32 arithmetic, no headers
// beyond the standard library. Threads are those of the OpenMP runtime that torch has loaded: its
// entry points are handed to hkv_init, so that no second pool of threads exists.
//
// Compiled once per element type (HKV_TYPE: 0 float, 1 bfloat16, 2 half) and number G of query heads
// per KV head (HKV_GROUP). Everything per token and query head is laid out [token][P], with P = G
// rounded up to a power of two, so that one vector holds whole tokens.

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

#if HKV_TYPE == 1 && defined(__AVX512BF16__)
#include <immintrin.h>
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

// ---- threads

void (*start_team)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
void (*meet_team)() = nullptr;

template <class F>
void parallel(int threads, F body) {
  if (start_team && threads > 1)
    start_team([](void* f) { (*static_cast<F*>(f))(); }, &body, unsigned(threads), 0);
  else
    body();
}
inline void barrier(int threads) { if (start_team && threads > 1) meet_team(); }
// Tasks 0 .. count - 1, each taken once by whichever thread comes first.
template <class F>
void share(std::atomic<int>& next, int count, F task) {
  for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) task(i);
}

// Scratch memory of the calling thread, kept between calls; it only grows.
struct Arena {
  std::unique_ptr<char[]> block;
  size_t size = 0, used = 0;
  void reserve(size_t bytes) {
    if (bytes + 64 > size) {
      block.reset();
      size = 0;
      block.reset(new char[bytes + bytes / 4 + 64]);
      size = bytes + bytes / 4 + 64;
    }
    used = size_t(-reinterpret_cast<intptr_t>(block.get()) & 63);
  }
  template <class T> T* take(size_t count) {
    T* p = reinterpret_cast<T*>(block.get() + used);
    used += rounded<T>(count);
    return p;
  }
  template <class T> static size_t rounded(size_t count) { return (count * sizeof(T) + 63) & ~size_t(63); }
};
thread_local Arena arena;

// ---- queries, logits, softmax, weighted sums

inline size_t packed_floats(int dim) { return size_t(chunks_of(dim)) * 2 * G * W; }

// Queries [G][dim], clipped to [low, high], as [chunk][half][G][W]; or as [chunk][G][W] pairs.
void pack_query(const T* query, int dim, float low, float high, float* out) {
  std::memset(out, 0, sizeof(float) * packed_floats(dim));
  for (int g = 0; g < G; g++)
    for (int c = 0; c < chunks_of(dim); c++)
      for (int half = 0; half < 2; half++)
        for (int lane = 0; lane < W; lane++) {
          int channel = c * 2 * W + place(half, lane);
          if (channel >= dim) continue;
          float x = single(query[size_t(g) * dim + channel]);
          x = x < low ? low : x > high ? high : x;
#ifdef HKV_PAIRS
          narrow(x, reinterpret_cast<T*>(out)[((c * G + g) * W + lane) * 2 + half]);
#else
          out[((c * 2 + half) * G + g) * W + lane] = x;
#endif
        }
}

// out[row][P] (+)= factor * key[row] . query; rows are padded to whole vectors.
template <bool ADD>
void dot_rows(const T* key, int64_t rows, int dim, const float* query, float factor, float* out,
              int64_t ahead = 0) {
  const int whole = dim / (2 * W), tail = dim % (2 * W);
  for (int64_t row = 0; row < rows; row += TOKENS) {
    const T* at[TOKENS];
    for (int t = 0; t < TOKENS; t++) at[t] = key + std::min(row + t, rows - 1) * dim;
    if (ahead) prefetch(key + row * dim + ahead, TOKENS * dim);
    for (int first = 0; first < P; first += Q) {
      vf sums[W] = {};
#ifdef HKV_PAIRS
      auto add = [&](int c, auto read) {
        const float* q = query + size_t(c) * G * W;
        vf pairs[TOKENS];
        for (int t = 0; t < TOKENS; t++) pairs[t] = read(at[t] + c * 2 * W);
        for (int g = 0; g < G; g++)
          for (int t = 0; t < TOKENS; t++)
            sums[t * Q + g] = (vf)_mm512_dpbf16_ps((__m512)sums[t * Q + g], (__m512bh)pairs[t],
                                                   (__m512bh)load(q + g * W));
      };
      auto whole_chunk = [](const T* p) { vf v; std::memcpy(&v, p, sizeof v); return v; };
      auto part_chunk = [tail](const T* p) { return read_tail(p, tail); };
#else
      auto add = [&](int c, auto read) {
        const float* q = query + size_t(c) * 2 * G * W + first * W;
        if constexpr (TOKENS <= 4) {
          vf a[TOKENS], b[TOKENS];
          for (int t = 0; t < TOKENS; t++) read(at[t] + c * 2 * W, a[t], b[t]);
          for (int g = 0; g < Q && first + g < G; g++) {
            vf x = load(q + g * W), y = load(q + (G + g) * W);
            for (int t = 0; t < TOKENS; t++) sums[t * Q + g] += a[t] * x;
            for (int t = 0; t < TOKENS; t++) sums[t * Q + g] += b[t] * y;
          }
        } else {
          for (int t = 0; t < TOKENS; t++) {
            vf a, b;
            read(at[t] + c * 2 * W, a, b);
            for (int g = 0; g < Q && first + g < G; g++) {
              sums[t * Q + g] += a * load(q + g * W);
              sums[t * Q + g] += b * load(q + (G + g) * W);
            }
          }
        }
      };
      auto whole_chunk = [](const T* p, vf& a, vf& b) { widen(p, a, b); };
      auto part_chunk = [tail](const T* p, vf& a, vf& b) { widen_tail(p, tail, a, b); };
#endif
      for (int c = 0; c < whole; c++) add(c, whole_chunk);
      if (tail) add(whole, part_chunk);
      float* target = out + row * P + first;
      vf total = fold_all<W>(sums) * factor;
      if constexpr (ADD) total += load(target);
      store(target, total);
    }
  }
}
constexpr int64_t padded_rows(int64_t rows) { return (rows + TOKENS - 1) / TOKENS * TOKENS; }

// Running maximum and sum of 2^(logit - maximum), per query head; lanes of one head agree in `top`.
struct Softmax {
  vf top[PARTS], sum[PARTS];
  Softmax() {
    for (int i = 0; i < PARTS; i++) top[i] = splat(-INFINITY), sum[i] = vf{};
  }
  // Logits to weights in place, over rows [rows][P]; earlier weights must be scaled by `decay`.
  void add(float* logits, int64_t rows, vf* decay) {
    for (int64_t i = rows * P; i < padded_rows(rows) * P; i++) logits[i] = -INFINITY;
    const int64_t vectors = padded_rows(rows) * P / W;
    for (int part = 0; part < PARTS; part++) {
      vf best = top[part];
      for (int64_t i = part; i < vectors; i += PARTS) best = larger(load(logits + i * W), best);
      best = max_over_tokens<Q>(best);
      vf base = best == -INFINITY ? vf{} : best;
      decay[part] = exp2_of(top[part] - base);
      vf total = sum[part] * decay[part];
      for (int64_t i = part; i < vectors; i += PARTS) {
        vf weight = exp2_of(load(logits + i * W) - base);
        store(logits + i * W, weight);
        total += weight;
      }
      top[part] = best;
      sum[part] = total;
    }
  }
  void save(float* maximum, float* total) const {
    for (int g = 0; g < P; g++) {
      maximum[g] = top[g / W][g % W];
      total[g] = 0;
      for (int lane = g % W; lane < W; lane += Q) total[g] += sum[g / W][lane];
    }
  }
};

// acc [chunk][half][A][W] += weights [row][P] x value [row][dim].
void add_values(const T* value, int64_t rows, int dim, const float* weights, float* acc, int64_t ahead = 0) {
  constexpr int WIDE = STEP <= 7 && W == 16 ? 2 : 1;
  const int whole = dim / (2 * W), tail = dim % (2 * W);
  auto run = [&](int c, int first, auto width, auto read) {
    constexpr int N = decltype(width)::value;
    vf sums[N][2][STEP];
    for (int n = 0; n < N; n++)
      for (int g = 0; g < STEP; g++)
        for (int half = 0; half < 2; half++)
          sums[n][half][g] = load(acc + (((c + n) * 2 + half) * A + first + g) * W);
    for (int64_t row = 0; row < rows; row++) {
      const T* p = value + row * dim + c * 2 * W;
      const float* weight = weights + row * P + first;
      if (ahead) prefetch(p + ahead, N * 2 * W);
      for (int n = 0; n < N; n++) {
        vf a, b;
        read(p + n * 2 * W, a, b);
        for (int g = 0; g < STEP; g++) {
          sums[n][0][g] += a * weight[g];
          sums[n][1][g] += b * weight[g];
        }
      }
    }
    for (int n = 0; n < N; n++)
      for (int g = 0; g < STEP; g++)
        for (int half = 0; half < 2; half++)
          store(acc + (((c + n) * 2 + half) * A + first + g) * W, sums[n][half][g]);
  };
  auto plain = [](const T* p, vf& a, vf& b) { widen(p, a, b); };
  for (int first = 0; first < A; first += STEP) {
    int c = 0;
    for (; c + WIDE <= whole; c += WIDE) run(c, first, std::integral_constant<int, WIDE>{}, plain);
    for (; c < whole; c++) run(c, first, std::integral_constant<int, 1>{}, plain);
    if (tail)
      run(c, first, std::integral_constant<int, 1>{},
          [tail](const T* p, vf& a, vf& b) { widen_tail(p, tail, a, b); });
  }
}

// ---- attention

struct AttendArgs {
  const void *key, *value, *query;
  void* out;
  const int64_t *offsets, *lengths;
  int64_t segments;
  int32_t dim, threads;
  float scaling;
};
struct Part { int64_t segment, begin, rows; };
constexpr int MAX_DIM = 512;
constexpr int64_t AHEAD = 64;  // tokens between what is used and what is prefetched
constexpr int64_t BLOCK = 64;  // tokens whose logits are held at a time
constexpr float LOG2E = 1.44269504088896341f;

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
      for (int c = 0; c < chunks; c++)
        for (int half = 0; half < 2; half++) {
          vf x = {};
          for (int64_t i = first; i < end; i++)
            x += load(results + i * stride + ((c * 2 + half) * A + g) * W) *
                 results[i * stride + acc_floats + g];
          x /= splat(sum);
          for (int lane = 0; lane < W; lane++) {
            int channel = c * 2 * W + place(half, lane);
            if (channel < a.dim) narrow(x[lane], out[g * a.dim + channel]);
          }
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
      const T *key = static_cast<const T*>(a.key) + from, *value = static_cast<const T*>(a.value) + from;
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

// ---- retrieval: scores of a dynamic head's items, selection, loading

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
constexpr int64_t SPAN = 512, SPANS = 8;  // items per task; such tasks per task of the second pass

struct Work {  // scratch of one head
  float *table, *weights, *tops, *score;
  int32_t *missing, *freed;
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
    static thread_local uint32_t counts[2][4096];
    std::memset(counts, 0, sizeof counts);
    for (int64_t i = 0; i + 1 < h.items; i += 2) {
      counts[0][ordered(due[i]) >> 20]++;
      counts[1][ordered(due[i + 1]) >> 20]++;
    }
    if (h.items % 2) counts[0][ordered(due[h.items - 1]) >> 20]++;
    int bin = 4096;
    int64_t above = 0, within = 0;  // items in higher bins; and in this one
    while (above + within < h.hot) {
      above += within;
      bin--;
      within = counts[0][bin] + counts[1][bin];
    }
    // Of this bin the best hot - above: larger d, then hot ones, then lower numbers.
    auto rank = [&](int64_t i) {
      return uint64_t(ordered(due[i])) << 32 | uint64_t(w.is_hot[i]) << 31 | (0x7fffffffu - uint32_t(i));
    };
    int64_t missing = 0, found = 0, freed = 0;
    for (int64_t i = 0; i < h.items; i++) {
      const int mine = int(ordered(due[i]) >> 20);
      w.missing[missing] = int32_t(i);
      missing += (mine > bin) & !w.is_hot[i];
      w.candidates[found] = uint64_t(i);
      found += mine == bin;
    }
    for (int64_t i = 0; i < found; i++) w.candidates[i] = rank(int64_t(w.candidates[i]));
    uint64_t* last = w.candidates + (h.hot - above - 1);
    std::nth_element(w.candidates, last, w.candidates + found, std::greater<uint64_t>());
    for (uint64_t* c = w.candidates; c <= last; c++)
      if (!(*c & 0x80000000u)) w.missing[missing++] = int32_t(0x7fffffffu - uint32_t(*c & 0x7fffffffu));
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
  constexpr int64_t NEXT = 8;
  for (int64_t n = batch * batch_of(h); n < end; n++) {
    T* targets[2] = {static_cast<T*>(a.key), static_cast<T*>(a.value)};
    const int64_t item = w.missing[n];
    const int64_t size = h.scale ? 1 : int64_t(sizeof(T));
    const char* source = static_cast<const char*>(h.host) + item * 2 * half * size;
    if (n + NEXT < end && h.chunk <= 4) {
      const char* next = static_cast<const char*>(h.host) + w.missing[n + NEXT] * 2 * half * size;
      for (int64_t i = 0; i < 2 * half * size; i += 64) __builtin_prefetch(next + i);
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

// ---- encoding

struct EncodeArgs {
  const float *projected, *codebook;  // [tokens][channels], [256][channels]
  const int32_t* subspaces;           // [codes][2]
  uint8_t* out;                       // [tokens][codes]
  int64_t tokens, channels, codes;
  int32_t threads;
};
void encode(const EncodeArgs& a) {
  arena.reserve(Arena::rounded<float>(256 * (a.channels + a.codes)));
  float* turned = arena.take<float>(256 * (a.channels + a.codes));
  float* halves = turned + 256 * a.channels;
  for (int j = 0; j < 256; j++) {
    for (int64_t c = 0; c < a.channels; c++) turned[c * 256 + j] = a.codebook[j * a.channels + c];
    for (int64_t s = 0; s < a.codes; s++) {
      float sum = 0;
      for (int c = a.subspaces[2 * s]; c < a.subspaces[2 * s + 1]; c++) {
        float x = a.codebook[j * a.channels + c];
        sum += x * x;
      }
      halves[s * 256 + j] = sum / 2;
    }
  }
  constexpr int64_t ROWS = 256;
  constexpr int TILE = W == 16 ? 16 : 8, TILES = 256 / (TILE * W);
  std::atomic<int> next{0};
  parallel(a.threads, [&] {
    share(next, int((a.tokens + ROWS - 1) / ROWS), [&](int task) {
      for (int64_t row = task * ROWS; row < std::min(a.tokens, (task + 1) * ROWS); row++)
        for (int64_t s = 0; s < a.codes; s++) {
          float best = INFINITY;
          int code = 0;
          for (int tile = 0; tile < TILES; tile++) {
            vf cost[TILE];
            const int begin = tile * TILE * W;
            for (int v = 0; v < TILE; v++) cost[v] = load(halves + s * 256 + begin + v * W);
            for (int c = a.subspaces[2 * s]; c < a.subspaces[2 * s + 1]; c++) {
              const float x = a.projected[row * a.channels + c], sure = std::isfinite(x) ? x : 0;
              const float* centroid = turned + int64_t(c) * 256 + begin;
              for (int v = 0; v < TILE; v++) cost[v] -= load(centroid + v * W) * sure;
            }
            vf least = cost[0];
            for (int v = 1; v < TILE; v++) least = cost[v] < least ? cost[v] : least;
            float low = least[0];
            for (int lane = 1; lane < W; lane++) low = least[lane] < low ? least[lane] : low;
            if (!(low < best)) continue;
            best = low;
            for (int v = TILE - 1; v >= 0; v--)
              for (int lane = W - 1; lane >= 0; lane--)
                if (cost[v][lane] == low) code = begin + v * W + lane;
          }
          a.out[row * a.codes + s] = uint8_t(code);
        }
    });
  });
}

enum Outcome { DONE = 0, UNSUPPORTED = 1, NO_MEMORY = 2 };
template <class F>
int guarded(F f) {
  try {
    f();
    return DONE;
  } catch (const std::bad_alloc&) {
    return NO_MEMORY;
  }
}
bool fits(int dim) { return dim % 8 == 0 && dim >= 8 && dim <= MAX_DIM; }

}  // namespace

extern "C" {

// Entry points of an OpenMP runtime (GOMP_parallel, GOMP_barrier), or null for one thread.
void hkv_init(void* parallel_entry, void* barrier_entry) {
  start_team = reinterpret_cast<decltype(start_team)>(parallel_entry);
  meet_team = reinterpret_cast<decltype(meet_team)>(barrier_entry);
}

int hkv_attend(const AttendArgs* args) {
  if (!fits(args->dim)) return UNSUPPORTED;
  return guarded([&] { attend(*args); });
}

int hkv_retrieve(const RetrieveArgs* args, int what) {
  if (!fits(args->dim)) return UNSUPPORTED;
  return guarded([&] { retrieve(*args, what); });
}

int hkv_encode(const EncodeArgs* args) {
  return guarded([&] { encode(*args); });
}
}
