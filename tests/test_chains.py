"""Chains of enumerated states, in `pyro.markov` loops and NumPyro's `scan`: at every draw of what is drawn beside them,
weighted by its probability, loss and gradient are the sums over all paths, written out."""

from __future__ import annotations

import contextlib
import itertools
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as jdist
import pyro
import pytest
import torch
import torch.distributions as tdist
from numpyro.contrib.control_flow import scan
from scipy.stats import chi2
from test_enumeration import MARK, Chosen, Jax, Torch, lib

from ppl_estimators import Constant, Enumerate, EstimatorError, Reinforce
from ppl_estimators.testing import exact_gradient

assert lib  # a fixture

STEPS, X = 3, [0.4, -1.1, 0.9]
POINT = {
    "t": [[0.3, -0.2], [-0.6, 0.5]], "m": [0.5, -1.0], "q": [[0.2, -0.4], [-0.3, 0.7]], "r": [-0.2, 0.9, 0.3],
    "b": [0.1, 0.6, -0.5], "a": 0.4,
}  # fmt: skip


class Cell(NamedTuple):
    """``marked``: which side enumerates the chain. ``plate``: is each step inside of one, of twice as many elements as
    a step sees? ``masked``: are steps after the first? ``bit``: what a bit drawn in each step depends on in the guide,
    "" if there is none; ``above``: is a bit drawn above the chain?"""

    marked: str
    plate: bool = False
    masked: bool = False
    bit: str = ""
    above: bool = False
    estimator: object = Reinforce(Constant(0.5))


SLOW = pytest.mark.slow  # the others see the same mistakes
CELLS = [
    Cell("model", plate=True, masked=True, above=True),
    Cell("model", bit="nothing"),
    Cell("guide", plate=True, masked=True),
    Cell("guide", bit="state, and moves the next"),
    Cell("guide", bit="nothing, and moves the next", estimator=Enumerate()),
    pytest.param(Cell("guide", plate=True, above=True, estimator=Enumerate()), marks=SLOW),
    pytest.param(Cell("guide", bit="nothing", above=True), marks=SLOW),
    pytest.param(Cell("guide", bit="state"), marks=SLOW),
    pytest.param(Cell("guide", bit="state before", masked=True), marks=SLOW),
]


def program(lib, cell):
    bits, normal, categorical, array = lib.dist.Bernoulli, lib.dist.Normal, lib.dist.Categorical, lib.array
    by_guide, history = cell.marked == "guide", 2 if cell.bit == "state before" else 1

    def param(name):
        value = array(POINT[name])
        return pyro.param(name, lambda: value) if lib is Torch else numpyro.param(name, value)

    def rows(table, z, shift):
        found = table[z]
        return found + shift * array([0.0, 1.0])

    def along(step, xs):
        if lib is Jax:
            return scan(lambda carry, x: (step(carry, x, ""), None), (0, 0.0), xs, history=history)
        carry = (torch.tensor(0), torch.tensor(0.0))
        for i in pyro.markov(range(STEPS), history=history):
            carry = step(carry, tuple(x[i] for x in xs), f" {i}")
        return carry

    def plates():
        """Of each step; in Pyro one for all of them."""
        if not cell.plate:
            return contextlib.nullcontext
        plate = lib.plate("n", 4, subsample_size=2) if lib is Torch else None
        return lambda: plate or lib.plate("n", 4, subsample_size=2)

    def masked(fn, first):
        return fn.mask(first > 0) if cell.masked else fn

    def model():
        g = lib.sample("g", bits(logits=array(0.3))) if cell.above else array(0.0)
        t, m, inside = param("t"), param("m"), plates()

        def step(carry, x, number):
            z, y = carry
            with inside():
                law = categorical(logits=rows(t, z, 0.4 * g[..., None]))
                z = lib.sample(f"z{number}", masked(law, x[1]), **({} if by_guide else {"infer": MARK}))
                y = lib.sample(f"y{number}", bits(logits=0.3 * z - 0.6 * y)) if cell.bit else y
                lib.sample(f"x{number}", masked(normal(m[z] + 0.7 * y + g, 1.0), x[1]), obs=x[0])
            return z, 1.0 * y

        along(step, (array(X), array([1.0] + [0.0] * (STEPS - 1))))

    def guide():
        g = lib.sample("g", bits(logits=param("a"))) if cell.above else array(0.0)
        q, b, inside = param("q"), param("b"), plates()

        def step(carry, x, number):
            old, y = carry
            with inside():
                if by_guide:
                    moved = y if "next" in cell.bit else 0.0 * g
                    law = categorical(logits=rows(q, old, x[0] + (0.5 * g + b[2] * moved)[..., None]))
                    z = lib.sample(f"z{number}", law, infer=MARK)
                else:
                    z = old
                if cell.bit:
                    up = {"state": z, "state before": old}.get(cell.bit.split(",")[0], 0.0)
                    y = lib.sample(f"y{number}", bits(logits=b[0] + b[1] * up + 0.2 * x[0]))
            return z, 1.0 * y

        if by_guide or cell.bit:
            along(step, (param("r"), array([0.0] * STEPS)))

    return model, guide


