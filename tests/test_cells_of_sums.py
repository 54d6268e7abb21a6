"""Sums beside draws, cell by cell: every pair of what is enumerated, where the plates are, what is masked, where a site
is drawn and by which estimator, along time and not. Each cell is one program in both libraries: at every draw they
agree, and over all draws loss and gradient are the sums over the grid of all values of all elements."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pyro
import pytest
import torch
import torch.distributions as tdist
from numpyro.contrib.control_flow import scan
from test_enumeration import MARK, Jax, Torch

from ppl_estimators import Constant, DisARM, Enumerate, Pathwise, Reinforce

ESTIMATORS = {"score": Reinforce(Constant(0.5)), "values": Enumerate(), "pair": DisARM(), "path": Pathwise()}
FACTORS = {
    "enumerated": ["model", "guide", "both"],
    "plates": ["none", "one", "inner", "nested"],  # "inner": what is enumerated is above the plate
    "subsampled": [False, True],
    "mask": ["none", "data", "all"],
    "sampled": ["above", "below", "beside"],
    "estimator": list(ESTIMATORS),
    "chain": [False, True],
}


class Cell(NamedTuple):
    enumerated: str
    plates: str
    subsampled: bool
    mask: str
    sampled: str
    estimator: str
    chain: bool

    @property
    def steps(self):
        return 2 if self.chain else 1

    @property
    def sizes(self):
        """Of the outer and the inner plate, as far as a step sees them."""
        return (2 if self.plates == "nested" else 1, 1 if self.plates == "none" else 2)

    @property
    def width(self):
        """For so many values of what is enumerated above it the site is drawn."""
        return 2 if self.sampled == "below" and self.enumerated != "model" else 1

    @property
    def elements(self):
        """Of what is drawn: steps, values, outer and inner elements."""
        return (1, 1, 1, 1) if self.sampled == "above" else (self.steps, self.width, *self.sizes)

    @property
    def axes(self):
        """Of the grid that the sum is written out on."""
        outer, inner = self.sizes[0], self.sizes[0] * self.sizes[1] * (1 + self.subsampled)
        summed = {"none": 1, "one": inner, "inner": 1, "nested": outer}[self.plates]
        drawn = 0 if self.estimator == "path" else 1 if self.sampled == "above" else inner * self.steps
        return drawn + self.steps * summed * (2 if self.enumerated == "both" else 1)

    @property
    def there(self):
        above_a_minibatch = self.subsampled and self.plates in ("inner", "nested") and self.enumerated != "guide"
        return (
            (self.plates != "none" or not self.subsampled)
            # the minibatch stands for all, its draws too, and the logarithm is biased, as a warning says
            and not (above_a_minibatch and self.sampled != "above" and self.estimator != "path")
            and self.axes <= 14
            and (self.estimator == "path" or math.prod(self.elements) <= (4 if self.estimator == "score" else 2))
        )


@functools.cache
def covering():
    """Cells that hold every pair of two factors' values that is there, and then as many triples as 40 of them can."""
    every = [c for c in (Cell(*v) for v in itertools.product(*FACTORS.values())) if c.there]

    def held(cell, size):
        return frozenset(itertools.combinations(enumerate(cell), size))

    chosen = []
    for size, count in ((2, math.inf), (3, 40)):
        missing = frozenset().union(*(held(c, size) for c in every)) - frozenset().union(
            *(held(c, size) for c in chosen)
        )
        while missing and len(chosen) < count:
            best = max(every, key=lambda c: len(held(c, size) & missing))
            chosen.append(best)
            missing -= held(best, size)
        if size == 2:
            pairs = len(chosen)
    return chosen, pairs


POINT = {
    "q": [0.3, -0.6, 0.8], "b": [-0.4, 0.9], "e law": [0.2, 0.5, -0.7], "u law": [-0.3, 0.6, 0.4],
    "s law": [0.1, 0.7, -0.5], "x law": [0.8, -1.1, 0.6],
}  # fmt: skip
X = np.array([[0.4, -0.9], [1.3, -0.2]])  # [outer, inner], and .3 more at each step
SHOWN = [1.0, 0.0]  # of the inner plate


