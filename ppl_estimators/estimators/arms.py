"""DisARM with more than two coupled values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..core.estimator import Array, Costs, Draw, Draws, Estimator, Kept, Local, Noise, Ops, Site
from ..core.families import BERNOULLI


@dataclass(frozen=True, eq=False, repr=False)
class ARMS(Estimator):
    """Antithetic REINFORCE over n values that repel each other (Dirichlet copula), for Bernoulli sites.

    Approximates  ∇_a E_{b ~ Bernoulli(σ(a))}[f(b)]
    With          p q / (p − ρ) · 1/(n − 1) Σ_k (f(b_k) − f̄)(b_k − p),   p = σ(a), q = 1 − p, ρ = P(b_j = b_k = 1)
                  b_k = 1[ũ_k < p] for p < ½, else 1[ũ_k > q];   ũ_k = (1 − d_k)^{n−1}, d ~ Dirichlet(1, ..., 1)
    Requires      Bernoulli sites; nothing of f. n evaluations. Unbiased.
    For           n evaluations, broad posteriors
    Not for       probabilities near 0 or 1: LeaveOneOut() is as good

    ``n``: how many values, 2 or more; ``ARMS(2)`` is DisARM(). Prefer it to DisARM() where n evaluations are
    affordable and the posterior is broad; as p nears 0 or 1 the n values nearly coincide with independent ones, and
    LeaveOneOut() with n particles is as good, and is cheaper in a hierarchy. Values of sites that do not depend on
    each other are evaluated together. The paper adds a small constant to p − ρ; none is needed here, since the
    factor is computed from the smaller of p and q.

    >>> ARMS(3)
    ARMS(3)

    Reference: Dimitriev & Zhou (2021), "ARMS: Antithetic-REINFORCE-Multi-Sample Gradient for Binary Variables",
    arXiv:2105.14141.
    """

    n: int

    families: ClassVar[tuple[str, ...] | None] = (BERNOULLI,)

    def __post_init__(self) -> None:
        if not isinstance(self.n, int) or self.n < 2:
            raise ValueError(f"ARMS(n) compares n values: n must be an integer, 2 or more, got {self.n!r}.")

    def alternatives(self, site: Site) -> Draws:
        return Draws(self.n - 1)

    def noise(self, site: Site) -> Mapping[str, Noise]:
        return {"u": Noise("uniform", (*site.batch_shape, *site.event_shape, self.n))}

    def draw(self, ops: Ops, site: Site, noise: Mapping[str, Array]) -> Draw:
        e = -ops.log(noise["u"])  # exponential; d = e / Σ e
        same = ops.indices(self.n, e)[:, None] == ops.indices(self.n, e)
        others = ops.sum(ops.where(same, ops.zeros_like(e[..., None]), e[..., None, :]), axis=-1)
        log_u_tilde = (self.n - 1) * (ops.log(others) - ops.log(ops.sum(e, axis=-1, keepdims=True)))
        a = site.logits[..., None]
        below = ops.like(log_u_tilde < -ops.softplus(ops.abs(a)), a)  # ũ < min(p, q), with log σ(−|a|) = −softplus(|a|)
        b = ops.where(a < 0, below, 1 - below)  # [*batch, *event, n]
        return Draw(b[..., 0], {"b": b})

    def alternative(self, ops: Ops, site: Site, draw: Draw, index: Array) -> Array:
        return draw.extra["b"][..., 1 + index]

    def local(self, ops: Ops, site: Site, draw: Draw, costs: Costs, kept: Kept) -> Local:
        a, b = site.logits, draw.extra["b"]
        f = ops.stack([costs.value, *(costs.alternatives[k] for k in range(self.n - 1))], axis=0)
        f = f - ops.mean(f, axis=0)
        # Σ_k (f_k − f̄) p is zero
        total = sum(site.spread(ops, f[k]) * b[..., k] for k in range(self.n))
        # p q / (p − ρ) = max(p, q) / (1 − r),  r = ρ(s) / s = max(2 − s^{−1/(n−1)}, 0)^{n−1},  s = min(p, q)
        r = 2 - ops.exp(ops.softplus(ops.abs(a)) / (self.n - 1))
        r = ops.where(r > 0, r, ops.zeros_like(r)) ** (self.n - 1)
        gradient = ops.sigmoid(ops.abs(a)) / (1 - r) * total / (self.n - 1)
        return Local(ops.stop_gradient(gradient) * a)
