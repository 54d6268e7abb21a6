"""What a user of Pyro does besides `SVI.step`: `ELBOModule` with plain torch optimisers, modules, autoguides,
`Predictive`, saving and going on, the baseline dictionary, networks of their own, double precision."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoDelta, AutoDiagonalNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.optim import Adam, ClippedAdam
from torch import nn
from torch.distributions import constraints

from ppl_estimators import (
    REBAR,
    RELAX,
    Constant,
    ControlVariate,
    DisARM,
    Enumerate,
    EstimatorError,
    Learned,
    LeaveOneOut,
    MovingAverage,
    OptimalConstant,
    PastSteps,
    Reinforce,
    RELAXWithModel,
    StickingTheLanding,
)
from ppl_estimators.pyro import EstimatorELBO, with_estimators
from ppl_estimators.testing import exact_gradient

DATA = torch.tensor([-0.9, 2.3, 0.4, 1.8, -0.2, 2.9])
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


KINDS_KEPT = (KEEPING[1], NVIL, RELAXWithModel(hidden=4))  # a coefficient, an average, parameters and networks


def slow(*values: Any) -> Any:
    """What is kept here, others keep as well."""
    return pytest.param(*values, marks=pytest.mark.slow)


#: each with and without the hook
KEPT = pytest.mark.parametrize(
    ("estimator", "hook"),
    [
        (e, hook) if e in KINDS_KEPT and (hook or e == NVIL) else slow(e, hook)
        for e in KEEPING
        for hook in (False, True)
    ],
    ids=str,
)


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    pyro.set_rng_seed(0)
    yield


def model(data: Any) -> None:
    """A level w, and for each datum a bit z that moves it."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(w + 2.0 * z, 1.0), obs=data)


def guide(data: Any) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.3))
    scale = pyro.param("scale", lambda: torch.tensor(0.7), constraint=constraints.positive)
    pyro.sample("w", dist.Normal(loc, scale))
    logits = pyro.param("logits", lambda: torch.linspace(-0.5, 0.5, len(DATA)))
    with pyro.plate("data", len(data)):
        pyro.sample("z", dist.Bernoulli(logits=logits))


def make_svi(estimators: Any, particles: int = 2, hook: bool = False, optimizer: Any = None) -> SVI:
    optimizer = optimizer or Adam({"lr": 0.02})
    options = {"num_particles": particles}
    if hook:
        return SVI(model, with_estimators(guide, estimators), optimizer, EstimatorELBO(**options))
    return SVI(model, guide, optimizer, EstimatorELBO(estimators, **options))


def snapshot() -> dict[str, torch.Tensor]:
    store = pyro.get_param_store()
    return {k: store[k].detach().clone() for k in store.keys()}


def assert_same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name].numpy(), b[name].numpy(), err_msg=name)


# ---- ELBOModule ----------------------------------------------------------------------------------------------------


class Guide(PyroModule):
    """The guide as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.3))
        self.scale = PyroParam(torch.tensor(0.7), constraint=constraints.positive)
        self.encoder = PyroModule[nn.Linear](1, 1)

    def forward(self, data: Any) -> None:
        pyro.sample("w", dist.Normal(self.loc, self.scale))
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Bernoulli(logits=self.encoder(data[:, None])[:, 0]))


class Model(PyroModule):
    """The model as a module with a learnt offset and a Bayesian one."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(2.0))
        self.w = PyroSample(dist.Normal(0.0, 1.0))

    def forward(self, data: Any) -> None:
        w = self.w
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(w + self.offset * z, 1.0), obs=data)