def run(ppl, cell):
    """Model and guide. ``ppl`` opens plates, draws, and goes along time; all that values do is to be added and
    multiplied, so that the same lines serve two libraries and the grid of all values."""
    outer, inner = {"none": ("", ""), "one": ("n", ""), "inner": ("", "n"), "nested": ("m", "n")}[cell.plates]

    def side(of_guide):
        p = {n: ppl.param(n) for n in POINT}

        def drawn(carried, t):
            if of_guide:
                logit = p["b"][0] + (p["b"][1] * carried if cell.width == 2 else 0.0)
            else:
                logit = p["s law"][0] + (p["s law"][1] * carried if cell.sampled == "below" else 0.0)
            return ppl.sample("s", t, logit, given=carried)

        above = drawn(0.0, 0) if cell.sampled == "above" else 0.0

        def step(carry, t):
            for here in ppl.each(outer):
                e, u = carry[here]
                if of_guide or cell.enumerated != "model":
                    coefficients = p["q"] if of_guide else p["e law"]
                    logit = coefficients[0] + coefficients[1] * e + coefficients[2] * above
                    if cell.enumerated != "model":
                        e = ppl.sample("e", t, logit, mark=of_guide)
                if not of_guide and cell.enumerated != "guide":
                    before = u if cell.enumerated == "model" else e
                    u = ppl.sample(
                        "u", t, p["u law"][0] + p["u law"][1] * before + p["u law"][2] * above, mark=True, summed=True
                    )
                carry[here] = e, u if cell.enumerated == "model" else 0  # none is summed along time given another
                for _ in ppl.each(inner):
                    s = above
                    if cell.sampled != "above":
                        s = drawn(e if of_guide or cell.enumerated != "model" else u, t)
                    if not of_guide:
                        mean = p["x law"][0] * e + p["x law"][1] * u + p["x law"][2] * s + 0.3 * e * u - 0.2 * s * u
                        ppl.observe("x", t, mean)
                        ppl.observe("y", t, 0.4 * mean)
            return carry

        if not of_guide or cell.enumerated != "model" or cell.sampled != "above":
            ppl.along(step, dict.fromkeys(ppl.all(outer), (0, 0)))

    return side


class Vectorised:
    """A program of a library."""

    def __init__(self, lib, cell):
        self.lib, self.cell, self.plates, self.here = lib, cell, {}, ""

    def param(self, name):
        value = self.lib.array(POINT[name])
        return pyro.param(name, lambda: value) if self.lib is Torch else numpyro.param(name, value)

    def all(self, plate):
        return [()]

    def each(self, plate):
        before, self.here = self.here, plate or self.here
        with self.plate(plate) if plate else contextlib.nullcontext():
            yield ()
        self.here = before

    def plate(self, name):
        sizes = {"size": 4, "subsample_size": 2} if name == "n" and self.cell.subsampled else {"size": 2}
        made = self.plates.get(name) or self.lib.plate(name, dim={"m": -2, "n": -1}[name], **sizes)
        if self.lib is Torch:  # one for all steps
            self.plates[name] = made
        return made

    def name(self, name, t):
        return name if self.lib is Jax else f"{name}{t}"

    def sample(self, name, t, logit, given=0.0, mark=False, summed=False):
        dist, continuous = self.lib.dist, name == "s" and self.cell.estimator == "path"
        fn = dist.Normal(logit, self.lib.array(0.8)) if continuous else dist.Bernoulli(logits=logit)
        fn = (
            self.masked(fn, t) if self.cell.mask == "all" and not (name == "s" and self.cell.sampled == "above") else fn
        )
        return self.lib.sample(self.name(name, t), fn, infer=dict(MARK) if mark else {})

    def observe(self, name, t, mean):
        x = self.lib.array(X)
        x = x if self.cell.plates == "nested" else x[0] if self.here else x[0, 0]
        fn = self.lib.dist.Normal(mean, self.lib.array(1.0))
        fn = self.masked(fn, t) if self.cell.mask != "none" and name == "x" else fn
        self.lib.sample(self.name(name, t), fn, obs=x + 0.3 * t)

    def masked(self, fn, t):
        if self.cell.plates == "none":
            return fn.mask(self.lib.array(1.0 * self.cell.chain) * (t < 1) > 0)
        return fn.mask(self.lib.array(SHOWN) > 0) if self.here == "n" else fn

    def along(self, step, carry):
        if not self.cell.chain:
            return step(carry, 0)
        if self.lib is Jax:
            return scan(lambda c, t: (step(dict(c), t), None), carry, jnp.arange(2))
        for t in pyro.markov(range(2)):
            carry = step(carry, t)
        return carry


