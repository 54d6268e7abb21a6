"""A Pyro step on a device: no tensor of ours is made elsewhere, and nothing waits for the device but ``.item()`` of the
loss. Where there is no card the processor plays it, and torch's default is a device without data."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from pyro.optim import Adam
from torch.utils._python_dispatch import TorchDispatchMode

from ppl_estimators import (
    ARM,
    ARMS,
    ARSM,
    REBAR,
    RELAX,
    UGC,
    VIMCO,
    Antithetic,
    Average,
    BitFlip,
    Combine,
    Constant,
    CoupledImportance,
    DisARM,
    DisARMStickBreaking,
    DisARMTree,
    DoubleControlVariate,
    Enumerate,
    GumbelSoftmax,
    ImportanceSampled,
    ImportanceWeighted,
    KLAnnealed,
    Learned,
    LeaveOneOut,
    MeasureValued,
    MovingAverage,
    MuProp,
    OptimalConstant,
    Pathwise,
    Reinforce,
    RELAXWithModel,
    Renyi,
    Repeat,
    Stein,
    StickingTheLanding,
    StochasticTriple,
    StraightThrough,
    SumAndSample,
    SumAroundMode,
    UnorderedSet,
    WakeSleep,
)
from ppl_estimators.pyro import EstimatorELBO, with_estimators

HERE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
X = (torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) < 0.4).float().to(HERE)


def model(x):
    w = pyro.param("w", lambda: torch.full((3, 5), 0.3, device=HERE))
    with pyro.plate("batch", len(x), device=HERE):
        z = pyro.sample("z", dist.Bernoulli(logits=torch.zeros(3, device=HERE)).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=z @ w).to_event(1), obs=x)


def guide(x):
    v = pyro.param("v", lambda: torch.full((5, 3), 0.2, device=HERE))
    with pyro.plate("batch", len(x), device=HERE):
        pyro.sample("z", dist.Bernoulli(logits=x @ v).to_event(1))


class Reads(TorchDispatchMode):
    """Counts numbers that are read out of tensors, tensors that are made of numbers, and those that are elsewhere."""

    def __init__(self):
        super().__init__()
        self.count = self.made = self.elsewhere = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        self.made += func is torch.ops.aten.lift_fresh.default
        result = func(*args, **(kwargs or {}))
        self.elsewhere += isinstance(result, torch.Tensor) and result.device != HERE
        return result


steps = pytest.mark.parametrize(
    ("estimator", "settings"),
    [
        (DisARM(), {}),
        (Enumerate(), {}),
        (Enumerate(), {"vectorize_particles": True, "max_plate_nesting": 1}),
        (Reinforce(LeaveOneOut()), {"num_particles": 3}),
        (Reinforce(MovingAverage()), {}),
        (RELAX(), {}),
        (None, {}),
    ],
    ids=lambda x: None if isinstance(x, dict) else repr(x),
)


@steps
def test_steps_read_one_number_and_make_no_tensor_elsewhere(estimator, settings):
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    wrapped = guide if estimator is None else with_estimators(guide, {"z": estimator})
    elbo = EstimatorELBO(**settings)
    svi = SVI(model, wrapped, Adam({"lr": 0.01}), elbo)
    with pyro.validation_enabled(False):  # validation reads values
        for _ in range(3):
            svi.step(X)
        with torch.device("meta"), Reads() as reads:
            loss = elbo.loss_and_grads(model, wrapped, X)  # Adam itself reads how many steps it has made
    assert loss > 0
    assert reads.count == 1
    assert all(x.device == HERE for x in pyro.get_param_store().values())


BITS = [
    *(DisARM(), ARM(), ARMS(3), BitFlip(), BitFlip(2), UGC(), StochasticTriple(), REBAR(), RELAX(), RELAXWithModel()),
    *(MuProp(), StraightThrough(), GumbelSoftmax(), Stein(), DoubleControlVariate(), Enumerate(), Repeat(3, DisARM())),
    *(Reinforce(b) for b in (MovingAverage() + Learned(), LeaveOneOut(), OptimalConstant(), Constant(1.0))),
    *(Antithetic(Reinforce()), Average((DisARM(), Enumerate())), Combine((DisARM(), REBAR(), Reinforce()))),
    *(ImportanceSampled(Reinforce()), None),
]
LABELS = [
    *(Enumerate(), UnorderedSet(2), SumAndSample(1), DisARMStickBreaking(), DisARMTree(), CoupledImportance(), ARSM()),
    *(RELAX(), MeasureValued(), Reinforce()),
]
COUNTS = [Reinforce(), StochasticTriple(), MeasureValued(), SumAroundMode(3)]
REALS = [Pathwise(), StickingTheLanding(), MeasureValued(), Reinforce(LeaveOneOut())]
EVERY = [*((s, e) for s, several in zip("bkcy", (BITS, LABELS, COUNTS, REALS), strict=True) for e in several)]


@pytest.fixture(scope="module")
def several():
    """A bit, a label, a count and a number for each of four data."""
    zero, one, three = torch.zeros((), device=HERE), torch.ones((), device=HERE), torch.zeros(3, device=HERE)
    plate = pyro.plate("data", 4, device=HERE)

    def model(x):
        w = pyro.param("w", lambda: one.clone())
        with plate:
            b, k = pyro.sample("b", dist.Bernoulli(logits=zero)), pyro.sample("k", dist.Categorical(logits=three))
            c, y = pyro.sample("c", dist.Poisson(one)), pyro.sample("y", dist.Normal(zero, one))
            pyro.sample("x", dist.Normal(w * b + k + c + y, one), obs=x)

    def guide(x):
        a, k, c = (pyro.param(n, lambda v=v: v.clone()) for n, v in (("a", zero), ("l", three), ("r", one)))
        with plate:
            pyro.sample("b", dist.Bernoulli(logits=a))
            pyro.sample("k", dist.Categorical(logits=k))
            pyro.sample("c", dist.Poisson(c))
            pyro.sample("y", dist.Normal(a, one))

    return model, guide, torch.arange(4.0, device=HERE)


@pytest.mark.parametrize(("site", "estimator"), EVERY, ids=map(repr, EVERY))
def test_no_estimator_sends_anything_to_the_device(site, estimator, several):
    """Numbers that become tensors at every step wait for it."""
    model, guide, x = several
    if estimator is not None:
        guide = with_estimators(guide, {site: estimator, "[bkcy]": Reinforce(Constant(1.0))})
    elbo = EstimatorELBO(num_particles=3)
    with pyro.validation_enabled(False):
        for _ in range(3):
            elbo.loss_and_grads(model, guide, x)
        if HERE.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.device("meta"), Reads() as reads:
                elbo.differentiable_loss(model, guide, x).backward()
        finally:
            if HERE.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert (reads.made, reads.elsewhere) == (0, 0)


def chain(x):
    """Summed along time."""
    w, z = pyro.param("w", lambda: torch.zeros(3, 3, device=HERE)), 0
    for t in pyro.markov(range(3)):
        z = pyro.sample(f"z{t}", dist.Categorical(logits=w[z]), infer={"enumerate": "parallel"})
        pyro.sample(f"x{t}", dist.Normal(1.0 * z, x.new_ones(())), obs=x[t, 0])


SETTINGS = [
    (model, {"objective": ImportanceWeighted(), "default": Reinforce(LeaveOneOut()), "num_particles": 3}),
    (model, {"objective": Renyi(0.5), "default": Reinforce(VIMCO()), "num_particles": 3}),
    (model, {"objective": KLAnnealed(0.3), "default": DisARM()}),
    (model, {"objective": WakeSleep(), "num_particles": 3}),
    (model, {"average_model": True, "default": DisARM()}),
    (chain, {}),
]


@pytest.mark.parametrize(("model", "settings"), SETTINGS, ids=lambda x: repr(x) if isinstance(x, dict) else x.__name__)
def test_no_objective_and_no_sum_sends_anything_to_the_device(model, settings):
    within = guide if model is not chain else lambda x: None
    elbo = EstimatorELBO(**settings, verify=False)
    with pyro.validation_enabled(False):
        for _ in range(2):
            elbo.loss_and_grads(model, within, X)
        with torch.device("meta"), Reads() as reads:
            elbo.differentiable_loss(model, within, X).backward()
    assert (reads.count, reads.made, reads.elsewhere) == (0, 0, 0)


@pytest.mark.skipif(HERE.type != "cuda", reason="there is no CUDA device")
@steps
def test_a_compiled_step_waits_for_nothing(estimator, settings):
    wrapped = guide if estimator is None else with_estimators(guide, {"z": estimator})
    elbo = EstimatorELBO(**settings, compile=True)
    with pyro.validation_enabled(False):
        for _ in range(5):
            elbo.loss_and_grads(model, wrapped, X)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                loss = elbo.differentiable_loss(model, wrapped, X)
                loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert loss > 0