@pytest.mark.parametrize(
    ("estimator", "local"),
    [
        (DisARM(), False),
        (NVIL, True),
        (RELAX(hidden=4), False),
        slow(DisARM(), True),
        slow(NVIL, False),
        slow(RELAX(hidden=4), True),
    ],
    ids=str,
)
def test_an_elbo_module_with_a_plain_torch_optimiser(estimator: Any, local: bool) -> None:
    with pyro.settings.context(module_local_params=local):
        loss_fn = EstimatorELBO(num_particles=4)(Model(), with_estimators(Guide(), {"z": estimator}))
        loss_fn(DATA)  # parameters are made at the first call, as in any lazy module
        names = {name for name, _ in loss_fn.named_parameters()}
        assert {"model.offset", "guide.guide.loc", "guide.guide.scale_unconstrained"} <= names
        kept = {name: p for name, p in loss_fn.named_parameters() if "z$" in name}
        assert len(kept) == {DisARM(): 0, NVIL: 4, RELAX(hidden=4): 5}[estimator]
        before = {name: p.detach().clone() for name, p in loss_fn.named_parameters()}
        optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.04)
        losses = []
        for _ in range(125):
            optimizer.zero_grad()
            loss = loss_fn(DATA)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert np.mean(losses[-25:]) < np.mean(losses[:25]) - 0.2
        for name, p in loss_fn.named_parameters():
            assert not torch.equal(p, before[name]), name


def test_an_elbo_module_of_plain_functions() -> None:
    """Parameters of functions live in Pyro's store, as with the stock ELBOs; those of the hook are found."""
    loss_fn = EstimatorELBO(num_particles=2)(model, with_estimators(guide, {"z": NVIL}))
    loss_fn(DATA)
    optimizer = torch.optim.Adam(loss_fn.parameters(), lr=0.02)
    store = pyro.get_param_store()
    optimizer.add_param_group({"params": [store[name].unconstrained() for name in ("loc", "scale", "logits")]})
    before = snapshot()
    for _ in range(5):
        optimizer.zero_grad()
        loss_fn(DATA).backward()
        optimizer.step()
    for name, value in snapshot().items():
        assert name.endswith("started") or not torch.equal(value, before[name]), name


@pytest.mark.parametrize("estimator", [DisARM(), Reinforce(MovingAverage()), NVIL, RELAX(hidden=4)], ids=repr)
def test_the_module_and_svi_agree(estimator: Any) -> None:
    """The same gradient from `ELBOModule` and from `SVI`, both of the same seed."""
    gradients = []
    for use_module in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        modules = Model(), with_estimators(Guide(), {"z": estimator})
        elbo = EstimatorELBO(num_particles=2)
        if use_module:
            elbo(*modules)(DATA).backward()
        else:
            elbo.loss_and_grads(*modules, DATA)
        gradients.append({name: p.grad.clone() for m in modules for name, p in m.named_parameters()})
    assert_same(*gradients)


def test_the_state_dict_carries_networks_and_running_averages() -> None:
    def make() -> Any:
        pyro.set_rng_seed(0)
        return EstimatorELBO(num_particles=2)(Model(), with_estimators(Guide(), {"z": NVIL}))

    def train(loss_fn: Any, optimizer: Any, steps: int) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = loss_fn(DATA)
            loss.backward()
            optimizer.step()
        return loss.item()

    with pyro.settings.context(module_local_params=True):
        first = make()
        first(DATA)
        optimizer = torch.optim.SGD(first.parameters(), lr=1e-3)
        train(first, optimizer, 3)
        saved = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in first.state_dict().items()}
        pyro.set_rng_seed(5)
        expected = train(first, optimizer, 3)

        pyro.clear_param_store()
        second = make()
        second(DATA)
        second.load_state_dict(saved)
        pyro.set_rng_seed(5)
        assert train(second, torch.optim.SGD(second.parameters(), lr=1e-3), 3) == expected
        ours, theirs = dict(second.named_parameters()), dict(first.named_parameters())
        assert_same({k: p.detach() for k, p in ours.items()}, {k: p.detach() for k, p in theirs.items()})


# ---- SVI -----------------------------------------------------------------------------------------------------------


