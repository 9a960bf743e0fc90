// A run of rows of a loss from logits, for kernels that make the logits themselves.
#pragma once

#include "../kdkernels.h"

namespace kdkernels::cpu {

// Rows [begin, end) on the calling thread; returns the first that holds a label which is no class,
// or -1.
using RowsOfLogits = int64_t (*)(const LogitLossParams& params, int64_t begin, int64_t end);

RowsOfLogits rows_of_logits(const LogitLossParams& params);
[[noreturn]] void refuse_label(const LogitLossParams& params, int64_t row);

}  // namespace kdkernels::cpu
