"""Enumerated sites beside sampled ones, in both libraries: against sums written out, and the libraries' own."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as jdist
import pyro
import pyro.distributions as tdist
import pytest
import torch
from numpyro.contrib.control_flow import scan
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.contract import einsum

from ppl_estimators import (
    Constant,
    Enumerate,
    EstimatorError,
    EstimatorWarning,
    ImportanceWeighted,
    KLAnnealed,
    Reinforce,
)
from ppl_estimators import numpyro as ours_jax
from ppl_estimators import pyro as ours_torch
from ppl_estimators.core.elimination import Factor, marginal
from ppl_estimators.core.site import Plate
from ppl_estimators.numpyro.distributions import log_p_of_all, unmasked
from ppl_estimators.numpyro.enumeration import support
from ppl_estimators.pyro.ops import OPS
from ppl_estimators.testing import exact_gradient

MARK = {"enumerate": "parallel"}
X = [0.3, -1.2]


class Torch:
    sample, plate, dist = staticmethod(pyro.sample), staticmethod(pyro.plate), tdist
    ELBO, library_source = ours_torch.EstimatorELBO, ours_torch.elbo.Randomness
    array = staticmethod(lambda x: torch.as_tensor(x, dtype=torch.float64))

    @staticmethod
    def loss_and_gradient(elbo, model, guide, point):
        pyro.clear_param_store()
        for name, value in point.items():
            pyro.param(name, torch.tensor(value, dtype=torch.float64))
        loss = elbo.loss_and_grads(model, guide)
        grads = {n: p.grad for n, p in pyro.get_param_store().named_parameters()}
        return loss, {n: np.zeros_like(point[n]) if g is None else g.numpy() for n, g in grads.items()}

    @staticmethod
    def param(name):
        return pyro.param(name, lambda: torch.tensor(POINT[name], dtype=torch.float64))


class Jax:
    sample, plate, dist = staticmethod(numpyro.sample), staticmethod(numpyro.plate), jdist
    ELBO, library_source = ours_jax.EstimatorELBO, ours_jax.elbo.Randomness
    array = staticmethod(lambda x: jnp.asarray(x, float))

    @staticmethod
    def loss_and_gradient(elbo, model, guide, point):
        params = {n: jnp.asarray(v, float) for n, v in point.items()}
        return jax.jit(jax.value_and_grad(lambda p: elbo.loss(jax.random.key(0), p, model, guide)))(params)

    @staticmethod
    def param(name):
        return numpyro.param(name, jnp.asarray(POINT.get(name, 0.0), float))


@pytest.fixture(params=[Torch, Jax], ids=["pyro", "numpyro"])
def lib(request):
    with jax.enable_x64(True):
        pyro.set_rng_seed(0)
        yield request.param
        pyro.clear_param_store()


# ---- elimination --------------------------------------------------------------------------------------------------


def test_elimination_against_pyros_own():
    """A global variable above two plates, one inside the other, and a pair that depends on each other."""
    generator = torch.Generator().manual_seed(0)
    i, j = Plate("i", -1, 2), Plate("j", -2, 3)
    sizes = {"a": 2, "b": 3, "c": 2, i: 2, j: 3}
    axes = [("a",), (i, "a", "b"), (j, i, "b", "c"), (j, i, "c"), (i, "b")]
    factors = [Factor(torch.randn([sizes[a] for a in f], generator=generator, dtype=torch.float64), f) for f in axes]
    equation = ",".join("".join(a if isinstance(a, str) else a.name for a in f) for f in axes) + "->"
    (expected,) = einsum(
        equation, *(f.value for f in factors), plates="ij", backend="pyro.ops.einsum.torch_log", modulo_total=True
    )
    torch.testing.assert_close(marginal(OPS, factors).value, expected, rtol=1e-12, atol=0)


def test_a_chain_and_a_tree_that_no_product_could_hold():
    """20 sites of 10 values in a chain, 15 in a tree; impossible values, whose logarithm has no derivative."""
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(10, 10, generator=generator, dtype=torch.float64, requires_grad=True)
    chain = [Factor(table, (f"z{k}", f"z{k + 1}")) for k in range(19)]
    with torch.no_grad():
        table[3] = -math.inf
    message = torch.zeros(10, dtype=torch.float64)
    for _ in chain:
        message = torch.logsumexp(table + message, 1)
    value = marginal(OPS, chain).value
    torch.testing.assert_close(value, torch.logsumexp(message, 0))
    (slope,) = torch.autograd.grad(value, table)
    assert torch.isfinite(slope).all()
    torch.testing.assert_close(slope.sum(), torch.tensor(19.0, dtype=torch.float64))
    tree = [Factor(table.detach(), (f"t{(k - 1) // 2}", f"t{k}")) for k in range(1, 15)]
    up = {k: torch.zeros(10, dtype=torch.float64) for k in range(15)}
    for k in range(14, 0, -1):
        up[(k - 1) // 2] = up[(k - 1) // 2] + torch.logsumexp(table.detach() + up[k], 1)
    torch.testing.assert_close(marginal(OPS, tree).value, torch.logsumexp(up[0], 0))


# ---- sums beside draws ----------------------------------------------------------------------------------------------

POINT = {"a": 0.4, "b": [-0.3, 0.8], "c": [0.2, -0.9], "m": [0.6, -0.5]}


def mixed(lib):
    """y enumerated in the guide, above z that is drawn and below g that is; w summed out in the model."""
    bits, normal, categorical, array = lib.dist.Bernoulli, lib.dist.Normal, lib.dist.Categorical, lib.array

    def model():
        m = lib.param("m")
        g = lib.sample("g", bits(logits=array(0.3)))
        with lib.plate("n", 2):
            y = lib.sample("y", bits(logits=0.2 + 0.5 * g))
            z = lib.sample("z", bits(logits=m[0] * y - 0.4))
            w = lib.sample("w", categorical(logits=rows(lib, z, 0.3 * g, -y)), infer=MARK)
            lib.sample("x", normal(w + m[1] * y - z + 0.7 * g, 1.0), obs=array(X))

    def guide():
        b, c = lib.param("b"), lib.param("c")
        g = lib.sample("g", bits(logits=lib.param("a")))
        with lib.plate("n", 2):
            y = lib.sample("y", bits(logits=b[0] + b[1] * g), infer=MARK)
            lib.sample("z", bits(logits=c[0] + c[1] * y))

    return model, guide


def rows(lib, *columns):
    backend = torch if lib is Torch else jnp
    return backend.stack(backend.broadcast_arrays(*columns) if lib is Jax else torch.broadcast_tensors(*columns), -1)


def mixed_exactly():
    """The loss and its gradient, every sum written out."""
    p = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in POINT.items()}
    one = torch.ones((), dtype=torch.float64)

    def bit(logits, v):
        return tdist.Bernoulli(logits=logits * one).log_prob(v * one)

    total = 0.0
    for g in (0, 1):
        log_q_g = bit(p["a"], g)
        inner = bit(0.3, g) - log_q_g
        for x in X:
            for y, z in itertools.product((0, 1), repeat=2):
                log_q_y, log_q_z = bit(p["b"][0] + p["b"][1] * g, y), bit(p["c"][0] + p["c"][1] * y, z)
                law = torch.log_softmax(torch.tensor([z, 0.3 * g, -y], dtype=torch.float64), 0)
                means = torch.arange(3.0, dtype=torch.float64) + p["m"][1] * y - z + 0.7 * g
                log_p = bit(0.2 + 0.5 * g, y) + bit(p["m"][0] * y - 0.4, z)
                log_p = log_p + torch.logsumexp(law + tdist.Normal(means, 1.0).log_prob(x * one), 0)
                inner = inner + (log_q_y + log_q_z).exp() * (log_p - log_q_z)
                inner = inner - (log_q_y + log_q_z).exp() * log_q_y
        total = total + log_q_g.exp() * inner
    loss = -total
    return loss.item(), dict(zip(p, (g.numpy() for g in torch.autograd.grad(loss, list(p.values()))), strict=True))


class Chosen:
    """Draws as they are given; the probability of what was drawn."""

    def __init__(self, lib):
        self.lib, self.values, self.chance = lib, {}, {}

    def value(self, name, fn, *rest, **more):
        value = self.values[name]
        self.chance[name] = fn.log_prob(value)
        return value if self.lib is Torch else (value, [])


@pytest.mark.parametrize(
    "estimators",
    [{"g": Enumerate(), "z": Reinforce(Constant(0.5))}, {"g": Reinforce(Constant(-1.0)), "z": Enumerate()}],
    ids=["score", "enumerate"],
)
def test_sums_and_draws_in_one_program_are_exact(lib, estimators):
    """Integrated over all draws, loss and gradient are the sums written out."""
    model, guide = mixed(lib)
    elbo = lib.ELBO(estimators, **({"verify": False} if lib is Torch else {}))
    source = elbo.randomness = Chosen(lib)
    states = [(g, np.reshape(z, (2, 2))) for g in (0, 1) for z in itertools.product((0, 1), repeat=4)]
    a, (b, c) = POINT["a"], (POINT["b"], POINT["c"])

    def weight(g, z):  # z for each value of y, and each element
        p_g, p_z = 1 / (1 + math.exp(-a)), 1 / (1 + np.exp(-(c[0] + c[1] * np.arange(2.0)[:, None])))
        return (p_g if g else 1 - p_g) * np.prod(np.where(z, p_z, 1 - p_z))

    weights = np.array([weight(g, z) for g, z in states])
    assert abs(weights.sum() - 1) < 1e-12 and b
    if lib is Torch:
        found = []
        for g, z in states:
            source.values = {"g": lib.array(g), "z": lib.array(z)}
            found.append(lib.loss_and_gradient(elbo, model, guide, POINT))
    else:
        params = {n: jnp.asarray(v, float) for n, v in POINT.items()}

        def one(g, z):
            source.values = {"g": g, "z": z}
            return jax.value_and_grad(lambda p: elbo.loss(jax.random.key(0), p, model, guide))(params)

        losses, grads = jax.jit(jax.vmap(one))(*(jnp.asarray(np.stack(s), int) for s in zip(*states, strict=True)))
        found = [(losses[i], {n: grads[n][i] for n in grads}) for i in range(len(states))]
    loss, gradient = mixed_exactly()
    assert np.dot(weights, [float(f[0]) for f in found]) == pytest.approx(loss, rel=1e-9)
    for name, exact in gradient.items():
        mean = sum(w * np.asarray(f[1][name]) for w, f in zip(weights, found, strict=True))
        np.testing.assert_allclose(mean, exact, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.usefixtures("double_precision")
def test_exact_gradients_of_programs_with_sums(lib):
    """What the guide draws or marks is summed over, around the sums of the model. A dictionary that sites share keeps
    its mark."""
    model, guide = mixed(lib)
    found = exact_gradient(model, guide, backend="pyro" if lib is Torch else "numpyro", params=POINT)
    loss, gradient = mixed_exactly()
    assert found.value == pytest.approx(loss, rel=1e-12)
    for name, exact in gradient.items():
        np.testing.assert_allclose(found.gradient[name], exact, rtol=1e-9, err_msg=name)
    assert MARK["enumerate"] == "parallel"  # NumPyro's scan leaves its counter beside it in other tests


# ---- against the libraries' own, and sums written out ----------------------------------------------------------------

DATA = torch.tensor([0.3, -1.2, 2.1, 0.8, -0.4, 1.7, 0.2], dtype=torch.float64)


def stored(name, value):
    return pyro.param(name, lambda: torch.tensor(value, dtype=torch.float64))


def local_below_global():
    a, m, w = stored("a", 0.2), stored("m", [[-1.0, 2.0], [0.5, -3.0]]), stored("w", [[0.3, 0.1], [-0.2, 0.4]])
    g = pyro.sample("g", tdist.Bernoulli(logits=a)).long()
    with pyro.plate("n", 7):
        z = pyro.sample("z", tdist.Categorical(logits=w[g]))
        pyro.sample("x", tdist.Normal(m[g, z], 1.0), obs=DATA)


def apart():
    """Related in the guide alone: a cost sees z, whose probability takes the sum over g."""
    pyro.sample("g", tdist.Bernoulli(logits=stored("a", 0.2)))
    m = stored("m", [-1.0, 2.0])
    with pyro.plate("n", 7):
        z = pyro.sample("z", tdist.Categorical(logits=stored("w", [0.3, -0.4])))
        pyro.sample("x", tdist.Normal(m[z], 1.0), obs=DATA)


def chain():
    """With a pathwise draw beside it."""
    table, m = stored("table", [[0.3, 0.1, 0.2], [-0.2, 0.4, 0.9], [0.1, 0.5, -0.7]]), stored("m", [-1.0, 2.0, 0.3])
    z, shift = 0, pyro.sample("shift", tdist.Normal(stored("zero", 0.0), 1.0))
    for t in pyro.markov(range(7)):
        z = pyro.sample(f"z{t}", tdist.Categorical(logits=table[z]))
        pyro.sample(f"x{t}", tdist.Normal(m[z] + shift, 1.0), obs=DATA[t])


def part_of_the_data():
    m, shift = stored("m", [-1.0, 2.0, 0.3]), pyro.sample("shift", tdist.Normal(stored("zero", 0.0), 1.0))
    with pyro.plate("n", 70, subsample=torch.arange(7)), pyro.poutine.mask(mask=torch.arange(7) < 5):
        z = pyro.sample("z", tdist.Categorical(logits=m), infer=MARK)
        pyro.sample("x", tdist.Normal(m[z] + shift, 1.0), obs=DATA)


def normal():
    pyro.sample("shift", tdist.Normal(stored("l", 0.4), stored("s", 0.5).exp()))


def both():
    g = pyro.sample("g", tdist.Bernoulli(logits=stored("b", 0.3))).long()
    with pyro.plate("n", 7):
        pyro.sample("z", tdist.Categorical(logits=stored("q", [[0.3, 0.7], [0.1, -0.4]])[g]))


def only_g():
    pyro.sample("g", tdist.Bernoulli(logits=stored("b", 0.3)))


def nothing():
    pass


@pytest.mark.parametrize(
    ("model", "guide"),
    [
        (local_below_global, nothing),
        (local_below_global, both),
        (local_below_global, only_g),
        (apart, both),
        (chain, normal),
        (part_of_the_data, normal),
    ],
    ids=lambda f: f.__name__,
)
def test_what_pyros_own_elbo_gets_right(model, guide):
    model, guide = config_enumerate(model), config_enumerate(guide)
    found = []
    for elbo in (TraceEnum_ELBO(max_plate_nesting=1), ours_torch.EstimatorELBO(verify=False)):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        loss = elbo.loss_and_grads(model, guide)
        found.append({"": loss, **{n: p.grad.numpy() for n, p in pyro.get_param_store().named_parameters()}})
    pyro.clear_param_store()
    for name, stock in found[0].items():
        np.testing.assert_allclose(found[1][name], stock, rtol=1e-9, atol=1e-9, err_msg=name)


def test_many_steps_in_pyro_take_time_in_proportion():
    """T = 300 in one sum, equal to the forward algorithm; dimensions are used again."""
    x, table = torch.linspace(-1, 1, 300, dtype=torch.float64), torch.eye(4, dtype=torch.float64)

    def model():
        z = 0
        for t in pyro.markov(range(300)):
            z = pyro.sample(f"z{t}", tdist.Categorical(logits=table[z]), infer=MARK)
            pyro.sample(f"x{t}", tdist.Normal(z.double(), 1.0), obs=x[t])

    law, message = torch.log_softmax(table, 1), None
    for t in range(300):
        before = law[0] if message is None else torch.logsumexp(message[:, None] + law, 0)
        message = before + tdist.Normal(torch.arange(4.0, dtype=torch.float64), 1.0).log_prob(x[t])
    loss = ours_torch.EstimatorELBO(max_plate_nesting=0).loss(model, nothing)
    assert loss == pytest.approx(-torch.logsumexp(message, 0).item(), rel=1e-12)


@pytest.mark.usefixtures("double_precision")
def test_a_structured_guide_that_is_the_posterior_has_the_evidence():
    """A chain of 20 steps, summed in the model and in the guide: where the guide is the posterior, by a backward
    recursion, the bound is tight and its gradient zero; elsewhere it is not."""
    steps, marked = 20, config_enumerate
    x = torch.sin(torch.arange(float(steps)))
    law, places = torch.log_softmax(2 * torch.eye(3) + 0.3, 1), tdist.Normal(torch.tensor([-1.0, 0.2, 1.1]), 0.5)

    def model():
        z = 0
        for t in pyro.markov(range(steps)):
            z = pyro.sample(f"z{t}", tdist.Categorical(logits=law[z]))
            pyro.sample(f"x{t}", tdist.Normal(places.loc[z], 0.5), obs=x[t])

    def guide(start):
        logits, z = pyro.param("logits", lambda: torch.stack(start)), 0
        for t in pyro.markov(range(steps)):
            z = pyro.sample(f"z{t}", tdist.Categorical(logits=logits[t][z]))

    elbo = ours_torch.EstimatorELBO(max_plate_nesting=0)
    evidence = -elbo.loss(marked(model), nothing)  # of the data, by the sum in the model alone
    posterior, later = [], torch.zeros(3)
    for t in reversed(range(steps)):
        posterior.insert(0, law + places.log_prob(x[t]) + later)
        later = posterior[0].logsumexp(1)
    found = {}
    for name, start in {"posterior": posterior, "elsewhere": [torch.zeros(3, 3)] * steps}.items():
        pyro.clear_param_store()
        loss = elbo.loss_and_grads(lambda _: marked(model)(), marked(guide), start)
        found[name] = loss + evidence, pyro.param("logits").grad.abs().max()
    assert max(map(abs, found["posterior"])) < 1e-9
    assert min(found["elsewhere"]) > 0.1


def test_scans_in_numpyro_are_the_forward_algorithm():
    """Two states, one of which a plate holds, another below them in an inner plate, and a global one; the last state is
    used after the scan; a pathwise draw for each step beside them; backwards."""
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3, 2)))
        params = {
            "t": jnp.array([[0.3, 0.1, 0.2], [-0.2, 0.4, 0.9], [0.1, 0.5, -0.7]]),
            "m": jnp.array([-1.0, 2.0, 0.3]),
        }
        last = jnp.array([0.1, 0.2, 0.4])

        def model():
            t, m = numpyro.param("t", 0.0), numpyro.param("m", 0.0)
            c = numpyro.sample("c", jdist.Categorical(logits=m), infer=MARK)

            def step(states, values):
                y = numpyro.sample("y", jdist.Normal(0.5, 1.0))
                with numpyro.plate("s", 3, dim=-2):
                    z = numpyro.sample("z", jdist.Categorical(logits=t[states[0]]))
                    b = numpyro.sample("b", jdist.Bernoulli(logits=0.3 * states[1] + 0.2 * z - 0.1))
                    with numpyro.plate("k", 2, dim=-1):
                        w = numpyro.sample("w", jdist.Bernoulli(logits=m[z]))
                        numpyro.sample("x", jdist.Normal(m[z] + w - b + 0.1 * c + y, 1.0), obs=values)
                return (z, b), None

            (z, _), _ = scan(step, (0, 0), x, reverse=True)
            with numpyro.plate("s", 3, dim=-2):
                numpyro.sample("last", jdist.Normal(m[z] + m[c], 0.3), obs=last[:, None])

        def guide():
            def step(carry, _):
                numpyro.sample("y", jdist.Delta(0.25, log_density=0.0))
                return carry, None

            scan(step, 0, None, length=5, reverse=True)

        def exact(p):
            t, m = jax.nn.log_softmax(p["t"]), p["m"]
            z, b, c, w = jnp.arange(3.0)[:, None], jnp.arange(2.0), jnp.arange(3.0)[:, None, None], jnp.arange(2.0)

            def of_an_element(x, last):
                message = jnp.full((3, 3, 2), -jnp.inf).at[:, 0, 0].set(0.0)  # [c, z, b]
                for k in range(4, -1, -1):
                    law = t[:, None, :, None] + jdist.Bernoulli(
                        logits=0.3 * b[None, :, None, None] + 0.2 * z[None, None] - 0.1
                    ).log_prob(b)  # [z, b, z', b']
                    message = jax.nn.logsumexp(message[..., None, None] + law, axis=(1, 2))
                    for value in x[k]:
                        mean = (m[:, None] - b + 0.1 * c + 0.25)[..., None] + w
                        law_w = jdist.Bernoulli(logits=m[:, None, None]).log_prob(w)
                        message = message + jax.nn.logsumexp(law_w + jdist.Normal(mean, 1.0).log_prob(value), axis=-1)
                message = message + jdist.Normal(m[:, None] + m[:, None, None], 0.3).log_prob(last)
                return jax.nn.logsumexp(message, axis=(1, 2))

            total = jax.nn.log_softmax(m) + jax.vmap(of_an_element, (1, 0))(x, last).sum(0)
            return -jax.nn.logsumexp(total) - 5 * jdist.Normal(0.5, 1.0).log_prob(0.25)

        def loss(p):
            return ours_jax.EstimatorELBO().loss(jax.random.key(0), p, model, guide)

        found, expected = jax.jit(lambda p: [jax.value_and_grad(f)(p) for f in (loss, exact)])(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), found, expected)


@pytest.mark.parametrize(
    ("length", "beside", "reverse"), [(4, False, False), (4, False, True), (3, True, True), (2, False, False)]
)
def test_a_scan_begins_with_another_state_for_each_element(length, beside, reverse):
    """Second order, with the observation before; what comes out of the steps and what they end with is used. The plate
    of the start is carried on only where ``beside`` the chain something is drawn."""
    rng, carried = np.random.default_rng(0), []
    with jax.enable_x64(True):
        starts = jnp.array([0, 2, 1])
        x = jnp.asarray(rng.normal(size=(length, 3)))
        params = {"t": jnp.asarray(rng.normal(size=(3, 3, 3))), "m": jnp.asarray(rng.normal(size=3))}

        def model(scanned):
            t, m = numpyro.param("t", 0.0), numpyro.param("m", 0.0)

            def step(before, value, name=""):
                old, z, x = before
                y = numpyro.sample("y", jdist.Normal(0.5, 1.0)) if beside and scanned else 0.0
                carried.append(jnp.shape(z) if scanned else ())
                with numpyro.plate("s", 3):
                    new = numpyro.sample(f"z{name}", jdist.Categorical(logits=t[old, z] + x[..., None]), infer=MARK)
                    numpyro.sample(f"x{name}", jdist.Normal(m[new] + 0.3 * x + y, 1.0), obs=value)
                return (z, new, value), numpyro.deterministic(f"out{name}", 0.1 * x + value)

            before = (starts[::-1], starts, 0.5 * starts)
            if scanned:
                with numpyro.handlers.trace() as inside:
                    before, outs = scan(step, before, x, reverse=reverse, history=2)
                outs = (outs + inside["out"]["value"]) / 2
            else:
                outs = [0.0] * length
                for i in range(length)[:: -1 if reverse else 1]:
                    before, outs[i] = step(before, x[i], f" {i}")
            with numpyro.plate("s", 3):
                mean = m[before[1]] + sum((i + 1) * out for i, out in enumerate(outs))
                numpyro.sample("last", jdist.Normal(mean, 1.0), obs=0.3)

        def guide(scanned):
            if beside and scanned:
                law = jdist.Delta(0.0, log_density=jdist.Normal(0.5, 1.0).log_prob(0.0))
                scan(lambda c, _: (c, numpyro.sample("y", law)), 0, None, length=length, reverse=reverse)

        elbo, key = ours_jax.EstimatorELBO(), jax.random.key(0)

        def both():
            for scanned in (False, True):
                yield jax.value_and_grad(lambda p: elbo.loss(key, p, model, guide, scanned))(params)  # noqa: B023
                yield elbo.posterior(key, params, model, guide, scanned).marginals

        expected, each, found, chain = jax.jit(lambda: list(both()))()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), found, expected)
        assert max(map(math.prod, carried)) == 9 and math.prod(carried[-1]) == (9 if beside else 3)
        each = jnp.stack([each[f"z {i}"] for i in range(length)], axis=1)
        np.testing.assert_allclose(chain["z"], each, atol=1e-10)


@pytest.mark.parametrize(
    "law",
    [
        lambda p: jdist.Categorical(logits=3.0 * p),
        lambda p: jdist.Categorical(probs=p),
        lambda p: jdist.Categorical(logits=3.0 * p[0]).expand((1, 5)),
        lambda p: jdist.Categorical(p[:, None]).expand((2, 5)).mask(p[:, :1] > 0.1),
        lambda p: jdist.Binomial(2, p[:, 0]),
        lambda p: jdist.Categorical(jnp.stack([p, p[::-1]])[:, *[None] * 4]),  # of two steps
    ],
)
def test_all_values_of_a_site_in_numpyro(law):
    """Where log 0 is among them, too."""
    p = jnp.array([[0.0, 0.3, 0.7], [0.2, 0.5, 0.3]])

    def both(p):
        fn = law(p)
        values = support(fn)[:, None, None]
        return log_p_of_all(fn, values, -3), unmasked(fn).log_prob(values)

    found, expected = both(p)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    slopes = (jax.jit(jax.jacobian(lambda p, i=i: both(p)[i]))(p + 0.1) for i in (0, 1))
    np.testing.assert_allclose(*slopes, rtol=1e-5, atol=1e-6)


def test_a_thousand_steps_of_sixteen_states():
    x, table = jnp.sin(jnp.arange(1000.0)), 2.0 * jnp.eye(16)

    def model():
        def step(z, value):
            z = numpyro.sample("z", jdist.Categorical(logits=table[z]))
            numpyro.sample("x", jdist.Normal(z / 8.0 - 1.0, 0.3), obs=value)
            return z, None

        scan(step, 0, x)

    law, places = jax.nn.log_softmax(table), jdist.Normal(jnp.arange(16.0) / 8 - 1, 0.3)

    def forward(message, value):
        return jax.nn.logsumexp(message[:, None] + law, axis=0) + places.log_prob(value), None

    message, _ = jax.lax.scan(forward, law[0] + places.log_prob(x[0]), x[1:])
    loss = jax.jit(lambda: ours_jax.EstimatorELBO().loss(jax.random.key(0), {}, model, nothing))()
    assert float(loss) == pytest.approx(-float(jax.nn.logsumexp(message)), rel=1e-4)


# ---- minibatches, objectives, refusals ------------------------------------------------------------------------------


def test_a_sum_above_a_minibatch_says_that_it_is_biased(lib):
    def model():
        g = lib.sample("g", lib.dist.Bernoulli(logits=lib.array(0.2)), infer=MARK)
        with lib.plate("n", 10, subsample_size=2):
            lib.sample("x", lib.dist.Normal(g * lib.array(1.0), 1.0), obs=lib.array([0.5, 0.5]))

    def log_p(g):  # the minibatch stands for all ten
        return tdist.Bernoulli(logits=torch.tensor(0.2).double()).log_prob(torch.tensor(g)) + 10 * tdist.Normal(
            g, 1.0
        ).log_prob(torch.tensor(0.5).double())

    with pytest.warns(EstimatorWarning, match="site 'g': summed out above plate 'n', of which a step sees a minibatch"):
        loss, _ = lib.loss_and_gradient(lib.ELBO(), model, nothing, {})
    assert float(loss) == pytest.approx(-torch.logaddexp(log_p(0.0), log_p(1.0)).item(), rel=1e-6)


def test_objectives_that_have_no_place_for_a_sum(lib):
    """Of the guide's values under a bound, of a latent site's log p where that is weighed apart: the fixes as typed."""
    array, bits = lib.array, lib.dist.Bernoulli

    def model(of_y=None):
        y = lib.sample("y", bits(logits=array(0.3)), infer=of_y or {})
        z = lib.sample("z", bits(logits=0.5 - y))
        lib.sample("x", lib.dist.Normal(y + z, 1.0), obs=array(0.5))

    def guide(of_y=None):
        if of_y is not None:
            lib.sample("y", bits(logits=array(0.2)), infer=of_y)
        lib.sample("z", bits(logits=array(-0.4)))

    def loss(objective, model, guide, estimators=None):
        elbo = lib.ELBO(estimators, num_particles=2, objective=objective)
        return float(lib.loss_and_gradient(elbo, model, guide, {})[0])

    bound, annealed = ImportanceWeighted(), KLAnnealed(0.5)
    with pytest.raises(EstimatorError, match="site 'y': enumerated in the guide, and under ImportanceWeighted the sum"):
        loss(bound, model, lambda: guide(MARK))
    assert loss(bound, lambda: model(MARK), guide) > 0
    assert loss(bound, model, lambda: guide({}), {"y": Enumerate()}) > 0
    with pytest.raises(EstimatorError, match=r"site 'z': its log p depends on values .* KLAnnealed\(0.5\) weighs it"):
        loss(annealed, lambda: model(MARK), guide)
    assert loss(annealed, model, lambda: guide({})) > 0
    assert loss(annealed, model, lambda: guide(MARK)) > 0
    assert loss(None, lambda: model(MARK), guide) > 0


def test_a_sum_over_elements_is_no_sum_over_values(lib):
    """A cost outside of a plate sees the values of all its elements."""

    def loss(of):
        def model():
            with lib.plate("n", 2):
                w = lib.sample("w", lib.dist.Bernoulli(logits=lib.array([0.2, 0.3])), infer=MARK)
            lib.sample("x", lib.dist.Normal(of(w), 1.0), obs=lib.array(0.5))

        elbo = lib.ELBO(max_plate_nesting=1) if lib is Torch else lib.ELBO()
        return lib.loss_and_gradient(elbo, model, nothing, {})

    with pytest.raises(ValueError, match=r"site .x.*(lie left of all plates|invalid log_prob shape)"):  # Pyro's own
        loss(lambda w: w.sum(-1))
    with pytest.raises(
        EstimatorError, match=r"site 'w': summed out inside plate 'n', and site 'x' outside.*Put 'x' in"
    ):
        loss(lambda w: w[..., :1])


def test_elements_of_a_plate_that_a_cost_outside_depends_on(lib):
    def guide():
        with lib.plate("n", 2):
            lib.sample("y", lib.dist.Bernoulli(logits=lib.array([0.2, 0.3])), infer=MARK)

    def model():
        w = lib.sample("w", lib.dist.Bernoulli(logits=lib.array(0.2)), infer=MARK)
        with lib.plate("n", 2):
            y = lib.sample("y", lib.dist.Bernoulli(logits=lib.array(0.3)))
            lib.sample("x", lib.dist.Normal(y + w, 1.0), obs=lib.array(X))

    with pytest.raises(EstimatorError, match=r"site 'w': .*outside of a plate of site 'y'.*Remove the mark of 'y'"):
        lib.loss_and_gradient(lib.ELBO(), model, guide, {})