@KEPT
def test_evaluate_loss_is_the_loss_and_changes_nothing(estimator: Any, hook: bool) -> None:
    svi = make_svi({"z": estimator}, hook=hook)
    for _ in range(3):
        svi.step(DATA)
    before = snapshot()
    losses = [svi.evaluate_loss(DATA) for _ in range(300)]
    assert_same(snapshot(), before)
    stock = Trace_ELBO(num_particles=100_000, vectorize_particles=True, max_plate_nesting=1)
    error = np.std(losses) / np.sqrt(300)
    assert error < 0.3
    assert abs(np.mean(losses) - stock.loss(model, guide, DATA)) < 4 * error


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("estimator", KEEPING, ids=repr)
def test_everything_that_is_kept_is_updated(estimator: Any, hook: bool) -> None:
    svi = make_svi({"z": estimator}, hook=hook)
    svi.step(DATA)
    before = {k: v for k, v in snapshot().items() if k.startswith("z$")}
    assert before
    for _ in range(3):
        svi.step(DATA)
    for name, value in snapshot().items():
        if name in before and not name.endswith("started"):
            assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("particles", [1, 3])
def test_a_running_average_over_several_steps_and_particles(particles: int, vectorize: bool) -> None:
    """z is the only site, so its downstream cost is the ELBO: the average can be computed from the losses."""

    def model() -> None:
        pyro.sample("z", dist.Bernoulli(0.3))

    def guide() -> None:
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.8))))

    decay = 0.7
    elbo = EstimatorELBO(
        {"z": Reinforce(MovingAverage(decay))},
        num_particles=particles,
        vectorize_particles=vectorize,
        max_plate_nesting=0,
    )
    svi = SVI(model, guide, Adam({"lr": 0.05}), elbo)
    expected = None
    for _ in range(6):
        loss = svi.step()
        expected = -loss if expected is None else decay * expected - (1 - decay) * loss
        state = pyro.get_param_store()["z$state.mean"]
        assert state.shape == ()
        np.testing.assert_allclose(state.item(), expected, rtol=1e-5)


@KEPT
def test_a_saved_store_goes_on_bit_for_bit(estimator: Any, hook: bool, tmp_path: Any) -> None:
    first_optimizer = Adam({"lr": 0.02})
    svi = make_svi({"z": estimator}, hook=hook, optimizer=first_optimizer)
    for _ in range(3):
        svi.step(DATA)
    pyro.get_param_store().save(tmp_path / "store")
    first_optimizer.save(tmp_path / "optimizer")
    pyro.set_rng_seed(5)
    losses = [svi.step(DATA) for _ in range(3)]
    end = snapshot()

    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    second_optimizer = Adam({"lr": 0.02})
    second_optimizer.load(tmp_path / "optimizer")
    fresh = make_svi({"z": estimator}, hook=hook, optimizer=second_optimizer)
    pyro.set_rng_seed(5)
    assert [fresh.step(DATA) for _ in range(3)] == losses
    assert_same(snapshot(), end)


@pytest.mark.parametrize("estimator", [DisARM(), Enumerate(), *KEEPING], ids=repr)
def test_the_same_seed_gives_the_same_run(estimator: Any) -> None:
    runs = []
    for seed in (3, 3, 4):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        svi = make_svi({"z": estimator})
        runs.append([svi.step(DATA) for _ in range(5)])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_a_user_reading_random_numbers_is_not_disturbed_by_a_warm_elbo() -> None:
    """Evaluations at other values draw from the same noise; what a step consumes doesn't depend on the data."""
    svi = make_svi({"z": DisARM()})
    svi.step(DATA)
    followers = []
    for _ in range(2):
        pyro.set_rng_seed(8)
        svi.evaluate_loss(DATA)
        followers.append(torch.rand(()).item())
    assert followers[0] == followers[1]


# ---- prediction and autoguides -------------------------------------------------------------------------------------


def test_predictive_takes_the_wrapped_guide() -> None:
    svi = make_svi({"z": NVIL}, hook=True)
    for _ in range(5):
        svi.step(DATA)
    found = []
    for g in (guide, svi.guide):
        pyro.set_rng_seed(1)
        found.append(Predictive(g, num_samples=50)(DATA))
    for name in ("w", "z"):
        assert torch.equal(found[0][name], found[1][name])
    predictive = Predictive(model, guide=svi.guide, num_samples=50)
    assert predictive(DATA)["x"].shape == (50, len(DATA))


