"""Compiled steps in Pyro do what uncompiled ones do, to the last bit; what cannot be compiled says so."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import random
import types
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, autoguide
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.optim import SGD, Adam
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from ppl_estimators import (
    REBAR,
    RELAX,
    DisARM,
    EstimatorWarning,
    ImportanceWeighted,
    Learned,
    LeaveOneOut,
    MovingAverage,
    MuProp,
    Reinforce,
    StickingTheLanding,
)
from ppl_estimators.pyro import EstimatorELBO, JitEstimatorELBO, tape, with_estimators

Program = Callable[..., Any]


def data(seed: int, n: int = 6) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(n, 3, generator=generator, device="cpu").to(torch.get_default_device())


class Deep(torch.nn.Module):
    """Two layers of bits under a pathwise site; dropout and batch normalisation, a minibatch."""

    def __init__(self, batch: int = 4) -> None:
        super().__init__()
        self.batch = batch
        self.encoder = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.3))
        self.down = torch.nn.Linear(4, 2)
        self.decoder = torch.nn.Linear(4, 3)

    def model(self, x: torch.Tensor) -> None:
        pyro.module("deep", self)
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=self.batch) as i:
            b = pyro.sample("b", dist.Bernoulli(logits=torch.full((2,), -0.4)).to_event(1))
            a = pyro.sample(
                "a", dist.Bernoulli(logits=b.sum(-1, keepdim=True) + w[..., None] - torch.ones(4)).to_event(1)
            )
            pyro.sample("x", dist.Normal(self.decoder(a), scale).to_event(1), obs=x[i])

    def guide(self, x: torch.Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.3))
        pyro.sample("w", dist.Normal(loc, 0.5))
        with pyro.plate("data", len(x), subsample_size=self.batch) as i:
            h = self.encoder(x[i])
            a = pyro.sample("a", dist.Bernoulli(logits=h).to_event(1))
            pyro.sample("b", dist.Bernoulli(logits=self.down(a)).to_event(1))


def train(
    make: Callable[[], tuple[Program, Program]], elbo: EstimatorELBO, batches: list[Any], lr: float = 0.05
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and the parameters and buffers at the end."""
    pyro.clear_param_store()
    torch.manual_seed(1)
    random.seed(1)
    model, guide = make()
    svi = SVI(model, guide, Adam({"lr": lr}), elbo)
    losses = [svi.step(*(b if isinstance(b, tuple) else (b,))) for b in batches]
    held = {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}
    owner = getattr(model, "__self__", None)
    if isinstance(owner, torch.nn.Module):
        held |= {n: b.clone() for n, b in owner.named_buffers()}
    held["random state"] = (
        torch.cuda.get_rng_state() if torch.get_default_device().type == "cuda" else torch.get_rng_state()
    )
    return losses, held


def uses(elbo: EstimatorELBO) -> list[int]:
    """How often each tape has run."""
    return [s.uses for s in elbo.compiler._known.values() if s.noted is not None]


def same(make: Callable[[], tuple[Program, Program]], batches: list[Any], *args: Any, **kwargs: Any) -> EstimatorELBO:
    """Compiled and uncompiled: the same losses, parameters and random numbers; returns the compiled one."""
    compiled = EstimatorELBO(*args, **kwargs, compile=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "site", EstimatorWarning)
        plain = train(make, EstimatorELBO(*args, **kwargs), batches)
        found = train(make, compiled, batches)
    assert found[0] == plain[0]
    assert found[1].keys() == plain[1].keys()
    for name, value in plain[1].items():
        assert torch.equal(found[1][name], value), name
    return compiled


def deep() -> tuple[Program, Program]:
    net = Deep()
    return net.model, net.guide


