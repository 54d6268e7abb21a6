"""The exact loss and gradient of a program: a sum over every state, in plain numpy and double precision.

Nothing of the package is used here. Arrays are ``[states, b, a, u, e]``, whatever the program's layout, with 1 where a
site lacks an axis. Discrete elements take all their values, normal ones Gauss-Hermite nodes that move with the
parameters, Poisson ones all counts below one that has no chance. The gradient is a complex step in each entry of each
parameter: every operation is analytic in them, so that it is exact to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .description import (
    CATEGORIES,
    SIZES,
    SUPPORT,
    TRIALS,
    Axes,
    Latent,
    Program,
    Under,
    datum,
    masks,
    minibatches,
    parameters,
    prior,
    scales,
    start,
)

CANONICAL = ("b", "a", "u", "e")
NODES = 12  # per normal element
COUNTS = 16  # Poisson rates here are about 1, and 16 and more have a chance of 1e-13
STATES = 20_000
STEP = 1e-30

Array = np.ndarray


@dataclass(frozen=True)
class Exact:
    loss: float
    gradient: dict[str, Array]  # [*axes] or [*axes, categories], in the axes of `parameters`


def support(family: str) -> int:
    return {"normal": NODES, "poisson": COUNTS, **SUPPORT}[family]


def states(program: Program) -> int:
    """How many there are, minibatches included."""
    total = len(minibatches(program))
    for z in program.latents:
        total *= support(z.family) ** int(np.prod([SIZES[a] for a in z.axes]))
    return total


def exact(program: Program) -> Exact:
    names = parameters(program)
    values = {n: start(program, n).astype(complex) for n in names}
    digits = _digits(program)

    def mean(values: dict[str, Array]) -> complex:
        """Over the minibatches."""
        return sum(_Sum(program, minibatch).loss(values, digits) for minibatch in batches) / len(batches)

    batches = minibatches(program)
    loss = mean(values).real
    gradient = {}
    for name, value in values.items():
        gradient[name] = np.zeros(value.shape)
        for index in np.ndindex(value.shape):
            moved = value.copy()
            moved[index] += 1j * STEP
            gradient[name][index] = mean({**values, name: moved}).imag / STEP
    return Exact(float(loss), gradient)


def _digits(program: Program) -> dict[str, Array]:
    """Which value of its support every element has, in every state."""
    sizes, places = [], []
    for z in _nested(program):
        shape = _shape(z.axes)
        sizes += [support(z.family)] * int(np.prod(shape))
        places.append((z.name, shape))
    table = np.indices(sizes).reshape(len(sizes), -1).T  # [states, elements]
    found, first = {}, 0
    for name, shape in places:
        n = int(np.prod(shape))
        found[name] = table[:, first : first + n].reshape(-1, *shape)
        first += n
    return found


def _nested(program: Program) -> list[Latent]:
    """The latent sites as states are counted: drawn ones first, summed ones in the subsampled plate last."""
    return sorted(program.latents, key=lambda z: z.summed + (z.summed and program.subsampled in z.axes))


class _Sum:
    """The sum for one minibatch. Elements outside it have their states too, but are seen by nothing."""

    def __init__(self, program: Program, minibatch: tuple[int, ...]):
        self.program = program
        plate = program.subsampled
        self.enlarged = SIZES[plate] / len(minibatch) if plate else 1.0
        chosen = np.isin(np.arange(SIZES[plate]), minibatch) if plate else np.ones(())
        scaled = any(z.summed for z in program.latents) and program.observed[0].under.scale
        self.scale = scaled if isinstance(scaled, float) else 1.0
        self.chosen = _one(_canonical(chosen.astype(float), (plate,) if plate else ()))

    def inside(self, axes: Axes) -> Array | float:
        """1 for the elements in the minibatch, 0 for the others, along the axis of the plate."""
        return self.chosen if self.program.subsampled in axes else 1.0

    def loss(self, params: dict[str, Array], digits: dict[str, Array]) -> complex:
        program = self.program
        numbers: dict[str, Array] = {}  # what a site is to its children
        weight: Array = np.zeros(())  # its logarithm
        elbo: Array = np.zeros(())
        for z in program.latents:
            if z.summed:
                numbers[z.name] = digits[z.name]
                continue
            own = _canonical(params[f"q_{z.name}"], parameters(program)[f"q_{z.name}"][0])
            shift = self._combined(z.guide, z.axes, numbers)
            if z.shared:
                shift = shift + params["shared"]
            if z.family == "normal":
                spread = np.exp(_canonical(params[f"s_{z.name}"], parameters(program)[f"s_{z.name}"][0]))
                nodes, chances = np.polynomial.hermite_e.hermegauss(NODES)
                mean = _one(own) + shift
                numbers[z.name] = mean + _one(spread) * nodes[digits[z.name]]
                log_q = _normal(numbers[z.name], mean, _one(spread))
                chance = np.log(chances / chances.sum())[digits[z.name]]
            else:
                numbers[z.name] = digits[z.name]
                log_q = chance = _log_prob(z.family, own, shift, digits[z.name])
            weight = weight + _states_only(chance)
            elbo = elbo - self._total(log_q, z.under_guide, z.axes)
        joint = {inside: np.zeros(len(digits[program.names[0]])) for inside in (False, True)}

        def add(log_p: Array, under: Under, axes: Axes) -> None:
            """To what is summed over; of the minibatch, once. A sum has one scale, outside of it."""
            under = Under(under.scale if self.scale == 1 else None, under.mask)
            joint[program.subsampled in axes] = joint[program.subsampled in axes] + self._once(log_p, under, axes)

        order = program.latents[::-1] if program.reverse_model else program.latents
        for z in order:
            if z.auxiliary:
                continue
            shift = self._combined(z.model, z.axes, numbers)
            under = z.under_model
            if z.family == "normal":
                log_p = _normal(numbers[z.name], prior(z.name) + shift, 1.0)
            elif z.summed:
                own = _canonical(params[f"p_{z.name}"], parameters(program)[f"p_{z.name}"][0])
                log_p = _log_prob(z.family, own, shift, digits[z.name])
                under = Under()  # its probabilities sum to one
                outside = np.where(self.inside(z.axes) + 0 * digits[z.name] > 0, 0.0, -1e3 * (digits[z.name] > 0))
                joint[True] = joint[True] + _states_only(outside)  # not in the minibatch: counts once
            else:
                own = prior(z.name, CATEGORIES if z.family in ("categorical", "onehot") else 0)
                log_p = _log_prob(z.family, own, shift, digits[z.name])
            add(log_p, under, z.axes)
        for x in program.observed:
            mean = self._combined(x.parents, x.axes, numbers)
            if x.learned:
                mean = mean + _one(_canonical(params[f"p_{x.name}"], x.axes))
            if x.shared:
                mean = mean + params["shared"]
            data = _one(_canonical(datum(x.name, x.axes), x.axes))
            add(_normal(data, mean, 1.0), x.under, x.axes)
        for f in program.factors:
            log_p = np.tanh(self._combined(f.parents, f.axes, numbers))
            if f.side == "model":
                add(log_p, Under(), f.axes)
            else:
                elbo = elbo - self._total(log_p, Under(), f.axes)
        elbo, weight = self._drawn(elbo), self._drawn(weight)
        elbo = elbo + self._summed(joint)
        return complex(-(np.exp(weight) * elbo).sum())

    def _combined(self, parents: dict[str, float], axes: Axes, numbers: dict[str, Array]) -> Array:
        total: Array = np.zeros((1,) * (1 + len(CANONICAL)))
        for name, coefficient in parents.items():
            gone = tuple(1 + i for i, a in enumerate(CANONICAL) if a in self.program.axes_of(name) and a not in axes)
            seen = self.inside(self.program.axes_of(name)) if gone else 1.0
            total = total + coefficient * (numbers[name] * seen).sum(axis=gone, keepdims=True)
        return total

    def _drawn(self, x: Array) -> Array:
        """Of each state of the drawn sites."""
        return np.broadcast_to(x, _states(self.program)).reshape(_counts(self.program))[:, 0, 0]

    def _summed(self, joint: dict[bool, Array]) -> Array:
        """log Σ over the sites that are summed out, N/B times that over those in the subsampled plate."""
        inner = self.enlarged * _log_sum(joint[True].reshape(_counts(self.program)))
        outer = joint[False].reshape(_counts(self.program))[:, :, 0] + inner
        return self.scale * _log_sum(outer)

    def _total(self, term: Array, under: Under, axes: Axes) -> Array:
        """``[states]``: the sum of a term over its site, scaled and masked."""
        return self._once(term, under, axes) * (self.enlarged if self.program.subsampled in axes else 1.0)

    def _once(self, term: Array, under: Under, axes: Axes) -> Array:
        """The same without the N/B of the minibatch."""
        full = np.broadcast_to(term, np.broadcast_shapes(term.shape, (1, *_shape(axes))))
        full = full * self.inside(axes)
        if "e" in axes:
            full = full.sum(-1, keepdims=True)
        if isinstance(under.scale, tuple):
            full = full * _one(_canonical(scales(under.scale), under.scale)) * self.inside(under.scale)
        elif under.scale is not None:
            full = full * under.scale
        if under.mask is not None:
            on = _one(_canonical(masks(under.mask), under.mask)) if isinstance(under.mask, tuple) else under.mask
            full = np.where(on, full, 0)
        return _states_only(full)


def _states(program: Program) -> int:
    return int(np.prod(_counts(program)))


def _counts(program: Program) -> tuple[int, int, int]:
    """How many states the drawn sites have, the summed ones outside of the subsampled plate, and those inside."""
    found = [1, 1, 1]
    for z in _nested(program):
        found[z.summed + (z.summed and program.subsampled in z.axes)] *= support(z.family) ** int(
            np.prod([SIZES[a] for a in z.axes])
        )
    return found[0], found[1], found[2]


def _log_sum(x: Array) -> Array:
    """log Σ exp over the last axis, of complex numbers too."""
    top = x.real.max(-1, keepdims=True)
    return np.log(np.exp(x - top).sum(-1)) + top[..., 0]


def _log_prob(family: str, own: Array, shift: Array, k: Array) -> Array:
    """Of values number ``k``; ``own`` has the categories last, ``shift`` moves the logit of category c by c times."""
    if family == "bernoulli":
        logit = _one(own) + shift
        return k * logit - np.log1p(np.exp(logit))
    if family == "binomial":
        logit = _one(own) + shift
        return np.log(np.array([1.0, 2.0, 1.0]))[k] + k * logit - TRIALS * np.log1p(np.exp(logit))
    if family == "poisson":
        log_rate = 0.5 * (_one(own) + shift)
        factorials = np.cumsum(np.log(np.maximum(np.arange(COUNTS), 1)))
        return k * log_rate - np.exp(log_rate) - factorials[k]
    logits = own[None] + np.asarray(shift)[..., None] * np.arange(CATEGORIES)  # [states, *axes, categories]
    normalised = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    normalised = np.broadcast_to(normalised, (*np.broadcast_shapes(normalised.shape[:-1], k.shape), CATEGORIES))
    return np.take_along_axis(normalised, np.broadcast_to(k, normalised.shape[:-1])[..., None], -1)[..., 0]


def _normal(x: Array, mean: Array, spread: Array | float) -> Array:
    return -0.5 * ((x - mean) / spread) ** 2 - np.log(spread) - 0.5 * np.log(2 * np.pi)


def _states_only(x: Array) -> Array:
    return x.sum(axis=tuple(range(1, x.ndim)))


def _shape(axes: Axes) -> tuple[int, ...]:
    return tuple(SIZES[a] if a in axes else 1 for a in CANONICAL)


def _canonical(values: Array, axes: Axes) -> Array:
    """``[*axes, ...]`` as ``[b, a, u, e, ...]``."""
    order = sorted(range(len(axes)), key=lambda i: CANONICAL.index(axes[i]))
    values = np.transpose(values, [*order, *range(len(axes), values.ndim)])
    return values.reshape((*_shape(axes), *values.shape[len(axes) :]))


def _one(x: Array) -> Array:
    """With an axis for the states in front."""
    return x[None]
