"""`GradientMonitor`: right numbers, nothing changed, and the warnings where they belong."""

from __future__ import annotations

import csv
import itertools
import warnings
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as nd
import optax
import pyro
import pyro.distributions as pd
import pytest
import torch
from numpyro import infer as numpyro_infer
from numpyro.infer.autoguide import AutoNormal
from numpyro.optim import SGD, Minimize, _NumPyroOptim
from pyro import infer as pyro_infer

from ppl_estimators import (
    Constant,
    DisARM,
    EstimatorError,
    EstimatorWarning,
    LeaveOneOut,
    MovingAverage,
    Reinforce,
    RELAXWithModel,
)
from ppl_estimators import numpyro as ours_numpyro
from ppl_estimators import pyro as ours_pyro
from ppl_estimators.backends import Library
from ppl_estimators.diagnostics import GradientMonitor
from ppl_estimators.diagnostics.moments import running
from ppl_estimators.measure.watch import Moment, Snapshot

Array = Any


# ---- one program in both libraries, and how each trains --------------------------------------------------------------


def pyro_svi(model: Any, guide: Any, elbo: Any, rate: float) -> Any:
    return pyro_infer.SVI(model, guide, pyro.optim.SGD({"lr": rate}), elbo)


def pyro_train(svi: Any, steps: int, *args: Any) -> list[float]:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    return [svi.step(*args) for _ in range(steps)]


def numpyro_svi(model: Any, guide: Any, elbo: Any, rate: float) -> Any:
    return numpyro_infer.SVI(model, guide, SGD(rate), elbo)


def numpyro_train(svi: Any, steps: int, *args: Any) -> list[float]:
    losses = svi.run(jax.random.key(0), steps, *args, progress_bar=False).losses
    jax.effects_barrier()
    return losses.tolist()


PYRO = SimpleNamespace(
    name="pyro", sample=pyro.sample, param=pyro.param, plate=pyro.plate, factor=pyro.factor, d=pd, array=torch.tensor,
    svi=pyro_svi, train=pyro_train, ours=ours_pyro, infer=pyro_infer, graph=pyro_infer.TraceGraph_ELBO,
)  # fmt: skip
NUMPYRO = SimpleNamespace(
    name="numpyro", sample=numpyro.sample, param=numpyro.param, plate=numpyro.plate, factor=numpyro.factor, d=nd,
    array=jnp.array, svi=numpyro_svi, train=numpyro_train, ours=ours_numpyro, infer=numpyro_infer,
    graph=numpyro_infer.TraceGraph_ELBO,
)  # fmt: skip
BOTH = pytest.mark.parametrize("lib", [PYRO, NUMPYRO], ids=lambda lib: lib.name)


def mixed(lib: Any) -> tuple[Any, Any]:
    """A bit, and below it in model and guide a plate of Normals."""

    def model() -> None:
        k = lib.sample("k", lib.d.Bernoulli(0.4))
        with lib.plate("n", 3):
            w = lib.sample("w", lib.d.Normal(2.0 * k, 1.0))
            v = lib.sample("v", lib.d.Normal(0.0, 1.0))
            lib.sample("x", lib.d.Normal(w + v, 0.5), obs=lib.array([1.1, -0.3, 0.6]))

    def guide() -> None:
        k = lib.sample("k", lib.d.Bernoulli(logits=lib.param("a", lib.array(0.4))))
        mean = lib.param("m", lib.array([0.3, 0.1, 0.2]))
        with lib.plate("n", 3):
            lib.sample("w", lib.d.Normal(mean + k, lib.array(0.8)))
            lib.sample("v", lib.d.Normal(lib.param("c", lib.array(0.1)), 0.9))  # one array for three elements

    return model, guide