SPECS: dict[str, tuple[Any, dict[str, Any]]] = {
    "auto": (None, {}),
    "state": ({"[ab]": Reinforce(MovingAverage())}, {}),
    "networks": ({"a": Reinforce(Learned()), "b": Reinforce(MovingAverage() + Learned())}, {}),
    "particles": ({"[ab]": Reinforce(LeaveOneOut())}, {"num_particles": 3}),
    "vectorised": ({"[ab]": DisARM()}, {"num_particles": 2, "vectorize_particles": True, "max_plate_nesting": 1}),
    "side by side": ({"[ab]": DisARM()}, {"vectorize_particles": True, "max_plate_nesting": 1}),
    "pairs": ({"[ab]": DisARM(), "w": StickingTheLanding()}, {}),
    "relaxed": ({"[ab]": REBAR()}, {}),
    "control": ({"a": RELAX(), "b": MuProp()}, {}),
    "model averaged": ({"[ab]": DisARM()}, {"average_model": True}),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_compiled_step_is_the_same_step(name):
    estimators, settings = SPECS[name]
    elbo = same(deep, [data(i) for i in range(5)], estimators, **settings, verify=False)
    assert uses(elbo) == [3]  # after one that ran as ever, and one that was noted


def test_a_bound_of_several_particles():
    def make() -> tuple[Program, Program]:
        net = Deep(batch=6)
        return net.model, net.guide

    specs = {"[ab]": Reinforce(LeaveOneOut())}
    elbo = same(make, [data(i) for i in range(5)], specs, num_particles=3, objective=ImportanceWeighted(), verify=False)
    assert uses(elbo) == [3]


# ---- arguments, parameters, what a program reads ---------------------------------------------------------------------


def bits(x: torch.Tensor, weight: Any = 1.0) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3)))
        pyro.sample("x", dist.Normal(z * weight, 1.0), obs=x)


def bits_guide(x: torch.Tensor, weight: Any = 1.0) -> None:
    a = pyro.param("a", torch.tensor(0.2))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=a * x))


def flat(*sizes: int) -> list[torch.Tensor]:
    return [data(i, n)[:, 0].contiguous() for i, n in enumerate(sizes)]


def test_shapes_and_numbers_choose_the_tape_and_tensors_are_inputs():
    batches: list[Any] = [(x, w) for x in flat(4, 4, 4, 4) for w in (1.0, 2.0)]
    batches += [(x, torch.tensor(w)) for x, w in zip(flat(5, 5, 5), (1.0, 2.0, 3.0), strict=True)]
    elbo = same(lambda: (bits, bits_guide), batches, default=DisARM())
    assert uses(elbo) == [2, 2, 1]


def test_tapes_are_bounded_in_number():
    elbo = EstimatorELBO(default=DisARM(), compile=True)
    train(lambda: (bits, bits_guide), elbo, [x for n in range(2, 22) for x in flat(n, n)])
    assert 10 < len(uses(elbo)) <= 16


def test_draws_are_fresh_and_follow_the_seed():
    x, elbo = flat(200)[0], EstimatorELBO(default=DisARM(), compile=True)
    svi = SVI(bits, bits_guide, Adam({"lr": 0.0}), elbo)
    for _ in range(3):
        svi.step(x)
    pyro.set_rng_seed(5)
    first = [svi.step(x) for _ in range(4)]
    pyro.set_rng_seed(5)
    assert [svi.step(x) for _ in range(4)] == first
    assert len(set(first)) == 4


def test_an_autoguide_and_its_parameters():
    def make() -> tuple[Program, Program]:
        def model(x: torch.Tensor) -> None:
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(pyro.sample("m", dist.Normal(0.0, 1.0)), scale), obs=x)

        return model, AutoNormal(model)

    assert uses(same(make, flat(5, 5, 5, 5))) == [2]


AUTOGUIDES = (
    autoguide.AutoDelta, autoguide.AutoDiagonalNormal, autoguide.AutoMultivariateNormal,
    autoguide.AutoLowRankMultivariateNormal, autoguide.AutoIAFNormal, autoguide.AutoHierarchicalNormalMessenger,
)  # fmt: skip


@pytest.mark.parametrize("make_guide", AUTOGUIDES, ids=lambda kind: kind.__name__)
def test_autoguides(make_guide):
    def make() -> tuple[Program, Program]:
        def model(x: torch.Tensor) -> None:
            scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
            w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
            with pyro.plate("data", len(x)):
                pyro.sample("x", dist.Normal(pyro.sample("m", dist.Normal(w[0], 1.0)), scale), obs=x)

        return model, make_guide(model)

    assert uses(same(make, flat(5, 5, 5, 5, 5), verify=False))[-1] > 0