def written_out(cell):
    """Loss and gradient: g, then for each element all paths of z and y."""
    p = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in POINT.items()}
    one = torch.ones((), dtype=torch.float64)
    shift = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def bit(logits, v):
        return tdist.Bernoulli(logits=logits * one).log_prob(v * one)

    def paths():
        return itertools.product((0, 1), repeat=STEPS)

    def log_p(g, zs, ys):
        total, z, y = 0.0, 0, 0.0
        for i, (new, x) in enumerate(zip(zs, X, strict=True)):
            open_ = 0.0 if cell.masked and i else 1.0
            # of a summed site the probabilities sum to one, masked or not
            law = torch.log_softmax(p["t"][z] + 0.4 * g * shift, 0)[new]
            total = total + (law if cell.marked == "model" else open_ * law)
            if cell.bit:
                total = total + bit(0.3 * new - 0.6 * y, ys[i])
                y = ys[i]
            total = total + open_ * tdist.Normal(p["m"][new] + 0.7 * y + g, 1.0).log_prob(x * one)
            z = new
        return total

    def log_q(g, zs, ys):
        of_z, of_y, z, y = 0.0, 0.0, 0, 0.0
        for i, new in enumerate(zs):
            if cell.marked == "guide":
                moved = p["r"][i] + 0.5 * g + p["b"][2] * (y if "next" in cell.bit else 0.0)
                of_z = of_z + torch.log_softmax(p["q"][z] + moved * shift, 0)[new]
            if cell.bit:
                up = {"state": new, "state before": z}.get(cell.bit.split(",")[0], 0.0)
                of_y, y = of_y + bit(p["b"][0] + p["b"][1] * up + 0.2 * p["r"][i], ys[i]), ys[i]
            z = new
        return of_z + of_y

    total = 0.0
    for g in (0, 1) if cell.above else (0,):
        inner = 0.0
        for ys in paths() if cell.bit else [()]:
            if cell.marked == "guide":
                for zs in paths():
                    q = log_q(g, zs, ys)
                    inner = inner + q.exp() * (log_p(g, zs, ys) - q)
            else:
                q = log_q(g, (0,) * STEPS, ys)
                q = q * one
                inner = inner + q.exp() * (torch.stack([log_p(g, zs, ys) for zs in paths()]).logsumexp(0) - q)
        inner = 4 * inner if cell.plate else inner
        chance = bit(p["a"], g) if cell.above else 0.0 * one
        total = total + chance.exp() * (inner + (bit(0.3, g) - chance if cell.above else 0.0))
    grads = torch.autograd.grad(-total, list(p.values()), allow_unused=True)
    zero = {n: np.zeros_like(POINT[n]) for n in p}
    return -total.item(), {n: zero[n] if x is None else x.numpy() for n, x in zip(p, grads, strict=True)}


class Stepwise(Chosen):
    """``values``: of a site in each step, for every value of a state that it depends on."""

    def value(self, name, fn, *rest, **more):
        name, _, number = name.partition(" ")
        step = int(number) if number else more.get("step", rest[-1] if name == "y" else None)
        value = self.values[name] if step is None else self.values[name][step]
        value = value[: math.prod(fn.batch_shape)].reshape(fn.batch_shape)
        return value if self.lib is Torch else (value, [])


