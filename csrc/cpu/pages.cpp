// What to ask of the system about an output's memory.
#include "../kdkernels.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace kdkernels::cpu {

void prefer_huge_pages(void* begin, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t{1} << 21;
  const uintptr_t from = (reinterpret_cast<uintptr_t>(begin) + kPage - 1) / kPage * kPage;
  const uintptr_t to = (reinterpret_cast<uintptr_t>(begin) + bytes) / kPage * kPage;
  // A system that has none says no, which leaves everything as it is.
  if (from < to) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
  (void)begin;
  (void)bytes;
#endif
}

}  // namespace kdkernels::cpu