def test_a_module_with_samples_of_its_own():
    class Regression(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.linear = PyroModule[torch.nn.Linear](3, 1)
            self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 3]).to_event(2))
            self.noise = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

        def forward(self, x: torch.Tensor) -> None:
            mean = self.linear(x)[:, 0] + pyro.sample("z", dist.Bernoulli(0.3))
            with pyro.plate("data", len(x)):
                pyro.sample("y", dist.Normal(mean, self.noise), obs=x.sum(-1))

    def make() -> tuple[Program, Program]:
        def of_z(x: torch.Tensor) -> None:
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))

        model = Regression()
        guide = autoguide.AutoGuideList(model)
        guide.append(AutoNormal(pyro.poutine.block(model, hide=["z"])))
        guide.append(of_z)
        return model, guide

    assert uses(same(make, [data(i) for i in range(5)], {"z": DisARM()}, verify=False))[-1] > 0


def test_sums_beside_draws():
    """Along time, and of a site that the guide draws beside."""

    def model(x: torch.Tensor) -> None:
        w, k = pyro.param("w", torch.eye(2)), 0
        b = pyro.sample("b", dist.Bernoulli(0.4))
        for t in pyro.markov(range(len(x))):
            k = pyro.sample(f"k_{t}", dist.Categorical(logits=w[k]), infer={"enumerate": "parallel"})
            pyro.sample(f"x_{t}", dist.Normal(1.0 * k + b, 1.0), obs=x[t])

    def guide(x: torch.Tensor) -> None:
        pyro.sample("b", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.2))))

    elbo = same(lambda: (model, guide), flat(4, 4, 4, 4, 4), {"b": Reinforce(MovingAverage())}, verify=False)
    assert uses(elbo) == [3]


@pytest.mark.parametrize("when", [1, 2, 4])
@pytest.mark.parametrize("lazy", [True, False])
def test_a_parameter_that_a_noted_step_makes_has_its_gradient(lazy, when):
    """A lazy one, or all of them after the store was cleared."""
    late = torch.zeros((), dtype=torch.bool)

    def model() -> None:
        pyro.sample("x", dist.Normal(2 * pyro.sample("z", dist.Bernoulli(0.3)), 1.0), obs=torch.tensor(1.1))

    def guide() -> None:
        logits = pyro.param("a", torch.tensor(0.4))
        if late:
            logits = logits + pyro.param("b", torch.tensor(0.1))
        pyro.sample("z", dist.Bernoulli(logits=logits))

    def slopes(**settings: Any) -> list[dict[str, float]]:
        pyro.clear_param_store()
        late.fill_(False)
        elbo, found = EstimatorELBO(**settings), []
        for i in range(6):
            if i == when and lazy:
                late.fill_(True)
            elif i == when:
                pyro.clear_param_store()
            elbo.loss_and_grads(model, guide)
            parameters = dict(pyro.get_param_store().named_parameters())
            found.append({n: p.grad.item() for n, p in parameters.items()})
            for p in parameters.values():
                p.grad = None
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a program that decides by what changes is not compiled
        noted = slopes(compile=True)
    for ours, as_ever in zip(noted, slopes(), strict=True):
        assert ours == pytest.approx(as_ever, rel=1e-5)


def test_a_loop_over_many_sites():
    """Costs of many sites are credited by a matrix, which the plan keeps; a[0], a[1], ... are differentiated as one."""

    def model(x: torch.Tensor) -> None:
        z = torch.tensor(0.0)
        for t in range(len(x)):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(logits=2 * z - 1))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[t])

    def guide(x: torch.Tensor) -> None:
        a = pyro.param("a", torch.linspace(-1, 1, len(x)))
        z = torch.tensor(0.0)
        for t in range(len(x)):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(logits=a[t] + z))

    elbo = same(lambda: (model, guide), flat(12, 12, 12, 12), default=Reinforce(MovingAverage()), verify=False)
    assert uses(elbo) == [2]
    (steps,) = elbo.compiler._known.values()
    assert "select_backward" not in str(steps.noted.program.calls)


