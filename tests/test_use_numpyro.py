"""What a user of NumPyro does besides `SVI.update`: plain loops, progress bars, autoguides, `Predictive`, saving and
going on, mutable state and networks of their own, double precision."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import product
from typing import Any

import equinox
import flax.linen
import flax.nnx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.contrib.module import flax_module
from numpyro.distributions import constraints
from numpyro.infer import SVI, Predictive, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoLaplaceApproximation, AutoNormal
from numpyro.primitives import mutable

from ppl_estimators import (
    REBAR,
    RELAX,
    Constant,
    ControlVariate,
    DisARM,
    Enumerate,
    EstimatorWarning,
    Learned,
    LeaveOneOut,
    MovingAverage,
    OptimalConstant,
    PastSteps,
    Reinforce,
    RELAXWithModel,
    StickingTheLanding,
)
from ppl_estimators.numpyro import EstimatorELBO, with_estimators
from ppl_estimators.numpyro.memory import Memory

DATA = jnp.array([-0.9, 2.3, 0.4, 1.8, -0.2, 2.9])
NVIL = Reinforce(MovingAverage() + Learned(hidden=4))
KEEPING = [
    Reinforce(MovingAverage()),
    Reinforce(OptimalConstant(PastSteps(0.9))),
    Reinforce(Learned(hidden=4)),
    NVIL,
    RELAX(hidden=4),
    RELAXWithModel(hidden=4),
    REBAR(),
]


def slow(*values: Any) -> Any:
    """What is kept here, others keep as well."""
    return pytest.param(*values, marks=pytest.mark.slow)


def model(data: Any) -> None:
    """A level w, and for each datum a bit z that moves it."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("x", dist.Normal(w + 2.0 * z, 1.0), obs=data)


def guide(data: Any) -> None:
    loc = numpyro.param("loc", 0.3)
    scale = numpyro.param("scale", 0.7, constraint=constraints.positive)
    numpyro.sample("w", dist.Normal(loc, scale))
    with numpyro.plate("data", len(data)):
        logits = numpyro.param("logits", jnp.linspace(-0.5, 0.5, len(DATA)))
        numpyro.sample("z", dist.Bernoulli(logits=logits))


def make_svi(estimators: Any, particles: int = 2, optimizer: Any = None) -> SVI:
    elbo = EstimatorELBO(num_particles=particles)
    return SVI(model, with_estimators(guide, estimators), optimizer or optax.adam(0.02), elbo)


def assert_same(x: Any, y: Any) -> None:
    """The same tree, bit for bit."""
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def raw(state: Any) -> Any:
    """With the random key as numbers, as files want it."""
    return state._replace(rng_key=jax.random.key_data(state.rng_key))


# ---- loops ---------------------------------------------------------------------------------------------------------


def test_a_plain_value_and_grad_loop_with_optax() -> None:
    elbo = EstimatorELBO({"z": DisARM()}, num_particles=4)
    optimizer = optax.adam(0.05)
    parameters = {"loc": jnp.array(0.3), "scale": jnp.array(0.7), "logits": jnp.zeros(len(DATA))}
    state = optimizer.init(parameters)

    @jax.jit
    def step(key: Any, parameters: Any, state: Any) -> Any:
        loss, gradient = jax.value_and_grad(lambda p: elbo.loss(key, p, model, guide, DATA))(parameters)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(parameters, updates), state, loss

    losses = []
    for key in jax.random.split(jax.random.key(0), 300):
        parameters, state, loss = step(key, parameters, state)
        losses.append(float(loss))
    assert np.mean(losses[-50:]) < np.mean(losses[:50]) - 0.3
    likely = DATA > 1.0  # the data that the bit explains
    assert (parameters["logits"][likely] > 0).all()
    assert (parameters["logits"][~likely] < 0).all()


@pytest.mark.parametrize("estimator", [slow(DisARM()), NVIL], ids=repr)
def test_run_with_and_without_the_progress_bar(estimator: Any, capfd: pytest.CaptureFixture[str]) -> None:
    quiet = make_svi({"z": estimator}).run(jax.random.key(0), 30, DATA, progress_bar=False)
    assert "%" not in capfd.readouterr().err
    shown = make_svi({"z": estimator}).run(jax.random.key(0), 30, DATA, progress_bar=True)
    assert "%" in capfd.readouterr().err
    np.testing.assert_allclose(shown.losses, quiet.losses, rtol=1e-4)
    for name, value in quiet.params.items():
        np.testing.assert_allclose(shown.params[name], value, rtol=1e-3, atol=1e-5)