# ---- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 7])
def test_signal_and_variance_have_no_bias(count):
    """Exact: over all sequences of draws of one vector that takes two values."""
    decay, p, values = 0.8, 0.3, np.array([[1.0, -2.0], [0.5, 3.0]])
    mean = (1 - p) * values[0] + p * values[1]
    variance = (1 - p) * p * ((values[0] - values[1]) ** 2).sum()
    signal_found = variance_found = 0.0
    for bits in itertools.product((0, 1), repeat=count):
        average, square = np.zeros(2), 0.0
        for b in bits:
            average = decay * average + (1 - decay) * values[b]
            square = decay * square + (1 - decay) * (values[b] ** 2).sum()
        signal, noise = running((average**2).sum(), square, decay, count)
        weight = np.prod([p if b else 1 - p for b in bits])
        signal_found += weight * signal
        variance_found += weight * noise
    assert signal_found == pytest.approx((mean**2).sum(), rel=1e-12)
    assert variance_found == pytest.approx(variance, rel=1e-12)


def expected(history: np.ndarray, decay: float) -> tuple[float, float]:
    """‖E g‖² and variance from a list of gradients, as `numpy.cov` weighs them."""
    weights = decay ** np.arange(len(history))[::-1]
    flat = history.reshape(len(history), -1)
    variance = sum(float(np.cov(column, aweights=weights)) for column in flat.T)
    mean = np.average(flat, axis=0, weights=weights)
    c = (weights**2).sum() / weights.sum() ** 2
    return float((mean**2).sum()) - c * variance, variance


@BOTH
@pytest.mark.usefixtures("double_precision")
def test_the_rows_are_the_moments_of_what_the_optimiser_got(lib):
    model, guide = mixed(lib)
    history: dict[str, list[np.ndarray]] = {"a": [], "m": [], "c": []}
    elbo = lib.ours.EstimatorELBO({"k": DisARM()})
    steps, decay = 60, 0.93
    monitor = GradientMonitor(every=20, decay=decay)
    if lib is PYRO:
        optim = Still()
        optim.history = history
        svi = pyro_infer.SVI(model, guide, optim, elbo)
    else:

        def note(g: Any) -> None:
            for n in history:
                history[n].append(np.asarray(g[n]))

        def update(i: Any, g: Any, params: Any) -> Any:
            jax.debug.callback(note, g, ordered=True)
            return params

        svi = numpyro_infer.SVI(
            model, guide, _NumPyroOptim(lambda *f: f, lambda params: params, update, lambda params: params), elbo
        )
    lib.train(monitor.watch(svi), steps)
    report = monitor.report()
    assert report.step == steps
    assert {r.name for r in report.last("parameter")} == {"a", "m", "c"}
    for name, gradients in history.items():
        assert len(gradients) == steps
        signal, variance = expected(np.array(gradients), decay)
        row = report[name]
        assert row.variance == pytest.approx(variance, rel=1e-9)
        assert row.mean_norm == pytest.approx(max(signal, 0.0) ** 0.5, rel=1e-8)
    # a is the logit of k, m + k the mean of w, c that of v: the site's slopes are the parameters' gradients
    for site, parameter in (("k", "a"), ("w", "m"), ("v", "c")):
        assert report[site].variance == pytest.approx(report[parameter].variance, rel=1e-9)
    assert [r.step for r in report.rows if r.name == "k"] == [20, 40, 60]


@BOTH
def test_the_noise_of_one_bit_is_the_closed_form(lib):
    """Reinforce at fixed parameters, 3,000 steps in one window: within five standard errors of the known variance."""
    p, cost = 0.3, (0.6, 1.5)

    def model() -> None:
        b = lib.sample("b", lib.d.Bernoulli(p))
        lib.factor("cost", -(cost[0] + (cost[1] - cost[0]) * b))

    def guide() -> None:
        lib.sample("b", lib.d.Bernoulli(logits=lib.param("a", lib.array(np.log(p / (1 - p)), dtype=None))))

    steps = 3000
    monitor = GradientMonitor(every=steps, decay=0.9999)
    lib.train(monitor.watch(lib.svi(model, guide, lib.ours.EstimatorELBO({"b": Reinforce(Constant(0.0))}), 0.0)), steps)
    q = 1 - p
    g = {1: cost[1] * q, 0: -cost[0] * p}
    mean = p * g[1] + q * g[0]
    moments = {k: p * (g[1] - mean) ** k + q * (g[0] - mean) ** k for k in (2, 4)}
    error = np.sqrt((moments[4] - moments[2] ** 2) / steps)
    assert error < 0.05 * moments[2] / 2  # a tenth too much would be seen
    assert abs(monitor.report()["b"].variance - moments[2]) < 5 * error
    assert abs(monitor.report()["b"].mean_norm - abs(mean)) < 5 * np.sqrt(moments[2] / steps)