def test_what_is_written_into_constants_is_no_constant():
    """`one_hot` and others make zeros and write into them."""

    def model(x: torch.Tensor) -> None:
        table = torch.zeros(len(x), 3)
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
            table[:, 1:] = k[..., 1:]
            pyro.sample("x", dist.Normal(table @ torch.tensor([0.0, 1.0, -2.0]), 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        a = pyro.param("a", torch.tensor([0.3, -0.2, 0.1]))
        with pyro.plate("data", len(x)):
            pyro.sample("k", dist.OneHotCategorical(logits=a * x[:, None]))

    assert uses(
        same(lambda: (model, guide), flat(5, 5, 5, 5, 5), default=Reinforce(LeaveOneOut()), num_particles=2)
    ) == [3]


@pytest.mark.parametrize("retain", [False, True])
def test_an_elbo_module_and_a_loop_of_torch(retain):
    """The loss leads to the parameters, whatever the rest of the loop does with it; hooks see the gradient."""
    found = []
    for compile in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(3)
        net, seen = Deep(), []
        guide = with_estimators(net.guide, {"[ab]": Reinforce(Learned())})
        loss = EstimatorELBO(compile=compile, verify=False, retain_graph=retain)(net.model, guide)
        loss(data(0))
        optim = torch.optim.SGD(loss.parameters(), lr=0.05)
        net.decoder.bias.register_hook(lambda g, seen=seen: seen.append(g.clone()))
        for i in range(4):
            optim.zero_grad()
            (2 * loss(data(i)) + net.decoder.bias.sum()).backward()
            optim.step()
        found.append([torch.cat([p.detach().reshape(-1) for p in loss.parameters()]), *seen])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---- nothing stale ---------------------------------------------------------------------------------------------------

OFFSET = torch.tensor(0.5)
WEIGHT = 1.0
COUNTS = [0]


def reading(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(logits=OFFSET))
        pyro.sample("x", dist.Normal(WEIGHT * z, 1.0), obs=x)


def moves(change: Callable[[SVI, Deep], None], make: Callable[[Deep], tuple[Program, Program]]) -> None:
    """After a change in the middle, compiled steps are those of the changed program."""

    found = []
    for compile in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(2)
        net = Deep()
        elbo = EstimatorELBO(default=Reinforce(MovingAverage()), compile=compile, verify=False)
        svi = SVI(*make(net), SGD({"lr": 0.01}), elbo)
        batches = [data(i) for i in range(10)] if make is deep_of else flat(*[5] * 10)
        losses = [svi.step(x) for x in batches[:4]]
        if compile:
            assert uses(elbo) == [2]
        change(svi, net)
        torch.manual_seed(4)
        if net.decoder.weight.dtype == torch.float64:
            batches = [x.double() for x in batches]
        losses += [svi.step(x) for x in batches[4:]]
        if compile:
            assert max(uses(elbo)) >= 2  # again
        found.append(losses)
    assert found[0] == found[1]


def deep_of(net: Deep) -> tuple[Program, Program]:
    return net.model, net.guide


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store because requires_grad:UserWarning")
@pytest.mark.parametrize("what", ["eval", "frozen", "double", "loaded", "cleared", "batch", "dropout", "replaced"])
def test_a_module_or_a_parameter_is_changed(what):
    def change(svi: SVI, net: Deep) -> None:
        if what == "eval":
            net.eval()
        elif what == "frozen":
            net.encoder.requires_grad_(False)
        elif what == "double":
            net.double()
        elif what == "loaded":
            net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()})
        elif what == "cleared":
            pyro.clear_param_store()
        elif what == "batch":
            net.batch = 3
        elif what == "dropout":
            net.encoder[2].p = 0.9
        elif what == "replaced":
            net.down.weight = torch.nn.Parameter(torch.ones(2, 4))

    moves(change, deep_of)