def test_run_goes_on_from_a_state() -> None:
    svi = make_svi({"z": NVIL})
    whole = svi.run(jax.random.key(0), 20, DATA, progress_bar=False)
    half = svi.run(jax.random.key(0), 10, DATA, progress_bar=False)
    rest = svi.run(jax.random.key(9), 10, DATA, progress_bar=False, init_state=half.state)
    assert_same(raw(whole.state), raw(rest.state))


def broken_model(data: Any) -> None:
    """The likelihood is not finite where the data aren't."""
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(data)):
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.factor("x", -0.5 * (data - w - 2.0 * z) ** 2)


def test_stable_update_survives_a_bad_step_with_everything_that_is_kept() -> None:
    bad = DATA.at[2].set(jnp.nan)
    svi = SVI(
        broken_model, with_estimators(guide, {"z": NVIL}), optax.adam(0.02), EstimatorELBO(num_particles=2, debug=True)
    )
    state = svi.init(jax.random.key(0), DATA)
    update = jax.jit(svi.stable_update)
    for _ in range(3):
        state, _ = update(state, DATA)
    with pytest.warns(EstimatorWarning, match=r"site 'x' \(log p\): the cost is not finite"):
        after, loss = jax.block_until_ready(update(state, bad))
        jax.effects_barrier()
    assert np.isnan(loss)
    assert_same(svi.get_params(after), svi.get_params(state))
    assert_same(after.mutable_state, state.mutable_state)
    for _ in range(3):
        after, loss = update(after, DATA)
        assert np.isfinite(loss)


def test_forward_mode_differentiation() -> None:
    svi = make_svi({"z": NVIL})
    state = svi.init(jax.random.key(0), DATA)
    backward, _ = jax.jit(svi.update)(state, DATA)
    forward, _ = jax.jit(partial(svi.update, forward_mode_differentiation=True))(state, DATA)
    for name, value in svi.get_params(backward).items():
        np.testing.assert_allclose(svi.get_params(forward)[name], value, rtol=1e-4, atol=1e-6)


# ---- evaluation and prediction -------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [slow(NVIL), RELAX(hidden=4)], ids=repr)
def test_evaluate_is_the_loss_whatever_is_kept(estimator: Any) -> None:
    """`SVI.evaluate` hands over parameters only. Its mean is the ELBO at these parameters, as any estimator's is."""
    svi = make_svi({"z": estimator})
    state = svi.init(jax.random.key(0), DATA)
    update = jax.jit(svi.update)
    for _ in range(3):
        state, _ = update(state, DATA)
    assert svi.evaluate(state, DATA) == svi.evaluate(state, DATA)
    keys = jax.random.split(jax.random.key(1), 4000)
    losses = np.asarray(jax.jit(jax.vmap(lambda key: svi.evaluate(state._replace(rng_key=key), DATA)))(keys))
    parameters = {k: v for k, v in svi.get_params(state).items() if "$" not in k}
    stock = Trace_ELBO(num_particles=2)
    expected = np.asarray(jax.jit(jax.vmap(lambda key: stock.loss(key, parameters, model, guide, DATA)))(keys))
    error = np.hypot(losses.std(), expected.std()) / np.sqrt(len(keys))
    assert error < 0.1
    assert abs(losses.mean() - expected.mean()) < 4 * error


def test_predictive_takes_the_wrapped_guide() -> None:
    svi = make_svi({"z": NVIL})
    result = svi.run(jax.random.key(0), 20, DATA, progress_bar=False)
    plain = Predictive(guide, params=result.params, num_samples=50)(jax.random.key(1), DATA)
    wrapped = Predictive(svi.guide, params=result.params, num_samples=50)(jax.random.key(1), DATA)
    for name in ("w", "z"):
        np.testing.assert_array_equal(wrapped[name], plain[name])
    posterior = Predictive(model, guide=svi.guide, params=result.params, num_samples=50)(jax.random.key(1), DATA)
    assert posterior["x"].shape == (50, len(DATA))


# ---- autoguides ----------------------------------------------------------------------------------------------------


