// Runs the CUDA kernels of csrc/cuda on a CPU: this file stands in for csrc/cuda/device.cuh.
//
// The threads of a block are fibers that run until they wait for each other, in an order that changes with a
// seed. Lanes exchange fragments exactly as the PTX manual lays them out, copies arrive as late as they may,
// fresh memory holds NaN, and a read past the end of a buffer hits a guard page. Bank conflicts of ldmatrix
// are counted.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define __global__ inline
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct Dimension {
  unsigned x, y;
};
inline Dimension threadIdx, blockIdx, blockDim, gridDim;

namespace clara_fast::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
struct Float16 {};
struct BFloat16 {};

namespace host {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "block (%u, %u), thread %u: %s\n", blockIdx.x, blockIdx.y, threadIdx.x, what);
  std::exit(1);
}
inline void require(bool condition, const char* what) {
  if (!condition) fail(what);
}

// Memory that ends at a page nobody may touch, filled with ones: NaN in every type.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    constexpr size_t kPage = 4096;
    const size_t pages = (bytes + kPage - 1) / kPage * kPage;
    mapped_ = pages + kPage;
    base_ = static_cast<unsigned char*>(
        mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    require(base_ != MAP_FAILED && mprotect(base_ + pages, kPage, PROT_NONE) == 0, "no memory");
    data = base_ + pages - bytes;
    std::memset(base_, 0xff, pages);
  }
  Guarded(const Guarded&) = delete;
  ~Guarded() { munmap(base_, mapped_); }
  unsigned char* data;

 private:
  unsigned char* base_;
  size_t mapped_;
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  int bytes, width;
};

struct Fiber {
  ucontext_t start;
  jmp_buf place;
  std::unique_ptr<unsigned char[]> stack;
  bool started, finished;
  std::vector<Copy> open_group;
  std::deque<std::vector<Copy>> groups;
};

// Where lanes, or threads, meet. What they bring and take is kept twice, since one may be at the next meeting
// already while another still reads the last.
struct Meeting {
  int arrived = 0;
  int generation = 0;
  int kind = 0;
  alignas(16) unsigned char in[2][kWarp][64];
  alignas(16) unsigned char out[2][kWarp][64];
  int vote[2] = {0, 0};
};

inline std::vector<Fiber> fibers;
inline std::vector<Meeting> warps;
inline Meeting barrier;
inline std::function<void()> body;
inline unsigned char* shared;
inline jmp_buf scheduler;
inline uint64_t random_state = 1;
inline long bank_conflicts = 0;
constexpr size_t kStack = 128 << 10;

inline uint64_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

inline Fiber& self() { return fibers[threadIdx.x]; }

inline void yield() {
  if (_setjmp(self().place) == 0) _longjmp(scheduler, 1);
}

inline void fiber_main() {
  body();
  require(self().open_group.empty() && self().groups.empty(), "ends with copies under way");
  self().finished = true;
  _longjmp(scheduler, 1);
}

inline void resume(unsigned thread) {
  threadIdx.x = thread;
  Fiber& fiber = fibers[thread];
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, fiber_main, 0);
  setcontext(&fiber.start);
}

inline void run_block(unsigned threads) {
  for (size_t i = fibers.size(); i < threads; ++i) {
    fibers.emplace_back();
    fibers.back().stack.reset(new unsigned char[kStack]);
  }
  warps.assign(threads / kWarp, Meeting());
  barrier = Meeting();
  std::vector<unsigned> waiting(threads);
  for (unsigned i = 0; i < threads; ++i) {
    waiting[i] = i;
    fibers[i].started = fibers[i].finished = false;
  }
  for (long idle = 0; !waiting.empty(); ++idle) {
    require(idle < 100000000, "waits for ever");
    // One round in an order of its own: a random start and direction.
    const size_t size = waiting.size(), first = random_bits() % size;
    const bool backwards = random_bits() & 1;
    for (size_t i = 0; i < size; ++i) resume(waiting[(backwards ? first + size - i : first + i) % size]);
    std::erase_if(waiting, [](unsigned thread) { return fibers[thread].finished; });
  }
}

