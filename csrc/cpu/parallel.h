// Rows over threads.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace kdkernels::cpu {

// Less work than this, about 20 us, does not pay for waking another thread.
constexpr int64_t kElementsPerThread = 16384;

// body(begin, end) over contiguous runs of rows. The pool is that of the OpenMP library already in
// the process (torch's), so no second set of threads competes for the cores.
template <typename Body>
void for_each_run_of_rows(int64_t rows, int64_t classes, int threads, const Body& body,
                          int64_t elements_per_thread = kElementsPerThread) {
  const int64_t useful = std::max<int64_t>(1, rows * classes / elements_per_thread);
  const int64_t count = std::min({static_cast<int64_t>(threads), rows, useful});
  if (count <= 1) {
    if (rows > 0) body(int64_t{0}, rows);
    return;
  }
#pragma omp parallel for num_threads(static_cast<int>(count)) schedule(static, 1)
  for (int64_t i = 0; i < count; ++i) body(rows * i / count, rows * (i + 1) / count);
}

}  // namespace kdkernels::cpu