def regression(data: Any) -> None:
    slope = numpyro.sample("slope", dist.Normal(0.0, 3.0))
    noise = numpyro.sample("noise", dist.HalfNormal(2.0))
    x = jnp.linspace(-1.0, 1.0, len(data))
    with numpyro.plate("data", len(data)):
        numpyro.sample("y", dist.Normal(slope * x, noise), obs=data)


LINE = 1.5 * jnp.linspace(-1.0, 1.0, 20) + 0.3 * jnp.sin(jnp.arange(20.0) * 5)


@pytest.mark.parametrize(
    ("kind", "wrapped"),
    [(AutoNormal, True), (AutoDiagonalNormal, False), slow(AutoNormal, False), slow(AutoDiagonalNormal, True)],
)
def test_autoguides_learn_and_keep_their_attributes(kind: Any, wrapped: bool) -> None:
    guide = kind(regression)
    if wrapped:
        guide = with_estimators(guide, {"*": StickingTheLanding()})
    svi = SVI(regression, guide, optax.adam(0.03), EstimatorELBO(num_particles=4))
    result = svi.run(jax.random.key(0), 600, LINE, progress_bar=False)
    stock = kind(regression)
    expected = SVI(regression, stock, optax.adam(0.03), Trace_ELBO(num_particles=4)).run(
        jax.random.key(0), 600, LINE, progress_bar=False
    )
    median = guide.median(result.params)
    for name, value in stock.median(expected.params).items():
        np.testing.assert_allclose(median[name], value, atol=0.08)
    low, high = guide.quantiles(result.params, [0.05, 0.95])["slope"]
    assert low < 1.5 < high
    samples = guide.sample_posterior(jax.random.key(1), result.params, sample_shape=(100,))
    assert samples["noise"].shape == (100,)
    assert (samples["noise"] > 0).all()


def test_an_autoguide_by_score_function() -> None:
    guide = with_estimators(AutoNormal(regression), {"*": Reinforce(LeaveOneOut())})
    svi = SVI(regression, guide, optax.adam(0.03), EstimatorELBO(num_particles=20))
    result = svi.run(jax.random.key(0), 600, LINE, progress_bar=False)
    np.testing.assert_allclose(guide.median(result.params)["slope"], 1.5, atol=0.3)


@pytest.mark.parametrize("kind", [AutoDelta, AutoLaplaceApproximation])
def test_point_estimates(kind: Any) -> None:
    guide = kind(regression)
    result = SVI(regression, guide, optax.adam(0.03), EstimatorELBO()).run(
        jax.random.key(0), 600, LINE, progress_bar=False
    )
    stock = kind(regression)
    expected = SVI(regression, stock, optax.adam(0.03), Trace_ELBO()).run(
        jax.random.key(0), 600, LINE, progress_bar=False
    )
    for name, value in stock.median(expected.params).items():
        np.testing.assert_allclose(guide.median(result.params)[name], value, rtol=1e-3)


# ---- saving and going on -------------------------------------------------------------------------------------------


def assert_goes_on(svi: SVI, other: SVI, tmp_path: Any) -> None:
    """Three steps, a file, three more; from the file, three more with ``other``: the same."""
    state = svi.init(jax.random.PRNGKey(0), DATA)
    update = jax.jit(svi.update)
    for _ in range(3):
        state, _ = update(state, DATA)
    path = tmp_path / "state.pickle"
    path.write_bytes(pickle.dumps(jax.device_get(state)))
    for _ in range(3):
        state, loss = update(state, DATA)

    if other is not svi:
        other.init(jax.random.PRNGKey(7), DATA)
        update = jax.jit(other.update)
    loaded = pickle.loads(path.read_bytes())
    for _ in range(3):
        loaded, loss_again = update(loaded, DATA)
    assert_same(loaded, state)
    assert_same(loss_again, loss)


KINDS_KEPT = (KEEPING[1], NVIL, RELAXWithModel(hidden=4))  # a coefficient, an average, parameters and networks


@pytest.mark.parametrize("estimator", [e if e in KINDS_KEPT else slow(e) for e in KEEPING], ids=repr)
def test_a_pickled_state_goes_on_bit_for_bit(estimator: Any, tmp_path: Any) -> None:
    svi = make_svi({"z": estimator})
    assert_goes_on(svi, svi, tmp_path)


@pytest.mark.parametrize("optimizer", [optax.adam(0.02), numpyro.optim.Adam(0.02)], ids=["optax", "numpyro"])
def test_a_pickled_state_goes_on_in_a_new_svi(optimizer: Any, tmp_path: Any) -> None:
    svi, other = (make_svi({"z": NVIL}, optimizer=optimizer) for _ in range(2))
    assert_goes_on(svi, other, tmp_path)


