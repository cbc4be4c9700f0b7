// Encoding for projected indexes: the nearest centroid per subspace.
#pragma once

#include "threads.h"

namespace {

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

}  // namespace
