"""Sites inside NumPyro's scan, exactly: the gradient at every noise, integrated, is the sum over all paths, whichever
way guide and model run and however far their memories reach; and it is that of a Pyro loop over the same steps."""

from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pyro
import pyro.distributions as tdist
import pytest
import torch
from injected import FromTableJax, FromTableTorch, InjectedJax, InjectedTorch, cells, columns, grid, moments
from numpyro.contrib.control_flow import scan

from ppl_estimators import (
    RELAX,
    DisARM,
    DisARMTree,
    Enumerate,
    EvolutionStrategy,
    GumbelSoftmax,
    ImplicitPathwise,
    ImportanceWeighted,
    Learned,
    MeasureValued,
    MovingAverage,
    Pathwise,
    Reinforce,
    Repeat,
    StochasticTriple,
    SumAndSample,
    UnorderedSet,
)
from ppl_estimators.core.credit import Graph
from ppl_estimators.numpyro import with_estimators
from ppl_estimators.numpyro.run import Keys, Program
from ppl_estimators.numpyro.survey import survey
from ppl_estimators.pyro import with_estimators as torch_hook
from ppl_estimators.testing import exact_gradient

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning"),
]

DATA = np.array([0.3, -1.0, 1.4])
A, B = np.array([0.5, -0.3, 0.2]), 0.6
START = {"a": A, "b": np.array(B)}
MEMORIES = {  # what the model carries on of a step's bit and of what it carried before
    "nothing": lambda z, old: (0.0, 0.0),
    "one step": lambda z, old: (z, 0.0),
    "two steps": lambda z, old: (z, old[0]),
    "all steps": lambda z, old: (z + 0.5 * old[0], z),
}


def program(guide_reversed, model_reversed, remembers, memory, more=False):
    """``remembers``: does a bit of the guide depend on that before it? ``more``: a plate inside, a site of the guide
    that the whole path moves and that moves every step, and an observation of the end and of the first step."""

    def model():
        shift = numpyro.sample("w", dist.Bernoulli(0.5)) if more else 0.0

        def step(old, y):
            z = numpyro.sample("z", dist.Bernoulli(logits=0.7 * old[0] - 0.4 * old[1] - 0.2))
            with numpyro.plate("pair", 2):
                numpyro.sample("x", dist.Normal(1.5 * z + 0.3 * old[0] + shift, 1.3), obs=y + jnp.arange(2.0))
            carry = MEMORIES[memory](1.0 * z, old)
            return tuple(jnp.asarray(x, float) for x in carry), z

        end, path = scan(step, (0.0, 0.0), jnp.asarray(DATA), reverse=model_reversed)
        if more:
            numpyro.sample("end", dist.Normal(path[0] + end[0], 1.0), obs=1.0)

    def guide():
        a, b = numpyro.param("a", jnp.asarray(A)), numpyro.param("b", jnp.asarray(B))

        def step(carry, logit):
            z = 1.0 * numpyro.sample("z", dist.Bernoulli(logits=logit + b * carry))
            return z if remembers else carry, z

        _, path = scan(step, 0.0 if remembers else 0.5, a, reverse=guide_reversed)
        if more:
            numpyro.sample("w", dist.Bernoulli(logits=path[0] - path[2] - 0.5))

    return model, guide


INF = float("inf")
#: guide reversed, model reversed, does the guide remember, the model's memory; the first and the last step that moves
WINDOWS = [
    (False, False, False, "nothing", {"z": (0, 0), "x": (0, 0), "q": (0, 0)}),
    (False, False, False, "one step", {"z": (0, 1), "x": (0, 1), "q": (0, 0)}),
    (True, False, False, "two steps", {"z": (0, 2), "x": (0, 1), "q": (0, 0)}),
    (False, False, True, "nothing", {"z": (0, INF), "x": (0, INF), "q": (0, INF)}),
    (True, False, False, "all steps", {"z": (0, INF), "x": (0, INF), "q": (0, 0)}),
    (True, False, True, "nothing", {"z": (-INF, 0), "x": (-INF, 0), "q": (-INF, 0)}),
    (True, False, True, "one step", {"z": (-INF, 1), "x": (-INF, 1), "q": (-INF, 0)}),
    (True, False, True, "all steps", {"z": None, "x": None, "q": (-INF, 0)}),
    (False, True, True, "all steps", {"z": None, "x": (0, INF), "q": (0, INF)}),
]