class Grid:
    """Every site of every element has an axis of its own, on which all its values are; ``noise`` makes the continuous
    ones. Elements that a step does not see are like those that it does."""

    def __init__(self, cell, noise):
        self.cell, self.noise, self.where, self.values, self.axes, self.summed = cell, noise, {}, {}, 0, []
        self.parameters = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in POINT.items()}
        self.chance = self.log_q = self.log_p = torch.zeros((), dtype=torch.float64)
        for self.of_guide in (True, False):
            run(self, cell)(self.of_guide)

    def loss_and_gradient(self):
        """E_q[log q − log Σ p]."""
        full = (2,) * self.axes
        log_p, chance, log_q = (x.expand(full) for x in (self.log_p, self.chance, self.log_q))
        if self.summed:
            log_p = log_p.logsumexp(self.summed, keepdim=True)
            chance, log_q = (self.once(x) for x in (chance, log_q))
        loss = (chance.exp() * (log_q - log_p)).sum()
        found = torch.autograd.grad(loss, list(self.parameters.values()), allow_unused=True)
        zero = {n: np.zeros(len(v)) for n, v in POINT.items()}
        return loss.item(), {n: zero[n] if g is None else g.numpy() for n, g in zip(zero, found, strict=True)}

    def once(self, x):
        """Along what the model sums: the guide does not know of it."""
        for axis in self.summed:
            x = x.narrow(axis, 0, 1)
        return x

    def param(self, name):
        return self.parameters[name]

    def elements(self, plate):
        return range(4 if plate == "n" and self.cell.subsampled else 2) if plate else [0]

    def all(self, plate):
        return list(self.elements(plate))

    def each(self, plate):
        for i in self.elements(plate):
            before, self.where = self.where, {**self.where, plate: i} if plate else self.where
            yield i
            self.where = before

    def sample(self, name, t, logit, given=0.0, mark=False, summed=False):
        key, continuous = (name, t, *self.where.items()), name == "s" and self.cell.estimator == "path"
        law = tdist.Normal(logit, 0.8) if continuous else tdist.Bernoulli(logits=logit, validate_args=False)
        if key not in self.values and continuous:
            noise = torch.tensor(self.noise)[t, :, self.where.get("m", 0), self.where.get("n", 0) % 2]
            self.values[key] = logit + 0.8 * (noise[0] if len(noise) == 1 else noise[0] + (noise[1] - noise[0]) * given)
        elif key not in self.values:
            self.axes += 1
            self.values[key] = torch.arange(2.0, dtype=torch.float64).reshape(2, *(1,) * (self.axes - 1))
            self.summed += [-self.axes] if summed else []
        log_p = law.log_prob(self.values[key])
        hidden = self.cell.mask == "all" and not summed and not (name == "s" and self.cell.sampled == "above")
        cost = log_p * self.shown(t) if hidden else log_p
        if not self.of_guide:
            self.log_p = self.log_p + cost
        else:
            self.log_q, self.chance = self.log_q + cost, self.chance + (0.0 if continuous else log_p)
        return self.values[key]

    def observe(self, name, t, mean):
        x = X[self.where.get("m", 0), self.where.get("n", 0) % 2] + 0.3 * t
        log_p = tdist.Normal(mean, 1.0).log_prob(torch.tensor(x))
        self.log_p = self.log_p + log_p * (self.shown(t) if self.cell.mask != "none" and name == "x" else 1.0)

    def shown(self, t):
        if self.cell.plates == "none":
            return float(self.cell.chain and t < 1)
        return SHOWN[self.where["n"] % 2] if "n" in self.where else 1.0

    def along(self, step, carry):
        for t in range(self.cell.steps):
            carry = step(carry, t)
        return carry


