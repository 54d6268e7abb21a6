"""What a random program is: a tree of small dataclasses whose repr is the code that makes it.

Every axis has one letter: plates ``a`` and ``b``, a batch dimension ``u`` that no plate declares, an event dimension
``e``. The program's ``layout`` says which batch dimension each has, from the right: ``("b", "u")`` is ``b`` at dim −1
and ``u`` at −2. Numbers that only have to be different from each other (initial values, masks, scales, data) follow
from the names, so that a description stays short.

A site's natural parameter is its parameter plus Σ coefficient × parent. A parent with an axis that the child lacks is
summed over it; categories count as 0, 1, 2, also where they are one-hot.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np

SIZES = {"a": 2, "b": 3, "u": 2, "e": 2, "lanes": 1000}
PLATES = ("a", "b", "lanes")
CATEGORIES = 3
TRIALS = 2  # of a binomial
SUPPORT = {"bernoulli": 2, "categorical": CATEGORIES, "onehot": CATEGORIES, "binomial": TRIALS + 1}

Axes = tuple[str, ...]
Parents = dict[str, float]


@dataclass(frozen=True)
class Under:
    """Handlers around a site. ``scale``: a number, or the axes of an array of scales; ``mask``: True or False for all,
    or the axes of an array."""

    scale: float | Axes | None = None
    mask: bool | Axes | None = None


@dataclass(frozen=True)
class Latent:
    """A latent site of the guide, and of the model if it is not ``auxiliary``.

    ``guide``, ``model``: parents on each side. ``tied``: plates along which its parameter is one number. ``shared``:
    its natural parameter also has the program's shared parameter. ``estimator``: code, None for the default.
    ``mark``: enumerated "parallel" in the "guide"; or summed out, since it is in the model only, where its own
    parameter is, by a mark ("model") or by name ("named").
    """

    name: str
    family: str = "bernoulli"
    axes: Axes = ()
    guide: Parents = field(default_factory=dict)
    model: Parents = field(default_factory=dict)
    under_guide: Under = Under()
    under_model: Under = Under()
    tied: Axes = ()
    shared: bool = False
    auxiliary: bool = False
    estimator: str | None = None
    mark: str | None = None

    @property
    def summed(self) -> bool:
        """Is it in the model only?"""
        return self.mark in ("model", "named")


@dataclass(frozen=True)
class Observed:
    """A normal datum of the model; with ``learned``, its mean has a parameter; with ``shared``, the shared one."""

    name: str
    axes: Axes = ()
    parents: Parents = field(default_factory=dict)
    under: Under = Under()
    learned: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Factor:
    """tanh of a combination of parents, on one side."""

    name: str
    axes: Axes = ()
    parents: Parents = field(default_factory=dict)
    side: str = "model"


@dataclass(frozen=True)
class Program:
    """``reverse_model``: the model's sites come in reverse order. ``reverse_plates``: a site enters its plates from
    the right to the left. ``nested``: plates stay open from one site to the next if that one is in them too.
    ``subsampled``: a plate whose minibatch has all of its elements but one."""

    latents: tuple[Latent, ...]
    observed: tuple[Observed, ...] = ()
    factors: tuple[Factor, ...] = ()
    layout: Axes = ()
    reverse_model: bool = False
    reverse_plates: bool = False
    nested: bool = False
    particles: int = 1
    vectorized: bool = True
    average_model: bool = False
    subsampled: str | None = None

    @property
    def names(self) -> list[str]:
        return [z.name for z in self.latents]

    def latent(self, name: str) -> Latent:
        return next(z for z in self.latents if z.name == name)

    def axes_of(self, name: str) -> Axes:
        return self.latent(name).axes

    def dim(self, axis: str) -> int:
        return -1 - self.layout.index(axis)

    def in_lanes(self) -> Program:
        """The same program many times over, in an outermost plate in which nothing is shared: one step gives as many
        independent draws of the gradient."""

        def lane(site: Latent | Observed | Factor) -> Latent | Observed | Factor:
            return replace(site, axes=("lanes", *site.axes))

        return replace(
            self,
            latents=tuple(map(lane, self.latents)),
            observed=tuple(map(lane, self.observed)),
            factors=tuple(map(lane, self.factors)),
            layout=(*self.layout, "lanes"),
        )


def minibatches(program: Program) -> list[tuple[int, ...]]:
    """All there are, each as likely as the others; the empty one stands for all data."""
    if program.subsampled is None:
        return [()]
    size = SIZES[program.subsampled]
    return list(combinations(range(size), size - 1))


def batch(axes: Axes) -> Axes:
    return tuple(a for a in axes if a != "e")


def natural_shape(program: Program, axes: Axes) -> tuple[int, ...]:
    """The batch shape of a site with these axes (its event not included): as short as its leftmost axis allows."""
    rank = max((-program.dim(a) for a in batch(axes)), default=0)
    there = {program.dim(a): SIZES[a] for a in batch(axes)}
    return tuple(there.get(d, 1) for d in range(-rank, 0))


def shaped(program: Program, values: np.ndarray, axes: Axes, last: int = 0) -> np.ndarray:
    """``values [*axes, *last]`` as an array of a site: ``[*batch, e, *last]``. ``last`` axes stay as they are."""
    order = sorted(range(len(axes)), key=lambda i: math.inf if axes[i] == "e" else program.dim(axes[i]))
    values = np.transpose(values, [*order, *range(len(axes), len(axes) + last)])
    event = [SIZES["e"]] if "e" in axes else []
    return values.reshape((*natural_shape(program, axes), *event, *values.shape[len(axes) :]))


def parameters(program: Program) -> dict[str, tuple[Axes, int]]:
    """``{name: (axes, number of categories or 0)}``."""
    lanes = tuple(a for a in program.layout if a == "lanes")
    found: dict[str, tuple[Axes, int]] = {}
    for z in program.latents:
        axes = tuple(a for a in z.axes if a not in z.tied)
        found[f"{'p' if z.summed else 'q'}_{z.name}"] = axes, CATEGORIES if z.family in ("categorical", "onehot") else 0
        if z.family == "normal":
            found[f"s_{z.name}"] = axes, 0
    for x in program.observed:
        if x.learned:
            found[f"p_{x.name}"] = x.axes, 0
    if any(z.shared for z in program.latents) or any(x.shared for x in program.observed):
        found["shared"] = lanes, 0
    return found


def start(program: Program, name: str) -> np.ndarray:
    """The value of a parameter, ``[*axes]`` or ``[*axes, categories]``; every lane has the same."""
    axes, categories = parameters(program)[name]
    own = tuple(a for a in axes if a != "lanes")
    shape = tuple(SIZES[a] for a in own) + ((categories,) if categories else ())
    low, high = (-0.6, 0.1) if name.startswith("s_") else (-0.9, 0.9)
    value = _rng(name).uniform(low, high, shape)
    if "lanes" in axes:
        value = np.broadcast_to(value, (SIZES["lanes"], *shape)).copy()
        value = np.moveaxis(value, 0, axes.index("lanes"))
    return value


def prior(name: str, categories: int = 0) -> np.ndarray:
    """Natural parameters of a site of the model, where it has no parents."""
    return _rng(f"prior {name}").uniform(-0.8, 0.8, (categories,) if categories else ())


def datum(name: str, axes: Axes) -> np.ndarray:
    own = tuple(a for a in axes if a != "lanes")
    value = _rng(f"datum {name}").uniform(-1.5, 1.5, tuple(SIZES[a] for a in own))
    return np.broadcast_to(value, (*([SIZES["lanes"]] if "lanes" in axes else []), *value.shape))


def scales(axes: Axes) -> np.ndarray:
    shape = tuple(SIZES[a] for a in axes)
    return np.resize([0.5, 1.7, 1.0, 0.3, 2.2, 0.8], shape)


def masks(axes: Axes) -> np.ndarray:
    shape = tuple(SIZES[a] for a in axes)
    return np.resize([True, False, True, True, True, False, False], shape)


def _rng(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def code(program: Program) -> str:
    """The program as code: its repr without what has its default value."""
    return _code(program, 0)


def _code(x: object, depth: int) -> str:
    if not hasattr(type(x), "__dataclass_fields__"):
        if isinstance(x, tuple) and x and hasattr(type(x[0]), "__dataclass_fields__"):
            inside = "".join(f"{'    ' * (depth + 1)}{_code(y, depth + 1)},\n" for y in x)
            return f"(\n{inside}{'    ' * depth})"
        return repr(x)
    fields = []
    for f in type(x).__dataclass_fields__.values():  # type: ignore[attr-defined]
        value = getattr(x, f.name)
        default = f.default_factory() if callable(f.default_factory) else f.default
        if value != default:
            fields.append(f"{f.name}={_code(value, depth)}" if f.name != "name" else repr(value))
    return f"{type(x).__name__}({', '.join(fields)})"