@pytest.mark.parametrize(("guide_reversed", "model_reversed", "remembers", "memory", "expected"), WINDOWS)
def test_the_steps_that_a_step_moves(guide_reversed, model_reversed, remembers, memory, expected):
    model, guide = program(guide_reversed, model_reversed, remembers, memory)
    params = jax.tree.map(jnp.asarray, START)
    run = Program(model, guide, (), {}, params, jax.random.key(1))
    found = survey(run, Keys(jax.random.key(0)), lambda: None).structure
    graph = Graph(found.ancestors, {s.name: s.plates for s in found.sites}, found.steps)
    windows = {"q" if t.side == "guide" else t.site: graph.window("z", t) for t in found.terms}
    assert {n: w and (w.first, w.last) for n, w in windows.items()} == expected
    flipped = {n for n, w in windows.items() if w is not None and w.flipped}
    assert flipped == ({"x"} if model_reversed else set())


class Chosen:
    """Rows of uniform and normal numbers, ``[K, steps, n]`` in a scan, of which each label takes its own. A discrete
    draw of the library's own is made from the first uniform, a continuous one from the first normal."""

    def numbers(self, name, law, step):
        table = self.table[name]["normal" if law == "normal" else "uniform"]
        row = table[self.row]
        return row if step is None else row[step]

    def noise_of(self, name, label, noise, step=None):
        count, first = noise.shape[-1] if noise.shape else 1, 1 + crc32(label.encode()) % 8
        found = self.numbers(name, noise.law, step)[..., first : first + count]
        return found if noise.shape and len(noise.shape) == found.ndim else found[..., 0]


class ChosenJax(Chosen, FromTableJax):
    def value(self, name, fn, key, step=None):
        if not fn.support.is_discrete:
            return fn.loc + fn.scale * self.numbers(name, "normal", step)[..., 0], []
        u = self.numbers(name, "uniform", step)[..., 0]
        p = 1 - fn.probs if isinstance(fn, dist.BernoulliLogits) else jnp.cumsum(fn.probs, -1)
        value = u > p if isinstance(fn, dist.BernoulliLogits) else jnp.sum(u > p)
        return value.astype(jax.eval_shape(fn.sample, jax.random.key(0)).dtype), []

    def noise(self, names, label, noise, keys, step=None):
        return jnp.stack([self.noise_of(n, label, noise, step) for n in names])


class ChosenTorch(Chosen, FromTableTorch):
    def value(self, name, fn, *args, **kwargs):
        if not fn.support.is_discrete:
            return fn.loc + fn.scale * self.numbers(name, "normal", None)[..., 0]
        u, p = self.numbers(name, "uniform", None)[..., 0], fn.probs.detach()
        return 1.0 * (u > 1 - p) if isinstance(fn, tdist.Bernoulli) else (u > p.cumsum(-1)).sum()

    def noise(self, name, label, noise, like):
        return self.noise_of(name, label, noise)


class Jax(InjectedJax):
    source = ChosenJax


class Torch(InjectedTorch):
    source = ChosenTorch


def all_noise(remembers, more):
    """A point and the weight of each cell in which no path changes."""
    carries = (0.0, 1.0) if remembers else (0.5,)
    steps = [[a + B * c for c in carries] for a in A]
    points, weights = grid(*(cells(*(1 / (1 + np.exp(s * x)) for x in xs for s in (1, -1))) for xs in steps))
    tables = {"z": {"uniform": np.repeat(columns(points, 1, 3, 1), 16, -1)}}
    if more:  # one more bit, whose three logits are −1.5, −0.5 and 0.5
        u, width = cells(*(1 / (1 + np.exp(-x)) for x in (-1.5, -0.5, 0.5, 1.5)))
        tables["z"]["uniform"] = np.repeat(tables["z"]["uniform"], len(u), 0)
        tables["w"] = {"uniform": np.repeat(np.tile(u, len(weights))[:, None, None], 16, -1)}
        weights = np.outer(weights, width).ravel()
    return tables, weights