def draws(cell):
    """All values of what is drawn, and how probable they are: ``g``, and ``y`` of each step."""
    width = 2 if cell.bit.startswith("state") else 1
    b, shift = POINT["b"], 0.2 * np.array(POINT["r"])[:, None]
    logits = b[0] + shift + b[1] * np.arange(float(width))
    if cell.bit == "state before":
        logits[0] = b[0] + shift[0]  # before the first step the state is 0
    for g in (0, 1) if cell.above else (0,):
        for ys in itertools.product((0, 1), repeat=STEPS * width) if cell.bit else [(0,) * STEPS * width]:
            y = np.reshape(ys, (STEPS, width))
            p_y = np.prod(1 / (1 + np.exp(np.where(y == 1, -logits, logits)))) if cell.bit else 1.0
            yield (np.array([g]), y), p_y * (1 / (1 + math.exp((-1) ** g * POINT["a"])) if cell.above else 1.0)


@pytest.mark.parametrize("cell", CELLS, ids=lambda c: f"{c.marked}, {c.bit or 'no bit'}")
@pytest.mark.usefixtures("double_precision")
@pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning")
def test_a_chain_is_the_sum_over_its_paths(lib, cell):
    model, guide = program(lib, cell)
    named = {n: cell.estimator for n, there in {"g": cell.above, "y*": cell.bit}.items() if there}
    elbo = lib.ELBO(named, **({"verify": False} if lib is Torch else {}))
    source = elbo.randomness = Stepwise(lib)
    rows, weights = zip(*draws(cell), strict=True)
    assert sum(weights) == pytest.approx(1, rel=1e-12)
    if lib is Torch:
        found = []
        for g, y in rows:
            source.values = {"g": lib.array(g), "y": lib.array(y)}
            loss, gradient = lib.loss_and_gradient(elbo, model, guide, POINT)
            found.append({"": loss, **gradient})
        means = {n: sum(w * np.asarray(f[n]) for w, f in zip(weights, found, strict=True)) for n in found[0]}
    else:
        params = {n: jnp.asarray(v, float) for n, v in POINT.items()}

        def one(g, y):
            source.values = {"g": g, "y": y}
            loss, gradient = jax.value_and_grad(lambda p: elbo.loss(jax.random.key(0), p, model, guide))(params)
            return {"": loss, **gradient}

        found = jax.jit(jax.vmap(one))(*(jnp.stack([jnp.asarray(r[i]) for r in rows]) for i in (0, 1)))
        means = {n: np.tensordot(weights, x, 1) for n, x in found.items()}
    loss, gradient = written_out(cell)
    for name, exact in {"": loss, **gradient}.items():
        np.testing.assert_allclose(means.get(name, np.zeros_like(exact)), exact, rtol=1e-9, atol=1e-9, err_msg=name)


# ---- NumPyro: a scan of the guide --------------------------------------------------------------------------------


def chain(law, table, observed, steps, reverse=False, more=lambda z, old: None):
    """z goes from step to step with probabilities softmax(law[t][z]) in the guide, and by ``table`` in the model."""

    def model():
        def step(old, x):
            z = numpyro.sample("z", jdist.Categorical(logits=table[old]))
            more(z, old)
            numpyro.sample("x", jdist.Normal(1.0 * z, 0.7), obs=x)
            return z, None

        scan(step, 0, observed)

    def guide():
        def step(old, logits):
            return numpyro.sample("z", jdist.Categorical(logits=logits[old]), infer=MARK), None

        scan(step, 0, numpyro.param("law", law)[:steps], reverse=reverse)

    return model, guide