# ---- nothing is changed ----------------------------------------------------------------------------------------------


def elbos(lib: Any) -> dict[str, tuple[Any, Any]]:
    """An ELBO, and what the hook declares for it."""
    return {
        "default": (lib.ours.EstimatorELBO(), None),
        "several particles": (lib.ours.EstimatorELBO(num_particles=3), None),
        "average": (lib.ours.EstimatorELBO(), {"k": Reinforce(MovingAverage())}),
        "relaxed": (lib.ours.EstimatorELBO(), {"k": RELAXWithModel()}),
        "both averaged": (lib.ours.EstimatorELBO({"k": DisARM()}, average_model=True), None),
        "stock": (lib.graph(), None),
    }


@BOTH
@pytest.mark.parametrize("name", ["default", "several particles", "average", "relaxed", "both averaged", "stock"])
@pytest.mark.usefixtures("double_precision")
def test_training_is_as_before(lib, name):
    losses = {}
    model, guide = mixed(lib)
    for watched in (False, True):
        elbo, kept = elbos(lib)[name]
        mine = guide if kept is None else lib.ours.with_estimators(guide, kept)
        svi = lib.svi(model, mine, elbo, 0.05)
        monitor = GradientMonitor(every=5, decay=0.5)
        losses[watched] = lib.train(monitor.watch(svi) if watched else svi, 12)
        if watched:
            report = monitor.report()
            assert {r.name for r in report.last()} == {"a", "m", "c", "k", "w", "v"}
            for site, parameter in (("k", "a"), ("w", "m"), ("v", "c")):  # whatever an estimator does inside
                assert report[site].variance == pytest.approx(report[parameter].variance, rel=1e-6)
                assert report[site].variance > 0
    assert losses[True] == pytest.approx(losses[False], rel=1e-12)


def test_the_svi_and_what_the_user_reads_are_untouched():
    model, guide = mixed(NUMPYRO)
    svi = numpyro_svi(model, guide, ours_numpyro.EstimatorELBO(), 0.1)
    before = dict(vars(svi))
    monitor = GradientMonitor(every=1)
    watched = monitor.watch(svi)
    assert isinstance(watched, numpyro_infer.SVI)
    state = watched.init(jax.random.key(0))
    assert vars(svi) == before
    assert set(watched.get_params(state)) == {"a", "m", "c"}
    state, _ = jax.jit(watched.update)(state)
    assert np.isfinite(jax.jit(watched.evaluate)(state))
    result = watched.run(jax.random.key(1), 3, init_state=state, progress_bar=True)
    assert set(result.params) == {"a", "m", "c"}
    jax.effects_barrier()
    assert monitor.report().step == 4  # it goes on where the state was
    with pytest.raises(EstimatorError, match="a state of another SVI"):
        watched.update(svi.init(jax.random.key(0)))


def test_every_way_to_step_in_numpyro():
    """Forward mode, stable updates with a step that is not finite, optax, scans, state in a vector of chains."""

    def model(bad):
        w = numpyro.sample("w", nd.Normal(0.0, 1.0))
        numpyro.factor("bad", jnp.where(bad, jnp.inf, 0.0) * w)

    def guide(bad):
        numpyro.sample("w", nd.Normal(numpyro.param("m", 0.3), numpyro.param("s", 0.9)))

    monitor = GradientMonitor(every=4, decay=0.5)
    svi = monitor.watch(numpyro_infer.SVI(model, guide, optax.adam(0.1), numpyro_infer.Trace_ELBO()))
    state = svi.init(jax.random.key(0), False)
    step = jax.jit(svi.stable_update, static_argnames="forward_mode_differentiation")
    for bad in (False, True, False, False):
        before = svi.get_params(state)
        state, loss = step(state, bad, forward_mode_differentiation=not bad)
        assert np.isnan(loss) == bad
        assert (svi.get_params(state)["m"] == before["m"]) == bad
    report = monitor.report()
    assert (report.step, report.skipped) == (4, 1)
    for row in report.last():
        assert 0 < row.variance < 1e3
    assert "1 steps were not finite" in " ".join(str(report).split())
    many = jax.vmap(svi.init, (0, None))(jax.random.split(jax.random.key(1), 2), False)
    many, losses = jax.jit(jax.vmap(svi.update, (0, None)))(many, False)
    assert losses.shape == (2,)