EXACT = [
    (True, False, True, "one step", False),
    (True, False, False, "two steps", False),
    (True, True, True, "one step", False),
    (False, False, True, "all steps", True),
]


@pytest.mark.parametrize(("guide_reversed", "model_reversed", "remembers", "memory", "more"), EXACT)
def test_every_step_is_credited_with_all_that_it_moves(guide_reversed, model_reversed, remembers, memory, more):
    model, guide = program(guide_reversed, model_reversed, remembers, memory, more)
    exact = exact_gradient(model, guide, params=START).gradient
    tables, weights = all_noise(remembers, more)
    elbos = [Jax(e) for e in (Reinforce(), DisARM(), Enumerate())]

    @jax.jit
    def gradients(tables):
        def one(table):
            def loss(p, elbo):
                elbo.randomness.table = table
                return elbo.loss(jax.random.key(0), p, model, guide)

            return [jax.grad(loss)(jax.tree.map(jnp.asarray, START), elbo) for elbo in elbos]

        return jax.lax.map(one, tables, batch_size=200)

    variances = []
    for found in gradients(jax.tree.map(jnp.asarray, tables)):
        mean, variance = moments(np.concatenate([found["a"], np.asarray(found["b"])[:, None]], 1), weights)
        np.testing.assert_allclose(mean, np.append(exact["a"], exact["b"]), atol=1e-12)
        variances.append(variance.sum())
    assert sorted(variances, reverse=True) == variances  # each of them looks at more values


# ---- a Python loop over the same steps -------------------------------------------------------------------------------

POINT = {"a": A, "b": np.array(B), "c": np.array([0.3, -0.5, 0.4]), "m": np.array([0.2, -0.3])}


def scan_model():
    def step(old, y):
        z = numpyro.sample("z", dist.Bernoulli(logits=0.7 * old - 0.2))
        k = numpyro.sample("k", dist.Categorical(logits=jnp.array([0.2, -0.1, 0.4]) * (1 + old)))
        w = numpyro.sample("w", dist.Normal(0.3 * old, 1.0))
        numpyro.sample("x", dist.Normal(1.5 * z + 0.3 * k + 0.7 * w, 1.3), obs=y)
        return z + 0.2 * w, None

    scan(step, 0.0, jnp.asarray(DATA))


def scan_guide():
    a, b, c, m = (numpyro.param(n, jnp.asarray(POINT[n])) for n in "abcm")

    def step(old, logit):
        z = numpyro.sample("z", dist.Bernoulli(logits=logit + b * old))
        k = numpyro.sample("k", dist.Categorical(logits=jax.nn.log_softmax(c * (1 + z))))  # as Pyro makes them
        w = numpyro.sample("w", dist.Normal(m[0] + 0.5 * k, jnp.exp(m[1] + 0.1 * old)))
        return z + 0.1 * k + 0.2 * w, None

    scan(step, 0.0, a)


def loop_model():
    old = torch.tensor(0.0)
    for t in pyro.markov(range(3)):
        z = pyro.sample(f"z_{t}", tdist.Bernoulli(logits=0.7 * old - 0.2))
        k = pyro.sample(f"k_{t}", tdist.Categorical(logits=torch.tensor([0.2, -0.1, 0.4]) * (1 + old)))
        w = pyro.sample(f"w_{t}", tdist.Normal(0.3 * old, 1.0))
        pyro.sample(f"x_{t}", tdist.Normal(1.5 * z + 0.3 * k + 0.7 * w, 1.3), obs=torch.tensor(DATA[t]))
        old = z + 0.2 * w


def loop_guide():
    a, b, c, m = (pyro.param(n, torch.tensor(POINT[n])) for n in "abcm")
    old = torch.tensor(0.0)
    for t in pyro.markov(range(3)):
        z = pyro.sample(f"z_{t}", tdist.Bernoulli(logits=a[t] + b * old))
        k = pyro.sample(f"k_{t}", tdist.Categorical(logits=c * (1 + z)))
        w = pyro.sample(f"w_{t}", tdist.Normal(m[0] + 0.5 * k, torch.exp(m[1] + 0.1 * old)))
        old = z + 0.1 * k + 0.2 * w


