"""Reports and comparisons: closed forms, the exact gradient, many sites, many parameters, mistakes."""

from __future__ import annotations

import json
import sys
import tracemalloc
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as nd
import pyro
import pyro.distributions as pd
import pytest
import torch
from numpyro import handlers
from numpyro import infer as numpyro_infer
from pyro import infer as pyro_infer
from pyro import poutine

from ppl_estimators import (
    BitFlip,
    DisARM,
    Enumerate,
    EstimatorError,
    LeaveOneOut,
    Pathwise,
    Reinforce,
    StickingTheLanding,
    StraightThrough,
)
from ppl_estimators.diagnostics import MonitorReport, MonitorRow, compare, gradient_report, recommend
from ppl_estimators.diagnostics.moments import Moments
from ppl_estimators.numpyro import EstimatorELBO as NumPyroELBO
from ppl_estimators.pyro import EstimatorELBO as PyroELBO

P, T = 0.3, 0.45
LOGIT = float(np.log(P / (1 - P)))


def pyro_model(t=T):
    with poutine.mask(mask=False):
        b = pyro.sample("b", pd.Bernoulli(0.5))
    pyro.factor("cost", -((b - t) ** 2))


def pyro_guide(t=T):
    pyro.sample("b", pd.Bernoulli(logits=pyro.param("a", torch.tensor(LOGIT))), infer={"is_auxiliary": False})


