// What kdkernels._C hands to kdkernels._calls_*, as a capsule of this name.
#pragma once

#include "../csrc/kdkernels.h"

namespace kdkernels {

#ifndef KDKERNELS_LAYOUT  // what the structs are, as a hash of their headers (CMakeLists.txt)
#define KDKERNELS_LAYOUT ""
#endif
constexpr const char* kCpuKernels = "kdkernels.cpu_kernels." KDKERNELS_LAYOUT;

struct CpuKernels {
  void (*kl_div)(const KlDivParams&, int threads);
  void (*logit_loss)(const LogitLossParams&, int threads);
  void (*multi_teacher_kl_div)(const MultiTeacherKlDivParams&, int threads);
  void (*topk_kl_div)(const TopkKlDivParams&, int threads);
  void (*small_linear_loss)(const SmallLinearLossParams&, int threads);
  void (*coral)(const PairParams&, int threads);
  void (*gaussian)(const GaussianParams&, int threads);
  void (*mmd)(const MmdParams&, int threads);
  void (*scale_rows)(const ScaleRowsParams&, int threads);
  void (*sum_of_rows)(DType dtype, const void* rows, int64_t count, void* out);
  int64_t (*count_labels)(const int64_t* labels, int64_t rows, int64_t label);
  void (*prefer_huge_pages)(void* begin, int64_t bytes);
};

}  // namespace kdkernels
