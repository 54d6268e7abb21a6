"""Programs whose structure depends on what is drawn, and distributions that remember."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import AffineTransform
from torch.distributions import constraints

from ppl_estimators import (
    Constant,
    ControlVariate,
    DisARM,
    Enumerate,
    EstimatorError,
    ImportanceWeighted,
    LeaveOneOut,
    Reinforce,
    StickingTheLanding,
)
from ppl_estimators.core.plan import Plan
from ppl_estimators.pyro import EstimatorELBO
from ppl_estimators.pyro.dependencies import Provenance
from ppl_estimators.pyro.randomness import Randomness

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning"),
]


def test_no_particle_is_thrown_away_for_its_structure():
    """A run that takes another branch than the one before counts as it came: branches appear as often as q says."""
    p, drawn = 0.3, []

    def branching(where):
        z = pyro.sample("z", dist.Bernoulli(pyro.param("p", torch.tensor(p)) if where == "guide" else 0.5))
        if z > 0:
            pyro.sample("w", dist.Normal(0.0, 1.0))
        if where == "model":
            drawn.append(float(z))

    for particles in (1, 2):
        elbo = EstimatorELBO({"z": Reinforce(Constant(0.0))}, num_particles=particles)
        elbo.loss_and_grads(lambda: branching("model"), lambda: branching("guide"))
        drawn.clear()
        for _ in range(1200):
            elbo.loss_and_grads(lambda: branching("model"), lambda: branching("guide"))
        assert len(drawn) == 1200 * particles
        assert abs(np.mean(drawn) - p) < 5 * np.sqrt(p * (1 - p) / len(drawn)) < 0.07


@pytest.fixture
def followed(monkeypatch):
    """How many runs were followed."""
    runs = []

    def enter(self, enter=Provenance.__enter__):
        runs.append(self)
        return enter(self)

    monkeypatch.setattr(Provenance, "__enter__", enter)
    return runs


@pytest.mark.parametrize("particles", [1, 2])
def test_what_can_change_nothing_is_not_followed(followed, particles, monkeypatch):
    """Pathwise sites are not credited, and the only other site is credited with everything: whatever else depended on
    what, the gradient would be the same. A branch or a second site makes a difference."""

    def program(kind):
        with pyro.plate("n", 2) if kind == "w outside a plate" else nullcontext():
            z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3)))).mean()
        if kind == "two":
            pyro.sample("y", dist.Bernoulli(0.3))
        w = pyro.sample("w", dist.Normal(pyro.param("m", torch.tensor(0.2)) * (z if kind == "z above w" else 1.0), 1.0))
        if kind == "branch" and w > 0:
            z = 2 * z
        return z + w

    def gradient(elbo, kind, expected=0):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        for _ in range(4):
            followed.clear()
            elbo.loss_and_grads(lambda: pyro.sample("x", dist.Normal(program(kind), 1.0), obs=torch.tensor(0.4)),
                                lambda: program(kind))  # fmt: skip
        assert len(followed) == expected * particles, kind
        return [p.grad.item() for _, p in pyro.get_param_store().named_parameters()]

    elbo = EstimatorELBO({"z": Reinforce()}, num_particles=particles)
    found = gradient(elbo, "z above w")
    with monkeypatch.context() as patched:
        patched.setattr(Plan, "saturated", False)
        assert found == gradient(EstimatorELBO({"z": Reinforce()}, num_particles=particles), "z above w", 1)
    for kind in ("w outside a plate", "two", "branch"):
        gradient(EstimatorELBO(Reinforce(), default="auto", num_particles=particles), kind, 1)
    gradient(EstimatorELBO({"z": Enumerate()}, num_particles=particles), "z above w", 1)  # which runs again


def test_a_run_that_was_not_followed_and_is_another_than_expected_is_made_once_more(followed):
    """With the same draws: it is not another run that takes its place, whatever is drawn in it."""
    values, late = [], False

    class Recording(Randomness):
        def value(self, name, *args, **kwargs):
            found = super().value(name, *args, **kwargs)
            if name == "z":
                values.append(float(found))
            return found

    def program(where):
        z = pyro.sample("z", dist.Bernoulli(pyro.param("p", torch.tensor(0.3)) if where == "guide" else 0.5))
        if late and z > 0:
            pyro.sample("w", dist.Bernoulli(0.2))

    def step():
        elbo.loss_and_grads(lambda: program("model"), lambda: program("guide"))

    drawn = []
    for seed in range(100):
        late, elbo = False, EstimatorELBO(Reinforce())
        elbo.randomness = Recording()
        step()
        late = True
        values.clear()
        followed.clear()
        pyro.set_rng_seed(seed)
        step()
        drawn.append(values[0])
        assert values == drawn[-1:] * (2 if drawn[-1] else 1) and len(followed) == drawn[-1]
    assert abs(np.mean(drawn) - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 100)


@pytest.mark.parametrize("estimator", [DisARM(), Enumerate()], ids=repr)
def test_counterfactual_values_may_take_another_branch(estimator):
    """z decides which site is drawn, and which one is observed: the gradient is exact on average."""

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.4))
        if z > 0:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            pyro.sample("x1", dist.Normal(w, 1.0), obs=torch.tensor(0.5))
        else:
            pyro.sample("x0", dist.Normal(0.0, 2.0), obs=torch.tensor(0.5))

    def guide():
        z = pyro.sample("z", dist.Bernoulli(logits=pyro.param("a", torch.tensor(0.3))))
        if z > 0:
            pyro.sample("w", dist.Normal(0.2, 0.8))

    def log_normal(x, m, s):
        return -0.5 * ((x - m) / s) ** 2 - np.log(s) - 0.5 * np.log(2 * np.pi)

    p = 1 / (1 + np.exp(-0.3))
    t, w = np.polynomial.hermite_e.hermegauss(30)
    w, v = w / w.sum(), 0.2 + 0.8 * t
    f1 = np.log(0.4) - np.log(p) + w @ (log_normal(v, 0, 1) + log_normal(0.5, v, 1) - log_normal(v, 0.2, 0.8))
    f0 = np.log(0.6) - np.log(1 - p) + log_normal(0.5, 0, 2)
    exact = -p * (1 - p) * (f1 - f0)
    elbo, gradients = EstimatorELBO({"z": estimator}), []
    pyro.set_rng_seed(0)
    for _ in range(600):
        elbo.loss_and_grads(model, guide)
        a = pyro.param("a").unconstrained()
        gradients.append(float(a.grad))
        a.grad = None
    error = np.std(gradients) / np.sqrt(len(gradients))
    assert abs(np.mean(gradients) - exact) < 5 * error
    assert 5 * error < 0.3 * abs(exact)


def test_sites_are_flipped_alone_when_a_branch_depends_on_one():
    def program():
        one = pyro.sample("one", dist.Bernoulli(0.4))
        two = pyro.sample("two", dist.Bernoulli(0.6))
        return one, two

    def model(branch):
        one, two = program()
        mean = 3.0 * two if branch and one > 0 else torch.tensor(1.0)
        pyro.sample("x", dist.Normal(mean, 1.0), obs=torch.tensor(0.5))

    elbo = EstimatorELBO(DisARM())
    elbo.loss_and_grads(lambda: model(True), program)
    assert sorted(g.sites for g in elbo.memory.last.groups) == [("one",), ("two",)]
    elbo = EstimatorELBO(DisARM())
    elbo.loss_and_grads(lambda: model(False), program)
    assert [g.sites for g in elbo.memory.last.groups] == [("one", "two")]


@pytest.mark.parametrize("cache_size", [0, 1])
@pytest.mark.parametrize("kind", ["score", "bound", "sticking"])
def test_transforms_that_persist_and_remember(kind, cache_size):
    """The density at the drawn value depends on the transform's parameters, whatever its cache holds."""
    options = {
        "score": ({"y": Reinforce(LeaveOneOut())}, None),
        "bound": ({"y": Reinforce(LeaveOneOut())}, ImportanceWeighted()),
        "sticking": ({"y": StickingTheLanding()}, None),
    }
    estimators, objective = options[kind]
    found = []
    for size in (0, cache_size):
        pyro.clear_param_store()
        m = pyro.param("m", torch.tensor(0.4))
        s = pyro.param("s", torch.tensor(0.7), constraint=constraints.positive)
        transform = AffineTransform(m, s, cache_size=size)

        def guide(transform=transform):
            pyro.sample("y", dist.TransformedDistribution(dist.Normal(torch.tensor(0.0), 1.0), [transform]))

        def model():
            pyro.sample("y", dist.Normal(0.0, 1.0))

        elbo = EstimatorELBO(estimators, num_particles=3, objective=objective, retain_graph=True)
        for _ in range(3):  # the transform and its inverse hold each other from the first step on
            pyro.set_rng_seed(1)
            m.unconstrained().grad = s.unconstrained().grad = None
            elbo.loss_and_grads(model, guide)
        found.append([float(x.unconstrained().grad) for x in (m, s)])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-10)
    assert all(x != 0 for x in found[1])