template <class Kernel, class Params>
void launch(Kernel kernel, Dimension grid, unsigned threads, size_t shared_bytes, const Params& params) {
  blockDim = {threads, 1};
  gridDim = grid;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      const Guarded memory(shared_bytes);
      require(reinterpret_cast<uintptr_t>(memory.data) % 16 == 0,
              "size of shared memory is not a multiple of 16");
      shared = memory.data;
      body = [&] { kernel(params); };
      run_block(threads);
    }
  }
}

// A warp meets: each lane brings an In, the last computes every lane's Out.
template <class Out, class In, class Compute>
Out meet(int kind, const In& in, Compute compute) {
  static_assert(sizeof(In) <= 64 && sizeof(Out) <= 64);
  Meeting& warp = warps[threadIdx.x / kWarp];
  const int generation = warp.generation, side = generation & 1, lane = threadIdx.x % kWarp;
  if (warp.arrived == 0) warp.kind = kind;
  require(warp.kind == kind, "lanes of a warp meet at different instructions");
  std::memcpy(warp.in[side][lane], &in, sizeof(In));
  if (++warp.arrived == kWarp) {
    In ins[kWarp];
    Out outs[kWarp];
    for (int i = 0; i < kWarp; ++i) std::memcpy(&ins[i], warp.in[side][i], sizeof(In));
    compute(ins, outs);
    for (int i = 0; i < kWarp; ++i) std::memcpy(warp.out[side][i], &outs[i], sizeof(Out));
    warp.arrived = 0;
    ++warp.generation;
  } else {
    while (warp.generation == generation) yield();
  }
  Out out;
  std::memcpy(&out, warp.out[side][lane], sizeof(Out));
  return out;
}

inline int meet_block(int vote) {
  const int generation = barrier.generation, side = generation & 1;
  barrier.vote[side] |= vote != 0;
  if (++barrier.arrived == static_cast<int>(blockDim.x)) {
    barrier.arrived = 0;
    barrier.vote[side ^ 1] = 0;
    ++barrier.generation;
  } else {
    while (barrier.generation == generation) yield();
  }
  return barrier.vote[side];
}

inline void issue(void* to, const void* from, int bytes, int width) {
  require(reinterpret_cast<uintptr_t>(to) % width == 0, "copy to an unaligned address");
  require(reinterpret_cast<uintptr_t>(from) % width == 0, "copy from an unaligned address");
  require(bytes >= 0 && bytes <= width, "copy of a wrong size");
  std::memset(to, 0xff, width);
  self().open_group.push_back(
      {static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from), bytes, width});
}

inline void finish(int pending) {
  auto& groups = self().groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) {
      std::memset(copy.to, 0, copy.width);
      std::memcpy(copy.to, copy.from, copy.bytes);
    }
    groups.pop_front();
  }
}

inline float half(uint32_t bits, Float16) {
  const uint16_t low = static_cast<uint16_t>(bits);
  _Float16 value;
  std::memcpy(&value, &low, 2);
  return static_cast<float>(value);
}
inline float half(uint32_t bits, BFloat16) {
  const uint32_t wide = bits << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Tensor cores do not round their sums to nearest; towards zero is the worst they are known to do.
inline float truncate(double value) {
  float rounded = static_cast<float>(value);
  if (std::isfinite(rounded) && std::fabs(static_cast<double>(rounded)) > std::fabs(value)) {
    rounded = std::nextafterf(rounded, 0.0f);
  }
  return rounded;
}

struct Operands {
  uint32_t a[4], b[2];
  float d[4];
};
struct Product {
  float d[4];
};

template <class T>
void multiply_warp(const Operands (&in)[kWarp], Product (&out)[kWarp], T type) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      for (int odd = 0; odd < 2; ++odd) {
        a[g + i % 2 * 8][2 * t + i / 2 * 8 + odd] = half(in[lane].a[i] >> (16 * odd), type);
        if (i < 2) b[2 * t + 8 * i + odd][g] = half(in[lane].b[i] >> (16 * odd), type);
      }
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = in[lane].d[i];
      for (int j = 0; j < 16; ++j) sum += static_cast<double>(a[row][j]) * b[j][column];
      out[lane].d[i] = truncate(sum);
    }
  }
}

enum Kind { kLoadMatrices = 1, kMultiply, kShuffle, kBallot, kSync };

}  // namespace host