def test_autoguides_and_nested_parameters_in_numpyro():
    from flax import linen
    from numpyro.contrib.module import flax_module

    def model():
        w = numpyro.sample("w", nd.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("x", nd.Normal(w.sum(), 0.5), obs=1.0)

    def guide():
        net = flax_module("net", linen.Dense(2), input_shape=(1, 1))
        numpyro.sample("w", nd.Normal(net(jnp.ones((1, 1)))[0], 0.5).to_event(1))

    for mine, names in ((guide, {"net$params", "w"}), (AutoNormal(model), {"w_auto_loc", "w_auto_scale", "w"})):
        monitor = GradientMonitor(every=3)
        numpyro_train(monitor.watch(numpyro_svi(model, mine, ours_numpyro.EstimatorELBO(), 0.01)), 3)
        assert {r.name for r in monitor.report().last()} == names


def test_every_way_to_step_in_pyro():
    """Branches, minibatches of several sizes, a scheduler."""

    def model(data):
        k = pyro.sample("k", pd.Bernoulli(0.5))
        if k.item():
            pyro.sample("w", pd.Normal(0.0, 1.0))
        with pyro.plate("n", len(data)):
            z = pyro.sample("z", pd.Normal(k, 1.0))
            pyro.sample("x", pd.Normal(z, 1.0), obs=data)

    def guide(data):
        k = pyro.sample("k", pd.Bernoulli(logits=pyro.param("a", torch.tensor(0.2))))
        if k.item():
            pyro.sample("w", pd.Normal(pyro.param("v", torch.tensor(0.2)), 1.0))
        with pyro.plate("n", len(data)):
            pyro.sample("z", pd.Normal(pyro.param("m", torch.tensor(0.1)) * data, 1.0))

    pyro.set_rng_seed(0)
    scheduler = pyro.optim.ExponentialLR({"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}, "gamma": 0.5})
    monitor = GradientMonitor(every=30)
    elbo = ours_pyro.EstimatorELBO({"k": Reinforce(MovingAverage())})
    svi = monitor.watch(pyro_infer.SVI(model, guide, scheduler, elbo))
    assert isinstance(svi, pyro_infer.SVI)
    for i in range(30):
        svi.step(torch.ones(4 if i % 5 else 2))
    scheduler.step()
    svi.optim.step()
    report = monitor.report()
    assert report.skipped == 0
    assert {r.name for r in report.last()} == {"a", "v", "m", "k", "w", "z"}
    assert svi.evaluate_loss(torch.ones(4)) > 0


class Still(pyro.optim.PyroOptim):
    """Moves nothing, and notes what it is given."""

    def __init__(self) -> None:
        super().__init__(torch.optim.SGD, {"lr": 0.0})
        self.history: dict[str, list[np.ndarray]] = {}

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        for p in params:
            self.history.setdefault(pyro.get_param_store().param_name(p), []).append(p.grad.numpy().copy())


def test_a_step_that_is_not_finite_in_pyro():
    model, guide = mixed(PYRO)

    def sometimes(bad):
        model()
        pyro.factor("bad", torch.tensor(float("nan") if bad else 0.0))

    optim, monitor = Still(), GradientMonitor(every=5, decay=0.5)
    svi = monitor.watch(pyro_infer.SVI(sometimes, lambda bad: guide(), optim, pyro_infer.Trace_ELBO()))
    with pyro.validation_enabled(False):
        for i in range(5):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pyro's own, of the loss
                svi.step(i == 2)
    report = monitor.report()
    assert (report.step, report.skipped) == (5, 1)
    finite = np.array([g for i, g in enumerate(optim.history["m"]) if i != 2])
    assert report["m"].variance == pytest.approx(expected(finite, 0.5)[1], rel=1e-4)


def test_a_plain_torch_loop():
    model, _ = mixed(PYRO)
    torch.manual_seed(0)
    monitor = GradientMonitor(every=10)

    class Guide(pyro.nn.PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor(0.4))

        def forward(self) -> None:
            k = pyro.sample("k", pd.Bernoulli(logits=self.a))
            with pyro.plate("n", 3):
                pyro.sample("w", pd.Normal(k.expand(3), 0.8))
                pyro.sample("v", pd.Normal(0.1, 0.9))

    elbo = ours_pyro.EstimatorELBO({"k": DisARM()})(model, monitor.watch(Guide()))
    optimiser = torch.optim.Adam(elbo.parameters(), lr=0.01)
    for _ in range(10):
        optimiser.zero_grad()
        loss = elbo()
        loss.backward()
        monitor(loss, elbo.named_parameters())
        optimiser.step()
    report = monitor.report()
    assert [r.name for r in report.last()] == ["guide.guide.a", "k"]
    assert report["k"].variance == pytest.approx(report["guide.guide.a"].variance, rel=1e-5)


# ---- warnings --------------------------------------------------------------------------------------------------------


def loud(lib: Any, steps: int, estimator: Any, offset: float = 300.0) -> GradientMonitor:
    """A bit whose cost has a large constant that only a baseline removes."""

    def model() -> None:
        b = lib.sample("b", lib.d.Bernoulli(0.4))
        lib.factor("cost", offset + b)

    def guide() -> None:
        lib.sample("b", lib.d.Bernoulli(logits=lib.param("a", lib.array(0.3))))

    monitor = GradientMonitor(every=50, decay=0.98)
    lib.train(monitor.watch(lib.svi(model, guide, lib.ours.EstimatorELBO({"b": estimator}), 0.0)), steps)
    return monitor


@BOTH
def test_a_drowned_site_is_named(lib):
    with pytest.warns(EstimatorWarning, match=r"site 'b': no signal stood out of the noise in 10 looks .*quieter"):
        loud(lib, 1500, Reinforce(Constant(0.0)))
    assert loud(lib, 400, DisARM()).report()["b"].signal_to_noise > 0.2


def snapshot(step: int, signal: float, variance: float, skipped: int = 0) -> Snapshot:
    """Moments that mean just that, after very many steps with decay 0.99."""
    c = 0.01 / 1.99
    return Snapshot(step, skipped, 1.0, (Moment("site", "z", 10**6, signal**2 + c * variance, signal**2 + variance),))


def test_a_signal_that_drowns_and_one_that_converges():
    for factor, warned in ((100.0, True), (1.0, False)):
        monitor = GradientMonitor()
        monitor.library = Library.pyro
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            for i in range(1, 6):
                monitor.receive(snapshot(100 * i, 1.0, 1.0))
            assert monitor.report()["z"].signal_to_noise == pytest.approx(1.0)
            for i in range(6, 30):
                monitor.receive(snapshot(100 * i, 0.0, factor))
        assert [("the variance is 100 times" in str(w.message)) for w in found] == [True] * warned  # once


def test_a_run_that_is_never_finite_says_so():
    monitor = GradientMonitor()
    with pytest.warns(EstimatorWarning, match="none of the last 100 steps was finite"):
        monitor.receive(snapshot(100, 1.0, 1.0, skipped=100))


def jumping(lib: Any) -> Any:
    """A guide, and a model that depends on z as ``kind`` says."""

    def model(kind: str) -> None:
        k = lib.sample("k", lib.d.Bernoulli(0.5))
        z = lib.sample("z", lib.d.Normal(0.0, 1.0))
        if kind == "guide":  # the model is smooth, the guide's own dependence is not
            return
        high = (z > 0.0) * 1.0 if kind == "jump" else z
        if kind == "discrete":  # z acts on x by way of k only: no jump, k's own estimator sees it
            high = k
        lib.sample("x", lib.d.Normal(3.0 * high, 1.0), obs=lib.array(2.5))
        lib.sample("y", lib.d.Normal(z, 1.0), obs=lib.array(0.5))

    def guide(kind: str) -> None:
        z = lib.sample("z", lib.d.Normal(lib.param("m", lib.array(0.0)), 1.0))
        lib.sample("k", lib.d.Bernoulli(logits=(z > 0.0) * 2.0 - 0.7 if kind == "guide" else z))

    return model, guide


@pytest.mark.filterwarnings("ignore:site 'z'.*no derivative leads")  # the ELBO's own word, before the monitor's
@BOTH
@pytest.mark.parametrize("ours", [True, False])
def test_a_pathwise_site_of_a_model_that_jumps(lib, ours):
    model, guide = jumping(lib)
    elbo = lib.ours.EstimatorELBO({"k": DisARM()}) if ours else lib.graph()
    with pytest.warns(EstimatorWarning, match=r"site 'z': the log density at 'x' changes.*Did you mean Reinforce\(\)"):
        lib.train(GradientMonitor().watch(lib.svi(model, guide, elbo, 0.0)), 1, "jump")
    with pytest.warns(EstimatorWarning, match=r"site 'z': the log density at 'k' in the guide changes"):
        lib.train(GradientMonitor().watch(lib.svi(model, guide, elbo, 0.0)), 1, "guide")
    for kind in ("smooth", "discrete"):
        lib.train(GradientMonitor().watch(lib.svi(model, guide, elbo, 0.0)), 1, kind)
    if ours:  # a score function does not mind
        elbo = lib.ours.EstimatorELBO({"z": Reinforce(LeaveOneOut()), "k": DisARM()}, num_particles=2)
        lib.train(GradientMonitor().watch(lib.svi(model, guide, elbo, 0.0)), 1, "jump")


# ---- where it goes ---------------------------------------------------------------------------------------------------


@BOTH
def test_csv(lib, tmp_path):
    model, guide = mixed(lib)
    path = tmp_path / "run.csv"
    monitor = GradientMonitor(every=3, log=path)
    lib.train(monitor.watch(lib.svi(model, guide, lib.ours.EstimatorELBO(), 0.01)), 7)
    monitor.report()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["step"] for r in rows] == ["3"] * 6 + ["6"] * 6
    assert float(rows[-1]["variance"]) == monitor.report().rows[-1].variance
    assert {r["name"] for r in rows if r["kind"] == "site"} == {"k", "w", "v"}


class Writer:
    def __init__(self) -> None:
        self.lines: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.lines.append((tag, value, step))


def test_a_writer_of_scalars(tmp_path):
    writer = Writer()
    monitor = GradientMonitor(log=writer)
    monitor.receive(snapshot(100, 1.0, 4.0))
    assert ("gradient/site/z/variance", pytest.approx(4.0), 100) in writer.lines
    assert ("gradient/loss", 1.0, 100) in writer.lines


def test_tensorboard(tmp_path):
    monitor = GradientMonitor(log=tmp_path / "board")
    monitor.receive(snapshot(100, 1.0, 4.0))
    monitor._log.writer.close()
    (file,) = (tmp_path / "board").iterdir()
    assert b"gradient/site/z/signal_to_noise" in file.read_bytes()


def test_tensorboard_is_optional(tmp_path, monkeypatch):
    import sys

    for name in ("tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install tensorboardX"):
        GradientMonitor(log=tmp_path / "board")


@BOTH
def test_what_a_report_shows(lib):
    model, guide = mixed(lib)
    monitor = GradientMonitor(every=5)
    svi = monitor.watch(lib.svi(model, guide, lib.ours.EstimatorELBO(), 0.01))
    with pytest.raises(EstimatorError, match="has seen no step that it looks at: it looks every 5 steps"):
        monitor.report()
    lib.train(svi, 10)
    report = monitor.report()
    assert "Gradient by site, step 10" in str(report)
    assert report._repr_html_().count("Gradient by") == 2
    assert len(report.records()) == 12
    assert report.plot().axes[1].get_xlabel() == "step"
    assert '"every": 5' in report.to_json()
    with pytest.raises(KeyError, match="no site or parameter 'zz': a, "):
        report["zz"]
    lib.train(svi, 5)  # another run begins, the rows are its own
    assert [r.step for r in monitor.report().rows] == ([5] * 6 if lib is NUMPYRO else [5] * 6 + [10] * 6 + [15] * 6)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_are_named(tmp_path):
    for wrong, message in (
        ({"every": 0}, "needs 1 or more steps, got 0"),
        ({"decay": 1.0}, "lies between 0 and 1, got 1.0"),
        ({"log": 3}, "takes a .csv file, a folder, or a writer"),
        ({"log": tmp_path / "run.txt"}, "neither a .csv file nor a folder"),
        ({"log": tmp_path / "nowhere" / "run.csv"}, "cannot write"),
    ):
        with pytest.raises(EstimatorError, match=message):
            GradientMonitor(**wrong)
    model, guide = mixed(NUMPYRO)
    with pytest.raises(EstimatorError, match=r"takes an SVI \(or in Pyro a guide\), got 3"):
        GradientMonitor().watch(3)
    monitor = GradientMonitor()
    monitor.watch(numpyro_svi(model, guide, ours_numpyro.EstimatorELBO(), 0.1))
    with pytest.raises(EstimatorError, match="watches already"):
        monitor.watch(numpyro_svi(model, guide, ours_numpyro.EstimatorELBO(), 0.1))
    with pytest.raises(EstimatorError, match="watches no guide"):
        monitor(1.0, [])
    with pytest.raises(EstimatorError, match="Minimize evaluates the loss many times"):
        GradientMonitor().watch(numpyro_infer.SVI(model, guide, Minimize(), ours_numpyro.EstimatorELBO()))


def test_fifty_sites_and_a_million_parameters():
    def model():
        z = numpyro.sample("z", nd.Normal(0.0, 1.0))
        numpyro.sample("x", nd.Normal(z, 1.0), obs=0.5)

    def guide():
        w = numpyro.param("w", jnp.zeros(10**6))
        numpyro.sample("z", nd.Normal(jnp.sum(w), 1.0))

    monitor = GradientMonitor(every=30)
    svi = monitor.watch(numpyro_svi(model, guide, numpyro_infer.Trace_ELBO(), 0.0))
    state = svi.run(jax.random.key(0), 30, progress_bar=False).state
    inner = jax.tree.leaves(state.optim_state.inner)
    kept = [x for x in jax.tree.leaves(state.optim_state) if not any(x is y for y in inner)]
    assert sum(x.size for x in kept) < 10**6 + 100  # one number for each entry
    report = monitor.report()
    assert report["w"].variance == pytest.approx(1e6 * report["z"].variance, rel=1e-3)

    def pyro_model():
        z = pyro.sample("z", pd.Normal(0.0, 1.0))
        pyro.sample("x", pd.Normal(z, 1.0), obs=torch.tensor(0.5))

    def pyro_guide():
        pyro.sample("z", pd.Normal(pyro.param("w", torch.zeros(10**6)).sum(), 1.0))

    pyro_monitor = GradientMonitor(every=30)
    pyro_train(pyro_monitor.watch(pyro_svi(pyro_model, pyro_guide, pyro_infer.Trace_ELBO(), 0.0)), 30)
    report = pyro_monitor.report()
    assert report["w"].variance == pytest.approx(1e6 * report["z"].variance, rel=1e-3)

    def bits(name, logits):
        for i in range(50):
            pyro.sample(f"z{i}", pd.Bernoulli(logits=logits[i]))

    pyro_monitor = GradientMonitor(every=5)
    pyro_svi_ = pyro_monitor.watch(
        pyro_svi(
            lambda: bits("model", torch.zeros(50)),
            lambda: bits("guide", pyro.param("a", torch.linspace(-1.0, 1.0, 50))),
            ours_pyro.EstimatorELBO(),
            0.0,
        )
    )
    pyro_train(pyro_svi_, 5)
    assert len(pyro_monitor.report().last("site")) == 50