def test_a_site_of_some_particles_under_a_bound():
    """Which of the particles it is that have no cost there is not kept: no number may be made of the others'."""

    def program():
        if pyro.sample("b", dist.Bernoulli(pyro.param("p", torch.tensor(0.5)))):
            pyro.sample("z", dist.Bernoulli(pyro.param("r", torch.tensor(0.4))))

    elbo = EstimatorELBO(Reinforce(LeaveOneOut()), num_particles=4, objective=ImportanceWeighted())
    pyro.set_rng_seed(0)
    with pytest.raises(EstimatorError, match=r"site 'z': drawn in \d of 4 particles, and a bound compares them all"):
        for _ in range(20):
            elbo.loss_and_grads(program, program)


@pytest.mark.parametrize("estimator", [Reinforce(LeaveOneOut()), ControlVariate(abs, abs, 0.5)], ids=repr)
def test_a_delta_has_no_score(estimator):
    def program():
        pyro.sample("d", dist.Delta(pyro.param("d", torch.tensor(0.3))))

    with pytest.raises(EstimatorError, match=r"site 'd': a Delta has no score function.*Use Pathwise\(\)"):
        EstimatorELBO({"d": estimator}, num_particles=2).loss_and_grads(program, program)


def test_alternatives_in_one_vectorised_run_do_not_share_noise_between_sites():
    """A and B are drawn again for each value of z; were their noise the same, E[AB] would not vanish."""

    def model():
        z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
        a = pyro.sample("A", dist.Normal(0.0 * z, 1.0))
        b = pyro.sample("B", dist.Normal(0.0 * z, 1.0))
        pyro.factor("f", (1.0 + z) * a * b)

    def guide():
        logits = pyro.param("logits", torch.tensor([0.2, -0.1, 0.4]))
        z = pyro.sample("z", dist.Categorical(logits=logits))
        pyro.sample("A", dist.Normal(0.0 * z, 1.0))
        pyro.sample("B", dist.Normal(0.0 * z, 1.0))

    q = torch.softmax(torch.tensor([0.2, -0.1, 0.4]), 0)
    cost = -q.log()  # the prior is flat, the factor has mean zero
    exact = -(q * (cost - (q * cost).sum())).numpy()
    elbo = EstimatorELBO(
        {"z": Enumerate()}, num_particles=4000, vectorize_particles=True, max_plate_nesting=0, max_parallel=8
    )
    gradients = []
    pyro.set_rng_seed(0)
    for _ in range(20):
        elbo.loss_and_grads(model, guide)
        p = pyro.param("logits").unconstrained()
        gradients.append(p.grad.numpy().copy())
        p.grad = None
    error = np.std(gradients, axis=0) / np.sqrt(len(gradients))
    assert np.all(np.abs(np.mean(gradients, axis=0) - exact) < 5 * error)
    assert np.all(5 * error < 0.06)  # shared noise moved it by 0.2