inline unsigned char* dynamic_shared() { return host::shared; }
inline float unknown(float value) { return value; }
inline void copy_async_16(void* to, const void* from, int bytes) { host::issue(to, from, bytes, 16); }
inline void copy_async_4(void* to, const void* from, int bytes) { host::issue(to, from, bytes, 4); }
inline void commit_copies() {
  host::self().groups.push_back(std::move(host::self().open_group));
  host::self().open_group.clear();
}
template <int kPending>
void wait_for_copies() {
  host::finish(kPending);
}

inline void load_matrices(uint32_t (&out)[4], const void* row) {
  struct Registers {
    uint32_t r[4];
  };
  host::require(reinterpret_cast<uintptr_t>(row) % 16 == 0, "ldmatrix from an unaligned address");
  const Registers mine = host::meet<Registers>(
      host::kLoadMatrices, row, [](const void* const(&rows)[kWarp], Registers(&outs)[kWarp]) {
        for (int matrix = 0; matrix < 4; ++matrix) {
          unsigned banks = 0;
          for (int i = 0; i < 8; ++i)
            banks |= 1u << (reinterpret_cast<uintptr_t>(rows[8 * matrix + i]) / 16 % 8);
          host::bank_conflicts += 8 - __builtin_popcount(banks);
          for (int lane = 0; lane < kWarp; ++lane) {
            const auto* const from = static_cast<const unsigned char*>(rows[8 * matrix + lane / 4]);
            std::memcpy(&outs[lane].r[matrix], from + lane % 4 * 4, 4);
          }
        }
      });
  for (int i = 0; i < 4; ++i) out[i] = mine.r[i];
}

template <class T>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T type) {
  const host::Operands in{{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
  const host::Product out = host::meet<host::Product>(
      host::kMultiply, in, [type](const host::Operands(&ins)[kWarp], host::Product(&outs)[kWarp]) {
        host::multiply_warp(ins, outs, type);
      });
  for (int i = 0; i < 4; ++i) d[i] = out.d[i];
}

template <class T>
float to_float(uint16_t bits, T type) {
  return host::half(bits, type);
}
inline uint16_t from_float(float value, Float16) {
  const _Float16 rounded = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}
inline uint16_t from_float(float value, BFloat16) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline uint32_t pack_bfloat16(float low, float high) {
  return static_cast<uint32_t>(from_float(high, BFloat16())) << 16 | from_float(low, BFloat16());
}
inline uint32_t subtract_float16(uint32_t a, uint32_t b) {
  const auto one = [&](int shift) {
    return static_cast<uint32_t>(
               from_float(host::half(a >> shift, Float16()) - host::half(b >> shift, Float16()), Float16()))
           << shift;
  };
  return one(0) | one(16);
}

}  // namespace clara_fast::cuda

// CUDA's own functions, as far as the kernels use them.
namespace host = clara_fast::cuda::host;

template <class T, class Source>
T shuffle(const T& value, Source source) {
  return host::meet<T>(host::kShuffle, value, [source](const T(&in)[32], T(&out)[32]) {
    for (int lane = 0; lane < 32; ++lane) out[lane] = in[source(lane)];
  });
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int other) {
  return shuffle(value, [other](int lane) { return lane ^ other; });
}
template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  return shuffle(value, [distance](int lane) { return lane < distance ? lane : lane - distance; });
}
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return shuffle(value, [source](int) { return source; });
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  return host::meet<unsigned>(host::kBallot, vote, [](const bool (&in)[32], unsigned (&out)[32]) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= static_cast<unsigned>(in[lane]) << lane;
    for (unsigned& one : out) one = all;
  });
}
inline void __syncwarp() {
  host::meet<int>(host::kSync, 0,
                  [](const int (&)[32], int (&out)[32]) { std::memset(out, 0, sizeof(out)); });
}
inline void __syncthreads() { host::meet_block(0); }
inline int __syncthreads_or(int vote) { return host::meet_block(vote); }
template <class T>
T atomicAdd(T* place, T value) {
  const T before = *place;
  *place += value;
  return before;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __clzll(long long value) { return value == 0 ? 64 : __builtin_clzll(value); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i)
    out |= static_cast<unsigned>(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return out;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