class Chosen:
    """Draws, or the noise of them, as they are given: ``[steps, values, outer, inner]``."""

    def __init__(self, lib, elements):
        self.lib, self.elements = lib, elements

    def row(self, name, step, shape):
        step = int(name[1:]) if self.lib is Torch else step
        values = self.elements[0 if step is None or len(self.elements) == 1 else step].reshape(-1)
        return values[: math.prod(shape)].reshape(shape)

    def value(self, name, fn, *rest, **more):
        law = fn
        while hasattr(law, "base_dist"):
            law = law.base_dist
        value = self.row(name, more.get("step", rest[-1] if rest else None), fn.batch_shape)
        value = law.loc + law.scale * value if hasattr(law, "loc") else value
        return value if self.lib is Torch else (value, [])

    def noise(self, names, label, noise, key, step=None):
        row = self.row(names if self.lib is Torch else names[0], step, noise.shape)
        return row if self.lib is Torch else row[None]


def draws(cell):
    """All values of what is drawn, or all cells of the noise of a pair, and how probable they are; one noise of a path.
    ``[draws, steps, values, outer, inner]``."""
    shape, rng = cell.elements, np.random.default_rng(0)
    if cell.estimator == "path":
        return rng.normal(size=(1, *shape)), np.ones(1)
    p = 1 / (1 + np.exp(-(POINT["b"][0] + POINT["b"][1] * np.arange(shape[1]))))
    edges = np.sort([0 * p, p, 1 - p, 0 * p + 1], axis=0)
    of_pair = cell.estimator == "pair"
    values = (edges[1:] + edges[:-1]) / 2 if of_pair else np.array([0 * p, 0 * p + 1])  # [choices, values]
    chance = np.diff(edges, axis=0) if of_pair else np.array([1 - p, p])
    of = np.broadcast_to(np.arange(shape[1])[:, None, None], shape).ravel()
    choices = np.array(list(itertools.product(range(len(values)), repeat=math.prod(shape))))
    return values[choices, of].reshape(-1, *shape), chance[choices, of].prod(1)


def both(lib, cell, rows):
    """Losses and gradients at each draw."""

    def model():
        run(Vectorised(lib, cell), cell)(False)

    def guide():
        run(Vectorised(lib, cell), cell)(True)

    elbo = lib.ELBO({"s*": ESTIMATORS[cell.estimator]}, **({"verify": False} if lib is Torch else {}))

    def one(row):
        elbo.randomness = Chosen(lib, row)
        if lib is Torch:
            loss, gradient = lib.loss_and_gradient(elbo, model, guide, POINT)
        else:
            params = {n: jnp.asarray(v) for n, v in POINT.items()}
            loss, gradient = jax.value_and_grad(lambda p: elbo.loss(jax.random.key(0), p, model, guide))(params)
        return {"": loss, **gradient}

    if lib is Jax:
        return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(jnp.asarray(rows)))
    found = [one(torch.tensor(row)) for row in rows]
    return {n: np.array([f[n] for f in found]) for n in found[0]}


CHOSEN, PAIRS = covering()


def test_the_cells_hold_every_pair():
    assert len(CHOSEN) == 40
    assert len(set(CHOSEN)) == 40
    assert set(CHOSEN) >= QUICK
    assert PAIRS < 40
    for i, of in enumerate(FACTORS.values()):
        assert {c[i] for c in CHOSEN} == set(of)


#: the first hold most pairs; in NumPyro the plates expand the law of this one once more, after the values of its state
QUICK = {*CHOSEN[:8], Cell("guide", "nested", True, "all", "below", "path", True)}


@pytest.mark.parametrize(
    "cell",
    [pytest.param(c, marks=[pytest.mark.slow] * (c not in QUICK)) for c in CHOSEN],
    ids=lambda c: ", ".join(str(v) for v in c),
)
@pytest.mark.usefixtures("double_precision")
@pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning")
def test_a_cell(cell):
    rows, weights = draws(cell)
    assert weights.sum() == pytest.approx(1, rel=1e-12)
    loss, gradient = Grid(cell, rows[0]).loss_and_gradient()
    torch_, jax_ = (both(lib, cell, rows) for lib in (Torch, Jax))
    for name, exact in {"": loss, **gradient}.items():
        np.testing.assert_allclose(torch_[name], jax_[name], rtol=1e-10, atol=1e-10, err_msg=f"twins: {name}")
        mean = np.tensordot(weights, jax_[name], 1)
        np.testing.assert_allclose(mean, exact, rtol=1e-9, atol=1e-9, err_msg=name)