@pytest.mark.parametrize("particles", [1, 2])
def test_pathwise_sites_are_followed_until_their_structure_is_known(monkeypatch, particles):
    """Where no site needs credit, a step follows nobody; what turns up later is found all the same."""
    followed, parts = [], {"bits": False, "size": 4, "chance": 0.0}

    class Counted(Provenance):
        def __enter__(self):
            followed.append(1)
            return super().__enter__()

    monkeypatch.setattr("ppl_estimators.pyro.library.Provenance", Counted)
    x = torch.linspace(-1.0, 2.0, 8)

    def model():
        with pyro.plate("data", 8, subsample_size=parts["size"]) as i:
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Bernoulli(0.3)) if parts["bits"] else 0.5
            pyro.sample("x", dist.Normal(w + 2 * z, 1.0), obs=x[i])

    def guide():
        m, p = pyro.param("m", torch.tensor(0.2)), pyro.param("p", torch.tensor(0.4))
        parts["bits"] |= bool(torch.rand(()) < parts["chance"])
        with pyro.plate("data", 8, subsample_size=parts["size"]):
            w = pyro.sample("w", dist.Normal(m, 0.8))
            if parts["bits"]:
                pyro.sample("z", dist.Bernoulli(logits=w + p))

    def step(elbo, seed):
        pyro.set_rng_seed(seed)
        pyro.get_param_store().clear()
        parts["bits"] &= not parts["chance"]
        loss = elbo.loss_and_grads(model, guide)
        store = pyro.get_param_store().named_parameters()
        return [loss, *(0.0 if v.grad is None else float(v.grad) for _, v in store)]

    def learned(elbo, seeds=range(3)):
        """Runs that were followed by each of some steps; each does what a new ELBO's first does."""
        counts = []
        for seed in seeds:
            followed.clear()
            found = step(elbo, seed)
            counts.append(len(followed))
            assert found == step(EstimatorELBO(num_particles=particles), seed)
        return counts

    elbo = EstimatorELBO(num_particles=particles)
    assert learned(elbo) == [particles, 0, 0]
    parts["size"] = 2  # another minibatch
    assert learned(elbo) == [particles, 0, 0]
    parts["bits"] = True  # a site that needs credit
    assert min(learned(elbo)[1:]) >= particles
    parts["bits"] = False
    assert learned(elbo) == [particles, 0, 0]
    parts["chance"] = 0.4  # now and then, in the first particle or from the second on
    assert min(learned(elbo, range(12))) < particles