@pytest.mark.parametrize("estimator", [slow(NVIL), RELAX(hidden=4)], ids=repr)
def test_a_state_serialised_by_flax_goes_on_bit_for_bit(estimator: Any) -> None:
    svi = make_svi({"z": estimator})
    state = svi.init(jax.random.PRNGKey(0), DATA)
    template = state
    update = jax.jit(svi.update)
    for _ in range(3):
        state, _ = update(state, DATA)
    loaded = flax.serialization.from_bytes(template, flax.serialization.to_bytes(state))
    assert_same(jax.tree.map(jnp.asarray, loaded), state)
    for _ in range(3):
        state, _ = update(state, DATA)
        loaded, _ = update(loaded, DATA)
    assert_same(loaded, state)


@pytest.mark.parametrize("estimator", [slow(DisARM()), RELAX(hidden=4)], ids=repr)
def test_the_same_seed_gives_the_same_run(estimator: Any) -> None:
    svi = make_svi({"z": estimator})
    runs = [s.run(jax.random.key(3), 10, DATA, progress_bar=False) for s in (svi, make_svi({"z": estimator}))]
    assert_same(runs[0].losses, runs[1].losses)
    assert_same(runs[0].params, runs[1].params)
    other = svi.run(jax.random.key(4), 10, DATA, progress_bar=False)
    assert not np.allclose(other.losses, runs[0].losses)


# ---- mutable state -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("particles", [1, 3])
def test_a_running_average_over_several_steps_and_particles(particles: int) -> None:
    """z is the only site, so its downstream cost is the ELBO: the average can be computed from the losses."""

    def model() -> None:
        numpyro.sample("z", dist.Bernoulli(0.3))

    def guide() -> None:
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", 0.8)))

    decay = 0.7
    guide = with_estimators(guide, {"z": Reinforce(MovingAverage(decay))})
    svi = SVI(model, guide, optax.sgd(0.1), EstimatorELBO(num_particles=particles))
    state = svi.init(jax.random.key(0))
    assert float(state.mutable_state["z$state"]["mean"]) == 0.0
    expected = None
    update = jax.jit(svi.update)
    for _ in range(6):
        state, loss = update(state)
        expected = -loss if expected is None else decay * expected - (1 - decay) * loss
        np.testing.assert_allclose(state.mutable_state["z$state"]["mean"], expected, rtol=1e-5)
        assert state.mutable_state["z$state"]["mean"].shape == ()


@pytest.mark.parametrize(("where", "particles"), [("model", 3), ("guide", 3), slow("model", 1), slow("guide", 1)])
def test_the_users_own_counter_counts_steps(where: str, particles: int) -> None:
    def counting(fn: Any) -> Any:
        def counted(data: Any) -> None:
            counter = mutable("counter", {"steps": jnp.array(0), "sum": jnp.array(0.0)})
            counter["steps"] = counter["steps"] + 1
            counter["sum"] = counter["sum"] + data.sum()
            fn(data)

        return counted

    program = {"model": model, "guide": guide}
    program[where] = counting(program[where])
    hooked = with_estimators(program["guide"], {"z": NVIL})
    svi = SVI(program["model"], hooked, optax.adam(0.02), EstimatorELBO(num_particles=particles))
    state = svi.init(jax.random.key(0), DATA)
    start = int(state.mutable_state["counter"]["steps"])
    result = svi.run(jax.random.key(0), 5, DATA, progress_bar=False)
    counter = result.state.mutable_state["counter"]
    assert int(counter["steps"]) - start == 5
    assert counter["steps"].dtype == state.mutable_state["counter"]["steps"].dtype
    np.testing.assert_allclose(counter["sum"], (start + 5) * DATA.sum(), rtol=1e-5)