def regression(data: Any) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 3.0))
    noise = pyro.sample("noise", dist.HalfNormal(2.0))
    x = torch.linspace(-1.0, 1.0, len(data))
    with pyro.plate("data", len(data)):
        pyro.sample("y", dist.Normal(slope * x, noise), obs=data)


LINE = 1.5 * torch.linspace(-1.0, 1.0, 20) + 0.3 * torch.sin(torch.arange(20.0) * 5)


FOUR = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1}


def fit(guide: Any, elbo: Any, steps: int = 400) -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = SVI(regression, guide, ClippedAdam({"lr": 0.05, "lrd": 0.99}), elbo)
    for _ in range(steps):
        assert np.isfinite(svi.step(LINE))


@pytest.mark.parametrize(
    ("kind", "wrapped"),
    [(AutoNormal, True), (AutoDiagonalNormal, False), slow(AutoNormal, False), slow(AutoDiagonalNormal, True)],
)
def test_autoguides_learn_and_keep_their_attributes(kind: Any, wrapped: bool) -> None:
    stock = kind(regression)
    fit(stock, Trace_ELBO(**FOUR))
    expected = stock.median(LINE)
    guide = kind(regression)
    if wrapped:
        guide = with_estimators(guide, {"*": StickingTheLanding()})
    fit(guide, EstimatorELBO(**FOUR))
    for name, value in guide.median(LINE).items():
        np.testing.assert_allclose(value.item(), expected[name].item(), atol=0.08)
    low, high = guide.quantiles([0.05, 0.95], LINE)["slope"]
    assert low < 1.5 < high


def test_an_autoguide_by_score_function() -> None:
    """At the sites that it draws; the values of the model's own sites are functions of them."""
    guide = with_estimators(AutoNormal(regression), {"*_unconstrained": Reinforce(LeaveOneOut())})
    fit(guide, EstimatorELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1))
    np.testing.assert_allclose(guide.median(LINE)["slope"].item(), 1.5, atol=0.3)


def test_point_estimates() -> None:
    stock, ours = AutoDelta(regression), AutoDelta(regression)
    fit(stock, Trace_ELBO())
    expected = {k: v.detach().clone() for k, v in stock.median(LINE).items()}
    fit(ours, EstimatorELBO())
    for name, value in ours.median(LINE).items():
        np.testing.assert_allclose(value.item(), expected[name].item(), rtol=1e-4)


# ---- networks of the user's own ------------------------------------------------------------------------------------


def network(features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 5), nn.Tanh(), nn.Linear(5, 1))


@pytest.mark.parametrize("hook", [False, True])
@pytest.mark.parametrize("estimator", ["learned", "learned from data", "relax"])
def test_networks_are_trained_and_saved(estimator: str, hook: bool) -> None:
    mine = network(2 if estimator == "relax" else 1)
    spec = {
        "learned": Reinforce(Learned(mine)),
        "learned from data": Reinforce(Learned(mine, lambda data: data)),
        "relax": RELAX(network=mine),
    }[estimator]
    before = [p.detach().clone() for p in mine.parameters()]
    svi = make_svi({"z": spec}, hook=hook)
    for _ in range(5):
        svi.step(DATA)
    for p, start in zip(mine.parameters(), before, strict=True):
        assert not torch.equal(p, start)
    stored = [v for k, v in snapshot().items() if k.startswith("z$")]
    for p in mine.parameters():
        assert any(v.shape == p.shape and torch.equal(v, p) for v in stored)


