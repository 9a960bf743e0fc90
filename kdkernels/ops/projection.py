"""The matrix products of a loss whose logits are formed chunk by chunk: features times a head, and their gradients.

    logits        (c, N) = x (c, D) Wᵀ + b      in float32 (float64 for float64) whatever the inputs are
    grad_x        (c, D) = G (c, N) W
    grad_weight   (N, D) += Gᵀ x

Rounding logits to bfloat16 costs 5 to 14 % of the gradient as the student nears the teacher, and casting them up
afterwards recovers nothing; so half-precision products are summed, and left, in float32. The products themselves are
torch's, except that of two bfloat16 matrices into float32 on a CPU, which torch does not have
(csrc/cpu/bf16_linear.cpp).

On the CPU, float32 products go through oneDNN where torch has it: its AVX-512 kernels are up to twice as fast on AMD
processors as those of the BLAS behind `torch.mm`, MKL, which on Intel's are a tenth faster, and stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdkernels.backend import bf16_linear, has_bf16_linear, has_fast_blas, statistics_dtype
from kdkernels.ops.rows import as_matrix

# Elements of a tile of grad_weight, or of a head that is cast up: 4 MiB of float32 stay in the cache between the
# product that makes them and the sum that takes them (1024 to 8192 classes of 512 features measured alike).
TILE = 1 << 20
# So many roundings of a bfloat16 sum are still 0.5 % of it.
FEW_CHUNKS = 8


def native_half(x: Tensor) -> bool:
    """Whether half-precision products run at half precision's speed where `x` is; else they are cast up."""
    if x.device.type != "cpu":
        return True
    return x.dtype == torch.bfloat16 and has_bf16_linear()


def fast_products(x: Tensor) -> bool:
    """Whether the products here are faster than those that a small loss's one native call has inside."""
    if x.dtype == torch.bfloat16:
        return native_half(x)
    return x.dtype != torch.float16 and has_fast_blas()


def gradient_dtype(x: Tensor) -> torch.dtype:
    """What the gradient of the logits is held in."""
    return x.dtype if native_half(x) and x.dtype != torch.float16 else statistics_dtype(x.dtype)


def sum_dtype(x: Tensor, chunks: int) -> torch.dtype:
    """What the gradients of features and head are summed in.

    float16 has no range to spare: its gradients stay in float32 until they meet the upstream gradient, which may be a
    loss scale.
    """
    if x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and chunks > FEW_CHUNKS):
        return torch.float32
    return x.dtype


_LINEAR = torch.ops.mkldnn._linear_pointwise if hasattr(torch.ops.mkldnn, "_linear_pointwise") else None
# Multiplications from which on oneDNN's 20 microseconds of setting up are less than what it saves (measured on Zen 5).
_LARGE = 1 << 20


def _onednn(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN makes a bᵀ."""
    return (
        _LINEAR is not None
        and a.dtype == torch.float32
        and a.device.type == "cpu"
        and a.numel() * b.shape[0] >= _LARGE
        and not has_fast_blas()
        and torch._C._get_mkldnn_enabled()
    )


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:  # (m, k), (n, k) -> (m, n)
    """a bᵀ + bias in the dtype of both."""
    if _onednn(a, b):
        assert _LINEAR is not None
        # oneDNN takes a bias for contiguous, whatever its stride.
        product: Tensor = _LINEAR(a, b, None if bias is None else bias.contiguous(), "none", [], "")
        return product
    return torch.mm(a, b.T) if bias is None else torch.addmm(bias, a, b.T)


def _tiles(weight: Tensor) -> list[slice]:
    elements = TILE if weight.device.type == "cpu" else 64 * TILE  # a launch is worth more
    step = max(16, elements // max(weight.shape[1], 1))
    return [slice(begin, begin + step) for begin in range(0, weight.shape[0], step)]


def logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # (c, D), (N, D), (N,) -> (c, N)
    dtype = statistics_dtype(x.dtype)
    if x.dtype == dtype:
        return _product(x, weight, bias)
    if x.device.type == "cpu" and native_half(x):
        out = torch.empty(x.shape[0], weight.shape[0], dtype=dtype)
        bias = None if bias is None else bias.contiguous()
        bf16_linear(as_matrix(x), as_matrix(weight), bias, out)
        return out
    if x.device.type == "cuda" and hasattr(torch.ops.aten.mm, "dtype"):  # torch 2.8
        out = torch.mm(x, weight.T, out_dtype=dtype)
        return out if bias is None else out.add_(bias)
    x, out = x.to(dtype), torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)
    for tile in _tiles(weight):
        out[:, tile] = _product(x, weight[tile].to(dtype), None if bias is None else bias[tile].to(dtype))
    return out


def grad_features(grad: Tensor, weight: Tensor) -> Tensor:  # (c, N), (N, D) -> (c, D) in grad's dtype
    if grad.dtype == weight.dtype:
        return _product(grad, weight.T)
    out = torch.zeros(grad.shape[0], weight.shape[1], dtype=grad.dtype, device=grad.device)
    for tile in _tiles(weight):
        out += _product(grad[:, tile], weight[tile].to(grad.dtype).T)
    return out


def add_grad_weight_(sums: Tensor, grad: Tensor, x: Tensor, first: bool) -> None:
    """sums (N, D) += grad (c, N)ᵀ x (c, D), or = where it is the first."""
    x, grad = x.to(grad.dtype), grad.T
    if grad.dtype == sums.dtype and not _onednn(grad, x.T):
        if first:
            torch.mm(grad, x, out=sums)
        else:
            sums.addmm_(grad, x)
        return
    for tile in _tiles(sums):
        product = _product(grad[tile], x.T)
        if first:
            sums[tile] = product
        else:
            sums[tile] += product
