// Threads of torch's OpenMP runtime, and scratch memory that lives between calls.
#pragma once

#include "vectors.h"

namespace {

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
  template <class T> static size_t rounded(size_t count) {
    return (count * sizeof(T) + 63) & ~size_t(63);
  }
};
thread_local Arena arena;

}  // namespace