@pytest.mark.parametrize("what", ["in place", "tensor", "number"])
def test_a_global_is_changed(what, monkeypatch):
    def make(net: Deep) -> tuple[Program, Program]:
        monkeypatch.setattr(f"{__name__}.OFFSET", torch.tensor(0.5))
        monkeypatch.setattr(f"{__name__}.WEIGHT", 1.0)
        return reading, bits_guide

    def change(svi: SVI, net: Deep) -> None:
        if what == "in place":
            OFFSET.mul_(-2)
        elif what == "tensor":
            monkeypatch.setattr(f"{__name__}.OFFSET", OFFSET + 2)
        else:
            monkeypatch.setattr(f"{__name__}.WEIGHT", WEIGHT + 3.0)

    moves(change, make)


def test_a_tensor_that_is_an_argument_and_a_global_too(monkeypatch):
    """Another argument does not change the global."""
    monkeypatch.setattr(f"{__name__}.OFFSET", torch.linspace(-1, 1, 5))
    assert uses(same(lambda: (reading, bits_guide), [OFFSET, OFFSET, OFFSET, *flat(5, 5)], default=DisARM())) == [3]


CONFIG = types.ModuleType("settings")
CONFIG.sub = types.ModuleType("settings.sub")


@dataclasses.dataclass(slots=True)
class Slotted:
    weight: float = 1.0


class Scaled:
    weight = 1.0

    def scale(self) -> float:
        return self.weight


def kept_in_a_cache(box: list[float]) -> Callable[[], float]:
    return functools.lru_cache(lambda: box[0])


#: what a program may read a number from, and a change of it
HOLDERS: dict[str, Callable[[], tuple[Callable[[], Any], Callable[[], None]]]] = {}


def holder(make: Callable[[], tuple[Callable[[], Any], Callable[[], None]]]) -> None:
    HOLDERS[make.__name__] = make


@holder
def arguments_of_a_script():
    options = argparse.Namespace(weight=1.0)
    return lambda: options.weight, lambda: setattr(options, "weight", 2.0)


@holder
def an_attribute_in_a_slot():
    thing = Slotted()
    return lambda: thing.weight, lambda: setattr(thing, "weight", 2.0)


@holder
def a_set_of_the_same_size():
    numbers = {1, 2}
    return lambda: sum(numbers), lambda: (numbers.remove(1), numbers.add(5))


@holder
def an_array_of_numpy():
    array = np.ones(3)
    return lambda: float(array.sum()), lambda: array.fill(2.0)


@holder
def a_long_list():
    numbers = [1.0] * 500
    return lambda: numbers[7], lambda: numbers.__setitem__(7, 2.0)


@holder
def a_large_dictionary():
    numbers = dict.fromkeys(range(500), 1.0)
    return lambda: numbers[7], lambda: numbers.__setitem__(7, 2.0)


@holder
def a_module_in_a_module():
    CONFIG.sub.weight = 1.0
    return lambda: CONFIG.sub.weight, lambda: setattr(CONFIG.sub, "weight", 2.0)


@holder
def what_a_cached_function_reads():
    box = [1.0]
    cached = kept_in_a_cache(box)
    return cached, lambda: (box.__setitem__(0, 2.0), cached.cache_clear())


@holder
def a_method_of_one_object():
    thing = Scaled()
    return lambda: thing.scale(), lambda: setattr(thing, "scale", lambda: 2.0)


@holder
def the_parent_behind_a_weak_reference():
    thing = Scaled()
    link = weakref.ref(thing)
    return lambda: link().weight, lambda: setattr(thing, "weight", 2.0)


@pytest.mark.parametrize("what", HOLDERS)
def test_a_number_is_changed_wherever_it_is(what):
    found = []
    for compile in (False, True):
        read, change = HOLDERS[what]()

        def model(x: torch.Tensor, read: Callable[[], Any] = read) -> None:
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3)))
                pyro.sample("x", dist.Normal(read() * z, 1.0), obs=x)

        pyro.clear_param_store()
        torch.manual_seed(2)
        elbo = EstimatorELBO(default=Reinforce(MovingAverage()), compile=compile, verify=False)
        svi, batches = SVI(model, bits_guide, SGD({"lr": 0.01}), elbo), flat(*[5] * 8)
        losses = [svi.step(x) for x in batches[:4]]
        change()
        losses += [svi.step(x) for x in batches[4:]]
        found.append(losses)
    assert found[0] == found[1]
    assert uses(elbo) == [2]  # again


