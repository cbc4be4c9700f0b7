// Decode kernels of hkvprof for CPUs: GCC/Clang vector extensions, float32 arithmetic, no headers
// beyond the standard library. Threads are those of the OpenMP runtime that torch has loaded: its
// entry points are handed to hkv_init, so that no second pool of threads exists.
//
// Compiled once per element type (HKV_TYPE: 0 float, 1 bfloat16, 2 half) and number G of query
// heads per KV head (HKV_GROUP). Everything per token and query head is laid out [token][P],
// with P = G rounded up to a power of two, so that one vector holds whole tokens.

#include "attend.h"
#include "encode.h"
#include "retrieve.h"

namespace {

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

}  // extern "C"
