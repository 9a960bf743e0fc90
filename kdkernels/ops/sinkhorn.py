r"""Entropic optimal transport of two batches of features, and the Sinkhorn divergence (Genevay et al., 1706.00292).

For weights a, b and costs C_ij of the pairs, with ε > 0 (and ρ = ∞ unless the transport is unbalanced):

    OT(x, y) = min_γ  Σ γ C + ε KL(γ | a⊗b) + ρ KL(γ 1 | a) + ρ KL(γᵀ1 | b)
             = max_fg Σ_i a_i φ(f_i) + Σ_j b_j φ(g_j) - ε Σ_ij a_i b_j (e^((f_i + g_j - C_ij) / ε) - 1)
    φ(t) = t, or ρ (1 - e^(-t/ρ));     γ_ij = a_i b_j e^((f_i + g_j - C_ij) / ε)
    S(x, y)  = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2 + ε/2 (Σa - Σb)²

Iteration, for each of the three problems alike; T g = -λ ε log Σ_j b_j e^((g_j - C_ij) / ε), λ = ρ / (ρ + ε):

    start          f = g = 0, ε_0 = the largest |C|, halved with each iteration until it is ε (faster, where that
                   would take more than half of the iterations)
    averaged       f, g = (f + T g) / 2, (g + T f) / 2           while ε_k > ε, and in 16 more iterations
    alternating    f = T g, then g = T f                         from then on; OT(x, x), where f = g, stays averaged

What is averaged keeps the symmetry of x and y: as y nears x, the errors of the three problems cancel. Averaging
converges fast in what is symmetric (all that OT(x, x) has), alternating in what is not.

Gradient (envelope theorem): that of the maximum above with f and g held, which is exact for what is returned, and
off by the square of what f and g lack in the value, by what they lack in the gradient. The forward makes it, since
it is small beside the work: backwards only scale it. Double backward: the same formula, through which f and g
depend on everything by the implicit function theorem (a dense system of n + m unknowns for each problem).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.backend import LIBRARY, full_precision, launcher, resolve, statistics_dtype, unobserved
from kdkernels.ops.features import (
    FeatureLoss,
    by_class,
    check_at_least,
    check_choice,
    check_class_labels,
    check_features,
    check_sample_weights,
    proportions,
    square_root,
)
from kdkernels.ops.rows import kind_of

COSTS = ("sqeuclidean", "euclidean", "cosine")
AVERAGED = 16  # averaged iterations at the last ε: an error that is symmetric is by then 2^-16 of what it was
CHECK = 4  # iterations from one look at `tol` to the next
MOST_UNKNOWNS = 8192  # of the dense system of a double backward: 512 MB


class _SquaredDistances(torch.autograd.Function):
    """‖x_i − y_j‖², without cancellation: exactly 0 where the two are equal. Twice differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:  # (B, n, d), (B, m, d)
        ctx.save_for_backward(x, y)
        return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # (B, n, m)
        x, y = ctx.saved_tensors
        with full_precision(x):
            of_x = 2 * (grad.sum(-1)[..., None] * x - grad @ y)
            of_y = 2 * (grad.sum(-2)[..., None] * y - grad.mT @ x)
        return of_x, of_y


def _costs(x: Tensor, y: Tensor, extra: Tensor | None, cost: str) -> Tensor:  # (B, n, m)
    """Of (B, n, d) and (B, m, d), which for "cosine" are already of length 1."""
    if cost == "cosine":
        with full_precision(x):
            costs = 1 - x @ y.mT
    else:
        costs = _SquaredDistances.apply(x, y)
        if cost == "euclidean":
            costs = square_root(costs)
    return costs if extra is None else costs + extra


def _exponents(costs: Tensor, f: Tensor, g: Tensor, epsilon: float) -> Tensor:
    return (f[..., :, None] + g[..., None, :] - costs) / epsilon


def _mass(potential: Tensor, rho: float) -> Tensor:
    return potential if rho == math.inf else -rho * torch.expm1(-potential / rho)


def _dual(
    costs: Tensor,  # (B, n, m)
    a: Tensor,  # (B, n)
    b: Tensor,  # (B, m)
    f: Tensor,  # (B, n)
    g: Tensor,  # (B, m)
    epsilon: float,
    rho: float,
) -> Tensor:  # (B,)
    """The maximum's value at these potentials, whose gradient with f and g held is the envelope's."""
    pairs = a[..., :, None] * b[..., None, :] * torch.expm1(_exponents(costs, f, g, epsilon))
    return (a * _mass(f, rho)).sum(-1) + (b * _mass(g, rho)).sum(-1) - epsilon * pairs.sum((-1, -2))


