// CUDA kernels on the CPU: the part of <cuda_runtime.h> that csrc/cuda uses, for the host compiler.
//
// Each CUDA thread of a block is a fiber. A fiber runs until it waits at a barrier or a warp
// operation; the next to run is then drawn at random (environment variable CUDA_ON_CPU_SEED, read
// at each launch), so that a missing barrier shows. Shared memory is dynamic only and filled with
// 0xff before each block. A barrier that some thread of the block never reaches, and warp
// operations whose lanes disagree, end the launch with cudaErrorLaunchFailure; cudaGetErrorString
// then says what happened.
#pragma once

#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
using cudaStream_t = void*;

const char* cudaGetErrorString(cudaError_t error);

namespace cuda_on_cpu {

// What a fiber sees of itself.
struct Thread {
  uint3 thread_index;
  uint3 block_index;
};
extern Thread* current;
extern dim3 block_size;
extern dim3 grid_size;

cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel);
void* shared_memory();

// Where in the source an operation stands: threads that meet in it must agree.
struct Site {
  const char* file;
  int line;
};

// Exchanges 64 bits among the lanes of `mask`: returns what lane `source` of them gave, all ones
// where it is not in the mask (on a device: an undefined value). Also counts the lanes whose value
// is not 0.
struct Exchange {
  uint64_t value;
  unsigned ballot;
};
Exchange exchange(unsigned mask, uint64_t value, unsigned source, const char* operation, Site site);
void synchronize_block(Site site);
unsigned lane();

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const char* operation, Site site) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source, operation, site).value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::current->thread_index)
#define blockIdx (cuda_on_cpu::current->block_index)
#define blockDim (cuda_on_cpu::block_size)
#define gridDim (cuda_on_cpu::grid_size)

// The site is a default argument so that it is the caller's.
#define CUDA_ON_CPU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_ON_CPU_SITE) { cuda_on_cpu::synchronize_block({file, line}); }

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_CPU_SITE) {
  cuda_on_cpu::exchange(mask, 0, cuda_on_cpu::lane(), "__syncwarp", {file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::exchange(mask, predicate != 0, 0, "__ballot_sync", {file, line}).ballot;
}

inline int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::exchange(mask, predicate != 0, 0, "__any_sync", {file, line}).ballot != 0;
}

inline int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_SITE) {
  return cuda_on_cpu::exchange(mask, predicate != 0, 0, "__all_sync", {file, line}).ballot == mask;
}

// Lanes are taken in segments of `width`, a power of two; a source outside the segment means
// oneself, except that __shfl_sync wraps around.
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_SITE) {
  const unsigned base = cuda_on_cpu::lane() & ~unsigned(width - 1);
  return cuda_on_cpu::shuffle(mask, value, base + (source & (width - 1)), "__shfl_sync",
                              {file, line});
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const unsigned lane = cuda_on_cpu::lane();
  const unsigned source = (lane & unsigned(width - 1)) >= delta ? lane - delta : lane;
  return cuda_on_cpu::shuffle(mask, value, source, "__shfl_up_sync", {file, line});
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_CPU_SITE) {
  const unsigned lane = cuda_on_cpu::lane();
  const unsigned source =
      (lane & unsigned(width - 1)) + delta < unsigned(width) ? lane + delta : lane;
  return cuda_on_cpu::shuffle(mask, value, source, "__shfl_down_sync", {file, line});
}

// A source in a later segment means oneself; one in an earlier segment is allowed.
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32, CUDA_ON_CPU_SITE) {
  const unsigned lane = cuda_on_cpu::lane();
  const unsigned source = lane ^ unsigned(distance);
  const bool later = source > (lane | unsigned(width - 1));
  return cuda_on_cpu::shuffle(mask, value, later ? lane : source, "__shfl_xor_sync", {file, line});
}

// Fibers change places at barriers and warp operations only.
inline unsigned atomicOr(unsigned* address, unsigned value) {
  const unsigned old = *address;
  *address |= value;
  return old;
}

#undef CUDA_ON_CPU_SITE