@pytest.mark.usefixtures("double_precision")
def test_a_thousand_steps_of_a_guide_that_is_the_posterior():
    """Its law by a backward recursion: the bound is the evidence, and no derivative is left; elsewhere there is."""
    x, table = jnp.sin(jnp.arange(1000.0)), 2.0 * jnp.eye(16)

    def before(later, value):
        own = jax.nn.log_softmax(table) + jdist.Normal(jnp.arange(16.0), 0.7).log_prob(value) + later
        return jax.nn.logsumexp(own, axis=1), own

    _, posterior = jax.lax.scan(before, jnp.zeros(16), x, reverse=True)
    model, guide = chain(posterior, table, x, 1000)
    elbo, key = Jax.ELBO(), jax.random.key(0)
    both = jax.vmap(jax.value_and_grad(lambda law: elbo.loss(key, {"law": law}, model, guide)))
    laws = jnp.stack([posterior, jnp.zeros_like(posterior)])
    evidence, (losses, slopes) = jax.jit(lambda: (elbo.loss(key, {}, model, lambda: None), both(laws)))()
    assert float(losses[0]) == pytest.approx(float(evidence), rel=1e-12)
    assert float(jnp.abs(slopes[0]).max()) < 1e-10
    assert float(losses[1]) > float(evidence) + 100
    assert float(jnp.abs(slopes[1]).max()) > 0.1