def test_moments_of_chunks_are_those_of_all_draws():
    rng = np.random.default_rng(0)
    parts = rng.normal(size=(11, 3, 2)) + 5.0 * rng.normal(size=(11, 1, 1))  # chunks lie far apart
    moments = Moments()
    for chunk in (slice(0, 2), slice(2, 3), slice(3, 11)):
        moments.add_parts(parts[chunk, 0, 0], {"a": parts[chunk]})
    whole, away = parts.sum(1), parts - parts.mean(0)
    np.testing.assert_allclose(moments.mean["a"], whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.variance("a"), whole.var(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(moments.part_squares["a"], (away**2).sum((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(moments.part_products["a"], (away * away.sum(1, keepdims=True)).sum((0, 2)), rtol=1e-12)
    np.testing.assert_allclose(moments.losses.error, parts[:, 0, 0].std(ddof=1) / 11**0.5, rtol=1e-12)


def masked(guide):
    def run(*args):
        with poutine.mask(mask=False):
            guide(*args)

    return run


def numpyro_model(t=T):
    with handlers.mask(mask=False):
        b = numpyro.sample("b", nd.Bernoulli(0.5))
    numpyro.factor("cost", -((b - t) ** 2))


def numpyro_guide(t=T):
    with handlers.mask(mask=False):
        numpyro.sample("b", nd.Bernoulli(logits=numpyro.param("a", LOGIT)))


PYRO = SimpleNamespace(name="pyro", model=pyro_model, guide=masked(pyro_guide), elbo=PyroELBO, infer=pyro_infer)
NUMPYRO = SimpleNamespace(
    name="numpyro", model=numpyro_model, guide=numpyro_guide, elbo=NumPyroELBO, infer=numpyro_infer
)
BOTH = pytest.mark.parametrize("lib", [PYRO, NUMPYRO], ids=lambda lib: lib.name)


def closed_forms():
    """Variance in the logit of one draw of each estimator, f(b) = (b − t)²."""
    p, q, f0, f1 = P, 1 - P, T**2, (1 - T) ** 2
    delta = f1 - f0
    return {
        "Reinforce": p * q * (q * f1 + p * f0) ** 2,
        "DisARM": p * q * delta**2 * (0.5 * max(p, q) - p * q),
        "Enumerate": 0.0,
        "LeaveOneOut": p * q * delta**2 * (0.5 - p * q),
    }


SPECS = {
    "Reinforce": Reinforce(),
    "DisARM": DisARM(),
    "Enumerate": Enumerate(),
    "LeaveOneOut": Reinforce(LeaveOneOut()),
}


@BOTH
def test_variances_of_a_single_bit_are_the_closed_forms(lib):
    n = 400 if lib is PYRO else 20_000
    found = compare(lib.model, lib.guide, (), SPECS, num_draws=n, timing_steps=3)
    assert found.reference.startswith("exact, 2 states")
    assert not found.failed
    for label, exact in closed_forms().items():
        row = found[label]
        assert abs(row.variance - exact) < 5 * row.variance_error + 1e-9, label
        assert row.variance_error < 0.15 * exact + 1e-9
        assert not row.biased
        assert row.num_particles == (2 if label == "LeaveOneOut" else 1)
    assert found["Enumerate"].variance < 1e-12
    assert "× ms" in str(found)
    assert max(map(len, str(found).splitlines())) <= 80
    assert found._repr_html_().startswith("<pre")
    assert len(json.loads(found.to_json())["rows"]) == 4
    assert found.plot().axes


@BOTH
def test_a_biased_estimator_is_seen(lib):
    # the slope at b says nothing of the difference of the costs where the model is cubic
    factor = pyro.factor if lib is PYRO else numpyro.factor
    sample, d, param = (
        (pyro.sample, pd, lambda: pyro.param("a", torch.tensor(LOGIT)))
        if lib is PYRO
        else (numpyro.sample, nd, lambda: numpyro.param("a", LOGIT))
    )

    def model():
        factor("cost", 3.0 * sample("b", d.Bernoulli(0.4)) ** 4)

    def guide():
        sample("b", d.Bernoulli(logits=param()))

    many = lib.elbo({"b": StraightThrough()}, num_particles=20, vectorize_particles=True)
    found = compare(
        model, guide, (), {"StraightThrough()": many, "UnorderedSet": "UnorderedSet"}, num_draws=200, timing_steps=2
    )
    assert found["StraightThrough()"].biased
    stock = compare(model, guide, (), ["TraceGraph_ELBO"], num_draws=100, timing_steps=2)
    assert not stock["TraceGraph_ELBO"].biased
    assert "needs a categorical" in found.failed["UnorderedSet"].lower()
    given = compare(model, guide, (), ["DisARM"], num_draws=100, timing_steps=2, reference={"a": np.float64(100.0)})
    assert given["DisARM"].biased


@BOTH
def test_the_report_knows_where_the_noise_is(lib):
    """b is noisy, w is exact given b: the cost is linear in w and the guide is at w's posterior shape."""
    sample, d = (pyro.sample, pd) if lib is PYRO else (numpyro.sample, nd)
    number = torch.tensor if lib is PYRO else jnp.array
    param = pyro.param if lib is PYRO else numpyro.param

    def model():
        b, w = sample("b", d.Bernoulli(0.4)), sample("w", d.Normal(0.0, 1.0))
        sample("x", d.Normal(2.0 * b, 0.5), obs=number(1.2))
        sample("y", d.Normal(w, 1.0), obs=number(0.3))

    def guide():
        sample("b", d.Bernoulli(logits=param("a", number(0.3))))
        sample("w", d.Normal(param("m", number(0.1)), param("s", number(0.7))))

    elbo = lib.elbo({"b": DisARM()})
    n = 200 if lib is PYRO else 4000
    report = gradient_report(elbo, model, guide, num_draws=n, timing_steps=3)
    rows = {p.name: p for p in report.parameters}
    sites = {s.name: s for s in report.sites}
    assert set(rows) == {"a", "m", "s"}
    assert list(sites) == ["(explicit)", "b", "w"]
    # dL/dm = 2 m - 0.3 + 2 s ε: variance 4 s²
    m = rows["m"]
    assert abs(m.variance - 4 * 0.7**2) < 5 * 4 * 0.49 * np.sqrt(2 / n)
    assert sum(p.share for p in report.parameters) == pytest.approx(1)
    assert sum(s.share for s in report.sites) == pytest.approx(1)
    assert sites["b"].variance == pytest.approx(rows["a"].variance, rel=1e-5)  # only b's part reaches a
    assert sites["w"].variance == pytest.approx(rows["m"].variance + rows["s"].variance, rel=1e-5)
    assert sites["b"].cost_share == 0.5
    assert report.evaluations == 2
    assert report.milliseconds > 0
    assert "DisARM()" in str(report)
    assert json.loads(report.to_json())["total_variance"] == report.total_variance
    assert report.plot().axes
    stock = gradient_report(lib.infer.Trace_ELBO() if lib is PYRO else lib.infer.TraceGraph_ELBO(), model, guide,
                            num_draws=20, timing_steps=2)  # fmt: skip
    assert [s.estimator for s in stock.sites] == [None] * 3
    assert stock.evaluations is None


@BOTH
def test_the_noise_of_the_data_is_told_from_that_of_the_draws(lib):
    """z = m + ε and x ~ Normal(z, 1), B of N: the slope in m is N/B Σ (2 m + 2 ε − x). Var ε gives 4 N²/B; which x are
    drawn, without replacement, N²/B Var(x) (N − B)/(N − 1)."""
    sample, d, param, plate, number = (
        (pyro.sample, pd, pyro.param, pyro.plate, torch.tensor)
        if lib is PYRO
        else (numpyro.sample, nd, numpyro.param, numpyro.plate, jnp.array)
    )
    x = np.array([-4.0, -1.0, 0.0, 2.0, 3.0, 5.0])
    seen = number(x.tolist())

    def model(size):
        with plate("data", 6, subsample_size=size) as i:
            sample("x", d.Normal(sample("z", d.Normal(0.0, 1.0)), 1.0), obs=seen[i])

    def guide(size):
        m = param("m", number(0.4))
        with plate("data", 6, subsample_size=size):
            sample("z", d.Normal(m, 1.0))

    of_data, n = x.var() * 4 / 5, 300 if lib is PYRO else 4000
    share = of_data / (of_data + 4.0)
    for elbo in (lib.elbo(), lib.infer.Trace_ELBO()):
        report = gradient_report(elbo, model, guide, 2, num_draws=n, timing_steps=1)
        assert abs(report.data_share - share) < 5 * (1 - share**2) / np.sqrt(n)
        assert abs(report.total_variance / (36 / 2 * (of_data + 4.0)) - 1) < 5 * np.sqrt(2 / n)
    assert "is of the data" in " ".join(str(report).split())
    whole = gradient_report(lib.elbo(), model, guide, 6, num_draws=8, timing_steps=1)
    assert whole.data_share is None


def test_tables_for_pandas():
    report = gradient_report(NumPyroELBO(), numpyro_model, numpyro_guide, num_draws=8, timing_steps=1)
    table = report.to_pandas()
    assert list(table["kind"]) == ["parameter", "site", "site"]
    assert list(table["name"]) == ["a", "(explicit)", "b"]
    assert table.loc[0, "variance"] == report.parameters[0].variance
    assert table.loc[2, "estimator"] == "Enumerate()"
    found = compare(numpyro_model, numpyro_guide, (), SPECS, num_draws=8, timing_steps=1)
    table = found.to_pandas().set_index("label")
    assert set(table.index) == set(SPECS)
    assert table.loc["DisARM", "variance"] == found["DisARM"].variance
    assert table["variance_times_milliseconds"].is_monotonic_increasing


def test_a_signal_that_is_not_seen_is_below_the_noise():
    rows = (MonitorRow(100, "site", "z", 0.0, 2.0, 0.0), MonitorRow(100, "site", "w", 1.0, 4.0, 0.5))
    shown = str(MonitorReport("pyro", 100, 0.99, 100, 0, 1.3, rows)).splitlines()
    (z,) = [line for line in shown if line.strip().startswith("z ")]
    (w,) = [line for line in shown if line.strip().startswith("w ")]
    assert z.split() == ["z", "–", "2", "below", "the", "noise"]
    assert w.split() == ["w", "1", "4", "0.5"]


def test_pandas_is_optional(monkeypatch):
    import sys

    report = gradient_report(NumPyroELBO(), numpyro_model, numpyro_guide, num_draws=4, timing_steps=1)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        report.to_pandas()


def fifty(lib):
    sample, d, param, number = (
        (pyro.sample, pd, pyro.param, torch.tensor) if lib is PYRO else (numpyro.sample, nd, numpyro.param, jnp.array)
    )
    start = np.linspace(-1.0, 1.0, 50).tolist()

    def model():
        total = sum(sample(f"z{i}", d.Bernoulli(0.4)) for i in range(50))
        sample("x", d.Normal(total, 5.0), obs=number(18.0))

    def guide():
        a = param("a", number(start))
        for i in range(50):
            sample(f"z{i}", d.Bernoulli(logits=a[i]))

    return model, guide


FIFTY = pytest.mark.parametrize("lib", [PYRO, pytest.param(NUMPYRO, marks=pytest.mark.slow)], ids=lambda lib: lib.name)


@FIFTY
def test_fifty_sites(lib):
    model, guide = fifty(lib)
    report = gradient_report(lib.elbo(), model, guide, num_draws=10, timing_steps=2)
    assert len(report.sites) == 51
    assert sum(s.share for s in report.sites) == pytest.approx(1)
    assert report.evaluations == 2  # shared: one more evaluation for all fifty
    alone = next(s for s in report.sites if s.name == "z7")
    assert alone.variance == pytest.approx(report.variance["a"][7], rel=1e-4)


@FIFTY
def test_fifty_sites_compared(lib):
    model, guide = fifty(lib)
    several = ["default", "Reinforce(LeaveOneOut())", "TraceGraph_ELBO"]
    found = compare(model, guide, (), several, num_draws=4, timing_steps=1, reference="none")
    assert not found.failed
    assert {r.label for r in found.rows} == set(several)
    assert found["default"].variance < found["TraceGraph_ELBO"].variance  # by far


def million(lib):
    sample, d, param, number = (
        (pyro.sample, pd, pyro.param, torch.as_tensor)
        if lib is PYRO
        else (numpyro.sample, nd, numpyro.param, jnp.asarray)
    )
    weights = np.linspace(0.1, 1.0, 10**6).astype(np.float32)

    def model():
        z = sample("z", d.Normal(0.0, 1.0))
        sample("x", d.Normal(z, 1.0), obs=number(0.5))

    def guide():
        w = param("w", number(0 * weights))
        sample("z", d.Normal((w * number(weights)).sum(), 1.0))

    # dL/dw = weights (2 ε - 0.5): every entry has variance 4 weights²
    return model, guide, 4 * float((weights.astype(float) ** 2).sum())


@contextmanager
def at_most(megabytes):
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 2**20 * megabytes
    finally:
        tracemalloc.stop()


# 24 draws in double precision are 183 MB, with their parts three times as much
@BOTH
def test_a_report_of_a_million_parameters_in_bounded_memory(lib):
    model, guide, total = million(lib)
    with at_most(170):
        report = gradient_report(lib.elbo(), model, guide, num_draws=24, timing_steps=1)
    assert abs(report.total_variance / total - 1) < 5 * np.sqrt(2 / 23)


@BOTH
def test_a_comparison_of_a_million_parameters_in_bounded_memory(lib):
    model, guide, total = million(lib)
    with at_most(170):
        found = compare(model, guide, (), ["default"], num_draws=24, timing_steps=1, reference="none")
    assert found["default"].num_draws == 24
    assert abs(found["default"].variance / total - 1) < 5 * np.sqrt(2 / 23)


@pytest.mark.slow
@BOTH
def test_a_recommendation_for_a_million_parameters_in_bounded_memory(lib, monkeypatch):
    """Of StickingTheLanding the slope is weights (0.5 - ε) here: a quarter of the variance."""
    several = [Pathwise(), StickingTheLanding()]
    monkeypatch.setattr(sys.modules["ppl_estimators.diagnostics.recommend"], "candidates", lambda: several)
    monkeypatch.setattr("ppl_estimators.diagnostics.reference.LONGER", 1)
    model, guide, total = million(lib)
    with at_most(300):  # two numbers in double precision for each entry and candidate, and for the reference
        found = recommend(model, guide, budget=50)
    assert found.mapping == {"z": StickingTheLanding()}
    for label, exact in (("Pathwise()", total), ("StickingTheLanding()", total / 4)):
        assert abs(found["z"].evidence[label].variance / exact - 1) < 5 * np.sqrt(2 / 49)


@BOTH
def test_stock_elbos_by_name(lib):
    sample, d, param, number = (
        (pyro.sample, pd, pyro.param, torch.tensor) if lib is PYRO else (numpyro.sample, nd, numpyro.param, jnp.array)
    )

    def model():
        b = sample("b", d.Bernoulli(0.4))
        sample("x", d.Normal(2.0 * b, 1.0), obs=number(1.3))

    def guide():
        sample("b", d.Bernoulli(logits=param("a", number(-0.8))))

    several = ["Trace_ELBO", "TraceGraph_ELBO", "TraceEnum_ELBO", "TraceMeanField_ELBO", "RenyiELBO", "Nothing_ELBO"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # NumPyro: no discrete latents in Trace_ELBO
        found = compare(model, guide, (), several, num_draws=150, timing_steps=1)
    assert found["TraceEnum_ELBO"].variance < 1e-10  # the guide is marked
    for exact in ("TraceEnum_ELBO", "TraceGraph_ELBO"):
        assert not found[exact].biased
    assert found["Trace_ELBO"].biased == (lib is NUMPYRO)  # its stock ELBO has no score function
    assert found["RenyiELBO"].biased  # another bound
    assert f"is not in {lib.name}.infer" in found.failed["Nothing_ELBO"]
    refused = {"TraceMeanField_ELBO", "Nothing_ELBO"} if lib is PYRO else {"Nothing_ELBO"}
    assert set(found.failed) == refused
    assert "'Nothing_ELBO' could not run" in " ".join(str(found).split())


@BOTH
def test_draws_are_paired(lib):
    """Same seed, same minibatch: candidates that differ in name only give the same numbers."""
    sample, d, param, plate, number = (
        (pyro.sample, pd, pyro.param, pyro.plate, torch.tensor)
        if lib is PYRO
        else (numpyro.sample, nd, numpyro.param, numpyro.plate, jnp.array)
    )
    data = number([-8.0, -3.0, 0.0, 4.0, 9.0, 30.0])

    def model():
        with plate("data", 6, subsample_size=2) as i:
            z = sample("z", d.Bernoulli(0.5))
            sample("x", d.Normal(z, 1.0), obs=data[i])

    def guide():
        a = param("a", number([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
        with plate("data", 6, subsample_size=2) as i:
            sample("z", d.Bernoulli(logits=a[i]))

    # given the minibatch both are exact: what is left is the minibatch's own noise, the same for both
    found = compare(model, guide, (), {"sum": Enumerate(), "flip": BitFlip(1)}, num_draws=40, timing_steps=1)
    assert not found.failed
    assert found["sum"].variance > 1
    assert found["sum"].variance == pytest.approx(found["flip"].variance, rel=1e-5)
    assert found["sum"].bias == pytest.approx(found["flip"].bias, rel=1e-4)


@BOTH
def test_mistakes_are_named(lib):
    with pytest.raises(EstimatorError, match="needs 2 or more"):
        gradient_report(lib.elbo(), lib.model, lib.guide, num_draws=1)
    with pytest.raises(EstimatorError, match="ELBO of neither"):
        gradient_report(object(), lib.model, lib.guide)
    with pytest.raises(EstimatorError, match="is not a name of ppl_estimators"):
        compare(lib.model, lib.guide, (), ["Disarm"], num_draws=2)
    with pytest.raises(EstimatorError, match='takes "auto"'):
        compare(lib.model, lib.guide, (), ["DisARM"], reference="best")
    with pytest.raises(EstimatorError, match=r"reference: no gradient of 'a'\. It has b"):
        compare(lib.model, lib.guide, (), ["DisARM"], num_draws=2, reference={"b": 0.0})
    sample, d, param, number = (
        (pyro.sample, pd, pyro.param, torch.tensor) if lib is PYRO else (numpyro.sample, nd, numpyro.param, jnp.asarray)
    )

    def model():
        sample("z", d.Normal(0.0, 1.0))

    def steep():  # sqrt has no slope at 0, though every log probability is finite
        sample("z", d.Normal(param("a", number(0.0)) ** 0.5, 1.0))

    stock = lib.infer.Trace_ELBO()
    with pytest.raises(EstimatorError, match="gradient of 'a' is not finite in a draw of Trace_ELBO"):
        gradient_report(stock, model, steep, num_draws=4, timing_steps=1)


def test_jax_and_torch_stay_away():
    import subprocess
    import sys

    code = "import ppl_estimators.diagnostics, sys; assert not {'torch', 'jax'} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