def test_batch_normalisation_beside_our_own_state() -> None:
    class Encoder(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x: Any) -> Any:
            x = flax.linen.BatchNorm(use_running_average=False, momentum=0.9)(x)
            return flax.linen.Dense(1)(x)[..., 0]

    def encoder_guide(data: Any) -> None:
        encode = flax_module("encoder", Encoder(), input_shape=(len(DATA), 1), mutable=["batch_stats"])
        numpyro.sample("w", dist.Normal(numpyro.param("loc", 0.0), 0.5))
        with numpyro.plate("data", len(data)):
            numpyro.sample("z", dist.Bernoulli(logits=encode(data[:, None])))

    hooked = with_estimators(encoder_guide, {"z": NVIL})
    svi = SVI(model, hooked, optax.adam(0.02), EstimatorELBO(num_particles=2, debug=True))
    state = svi.init(jax.random.key(0), DATA)
    update = jax.jit(svi.update)
    means = []
    for _ in range(5):
        (mean,) = (v for k, v in _leaves(state.mutable_state) if "BatchNorm" in k and k.endswith("mean']"))
        means.append(float(mean[0]))
        state, loss = update(state, DATA)
        assert np.isfinite(loss)
    # once a step, however many times the guide runs: what is missing to the mean shrinks by the momentum
    missing = float(DATA.mean()) - np.array(means)
    np.testing.assert_allclose(missing[1:], 0.9 * missing[:-1], rtol=1e-3)
    assert float(state.mutable_state["z$state"]["0_started"]) == 1.0


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


# ---- networks of the user's own ------------------------------------------------------------------------------------


class Linen(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x: Any) -> Any:
        return flax.linen.Dense(1)(flax.linen.tanh(flax.linen.Dense(5)(x)))


class Nnx(flax.nnx.Module):
    def __init__(self, features: int):
        rngs = flax.nnx.Rngs(0)
        self.hidden = flax.nnx.Linear(features, 5, rngs=rngs)
        self.out = flax.nnx.Linear(5, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.out(flax.nnx.tanh(self.hidden(x)))


def eqx(features: int) -> Any:
    return equinox.nn.MLP(features, 1, 5, 1, activation=jnp.tanh, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("estimator", "library"),
    [
        ("relax", "linen"),
        ("relax", "nnx"),
        ("relax", "equinox"),
        ("learned", "nnx"),
        ("learned from data", "linen"),
        slow("learned", "linen"),
        slow("learned", "equinox"),
        slow("learned from data", "nnx"),
        slow("learned from data", "equinox"),
    ],
)
def test_networks_of_every_library_are_trained(estimator: str, library: str) -> None:
    features = 2 if estimator == "relax" else 1
    network = {"linen": Linen, "nnx": lambda: Nnx(features), "equinox": lambda: eqx(features)}[library]()
    spec = {
        "learned": Reinforce(Learned(network)),
        "learned from data": Reinforce(Learned(network, lambda data: data)),
        "relax": RELAX(network=network),
    }[estimator]
    svi = make_svi({"z": spec})
    state = svi.init(jax.random.key(0), DATA)
    start = _leaves({k: v for k, v in svi.get_params(state).items() if k.startswith("z$")})
    weights = [leaf for path, leaf in start if "temperature" not in path]
    assert sum(leaf.size for leaf in weights) == 5 * features + 5 + 5 + 1
    update = jax.jit(svi.update)
    for _ in range(5):
        state, loss = update(state, DATA)
        assert np.isfinite(loss)
    end = _leaves({k: v for k, v in svi.get_params(state).items() if k.startswith("z$")})
    for (path, before), (_, after) in zip(start, end, strict=True):
        assert not np.allclose(before, after), path


class Squeezed(flax.linen.Module):
    """Its output has the shape of the cost."""

    @flax.linen.compact
    def __call__(self, x: Any) -> Any:
        return flax.linen.Dense(1)(flax.linen.tanh(flax.linen.Dense(5)(x)))[..., 0]


@pytest.mark.parametrize("network", [Linen(), Squeezed()], ids=["last axis of one", "shape of the cost"])
def test_a_learned_baseline_learns_the_cost(network: Any) -> None:
    """Its prediction comes closer to the mean downstream cost of each datum, given the datum."""

    def model(data: Any) -> None:
        with numpyro.plate("data", len(data)):
            z = numpyro.sample("z", dist.Bernoulli(0.5))
            numpyro.factor("cost", -10.0 * data - z)

    def guide(data: Any) -> None:
        with numpyro.plate("data", len(data)):
            numpyro.sample("z", dist.Bernoulli(logits=jnp.full(len(data), 0.2)))

    hooked = with_estimators(guide, {"z": Reinforce(Learned(network, lambda data: data))})
    svi = SVI(model, hooked, optax.adam(0.05), EstimatorELBO(num_particles=4))
    data = jnp.linspace(-1.0, 1.0, 8)
    result = svi.run(jax.random.key(0), 1500, data, progress_bar=False)
    weights = {k: v for k, v in result.params.items() if k.startswith("z$")}
    (params,) = weights.values()
    predicted = network.apply({"params": params}, data[:, None]).reshape(len(data))
    q = jax.nn.sigmoid(0.2)
    entropy = -(q * jnp.log(q) + (1 - q) * jnp.log(1 - q))
    np.testing.assert_allclose(predicted, -10.0 * data - q + entropy - np.log(2), atol=0.5)


# ---- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("double", "estimator"),
    [
        (False, RELAXWithModel()),
        (True, RELAXWithModel()),
        (True, DisARM()),
        *(slow(double, e) for double, e in product((False, True), (Enumerate(), NVIL))),
        slow(False, DisARM()),
    ],
    ids=str,
)
def test_single_and_double_precision(estimator: Any, double: bool) -> None:
    with jax.enable_x64(double):
        wanted = jnp.float64 if double else jnp.float32
        svi = make_svi({"z": estimator})
        data = jnp.asarray(np.asarray(DATA), dtype=wanted)
        state = svi.init(jax.random.key(0), data)
        state, loss = jax.jit(svi.update)(state, data)
        assert loss.dtype == wanted
        for path, leaf in _leaves((svi.get_params(state), state.mutable_state)):
            assert leaf.dtype == wanted, path


