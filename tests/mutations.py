"""Breaks the code in known ways, one at a time, and checks that the tests notice: `python tests/mutations.py [WORD]`.

Works on a copy of the tree; builds what a change touches. Prints a line for each break and fails if one survives.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    tests: str  # pytest's arguments


CPU, CUDA, TRITON = "csrc/cpu/kl_div.cpp", "csrc/cuda/kl_div.cu", "kdkernels/_triton/kl_div.py"
CPU_ROW, CPU_BLOCKS = "csrc/cpu/kl_row.h", "csrc/cpu/softmax.h"
CPU_TOPK, CPU_MULTI = "csrc/cpu/topk_kl_div.cpp", "csrc/cpu/multi_teacher_kl_div.cpp"
TRITON_ROWS, TRITON_SAMPLES = "kdkernels/_triton/rows.py", "kdkernels/_triton/samples.py"
OP, TRAIN = "kdkernels/ops/kl_div.py", "kdkernels/train/loop.py"
REPORT, EXPERIMENT, DISTRIBUTED = (
    f"kdkernels/train/{stem}.py" for stem in ("report", "experiment", "distributed")
)
OP_TOPK, OP_MULTI = "kdkernels/ops/topk_kl_div.py", "kdkernels/ops/multi_teacher_kl_div.py"
CPU_POOL, CUDA_POOL = "csrc/cpu/pool_mse.cpp", "csrc/cuda/pool_mse.cu"
TRITON_POOL, OP_POOL = "kdkernels/_triton/pool_mse.py", "kdkernels/ops/pool_mse.py"
ROWS, FAMILY, DIVERGENCES = (f"kdkernels/ops/{stem}.py" for stem in ("rows", "logit_loss", "divergences"))
CPU_FAMILY, TEMPERATURE = "csrc/cpu/logit_loss.cpp", "kdkernels/ops/temperature.py"

LINEAR, PROJECTION = "kdkernels/ops/linear_loss.py", "kdkernels/ops/projection.py"
STATISTICS, SHARED = "kdkernels/ops/teacher_statistics.py", "kdkernels/ops/shared_classifier_loss.py"
CPU_GAUSSIAN, CPU_SLICED = "csrc/cpu/gaussian.cpp", "csrc/cpu/sliced_wasserstein.cpp"
CPU_SINKHORN, CUDA_SINKHORN = "csrc/cpu/sinkhorn.cpp", "csrc/cuda/sinkhorn.cu"
OP_SINKHORN = "kdkernels/ops/sinkhorn.py"
CPU_CORAL, SMALL = "csrc/cpu/coral.cpp", "csrc/cpu/small_linear_loss.cpp"
CPU_MMD, OP_MMD = "csrc/cpu/mmd.cpp", "kdkernels/ops/mmd.py"
CPU_CLASSES, BF16 = "csrc/cpu/classes.h", "csrc/cpu/bf16_linear.cpp"
OP_NATIVE, CALLS = "kdkernels/ops/native_distance.py", "python/calls.cpp"
OP_GAUSSIAN, OP_CORAL, OP_WASSERSTEIN = (
    f"kdkernels/ops/{stem}.py" for stem in ("gaussian", "coral", "wasserstein")
)


TRITON_GAUSSIAN, TRITON_CORAL, TRITON_MASKED, TRITON_MMD, TRITON_SLICED, TRITON_SINKHORN = (
    f"kdkernels/_triton/{stem}.py"
    for stem in ("gaussian", "coral", "masked_feature_loss", "mmd", "sliced_wasserstein", "sinkhorn")
)
METHODS = "kdkernels/methods"


def gaussian(backend: str, *words: str) -> str:
    return grid(backend, *(words or ("diagonal", "sizes")), op="gaussian")


def sliced(*words: str) -> str:
    return grid("triton", *words, op="sliced_wasserstein")


def masked(backend: str) -> str:
    return grid(backend, "formula", "sizes", op="masked_feature_loss")


def grid(backend: str, *words: str, op: str = "kl_div") -> str:
    chosen = " or ".join(words) or "loss_and_gradients or last_class or masked"
    return f"tests/test_{op}.py -k '{backend} and ({chosen})'"


def topk(*words: str) -> str:
    return grid("cpu", *words, op="topk_kl_div")


def multi(*words: str) -> str:
    return grid("cpu", *words, op="multi_teacher_kl_div")


def pool(*words: str, backend: str = "cpu") -> str:
    return grid(backend, *(words or ("outputs_and", "samples", "last_position")), op="pool_mse")


def family(backend: str, words: str) -> str:
    return f"tests/test_logit_loss.py -k '{backend} and ({words})'"


def linear(backend: str, words: str, op: str = "linear_loss") -> str:
    return f"tests/test_{op}.py -k '{backend} and ({words})'"


def distance(suite: str, words: str) -> str:
    return f"tests/test_{suite}.py -k '{words}'"


def sinkhorn(backend: str, words: str) -> str:
    return f"tests/test_sinkhorn.py -k '{backend}{' and ' if backend else ''}({words})'"


def calls(words: str) -> str:
    return f"tests/test_calls.py -k '{words}'"


def method(suite: str, words: str) -> str:
    return f"tests/test_{suite}.py -k '{words}'"


MUTATIONS = [
    Mutation("cpu: zero gradient", CPU_ROW, "a * w_j - b * element.e", "0.0f", grid("cpu")),
    Mutation("cpu: sign of the gradient", CPU_ROW, "a * w_j - b * element.e", "b * element.e - a * w_j", grid("cpu")),
    Mutation("cpu: last class skipped", CPU_BLOCKS, "std::min(kBlock, classes - begin)", "std::min(kBlock, classes - 1 - begin)", grid("cpu")),
    Mutation("cpu: the last vector counted twice", CPU_ROW, "kCounts + (n - whole)", "kCounts + kLanes", grid("cpu")),
    Mutation("cpu: mask ignored", CPU, "params.mask != nullptr &&", "false &&", grid("cpu")),
    Mutation("cpu: 1/T missing in the gradient", CPU, "sums, scale * input_inverse, stash", "sums, scale, stash", grid("cpu")),
    Mutation("cpu: later blocks on the first one's scale", CPU_ROW, "S *= by, A *= by, B *= by, ", "", grid("cpu", "mass")),
    Mutation("cpu: a bad guess kept", CPU_ROW, "exp_y < 0.02 || exp_y > 50", "false", grid("cpu", "mass")),
    Mutation("cpu: P = 0 taken for the least float", CPU_ROW, "return least > kLeastExp2 &&", "return", grid("cpu", "minus")),
    Mutation("cpu: the last row's loss left out of the sum", "csrc/cpu/sum_of_rows.cpp", "i < count; ++i", "i < count - 1; ++i", grid("cpu")),
    Mutation("cpu: scale_rows does nothing", "csrc/cpu/scale_rows.cpp", "if (scale == S(1)) continue;", "continue;", grid("cpu", "twice")),
    Mutation("both natives: series sign", "csrc/math.h", "second_order_ratio(x) - x);", "second_order_ratio(x) + x);", grid("cuda")),
    Mutation("cuda: mask ignored", CUDA, "params.mask != nullptr &&", "false &&", grid("cuda")),
    Mutation("cuda: a barrier missing", "csrc/cuda/reduce.cuh", "__syncthreads();  // the previous reduction may still be read", "", "tests/test_cuda_on_cpu.py -k 'not sanit'"),
    Mutation("cuda: temperature gradient off", CUDA, "sums[1] - sums[2] * sums[3]", "-sums[1]", grid("cuda", "row_arguments")),
    Mutation("triton: mask ignored", TRITON, "live = exists & (tl.load(mask_ptr + row, mask=exists, other=0) != 0)", "live = exists", grid("triton")),
    Mutation("triton: zero gradient", TRITON, "difference * grad_scale_q", "difference * 0.0", grid("triton")),
    Mutation("triton: last class skipped", TRITON_ROWS, "mask=live & (column < classes)", "mask=live & (column < classes - 1)", grid("triton")),
    Mutation("op: divides by all rows", ROWS, "each = mask.sum().clamp(min=1)", "each = torch.ones_like(mask).sum()", grid("cpu", "batchmean")),
    Mutation("op: buffer handed out twice", OP, "gradients, ctx.gradients = ctx.gradients, None", "gradients = ctx.gradients", grid("cpu", "twice")),
    Mutation("op: reverse ignored", OP, "    if reverse:\n        input, target", "    if False:\n        input, target", grid("cpu", "loss_and")),
    Mutation(
        "op: upstream gradient ignored",
        OP,
        "upstream, of_weights = grad_output.contiguous(), None",
        "upstream, of_weights = torch.ones_like(grad_output), None",
        grid("cpu", "twice or row_arg"),
    ),
    Mutation("op: gradient of weights missing its factor", OP, "of_weights = rows * grad_output *", "of_weights = rows *", grid("cpu", "row_arguments")),
    Mutation("op: double backward without the upstream gradient", OP, "wanted, grad_output, create_graph=True", "wanted, torch.ones_like(grad_output), create_graph=True", grid("cpu", "gradcheck or double")),
    Mutation("topk cpu: zero gradient of the rest", CPU_TOPK, "block[j] = e[j] * a;", "block[j] = 0 * e[j] * a;", topk()),
    Mutation("topk cpu: sign of the named classes", CPU_TOPK, "store(scale * inverse * (whole", "store(-scale * inverse * (whole", topk()),
    Mutation("topk cpu: last class skipped", CPU_BLOCKS, "std::min(kBlock, classes - begin)", "std::min(kBlock, classes - 1 - begin)", topk()),
    Mutation("topk cpu: mask ignored", CPU_TOPK, "params.mask != nullptr &&", "false &&", topk()),
    Mutation("topk cpu: named classes in the rest too", CPU_TOPK, "if (any == 0) return x;", "return x;", topk()),
    Mutation("topk cpu: later blocks on the first one's scale", CPU_TOPK, "rest.sum *= rescale;", "", topk("every_number", "far_below")),
    Mutation("topk cpu: repeats unnoticed", CPU_TOPK, "|| !chosen.add(indices[i])", "|| (chosen.add(indices[i]), false)", topk("refused")),
    Mutation("topk cpu: biased exponentials", CPU_TOPK, "exp2_unbiased(y)", "exp2_above(y)", topk("near_convergence")),
    Mutation("topk cpu: gradient of log_probs without the rest's", CPU_TOPK, "term.delta - slope", "term.delta", topk()),
    Mutation("topk cpu: temperature's gradient without the rest's", CPU_TOPK, "of_rest * (rest.moment", "0 * (rest.moment", topk("row_arguments")),
    Mutation("topk op: padding left as it comes", OP_TOPK, "                grad_input[:, stop:] = 0\n", "", topk("padding")),
    Mutation("topk op: indices of the whole student", OP_TOPK, "indices - start if start else indices", "indices", topk("padding")),
    Mutation("topk op: buffer handed out twice", OP_TOPK, "gradients, ctx.gradients = ctx.gradients, None", "gradients = ctx.gradients", topk("twice")),
    Mutation("topk op: gradient of weights is the scaled loss's", OP_TOPK, "_run(True, *inputs, None, 1.0, ", "_run(True, *inputs, row_scale, scale, ", topk("row_arguments")),
    Mutation("multi cpu: zero gradient", CPU_MULTI, "gradient[j] += of_e * e[j] - of_v * v[j]", "gradient[j] += 0 * e[j]", multi()),
    Mutation("multi cpu: only the last teacher's gradient", CPU_MULTI, "gradient[j] += of_e", "gradient[j] = of_e", multi()),
    Mutation("multi cpu: sign of the gradient of a few rows", CPU_MULTI, "fast, sums, scale, stash, gradient", "fast, sums, -scale, stash, gradient", multi()),
    Mutation("multi cpu: mask ignored", CPU_MULTI, "params.mask == nullptr ||", "true ||", multi()),
    Mutation("multi cpu: teacher_mask ignored", CPU_MULTI, "params.teacher_mask == nullptr ||", "true ||", multi()),
    Mutation("multi cpu: a bad guess kept", CPU_MULTI, "ratio < 0.2 || ratio > 50", "false", multi("mass")),
    Mutation("multi cpu: Q = 0 taken for the least float", CPU_MULTI, "!student.underflows &&", "", multi("minus", "without_q")),
    Mutation("multi cpu: the first teacher's temperature for all", CPU_MULTI, "if (factor == new_factor) return;", "if (factor == factor) return;", multi("many_temp")),
    Mutation("multi op: buffer handed out twice", OP_MULTI, "of_input, ctx.gradient = ctx.gradient, None", "of_input = ctx.gradient", multi("twice")),
    Mutation("multi op: upstream gradient ignored", OP_MULTI, "scale_rows_(of_input, upstream, backend)", "None", multi("twice", "row_arg")),
    Mutation("multi op: rows' weights ignored", OP_MULTI, "weight * (scale if row_scale is None else row_scale)", "weight", multi("row_arg")),
    Mutation("multi op: one side of the temperature's gradient", OP_MULTI, "found[-2] + found[-1]", "found[-1]", multi("row_arg")),
    Mutation("family: soft term without T²", DIVERGENCES, "(temperature**2 if spec.squared else 1.0)", "1.0", family("reference", "textbook")),
    Mutation("family: std over N", DIVERGENCES, "(count - 1).clamp(min=1)", "count", family("reference", "textbook")),
    Mutation("family: DKD's factors", DIVERGENCES, "weighted(spec.first, target)", "weighted(spec.second, target)", family("reference", "textbook")),
    Mutation("family: the mixture's shares", DIVERGENCES, "share * a + (1 - share) * b", "(1 - share) * a + share * b", family("reference", "textbook")),
    Mutation("family: TV without its half", DIVERGENCES, "0.5 * difference", "difference", family("reference", "textbook")),
    Mutation("family: TV blind where one side is 0", DIVERGENCES, "near = both & (delta", "near = (p > 0) & (delta", family("reference", "common")),
    Mutation("family: JSD blind to what is nearly 0", DIVERGENCES, "a, difference = torch.where(alive, a, 0), torch", "a, difference = a, torch", family("reference", "common")),
    Mutation("family: a constant row that is not zeros", DIVERGENCES, "z = torch.where(constant, 0, z / (spread + SPREAD_EPS))", "z = (z + constant) / (spread + SPREAD_EPS) * logits.sign()", family("reference", "constant or textbook")),
    Mutation("family: smoothing over masked classes", DIVERGENCES, "/ live.sum(-1)", "/ student.shape[-1]", family("cpu", "minus")),
    Mutation("family: an even mixture's other side", "csrc/divergence.h", "T other_log = bounded_log - size;", "T other_log = bounded_log + size;", family("cpu", "every_loss")),
    Mutation("cpu family: sides far apart differenced", CPU_FAMILY, "if (alike && far(", "if (false && far(", distance("logit_loss", "far_from")),
    Mutation("cpu family: zeros for no classes", CPU_FAMILY, "to + whole_vectors(n), -static_cast<S>(INFINITY)", "to + whole_vectors(n), S(0)", family("cpu", "every_loss")),
    Mutation("cpu family: blocks' means all the same", CPU_FAMILY, " + step * step * (count * live / all);", ";", distance("logit_loss", "many_rows")),
    Mutation("cpu family: moment of a fast row missing", CPU_FAMILY, "if (wants_moment) found.moment = fast_sums.moment();", "", distance("logit_loss", "many_rows")),
    Mutation("cpu family: moments on the first block's scale", CPU_ROW, ", e_moment *= by, w_moment *= by;", ";", distance("logit_loss", "many_rows")),
    Mutation("cpu family: half of the moment", CPU_ROW, "(w_moment - B / S * e_moment)", "w_moment", distance("logit_loss", "many_rows")),
    Mutation("cpu: temperatures taken for the same", CPU_ROW, " - (t - target_from) * apart + guess;", " + guess;", grid("cpu", "temperatures")),
    Mutation("triton: sides far apart differenced", TRITON_ROWS, "* inverse > FAR", "* inverse > 1e30", grid("triton", "far_from")),
    Mutation("triton family: sides far apart differenced", "kdkernels/_triton/divergence.py", "* inverse_q <= FAR", "* inverse_q <= 1e30", family("triton", "far_from")),
    Mutation("cuda: sides far apart differenced", CUDA, "fabsf(shift) * input_inverse > kFar", "false", grid("cuda", "far_from")),
    Mutation("cuda family: sides far apart differenced", "csrc/divergence.h", "std::fabs(shift) * input_inverse < kFar", "true", family("cuda", "far_from")),
    Mutation("cpu: sides far apart differenced", CPU_ROW, "std::fabs(difference) > kFar * kLog2E", "false", grid("cpu", "far_from")),
    Mutation("topk cpu: a half row's exponentials lost", CPU_TOPK, "block[j] = e[j] * a;", "block[j] = kept == nullptr ? e[j] * a : S(0);", distance("topk_kl_div", "alone")),
    Mutation("calls: any tail a bucket", CALLS, "params.tail = static_cast<Tail>(static_cast<int32_t>(*tail));", "params.tail = Tail::kBucket;", calls("equal")),
    Mutation("calls: topk's other gradient dropped", CALLS, "params.grad_log_probs = address(gradients[1]);", "", calls("equal")),
    Mutation("calls: indices of rows apart", CALLS, "!log_probs->is_contiguous() || !indices->is_contiguous() ||", "!log_probs->is_contiguous() ||", calls("left_to_python")),
    Mutation("family: every mixture even", CPU_FAMILY, "kMixed && terms.mix == S(0.5)", "kMixed", family("cpu", "every_loss")),
    Mutation("family: wrong side's mixture", DIVERGENCES, "first=self.second, second=self.first, mix=1 - self.mix", "first=self.second, second=self.first, mix=self.mix", family("cpu", "every_loss")),
    Mutation("family: sides not exchanged", DIVERGENCES, "            KL: REVERSE_KL,\n", "", family("cpu", "every_loss")),
    Mutation("family: the teacher gets the hard term's gradient", DIVERGENCES, "hard_weight=0.0, label_smoothing=0.0, z_loss=0.0)\n        if", "z_loss=0.0)\n        if", family("cpu", "every_loss")),
    Mutation("family: no gradient of the MSE for the teacher", DIVERGENCES, "label_smoothing=0.0, z_loss=0.0)\n        if", "label_smoothing=0.0, z_loss=0.0, logit_mse=0.0)\n        if", family("cpu", "mse")),
    Mutation("family: sign of the MSE's gradient for the teacher", DIVERGENCES, "label_smoothing=0.0, z_loss=0.0)\n        if", "label_smoothing=0.0, z_loss=0.0, logit_mse=-self.logit_mse)\n        if", family("cpu", "mse")),
    Mutation("family: MSE of masked classes", DIVERGENCES, "torch.where(masked, 0, student - teacher)", "(student - teacher)", family("reference", "mse_of_masked")),
    Mutation("family: JSD's ends", "kdkernels/ops/jsd.py", "(1 / (1 - beta), 1 / beta)", "(1 / beta, 1 / (1 - beta))", family("reference", "textbook")),
    Mutation("family: NKD without its weight", "kdkernels/ops/distillation_loss.py", 'NORMALIZED, rest["soft_weight"]', "NORMALIZED, 1.0", family("reference", "textbook")),
    Mutation("family: derivative of T² missing", FAMILY, "of_square / input_temperature, alpha=2", "of_square / input_temperature, alpha=0", family("cpu", "through_the_square or learnable")),
    Mutation("family: T² of NKD's target part", FAMILY, "terms[0] - terms[3] if spec", "terms[0] if spec", family("cpu", "learnable")),
    Mutation("family: T² without its weight", FAMILY, "squared if spec.soft_weight == 1 else squared * spec.soft_weight", "squared", family("cpu", "row_arguments")),
    Mutation("family: padding keeps what it had", FAMILY, "grad[:, start + classes :].zero_()", "pass", family("cpu", "valid_classes")),
    Mutation("family: ignore_index counts", FAMILY, "mask = counts if mask is None else mask & counts", "mask = counts if mask is None else mask", family("cpu", "ignored or textbook")),
    Mutation("family: ignored rows in the denominator", ROWS, "mask.expand(rows.shape).sum().clamp(min=1)", "rows.numel()", family("reference", "textbook")),
    Mutation("family: buffer handed out twice", FAMILY, "gradients, ctx.gradients = ctx.gradients, None", "gradients = ctx.gradients", family("cpu", "twice")),
    Mutation("family: upstream gradient ignored", FAMILY, "upstream, of_weights = grad_output.contiguous(), None", "upstream, of_weights = torch.ones_like(grad_output), None", family("cpu", "twice or row_arg")),
    Mutation("family: gradient of weights missing its factor", FAMILY, "of_weights = rows * grad_output *", "of_weights = rows *", family("cpu", "row_arguments")),
    Mutation("family: terms without the weights", FAMILY, "terms * late_scale", "terms", family("cpu", "parts or textbook or terms")),
    Mutation("family: double backward without the upstream gradient", FAMILY, "wanted, grad_output, create_graph=True", "wanted, torch.ones_like(grad_output), create_graph=True", family("cpu", "gradcheck or double")),
    Mutation("family: two classes have another", FAMILY, "spec = spec._replace(second=0.0)", "pass", family("cpu", "two_classes")),
    Mutation("family: labels not counted from the range", ROWS, "(labels - start if start else labels)", "labels", family("reference", "valid_classes")),
    Mutation("family: labels not looked at", ROWS, "if wrong.any():", "if False:", family("reference", "out_of_range")),
    Mutation("family: entropies exchanged", "kdkernels/ops/kd_statistics.py", "kl, teacher_entropy, student_entropy,", "kl, student_entropy, teacher_entropy,", family("reference", "statistics")),
    Mutation("family: gradient not reversed", TEMPERATURE, "grad_output * -ctx.strength", "grad_output * ctx.strength", "tests/test_temperature.py"),
    Mutation("family: cosine upside down", TEMPERATURE, "0.5 * (1 - math.cos", "0.5 * (1 + math.cos", "tests/test_temperature.py"),
    Mutation("cuda family: mask ignored", "csrc/cuda/logit_loss.cuh", "params.mask != nullptr && params.mask[r] == 0", "false", family("cuda", "masked_rows")),
    Mutation("cuda family: gradient of the MSE missing", "csrc/cuda/logit_loss.cuh", "gradient[i] += slope;", "", family("cuda", "mse")),
    Mutation("cuda family: read again after the store", "csrc/cuda/logit_loss.cuh", "!(in_place && smoothing)", "true", family("cuda", "take_the_place")),
    Mutation("triton family: gradient of the MSE missing", "kdkernels/_triton/logit_loss.py", "grad += mse_weight * gap", "grad += 0.0", family("triton", "mse")),
    Mutation("triton family: mask ignored", "kdkernels/_triton/logit_loss.py", "live = exists & (tl.load(mask_ptr + row, mask=exists, other=0) != 0)", "live = exists", family("triton", "masked_rows")),
    Mutation("triton family: one-hot of the label missing", "kdkernels/_triton/logit_loss.py", "label_weight -= row_scale * hard_weight * (1.0 - label_smoothing)", "label_weight -= 0.0", family("triton", "every_loss")),
    Mutation("cpu family: mask ignored", CPU_FAMILY, "params.mask != nullptr &&", "false &&", family("cpu", "masked_rows")),
    Mutation("cpu family: 1/T missing in the gradient", CPU_FAMILY, "soft_scale * s_inverse / temperature;", "soft_scale * s_inverse;", family("cpu", "every_loss")),
    Mutation("cpu family: one-hot of the label missing", CPU_FAMILY, "const double onehot = scale *", "const double onehot = 0 *", family("cpu", "every_loss")),
    Mutation("cpu family: gradient of the MSE missing", CPU_FAMILY, "if (mse) add_gaps(", "if (false) add_gaps(", family("cpu", "mse")),
    Mutation("cpu family: MSE of the label's class missing", CPU_FAMILY, "gaps += label_gap * label_gap;", "", family("cpu", "mse or parts")),
    Mutation("cpu family: read again after the store", CPU_FAMILY, "return !is_half && params.grad_input != params.input;", "return !is_half;", family("cpu", "take_the_place")),
    Mutation("cpu family: gradient of a constant row", CPU_FAMILY, "const double flat = spread && s_spread.flat() ? 0 : 1;", "const double flat = 1;", family("cpu", "constant")),
    Mutation("cpu family: terms not written", CPU_FAMILY, "if (terms_out != nullptr) {", "if (false) {", family("cpu", "statistics")),
    Mutation("small linear: bias ignored", SMALL, "if (side.bias == nullptr) return;", "return;", method("linear_loss", "native_call")),
    Mutation("small linear: last class not packed", SMALL, "side.weight.stride, last - first, kBlock", "side.weight.stride, last - first - (last == work.classes), kBlock", method("linear_loss", "native_call")),
    Mutation("small linear: a row short in the head's gradient", SMALL, "first, last, work.rows, side.grad + first", "first, last, work.rows - 1, side.grad + first", method("linear_loss", "native_call")),
    Mutation("small linear: sign of the bias's gradient", SMALL, "sums[i] += row[i]", "sums[i] -= row[i]", method("linear_loss", "native_call")),
    Mutation("small linear: wrong labels unnoticed", SMALL, "if (wrong >= 0) refuse_label", "if (false) refuse_label", method("linear_loss", "no_class")),
    Mutation("small linear: rows shared by the threads' number", SMALL, "side.grad + begin * work.width, work.width, 1, side.weight", "side.grad, work.width, 1, side.weight", method("linear_loss", "native_call")),
    Mutation("small linear: later features over the first", "csrc/cpu/product.cpp", "k > 0", "false", method("linear_loss", "native_call")),
    Mutation("small linear: rows that fill no register left out", "csrc/cpu/product.cpp", "for (; r < rows; ++r)", "for (; r < 0; ++r)", method("linear_loss", "native_call")),
    Mutation("small linear: sides not exchanged for the teacher", LINEAR, "spec.exchanged() if other else spec", "spec", linear("cpu", "every_loss")),
    Mutation("linear: zero gradient of the head", LINEAR, "if scaled else grad, x, first)", "if scaled else 0 * grad, x, first)", linear("cpu", "every_loss")),
    Mutation("linear: sign of the head's gradient", LINEAR, "if scaled else grad, x, first)", "if scaled else -grad, x, first)", linear("cpu", "every_loss")),
    Mutation("linear: zero gradient of the features", LINEAR, "if scaled else features)", "if scaled else 0 * features)", linear("cpu", "every_loss")),
    Mutation("linear: zero gradient of the bias", LINEAR, "part.copy_(total) if first", "part.zero_() if first", linear("cpu", "every_loss")),
    Mutation("linear: soft term without T²", FAMILY, "spec.soft_weight * temperature_value**2", "spec.soft_weight", linear("cpu", "every_loss")),
    Mutation("linear: soft term of a sparse teacher without T²", LINEAR, "each, factor = scale_of_soft(spec, temperature, temperature_value)", "each, factor = None, spec.soft_weight", linear("cpu", "log_probs")),
    Mutation("linear: derivative of a sparse teacher's T² missing", LINEAR, "of_temperature.add_(soft / temperature, alpha=2)", "pass", linear("cpu", "log_probs")),
    Mutation("linear: a sparse teacher's hard term missing in the gradient", LINEAR, "wanted.add_(of_rest)", "pass", linear("cpu", "log_probs")),
    Mutation("linear: reference looks at masked rows", LINEAR, "        student = torch.where(mask[..., None], student, 0)\n", "", linear("reference", "anything")),
    Mutation("linear: mask ignored", LINEAR, "live, mask = mask.nonzero()[:, 0], None", "live, mask = torch.arange(mask.numel()), None", linear("cpu", "anything or row_arguments")),
    Mutation("linear: rows that do not count keep what memory held", LINEAR, "for i in (0, 3, 6, 7))):", "for i in (3, 6, 7))):", linear("cpu", "anything")),
    Mutation("linear: one head's second part missing", LINEAR, "heads = gradients[1:3] if call.tied", "heads = [None, None] if call.tied", linear("cpu", "one_head_for_both")),
    Mutation("linear: one head's second part over the first", LINEAR, "first = first and not (call.tied and grad is not None)", "pass", linear("cpu", "one_head_for_both")),
    Mutation("linear: one head's biases taken for one", LINEAR, "and _same_memory(bias, target_bias)", "", linear("cpu", "one_head_for_both")),
    Mutation("linear: later chunks a row short", LINEAR, "min(begin + call.chunk_rows, rows))", "min(begin + call.chunk_rows, rows) - (begin > 0))", linear("cpu", "size_of_a_chunk or a_chunk_is")),
    Mutation("linear: later chunks over the first", LINEAR, "begin == 0, mask, outputs)", "True, mask, outputs)", linear("cpu", "size_of_a_chunk")),
    Mutation("linear: softcap's derivative missing", LINEAR, "    if cap:\n        grad.mul_(", "    if False:\n        grad.mul_(", linear("cpu", "scale_and_cap")),
    Mutation("linear: logit_scale missing in the head's gradient", LINEAR, "grad.mul_(scale) if scaled else grad, x", "grad, x", linear("cpu", "scale_and_cap")),
    Mutation("linear: logit_scale missing in the features' gradient", LINEAR, "features.mul_(scale) if scaled else features", "features", linear("cpu", "scale_and_cap")),
    Mutation("linear: the bias's part of the scale's gradient missing", LINEAR, "of_scale += torch.where(total == 0, 0, total * bias).sum()", "pass", linear("cpu", "scale_and_cap")),
    Mutation("linear: no mass times −inf", LINEAR, "torch.where(total == 0, 0, total * bias).sum()", "(total * bias).sum()", linear("cpu", "learnt_scale")),
    Mutation("linear: logit_scale missing in the bias's gradient", LINEAR, "total = total * scale if scaled else total", "pass", linear("cpu", "scale_and_cap")),
    Mutation("linear: upstream gradient not applied", LINEAR, "scale_rows_(gradient, upstream.contiguous(), options.backend)", "pass", linear("cpu", "upstream or every_loss")),
    Mutation("linear: upstream gradient not applied to sums", LINEAR, "                    gradient.mul_(upstream)\n", "                    pass\n", linear("cpu", "upstream or every_loss")),
    Mutation("linear: rows' upstream gradients ignored", LINEAR, "row_scale = (upstream * (", "row_scale = (torch.ones_like(upstream) * (", linear("cpu", "upstream or row_arguments")),
    Mutation("linear: buffer handed out twice", LINEAR, "gradients, ctx.gradients = ctx.gradients, None", "gradients = ctx.gradients", linear("cpu", "twice")),
    Mutation("linear: gradient of weights missing its factor", LINEAR, "of_weights = rows * grad_output *", "of_weights = rows *", linear("cpu", "row_arguments")),
    Mutation("linear: double backward without the upstream gradient", LINEAR, "wanted, grad_output, create_graph=True", "wanted, torch.ones_like(grad_output), create_graph=True", linear("cpu", "double or gradcheck")),
    Mutation("linear: padding's gradient is what memory held", LINEAR, " or x.shape[0] != call.classes", "", linear("cpu", "valid_classes")),
    Mutation("linear: teacher's classes from where the student's start", LINEAR, "start = call.start if call.tied else call.target_start", "start = call.start", linear("cpu", "valid_classes")),
    Mutation("linear: a sparse teacher's indices of the whole head", LINEAR, "else indices - call.start", "else indices", linear("cpu", "log_probs_in_a_range")),
    Mutation("linear: a frozen head multiplied all the same", LINEAR, "if of_x is not None or of_scale is not None:", "if True:", "tests/test_linear_loss.py -k frozen"),
    Mutation("linear: a head not looked at gets a gradient", LINEAR, "if tied or kind != HIDDEN:", "if tied:", linear("cpu", "not_looked_at")),
    Mutation("linear: logits rounded to the input's dtype", LINEAR, "student = projection.logits(x, weight, bias)", "student = projection.logits(x, weight, bias).to(x.dtype).to(dtype)", "tests/test_linear_loss.py -k near_convergence"),
    Mutation("linear: autocast not followed", LINEAR, "return [cast.get(id(x), x) for x in tensors]", "return list(tensors)", linear("cpu", "autocast")),
    Mutation("linear: chunks longer than the most", LINEAR, "most = most // step * step", "most += 0", "tests/test_linear_loss.py -k plan"),
    Mutation("linear: float16's gradients rounded before a loss scale", PROJECTION, "if x.dtype == torch.float16 or (", "if (", linear("cpu", "loss_scale")),
    Mutation("linear bf16: a tile's last pairs skipped", BF16, "p < pairs; p += kTile", "p < pairs - kTile; p += kTile", "tests/test_linear_loss.py -k product_of_bfloat16"),
    Mutation("linear bf16: tiles start from nothing", BF16, "if (first && sums == out) {", "if (sums == out) {", "tests/test_linear_loss.py -k product_of_bfloat16"),
    Mutation("linear bf16: features behind the tiles left out", BF16, "rest(0, tiled, whole);", "", "tests/test_linear_loss.py -k product_of_bfloat16"),
    Mutation("linear bf16: rows behind the tiles left out", BF16, "rest(tiled, params.rows, 0);", "", "tests/test_linear_loss.py -k product_of_bfloat16"),
    Mutation("linear bf16: tiles without the bias", BF16, "bias == nullptr ? _mm512_setzero_ps() : widen_bias(bias + kTile * v, lanes)", "_mm512_setzero_ps()", "tests/test_linear_loss.py -k product_of_bfloat16"),
    Mutation("linear bf16: the detour forgets earlier features", BF16, "first ? start : _mm512_maskz_loadu_ps(lanes, from)", "start", "tests/test_linear_loss.py -k product_of_bfloat16"),
    Mutation("linear: bfloat16 sums over many chunks", PROJECTION, "chunks > FEW_CHUNKS", "chunks > 10**6", "tests/test_linear_loss.py -k many_chunks"),
    Mutation("linear: a bias's stride ignored", PROJECTION, "None if bias is None else bias.contiguous()", "bias", "tests/test_linear_loss.py -k strides_of"),
    Mutation("linear statistics: without T²", STATISTICS, "factor = spec.soft_weight * (t * t if spec.squared else 1.0)", "factor = spec.soft_weight", linear("cpu", "full_form", "teacher_statistics")),
    Mutation("linear statistics: without the bias", STATISTICS, " + statistics.offset", "", linear("cpu", "full_form", "teacher_statistics")),
    Mutation("linear statistics: without the scale", STATISTICS, "inner * (scale / t)", "inner / t", linear("cpu", "logit_scale", "teacher_statistics")),
    Mutation("linear statistics: m kept with the wrong sign", STATISTICS, "rest = -factor *", "rest = factor *", linear("cpu", "full_form", "teacher_statistics")),
    Mutation("linear statistics: masked rows looked at", STATISTICS, "x = torch.where(counts[..., None], x, 0)", "pass", linear("cpu", "all_that_a_row", "teacher_statistics")),
    Mutation("linear statistics: precision ignored", STATISTICS, "rest.detach()) > precision", "rest.detach()) > 1e30", "tests/test_teacher_statistics.py -k precision"),
    Mutation("linear statistics: p − e_r from p", STATISTICS, "p.scatter_(1, top[:, None], -p.sum(1, keepdim=True))", "p.scatter_(1, top[:, None], 0)", linear("cpu", "full_form", "teacher_statistics")),
    Mutation("linear shared: teacher not detached", SHARED, "    if detach_teacher:", "    if False:", linear("cpu", "detached", "shared_classifier_loss")),
    Mutation("linear shared: features' MSE without its weight", SHARED, "reduce_rows(feature_mse_weight * of_features", "reduce_rows(of_features", linear("cpu", "formula", "shared_classifier_loss")),
    Mutation("linear shared: logits of resized maps", SHARED, "pooled = pooled if maps[0] is student else _pool(student, counts)", "pass", linear("cpu", "formula", "shared_classifier_loss")),
    Mutation("linear shared: ignored samples in the features' MSE", SHARED, "mask, labelled, ignore_index", "mask, None, ignore_index", linear("cpu", "row_arguments or anything", "shared_classifier_loss")),
    Mutation("linear shared: projector's bias missing", SHARED, "weight[:, :, None], bias)", "weight[:, :, None], None)", linear("cpu", "formula", "shared_classifier_loss")),
    Mutation("pool cpu: zero gradient of the distance", CPU_POOL, "gradient[j] = scale * (a[j] - b[j]) + biases[j];", "gradient[j] = biases[j];", pool()),
    Mutation("pool cpu: sign of the teacher's gradient", CPU_POOL, "store_gradient(t, s, biases[1], n, factor,", "store_gradient(s, t, biases[1], n, factor,", pool()),
    Mutation("pool cpu: 1/P missing in the gradient", CPU_POOL, "biases[j] = wide[j] * inverse;", "biases[j] = wide[j];", pool()),
    Mutation("pool cpu: 1/P missing in the pooled features", CPU_POOL, "sums, rows, static_cast<S>(inverse), pooled_teacher", "sums, rows, S(1), pooled_teacher", pool()),
    Mutation("pool cpu: mask ignored", CPU_POOL, "params.mask != nullptr &&", "false &&", pool()),
    Mutation("pool cpu: the end of a row left out", CPU_POOL, "total += (Lanes)((LaneMask)x & in_tail);", "", pool()),
    Mutation("pool cpu: one long sum", CPU_POOL, "constexpr int64_t kRun = 64;", "constexpr int64_t kRun = 1 << 30;", pool("long_sums")),
    Mutation("pool cuda: sign of the teacher's gradient", CUDA_POOL, "slope + bias : bias - slope", "slope + bias : bias + slope", pool(backend="cuda")),
    Mutation("pool cuda: 1/P missing in the gradient", CUDA_POOL, "bias = to_float(upstream[side][c]) * inverse;", "bias = to_float(upstream[side][c]);", pool(backend="cuda")),
    Mutation("pool cuda: mask ignored", CUDA_POOL, "params.mask == nullptr || params.mask[sample] != 0", "true", pool(backend="cuda")),
    Mutation("pool cuda: a barrier missing", CUDA_POOL, "__syncthreads();  // the previous sums may still be read", "", pool("deterministic", backend="cuda")),
    Mutation("pool triton: zero gradient of the distance", TRITON_POOL, "slope = scale * (s - t)", "slope = 0.0 * (s - t)", pool(backend="triton")),
    Mutation("pool triton: sign of the teacher's gradient", TRITON_POOL, "teacher_bias[:, None] - slope", "teacher_bias[:, None] + slope", pool(backend="triton")),
    Mutation("pool triton: 1/P missing in the gradient", TRITON_POOL, "teacher_bias = teacher_bias / positions", "teacher_bias = teacher_bias / 1.0", pool(backend="triton")),
    Mutation("pool triton: mask ignored", TRITON_POOL, "live = tl.load(mask_ptr + sample) != 0", "live = tl.load(mask_ptr + sample) < 2", pool(backend="triton")),
    Mutation("pool op: layouts taken for alike", OP_POOL, "return student, teacher.contiguous()\n    if", "return student, teacher\n    if", pool("layouts")),
    Mutation("pool op: pieces not added", OP_POOL, "[*pooled, mse.sum(1)]", "[*pooled, mse[:, 0]]", pool("long_sums", backend="cuda")),
    Mutation("train: outputs of one anchor kept for all", f"{METHODS}/rco.py", "= ()  # another", '= ("logits",)  # another', "tests/test_train_methods.py -k 'rco_s'"),
    Mutation("train: the pool's first images again", TRAIN, "        drawn += more", "        drawn += 0", "tests/test_train.py -k 'pool'"),
    Mutation("train: a milestone late", TRAIN, "step // steps_per_epoch >= epoch", "step // steps_per_epoch > epoch", "tests/test_train.py -k 'rates'"),
    Mutation("train: a piece weighs as a batch", TRAIN, "weight = len(some) * world / len(rows)", "weight = 1.0", "tests/test_train_methods.py -k 'pieces'"),
    Mutation("train: random state not restored", TRAIN, 'torch.set_rng_state(state["random"])', "pass", "tests/test_train_methods.py -k 'killed and mgd'"),
    Mutation("train: optimizer not restored", TRAIN, "optimizer.load_state_dict(one)", "pass", "tests/test_train_methods.py -k 'killed and kd'"),
    Mutation("train: a signal between a queue's instructions", REPORT, "    @signals.held()\n    def epoch(", "    def epoch(", "tests/test_train.py -k 'signal_while'"),
    Mutation("train: a dropped signal forgotten", REPORT, "            signals.check()\n", "", "tests/test_train.py -k 'signal_that'"),
    Mutation("train: a signal at the inner end", "kdkernels/train/signals.py", "_holds -= 1\n    if not _holds:\n        check()", "_holds -= 1\n    check()", "tests/test_train.py -k 'held_signal'"),
    Mutation("train: lines of lost epochs kept", REPORT, "os.truncate(metrics, size)", "pass", "tests/test_train_methods.py -k 'killed'"),
    Mutation("train: last of equal epochs", EXPERIMENT, "epoch.validation_accuracy > best.validation_accuracy", "epoch.validation_accuracy >= best.validation_accuracy", "tests/test_train.py -k 'best_on_validation'"),
    Mutation("train: scored on training images", EXPERIMENT, 'accuracy(module, self.data, "test"', 'accuracy(module, self.data, "train"', "tests/test_train.py -k 'scored'"),
    Mutation("train: outputs of other images", "kdkernels/train/outputs.py", "torch.arange(len(images))\n", "torch.arange(len(images)).flip(0)\n", "tests/test_train_methods.py -k 'npy'"),
    Mutation("train: statistics' gradient not summed", DISTRIBUTED, "        dist.all_reduce(grad)\n", "", "tests/test_train_distributed.py"),
    Mutation("train: running variance of a sample", DISTRIBUTED, "variance * total / (total - 1)", "variance", "tests/test_train_distributed.py"),
    Mutation("gaussian cpu: zero gradient", CPU_GAUSSIAN, "signed_share * shift[j] + share * (slope[j] * moments.centred(x[j], j))", "S(0)", distance("gaussian", "diagonal_wasserstein")),
    Mutation("gaussian cpu: sign of y's gradient", CPU_GAUSSIAN, "write_gradient(y, weight_y, n, S(-1)", "write_gradient(y, weight_y, n, S(1)", distance("gaussian", "diagonal_wasserstein")),
    Mutation("gaussian cpu: last columns skipped", CPU_GAUSSIAN, "std::min(kColumns, params.features - begin)", "std::min(kColumns, params.features - 1 - begin)", distance("gaussian", "diagonal_kl")),
    Mutation("gaussian cpu: min_samples ignored", CPU_GAUSSIAN, "count_x < least || count_y < least", "false", distance("gaussian", "min_samples")),
    Mutation("gaussian cpu: ratio that rounds to 0", CPU_GAUSSIAN, "more < S(0) ? -more / a : t", "more < S(0) ? S(1) / (S(1) + t) - S(1) : t", distance("gaussian", "dead_units")),
    Mutation("gaussian cpu: origin without weight", CPU_GAUSSIAN, "while (samples.weight(first) == S(0)) ++first;", "", distance("gaussian", "one_sample_with_weight")),
    Mutation("gaussian cpu: one class", CPU_GAUSSIAN, "c + 1 < classes.starts.size()", "c < 1", distance("features", "labels_are")),
    Mutation("gaussian triton: zero gradient", TRITON_GAUSSIAN, "grad = share[:, None] *", "grad = 0.0 * share[:, None] *", gaussian("triton")),
    Mutation("gaussian triton: sign of y's gradient", TRITON_GAUSSIAN, "            -push,", "            push,", gaussian("triton")),
    Mutation("gaussian triton: last columns skipped", TRITON_GAUSSIAN, "inside = column < features", "inside = column < features - 1", gaussian("triton")),
    Mutation("gaussian triton: last samples skipped", TRITON_GAUSSIAN, "exists = i < end", "exists = i < end - 1", gaussian("triton")),
    Mutation("gaussian triton: weights ignored", TRITON_GAUSSIAN, "weight = tl.load(weights_ptr + row, mask=exists, other=0.0)", "weight *= 1.0", gaussian("triton")),
    Mutation("gaussian triton: parts but the first ignored", TRITON_GAUSSIAN, "weight = tl.load(part_weights_ptr + part)", "weight = tl.load(part_weights_ptr + part) * (part < 1)", gaussian("triton")),
    Mutation("gaussian triton: no variance between lanes", TRITON_GAUSSIAN, "squares + (weight[:, None] * away) * away", "squares", gaussian("triton")),
    Mutation("gaussian triton: no mean to start from", TRITON_GAUSSIAN, "pivot = tl.where(total > 0.0, pivot, 0.0)", "pivot = tl.zeros_like(pivot)", gaussian("triton", "constant")),
    Mutation("gaussian triton: no series near 1", TRITON_GAUSSIAN, "near = (t >= -0.5) & (t <= 1.0)", "near = t > 3e38", gaussian("triton", "near")),
    Mutation("gaussian triton: min_samples ignored", TRITON_GAUSSIAN, "(x_count >= min_samples) & (y_count >= min_samples)", "(x_count >= 0)", gaussian("triton", "min_samples")),
    Mutation("gaussian triton: classes not gathered", TRITON_GAUSSIAN, "row = tl.load(order_ptr + i, mask=exists, other=0)", "row = i.to(tl.int64)", gaussian("triton", "many_sizes")),
    Mutation("gaussian op: buffer handed out twice", OP_NATIVE, "gradients, ctx.gradients = ctx.gradients, None", "gradients = ctx.gradients", distance("features", "backward_twice")),
    Mutation("gaussian cpu: the means rounded", CPU_GAUSSIAN, "(of_x.origin[j] - of_y.origin[j]) + (of_x.offset[j] - of_y.offset[j])", "(of_x.origin[j] + of_x.offset[j]) - (of_y.origin[j] + of_y.offset[j])", distance("gaussian", "nearly and cpu")),
    Mutation("gaussian cpu: samples off the rounded mean", CPU_GAUSSIAN, "(x - origin[j]) - offset[j]", "x - (origin[j] + offset[j])", distance("gaussian", "nearly and cpu")),
    Mutation("distance op: upstream gradient ignored", OP_NATIVE, "scale_rows_(gradient, upstream, backend)", "None", distance("features", "backward_twice or batch_is")),
    Mutation("bures: zero gradient", OP_GAUSSIAN, "return scale * of_a, None", "return 0 * scale * of_a, None", distance("gaussian", "textbook")),
    Mutation("bures: derivative of Q left out", OP_GAUSSIAN, "q = _Polar.apply(a @ b.mT)", "q = _Polar.apply((a @ b.mT).detach())", distance("features", "gradcheck and full")),
    Mutation("bures: equal is 1e-14", OP_GAUSSIAN, "[..., None, None], 0, of_a)", "[..., None, None], of_a, of_a)", distance("features", "exactly_zero and full")),
    Mutation("kl: no shrinkage of the trace", OP_GAUSSIAN, "shrinkage * v.mean(-1, keepdim=True) + eps", "eps", distance("gaussian", "shrinkage")),
    Mutation("kl, full: ridges not differenced", OP_GAUSSIAN, "+ (ridge_x - ridge_y)[..., None, None] * one", "", distance("gaussian", "full_kl")),
    Mutation("coral cpu: sign of y's gradient", CPU_CORAL, "s == 0 ? 1 : -1;", "1;", distance("features", "(coral or mmd) and cpu")),
    Mutation("coral cpu: sign of y's gradient with n < d", CPU_CORAL, "s == 0 ? across + f : f - across", "across + f", distance("features", "(coral or mmd) and cpu")),
    Mutation("coral cpu: zero gradient", CPU_CORAL, "const S scale = static_cast<S>(factor *", "const S scale = static_cast<S>(0 * factor *", distance("features", "(coral or mmd) and cpu")),
    Mutation("coral cpu: ddof 0", CPU_CLASSES, "1 - squares / (total * total)", "1.0 + 0 * squares", distance("coral", "formula")),
    Mutation("coral cpu: not centred", CPU_CORAL, "((x[j] - origin[j]) - mean[j])", "(x[j] - origin[j])", distance("coral", "formula")),
    Mutation("distances cpu: samples without weight counted", CPU_CLASSES, "if (weight == 0) continue;", "", distance("features", "(coral or mmd) and cpu")),
    Mutation("coral cpu: mean of the first samples", CPU_CORAL, "k < pieces; ++k", "k < 1; ++k", distance("coral", "sizes")),
    Mutation("coral cpu: products of the first samples", CPU_CORAL, "k < parts; ++k", "k < 1; ++k", distance("coral", "sizes")),
    Mutation("coral cpu: samples beyond the shorter side", CPU_CORAL, "std::fill_n(centred[s], n, S(0));", "", distance("coral", "formula")),
    Mutation("coral cpu: last columns not centred", CPU_CORAL, "share_out(d, kColumns, threads,", "share_out(d - 1, kColumns, threads,", distance("coral", "formula")),
    Mutation("coral cpu: unsymmetric", CPU_CORAL, "S(0.5) * (cross[i * stride + j] + cross[j * stride + i])", "cross[i * stride + j]", distance("coral", "formula")),
    Mutation("distances: float16's gradients rounded before a loss scale", OP_NATIVE, "of_x = _shaped(gradients[0], x.shape).to(x.dtype)", "of_x = _shaped(gradients[0], x.shape).div_(upstream).to(x.dtype).mul_(upstream)", distance("features", "loss_scale")),
    Mutation("coral: ddof 0", OP_CORAL, "1 / max(n - 1, 1) ** 0.5", "1 / max(n, 1) ** 0.5", grid("reference", "formula", op="coral")),
    Mutation("coral triton: ddof 0", TRITON_CORAL, "max(n - 1, 1) ** -0.5", "max(n, 1) ** -0.5", grid("triton", "formula", op="coral")),
    Mutation("coral triton: last samples skipped", TRITON_CORAL, "exists = i < samples", "exists = i < samples - 1", grid("triton", "formula", op="coral")),
    Mutation("coral triton: last columns skipped", TRITON_CORAL, "inside = column < features", "inside = column < features - 1", grid("triton", "formula", op="coral")),
    Mutation("coral triton: scales ignored", TRITON_CORAL, "each = load_weights(scales_ptr, row, exists)", "each = exists.to(tl.float32)", grid("triton", "reliabilities", op="coral")),
    Mutation("coral triton: measured from a sample without weight", TRITON_CORAL, "x_ptr += tl.load(first_ptr) * stride", "pass", grid("triton", "sizes", op="coral")),
    Mutation("coral triton: parts but the first ignored", TRITON_CORAL, "mean = tl.sum(parts, 0)", "mean = tl.sum(tl.where(tl.arange(0, SPLITS)[:, None] < 1, parts, 0.0), 0)", grid("triton", "sizes", op="coral")),
    Mutation("coral triton: no difference", TRITON_CORAL, "features, a - b, mask", "features, a + b, mask", grid("triton", "formula", op="coral")),
    Mutation("coral triton: tiles across counted once", TRITON_CORAL, "share *= 2.0", "share *= 1.0", grid("triton", "sizes", op="coral")),
    Mutation("coral triton: tiles across not turned", TRITON_CORAL, "across, tl.trans(difference)", "across, difference", grid("triton", "sizes", op="coral")),
    Mutation("coral triton: n < d, sign of the second product", TRITON_CORAL, "share += tl.load(total + rows", "share -= tl.load(total + rows", grid("triton", "formula", op="coral")),
    Mutation("coral triton: n < d, products turned", TRITON_CORAL, "of_difference + sign * cross, total", "of_difference + sign * back, total", grid("triton", "formula", op="coral")),
    Mutation("distances: no gradient of weights", OP_NATIVE, "if twice or needs[2] or needs[3]:", "if twice:", distance("coral", "gradient_of_weights")),
    Mutation("mmd cpu: zero gradient", CPU_MMD, "4 * (sum * z[j] - grad[j])", "0 * (sum * z[j] - grad[j])", distance("mmd", "definition")),
    Mutation("mmd cpu: zero gradient of products", CPU_MMD, "grad[j] = 2 * grad[j]", "grad[j] = 0 * grad[j]", distance("mmd", "definition")),
    Mutation("mmd cpu: sign of the gradient", CPU_MMD, "(sum * z[j] - grad[j])", "(grad[j] - sum * z[j])", distance("mmd", "definition")),
    Mutation("mmd cpu: sign of the pairs across", CPU_MMD, "within ? own.within : -1", "within ? own.within : 1", distance("mmd", "definition")),
    Mutation("mmd cpu: last sample skipped", CPU_MMD, "std::min(panels * kPanel<S>, other.count - tile.first)", "std::min(panels * kPanel<S>, other.count - 1 - tile.first)", distance("mmd", "every_size")),
    Mutation("mmd cpu: last features skipped", CPU_MMD, "for (; f < width; f += kCount)", "for (; f < 0; f += kCount)", distance("mmd", "every_size")),
    Mutation("mmd cpu: last depth alone", CPU_MMD, "depth, k > 0,", "depth, false,", distance("mmd", "every_size")),
    Mutation("mmd cpu: halves counted once", CPU_MMD, "within && !diagonal ? 2 * part : part", "part", distance("mmd", "every_size")),
    Mutation("mmd cpu: near pairs not differenced", CPU_MMD, "kNear = 1.0 / 64", "kNear = 0.0", distance("mmd", "near_samples")),
    Mutation("mmd cpu: near pairs without gradient", CPU_MMD, "add_scaled_difference(factor * weights[j]", "add_scaled_difference(S(0) * weights[j]", distance("mmd", "near_samples")),
    Mutation("mmd cpu: gradients of the rows alone", CPU_MMD, "if (tile.to_columns) {", "if (false) {", distance("mmd", "every_size")),
    Mutation("mmd cpu: slopes of the rows alone", CPU_MMD, "if (tile.to_columns) add_to", "if (false) add_to", distance("mmd", "every_size")),
    Mutation("mmd cpu: a panel's own pairs twice", CPU_MMD, "other.grad != nullptr && !diagonal", "other.grad != nullptr", distance("mmd", "every_size")),
    Mutation("mmd cpu: near pairs of the rows alone", CPU_MMD, "to_b[j] += scale * (a[j] - b[j])", "to_b[j] += 0 * (a[j] - b[j])", distance("mmd", "near_samples")),
    Mutation("mmd cpu: a few products of the rows alone", CPU_MMD, "if (grads != nullptr) add_scaled(row[j]", "if (grads != nullptr) add_scaled(S(0)", distance("mmd", "every_size")),
    Mutation("mmd cpu: the last round missed", CPU_MMD, "in_order<S>(rounds * count,", "in_order<S>(rounds * count - count,", distance("mmd", "every_size")),
    Mutation("mmd cpu: a block's first panel alone", CPU_MMD, "p < a.end; ++p", "p < a.begin + 1; ++p", distance("mmd", "every_size")),
    Mutation("mmd cpu: pairs i = i counted", CPU_MMD, "scratch.values[i - first] = scratch.slopes[i - first] = S(0);", "", distance("mmd", "definition")),
    Mutation("mmd cpu: equal is what rounding leaves", CPU_MMD, "std::equal(z, z + sides[0].count * stride, sides[1].z)", "false", distance("features", "exactly_zero and (mmd or energy)")),
    Mutation("mmd cpu: a little less than nothing", CPU_MMD, "!params.unbiased && loss < 0 ? 0 : loss", "loss", distance("mmd", "another_order")),
    Mutation("mmd cpu: mean distance within only", CPU_MMD, "(sums[0] + sums[1] + sums[2]) / 3", "(sums[0] + sums[1]) / 2", distance("mmd", "mean_distance")),
    Mutation("mmd cpu: powers of powers", CPU_MMD, "rate / computed < 4.5", "true", distance("mmd", "are_powers")),
    Mutation("mmd cpu: one squaring too many", CPU_MMD, "close && is(4) ? 2 : 0", "close && is(4) ? 3 : 0", distance("mmd", "are_powers")),
    Mutation("mmd cpu: weights ignored", CPU_MMD, "weight_of(weights[s], sides[s].rows[i]) / totals[s]", "1.0 / static_cast<double>(sides[s].count)", distance("mmd", "definition")),
    Mutation("mmd cpu: one class", CPU_CLASSES, "c + 1 < classes[p].starts.size()", "c < 1", distance("mmd", "classes_are")),
    Mutation("mmd op: buffer handed out twice", OP_NATIVE, "gradients, ctx.gradients = ctx.gradients, None", "gradients = ctx.gradients", distance("features", "backward_twice and mmd")),
    Mutation("mmd triton: zero gradient", TRITON_MMD, "4.0 * (slopes[:, None] * z - grad)", "0.0 * (slopes[:, None] * z - grad)", distance("mmd", "definition and triton")),
    Mutation("mmd triton: zero gradient of products", TRITON_MMD, "of_rows = 2.0 * grad", "of_rows = 0.0 * grad", distance("mmd", "definition and triton")),
    Mutation("mmd triton: sign of the gradient", TRITON_MMD, "(slopes[:, None] * z - grad)", "(grad - slopes[:, None] * z)", distance("mmd", "definition and triton")),
    Mutation("mmd triton: sign of the pairs across", TRITON_MMD, "tl.where(across, -share_i, own_i)", "tl.where(across, share_i, own_i)", distance("mmd", "definition and triton")),
    Mutation("mmd triton: pairs across counted once", TRITON_MMD, "tl.where(of_y, 0.0, -2.0)", "tl.where(of_y, 0.0, -1.0)", distance("mmd", "definition and triton")),
    Mutation("mmd triton: pairs i = i counted", TRITON_MMD, "            weight = tl.where(same, 0.0, weight)\n        if not", "            weight *= 1.0\n        if not", distance("mmd", "definition and triton")),
    Mutation("mmd triton: slopes of pairs i = i", TRITON_MMD, "                weight = tl.where(same, 0.0, weight)\n            c", "                weight *= 1.0\n            c", distance("mmd", "narrow and triton")),
    Mutation("mmd triton: weights ignored", TRITON_MMD, "weight = tl.load(weights_ptr + row, mask=exists, other=0.0)", "weight *= 1.0", distance("mmd", "definition and triton")),
    Mutation("mmd triton: unbiased without its factor", TRITON_MMD, "share * within, mask", "share, mask", distance("mmd", "definition and triton")),
    Mutation("mmd triton: one sample is enough", TRITON_MMD, "(x_count > 1) & (y_count > 1)", "(x_count > 0) & (y_count > 0)", distance("mmd", "needs_two and triton")),
    Mutation("mmd triton: last samples skipped", TRITON_MMD, "there = j < tl.where(across, other_end, end)", "there = j < tl.where(across, other_end, end) - 1", distance("mmd", "every_tile")),
    Mutation("mmd triton: last features skipped", TRITON_SAMPLES, "inside = (column < features)[None, :]", "inside = (column < features - 1)[None, :]", distance("mmd", "every_tile")),
    Mutation("mmd triton: last step alone", TRITON_MMD, "tl.dot(a, tl.trans(b), products,", "tl.dot(a, tl.trans(b), 0.0 * products,", distance("mmd", "every_tile")),
    Mutation("mmd triton: last block of features alone", TRITON_MMD, "grad = tl.dot(c, b, grad,", "grad = tl.dot(c, b, 0.0 * grad,", distance("mmd", "every_tile")),
    Mutation("mmd triton: sums from what memory held", TRITON_MMD, "            _store_rows(sums_ptr, row, exists, feature + f, depth, grad)\n    for step", "            pass\n    for step", distance("mmd", "every_tile")),
    Mutation("mmd triton: halves counted once", TRITON_MMD, "j[None, :] > i[:, None], 2.0", "j[None, :] > i[:, None], 1.0", distance("mmd", "every_tile")),
    Mutation("mmd triton: near pairs not differenced", TRITON_SAMPLES, "NEAR = tl.constexpr(1 / 64)", "NEAR = tl.constexpr(0.0)", distance("mmd", "near_samples and triton")),
    Mutation("mmd triton: near pairs without gradient", TRITON_MMD, "grad -= c * away", "grad -= 0.0 * c * away", distance("mmd", "near_samples and triton")),
    Mutation("mmd triton: the first near pair alone", TRITON_MMD, "q = tl.min(tl.where(hits > q, hits, BLOCK_N), 0)", "q = BLOCK_N", distance("mmd", "near_samples and triton")),
    Mutation("mmd triton: x is not centred", TRITON_SAMPLES, "x - centre, 0.0", "x - 0.0 * centre, 0.0", distance("mmd", "near_samples and triton")),
    Mutation("mmd triton: equal is what rounding leaves", TRITON_MMD, "& (apart != 0)", "& (apart >= 0)", distance("features", "exactly_zero and triton and (mmd or energy)")),
    Mutation("mmd triton: other weights are equal", TRITON_MMD, "(u != v) | (differs != 0)", "differs != 0", distance("mmd", "other_weights and triton")),
    Mutation("mmd triton: a little less than nothing", TRITON_MMD, "loss.clamp_(min=0)", "pass", distance("mmd", "another_order and triton")),
    Mutation("mmd triton: mean distance within only", TRITON_MMD, "if KERNEL == DISTANCE:\n            of_value = share_i", "if KERNEL == DISTANCE:\n            of_value = tl.where(across, 0.0, share_i)", distance("mmd", "mean_distance and triton")),
    Mutation("mmd triton: the first bandwidth alone", TRITON_MMD, "1 if bandwidths.dim() == 2 else len(bandwidths)", "1", distance("mmd", "definition and triton")),
    Mutation("mmd triton: classes mixed", TRITON_MMD, "live = live & (j[None, :] >= class_begin)", "live = live | (j[None, :] >= class_begin)", distance("mmd", "classes_are and triton")),
    Mutation("mmd triton: gradients in the classes' order", TRITON_MMD, "to = tl.load(order_ptr + problem * x_samples + i, mask=exists, other=0)", "to = i.to(tl.int64)", distance("mmd", "classes_are and triton")),
    Mutation("mmd: mean distance has a gradient", OP_MMD, "@torch.no_grad()\ndef _mean_distance", "def _mean_distance", distance("mmd", "mean_distance")),
    Mutation("mmd: what cancels drowns the rest", OP_MMD, "torch.where(squared == 0, 0, grad_output)", "grad_output", distance("mmd", "narrow")),
    Mutation("mmd: second derivative of equal samples", OP_MMD, "if not torch.is_grad_enabled():", "if True:", distance("mmd", "second_derivative")),
    Mutation("mmd: NaN is 0", OP_MMD, "zero = squared == 0", "zero = ~(squared > 0)", distance("mmd", "nan")),
    Mutation("mmd, linear: moved where weights differ", OP_MMD, "0 if weighted else", "", distance("mmd", "definition")),
    Mutation("sliced cpu: zero gradient", CPU_SLICED, "= share * slope;", "= 0 * slope;", distance("sliced_wasserstein", "one_dimension")),
    Mutation("sliced cpu: sign of y's gradient", CPU_SLICED, "= -share * slope;", "= share * slope;", distance("sliced_wasserstein", "one_dimension")),
    Mutation("sliced cpu: a radix pass left out", CPU_SLICED, "for (int pass = 0; pass < kPasses; ++pass) {\n    uint32_t* count", "for (int pass = 1; pass < kPasses; ++pass) {\n    uint32_t* count", distance("sliced_wasserstein", "every_number")),
    Mutation("sliced cpu: minus signs sort upside down", CPU_SLICED, "return bits & kSign ? ~bits : bits | kSign;", "return bits ^ kSign;", distance("sliced_wasserstein", "special or every")),
    Mutation("sliced cpu: weights ignored", CPU_SLICED, "if (weights != nullptr) sum +=", "if (false) sum +=", distance("sliced_wasserstein", "scipy")),
    Mutation("sliced triton: zero gradient", TRITON_SLICED, "grad = slope / n", "grad = 0.0 * slope / n", sliced("one_dimension")),
    Mutation("sliced triton: sign of y's gradient", TRITON_SLICED, "(y & 0xFFFFFFFF)), -grad", "(y & 0xFFFFFFFF)), grad", sliced("one_dimension")),
    Mutation("sliced triton: gradients of other samples", TRITON_SLICED, "(start + (x & 0xFFFFFFFF))", "(start + tl.arange(0, BLOCK_N)[None, :])", sliced("one_dimension")),
    Mutation("sliced triton: last samples skipped", TRITON_SLICED, "inside = exists[:, None] & (tl.arange(0, BLOCK_N)[None, :] < n)", "inside = exists[:, None] & (tl.arange(0, BLOCK_N)[None, :] < n - 1)", sliced("one_dimension")),
    Mutation("sliced triton: minus signs sort upside down", TRITON_SLICED, "bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)", "bits, 0x7FFFFFFF)", sliced("special")),
    Mutation("sliced triton: nothing behind the last sample", TRITON_SLICED, "0x7FFFFFFF)\n    return tl.sort", "0)\n    return tl.sort", sliced("one_dimension")),
    Mutation("sliced triton: merged, zero gradient", TRITON_SLICED, "slope += tl.where(meets, mass * each_slope, 0.0)", "slope += 0.0", sliced("merged")),
    Mutation("sliced triton: merged, order ignored", TRITON_SLICED, "place = tl.load(x_order_ptr + (row * n + i), mask=inside, other=0)\n        tl.store(grad", "place = i\n        tl.store(grad", sliced("merged")),
    Mutation("sliced triton: merged, only the first sample met", TRITON_SLICED, "walks = walks & (low < high) & (j < m)", "walks = walks & (j < 0)", sliced("merged")),
    Mutation("sliced triton: merged, begun too late", TRITON_SLICED, "j = (low * m).to(tl.int32)", "j = (low * m).to(tl.int32) + 1", sliced("merged")),
    Mutation("sliced triton: merged, search that goes too far", TRITON_SLICED, "middle + 1, j)", "middle + 2, j)", sliced("merged")),
    Mutation("sliced triton: merged, weights of the first problem", TRITON_SLICED, "row // projections * n + place", "place", sliced("merged")),
    Mutation("sliced triton: merged, sums begin again", TRITON_SLICED, "before = tl.max(sums, 1)[:, None]", "before = 0.0 * before", sliced("scipy")),
    Mutation("sinkhorn cpu: zero gradient", CPU_SINKHORN, "sign * factor * a[i + r],", "0 * sign * factor * a[i + r],", sinkhorn("cpu", "loss_and")),
    Mutation("sinkhorn cpu: sign of y's gradient", CPU_SINKHORN, "transport_.gradient(true, 1, grad_y", "transport_.gradient(true, -1, grad_y", sinkhorn("cpu", "loss_and")),
    Mutation("sinkhorn cpu: no gradient of OT(x, x)", CPU_SINKHORN, "if (grad_x || grad_a || plan_x) transport_", "if (false) transport_", sinkhorn("cpu", "loss_and")),
    Mutation("sinkhorn cpu: OT(y, y) twice", CPU_SINKHORN, "value -= transport_.solve(y_, y_, extra_y) / 2", "value -= transport_.solve(y_, y_, extra_y)", sinkhorn("cpu", "loss_and")),
    Mutation("sinkhorn cpu: last feature skipped", CPU_SINKHORN, "for (int64_t k = 0; k < d; ++k) {\n          const", "for (int64_t k = 0; k < d - 1; ++k) {\n          const", sinkhorn("cpu", "loss_and")),
    Mutation("sinkhorn cpu: the last features' gradient", CPU_SINKHORN, "whole + k < d ? points[j * d + whole + k]", "whole + k < d - 1 ? points[j * d + whole + k]", sinkhorn("cpu", "number_of_features")),
    Mutation("sinkhorn cpu: scalings not absorbed", CPU_SINKHORN, "if (!safe(u, n) || (!symmetric_ && !safe(v, m))) {", "if (false) {", sinkhorn("cpu", "small_epsilon or far")),
    Mutation("sinkhorn cpu: columns not absorbed", CPU_SINKHORN, "absorb(v_.data(), epsilon, columns_->count, G_.data());", "", sinkhorn("cpu", "loss_and")),
    Mutation("sinkhorn cpu: the unbalanced step", CPU_SINKHORN, "T exponent = step.average ? T(0.5) * (log_u + log_of(u)) : log_u;", "T exponent = step.average ? T(0.5) * (log_u + log_of(u)) : T(0.9) * log_u;", sinkhorn("cpu", "weights")),
    Mutation("sinkhorn cpu: weights' gradient without the excess", CPU_SINKHORN, "static_cast<T>(potential[i + r] - excess)", "static_cast<T>(potential[i + r] - 0 * excess)", sinkhorn("cpu", "weights")),
    Mutation("sinkhorn cpu: extra costs ignored", CPU_SINKHORN, "if (with_extra && extra_ != nullptr) {", "if (false) {", sinkhorn("cpu", "extra_cost")),
    Mutation("sinkhorn cpu: extra costs not those of the columns", CPU_SINKHORN, "copy[j] = extra_[j * columns_->count + i + r];", "copy[j] = extra_[(i + r) * columns_->count + j];", sinkhorn("", "larger_than")),
    Mutation("sinkhorn cpu: extra costs taken for equal", CPU_SINKHORN, "(extra == nullptr || std::equal(extra, extra + n * n, other))", "true", sinkhorn("cpu", "equal_extra")),
    Mutation("sinkhorn cpu: what is not finite unnoticed", CPU_SINKHORN, "return zero == 0 ? largest :", "return true ? largest :", sinkhorn("cpu", "finite_shows")),
    Mutation("sinkhorn cpu: a side without mass", CPU_SINKHORN, "if (rows.mass > 0 && columns.mass > 0) {", "if (true) {", sinkhorn("cpu", "without_mass")),
    Mutation("sinkhorn cpu: tol ignored", CPU_SINKHORN, "if (change <= params_.tol) break;", "", sinkhorn("cpu", "tol")),
    Mutation("sinkhorn cuda: zero gradient", CUDA_SINKHORN, "= scale * weights[i] * value;", "= 0 * scale * weights[i] * value;", sinkhorn("cuda", "loss_and")),
    Mutation("sinkhorn cuda: sign of y's gradient", CUDA_SINKHORN, "factor, true, 1.0f, masses[0]", "factor, true, -1.0f, masses[0]", sinkhorn("cuda", "loss_and")),
    Mutation("sinkhorn cuda: no gradient of OT(x, x)", CUDA_SINKHORN, "static_cast<float*>(grad)[i] += part[i];", "static_cast<float*>(grad)[i] += 0 * part[i];", sinkhorn("cuda", "loss_and")),
    Mutation("sinkhorn cuda: last feature skipped", CUDA_SINKHORN, "begin + k < depth ? b(", "begin + k < depth - 1 ? b(", sinkhorn("cuda", "loss_and")),
    Mutation("sinkhorn cuda: a barrier missing", CUDA_SINKHORN, "factor);\n    __syncthreads();\n    if (!symmetric) {", "factor);\n    if (!symmetric) {", "tests/test_cuda_on_cpu.py -k sinkhorn"),
    Mutation("sinkhorn cuda: scalings not absorbed", CUDA_SINKHORN, "if (flags[0] != 0) {", "if (false) {", sinkhorn("cuda", "small_epsilon or far")),
    Mutation("sinkhorn cuda: kernel values not made again", CUDA_SINKHORN, "if (stale) make_kernel();\n    stale", "if (k == 0) make_kernel();\n    stale", sinkhorn("cuda", "loss_and")),
    Mutation("sinkhorn cuda: weights' gradient without the excess", CUDA_SINKHORN, "params.epsilon * (s[0] - mass)", "0 * (s[0] - mass)", sinkhorn("cuda", "weights")),
    Mutation("sinkhorn cuda: extra costs ignored", CUDA_SINKHORN, "if (extra != nullptr) cost +=", "if (false) cost +=", sinkhorn("cuda", "extra_cost")),
    Mutation("sinkhorn cuda: extra costs taken for equal", CUDA_SINKHORN, "if (params.extra != nullptr) {", "if (false) {", sinkhorn("cuda", "equal_extra")),
    Mutation("sinkhorn cuda: what is not finite unnoticed", CUDA_SINKHORN, "fabsf(cost) < INFINITY ?", "true ?", sinkhorn("cuda", "finite_shows")),
    Mutation("sinkhorn cuda: a side without mass", CUDA_SINKHORN, "masses[0] == 0 || masses[1] == 0 ? 0 :", "false ? 0 :", sinkhorn("cuda", "without_mass")),
    Mutation("sinkhorn cuda: tol ignored", CUDA_SINKHORN, "if (look && flags[1] * epsilon <= params.tol) break;", "", sinkhorn("cuda", "tol")),
    Mutation("sinkhorn triton: zero gradient", TRITON_SINKHORN, "grad *= (weight *", "grad *= 0.0 * (weight *", sinkhorn("triton", "loss_and")),
    Mutation("sinkhorn triton: sign of y's gradient", TRITON_SINKHORN, "tl.store(to, grad, mask=inside & of_y)", "tl.store(to, -grad, mask=inside & of_y)", sinkhorn("triton", "loss_and")),
    Mutation("sinkhorn triton: no gradient of OT(x, x)", TRITON_SINKHORN, "c = tl.where(own != 0, -c, c)", "c = tl.where(own != 0, 0.0, c)", sinkhorn("triton", "loss_and")),
    Mutation("sinkhorn triton: OT(y, y) twice", TRITON_SINKHORN, "value -= tl.where(own != 0, -0.5 * excess", "value -= tl.where(own != 0, -1.0 * excess", sinkhorn("", "blocks_of_triton")),
    Mutation("sinkhorn triton: last feature skipped", TRITON_SINKHORN, "(feature < features)[None, :]", "(feature < features - 1)[None, :]", sinkhorn("triton", "loss_and")),
    Mutation("sinkhorn triton: features of the first block alone", TRITON_SINKHORN, "feature = tl.program_id(1) * BLOCK_D", "feature = 0 * BLOCK_D", sinkhorn("", "blocks_of_triton")),
    Mutation("sinkhorn triton: last sample skipped", TRITON_SINKHORN, "there = j < columns", "there = j < columns - 1", sinkhorn("triton", "loss_and")),
    Mutation("sinkhorn triton: sums on different scales", TRITON_SINKHORN, "total * tl.exp2(largest - top[:, None])", "total", sinkhorn("", "blocks_of_triton")),
    Mutation("sinkhorn triton: near samples from products", TRITON_SINKHORN, "q = tl.min(hits, 0)\n", "q = BLOCK_N\n", sinkhorn("triton", "differenced")),
    Mutation("sinkhorn triton: epsilon not lowered", TRITON_SINKHORN, "above = (k < iterations) & (scale >", "above = (k < 0) & (scale >", sinkhorn("triton", "loss_and")),
    Mutation("sinkhorn triton: never alternating", TRITON_SINKHORN, "(own == 0) & (k >= ", "(own == 1) & (k >= ", sinkhorn("triton", "alternating")),
    Mutation("sinkhorn triton: g of the old f", TRITON_SINKHORN, "source = tl.where(alternating & of_y, new, old)", "source = old", sinkhorn("triton", "alternating")),
    Mutation("sinkhorn triton: the unbalanced step", TRITON_SINKHORN, "1.0, rho / (rho + scale))", "1.0, 0.9 * rho / (rho + scale))", sinkhorn("triton", "weights")),
    Mutation("sinkhorn triton: masses not those of reach", TRITON_SINKHORN, "return tl.where(rho == float(\"inf\"), potential,", "return tl.where(rho >= 0.0, potential,", sinkhorn("triton", "weights")),
    Mutation("sinkhorn triton: weights' gradient without the excess", TRITON_SINKHORN, "of_weight -= tl.where(own != 0, -excess, excess)", "of_weight -= 0.0 * excess", sinkhorn("triton", "weights")),
    Mutation("sinkhorn triton: extra costs ignored", TRITON_SINKHORN, "if extra_ptr is not None:\n", "if extra_ptr is None:\n", sinkhorn("triton", "extra_cost")),
    Mutation("sinkhorn triton: extra costs not those of the columns", TRITON_SINKHORN, "across = of_y & (own == 0)", "across = of_y & (own == 2)", sinkhorn("triton", "extra_cost")),
    Mutation("sinkhorn triton: extra costs taken for equal", TRITON_SINKHORN, "for more in extra[1:]:", "for more in extra[:0]:", sinkhorn("triton", "equal_extra")),
    Mutation("sinkhorn triton: equal batches unnoticed", TRITON_SINKHORN, "if debias and n == m:", "if False:", sinkhorn("triton", "equal_batches")),
    Mutation("sinkhorn triton: weights taken for equal", TRITON_SINKHORN, "differs.any(1) | (a != b).any(1)", "differs.any(1)", sinkhorn("triton", "equal_batches")),
    Mutation("sinkhorn triton: what is not finite unnoticed", TRITON_SINKHORN, "same | (distance < 0.0)", "same | ((distance >= 0.0) == 0)", sinkhorn("triton", "finite_shows")),
    Mutation("sinkhorn triton: costs that overflow unnoticed", TRITON_SINKHORN, "scale = tl.where(top < float(\"inf\"), scale, float(\"nan\"))", "scale *= 1.0", sinkhorn("triton", "overflow")),
    Mutation("sinkhorn triton: a side without mass", TRITON_SINKHORN, "there = (a > 0.0) & (b > 0.0)", "there = True", sinkhorn("triton", "without_mass")),
    Mutation("sinkhorn triton: f and g not level", TRITON_SINKHORN, "0.5 * (of_g - of_f), 0.0)", "0.0 * (of_g - of_f), 0.0)", sinkhorn("triton", "test_potentials")),
    Mutation("sinkhorn triton: tol ignored", TRITON_SINKHORN, "moving = 1\n    if moving_ptr is not None:", "moving = 1\n    if moving_ptr is None:", sinkhorn("triton", "tol")),
    Mutation("sinkhorn triton: stopped at the first look", TRITON_SINKHORN, "tl.abs(change) <= tol", "tl.abs(change) <= 1e9 * tol", sinkhorn("triton", "tol")),
    Mutation("sinkhorn: a named backend replaced where it does not fit", OP_SINKHORN, 'if backend == "cuda":\n', 'if False:\n', sinkhorn("cuda", "fit_into")),
    Mutation("sinkhorn: reach ignored", OP_SINKHORN, "softmin if rho == math.inf else rho / (rho + epsilon) * softmin", "softmin", sinkhorn("reference", "independent or masses")),
    Mutation("sinkhorn: masses' difference not charged", OP_SINKHORN, "0.5 * float(epsilon) * (mass - other)", "0.0 * (mass - other)", sinkhorn("reference", "masses")),
    Mutation("sinkhorn: half the gradient", OP_SINKHORN, '(2 if cost == "sqeuclidean" else 1) * (plan', "1 * (plan", sinkhorn("reference", "gradcheck")),
    Mutation("sinkhorn: second derivatives with the potentials held", OP_SINKHORN, "f, g = _Implicit.apply(*through[0], f, g, epsilon, rho)", "pass", sinkhorn("reference", "gradcheck")),
    Mutation("sinkhorn: upstream gradient ignored", OP_SINKHORN, "found.append(gradient * grad_output.view(", "found.append(gradient + 0 * grad_output.view(", sinkhorn("cpu", "twice")),
    Mutation("sinkhorn: plans' factors", OP_SINKHORN, "(1.0, -0.5, -0.5)", "(1.0, -1.0, -1.0)", sinkhorn("reference", "gradcheck_of_extra")),
    Mutation("sinkhorn: one step from the level's potentials", OP_SINKHORN, "return f + shift, g - shift", "return f + shift, g", sinkhorn("reference", "independent")),
    Mutation("sinkhorn: plan without a's weights", OP_SINKHORN, "out[:, block] = a[:, block, None] * (weights @ v)", "out[:, block] = weights @ v", sinkhorn("reference", "apply_plan")),
    Mutation("sinkhorn: all classes' weights", OP_SINKHORN, "weights if reach is None or given is not None else proportions(weights, each)", "weights", sinkhorn("reference", "labels_are")),
    Mutation("wasserstein: one coupling for all", OP_WASSERSTEIN, "i, j = solver.linear_sum_assignment(c)", "i, j = np.arange(len(c)), np.arange(len(c))", "tests/test_wasserstein.py -k brute"),
    Mutation("wasserstein: labels cost nothing", OP_WASSERSTEIN, "(of_features + label_weight * of_labels)", "of_features", "tests/test_wasserstein.py -k joint"),
    Mutation("joint: distances within x", OP_WASSERSTEIN, "    cost = distances(x, y, p)\n    scale", "    cost = distances(x, x, p)\n    scale", "tests/test_wasserstein.py -k joint"),
    Mutation("linear: logits that nothing needs", LINEAR, "if spec.divergence == NONE and not (spec.hard", "if False and not (spec.hard", linear("cpu", "no_logits", op="shared_classifier_loss")),
    Mutation("anchor: sign of the gradient", "kdkernels/ops/anchor_penalty.py", "differences, 2 * grad_output", "differences, -2 * grad_output", "tests/test_anchor_penalty.py"),
    Mutation("anchor: min_dim ignored", "kdkernels/ops/anchor_penalty.py", "for theta, anchor in zip(*every) if theta.dim() >= min_dim", "for theta, anchor in zip(*every)", "tests/test_anchor_penalty.py"),
    Mutation("masked: M not squared", "kdkernels/ops/masked_feature_loss.py", "masks.square()).sum(1)", "masks).sum(1)", "tests/test_masked_feature_loss.py"),
    Mutation("masked cpu: last positions skipped", "csrc/cpu/masked_feature_loss.cpp", "std::min(kBlock, positions - begin)", "std::min(kBlock, positions - 1 - begin)", "tests/test_masked_feature_loss.py"),
    Mutation("masked triton: zero gradient", TRITON_MASKED, "2.0 * weight[None, :] * difference", "0.0 * weight[None, :] * difference", masked("triton")),
    Mutation("masked triton: sign of the gradient", TRITON_MASKED, "difference = s - t", "difference = t - s", masked("triton")),
    Mutation("masked triton: weights missing in the gradient", TRITON_MASKED, "2.0 * weight[None, :] * difference", "2.0 * difference", masked("triton")),
    Mutation("masked triton: weights missing in the loss", TRITON_MASKED, "tl.sum(weight * total, 0)", "tl.sum(total, 0)", masked("triton")),
    Mutation("masked triton: last positions skipped", TRITON_MASKED, "exists = position < positions", "exists = position < positions - 1", masked("triton")),
    Mutation("masked triton: last channel skipped", TRITON_MASKED, "(channel < channels)[:, None]", "(channel < channels - 1)[:, None]", masked("triton")),
    Mutation("masked triton: pieces not added", TRITON_MASKED, "torch.sum(maps, 0, out=squares)", "squares.copy_(maps[0])", masked("triton")),
    Mutation("masked: float16's gradients rounded before a loss scale", "kdkernels/ops/masked_feature_loss.py", "scaled = student.dtype == torch.float16\n", "scaled = False\n", "tests/test_masked_feature_loss.py -k loss_scale"),
    Mutation("masked: buffer handed out twice", "kdkernels/ops/masked_feature_loss.py", "gradients, ctx.gradients = ctx.gradients, None", "gradients = list(ctx.gradients)", "tests/test_masked_feature_loss.py -k twice"),
    Mutation("masked cpu: half the gradient", "csrc/cpu/masked_feature_loss.cpp", "= 2 * weights[j] *", "= weights[j] *", "tests/test_masked_feature_loss.py"),
    Mutation("methods kd: hard weight on the soft term", f"{METHODS}/kd.py", "return self.soft_weight", "return self.hard_weight", method("logit_methods", "test_kd")),
    Mutation("methods dkd: warm-up counted from 0", f"{METHODS}/dkd.py", "epoch / self.warmup", "(epoch - 1) / self.warmup", method("logit_methods", "test_dkd")),
    Mutation("methods ctkd: temperature not reversed", f"{METHODS}/ctkd.py", "self.learned(self.strength)", "self.learned(-self.strength)", method("logit_methods", "ctkd")),
    Mutation("methods ctkd: an epoch late", f"{METHODS}/ctkd.py", "cosine_reversal(epoch, self", "cosine_reversal(epoch - 1, self", method("logit_methods", "ctkd")),
    Mutation("methods ctkd: theta not trained", f"{METHODS}/ctkd.py", ", *self.learned.parameters()]", "]", method("logit_methods", "ctkd")),
    Mutation("methods rco: last anchor always", f"{METHODS}/rco.py", "(epoch - 1) * len(self.anchors) // epochs", "len(self.anchors)", method("logit_methods", "rco")),
    Mutation("methods rco: anchors not looked at", f"{METHODS}/rco.py", 'check_fit(self.teacher, anchor, f"{name} is not of this teacher")', "None", method("logit_methods", "rco")),
    Mutation("methods takd: element mean ignored", f"{METHODS}/takd.py", "(self._student.classes if self.element_mean else 1)", "1", method("logit_methods", "takd")),
    Mutation("methods dgkd: no T²", f"{METHODS}/dgkd.py", "self.soft_weight * self.temperature**2", "self.soft_weight", method("logit_methods", "dgkd")),
    Mutation("methods dgkd: drops in evaluation too", f"{METHODS}/dgkd.py", "if not (self.training and self.drop)", "if not self.drop", method("logit_methods", "dgkd")),
    Mutation("methods maskd: masks not frozen", f"{METHODS}/maskd.py", "self.tokens.requires_grad_(False)", "None", method("feature_methods", "maskd")),
    Mutation("methods maskd: a mask is like itself", f"{METHODS}/maskd.py", "dice.sum((1, 2)) - dice.diagonal(dim1=1, dim2=2).sum(1)", "dice.sum((1, 2))", method("feature_methods", "maskd")),
    Mutation("methods maskd: masks on every call", f"{METHODS}/maskd.py", "if calls < self._teacher.map_calls:", "if False:", method("feature_methods", "maskd")),
    Mutation("methods mgd: a mean, no sum", f"{METHODS}/mgd.py", "self.weight * y.shape[1:].numel() * mse", "self.weight * mse", method("feature_methods", "mgd")),
    Mutation("methods mgd: kept scaled up", f"{METHODS}/mgd.py", "self.generation(x * kept)", "self.generation(x * kept / (1 - self.drop))", method("feature_methods", "mgd")),
    Mutation("methods mgd: drops what it should keep", f"{METHODS}/mgd.py", ">= self.drop", "< self.drop", method("feature_methods", "mgd")),
    Mutation("methods kd2m: labels not gathered", f"{METHODS}/kd2m.py", "self.gather(torch.cat([labels, guesses]))", "torch.cat([labels, guesses])", method("feature_methods", "gathers")),
    Mutation("methods kd2m: float64 lost", f"{METHODS}/kd2m.py", "torch.promote_types(x.dtype, torch.float32)", "torch.float32", method("feature_methods", "kd2m and w2")),
    Mutation("methods kd2m: joint cost not normalized", f"{METHODS}/kd2m.py", '{"normalize": True, **o}', "o", method("feature_methods", "joint")),
    Mutation("methods srrl: connector after pooling", f"{METHODS}/srrl.py", "if self.pools_first else x)", "if True else x)", method("feature_methods", "srrl")),
    Mutation("methods srrl: maps compared", f"{METHODS}/srrl.py", "teacher.features.to", "teacher.logits.to", method("feature_methods", "srrl")),
    Mutation("methods simkd: student's classifier", f"{METHODS}/simkd.py", "        weight, bias = network.classifier_as(connected)", "        network = self._student\n        weight, bias = network.classifier_as(connected)", method("shared_head_methods", "ijckd and equal")),
    Mutation("methods simkd: unused classifier trained", f"{METHODS}/simkd.py", "if id(p) not in unused]", "]", method("shared_head_methods", "simkd")),
    Mutation("methods shared head: labels of some ignored", f"{METHODS}/simkd.py", "if self.hard_weight and not labelled:", "if False:", method("shared_head_methods", "ijckd")),
    Mutation("methods ijckd: no logits", f"{METHODS}/ijckd.py", "logit_weight: float = 1.0", "logit_weight: float = 0.0", method("shared_head_methods", "ijckd")),
    Mutation("methods ijckd: monitor through the student's classifier", f"{METHODS}/ijckd.py", "logits = classify(connected, self._teacher.classifier)", "logits = student.logits", method("shared_head_methods", "monitor")),
    Mutation("methods atsc: teacher detached", f"{METHODS}/atsc.py", "network(images).map, network, labels", "network(images).map.detach(), network, labels", method("shared_head_methods", "atsc")),
    Mutation("methods atsc: no anchor", f"{METHODS}/atsc.py", "Output(output.loss + anchor, terms", "Output(output.loss, terms", method("shared_head_methods", "atsc")),
    Mutation("methods atsc: anchor holds biases", f"{METHODS}/atsc.py", "min_dim=anchor_min_dim", "min_dim=0", method("shared_head_methods", "atsc")),
    Mutation("calls: upstream gradient left out", CALLS, "scale_in_place(gradient, scale);", "", calls("equal")),
    Mutation("calls: one upstream gradient for all rows", CALLS, "upstream.dim() == 0 ? 0 : upstream.stride(0)", "0", calls("equal")),
    Mutation("calls: gradients handed out twice", CALLS, "      at_hand = false;\n", "", calls("equal")),
    Mutation("calls: inputs kept when the graph is freed", CALLS, "override { inputs.clear(); }", "override {}", calls("freed")),
    Mutation("calls: no upstream gradient", CALLS, "grads[0].defined() ? grads[0] : input_metadata(0).zeros_like()", "grads[0]", calls("freed")),
    Mutation("calls: no graph of a gradient", CALLS, "at_hand && !at::GradMode::is_enabled()", "at_hand", calls("double")),
    Mutation("calls: gradients of the sides exchanged", CALLS, "std::swap(params.grad_input, params.grad_target);", "", calls("equal")),
    Mutation("calls: temperatures exchanged", CALLS, "std::swap(params.input_temperature_value, params.target_temperature_value);", "", calls("equal")),
    Mutation("calls: a sum for a mean", CALLS, "reduction == Reduction::kBatchmean ? 1.0 /", "false ? 1.0 /", calls("equal")),
    Mutation("calls: T squared missing", CALLS, "if (values[6] != 0) {", "if (false) {", calls("equal")),
    Mutation("calls: one class of two for a distribution", CALLS, "of_labels() && classes == 2 ? 0.0 : values[2]", "values[2]", calls("two_classes")),
    Mutation("calls: ignored rows counted", CALLS, "rows, ignore_index) == 0", "rows, ignore_index) >= 0", calls("two_classes")),
    Mutation("calls: modes not seen", CALLS, "(keys.raw_repr() & ~known) == 0", "true", calls("left_to_python")),
    Mutation("calls: rows taken for adjacent", CALLS, "return Matrix{rows, classes, x.stride(0)};", "return Matrix{rows, classes, classes};", calls("rows_apart")),
    Mutation("calls: samples taken for adjacent", CALLS, "return Problems{1, samples, 0, x.stride(0)};", "return Problems{1, samples, 0, x.size(1)};", calls("rows_apart")),
    Mutation("calls: the teacher's gradient dropped", CALLS, "(graph && spec->reads_target() && teacher->requires_grad())", "false", calls("left_to_python")),
    Mutation("calls: classes not handed on", CALLS, "static_cast<const int64_t*>(address(labels))", "nullptr", calls("equal and classes")),
    Mutation("calls: strides of dimensions of one", CALLS, "samples * x.size(-1), x.size(-1)};", "x.stride(-3), x.stride(-2)};", calls("dimension_of_one")),
    Mutation("calls: an upstream gradient as its memory has it", CALLS, "upstream.resolve_neg()", "upstream", calls("negative")),
    Mutation("calls: a teacher kept that is not read", CALLS, "finish({*student, target,", "finish({*student, *teacher,", calls("not_read")),
    Mutation("calls: autocast in a later backward", "kdkernels/ops/calls.py", "with torch.enable_grad(), full_precision(grad_output):", "with torch.enable_grad():", calls("precision")),
    Mutation("calls: frozen leaves", "kdkernels/ops/calls.py", "            if not twice:\n", "            if False:\n", calls("frozen")),
    Mutation("calls: gradients made without need", CALLS, "const bool graph = at::GradMode::is_enabled();", "const bool graph = true;", calls("made")),
    Mutation("calls: float16 gradients of distances", CALLS, "(*dtype == DType::kFloat16 && (needs[0] || needs[1]))", "false", calls("equal")),
    Mutation("calls: every teacher the first", CALLS, "PySequence_Fast_GET_ITEM(args[1], k)", "PySequence_Fast_GET_ITEM(args[1], 0)", calls("equal and several")),
    Mutation("calls: one temperature for all teachers", CALLS, "values[k] = *value;", "values[k] = k ? values[0] : *value;", calls("equal and several")),
    Mutation("calls: teachers' mean missing", CALLS, "params.weight_values[k] *= scale;", "", calls("equal and several")),
    Mutation("calls: a teacher's side as the student's", CALLS, "const auto exchanged = Spec::of(args[7])", "const auto exchanged = Spec::of(args[8])", calls("linear")),
    Mutation("calls: a teacher's temperatures not exchanged", CALLS, "exchanged->params(classes, *p_temperature, *q_temperature)", "exchanged->params(classes, *q_temperature, *p_temperature)", calls("linear")),
    Mutation("calls: T squared of the teacher's", CALLS, "params.losses[1].soft_scale_value = params.losses[0].soft_scale_value;", "", calls("linear")),
    Mutation("calls: gradients in other places", CALLS, "node->places.push_back(static_cast<int>(i));", "node->places.push_back(static_cast<int>(node->places.size()));", calls("linear")),
    Mutation("calls: one head as two", CALLS, "(args[1] == args[4] && args[2] == args[5])", "false", calls("linear")),
    Mutation("calls: biases of any length", CALLS, "bias.numel() == weight.rows", "bias.numel() > 0", calls("linear")),
    Mutation("calls: a reference kept", CALLS, "  Py_INCREF(again);\n", "  Py_INCREF(again), Py_INCREF(again);\n", calls("stays")),
    Mutation("calls: options of the first kernel", CALLS, "*unbiased != 0};", "false};", calls("equal")),
    Mutation("calls: hooks of inputs run twice", "kdkernels/ops/calls.py", "[x if x is None else x.view_as(x) if twice else x.detach() for x in inputs]", "list(inputs)", calls("hooks")),
    Mutation("calls: no gradient through the gradient", "kdkernels/ops/calls.py", "create_graph=twice", "create_graph=False", calls("double")),
    Mutation("methods atsc: upkeep of the weight too", f"{METHODS}/atsc.py", 'return biases if self.head_update == "bias" else', "return", method("shared_head_methods", "upkeep")),
    Mutation("methods atsc: sum over teachers", f"{METHODS}/atsc.py", "torch.stack(losses).mean(),", "torch.stack(losses).sum(),", method("shared_head_methods", "several")),
    Mutation("methods: teacher in training mode", f"{METHODS}/method.py", "            teacher.eval()\n        return self", "            pass\n        return self", method("methods", "stays")),
    Mutation("methods: teacher not frozen", f"{METHODS}/method.py", "teacher.requires_grad_(False).eval()", "teacher.eval()", method("methods", "stays")),
    Mutation("methods: names of the first teacher alone", f"{METHODS}/method.py", 'Network(teacher, "teacher", **self._names)', 'Network(teacher, "teacher", **(self._names if not hasattr(self, "_teacher") else {}))', method("methods", "named")),
    Mutation("methods: hooks keep a graph", f"{METHODS}/network.py", "        self.kept.clear()\n        return last", "        return last", method("network", "kept")),
    Mutation("methods: looked at in training mode", f"{METHODS}/network.py", "            module.training = False", "            pass", method("network", "finds")),
    Mutation("methods: changed logits taken for the classifier's", f"{METHODS}/network.py", "if self.ends_in_classifier is False:", "if False:", method("shared_head_methods", "behind")),
    Mutation("deployable: no copy", f"{METHODS}/deployable.py", "without_hooks(copy.deepcopy(student))", "without_hooks(student)", method("methods", "deployed")),
    Mutation("deployable: unused classifier kept", f"{METHODS}/deployable.py", "setattr(self.student.get_submodule(parent), child, nn.Identity())", "None", method("deployable", "cost")),
    Mutation("deployable: precision of the new student", f"{METHODS}/deployable.py", "value.data = value.data.to(tensors[name].dtype)", "None", method("deployable", "round")),
    Mutation("deployable: pooled features where the map is unknown", f"{METHODS}/network.py", "if self.has_map is None:\n            raise", "if False:\n            raise", method("deployable", "saw_no")),
]  # fmt: skip


def shell(command: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(cwd), **extra}
    return subprocess.run(command, shell=True, cwd=cwd, env=environment, capture_output=True, text=True)


def main(word: str = "") -> int:
    survivors = 0
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory) / "tree"
        files = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
        for name in files.splitlines():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
        build = f"{sys.executable} setup.py -q build_ext --inplace"
        native = shell(build, tree, KDKERNELS_CUDA="0")
        if native.returncode:
            raise SystemExit(native.stderr)
        stale = False  # whether the native module is that of the break before
        for mutation in MUTATIONS:
            if word not in mutation.name:
                continue
            path = tree / mutation.file
            text = path.read_text()
            if mutation.old not in text:
                raise SystemExit(f"{mutation.name}: {mutation.file} no longer holds {mutation.old!r}")
            path.write_text(text.replace(mutation.old, mutation.new))
            rebuild = mutation.file.startswith(("csrc", "python")) and "csrc/cuda" not in mutation.file
            if rebuild or stale:
                shell(build, tree, KDKERNELS_CUDA="0")
            stale = rebuild
            done = shell(f"{sys.executable} -m pytest -x -q -p no:cacheprovider {mutation.tests}", tree)
            # 1: tests failed. Anything else (no test chosen, a crash) proves nothing of the tests.
            noticed = done.returncode == 1
            survivors += not noticed
            verdict = "noticed" if noticed else f"SURVIVED (pytest {done.returncode})"
            print(f"{verdict:10} {mutation.name}", flush=True)
            path.write_text(text)
    print(f"{survivors} survived")
    return min(survivors, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