def _schedule(costs: Tensor, epsilon: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Each problem's ε_k (iterations, B), and how many of them come before the last ε (B,)."""
    largest = costs.detach().abs().amax((-1, -2)).double()
    steps = iterations // 2
    ratio = torch.where(largest * 0.5**steps <= epsilon, 0.5, (epsilon / largest) ** (1 / max(steps, 1)))
    powers = ratio ** torch.arange(iterations, device=costs.device, dtype=torch.float64)[:, None]
    scales = largest * (powers if steps else 0 * powers)
    above = scales > epsilon * (1 + 1e-6)
    return torch.where(above, scales, epsilon), above.sum(0)


def _potentials(
    costs: Tensor,  # (B, n, m)
    a: Tensor,  # (B, n)
    b: Tensor,  # (B, m)
    epsilon: float,
    rho: float,
    iterations: int,
    tol: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    """(f, g) in the log domain; `symmetric`: f = g."""
    log_a, log_b = a.log()[..., None, :], b.log()[..., None, :]
    scales, levels = _schedule(costs, epsilon, iterations)
    scales = scales.to(costs.dtype)
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    moving = torch.ones_like(levels, dtype=torch.bool)[:, None]

    def step(costs: Tensor, log_weights: Tensor, potential: Tensor, epsilon: Tensor) -> Tensor:
        softmin = -epsilon * torch.logsumexp(
            log_weights + (potential[..., None, :] - costs) / epsilon[..., None], -1
        )
        softmin = torch.where(softmin.isinf(), 0, softmin)  # of nothing, where all weights are 0
        return softmin if rho == math.inf else rho / (rho + epsilon) * softmin

    for k in range(iterations):
        now = scales[k][:, None]
        to_f = step(costs, log_b, f if symmetric else g, now)
        if symmetric:
            new_f = new_g = (f + to_f) / 2
        else:
            alternating = (k >= levels + AVERAGED)[:, None]
            new_f = torch.where(alternating, to_f, (f + to_f) / 2)
            to_g = step(costs.mT, log_a, torch.where(alternating, to_f, f), now)
            new_g = torch.where(alternating, to_g, (g + to_g) / 2)
        change = torch.maximum((new_f - f).abs().amax(-1), (new_g - g).abs().amax(-1))
        f, g = torch.where(moving, new_f, f), torch.where(moving, new_g, g)
        if tol >= 0 and (k + 1) % CHECK == 0:
            moving = moving & ~((k >= levels) & (change <= tol))[:, None]
            if not moving.any():
                break
    there = ((a.sum(-1) > 0) & (b.sum(-1) > 0))[:, None]
    return torch.where(there, f, 0), torch.where(there, g, 0)


def _level(f: Tensor, g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of the pairs (f + c, g − c), which are all one, that with Σ a f = Σ b g."""
    shift = ((b * g).sum(-1, keepdim=True) - (a * f).sum(-1, keepdim=True)) / 2
    return f + shift, g - shift


def _reference(
    x: Tensor,  # (B, n, d)
    y: Tensor,  # (B, m, d)
    a: Tensor,  # (B, n)
    b: Tensor,  # (B, m)
    extra: Sequence[Tensor],  # of x and y (B, n, m); of x and x, of y and y
    cost: str,
    epsilon: float,
    rho: float,
    iterations: int,
    tol: float,
    debias: bool,
    loss: Tensor,  # (B,)
    f: Tensor,  # (B, n)
    g: Tensor,  # (B, m)
    f_self: Tensor | None,  # (B, n)
    g_self: Tensor | None,  # (B, m)
    grad_x: Tensor | None,  # (B, n, d)
    grad_y: Tensor | None,  # (B, m, d)
    grad_a: Tensor | None,  # (B, n)
    grad_b: Tensor | None,  # (B, m)
    plans: Sequence[Tensor],  # (B, n, m), (B, n, n), (B, m, m), or none
) -> None:
    """The specification, in plain PyTorch."""
    added_to = [*extra, None, None, None]
    problems = [(x, a, y, b, added_to[0])]
    if debias:
        problems += [(x, a, x, a, added_to[1]), (y, b, y, b, added_to[2])]
    value = torch.zeros_like(loss)
    of_x, of_y, of_a, of_b = (torch.zeros_like(z) for z in (x, y, a, b))
    for i, (u, u_weights, v, v_weights, added) in enumerate(problems):
        costs = _costs(u, v, added, cost)
        p, q = _potentials(costs, u_weights, v_weights, epsilon, rho, iterations, tol, i > 0)
        if rho == math.inf and i == 0:
            p, q = _level(p, q, u_weights, v_weights)
        for out, solution in ((f, p), (g, q)) if i == 0 else (((f_self, g_self)[i - 1], p),):
            if out is not None:
                out.copy_(solution)
        # A side's derivative is half of that of a problem whose two sides are one, which itself counts half.
        sign = 1 if i == 0 else -1
        value += (1 if i == 0 else -0.5) * _dual(costs, u_weights, v_weights, p, q, epsilon, rho)
        shares = torch.exp(_exponents(costs, p, q, epsilon))
        plan = u_weights[..., :, None] * v_weights[..., None, :] * shares
        if len(plans) > i:
            plans[i].copy_(plan)
        if i != 2:
            of_x += sign * _side_gradient(plan, u, v, costs, added, cost)
            of_a += sign * _weight_gradient(shares, p, v_weights, epsilon, rho)
        if i != 1:
            of_y += sign * _side_gradient(plan.mT, v, u, costs.mT, None if added is None else added.mT, cost)
            of_b += sign * _weight_gradient(shares.mT, q, u_weights, epsilon, rho)
    if debias and x.shape == y.shape:  # to the last bit: where it is the same problem thrice
        other = ~((x == y).all(-1) & (a == b)).all(-1)
        for more in extra[1:]:
            other = other | (extra[0] != more).any(-1).any(-1)
        value, of_a, of_b = value * other, of_a * other[:, None], of_b * other[:, None]
        of_x, of_y = of_x * other[:, None, None], of_y * other[:, None, None]
        assert f_self is not None
        for solution in (f, g):
            solution.copy_(torch.where(other[:, None], solution, f_self))
        for plan in plans[1:]:
            plans[0].copy_(torch.where(other[:, None, None], plans[0], plan))
    loss.copy_(value)
    for out, gradient in ((grad_x, of_x), (grad_y, of_y), (grad_a, of_a), (grad_b, of_b)):
        if out is not None:
            out.copy_(gradient)


def _side_gradient(
    plan: Tensor,  # (B, n, m)
    x: Tensor,  # (B, n, d)
    y: Tensor,  # (B, m, d)
    costs: Tensor,  # (B, n, m)
    extra: Tensor | None,  # (B, n, m)
    cost: str,
) -> Tensor:
    """Σ_j γ_ij dC_ij / dx_i."""
    with full_precision(x):
        if cost == "cosine":
            return -(plan @ y)
        if cost == "euclidean":
            distances = costs if extra is None else _costs(x, y, None, cost)
            plan = torch.where(distances > 0, plan / distances, 0)
        return (2 if cost == "sqeuclidean" else 1) * (plan.sum(-1, keepdim=True) * x - plan @ y)


def _weight_gradient(
    shares: Tensor,  # (B, n, m)
    f: Tensor,  # (B, n)
    b: Tensor,  # (B, m)
    epsilon: float,
    rho: float,
) -> Tensor:
    return _mass(f, rho) - epsilon * ((shares * b[..., None, :]).sum(-1) - b.sum(-1, keepdim=True))


# `extra` has none, one or three tensors; `needs` says which of the gradients of x, y, a, b, and whether the plans
# (for each of `extra`, else of x and y) are wanted. They follow loss, f, g and, where debiased, f and g of the
# problems of x and x, y and y.
LIBRARY.define(
    "sinkhorn(Tensor x, Tensor y, Tensor a, Tensor b, Tensor[] extra, str cost, float epsilon, float rho, "
    "int iterations, float tol, bool debias, bool[] needs, str backend) -> Tensor[]"
)


def _outputs(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, extra: Sequence[Tensor], debias: bool, needs: Sequence[bool]
) -> tuple[list[Tensor | None], list[Tensor]]:
    single: list[Tensor | None] = [x.new_empty(x.shape[0]), torch.empty_like(a), torch.empty_like(b)]
    single += [torch.empty_like(a), torch.empty_like(b)] if debias else [None, None]
    single += [torch.empty_like(z) if need else None for z, need in zip((x, y, a, b), needs)]
    plans: list[Tensor] = []
    if needs[4]:
        shapes = [(x, y), (x, x), (y, y)][: max(len(extra), 1)]
        plans = [u.new_empty(u.shape[0], u.shape[1], v.shape[1]) for u, v in shapes]
    return single, plans


def _body(
    x: Tensor, y: Tensor, a: Tensor, b: Tensor, extra: Sequence[Tensor], *rest: Any
) -> list[Tensor]:  # as the op has them
    *options, debias, needs, backend = rest
    single, plans = _outputs(x, y, a, b, extra, debias, needs)
    if x.shape[0]:
        function: Any = _reference if backend == "reference" else launcher(backend, "sinkhorn")
        function(x, y, a, b, extra, *options, debias, *single, plans)
    return [z for z in (*single, *plans) if z is not None]


def _fake(x: Tensor, y: Tensor, a: Tensor, b: Tensor, extra: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    *_, debias, needs, _backend = rest
    single, plans = _outputs(x, y, a, b, extra, debias, needs)
    return [z for z in (*single, *plans) if z is not None]


LIBRARY.impl("sinkhorn", _body, "CPU")
LIBRARY.impl("sinkhorn", _body, "CUDA")
torch.library.register_fake("kdkernels::sinkhorn", _fake, lib=LIBRARY)


def _run(x: Tensor, *arguments: Any) -> list[Tensor]:
    return (_body if unobserved(x) else torch.ops.kdkernels.sinkhorn)(x, *arguments)


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (B, n, d)
        y: Tensor,  # (B, m, d)
        a: Tensor,  # (B, n)
        b: Tensor,  # (B, m)
        extra: Tensor | None,  # (B, n, m)
        extra_x: Tensor | None,  # (B, n, n)
        extra_y: Tensor | None,  # (B, m, m)
        options: tuple[str, float, float, int, float, bool],
        backend: str,
    ) -> Tensor:  # (B,)
        needs = ctx.needs_input_grad
        extras = [z for z in (extra, extra_x, extra_y) if z is not None]
        asked = [*needs[:4], any(needs[4:7])]
        loss, *rest = _run(x, y, a, b, extras, *options, asked, backend)
        ctx.options = options
        ctx.save_for_backward(x, y, a, b, extra, extra_x, extra_y, *rest)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:  # (B,)
        needs = ctx.needs_input_grad
        debias = ctx.options[5]
        inputs, rest = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
        count = 4 if debias else 2
        potentials, gradients = rest[:count], list(rest[count:])
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable_backward(inputs, potentials, ctx.options, needs, grad_output)
        found: list[Tensor | None] = []
        for need in needs[:4]:
            if need:
                gradient = gradients.pop(0)
                found.append(gradient * grad_output.view(-1, *[1] * (gradient.dim() - 1)))
            else:
                found.append(None)
        for need, factor in zip(needs[4:7], (1.0, -0.5, -0.5)):
            plan = gradients.pop(0) if gradients else None
            found.append(factor * grad_output[:, None, None] * plan if need and plan is not None else None)
        return (*found, None, None)


class _Last(torch.autograd.Function):
    """The first argument, of which there is no derivative with respect to the others."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *depends_on: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError("sinkhorn_divergence has first and second derivatives, no third ones")


class _Implicit(torch.autograd.Function):
    """Potentials that are known, as the functions of costs and weights that they are (implicit function theorem)."""

    @staticmethod
    def forward(
        ctx: Any,
        costs: Tensor,  # (B, n, m)
        a: Tensor,  # (B, n)
        b: Tensor,  # (B, m)
        f: Tensor,  # (B, n)
        g: Tensor,  # (B, m)
        epsilon: float,
        rho: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(costs, a, b, f, g)
        ctx.options = epsilon, rho
        return f.clone(), g.clone()

    @staticmethod
    def backward(ctx: Any, grad_f: Tensor, grad_g: Tensor) -> tuple[Tensor | None, ...]:
        *saved, f, g = ctx.saved_tensors
        around = (*saved, grad_f, grad_g)
        grad_f, grad_g = grad_f.detach(), grad_g.detach()
        dtype, n, m = f.dtype, f.shape[-1], g.shape[-1]
        if n + m > MOST_UNKNOWNS:
            raise RuntimeError(
                f"the double backward of sinkhorn_divergence solves a dense system of n + m unknowns, at most "
                f"{MOST_UNKNOWNS}; got {n} + {m}"
            )
        epsilon, rho = ctx.options
        damping = 1.0 if rho == math.inf else rho / (rho + epsilon)
        f, g = f.double(), g.double()

        def residual(u: Tensor, v: Tensor, costs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            """u - T v, which is 0, and the shares of T's terms: its derivative."""
            z = (v[..., None, :] - costs) / epsilon
            top = z.masked_fill(weights[..., None, :] == 0, -math.inf).amax(-1, keepdim=True)
            top = torch.where(top > -math.inf, top, 0).detach()
            terms = weights[..., None, :] * torch.exp((z - top).clamp(max=80))
            total = terms.sum(-1, keepdim=True)
            total = torch.where(total > 0, total, 1)
            return u + damping * epsilon * (total.log() + top).squeeze(-1), (terms / total).detach()

        with torch.enable_grad():
            costs, a, b = (z.detach().double().requires_grad_() for z in saved)
            of_f, from_g = residual(f, g, costs, b)
            of_g, from_f = residual(g, f, costs.mT, a)
            system = torch.eye(n + m, dtype=torch.float64, device=f.device).repeat(f.shape[0], 1, 1)
            system[:, :n, n:] = damping * from_g
            system[:, n:, :n] = damping * from_f
            if rho == math.inf:
                # (1, -1) changes nothing: what remains is solved beside it.
                free = torch.cat([torch.ones_like(f[0]), -torch.ones_like(g[0])])
                system = system + free[:, None] * free / (n + m)
            adjoint = torch.linalg.solve(system.mT, torch.cat([grad_f, grad_g], -1).double())
            total = (adjoint[:, :n] * of_f).sum() + (adjoint[:, n:] * of_g).sum()
            gradients = torch.autograd.grad(-total, (costs, a, b))
        return (*(_Last.apply(z.to(dtype), *around) for z in gradients), None, None, None, None)


def _differentiable_backward(
    inputs: Sequence[Tensor | None],
    potentials: Sequence[Tensor],
    options: tuple[str, float, float, int, float, bool],
    needs: Sequence[bool],
    grad_output: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradient as a graph, for ``create_graph=True``."""
    cost, epsilon, rho, *_, debias = options
    # Through `held` goes the derivative with the potentials held, through the inputs that of the potentials.
    held = [None if z is None else z.view_as(z) for z in inputs]

    def value(i: int, j: int, extra: int, f: Tensor, g: Tensor) -> Tensor:
        through: list[tuple[Tensor, Tensor, Tensor]] = []
        for source in (inputs, held):
            costs = _costs(source[i], source[j], source[extra], cost)  # type: ignore[arg-type]
            through.append((costs, source[i + 2], source[j + 2]))  # type: ignore[arg-type]
        f, g = _Implicit.apply(*through[0], f, g, epsilon, rho)
        return _dual(*through[1], f, g, epsilon, rho)

    loss = value(0, 1, 4, *potentials[:2])
    if debias:
        loss = loss - 0.5 * value(0, 0, 5, potentials[2], potentials[2])
        loss = loss - 0.5 * value(1, 1, 6, potentials[3], potentials[3])
    wanted = [z for z, need in zip(held, needs) if need and z is not None]
    gradients = iter(torch.autograd.grad(loss, wanted, grad_output, create_graph=True))
    return (*(next(gradients) if need else None for need in needs[:7]), None, None)


Extra = Tensor | tuple[Tensor, Tensor, Tensor] | None


class _Problem:
    """The checked arguments, as problems in one batch dimension."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        cost: str,
        epsilon: float,
        max_iter: int,
        tol: float | None,
        debias: bool,
        reach: float | None,
        x_weights: Tensor | None,
        y_weights: Tensor | None,
        extra_cost: Extra,
        backend: str | None,
    ) -> None:
        check_features(x, y)
        check_choice(cost, "cost", COSTS)
        check_positive(epsilon, "epsilon")
        if isinstance(max_iter, bool) or not isinstance(max_iter, int):
            raise TypeError(f"max_iter must be an integer, got {kind_of(max_iter)}")
        if max_iter < 1:
            raise ValueError(f"max_iter must be at least 1, got {max_iter}")
        if tol is not None:
            check_at_least(tol, "tol", 0)
        rho = math.inf
        if reach is not None:
            check_positive(reach, "reach")
            rho = float(reach) ** (2 if cost == "sqeuclidean" else 1)
        self.backend = _resolve(backend, x, y, debias)
        x_weights = check_sample_weights(x_weights, x, "x_weights")
        y_weights = check_sample_weights(y_weights, y, "y_weights")
        extras = _check_extra_cost(extra_cost, x, y, debias)

        self.batch, self.out = x.shape[:-2], statistics_dtype(x.dtype)
        self.options = (cost, float(epsilon), rho, max_iter, -1.0 if tol is None else float(tol), debias)
        x, y = x.to(self.out), y.to(self.out)
        if cost == "cosine":
            x, y = _directions(x), _directions(y)
        if reach is None or x_weights is None:
            x_weights = proportions(x_weights, x)
        if reach is None or y_weights is None:
            y_weights = proportions(y_weights, y)
        # No samples are one without weight.
        self.n, self.m = x.shape[-2], y.shape[-2]
        more_x, more_y = (0, int(self.n == 0)), (0, int(self.m == 0))
        inputs = [
            _padded(x, (0, 0), more_x),
            _padded(y, (0, 0), more_y),
            _padded(x_weights, more_x),
            _padded(y_weights, more_y),
            _padded(extras[0], more_y, more_x),
            _padded(extras[1], more_x, more_x),
            _padded(extras[2], more_y, more_y),
        ]
        problems = math.prod(self.batch)
        self.inputs = [
            None if z is None else z.reshape(problems, *z.shape[len(self.batch) :]).contiguous()
            for z in inputs
        ]

    def run(self, plan: bool = False) -> list[Tensor]:
        """f, g and, if asked for, the plan, of x and y alone; no gradients."""
        with torch.no_grad():
            x, y, a, b, *extras = self.inputs
            extra = [z for z in extras[:1] if z is not None]
            needs = [False, False, False, False, plan]
            return _run(x, y, a, b, extra, *self.options[:5], False, needs, self.backend)[1:]  # type: ignore[arg-type]

    def shaped(self, z: Tensor) -> Tensor:
        return z.reshape((*self.batch, *z.shape[1:]))


def _resolve(backend: str | None, x: Tensor, y: Tensor, debias: bool) -> str:
    """As `resolve`, where the cuda backend has problems that fit into a multiprocessor's shared memory."""
    n, m = max(x.shape[-2], 1), max(y.shape[-2], 1)
    rows, columns = (max(n, m),) * 2 if debias else (n, m)
    # Costs, vectors and staging of csrc/cuda/sinkhorn.cu, which checks it again.
    needed = 4 * rows * (columns | 1) + 36 * max(n, m) + 8224
    there = 232_448  # of a device of today with the most; what the kernels have on CPU memory
    if x.is_cuda:
        properties = torch.cuda.get_device_properties(x.device)
        there = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)
    if needed <= there:
        return resolve(backend, x, "x", has=("reference", "cpu", "triton", "cuda"))
    if backend == "cuda":
        raise ValueError(
            f"backend 'cuda' has problems whose costs fit into {there} bytes of shared memory; n = {n} and m = {m} "
            f"take {needed}"
        )
    return resolve(backend, x, "x", has=("reference", "cpu", "triton"))


def check_positive(value: Any, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {kind_of(value)}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be finite and positive, got {value}")


def _directions(x: Tensor) -> Tensor:
    """Rows of length 1, and 0 where they are 0."""
    length = square_root(x.square().sum(-1, keepdim=True))
    return x / torch.where(length > 0, length, 1)


def _padded(z: Tensor | None, *more: tuple[int, int]) -> Tensor | None:
    """With so many zeros before and after along the last dimension, the last but one…"""
    if z is None or not any(map(any, more)):
        return z
    return torch.nn.functional.pad(z, [count for pair in more for count in pair])


def _check_extra_cost(extra_cost: Any, x: Tensor, y: Tensor, debias: bool) -> list[Tensor | None]:
    if extra_cost is None:
        return [None, None, None]
    names, given = ["extra_cost"], [extra_cost]
    if debias:
        if not isinstance(extra_cost, tuple) or len(extra_cost) != 3:
            raise TypeError(
                "extra_cost must be a tuple of three where debias=True: for x and y, x and x, y and y "
                f"(or give one tensor and debias=False); got {kind_of(extra_cost)}"
            )
        names, given = [f"extra_cost[{i}]" for i in range(3)], list(extra_cost)
    n, m = x.shape[-2], y.shape[-2]
    checked: list[Tensor | None] = []
    for name, value, sizes in zip(names, given, ((n, m), (n, n), (m, m))):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {kind_of(value)}")
        shape = (*x.shape[:-2], *sizes)
        if value.shape not in (shape, torch.Size(sizes)):
            raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        if value.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {value.device}")
        checked.append(value.to(statistics_dtype(x.dtype)).expand(shape))
    return checked + [None] * (3 - len(checked))


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    *,
    cost: str = "sqeuclidean",
    epsilon: float = 0.05,
    max_iter: int = 100,
    tol: float | None = None,
    debias: bool = True,
    reach: float | None = None,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    labels: Tensor | None = None,
    extra_cost: Extra = None,
    backend: str | None = None,
) -> Tensor:
    r"""Entropic optimal transport of two batches, without the bias that the entropy adds.

    OT(x, y) = min over γ ≥ 0 with marginals a, b of Σ γ C + ε KL(γ | a⊗b), a and b the samples' weights; the value
    includes the entropy's term. What is returned is OT(x, y) − ½ OT(x, x) − ½ OT(y, y), or OT(x, y) itself with
    ``debias=False``. Where the iteration has not converged it is a lower bound of OT(x, y) (of each of the three).
    Debiased, it is exactly 0 with gradient 0 where x equals y.

    With ``reach`` the marginals are free, at a price: min Σ γ C + ε KL(γ | a⊗b) + ρ KL(γ1 | a) + ρ KL(γᵀ1 | b),
    ρ = reach² for "sqeuclidean" and reach for the others, KL of masses (Σ p log(p/q) − p + q); debiased, with
    + ε/2 (Σa − Σb)². At the optimum that is Σ a (ρ + ε/2) (e^(−f_xx/ρ) − e^(−f/ρ)) + the same of b, g: geomloss's.

    From elsewhere: geomloss's ``SamplesLoss("sinkhorn", p=2, blur=s, reach=r)`` takes ½‖x − y‖² and ε = s²: twice it is
    this with epsilon = 2 s² and reach = √2 r; ``p=1`` is "euclidean" with epsilon = s, reach = r. POT's ``reg`` is
    epsilon (its entropy Σ γ log γ differs by what a and b fix, its plan not at all), and its ``sinkhorn2`` returns
    Σ γ C alone.

    Args:
        x: (..., n, d) features: float32, float16, bfloat16 (computed in float32), or float64. Leading dimensions are
            independent problems.
        y: (..., m, d) features of the same dtype and device. Gradients go to both.
        cost: of a pair: "sqeuclidean" ‖x − y‖² (without ½), "euclidean" ‖x − y‖ (derivative 0 where the two are
            equal), "cosine" 1 − cos(x, y) (1 where one of them is 0).
        epsilon: in the units of the cost.
        max_iter: iterations, each of which updates both potentials. The first ones lower ε from the largest cost,
            halving it. Without ``tol`` there are always that many, and no GPU is waited for.
        tol: stop (each problem for itself) once no potential changes by more than that in an iteration, in the
            units of the cost; looked at in every fourth one. The reference waits for a GPU to find that
            out; "triton" starts all iterations, and those after the last that is needed do nothing.
        debias: as above.
        reach: as above; None: the marginals are a and b.
        x_weights, y_weights: floating (..., n) and (..., m), ≥ 0, differentiable. Without ``reach`` they are divided
            by their sum, and a problem that has none (or no samples) on either side is 0; with it they are masses.
            Values are checked on the CPU only.
        labels: integers (..., n), x and y being the same samples through two networks (n = m): the sum over the classes
            present of the divergence of each class's samples, each with weights of its own that are divided by their
            sum (with ``reach``, where weights are given: masses as they are). All classes are one batch of problems. A
            GPU is waited for.
        extra_cost: floating (..., n, m), or (n, m) for all problems: added to the cost, differentiable (the
            gradient is the plan). Debiased, a tuple of three: for x and y, x and x (symmetric), y and y (symmetric).
            Finite; not taken with ``labels``.
        backend: "reference", "cpu", "triton" (not float64) or "cuda" (not float64, and while a problem fits into a
            multiprocessor's memory; one launch, where "triton" has one or two for each iteration); None takes the
            best that there is. A named one is obeyed or raises.

    Returns:
        (...): float32, or float64 for float64 features.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device, value or name.
        RuntimeError: a backend that is not available here.

    Second derivatives are right, up to what the iteration lacks; they solve a dense system of n + m unknowns for each
    problem (n + m ≤ 8192). Third ones are refused.

    >>> loss = ce + 1e-2 * kdkernels.sinkhorn_divergence(student_features, teacher_features, epsilon=1.0)
    """
    if labels is not None:
        check_features(x, y)
        checked = check_class_labels(labels, x, y)
        assert checked is not None
        if extra_cost is not None:
            raise ValueError("extra_cost must be None where labels are given")
        classes = []
        for z, given, name in ((x, x_weights, "x_weights"), (y, y_weights, "y_weights")):
            each, weights = by_class(z, check_sample_weights(given, z, name), checked)
            classes.append(
                (each, weights if reach is None or given is not None else proportions(weights, each))
            )
        (x, x_weights), (y, y_weights) = classes
        return sinkhorn_divergence(
            x,
            y,
            cost=cost,
            epsilon=epsilon,
            max_iter=max_iter,
            tol=tol,
            debias=debias,
            reach=reach,
            x_weights=x_weights,
            y_weights=y_weights,
            backend=backend,
        ).sum(-1)
    problem = _Problem(
        x, y, cost, epsilon, max_iter, tol, debias, reach, x_weights, y_weights, extra_cost, backend
    )
    inputs = problem.inputs
    if torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in inputs):
        loss = _Sinkhorn.apply(*inputs, problem.options, problem.backend)
    else:
        extra = [z for z in inputs[4:] if z is not None]
        loss = _run(*inputs[:4], extra, *problem.options, [False] * 5, problem.backend)[0]  # type: ignore[arg-type]
    a, b = inputs[2], inputs[3]
    assert a is not None and b is not None
    if reach is not None:
        mass, other = a.sum(-1), b.sum(-1)
        # What has nowhere to go is destroyed.
        alone = (mass == 0) | (other == 0)
        loss = loss + torch.where(alone, problem.options[2] * (mass + other), 0)
        if debias:
            loss = loss + 0.5 * float(epsilon) * (mass - other).square()
    elif x_weights is not None or y_weights is not None or 0 in (problem.n, problem.m):
        loss = torch.where((a.detach().sum(-1) > 0) & (b.detach().sum(-1) > 0), loss, 0)
    return problem.shaped(loss)


def sinkhorn_divergence_reference(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """The specification of `sinkhorn_divergence`, which has the same arguments: plain PyTorch in the log domain."""
    return sinkhorn_divergence(x, y, **options, backend="reference")


def potentials(
    x: Tensor,
    y: Tensor,
    *,
    cost: str = "sqeuclidean",
    epsilon: float = 0.05,
    max_iter: int = 100,
    tol: float | None = None,
    reach: float | None = None,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    extra_cost: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """f (..., n) and g (..., m), the dual solution of OT(x, y): γ_ij = a_i b_j e^((f_i + g_j − C_ij)/ε).

    Arguments as in `sinkhorn_divergence`, not debiased. Without ``reach``, (f + c, g − c) is the same solution for any
    c: that with Σ a f = Σ b g is returned. No gradient flows through them.
    """
    problem = _Problem(
        x, y, cost, epsilon, max_iter, tol, False, reach, x_weights, y_weights, extra_cost, backend
    )
    f, g = problem.run()
    return problem.shaped(f)[..., : problem.n], problem.shaped(g)[..., : problem.m]


def sinkhorn_plan(
    x: Tensor,
    y: Tensor,
    *,
    cost: str = "sqeuclidean",
    epsilon: float = 0.05,
    max_iter: int = 100,
    tol: float | None = None,
    reach: float | None = None,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    extra_cost: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The transport plan γ (..., n, m) of OT(x, y): Σ_j γ_ij = a_i, Σ_i γ_ij = b_j where the iteration has converged.

    Arguments as in `sinkhorn_divergence`, not debiased. No gradient flows through it.
    """
    problem = _Problem(
        x, y, cost, epsilon, max_iter, tol, False, reach, x_weights, y_weights, extra_cost, backend
    )
    return problem.shaped(problem.run(plan=True)[-1])[..., : problem.n, : problem.m]


class _Apply(torch.autograd.Function):
    """γ v for γ that is held, a block of rows at a time."""

    BLOCK = 1 << 22  # elements of γ

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, f: Tensor, g: Tensor, cost: str, epsilon: float, *inputs: Tensor | None
    ) -> Tensor:  # (B, m, k)
        ctx.save_for_backward(f, g, *inputs)
        ctx.options = cost, epsilon
        x, y, a, b, extra = inputs
        assert x is not None and y is not None and a is not None and b is not None
        out = v.new_empty(v.shape[0], x.shape[1], v.shape[2])
        rows = max(1, _Apply.BLOCK // max(1, x.shape[0] * y.shape[1]))
        for i in range(0, x.shape[1], rows):
            block = slice(i, i + rows)
            costs = _costs(x[:, block], y, None if extra is None else extra[:, block], cost)
            weights = torch.exp_(_exponents(costs, f[:, block], g, epsilon)).mul_(b[:, None, :])
            with full_precision(v):
                out[:, block] = a[:, block, None] * (weights @ v)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # (B, n, k)
        f, g, x, y, a, b, extra = ctx.saved_tensors
        swapped = None if extra is None else extra.mT
        return (_Apply.apply(grad, g, f, *ctx.options, y, x, b, a, swapped), *[None] * 9)


def apply_plan(
    x: Tensor,
    y: Tensor,
    v: Tensor,
    *,
    cost: str = "sqeuclidean",
    epsilon: float = 0.05,
    max_iter: int = 100,
    tol: float | None = None,
    reach: float | None = None,
    x_weights: Tensor | None = None,
    y_weights: Tensor | None = None,
    extra_cost: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """γ v (..., n, k) for v (..., m, k), where γ is `sinkhorn_plan`'s, without γ in memory.

    Arguments as in `sinkhorn_plan`. The gradient goes to v; γ is held. ``apply_plan(x, y, y) * n`` moves each sample
    of x to the mean of where its mass goes.
    """
    problem = _Problem(
        x, y, cost, epsilon, max_iter, tol, False, reach, x_weights, y_weights, extra_cost, backend
    )
    if not isinstance(v, Tensor):
        raise TypeError(f"v must be a tensor, got {kind_of(v)}")
    if v.dim() < 2 or v.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"v must have shape (..., m, k) with y's {tuple(y.shape[:-1])}, got {tuple(v.shape)}"
        )
    if v.dtype != x.dtype:
        raise TypeError(f"v must have x's dtype {x.dtype}, got {v.dtype}")
    if v.device != x.device:
        raise ValueError(f"v must be on x's device {x.device}, got {v.device}")
    f, g = problem.run()
    inputs = [None if z is None else z.detach() for z in problem.inputs[:5]]
    columns = _padded(v.to(problem.out), (0, 0), (0, int(problem.m == 0)))
    assert columns is not None
    columns = columns.reshape(math.prod(problem.batch), *columns.shape[-2:])
    return problem.shaped(_Apply.apply(columns, f, g, *problem.options[:2], *inputs))[..., : problem.n, :]


class SinkhornDivergenceLoss(FeatureLoss):
    """`sinkhorn_divergence` as a module: ``SinkhornDivergenceLoss(epsilon=1.0)(x, y)``; weights, labels and
    ``extra_cost`` are given with each call."""

    function = staticmethod(sinkhorn_divergence)
    per_call = ("x_weights", "y_weights", "labels", "extra_cost")