# ---- which estimator is in charge ----------------------------------------------------------------------------------

LEVELS = {"elbo": 1.0, "hook": 2.0, "infer": 3.0, "default": 4.0}


def _gradient(elbo: EstimatorELBO, guide: Any) -> float:
    def model() -> None:
        numpyro.sample("z", dist.Bernoulli(0.3))

    return float(jax.grad(lambda a: elbo.loss(jax.random.key(0), {"a": a}, model, guide))(0.4))


SPEC = {level: Reinforce(Constant(value)) for level, value in LEVELS.items()}


def _bit(**infer: Any) -> Any:
    return lambda: numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.4)), infer=infer)


@cache
def _of_each_level() -> dict[str, float]:
    found = {level: _gradient(EstimatorELBO({"z": s}), _bit()) for level, s in SPEC.items()}
    assert len(set(found.values())) == len(LEVELS)
    return found


@pytest.mark.parametrize("present", [("default",), ("default", "infer"), ("default", "infer", "hook"), tuple(LEVELS)])
def test_the_elbo_overrides_the_hook_overrides_infer_overrides_the_default(present: tuple[str, ...]) -> None:
    """Baselines that differ by level give gradients that do."""
    guide = _bit(**({"estimator": SPEC["infer"]} if "infer" in present else {}))
    hooked = with_estimators(guide, {"z": SPEC["hook"]}) if "hook" in present else guide
    elbo = EstimatorELBO({"z": SPEC["elbo"]} if "elbo" in present else None, default=SPEC["default"])
    strongest = next(level for level in LEVELS if level in present)
    assert _gradient(elbo, hooked) == _of_each_level()[strongest]


def test_state_that_the_hook_declares_and_the_elbo_overrides_is_carried_along() -> None:
    """`SVI.run` needs what `SVI.init` found, whether or not this ELBO uses it."""

    def model() -> None:
        numpyro.sample("z", dist.Bernoulli(0.3))

    def guide() -> None:
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.4)))

    hooked = with_estimators(guide, {"z": Reinforce(MovingAverage())})
    elbo = EstimatorELBO({"z": Reinforce(LeaveOneOut())}, num_particles=2)
    result = SVI(model, hooked, numpyro.optim.SGD(0.1), elbo).run(jax.random.key(0), 5, progress_bar=False)
    assert result.state.mutable_state == {"z$state": {"mean": 0.0, "started": 0.0}}


def test_globs_and_exact_names_in_one_mapping() -> None:
    def model() -> None:
        for name in ("z_0", "z_1", "w"):
            numpyro.sample(name, dist.Bernoulli(0.3))

    def guide() -> None:
        for name in ("z_0", "z_1", "w"):
            numpyro.sample(name, dist.Bernoulli(logits=numpyro.param(f"a_{name}", 0.4)))

    def gradients(estimators: Mapping[str, Any]) -> dict[str, float]:
        start = {f"a_{name}": 0.4 for name in ("z_0", "z_1", "w")}
        elbo = EstimatorELBO(estimators)
        return jax.grad(lambda p: elbo.loss(jax.random.key(0), p, model, guide))(start)

    one, two, three = (Reinforce(Constant(value)) for value in (1.0, 2.0, 3.0))
    mixed = gradients({"z_*": one, "z_1": two, "*": three})
    exact = gradients({"z_0": one, "z_1": two, "w": three})
    assert mixed == exact
    assert mixed != gradients({"z_*": one, "w": three})


