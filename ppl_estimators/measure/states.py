"""What both libraries' enumerations share: the result, the state of one site, the budget, the minibatches."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..core.errors import EstimatorError, site_error
from ..core.objectives import Objective
from ..core.ops import Array, Ops
from ..core.site import Term

Minibatches = Mapping[str, Sequence[Sequence[int]]]


@dataclass(frozen=True)
class Asked:
    """How a program is summed, see `exact_gradient`."""

    nodes: int
    max_states: int
    minibatches: Minibatches | None
    objective: Objective
    num_particles: int

    @property
    def joint(self) -> int:
        """How many particles are summed together."""
        return self.objective.joint(self.num_particles)

    @property
    def coarser(self) -> Asked:
        """With fewer nodes: what changes is the error of the quadrature."""
        return replace(self, nodes=max(2, (2 * self.nodes) // 3))


@dataclass(frozen=True)
class Exact:
    """The exact loss and its gradient at one point.

    ``value``: minus the objective, in nats. ``gradient``: ``{parameter: array}``, the derivative of ``value`` in the
    unconstrained space that `SVI` optimises, each in the shape of the unconstrained parameter. ``params``: the point,
    constrained, as the program sees it. ``states``: how many were summed (quadrature nodes and minibatches included).
    ``quadrature_error``: the largest change of any derivative when two thirds of the nodes are used; 0 where every
    latent is discrete. ``sites``: the latents of the guide, as its first run shows them.
    """

    value: float
    gradient: Mapping[str, np.ndarray]
    params: Mapping[str, Any] = field(repr=False)
    states: int
    quadrature_error: float = 0.0
    sites: tuple[str, ...] = ()

    def and_of(self, other: Exact) -> Exact:
        """With the gradient of another sum added, and its states; the value is this one's."""
        gradient = {n: g + other.gradient.get(n, 0.0) for n, g in self.gradient.items()}
        states, error = self.states + other.states, self.quadrature_error + other.quadrature_error
        return replace(self, gradient=gradient, states=states, quadrature_error=error)


@dataclass(frozen=True)
class Count:
    """A site has ``size`` choices for each of its ``elements``."""

    site: str
    size: int
    elements: int

    @property
    def states(self) -> int:
        return int(self.size**self.elements)


def check_budget(counts: Sequence[Count], minibatches: Mapping[str, int], max_states: int, joint: int = 1) -> int:
    """The number of states, those of ``joint`` particles together; `EstimatorError` names what makes them too many."""
    total = math.prod([c.states for c in counts]) ** joint * math.prod(minibatches.values())
    if total <= max_states:
        return int(total)
    factors = [f"site '{c.site}' {_power(c)}" for c in sorted(counts, key=lambda c: -c.states) if c.states > 1]
    factors = factors[:8] + [f"and {len(factors) - 8} sites more"] * (len(factors) > 8)
    factors += [f"of {joint} particles each"] * (joint > 1)
    factors += [f"plate '{name}' {n:,} minibatches" for name, n in minibatches.items() if n > 1]
    advice = "Use a smaller program (fewer elements, shorter plates)"
    if any(n > 1 for n in minibatches.values()):
        advice += ", minibatches={...} to sum over a few of them"
    amount = f"{total:,}" if total < 1e15 else f"about 10^{int(math.log10(total))}"
    raise EstimatorError(
        f"exact_gradient would sum {amount} states, and max_states is {max_states:,}: {', '.join(factors)}. "
        f"{advice}, fewer nodes= for continuous sites, or a larger max_states=."
    )


def largest_change(gradient: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """Of any derivative from one gradient to the other."""
    return max((float(np.abs(g - other[n]).max()) for n, g in gradient.items() if g.size), default=0.0)


def check_latents(latents: Mapping[str, Any], library: str) -> None:
    if not latents:
        raise EstimatorError(
            f"the guide draws no latent site, so there is nothing to estimate. Give the guide a {library}.sample(...) "
            "statement, or pass model and guide in this order."
        )


def check_finite(ops: Ops, terms: Sequence[Term], latents: Mapping[str, Any]) -> None:
    """``latents``: their messages."""
    for term in terms:
        if not bool(ops.all(ops.isfinite(term.value))):
            values = {n: m["value"].tolist() for n, m in latents.items()}
            raise site_error(
                term.site,
                f"its {'log p' if term.side == 'model' else '-log q'} in the {term.side} is "
                f"{float(ops.sum(term.value))} where the latents are {values}",
                "The ELBO is not finite there: widen the support, or look for a NaN in the parameters and data.",
            )


def collected(ops: Ops, objective: Objective, terms: Sequence[Term], latents: Container[str]) -> Array:
    """What the objective has of one state, before any step."""
    past = {k: ops.full(v.shape, v.value) for k, v in objective.keeps().state.items()}
    return objective.collect(ops, objective.weighed(ops, terms, latents, past))


def _power(count: Count) -> str:
    return f"{count.size}^{count.elements}" if count.elements > 1 else f"{count.size}"


def minibatches_of(sizes: Mapping[str, tuple[int, int]], given: Minibatches | None) -> dict[str, Sequence[Any]]:
    """Index arrays of every subsampled plate; ``sizes`` are ``{plate: (size, subsample size)}``.

    All subsets, or those that were given. The order of elements within a minibatch is taken not to matter.
    """
    given = dict(given or {})
    if unknown := sorted(given.keys() - sizes.keys()):
        known = ", ".join(f"'{n}'" for n in sizes) or "none"
        raise EstimatorError(f"minibatches={{...}}: no subsampled plate is called {unknown}. There are: {known}.")
    found: dict[str, Sequence[Any]] = {}
    for name, (size, part) in sizes.items():
        if name not in given:
            found[name] = _Subsets(size, part)
            continue
        batches = [np.asarray(b, dtype=int) for b in given[name]]
        if not batches or any(b.shape != (part,) or b.min() < 0 or b.max() >= size for b in batches):
            raise EstimatorError(
                f"plate '{name}': minibatches={{...}} must list index sequences of length {part} below {size}, "
                f"got {given[name]!r}."
            )
        found[name] = batches
    return found


class _Subsets(Sequence[Any]):
    """All subsets of a size, listed only when asked for: there may be very many."""

    def __init__(self, size: int, part: int):
        self.size, self.part = size, part

    def __len__(self) -> int:
        return min(math.comb(self.size, self.part), 10**18)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def __iter__(self) -> Iterator[Any]:
        return (np.array(c, dtype=int) for c in itertools.combinations(range(self.size), self.part))
