"""A further run is the same program (law 14), and the plan is a function of program and configuration (law 15)."""

import gc
import itertools
import math
import pickle
import threading
import warnings
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from ppl_estimators import (
    ARMS,
    REBAR,
    ControlVariate,
    DisARM,
    Enumerate,
    EstimatorError,
    EstimatorWarning,
    LeaveOneOut,
    MovingAverage,
    Reinforce,
)
from ppl_estimators.pyro import EstimatorELBO, with_estimators
from ppl_estimators.pyro.run import execute
from ppl_estimators.testing import exact_gradient

LANES = 4000


def lanes(x):
    x = torch.as_tensor(x)
    return x.expand(LANES, *x.shape).clone()


def gradients(elbo, model, guide, *args, steps=1, seed=0):
    """``{parameter: [steps, *shape]}``, each step's own."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    rows = []
    for _ in range(steps):
        elbo.loss_and_grads(model, guide, *args)
        rows.append({})
        for name, p in pyro.get_param_store().named_parameters():
            rows[-1][name] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
            p.grad = None
    return {name: torch.stack([row[name] for row in rows]) for name in rows[-1]}


def assert_mean(draws, exact):
    """The mean of independent draws ``[n, ...]`` within 5 standard errors, which could tell a tenth."""
    draws, exact = draws.double(), torch.as_tensor(exact).double()
    mean, error = draws.mean(0), draws.std(0) / len(draws) ** 0.5
    assert ((mean - exact).abs() <= 5 * error + 1e-4).all(), (mean, error)
    assert (error <= 0.1 * exact.abs().max()).all(), error


# ---- what a further run draws --------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [DisARM(), Enumerate(), REBAR()], ids=repr)
def test_dropout_is_the_same_in_every_run(estimator):
    """The gradient is the mean over the four masks; a run with another mask mixes the costs of two guides."""

    def model():
        with pyro.plate("lanes", LANES):
            z = pyro.sample("z", dist.Bernoulli(lanes(0.3)))
            pyro.sample("x", dist.Normal(2 * z, 1.0), obs=lanes(1.5))

    def guide():
        w, b = pyro.param("w", lanes([1.0, -1.5])), pyro.param("b", lanes(0.2))
        mask = torch.nn.functional.dropout(torch.ones(LANES, 2), 0.5)
        with pyro.plate("lanes", LANES):
            pyro.sample("z", dist.Bernoulli(logits=(w * mask).sum(-1) + b))

    found = gradients(EstimatorELBO({"z": estimator}), model, guide, steps=6)
    draws = torch.cat([torch.cat([found["w"], found["b"][..., None]], -1)]).flatten(0, 1)
    assert_mean(draws, [-0.00997, -0.18168, -0.04195])


@pytest.mark.parametrize("source", ["torch", "python", "numpy"])
def test_a_datum_that_the_guide_draws_is_the_same_in_every_run(source):
    """q(z = 1) = sigmoid(0.8 x) for x = -2 or 2, which guide and model share."""
    import random

    box = {}
    draw = {
        "torch": lambda: torch.randint(2, (LANES,)),
        "python": lambda: torch.tensor(random.choices((0, 1), k=LANES)),
        "numpy": lambda: torch.as_tensor(np.random.randint(2, size=LANES)),
    }[source]

    def guide():
        box["x"] = torch.tensor([-2.0, 2.0])[draw()]
        w = pyro.param("w", lanes(0.8))
        with pyro.plate("lanes", LANES):
            pyro.sample("z", dist.Bernoulli(logits=w * box["x"]))

    def model():
        with pyro.plate("lanes", LANES):
            z = pyro.sample("z", dist.Bernoulli(lanes(0.5)))
            pyro.sample("x", dist.Normal(3 * z - 1.5, 1.0), obs=box["x"])

    found = gradients(EstimatorELBO(), model, guide, steps=2)["w"]
    assert_mean(found.flatten()[:, None], [-1.2299])


def test_alternatives_side_by_side_share_their_noise():
    def model():
        with pyro.plate("lanes", LANES):
            y = pyro.sample("y", dist.OneHotCategorical(lanes(torch.ones(3))))
            w = pyro.sample("w", dist.Normal(lanes(torch.zeros(2)), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(3 * w.sum(-1) + y @ torch.arange(3.0), 1.0), obs=lanes(0.5))

    def guide():
        a, m = pyro.param("l", lanes(torch.zeros(3))), pyro.param("m", lanes(torch.zeros(2)))
        with pyro.plate("lanes", LANES):
            y = pyro.sample("y", dist.OneHotCategorical(logits=a))
            pyro.sample("w", dist.Normal(m + 0 * y.sum(-1, keepdim=True), 0.5).to_event(1))

    def variance(**how):
        elbo = EstimatorELBO({"y": Enumerate()}, **how)
        return gradients(elbo, model, guide)["l"].flatten(0, 1).var(0).sum().item()

    together = variance(vectorize_particles=True, max_plate_nesting=1)
    assert together == pytest.approx(variance(), rel=0.1)


def test_random_numbers_of_the_caller_go_on_as_after_one_run():
    """DisARM() draws one uniform; its further run, and the verification of the first step, leave no trace."""

    def model():
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Bernoulli(0.4)), 1.0), obs=torch.tensor(0.3))

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2))))

    elbo, after = EstimatorELBO({"z": DisARM()}), []
    for _ in range(2):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        elbo.loss_and_grads(model, guide)
        after.append(torch.rand(()).item())
    pyro.set_rng_seed(3)
    torch.rand(())
    assert after == [torch.rand(()).item()] * 2


# ---- what it leaves ------------------------------------------------------------------------------------------------


def batch_norm(elbo, steps=5):
    """What encoder and decoder have counted and averaged."""
    torch.manual_seed(0)
    x = 3 + torch.randn(16, 4)
    encoder = torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    decoder = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4, affine=False))

    def model():
        pyro.module("decoder", decoder)
        with pyro.plate("data", 16):
            z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide():
        pyro.module("encoder", encoder)
        with pyro.plate("data", 16):
            pyro.sample("z", dist.Bernoulli(logits=encoder(x)).to_event(1))

    pyro.clear_param_store()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), elbo)
    for _ in range(steps):
        svi.step()
    return int(encoder[0].num_batches_tracked), int(decoder[1].num_batches_tracked), encoder[0].running_mean


@pytest.mark.filterwarnings("ignore:site 'z'.* a plate says that none does")  # and batch normalisation couples them
@pytest.mark.parametrize("estimator", [DisARM(), Enumerate(), None], ids=repr)
def test_batch_normalisation_counts_the_batches_of_the_stock_elbo(estimator):
    *stock, mean = batch_norm(Trace_ELBO())
    *ours, own = batch_norm(EstimatorELBO(estimator))
    assert ours == stock
    torch.testing.assert_close(own, mean)


CALLS = 0
FLOATS = torch.zeros(())


class Keeping(torch.nn.Module):
    """Writes something at every call, in each way that a program may."""

    begun = total = 0  # the first is written to objects, the second to the class

    def __init__(self):
        super().__init__()
        self.state, self.tally, self.array = None, Counter(), np.zeros(2)
        self.register_buffer("new", torch.tensor(0.0))
        self.calls, self.average, self.in_place = 0, torch.tensor(0.0), torch.tensor(0.0)
        self.log, self.last, self.of = [], deque(maxlen=3), {"calls": 0}
        self.running = torch.zeros(4), torch.ones(4)
        self.even, self.words, self.met, self.pairs, self.built = True, "", set(), [], False
        self.late, self.late_log = 0, []
        self.count, self.counted = self.counter()

    def counter(self):
        n = 0

        def count():
            nonlocal n
            n += 1
            return n

        return count, lambda: n

    def forward(self, x):
        global CALLS
        CALLS += 1
        FLOATS.add_(1)
        self.calls += 1
        self.begun += 1
        Keeping.total += 1
        self.state = torch.zeros(()) if self.state is None else 0.5 * self.state + self.calls
        self.tally["calls"] += 1
        self.array[1] += 1
        self.of["late"] = self.of.get("late", 0) + np.float64(1)
        self.of["calls"] += 1
        self.count()
        self.log.append(float(self.calls))
        self.last.append(self.calls)
        self.new = self.new + self.calls
        self.average = 0.9 * self.average + 0.1 * self.calls
        self.in_place.mul_(0.9).add_(self.calls)
        self.even, self.words = not self.even, self.words + "w"
        self.met.add(len(self.met))
        self.pairs.append({"call": (self.calls, "w")})
        if not self.built:  # the first call makes something that stays
            self.made, self.built = torch.nn.Linear(1, 1), True
            self.first = getattr(self, "first", self.made)
        if self.calls > 5:  # in the second step
            self.late += 1
            self.late_log.append(self.calls)
            self.begun_late = getattr(self, "begun_late", 0) + 1
        return torch.nn.functional.batch_norm(x, *self.running, training=True).mean()

    def kept(self):
        own = (self.calls, self.of["calls"], self.counted(), len(self.log), *self.log, *self.last, CALLS, FLOATS.item())
        own += (self.even, len(self.words), *sorted(self.met), len(self.pairs), self.built)
        own += (self.late, *self.late_log, self.begun_late)
        own += (self.begun, Keeping.total, self.state, self.tally["calls"], self.array[1], self.of["late"])
        return torch.tensor([*own, self.new, self.average, self.in_place, *self.running[0], *self.running[1]])


@pytest.mark.parametrize("estimator", [DisARM(), Enumerate(), REBAR(), Reinforce(MovingAverage()), None], ids=repr)
def test_what_a_program_keeps_is_what_one_run_a_step_leaves(estimator):
    """Numbers, flags, texts, arrays, lists and sets in attributes, dictionaries, closures and globals; the first step,
    which looks at the program, included, a loss without a gradient, and what is first written in a later step."""
    x = torch.linspace(-1.0, 3.0, 8).reshape(2, 4)

    def left(elbo):
        global CALLS
        CALLS = Keeping.total = 0
        FLOATS.zero_()
        net = Keeping()

        def guide():
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2)) + net(x)))

        def model():
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(z + 0.01 * net(x), 1.0), obs=torch.tensor(0.7))

        pyro.clear_param_store()
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), elbo)
        for _ in range(4):
            svi.step()
            assert net.made is net.first
        svi.evaluate_loss()
        return net.kept()

    torch.testing.assert_close(left(EstimatorELBO(estimator)), left(Trace_ELBO()))


def test_a_program_sees_what_its_last_step_left():
    """The model looks at the value of the step before: exact under Enumerate(), where no further run may change it."""
    kept = {"z": torch.tensor(0.0)}

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.4))
        pyro.factor("f", -0.5 * (1.2 - 1.5 * z + 0.8 * kept["z"]) ** 2)
        kept["z"] = z.detach()

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.3))))

    q, before = torch.tensor(0.3).sigmoid(), []
    cost = [0.3 + math.log(1.5) + ((1.2 + 0.8 * y - 1.5) ** 2 - (1.2 + 0.8 * y) ** 2) / 2 for y in (0.0, 1.0)]
    elbo = EstimatorELBO(Enumerate())
    for _ in range(12):
        pyro.clear_param_store()
        before.append(int(kept["z"]))
        elbo.loss_and_grads(model, guide)
        (logit,) = (p for _, p in pyro.get_param_store().named_parameters())
        torch.testing.assert_close(logit.grad, q * (1 - q) * cost[before[-1]])
    assert len(set(before)) == 2


def batches(make):
    """Model and guide of which the guide takes its batch from an iterator; how many it has taken."""
    supply, count = iter(make()), itertools.count()

    def guide():
        next(count)
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2)) * next(supply)))

    def model():
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Bernoulli(0.5)), 1.0), obs=torch.tensor(0.7))

    return model, guide, count


class Loader:
    """Takes its batches from a generator that it holds."""

    def __init__(self):
        self.taken = 0
        self.supply = self.batches()

    def batches(self):
        while True:
            self.taken += 1
            yield torch.tensor([0.3, -0.5])[self.taken % 2]

    def guide(self):
        x = next(self.supply)
        for n in "zk":
            pyro.sample(n, dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.2)) * x))

    def model(self):
        for n in "zk":
            pyro.sample("x" + n, dist.Normal(pyro.sample(n, dist.Bernoulli(0.5)), 1.0), obs=torch.tensor(0.7))


@pytest.mark.parametrize(("estimators", "particles"), [(Reinforce(MovingAverage()), 1), (None, 2)])
def test_costs_that_are_told_apart_are_not_verified_at_the_expense_of_an_iterator(estimators, particles):
    loader, elbo = Loader(), EstimatorELBO(estimators, num_particles=particles)
    for _ in range(5):
        elbo.loss_and_grads(loader.model, loader.guide)
    assert loader.taken == 5 * particles
    assert elbo.memory.last.depends_on["model", "xz"] == {"z"}


def test_a_batch_iterator_is_asked_once_a_step_or_refused():
    model, guide, count = batches(lambda: torch.linspace(-1.0, 1.0, 50))
    elbo = EstimatorELBO(Reinforce(MovingAverage()))
    for _ in range(5):
        elbo.loss_and_grads(model, guide)
    assert next(count) == 5
    for make in (lambda: torch.linspace(-1.0, 1.0, 50), lambda: itertools.cycle(torch.tensor([-1.0, 1.0]))):
        pyro.clear_param_store()
        with pytest.raises(EstimatorError, match=r"site 'z', 'x'|site 'x', 'z'|site 'z': its cost is another"):
            EstimatorELBO().loss_and_grads(*batches(make)[:2])


# ---- verification --------------------------------------------------------------------------------------------------


def test_a_dependency_that_nobody_sees_is_found_and_assumed():
    """Another thread reads the values as Python numbers: no mode of this thread sees that."""
    with ThreadPoolExecutor(1) as pool:

        def mean(z):
            return torch.tensor(pool.submit(lambda: [1.5 * a - 0.5 * b for a, b in z.tolist()]).result())

        def model():
            with pyro.plate("lanes", LANES):
                z = torch.stack([pyro.sample(f"z{i}", dist.Bernoulli(lanes(0.5))) for i in range(2)], -1)
                pyro.sample("x", dist.Normal(mean(z), 0.5), obs=lanes(1.2))

        def guide():
            a = pyro.param("l", lanes([0.3, -0.4]))
            with pyro.plate("lanes", LANES):
                for i in range(2):
                    pyro.sample(f"z{i}", dist.Bernoulli(logits=a[:, i]))

        elbo = EstimatorELBO()
        with pytest.warns(EstimatorWarning, match="site 'z[01]': log p of 'x' moves"):
            found = gradients(elbo, model, guide)["l"]
        assert elbo.memory.last.depends_on["model", "x"] == {"z0", "z1"}
        torch.testing.assert_close(found.flatten(0, 1).mean(0), torch.tensor([-0.8810, 0.1866]), atol=0.05, rtol=0)
        unverified = EstimatorELBO(verify=False)
        gradients(unverified, model, guide)
        assert unverified.memory.last.depends_on["model", "x"] == set()


def unseen(z, f=float):
    """Of the elements of ``z``, by another thread."""
    with ThreadPoolExecutor(1) as pool:
        return torch.tensor(pool.submit(lambda: f(*z.reshape(-1).tolist())).result())


def where_a_branch_is_taken(on):
    if pyro.sample("k", dist.Bernoulli(0.5)):
        pyro.factor("g", torch.tensor(-0.7))
    pyro.factor("f", unseen(pyro.sample("z", dist.Bernoulli(0.4).expand([2]).to_event(1))[0]))


def where_two_are_alike(on):
    pyro.sample("k", dist.Bernoulli(0.5))
    pyro.factor("f", unseen(pyro.sample("z", dist.Bernoulli(0.4).expand([2]).to_event(1)), lambda a, b: float(a == b)))


def where_others_are_not_taken(on):
    if not pyro.sample("k", dist.Bernoulli(0.5)).isfinite():  # no assert: pytest's leads to files, which are iterators
        raise ValueError("unreachable")
    z = pyro.sample("z", dist.Bernoulli(0.4).expand([2]).to_event(1))
    k = pyro.sample("never", dist.Categorical(torch.tensor([0.5, 0.5, 0.0])))
    with torch.no_grad():
        unseen(k, lambda k: 1 / (k != 2))
    pyro.factor("f", unseen(z[0]))


def where_a_flag_says_so(on):
    """The structure is that of the call before."""
    pyro.sample("k", dist.Bernoulli(0.5))
    z = pyro.sample("z", dist.Bernoulli(0.4).expand([2]).to_event(1))
    pyro.factor("f", unseen(z[0]) if on else torch.tensor(0.0))


def at_the_ninth_structure(on):
    pyro.sample("k", dist.Bernoulli(0.5))
    z = pyro.sample("z", dist.Bernoulli(0.4).expand([2]).to_event(1))
    for i in range(9 if on else 0):
        pyro.factor(f"f{i}", torch.tensor(0.0))
    pyro.factor("f", unseen(z[0]) if on else torch.tensor(0.0))


@pytest.mark.parametrize(
    "model",
    [
        where_a_branch_is_taken,
        where_two_are_alike,
        where_others_are_not_taken,
        where_a_flag_says_so,
        at_the_ninth_structure,
    ],
)
def test_where_a_dependency_is_lost(model):
    def guide(on):
        pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.zeros(2))).to_event(1))
        if model is where_others_are_not_taken:
            pyro.sample("never", dist.Categorical(logits=torch.tensor([0.0, 0.0, -90.0])))

    def earlier(on, n=0):
        model(on)
        for i in range(n):
            pyro.factor(f"more{i}", torch.tensor(0.0))

    elbo = EstimatorELBO(Reinforce(MovingAverage()))
    for n in range(8 if model is at_the_ninth_structure else 1):
        if model in (where_a_flag_says_so, at_the_ninth_structure):
            elbo.loss_and_grads(lambda on, n=n: earlier(on, n), guide, False)
    with pytest.warns(EstimatorWarning, match="site 'z': log p of 'f' moves"):
        elbo.loss_and_grads(earlier, guide, True)
    assert elbo.memory.last.depends_on["model", "f"] >= {"z"}


def test_another_program_of_the_same_plan_is_verified_too():
    def guide():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.3))))

    def without():
        pyro.sample("z", dist.Bernoulli(0.4))
        pyro.factor("f", torch.tensor(0.0))

    def lost():
        pyro.factor("f", unseen(pyro.sample("z", dist.Bernoulli(0.4))))

    elbo = EstimatorELBO(Reinforce(MovingAverage()))
    elbo.loss_and_grads(without, guide)
    with pytest.warns(EstimatorWarning, match="site 'z': log p of 'f' moves"):
        elbo.loss_and_grads(lost, guide)


@pytest.mark.parametrize("pool", [None, ThreadPoolExecutor], ids=["a thread a step", "a pool that stays"])
def test_a_program_that_begins_to_use_threads_is_verified_anew(pool):
    """Nothing else about it is new. What the user has done with `threading.setprofile` goes on."""
    switch, pools, profiled = {"on": False}, [], []

    def mean(z):
        if not switch["on"]:
            return torch.tensor(0.0)
        if pool is None:
            return unseen(z)
        if not pools:
            pools.append(pool(1))
        return torch.tensor(pools[0].submit(z.item).result())

    def model():
        pyro.sample("k", dist.Bernoulli(0.5))
        pyro.factor("f", mean(pyro.sample("z", dist.Bernoulli(0.4))))

    def guide():
        pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.3))))

    def profile(frame, event, arg):
        profiled.append(event)

    threading.setprofile(profile)
    try:
        elbo = EstimatorELBO(Reinforce(MovingAverage()))
        for _ in range(2):
            elbo.loss_and_grads(model, guide)
        assert elbo.memory.last.depends_on["model", "f"] == set()
        switch["on"] = True
        with pytest.warns(EstimatorWarning, match="site 'z': log p of 'f' moves"):
            elbo.loss_and_grads(model, guide)
        assert threading.getprofile() is profile and profiled
    finally:
        threading.setprofile(None)
        for opened in pools:
            opened.shutdown()
    assert elbo.memory.last.depends_on["model", "f"] == {"k", "z"}


def test_a_dependency_that_a_later_particle_loses():
    """It takes a branch that the first has not taken: planned by the same rule, before its gradient is used."""

    def model():
        taken = pyro.sample("b", dist.Bernoulli(0.5))
        z = pyro.sample("z", dist.Bernoulli(0.4))
        if taken:
            pyro.factor("f", unseen(z))

    def guide():
        pyro.sample("b", dist.Bernoulli(0.5))
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.3))))

    later = 0
    for seed in range(8):
        pyro.set_rng_seed(seed)
        elbo = EstimatorELBO(Reinforce(LeaveOneOut()), num_particles=2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", EstimatorWarning)
            runs = elbo.step(model, guide, (), {}).loss()[2].arrays["runs"]
        behind = [run.plan.depends_on.get(("model", "f")) for run in runs]
        assert all(sites in (None, {"b", "z"}) for sites in behind)
        later += behind == [None, {"b", "z"}]
    assert later


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_tensor_that_nobody_knew_is_no_reason_to_go_without_a_plan():
    """What comes out of traced code is unknown, so that what the program holds is looked for once more."""
    linear = torch.jit.trace(lambda z: 1.5 * z[..., 0] - 0.5 * z[..., 1], torch.zeros(3, 2))

    def model():
        with pyro.plate("lanes", 3):
            z = torch.stack([pyro.sample(f"z{i}", dist.Bernoulli(0.5 * torch.ones(3))) for i in range(2)], -1)
            pyro.sample("x", dist.Normal(linear(z).detach(), 0.5), obs=torch.ones(3))

    def guide():
        a = pyro.param("l", torch.zeros(3, 2))
        with pyro.plate("lanes", 3):
            for i in range(2):
                pyro.sample(f"z{i}", dist.Bernoulli(logits=a[:, i]))

    elbo = EstimatorELBO()
    elbo.loss_and_grads(model, guide)
    assert chosen(elbo) == {"z0": Enumerate(), "z1": Enumerate()}
    assert elbo.memory.last.depends_on["model", "x"] == {"z0", "z1"}


# ---- the plan ------------------------------------------------------------------------------------------------------


def bits(n):
    with pyro.plate("data", n):
        z = pyro.sample("z", dist.Bernoulli(0.4 * torch.ones(3)).to_event(1))
        pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=torch.linspace(-1, 2, n))


def bits_guide(n):
    a = pyro.param("l", torch.tensor([0.3, -0.2, 0.1]))
    with pyro.plate("data", n):
        pyro.sample("z", dist.Bernoulli(logits=a).to_event(1))


def chosen(elbo):
    return dict(elbo.memory.last.estimators)


def test_a_smaller_last_batch_is_no_other_program():
    elbo = EstimatorELBO()
    for n in (32, 32, 4):
        elbo.loss_and_grads(bits, bits_guide, n)
        assert chosen(elbo) == {"z": DisARM()}
        assert elbo.memory.last.sites["z"].batch_shape == (n,)


def labels(x, y=None):
    with pyro.plate("data", len(x)):
        y = pyro.sample("y", dist.OneHotCategorical(torch.ones(3)), obs=y)
        pyro.sample("x", dist.Normal(y @ torch.arange(3.0), 1.0), obs=x)


def labels_guide(x, y=None):
    w = pyro.param("w", torch.zeros(3))
    with pyro.plate("data", len(x)):
        if y is None:
            pyro.sample("y", dist.OneHotCategorical(logits=w.expand(len(x), 3)))


@pytest.mark.parametrize("how", ["mapping", "hook", "default"])
@pytest.mark.parametrize("labelled_first", [True, False])
def test_labelled_and_unlabelled_batches_in_any_order(how, labelled_first):
    x, y = torch.linspace(-1.0, 2.0, 5), torch.eye(3)[torch.arange(5) % 3]
    guide = with_estimators(labels_guide, {"y": Enumerate()}) if how == "hook" else labels_guide
    elbo = EstimatorELBO({"y": Enumerate()} if how == "mapping" else None)
    calls = [(x, y), (x,), (x, y), (x,)][0 if labelled_first else 1 :]
    for call in calls:
        elbo.loss_and_grads(labels, guide, *call)
    assert chosen(elbo) == {"y": Enumerate()}
    w = gradients(elbo, labels, guide, x, steps=5)["w"]
    assert w.var(0).max() < 1e-10


def test_a_key_that_no_structure_has_is_still_an_error():
    with pytest.raises(EstimatorError, match="'q' matches no latent site"):
        EstimatorELBO({"q": Enumerate()}).loss_and_grads(labels, labels_guide, torch.zeros(2))


def test_a_call_without_latent_sites_may_come_first():
    """Nothing was sampled in it; the key is tried at the next call."""

    def guide(on):
        if on:
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.3))))

    def model(on):
        pyro.factor("f", pyro.sample("z", dist.Bernoulli(0.4)) if on else torch.tensor(0.0))

    elbo = EstimatorELBO({"z": Enumerate()})
    with pytest.warns(EstimatorWarning, match=r"'z' matches no latent site of the guide\. Sites: none\. It waits"):
        elbo.loss_and_grads(model, guide, False)
    elbo.loss_and_grads(model, guide, True)
    with pytest.raises(EstimatorError, match=r"'q' matches no latent site of the guide\. Sites: 'z'"):
        EstimatorELBO({"q": Enumerate()}).loss_and_grads(model, guide, True)


def test_sequences_of_other_lengths_are_planned_by_the_same_rule():
    def walk(n, logit):
        z = torch.tensor(0.0)
        for i in range(n):
            z = pyro.sample(f"z{i}", dist.Bernoulli(logits=logit + z))
        return z

    def model(n):
        pyro.sample("x", dist.Normal(walk(n, torch.tensor(0.1)), 1.0), obs=torch.tensor(0.5))

    def guide(n):
        walk(n, pyro.param("l", torch.tensor(0.2)))

    one = DisARM()
    for lengths in ((3, 5), (5, 3)):  # a key may name a site that only longer ones have
        elbo, found = EstimatorELBO({"z4": one}), {}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for n in lengths:
                elbo.loss_and_grads(model, guide, n)
                found[n] = chosen(elbo)
        assert found[5]["z4"] == one and one not in found[3].values()
        waits = [str(w.message) for w in said if "waits for a call that has 'z4'" in str(w.message)]
        assert len(waits) == (lengths[0] == 3)
    with pytest.raises(EstimatorError, match="'y4' matches no latent site"):
        EstimatorELBO({"y4": one}).loss_and_grads(model, guide, 3)
    used = EstimatorELBO()
    for n in (1, 5, 2, 5, 1):
        used.loss_and_grads(model, guide, n)
        fresh = EstimatorELBO()
        fresh.loss_and_grads(model, guide, n)
        assert chosen(used) == chosen(fresh)
        assert used.memory.last.particles == fresh.memory.last.particles


def test_a_loop_whose_length_is_drawn_is_planned_alike_whatever_the_first_run_met():
    def loop(logit):
        n = 0
        while n < 4 and pyro.sample(f"go_{n}", dist.Bernoulli(logits=logit)):
            n += 1
        return n

    def model():
        pyro.sample("x", dist.Normal(float(loop(torch.tensor(0.0))), 1.0), obs=torch.tensor(3.0))

    def guide():
        loop(pyro.param("l", torch.tensor(0.2)))

    for seed in range(6):
        elbo = EstimatorELBO()
        pyro.set_rng_seed(seed)
        elbo.loss_and_grads(model, guide)
        assert set(chosen(elbo).values()) == {Reinforce(LeaveOneOut())}
        assert elbo.memory.last.particles > 1


def test_changed_settings_take_effect_at_the_next_step():
    elbo = EstimatorELBO({"z": Reinforce(MovingAverage())})
    elbo.loss_and_grads(bits, bits_guide, 4)
    elbo.estimators = {"z": Enumerate()}
    elbo.loss_and_grads(bits, bits_guide, 4)
    assert chosen(elbo) == {"z": Enumerate()}
    elbo.estimators, elbo.num_particles = {}, 3
    elbo.loss_and_grads(bits, bits_guide, 4)
    assert chosen(elbo) == {"z": Reinforce(LeaveOneOut())}
    assert elbo.memory.last.particles == 3


def objects_per_step(step, warm, steps):
    for i in range(warm):
        step(i)
    gc.collect()
    before = len(gc.get_objects())
    for i in range(warm, warm + steps):
        step(i)
    gc.collect()
    return (len(gc.get_objects()) - before) / steps


@pytest.mark.parametrize("what", ["batch size", "hook", "estimator at the site"])
def test_what_an_elbo_remembers_is_bounded(what):
    elbo = EstimatorELBO()

    def at_the_site(n):
        estimator = ControlVariate(lambda z: 2 * z, lambda d: 2 * d.mean, 0.7)
        a = pyro.param("l", torch.tensor(0.3))
        with pyro.plate("data", n):
            pyro.sample("z", dist.Bernoulli(logits=a), infer={"estimator": estimator})

    def model(n):
        with pyro.plate("data", n):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Bernoulli(0.4)), 1.0), obs=torch.zeros(n))

    step = {
        "batch size": lambda i: elbo.loss_and_grads(bits, bits_guide, 2 + i),
        "hook": lambda i: elbo.loss_and_grads(bits, with_estimators(bits_guide, {"z": Reinforce(MovingAverage())}), 4),
        "estimator at the site": lambda i: elbo.loss_and_grads(model, at_the_site, 4),
    }[what]
    assert objects_per_step(step, 150, 50) <= 1


LEFT = {
    "nothing": lambda z: None,
    "itself": lambda z: (z,),
    "made of it": lambda z: (3 * z - z - z,),
    "a law": lambda z: (dist.Normal(2.0 * z, 1.0),),
    "unseen": lambda z: (pickle.loads(pickle.dumps(z)),),
}


@pytest.mark.parametrize("estimator", [Enumerate(), DisARM()], ids=repr)
def test_a_guide_is_run_again_only_if_the_model_reads_what_it_leaves(estimator, monkeypatch):
    """Nothing is drawn below z: with another z the guide gives the model that z, and what it has put away for it."""
    left, way, guides, seen = {}, "nothing", [], set()

    def executed(*args, above=None, **options):
        guides.append(above is None)
        return execute(*args, above=above, **options)

    monkeypatch.setattr("ppl_estimators.pyro.library.execute", executed)

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.3))
        (x,) = left["z"] or (z,)
        law = x if isinstance(x, dist.Normal) else dist.Normal(2.0 * x, 1.0)
        pyro.sample("x", law, obs=torch.tensor(1.7))

    def guide():
        left["z"] = LEFT[way](pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.4)))))

    exact = exact_gradient(model, guide).gradient["a"]
    elbo, a = EstimatorELBO({"z": estimator}), pyro.param("a", torch.tensor(0.4))
    for way in (
        *LEFT,
        "nothing",
    ):  # one after another, which no plan knows; a tensor that was left once is looked after
        seen.add(way)
        for _ in range(3):
            guides.clear()
            a.grad = None
            elbo.loss_and_grads(model, guide)
            if estimator == Enumerate():
                assert a.grad.item() == pytest.approx(float(exact), abs=1e-6), way
        assert sum(guides) == (1 if seen == {"nothing"} else len(guides)), way


def _factor(z):
    pyro.factor("f", -3.0 * z, has_rsample=True)


def _observed(z):
    pyro.sample("f", dist.Normal(3.0 * z, 1.0), obs=torch.tensor(0.2), infer={"is_auxiliary": True})


@pytest.mark.parametrize("below", [_factor, _observed])
def test_a_cost_of_the_guide_counts_though_the_first_other_value_was_none(below):
    """The values of a coupled draw may be all alike: a run with these doesn't show what another would change."""

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.4))
        pyro.sample("x", dist.Normal(2.0 * z, 1.0), obs=torch.tensor(0.8))

    def guide():
        below(pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.7)))))

    a = pyro.param("a", torch.tensor(0.7))
    EstimatorELBO({"z": Enumerate()}).loss_and_grads(model, guide)  # all values, and so exact
    exact = a.grad.item()
    for seed in range(8):
        pyro.set_rng_seed(seed)
        elbo, found = EstimatorELBO({"z": ARMS(3)}, vectorize_particles=False), []
        for _ in range(8):
            a.grad = None
            elbo.loss_and_grads(model, guide)
            found.append(a.grad.item())
        assert sum(found) / 8 == pytest.approx(exact, abs=0.3), seed