MIXES = {
    "pairs": {"z": DisARM(), "k": UnorderedSet(2), "w": Pathwise()},
    "single values": {"z": Enumerate(), "k": StochasticTriple(), "w": MeasureValued()},
    "slopes": {"z": GumbelSoftmax(0.7), "k": DisARMTree(), "w": ImplicitPathwise()},
    "compositions": {"z": Repeat(2, DisARM()), "k": Reinforce(), "w": EvolutionStrategy()},
    "averages": {"z": Reinforce(MovingAverage(0.8) + Learned(hidden=3)), "k": SumAndSample(2), "w": Pathwise()},
    "a network": {"z": RELAX(hidden=3), "k": Reinforce(), "w": Reinforce(MovingAverage())},
    "under a bound": {"z": DisARM(), "k": Reinforce(), "w": Pathwise()},
}


@pytest.mark.parametrize("mix", MIXES)
def test_a_scan_is_a_loop_over_its_steps(mix):
    """Loss, gradient, and what is kept, after two steps of state; what one network learns at all steps is what those
    of the loop's sites do together."""
    rng, estimators = np.random.default_rng(5), MIXES[mix]
    bound = {"objective": ImportanceWeighted(), "num_particles": 2} if mix == "under a bound" else {}
    guide, twin_guide = (
        with_estimators(scan_guide, estimators),
        torch_hook(loop_guide, {f"{n}_*": e for n, e in estimators.items()}),
    )
    elbo, twin = Jax(**bound), Torch(**bound)
    trace = numpyro.handlers.trace(numpyro.handlers.seed(guide, 0)).get_trace()
    state = {n: m["value"] for n, m in trace.items() if m["type"] == "mutable"}
    kept = {n: jnp.asarray(rng.normal(size=m["value"].shape)) for n, m in trace.items()
            if m["type"] == "param" and "$" in n}  # fmt: skip
    shape = (bound.get("num_particles", 1), 3, 16)
    tables = [
        {n: {"uniform": rng.uniform(size=shape), "normal": rng.normal(size=shape)} for n in "zkw"} for _ in range(2)
    ]

    def by_step(table):
        return {
            f"{n}_{t}": {k: torch.tensor(x[:, t]) for k, x in laws.items()}
            for n, laws in table.items()
            for t in range(3)
        }

    pyro.clear_param_store()
    twin.randomness.table = by_step(tables[0])
    twin.loss_and_grads(loop_model, twin_guide)  # declares
    store = pyro.get_param_store()
    with torch.no_grad():
        for name in list(store.keys()):
            site, _, label = name.partition("$")
            if label.startswith("state."):
                store[name].zero_()
            elif label:
                store[name].unconstrained().copy_(torch.tensor(np.array(kept[f"{site[0]}${label}"])))

    @jax.jit
    def step(state, table):
        def loss(p):
            elbo.randomness.table = table
            out = elbo.loss_with_mutable_state(jax.random.key(0), {**p, **state}, scan_model, guide)
            return out["loss"], out["mutable_state"]

        return jax.value_and_grad(loss, has_aux=True)({**jax.tree.map(jnp.asarray, POINT), **kept})

    for table in tables:
        (value, state), gradient = step(state or {}, jax.tree.map(jnp.asarray, table))
        for v in store.values():
            v.unconstrained().grad = None
        twin.randomness.table = by_step(table)
        np.testing.assert_allclose(twin.loss_and_grads(loop_model, twin_guide), value, rtol=1e-10)
        theirs = {}
        for name in store.keys():
            site, _, label = name.partition("$")
            if label.startswith("state."):
                ours = state[f"{site[0]}$state"][label.removeprefix("state.")][int(site[2:])]
                np.testing.assert_allclose(store[name].detach(), ours, rtol=1e-10, err_msg=name)
                continue
            grad = store[name].unconstrained().grad
            key = f"{site[0]}${label}" if label else name
            theirs[key] = theirs.get(key, 0) + (0 if grad is None else grad.numpy())
        assert theirs.keys() == gradient.keys()
        for name, g in theirs.items():
            np.testing.assert_allclose(g, gradient[name], rtol=1e-10, atol=1e-10, err_msg=name)
