// grad[r, :] *= scale[r], in place, on CUDA devices. Reads the scales, and what it changes once.
//
// A warp takes one piece of one row, so that many short rows and few long ones both fill the
// device. A scale of exactly 1 ends a piece after that one read: the usual upstream gradient costs
// a launch.
#include <algorithm>

#include "device.cuh"

namespace kdkernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPacketsInFlight = 4;

template <typename T>
__global__ void __launch_bounds__(kThreads) scale_rows_kernel(ScaleRowsParams params) {
  constexpr int kLanes = kPacketBytes / sizeof(T);
  const int lane = threadIdx.x % kWarp;
  const int step = gridDim.y * kWarp;
  for (int64_t r = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; r < params.rows;
       r += int64_t{gridDim.x} * kWarps) {
    const float scale = static_cast<const float*>(params.scale)[r * params.scale_stride];
    if (scale == 1) continue;
    T* row = static_cast<T*>(params.grad) + r * params.classes;
    const PacketLayout<T, kLanes> layout(row, static_cast<int>(params.classes));
    for (int first = blockIdx.y * kWarp + lane; first < layout.count;
         first += kPacketsInFlight * step) {
      Packet<T, kLanes> packets[kPacketsInFlight];
#pragma unroll
      for (int k = 0; k < kPacketsInFlight; ++k) packets[k] = layout.load(row, first + k * step);
#pragma unroll
      for (int k = 0; k < kPacketsInFlight; ++k) {
        float values[kLanes];
        to_floats(packets[k], values);
#pragma unroll
        for (int i = 0; i < kLanes; ++i) values[i] *= scale;
        layout.store(row, first + k * step, values);
      }
    }
  }
}

template <typename T>
cudaError_t launch_type(const ScaleRowsParams& params, void* stream) {
  constexpr int64_t kClassesPerPiece = kWarp * kPacketsInFlight * kPacketBytes / sizeof(T);
  const int64_t blocks = std::min((params.rows + kWarps - 1) / kWarps, kMaxBlocks);
  const int64_t pieces = std::clamp<int64_t>(params.classes / kClassesPerPiece, 1, 1024);
  return launch(scale_rows_kernel<T>,
                dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(pieces)), kThreads, 0,
                stream, params);
}

}  // namespace

int scale_rows(const ScaleRowsParams& params, void* stream) {
  if (params.classes > kMaxClasses) return cudaErrorInvalidValue;
  if (params.rows == 0 || params.classes == 0) return cudaSuccess;
  switch (params.dtype) {
    case DType::kFloat32:
      return launch_type<float>(params, stream);
    case DType::kFloat16:
      return launch_type<Float16>(params, stream);
    case DType::kBFloat16:
      return launch_type<BFloat16>(params, stream);
    case DType::kFloat64:
      break;
  }
  return cudaErrorInvalidValue;
}

const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace kdkernels::cuda