@pytest.mark.usefixtures("double_precision")
def test_the_posterior_of_a_chain_of_the_guide():
    """Its own marginals and draws; and u of each step, which the model sums out, given z there and before."""
    law, table, steps = jnp.array([[[0.5, -0.4], [0.2, 0.9]]] * 3), jnp.array([[0.3, -0.3], [0.8, 0.1]]), 3

    def more(z, old):
        u = numpyro.sample("u", jdist.Bernoulli(logits=0.9 * z - 1.3 * old + 0.2))
        numpyro.sample("v", jdist.Normal(1.0 * u + z, 1.0), obs=0.4)

    model, guide = chain(law, table, jnp.array([0.3, 1.1, -0.2]), steps, more=more)
    count = 4000
    draw = partial(Jax.ELBO().posterior, model=model, guide=guide, num_samples=count)
    found = jax.jit(lambda: draw(jax.random.key(3), {"law": law}))()
    q, bits = jax.nn.softmax(law[0]), np.array(list(itertools.product((0, 1), repeat=steps)))
    path = np.array([np.prod([q[old, z] for old, z in zip((0, *zs), zs, strict=False)]) for zs in bits])
    ones = bits.T @ path
    np.testing.assert_allclose(found.marginals["z"], np.broadcast_to(np.stack([1 - ones, ones], -1), (count, 3, 2)))
    z = np.asarray(found.samples["z"])
    hits = np.bincount(z @ [4, 2, 1], minlength=8)
    assert chi2.sf(np.sum((hits - count * path) ** 2 / (count * path)), 7) > 1e-3
    before, chance = np.concatenate([np.zeros_like(z[:, :1]), z[:, :-1]], 1), found.marginals["u"]
    odds = 0.9 * z - 1.3 * before + 0.2 - 0.5 * ((0.4 - 1 - z) ** 2 - (0.4 - z) ** 2)
    expected = 1 / (1 + np.exp(-odds))  # given the path that was drawn
    u = np.asarray(found.samples["u"])
    for key in itertools.product((0, 1), repeat=2):
        at = (before == key[0]) & (z == key[1])
        p, n = expected[at][0], at.sum()
        assert n > 500
        assert abs(u[at].mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert chance.shape == (count, 3, 2)


@pytest.mark.usefixtures("double_precision")
def test_exact_gradients_sum_over_the_steps_of_a_scan_one_by_one():
    """Marks in the guide's are taken off there, so that each knows nothing of the other. One-hot states."""
    q = jnp.array([[0.1, 0.5, -0.3], [0.4, -0.2, 0.0]])

    def model():
        def step(old, x):
            z = numpyro.sample("z", jdist.Multinomial(1, logits=jnp.array([0.2, -0.3, 0.5]) + old))
            numpyro.sample("x", jdist.Normal(z @ jnp.arange(3.0), 1.0), obs=x)
            return 1.0 * z, None

        scan(step, jnp.zeros(3), jnp.array(X[:2]))

    def guide():
        def step(old, q):
            return 1.0 * numpyro.sample("z", jdist.Multinomial(1, logits=q + 0.3 * old), infer=MARK), None

        scan(step, jnp.zeros(3), numpyro.param("q", q))

    exact = exact_gradient(model, guide)
    loss = jax.jit(jax.value_and_grad(lambda p: Jax.ELBO().loss(jax.random.key(0), p, model, guide)))
    value, slopes = loss({"q": q})
    assert float(value) == pytest.approx(exact.value, rel=1e-9)
    np.testing.assert_allclose(slopes["q"], exact.gradient["q"], rtol=1e-9)


def test_what_a_chain_of_the_guide_refuses():
    x, law, table = jnp.zeros(3), jnp.zeros((3, 2, 2)), jnp.zeros((2, 2))

    def carried():
        def step(old, x):
            z = numpyro.sample("z", jdist.Categorical(logits=table[old[0]]))
            w = numpyro.sample("w", jdist.Bernoulli(logits=0.3 * z + old[1]))
            numpyro.sample("x", jdist.Normal(1.0 * w, 1.0), obs=x)
            return (z, w), None

        scan(step, (0, 0), x)

    def once():
        numpyro.sample("z", jdist.Categorical(logits=table[0]).expand([3]))

    for model, guide, words in [
        (carried, chain(law, table, x, 3)[1], "site 'w': summed out over several steps of a scan, .* 'z'.*Mark 'w'"),
        (*chain(law, table, x, 3, reverse=True), "site 'z': .*runs backwards.*Write both without reverse=True"),
        (once, chain(law, table, x, 3)[1], "site 'z': enumerated in a scan of the guide.*outside of one.*Draw it in"),
    ]:
        with pytest.raises(EstimatorError, match=words):
            Jax.ELBO().loss(jax.random.key(0), {"law": law}, model, guide)


@pytest.mark.usefixtures("double_precision")
def test_a_model_that_remembers_more_than_the_dimensions_of_the_guide_hold():
    """`pyro.markov` uses dimensions again: of the guide's values two would lie along one. The fix as typed."""
    laws = [lambda e, old: 0.3 - 0.6 * e, lambda e, old: 0.2 + 0.5 * e - 0.4 * old]

    def along(law, history, **infer):
        e = old = torch.zeros(())
        for t in pyro.markov(range(4), history=history):
            e, old = pyro.sample(f"z{t}", pyro.distributions.Bernoulli(logits=law(e, old)), infer=infer), e

    def loss(history):
        elbo = Torch.ELBO(max_plate_nesting=0, verify=False)
        return elbo.loss(lambda: along(laws[1], 2), lambda: along(laws[0], history, **MARK))

    with pytest.raises(
        EstimatorError, match=r"site 'z2': enumerated in the guide along the dimension of site 'z0'.*Give"
    ):
        loss(1)
    exact = 0.0
    for path in itertools.product((0.0, 1.0), repeat=4):
        log_q, log_p = (
            sum(tdist.Bernoulli(logits=torch.tensor(law(e, old))).log_prob(torch.tensor(z)) for old, e, z in
                zip((0.0, 0.0, *path), (0.0, *path), path, strict=False))
            for law in laws
        )  # fmt: skip
        exact = exact + log_q.exp() * (log_q - log_p)
    assert loss(2) == pytest.approx(float(exact), rel=1e-10)


@pytest.mark.usefixtures("double_precision")
def test_what_depends_on_the_last_state_of_a_markov_loop_is_part_of_its_last_step():
    """The fix as typed."""

    def loss(after):
        def model():
            z = torch.tensor(0.0)
            for t in pyro.markov(range(3)):
                z = pyro.sample(f"z{t}", pyro.distributions.Bernoulli(logits=0.3 - 0.8 * z), infer=MARK)
                if t == 2 and not after:
                    pyro.sample("end", pyro.distributions.Normal(z, 1.0), obs=torch.tensor(0.4))
            if after:
                pyro.sample("end", pyro.distributions.Normal(z, 1.0), obs=torch.tensor(0.4))

        return Torch.ELBO(max_plate_nesting=0, verify=False).loss(model, lambda: None)

    with pytest.raises(EstimatorError, match=r"site 'end': .*put what depends on the last state into the last step"):
        loss(after=True)
    law = torch.log_softmax(torch.tensor([[0.0, 0.3], [0.0, -0.5]]), 1)
    end = law[0].exp() @ law.exp() @ law.exp()
    data = tdist.Normal(torch.arange(2.0), 1.0).log_prob(torch.tensor(0.4))
    assert loss(after=False) == pytest.approx(-float((end.log() + data).logsumexp(0)), rel=1e-10)