def test_a_function_with_a_known_mean_beside_a_wrapped_guide() -> None:
    """`ControlVariate` and its state under `SVI.run`."""
    spec = ControlVariate(lambda z: 1.0 * z, lambda q: q.mean, PastSteps(0.9), baseline=MovingAverage())
    result = make_svi({"z": spec}).run(jax.random.key(0), 50, DATA, progress_bar=False)
    assert np.isfinite(np.asarray(result.losses)).all()
    assert set(result.state.mutable_state) == {"z$state"}


def test_outside_of_jit_a_program_is_traced_anew_only_where_it_has_become_another() -> None:
    shown, calls = ["normal"], []

    def draw(a: Any, infer: Mapping[str, Any]) -> Any:
        calls.append(shown[0])
        if shown[0] in ("bit", "marked"):
            z = 1.0 * numpyro.sample("z", dist.Bernoulli(logits=a), infer=infer if shown[0] == "marked" else {})
        elif shown[0] == "named":
            z = numpyro.sample("z", dist.Normal(a, 1.0), infer={"estimator": Reinforce(Constant(1.0))})
        else:
            z = numpyro.sample("z", dist.Normal(a, 1.0))
        return z + numpyro.sample("w", dist.Gumbel(a, 1.0)) if shown[0] == "more" else z

    def model() -> None:
        z = draw(0.2, {})
        with numpyro.plate("data", 10 if shown[0] == "scaled" else 6, subsample_size=6):
            numpyro.sample("x", dist.Normal(z, 2.0 if shown[0] == "scale" else 1.0), obs=DATA)

    def guide() -> None:
        draw(numpyro.param("a", 0.7), {"enumerate": "parallel"})

    def step(elbo: EstimatorELBO) -> Any:
        return lambda: jax.value_and_grad(lambda a: elbo.loss(jax.random.key(1), {"a": a}, model, guide))(0.7)

    def called(elbo: EstimatorELBO) -> int:
        calls.clear()
        jax.eval_shape(step(elbo))
        return len(calls)

    elbo = EstimatorELBO()
    assert (called(elbo), called(elbo)) == (4, 2)
    shown[0] = "scale"  # of the same structure, and its numbers are those of this call
    assert called(elbo) == 2
    for kind in ("more", "scaled", "bit", "named", "marked"):
        shown[0] = kind
        if kind in ("more", "bit"):
            assert jax.jit(step(elbo))() == jax.jit(step(EstimatorELBO()))(), kind
        else:
            assert called(elbo) > 4, kind
        shown[0] = "normal"
        called(elbo)
        assert called(elbo) == 2
    assert called(pickle.loads(pickle.dumps(elbo))) == 4


def test_threads_that_share_an_elbo_never_take_each_others_plan() -> None:
    def remembering(number: int) -> None:
        def program() -> None: ...

        for _ in range(3000):
            memory.store(settings, number, number, program, program)  # type: ignore[arg-type]
            known = memory.recall(settings, program, program)
            taken.append(known is None or (known.plan, known.kinds) == (number, number))

    memory, settings, taken, interval = Memory(), EstimatorELBO().settings, list[bool](), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(remembering, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert len(taken) == 12_000
    assert all(taken)


def test_a_law_of_the_users_own_holds_what_it_likes_under_any_name() -> None:
    class Law(dist.Normal):
        def __init__(self, loc: Any) -> None:
            super().__init__(loc, 1.0)
            self.base_dist, self.transforms = "a name", None

    def loss(law: Any) -> Any:
        def model() -> None:
            numpyro.sample("x", dist.Normal(numpyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=1.0)

        def guide() -> None:
            numpyro.sample("z", law(numpyro.param("a", 0.7)))

        return EstimatorELBO().loss(jax.random.key(0), {}, model, guide)

    assert loss(Law) == loss(lambda loc: dist.Normal(loc, 1.0))