def test_a_network_inside_the_users_module_is_not_declared_twice() -> None:
    """The baseline's network is a part of the guide: it is trained once, whoever holds it."""

    class WithBaseline(Guide):
        def __init__(self) -> None:
            super().__init__()
            self.baseline = network(1)

        def forward(self, data: Any) -> None:
            pyro.sample("w", dist.Normal(self.loc, self.scale))
            infer = {"estimator": Reinforce(Learned(self.baseline, data))}
            with pyro.plate("data", len(data)):
                pyro.sample("z", dist.Bernoulli(logits=self.encoder(data[:, None])[:, 0]), infer=infer)

    module = with_estimators(WithBaseline())
    loss_fn = EstimatorELBO(num_particles=2)(Model(), module)
    loss_fn(DATA)
    parameters = list(loss_fn.parameters())
    assert len(parameters) == len({id(p) for p in parameters})
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD(parameters, lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss_fn(DATA).backward()
        optimizer.step()
    assert all(not torch.equal(p, start) for p, start in zip(parameters, before, strict=True))


@pytest.mark.parametrize("in_dictionary", [False, True])
def test_a_network_that_the_user_registered_is_trained_once(in_dictionary: bool) -> None:
    """Under the user's own name in the store, and nowhere else."""
    ends = []
    for registered in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        mine = network(1)
        spec = {"estimator": Reinforce(Learned(mine, DATA[:, None]))}
        if in_dictionary:
            spec = {"baseline": {"nn_baseline": mine, "nn_baseline_input": DATA[:, None]}}

        def guide(data: Any, registered: bool = registered, mine: Any = mine, spec: Any = spec) -> None:
            if registered:
                pyro.module("mine", mine)
            with pyro.plate("data", len(data)):
                pyro.sample("z", dist.Bernoulli(logits=torch.full((len(data),), 0.2)), infer=spec)

        svi = SVI(bits, guide, Adam({"lr": 0.05}), EstimatorELBO())
        for _ in range(4):
            svi.step(DATA)
        ends.append({k: v.detach().clone() for k, v in mine.state_dict().items()})
        names = set(snapshot())
        assert len(names) == 4
        assert all(name.startswith("mine$$$") for name in names) is registered
    assert_same(*ends)


@pytest.mark.parametrize(
    "estimators",
    [{"z": DisARM()}, {"z": REBAR()}, {"z": RELAXWithModel()}, {"w": StickingTheLanding(), "z": NVIL}],
    ids=repr,
)
def test_modules_of_functions_are_trained_without_a_warning(estimators: Any) -> None:
    encoder, decoder = nn.Linear(1, 1), nn.Linear(1, 1)

    def model(data: Any) -> None:
        pyro.module("decoder", decoder)
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(w + decoder(z[:, None])[:, 0], 1.0), obs=data)

    def guide(data: Any) -> None:
        pyro.module("encoder", encoder)
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(0.3)), 0.5))
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Bernoulli(logits=encoder(data[:, None])[:, 0]))

    before = [p.detach().clone() for m in (encoder, decoder) for p in m.parameters()]
    svi = SVI(model, guide, Adam({"lr": 0.05}), EstimatorELBO(estimators))
    for _ in range(3):
        assert np.isfinite(svi.step(DATA))
    after = [p for m in (encoder, decoder) for p in m.parameters()]
    assert all(p.requires_grad for p in after)
    assert all(not torch.equal(p, start) for p, start in zip(after, before, strict=True))


def test_a_learned_baseline_learns_the_cost() -> None:
    """Its prediction comes close to the mean downstream cost of each datum, given the datum."""

    def model(data: Any) -> None:
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.factor("cost", -10.0 * data - z)

    def guide(data: Any) -> None:
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Bernoulli(logits=torch.full((len(data),), 0.2)))

    mine = network(1)
    elbo = EstimatorELBO({"z": Reinforce(Learned(mine, lambda data: data))}, num_particles=4)
    svi = SVI(model, guide, Adam({"lr": 0.1}), elbo)
    data = torch.linspace(-1.0, 1.0, 8)
    for _ in range(500):
        svi.step(data)
    q = torch.sigmoid(torch.tensor(0.2))
    entropy = -(q * q.log() + (1 - q) * (1 - q).log())
    expected = -10.0 * data - q + entropy - np.log(2)
    np.testing.assert_allclose(mine(data[:, None])[:, 0].detach(), expected, atol=0.7)