class Layer(torch.nn.Module):
    """Something between a bit and the data."""

    def __init__(self, inner: torch.nn.Module, call: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.call = inner, call
        self.register_buffer("count", torch.tensor(0.0))

    def model(self, x: torch.Tensor) -> None:
        pyro.module("layer", self)
        self.count += 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3)))
            loc = self.call(self.inner, x) + z[..., None] * self.count.rsqrt()
            pyro.sample("x", dist.MultivariateNormal(loc, covariance_matrix=torch.eye(3) + 0.1), obs=x)

    def guide(self, x: torch.Tensor) -> None:
        a = pyro.param("a", torch.tensor([0.2, -0.1, 0.3]))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=x @ a))


def each_slope(inner: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.func.vmap(torch.func.grad(lambda row: inner(row).tanh().sum()))(x)


LAYERS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[Any, torch.Tensor], torch.Tensor]]] = {
    "lstm": (lambda: torch.nn.LSTM(3, 3, 2, dropout=0.3, batch_first=True), lambda net, x: net(x[None])[0][0]),
    "each slope": (lambda: torch.nn.Linear(3, 3), each_slope),
    "table": (lambda: torch.nn.Embedding(9, 3, max_norm=1.0), lambda net, x: net(x[:, 0].abs().long())),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    make, call = LAYERS[name]

    def program() -> tuple[Program, Program]:
        net = Layer(make(), call)
        return net.model, net.guide

    elbo = same(program, [data(i) for i in range(6)], default=Reinforce(MovingAverage()), verify=False)
    assert uses(elbo) == [4]


class Doubled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return 2 * found if func is torch.nn.functional.linear else found


def linear(net: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return net(x).float()


@pytest.mark.parametrize(
    "what", ["hook", "hook of all", "mode", "autocast", "sparse", "side by side", "one argument in two places"]
)
def test_steps_around_a_layer(what):
    """From the fifth on they are others."""

    class Batch(dict):
        pass

    found = []
    for compile in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(3)
        if what == "sparse":
            net = Layer(torch.nn.Embedding(9, 3, sparse=True), lambda inner, x: inner(x[:, 0].abs().long()))
        else:
            net = Layer(torch.nn.Linear(3, 3), linear)
        spec, settings = Reinforce(MovingAverage()), dict[str, Any]()
        if what == "side by side":
            settings = {"num_particles": 2, "max_plate_nesting": 1}
        elbo = EstimatorELBO(default=spec, compile=compile, verify=False, **settings)
        model, guide = net.model, net.guide
        if what.startswith("one"):
            model = lambda b, net=net: net.model(b["x"] + b["y"])  # noqa: E731
            guide = lambda b, net=net: net.guide(b["x"] - b["y"])  # noqa: E731
        svi, losses, gradients = SVI(model, guide, SGD({"lr": 0.01}), elbo), [], []
        net.inner.weight.register_hook(lambda g, seen=gradients: seen.append(g.to_dense()))
        for i in range(9):
            x: Any = data(i)
            if what == "hook" and i == 5:
                net.inner.register_forward_hook(lambda module, given, found: 2 * found)
            if what == "side by side" and i == 5:
                elbo.vectorize_particles = True
            if what.startswith("one"):
                x = Batch(x=x, y=x if i < 5 else data(i + 20))
            if what == "hook of all" and i == 5:
                handle = torch.nn.modules.module.register_module_forward_hook(lambda module, given, found: 2 * found)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=what == "autocast" and i % 4 > 0):
                with Doubled() if what == "mode" and i > 4 else nullcontext():
                    losses.append(svi.step(x))
        if what == "hook of all":
            handle.remove()
        found.append((losses, gradients))
    assert found[0][0] == found[1][0]
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.equal(a, b)
    assert sum(uses(elbo)) >= 2


def test_what_a_program_writes_into_its_argument_is_written_once():
    def guide(x: torch.Tensor) -> None:
        bits_guide(x.mul_(0.5))

    found = []
    for compile in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        batches = [x.clone() for x in flat(*[5] * 6)]
        elbo = EstimatorELBO(default=Reinforce(MovingAverage()), compile=compile, verify=False)
        svi = SVI(bits, guide, SGD({"lr": 0.01}), elbo)
        found.append(([svi.step(x) for x in batches], torch.stack(batches)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert uses(elbo) == [4]


def test_notes_that_fail_leave_nothing_written(monkeypatch):
    """An operation may do without gradients what it does not with them; that step, and later ones, run as ever."""
    binding = tape._binding

    def failing(func: Any) -> Any:
        return (lambda *_: 1 / 0) if "rsqrt" in func._schema.name else binding(func)

    monkeypatch.setattr(tape, "_binding", failing)

    def program() -> tuple[Program, Program]:
        net = Layer(torch.nn.Linear(3, 3), linear)
        return net.model, net.guide

    with pytest.warns(EstimatorWarning, match="raises ZeroDivisionError when it is run"):
        elbo = same(program, [data(i) for i in range(6)], default=Reinforce(MovingAverage()), verify=False)
    assert uses(elbo) == []


# ---- what cannot be compiled -----------------------------------------------------------------------------------------


class Counting:
    def __init__(self) -> None:
        self.calls = 0


COUNTING = Counting()
NUMBERS = iter(range(10**6))


def branching(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return z if x.sum() > 0 else 1 - z


def masked(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return z + x[x > 0].sum()


def outside(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return z + torch.from_numpy(np.cumsum(x.numpy()))


def listed(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return z + torch.tensor(x.tolist())


def counted(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    COUNTING.calls += 1
    return z


PAIRS = {"pair": (0, torch.zeros(2))}


def put_away(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    PAIRS["pair"] = 0, torch.ones(2)
    return z


def iterated(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return z + next(NUMBERS)


def crept(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return z + 1e-6 * next(NUMBERS)


PLACES = torch.tensor([2])


def split(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return torch.cat([part - part.mean() for part in torch.tensor_split(z, PLACES)])


def slid(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return z + x.as_strided((5,), (1,), x.storage_offset())


HEARD: list[torch.Tensor] = []
LOUD = torch.nn.Identity()
LOUD.register_forward_hook(lambda module, given, found: HEARD.append(found.sum()))


def recorded(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return LOUD(z)


WIDTH = torch.nn.Parameter(torch.tensor(0.5))


def run_again(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda x: x * WIDTH, x.clone().requires_grad_(), use_reentrant=True)


def pythons_draw(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return z + random.random()


GENERATOR = torch.Generator()


def drawn_in_a_loop(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return z + dist.VonMises(0.0, 1.0).sample()


def its_own_draw(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return z + torch.rand((), generator=GENERATOR)


def traced(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return torch.jit.trace(lambda z: 2.0 * z, (z,))(z)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (branching, "reads a number out of a tensor at .*return z if x.sum"),
        (masked, "shape depends on data at .*return z . x.x > 0"),
        (outside, "hands the data of a tensor to other code at .*np.cumsum"),
        (listed, "hands the data of a tensor to other code at .*tolist"),
        (counted, "changes 'calls' when it runs"),
        (put_away, "changes 'pair' when it runs"),
        (iterated, "not what a later step does"),
        (crept, "not what a later step does"),
        (split, "hands the data of a tensor to other code at .*tensor_split"),
        (slid, "a place in the memory of an argument at .*as_strided"),
        (recorded, "changes a list when it runs"),
        (run_again, "use_reentrant=True"),
        (pythons_draw, "a random generator that is not torch's own"),
        (its_own_draw, "generator"),
        (drawn_in_a_loop, "reads a number out of a tensor at .*VonMises"),
        (traced, "raises RuntimeError while its operations are noted"),
    ],
)
def test_what_cannot_be_compiled_runs_as_ever_and_says_why_once(change, said):
    """One evaluation a step: nothing else asks for the same program twice."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3)))
            pyro.sample("x", dist.Normal(change(x, z), 1.0), obs=x)

    found = []
    for compile in (False, True):
        global NUMBERS
        NUMBERS = iter(range(10**6))
        GENERATOR.manual_seed(0)
        elbo = EstimatorELBO(default=Reinforce(MovingAverage()), compile=compile, verify=False)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(train(lambda: (model, bits_guide), elbo, flat(*[5] * 6))[0])
    assert found[0] == found[1]
    messages = [str(w.message) for w in caught if "EstimatorELBO(compile" in str(w.message)]
    assert len(messages) == 1
    with pytest.raises(EstimatorWarning, match=said):
        raise caught[[str(w.message) for w in caught].index(messages[0])].message
    assert uses(elbo) == []


def test_a_cost_that_is_not_finite_is_named_and_an_error_of_validation_raised():
    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.3)))
            pyro.sample("x", dist.Normal(z, OFFSET), obs=x)

    x, elbo = flat(5)[0], EstimatorELBO(default=Reinforce(MovingAverage()), compile=True)
    svi = SVI(model, bits_guide, SGD({"lr": 1e-6}), elbo)
    before = OFFSET.clone()
    try:
        for _ in range(4):
            svi.step(x)
        average = pyro.get_param_store()["z$state.mean"].clone()
        with pytest.warns(EstimatorWarning, match=r"site 'x' \(log p\).*: the cost is not finite"):
            svi.step(x * float("inf"))
        assert torch.equal(pyro.get_param_store()["z$state.mean"], average)
        with pytest.raises(ValueError, match=r"Expected parameter (logits|probs)"):
            svi.step(x)  # with parameters that are not numbers
        pyro.get_param_store()["a"].data.fill_(0.2)
        OFFSET.fill_(-1.0)
        with pytest.raises(ValueError, match="Expected parameter scale"):
            svi.step(x)
    finally:
        OFFSET.copy_(before)
    assert uses(elbo) == [4]


def test_handlers_around_a_step_are_heard():
    x = flat(5)[0]
    found = []
    for compile in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        svi = SVI(bits, bits_guide, SGD({"lr": 1e-3}), EstimatorELBO(default=DisARM(), compile=compile))
        losses = [svi.step(x) for _ in range(4)]
        with pyro.poutine.scale(scale=0.1):
            losses.append(svi.step(x))
        found.append(losses)
    assert found[0] == found[1]
    assert found[0][-1] < found[0][0] / 2


def test_arguments_get_their_gradient():
    """Features of a network outside of the program."""
    found = []
    for compile in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        x, elbo = flat(5)[0], EstimatorELBO(default=DisARM(), compile=compile)
        for _ in range(4):
            features = x.clone().requires_grad_()
            elbo.differentiable_loss(bits, bits_guide, features).backward()
            found.append(features.grad)
    for a, b in zip(found[:4], found[4:], strict=True):
        assert a.abs().sum() > 0
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_numbers_that_change_at_every_step_are_remarked_upon():
    svi = SVI(bits, bits_guide, SGD({"lr": 1e-3}), JitEstimatorELBO(default=Reinforce(MovingAverage()), verify=False))
    with pytest.warns(EstimatorWarning, match="pass them as tensors") as caught:
        for i in range(60):
            svi.step(torch.zeros(3), 1.0 + i)
    assert len(caught) == 1


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_backend_of_torch_compile(backend):
    found = []
    for compile in (False, backend):
        elbo = EstimatorELBO(default=DisARM(), compile=compile, verify=False)
        found.append(train(lambda: (bits, bits_guide), elbo, flat(5, 5, 5, 5, 5)))
    assert uses(elbo) == [3]
    with pytest.raises(ValueError, match="scale"):  # distributions check their parameters, as before
        dist.Normal(0.0, -1.0)
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    torch.testing.assert_close(found[1][1]["a"], found[0][1]["a"])
    assert torch.equal(found[1][1]["random state"], found[0][1]["random state"])
