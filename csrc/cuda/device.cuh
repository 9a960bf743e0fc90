// What the kernels need of the device and plain C++ lacks, one small function each, with a host
// body that lets the same source run on the CPU (tests/cuda_on_cpu). Also the element types and
// 16-byte packets:
//
//   row:     | lead | x_0 x_1 ... x_{classes-1} |
//   packets: [ packet 0 ][ packet 1 ] ...        each at a 16-byte boundary; lanes outside the row
//   are -inf
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "../kdkernels.h"
#include "../math.h"

#define KDK_DEVICE __device__ __forceinline__

namespace kdkernels::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kPacketBytes = 16;
// Keeps class indices within int.
constexpr int64_t kMaxClasses = int64_t{1} << 30;
// Enough to fill any device several times over; kernels stride over the rows beyond.
constexpr int64_t kMaxBlocks = 65536;

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int block, size_t shared_bytes,
                   void* stream, Arguments... arguments) {
#if defined(__CUDACC__)
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
#else
  (void)stream;
  return cuda_on_cpu::launch(grid, block, shared_bytes, [=] { kernel(arguments...); });
#endif
}

// The block's dynamic shared memory.
template <typename T>
KDK_DEVICE T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#else
  return static_cast<T*>(cuda_on_cpu::shared_memory());
#endif
}

// 2^x within 2 ulp; results below 2^-126 are 0.
KDK_DEVICE float exp2_approximate(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126.0f ? 0.0f : std::exp2(x);
#endif
}

struct Float16 {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

KDK_DEVICE float to_float(float x) { return x; }

KDK_DEVICE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
#if defined(__CUDACC__)
  return __uint_as_float(bits);
#else
  return __builtin_bit_cast(float, bits);
#endif
}

KDK_DEVICE float to_float(Float16 x) {
#if defined(__CUDACC__)
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  return static_cast<float>(__builtin_bit_cast(_Float16, x.bits));
#endif
}

KDK_DEVICE void assign(float& y, float x) { y = x; }

KDK_DEVICE void assign(BFloat16& y, float x) {
#if defined(__CUDACC__)
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  y.bits = x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
#endif
}

KDK_DEVICE void assign(Float16& y, float x) {
#if defined(__CUDACC__)
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  y.bits = __builtin_bit_cast(uint16_t, static_cast<_Float16>(x));
#endif
}

// A row that is written: of T, or of float16 or bfloat16 where T is float.
template <typename T>
struct OutputRow {
  void* data;
  DType dtype;

  KDK_DEVICE OutputRow(void* base, DType dtype, int64_t row, int64_t stride)
      : data(base), dtype(dtype) {
    const int size = dtype == DType::kFloat32 ? 4 : 2;
    if (base != nullptr) data = static_cast<char*>(base) + row * stride * size;
  }

  KDK_DEVICE bool operator==(std::nullptr_t) const { return data == nullptr; }
  KDK_DEVICE bool operator!=(std::nullptr_t) const { return data != nullptr; }
};

// V elements that one instruction loads or stores.
template <typename T, int V>
struct alignas(sizeof(T) * V) Packet {
  T elements[V];
};

// The same packet, in a way that hides where it came from: what is computed from it is computed
// here, rather than kept in registers since the same was last computed.
template <typename T, int V>
KDK_DEVICE Packet<T, V> anew(Packet<T, V> x) {
#if defined(__CUDACC__)
  if constexpr (sizeof(x) % sizeof(uint32_t) == 0) {
    uint32_t words[sizeof(x) / sizeof(uint32_t)];
    memcpy(words, &x, sizeof(x));
#pragma unroll
    for (uint32_t& word : words) asm volatile("" : "+r"(word));
    memcpy(&x, words, sizeof(x));
  }
#endif
  return x;
}

// How a row is cut into packets. With V = 1 every row is aligned and no packet is partial.
template <typename T, int V>
struct PacketLayout {
  int classes;
  int lead;   // lanes of packet 0 that lie before the row
  int count;  // packets

  KDK_DEVICE PacketLayout(const T* row, int classes)
      : classes(classes),
        lead(static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % V)),
        count((lead + classes + V - 1) / V) {}

  KDK_DEVICE int first_class(int packet) const { return packet * V - lead; }
  KDK_DEVICE bool is_whole(int first) const { return first >= 0 && first <= classes - V; }
  KDK_DEVICE bool contains(int j) const { return j >= 0 && j < classes; }

  // Any packet number will do: one past the row is all -inf.
  KDK_DEVICE Packet<T, V> load(const T* row, int packet) const {
    const int first = first_class(packet);
    Packet<T, V> x;
    if (is_whole(first)) {
      x = *reinterpret_cast<const Packet<T, V>*>(row + first);
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (contains(first + i)) {
          x.elements[i] = row[first + i];
        } else {
          assign(x.elements[i], -INFINITY);
        }
      }
    }
    return x;
  }

  template <typename Out>
  KDK_DEVICE void store(Out* row, int packet, const float (&values)[V]) const {
    const int first = first_class(packet);
    Packet<Out, V> x;
#pragma unroll
    for (int i = 0; i < V; ++i) assign(x.elements[i], values[i]);
    if (is_whole(first)) {
      *reinterpret_cast<Packet<Out, V>*>(row + first) = x;
    } else {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        if (contains(first + i)) row[first + i] = x.elements[i];
      }
    }
  }

  KDK_DEVICE void store(const OutputRow<T>& row, int packet, const float (&values)[V]) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (row.dtype == DType::kFloat16)
        return store(static_cast<Float16*>(row.data), packet, values);
      if (row.dtype == DType::kBFloat16)
        return store(static_cast<BFloat16*>(row.data), packet, values);
    }
    store(static_cast<T*>(row.data), packet, values);
  }
};

template <typename T, int V>
KDK_DEVICE void to_floats(const Packet<T, V>& x, float (&values)[V]) {
#pragma unroll
  for (int i = 0; i < V; ++i) values[i] = to_float(x.elements[i]);
}

}  // namespace kdkernels::cuda