# ---- Pyro's baseline dictionary ------------------------------------------------------------------------------------


def bits(data: Any) -> None:
    with pyro.plate("data", len(data)):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=data)


def bits_guide(infer: Callable[[Any], Mapping[str, Any]]) -> Callable[[Any], None]:
    """A guide of the bits, with whatever ``infer`` makes of the data at their site."""

    def guide(data: Any) -> None:
        logits = pyro.param("logits", lambda: torch.linspace(-0.5, 0.5, len(DATA)))
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Bernoulli(logits=logits), infer=infer(data))

    return guide


class Squeezed(nn.Module):
    """A network in Pyro's convention: its output has the shape of the cost."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = network(1)

    def forward(self, x: Any) -> Any:
        return self.layers(x).squeeze(-1)


def train_bits(infer: Any, steps: int = 5) -> tuple[list[float], dict[str, torch.Tensor]]:
    pyro.clear_param_store()
    pyro.set_rng_seed(2)
    svi = SVI(bits, bits_guide(infer), Adam({"lr": 0.05}), EstimatorELBO())
    losses = [svi.step(DATA) for _ in range(steps)]
    return losses, {k: v for k, v in snapshot().items() if k == "logits"}


@pytest.mark.parametrize("make", [lambda: network(1), Squeezed], ids=["last axis of one", "shape of the cost"])
@pytest.mark.parametrize("averaged", [False, True])
def test_the_dictionarys_network_is_a_learned_baseline(make: Any, averaged: bool) -> None:
    runs, ends = [], []
    for as_dictionary in (True, False):
        torch.manual_seed(11)
        mine = make()
        options = {"nn_baseline": mine} | ({"use_decaying_avg_baseline": True} if averaged else {})

        def infer(data: Any, as_dictionary: bool = as_dictionary, options: Any = options, mine: Any = mine) -> Any:
            if as_dictionary:
                return {"baseline": options | {"nn_baseline_input": data[:, None]}}
            learned = Learned(mine, data[:, None])
            return {"estimator": Reinforce(MovingAverage(0.9) + learned if averaged else learned)}

        runs.append(train_bits(infer))
        ends.append({k: v.detach().clone() for k, v in mine.state_dict().items()})
    assert runs[0][0] == runs[1][0]
    assert_same(runs[0][1], runs[1][1])
    assert_same(*ends)


@pytest.mark.parametrize("beta", [None, 0.6])
def test_the_dictionarys_average_is_a_moving_average(beta: float | None) -> None:
    options = {"use_decaying_avg_baseline": True} | ({} if beta is None else {"baseline_beta": beta})
    found = train_bits(lambda data: {"baseline": options})
    expected = train_bits(lambda data: {"estimator": Reinforce(MovingAverage(beta or 0.9))})
    plain = train_bits(lambda data: {"estimator": Reinforce(Constant(0.0))})
    assert found[0] == expected[0]
    assert_same(found[1], expected[1])
    assert not torch.equal(found[1]["logits"], plain[1]["logits"])


def gradients(elbo: Any, infer: Any, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    pyro.clear_param_store()
    pyro.set_rng_seed(2)
    for p in parameters:
        p.grad = None
    elbo.loss_and_grads(bits, bits_guide(infer), DATA)
    return [pyro.param("logits").grad.clone(), *(p.grad.clone() for p in parameters)]


def test_a_network_has_the_gradients_that_the_stock_elbo_gives() -> None:
    """TraceGraph_ELBO knows these options too: same draws, same gradients of guide and network."""
    mine = Squeezed()

    def infer(data: Any) -> Any:
        return {"baseline": {"nn_baseline": mine, "nn_baseline_input": data[:, None]}}

    parameters = list(mine.parameters())
    ours = gradients(EstimatorELBO(), infer, parameters)
    stock = gradients(TraceGraph_ELBO(), infer, parameters)
    for a, b in zip(ours, stock, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b)


def test_a_value_has_the_gradients_that_the_stock_elbo_gives() -> None:
    weight = torch.tensor(0.7, requires_grad=True)

    def infer(data: Any) -> Any:
        return {"baseline": {"baseline_value": weight * data - 2.0}}

    ours = gradients(EstimatorELBO(), infer, [weight])
    stock = gradients(TraceGraph_ELBO(), infer, [weight])
    for a, b in zip(ours, stock, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b)


def test_an_empty_dictionary_asks_for_nothing() -> None:
    found = train_bits(lambda data: {"baseline": {"use_decaying_avg_baseline": False}})
    expected = train_bits(lambda data: {})
    assert found[0] == expected[0]
    assert_same(found[1], expected[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_decaying_average": True}, "unknown options .*use_decaying_average"),
        ({"nn_baseline": network(1), "baseline_value": torch.zeros(6)}, "not both"),
    ],
)
def test_a_dictionary_that_cannot_be_meant(options: Any, message: str) -> None:
    with pytest.raises(EstimatorError, match=message):
        train_bits(lambda data: {"baseline": options}, steps=1)


# ---- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [DisARM(), Enumerate(), *KEEPING], ids=repr)
@pytest.mark.parametrize("double", [False, True])
def test_single_and_double_precision(estimator: Any, double: bool) -> None:
    before, wanted = torch.get_default_dtype(), torch.float64 if double else torch.float32
    torch.set_default_dtype(wanted)
    try:
        svi = make_svi({"z": estimator})
        for _ in range(2):
            svi.step(DATA.to(wanted))
        for name, value in snapshot().items():
            assert value.dtype == wanted, name
    finally:
        torch.set_default_dtype(before)


def test_double_precision_data_under_a_single_precision_default() -> None:
    """What an estimator keeps has the precision of the site, not of the default."""
    data = DATA.double()

    def guide(data: Any) -> None:
        pyro.sample("w", dist.Normal(pyro.param("loc", torch.tensor(0.3, dtype=torch.double)), 0.7))
        logits = pyro.param("logits", torch.linspace(-0.5, 0.5, len(data), dtype=torch.double))
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    svi = SVI(model, with_estimators(guide, {"z": NVIL}), Adam({"lr": 0.02}), EstimatorELBO(num_particles=2))
    for _ in range(3):
        svi.step(data)
    for name, value in snapshot().items():
        assert value.dtype == torch.double, name


# ---- which estimator is in charge ----------------------------------------------------------------------------------

LEVELS = {"elbo": 1.0, "hook": 2.0, "infer": 3.0, "default": 4.0}


def single() -> None:
    pyro.sample("z", dist.Bernoulli(0.3))


def single_guide(infer: Any) -> Callable[[], None]:
    return lambda: pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.4))), infer=dict(infer))


def _gradient(elbo: EstimatorELBO, guide: Any) -> float:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo.loss_and_grads(single, guide)
    return pyro.param("a").grad.item()


@pytest.mark.parametrize("present", [("default",), ("default", "infer"), ("default", "infer", "hook"), tuple(LEVELS)])
def test_the_elbo_overrides_the_hook_overrides_infer_overrides_the_default(present: tuple[str, ...]) -> None:
    """Baselines that differ by level give gradients that do."""
    spec = {level: Reinforce(Constant(value)) for level, value in LEVELS.items()}
    guide = single_guide({"estimator": spec["infer"]} if "infer" in present else {})
    hooked = with_estimators(guide, {"z": spec["hook"]}) if "hook" in present else guide
    elbo = EstimatorELBO({"z": spec["elbo"]} if "elbo" in present else None, default=spec["default"])
    expected = {level: _gradient(EstimatorELBO({"z": s}), single_guide({})) for level, s in spec.items()}
    assert len(set(expected.values())) == len(LEVELS)
    strongest = next(level for level in LEVELS if level in present)
    assert _gradient(elbo, hooked) == expected[strongest]


def test_the_hook_overrides_pyros_dictionary_overrides_the_default() -> None:
    value = torch.tensor(3.0)
    guide = single_guide({"baseline": {"baseline_value": value}})
    default = EstimatorELBO(default=Reinforce(Constant(4.0)))
    three = _gradient(EstimatorELBO({"z": Reinforce(Constant(3.0))}), single_guide({}))
    two = _gradient(EstimatorELBO({"z": Reinforce(Constant(2.0))}), single_guide({}))
    assert _gradient(default, guide) == pytest.approx(three)
    assert _gradient(default, with_estimators(guide, {"z": Reinforce(Constant(2.0))})) == two


def test_globs_and_exact_names_in_one_mapping() -> None:
    names = ("z_0", "z_1", "w")

    def model() -> None:
        for name in names:
            pyro.sample(name, dist.Bernoulli(0.3))

    def guide() -> None:
        for name in names:
            pyro.sample(name, dist.Bernoulli(logits=pyro.param(f"a_{name}", torch.tensor(0.4))))

    def gradients(estimators: Mapping[str, Any]) -> dict[str, float]:
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        EstimatorELBO(estimators).loss_and_grads(model, guide)
        return {name: pyro.param(f"a_{name}").grad.item() for name in names}

    one, two, three = (Reinforce(Constant(value)) for value in (1.0, 2.0, 3.0))
    mixed = gradients({"z_*": one, "z_1": two, "*": three})
    assert mixed == gradients({"z_0": one, "z_1": two, "w": three})
    assert mixed != gradients({"z_*": one, "w": three})


def test_a_function_with_a_known_mean_keeps_its_moments() -> None:
    spec = ControlVariate(lambda z: 1.0 * z, lambda q: q.mean, PastSteps(0.9), baseline=MovingAverage())
    svi = make_svi({"z": spec})
    for _ in range(20):
        assert np.isfinite(svi.step(DATA))
    kept = {k for k in snapshot() if k.startswith("z$")}
    assert kept == {f"z$state.{k}" for k in ("weight", "f", "h", "fh", "hh", "mean", "started")}


@pytest.mark.parametrize("compile", [False, True])
def test_an_elbo_can_be_copied_and_pickled_as_stock_ones_can(compile: bool) -> None:
    elbo = EstimatorELBO({"z": Reinforce(MovingAverage())}, compile=compile)
    svi = SVI(model, guide, Adam({"lr": 0.01}), elbo)
    for _ in range(4):  # it has plans, and notes
        svi.step(DATA)
    twins = [pickle.loads(pickle.dumps(elbo)), copy.deepcopy(svi).loss_and_grads.__self__]
    losses = []
    for one in (elbo, *twins):
        pyro.set_rng_seed(1)
        losses.append(one.loss(model, guide, DATA))
    assert losses == losses[:1] * 3
    assert all(one.memory is not elbo.memory and one.settings == elbo.settings for one in twins)


@pytest.mark.parametrize("options", [{}, {"max_plate_nesting": 1}])
def test_the_number_of_particles_may_change_between_steps(options: Any) -> None:
    """Enumerated, the gradient has no noise. As many particles as data, too: an axis in a wrong place would fit."""

    def bits(data: Any) -> None:
        with pyro.plate("data", len(data)):
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=data)

    def drawn(data: Any) -> None:
        a = pyro.param("a", torch.tensor(0.4))
        with pyro.plate("data", len(data)):
            pyro.sample("z", dist.Bernoulli(logits=a * data))

    pyro.clear_param_store()
    data = DATA[:2]
    elbo = EstimatorELBO({"z": Enumerate()}, vectorize_particles=True, **options)
    wanted = exact_gradient(bits, drawn, data).gradient["a"]
    for elbo.num_particles in (1, 2, 1, 3):
        pyro.param("a", torch.tensor(0.4)).grad = None
        elbo.loss_and_grads(bits, drawn, data)
        np.testing.assert_allclose(pyro.param("a").grad, wanted, rtol=1e-4)
        assert elbo.max_plate_nesting == 1 + (elbo.num_particles > 1)