@pytest.mark.parametrize("estimator", [Enumerate(), Reinforce(LeaveOneOut())], ids=repr)
def test_a_site_is_summed_out_though_the_first_run_did_not_meet_it(estimator):
    """Another value of b leads to it, or a later particle."""

    def model():
        k = torch.tensor(0.0)
        if pyro.sample("b", dist.Bernoulli(0.5)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(2.0 * k, 1.0), obs=torch.tensor(1.1))

    def guide():
        pyro.sample("b", dist.Bernoulli(logits=pyro.param("l", torch.tensor(0.3))))

    log_p = lambda k: dist.Normal(2.0 * k, 1.0).log_prob(torch.tensor(1.1))  # noqa: E731
    mixed = torch.log(0.3 * log_p(0.0).exp() + 0.7 * log_p(1.0).exp())
    q = dist.Bernoulli(logits=torch.tensor(0.3))
    losses = [float(q.log_prob(b) - dist.Bernoulli(0.5).log_prob(b) - f)
              for b, f in ((torch.tensor(0.0), log_p(0.0)), (torch.tensor(1.0), mixed))]  # fmt: skip
    slope = float(q.probs * (1 - q.probs)) * (losses[1] - losses[0])
    drawn = set()
    for seed in range(6):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        elbo = EstimatorELBO({"b": estimator}, num_particles=2, max_plate_nesting=0)
        loss = elbo.loss_and_grads(model, guide)
        ones = round(2 * (loss - losses[0]) / (losses[1] - losses[0]))
        assert loss == pytest.approx(losses[0] + ones * (losses[1] - losses[0]) / 2)
        drawn.add(ones)
        exact = slope if estimator == Enumerate() else (losses[1] - losses[0]) / 2 * (ones == 1)
        assert pyro.param("l").grad.item() == pytest.approx(exact)
    assert drawn == {0, 1, 2}


def test_sums_are_followed_until_their_structure_is_known(monkeypatch):
    """So are sums, of the model and of the guide, where no site needs credit."""
    followed, parts = [], {"bits": False}

    class Counted(Provenance):
        def __enter__(self):
            followed.append(1)
            return super().__enter__()

    monkeypatch.setattr("ppl_estimators.pyro.library.Provenance", Counted)

    def model():
        w, k = pyro.sample("w", dist.Normal(0.0, 1.0)), pyro.sample("k", dist.Bernoulli(0.4))
        b = pyro.sample("b", dist.Bernoulli(0.4)) if parts["bits"] else 0.5
        z = 0
        for t in pyro.markov(range(3)):
            z = pyro.sample(f"z{t}", dist.Bernoulli(0.2 + 0.5 * z), infer={"enumerate": "parallel"})
            pyro.sample(f"x{t}", dist.Normal(w + 2 * z + k + b, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("w", dist.Normal(pyro.param("m", torch.tensor(0.2)), 0.8))
        q = torch.sigmoid(pyro.param("p", torch.tensor(0.4)))
        pyro.sample("k", dist.Bernoulli(q), infer={"enumerate": "parallel"})
        if parts["bits"]:
            pyro.sample("b", dist.Bernoulli(q))

    def step(elbo, seed):
        pyro.set_rng_seed(seed)
        pyro.get_param_store().clear()
        loss = elbo.loss_and_grads(model, guide)
        return [loss, *(float(v.grad) for _, v in pyro.get_param_store().named_parameters())]

    elbo = EstimatorELBO(max_plate_nesting=0)
    for bits, expected in ((False, [0, 0]), (True, [1, 1]), (False, [0, 0])):
        parts["bits"], counts = bits, []
        for seed in range(3):
            followed.clear()
            found = step(elbo, seed)
            counts.append(len(followed))
            assert found == step(EstimatorELBO(max_plate_nesting=0), seed)
        assert [min(1, n) for n in counts[1:]] == expected, counts
