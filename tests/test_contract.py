"""One row per public estimator: every fact it declares is measured, in both libraries."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as jdist
import pyro
import pyro.distributions as tdist
import pytest
import torch

import ppl_estimators
from ppl_estimators import (
    ARM,
    ARMS,
    ARSM,
    LAX,
    NVIL,
    REBAR,
    RELAX,
    UGC,
    VIMCO,
    Antithetic,
    Average,
    BitFlip,
    Combine,
    ControlVariate,
    CoupledImportance,
    DeltaMethod,
    DisARM,
    DisARMStickBreaking,
    DisARMTree,
    DoubleControlVariate,
    DoublyReparameterized,
    Enumerate,
    EstimatorError,
    EvolutionStrategy,
    GappedStraightThrough,
    GeneralizedPathwise,
    GumbelSoftmax,
    GumbelStraightThrough,
    ImplicitPathwise,
    ImportanceSampled,
    Learned,
    LeaveOneOut,
    MeasureValued,
    MovingAverage,
    MuProp,
    OptimalConstant,
    PastSteps,
    Pathwise,
    RaoGumbel,
    Reinforce,
    ReinMax,
    RejectionPathwise,
    RELAXWithModel,
    Repeat,
    SmoothedTriple,
    Stein,
    StickingTheLanding,
    StochasticTriple,
    StraightThrough,
    SumAndSample,
    SumAroundMode,
    UnorderedSet,
)
from ppl_estimators.core import families
from ppl_estimators.core.estimator import Control, Estimator, Measure, Value
from ppl_estimators.core.site import Costs, Draw, Plate, Site
from ppl_estimators.core.step import Step
from ppl_estimators.estimators.baselines.base import Baseline
from ppl_estimators.numpyro import EstimatorELBO as JaxELBO
from ppl_estimators.numpyro import OneHotCategorical
from ppl_estimators.numpyro import with_estimators as jax_hook
from ppl_estimators.numpyro.ops import OPS as JAX
from ppl_estimators.pyro import EstimatorELBO as TorchELBO
from ppl_estimators.pyro import with_estimators as torch_hook
from ppl_estimators.pyro.ops import OPS as TORCH

pytestmark = [
    pytest.mark.filterwarnings("ignore::ppl_estimators.EstimatorWarning"),
]

FAMILIES = ("Bernoulli", "Categorical", "OneHot", "Poisson", "Normal")
DISCRETE = {"Bernoulli", "Categorical", "OneHot"}
CATEGORICAL = {"Categorical", "OneHot"}
ANY = set(FAMILIES)


def identity_mean(d):
    return d.mean


def cooling(step):
    return 0.4 + 0.6 * 0.9**step


BIASED = (
    StraightThrough(),
    ReinMax(),
    GumbelSoftmax(),
    GumbelStraightThrough(),
    RaoGumbel(3),
    GappedStraightThrough(),
)
# estimator: (families, evaluations of the model per step and particle (by family if they differ), particles, keeps)
ROWS = {
    Pathwise(): ({"Normal"}, 1, 1, set()),
    StickingTheLanding(): ({"Normal"}, 1, 1, set()),
    DoublyReparameterized(): ({"Normal"}, 1, 1, set()),
    Reinforce(): (ANY, 1, 1, set()),
    Reinforce(LeaveOneOut()): (ANY, 1, 2, set()),
    Reinforce(VIMCO()): (ANY, 1, 2, set()),
    Reinforce(MovingAverage()): (ANY, 1, 1, {"state"}),
    Reinforce(OptimalConstant()): (ANY, 1, 2, set()),
    Reinforce(OptimalConstant(PastSteps(0.9))): (ANY, 1, 1, {"state"}),
    Reinforce(Learned()): (ANY, 1, 1, {"networks"}),
    Reinforce(MovingAverage() + Learned()): (ANY, 1, 1, {"state", "networks"}),
    ControlVariate(abs, identity_mean, 0.5): ({"Bernoulli", "Poisson", "Normal"}, 1, 1, set()),
    Enumerate(): (DISCRETE, {"Bernoulli": 2, "Categorical": 3, "OneHot": 3}, 1, set()),
    DisARM(): ({"Bernoulli"}, 2, 1, set()),
    ARM(): ({"Bernoulli"}, 2, 1, set()),
    ARMS(2): ({"Bernoulli"}, 2, 1, set()),
    ARMS(4): ({"Bernoulli"}, 4, 1, set()),
    BitFlip(): ({"Bernoulli"}, 2, 1, set()),
    UGC(): ({"Bernoulli"}, 3, 1, set()),
    SumAndSample(1): (CATEGORICAL, 2, 1, set()),
    SumAndSample(2): (CATEGORICAL, 3, 1, set()),
    UnorderedSet(1): (CATEGORICAL, 1, 1, set()),
    UnorderedSet(2): (CATEGORICAL, 2, 1, set()),
    DisARMStickBreaking(): (CATEGORICAL, 2, 1, set()),
    DisARMTree(): (CATEGORICAL, 2, 1, set()),
    CoupledImportance(): (CATEGORICAL, 2, 1, set()),
    ARSM(): (CATEGORICAL, 4, 1, set()),
    REBAR(): ({"Bernoulli", "OneHot"}, 3, 1, {"parameters"}),
    MuProp(): ({"Bernoulli", "OneHot"}, 2, 1, set()),
    MuProp(MovingAverage()): ({"Bernoulli", "OneHot"}, 2, 1, {"state"}),
    DoubleControlVariate(): ({"Bernoulli", "OneHot"}, 2, 2, {"parameters"}),
    Stein(): ({"Bernoulli"}, 2, 2, {"networks"}),
    NVIL(): (ANY, 1, 1, {"state", "networks"}),
    Repeat(2, DisARM()): ({"Bernoulli"}, 4, 1, set()),
    Repeat(3, Reinforce(LeaveOneOut())): (ANY, 3, 1, set()),
    Antithetic(Reinforce(MovingAverage())): (DISCRETE, 2, 1, {"state"}),
    Average((DisARM(), Reinforce())): ({"Bernoulli"}, 3, 1, set()),
    Combine((DisARM(), RELAX(), REBAR())): ({"Bernoulli"}, 6, 1, {"parameters", "networks", "state"}),
    Combine((Reinforce(), RELAX(baseline=None))): (DISCRETE, 2, 1, {"parameters", "networks", "state"}),
    ImportanceSampled(Reinforce(MovingAverage()), 2.5): (ANY, 2, 1, {"state"}),
    StochasticTriple(): (DISCRETE | {"Poisson"}, 2, 1, set()),
    SmoothedTriple(): ({"Bernoulli", "Poisson"}, 1, 1, set()),
    SumAroundMode(3): ({"Poisson"}, 4, 1, set()),
    DeltaMethod(): ({"Normal"}, 3, 5, set()),
    DeltaMethod(PastSteps(0.9)): ({"Normal"}, 3, 1, {"state"}),
    MeasureValued(): (ANY, {"Bernoulli": 2, "Categorical": 3, "OneHot": 3, "Poisson": 2, "Normal": 4}, 1, set()),
    RELAX(): (DISCRETE, 1, 1, {"parameters", "networks", "state"}),
    RELAX(baseline=None): (DISCRETE, 1, 1, {"parameters", "networks"}),
    RELAXWithModel(): ({"Bernoulli", "OneHot"}, 3, 1, {"parameters", "networks", "state"}),
    **{e: ({"Bernoulli", "OneHot"}, 1, 1, set()) for e in BIASED},
    GumbelSoftmax(cooling): ({"Bernoulli", "OneHot"}, 1, 1, {"state"}),
    ImplicitPathwise(): ({"Normal"}, 1, 1, set()),
    LAX(): ({"Normal"}, 1, 1, {"networks", "state"}),
    GeneralizedPathwise(): ({"Gamma"}, 1, 1, set()),
    RejectionPathwise(): ({"Gamma"}, 1, 1, set()),
    LAX(baseline=None): ({"Normal"}, 1, 1, {"networks"}),
    EvolutionStrategy(): ({"Normal"}, 2, 1, {"state"}),
    EvolutionStrategy(baseline=None): ({"Normal"}, 2, 1, set()),
}


# every estimator at every family, and those of `OWN` where an estimator names them
OWN = ("Gamma",)
CASES = [
    pytest.param(e, f, id=f"{e!r}-{f}") for e, (named, *_) in ROWS.items() for f in (*FAMILIES, *OWN)
    if f in FAMILIES or f in named
]  # fmt: skip


def test_every_public_estimator_and_baseline_has_a_row():
    public = [vars(ppl_estimators)[n] for n in ppl_estimators.__all__]
    rows = {type(e) for e in ROWS}
    assert {c for c in public if inspect.isclass(c) and issubclass(c, Estimator)} == rows
    baselines = {type(p) for e in ROWS for p in getattr(getattr(e, "baseline", None), "parts", ())}
    untested = {c.__name__ for c in public if inspect.isclass(c) and issubclass(c, Baseline)}
    assert untested - {c.__name__ for c in baselines} == {"Constant", "Given"}  # keep nothing, need nothing


@pytest.mark.parametrize("estimator", ROWS, ids=repr)
def test_docstrings_have_the_head_and_a_reference(estimator):
    doc = type(estimator).__doc__
    for word in ("Approximates", "With", "Requires", "Reference", ">>>"):
        assert word in doc, word
    assert doc.startswith("Biased: ") is not type(estimator).unbiased


def jax_site(family, where):
    logits = jnp.array([0.3, -0.2, 0.5])
    logits = numpyro.param("logits", logits) if where == "guide" else logits
    made = {
        "Bernoulli": lambda: jdist.Bernoulli(logits=logits[0]),
        "Categorical": lambda: jdist.Categorical(logits=logits),
        "OneHot": lambda: OneHotCategorical(logits=logits),
        "Poisson": lambda: jdist.Poisson(jnp.exp(logits[0])),
        "Normal": lambda: jdist.Normal(logits[0], 1.0),
        "Gamma": lambda: jdist.Gamma(jnp.exp(logits[0]), 1.0),
    }[family]()
    return numpyro.sample("z", made)


def torch_site(family, where):
    logits = (
        pyro.param("logits", torch.tensor([0.3, -0.2, 0.5])) if where == "guide" else torch.tensor([0.3, -0.2, 0.5])
    )
    made = {
        "Bernoulli": lambda: tdist.Bernoulli(logits=logits[0]),
        "Categorical": lambda: tdist.Categorical(logits=logits),
        "OneHot": lambda: tdist.OneHotCategorical(logits=logits),
        "Poisson": lambda: tdist.Poisson(logits[0].exp()),
        "Normal": lambda: tdist.Normal(logits[0], 1.0),
        "Gamma": lambda: tdist.Gamma(logits[0].exp(), 1.0),
    }[family]()
    return pyro.sample("z", made)


@pytest.mark.parametrize(("estimator", "family"), CASES)
def test_families_evaluations_and_finite_gradients_in_pyro(estimator, family):
    supported, evaluations, particles, _ = ROWS[estimator]
    first = object()
    runs = [first]  # a list of plain things would be put back after further runs

    def model():
        z = torch_site(family, "model")
        runs.append(object())
        pyro.sample(
            "x", tdist.Normal(z @ torch.arange(3.0) if family == "OneHot" else 1.0 * z, 1.0), obs=torch.tensor(0.4)
        )

    def guide():
        torch_site(family, "guide")

    elbo = TorchELBO({"z": estimator}, num_particles=particles)
    if family not in supported:
        if not isinstance(estimator, ControlVariate):
            with pytest.raises(EstimatorError, match=r"site 'z': "):
                elbo.loss_and_grads(model, torch_hook(guide))
        return
    wrapped = torch_hook(guide, {"z": estimator})
    elbo.loss_and_grads(model, wrapped)  # the first step looks at the structure too
    logits = pyro.get_param_store()["logits"]
    slopes = []
    for _ in range(8):  # two particles that agree have a leave-one-out gradient of zero
        runs[:] = [first]
        logits.grad = None
        elbo.loss_and_grads(model, wrapped)
        slopes.append(logits.grad)
    assert bool(torch.isfinite(torch.stack(slopes)).all())
    assert bool(torch.stack(slopes).any())
    expected = evaluations[family] if isinstance(evaluations, dict) else evaluations
    assert len(runs) - 1 == expected * particles


#: the family of each estimator whose step NumPyro compiles and runs: they take turns; the others are traced
COMPILED = {
    e: [f for f in (*FAMILIES, *OWN) if f in named][i % len(named)] for i, (e, (named, *_)) in enumerate(ROWS.items())
}


#: Pyro runs these, and the compiled family has the same code in NumPyro
TRACED = [
    pytest.param(*case.values, id=case.id, marks=pytest.mark.slow if traced else ())
    for case in CASES
    for e, f in [case.values]
    for traced in [f in ROWS[e][0] and f != COMPILED[e]]
]


@pytest.mark.parametrize(("estimator", "family"), TRACED)
def test_families_and_finite_gradients_in_numpyro(estimator, family):
    supported, _, particles, keeps = ROWS[estimator]

    def model():
        z = jax_site(family, "model")
        numpyro.sample("x", jdist.Normal(z @ jnp.arange(3.0) if family == "OneHot" else 1.0 * z, 1.0), obs=0.4)

    def guide():
        shift = numpyro.param("shift", 0.0)
        logits = jnp.array([0.3, -0.2, 0.5]) + shift * jnp.array([1.0, -1.0, 0.5])
        made = {
            "Bernoulli": lambda: jdist.Bernoulli(logits=logits[0]),
            "Categorical": lambda: jdist.Categorical(logits=logits),
            "OneHot": lambda: OneHotCategorical(logits=logits),
            "Poisson": lambda: jdist.Poisson(jnp.exp(logits[0])),
            "Normal": lambda: jdist.Normal(logits[0], 1.0),
            "Gamma": lambda: jdist.Gamma(jnp.exp(logits[0]), 1.0),
        }[family]()
        numpyro.sample("z", made)

    elbo = JaxELBO({"z": estimator}, num_particles=particles)
    if family not in supported:
        if not isinstance(estimator, ControlVariate):
            with pytest.raises(EstimatorError, match=r"site 'z': "):
                elbo.loss(jax.random.key(0), {}, model, guide)
        return
    wrapped = jax_hook(guide, {"z": estimator})
    trace = numpyro.handlers.trace(numpyro.handlers.seed(wrapped, 0)).get_trace()
    declared = {k for k in trace if "$" in k}
    assert any(k.endswith("$state") for k in declared) is ("state" in keeps)
    assert any("log_" in k or k.endswith("coefficient") for k in declared) is ("parameters" in keeps)
    assert any(".w1" in k for k in declared) is ("networks" in keeps)
    params = {k: s["value"] for k, s in trace.items() if s["type"] == "param"}
    state = {k: s["value"] for k, s in trace.items() if s["type"] == "mutable"}

    def loss(p, key):
        return elbo.loss_with_mutable_state(key, {**p, **state}, model, wrapped)["loss"]

    many = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))
    keys = jax.random.split(jax.random.key(0), 20)  # two particles that agree have a gradient of zero
    if family != COMPILED[estimator]:
        assert jax.eval_shape(many, params, keys)["shift"].shape == (20,)
        return
    gradient = many(params, keys)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in gradient.values())
    assert float(jnp.abs(gradient["shift"]).sum()) > 0


# ---- how the value is made ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moved(Step):
    """With ``delta`` added to the value, to see how a term moves with it."""

    delta: Any = 0.0

    def _draw(self, run, msg):
        value = super()._draw(run, msg)
        return value + self.delta if self.settings.mapping["z"].value.moves else value

    def seen(self):
        """The value, −log q as the loss differentiates it, and the run."""
        runs = []

        def one(source):
            runs.append(self.run(source))
            return self.drawn(source)

        self.library.particles(one, 1)
        term = next(t for t in self._explicit(runs[-1]) if (t.side, t.site) == ("guide", "z"))
        return runs[-1].traces.guide["z"]["value"], term.value.sum(), runs[-1]


def assert_made_as_declared(estimator, run, drawn, slope, rest):
    """``slope`` is how the value moves with the parameters, ``rest`` how -log q does while the value stands still."""
    value = estimator.value
    assert bool(abs(slope).max() > 0) is value.moves
    assert bool(abs(rest).max() > 1e-5) is (value in (Value.LIBRARY, Value.OWN, Value.PARTIAL) and not estimator.sticks)
    assert (value.moves and bool((drawn == drawn.round()).all())) is (value is Value.HARD)
    assert ("z" not in run.draws) is value.library
    assert ("z" in run.sites) is (not value.whole or estimator.asked)


def last_family(estimator):
    """One number, or three of which each moves."""
    return next(f for f in (*OWN, *reversed(FAMILIES)) if f in ROWS[estimator][0])


@pytest.mark.parametrize("estimator", ROWS, ids=repr)
def test_how_the_value_is_made_in_pyro(estimator):
    family = last_family(estimator)
    pyro.set_rng_seed(3)
    elbo = TorchELBO({"z": estimator}, num_particles=ROWS[estimator][2])
    step = elbo.step(lambda: torch_site(family, "model"), lambda: torch_site(family, "guide"), (), {})
    delta = torch.zeros(3 if family == "OneHot" else (), requires_grad=True)
    value, term, run = Moved(step.settings, step.library, delta).seen()
    logits = pyro.get_param_store()["logits"]

    def slope(y, x, along=None):
        found = torch.autograd.grad(y, x, along, retain_graph=True, allow_unused=True)[0] if y.requires_grad else None
        return torch.zeros_like(x) if found is None else found

    moves = slope(value, logits, torch.arange(1.0, 1.0 + value.numel()).reshape(value.shape))
    rest = slope(term, logits) - slope(value, logits, slope(term, delta))
    assert_made_as_declared(estimator, run, value, moves, rest)


@pytest.mark.parametrize("estimator", [Reinforce(), DisARM(), *(e for e in ROWS if e.value.moves)], ids=repr)
def test_how_the_value_is_made_in_numpyro(estimator):
    family = last_family(estimator)
    elbo = JaxELBO({"z": estimator}, num_particles=ROWS[estimator][2])
    hooked = jax_hook(lambda: jax_site(family, "guide"), {"z": estimator})
    trace = numpyro.handlers.trace(numpyro.handlers.seed(hooked, 0)).get_trace()
    kept = {k: s["value"] for k, s in trace.items() if s["type"] in ("param", "mutable")}
    runs = []

    def seen(logits, delta):
        step = elbo.step(
            jax.random.key(3), {**kept, "logits": logits}, lambda: jax_site(family, "model"), hooked, (), {}
        )
        value, term, run = Moved(step.settings, step.library, delta).seen()
        runs.append(run)
        return 1.0 * value, term

    def both(logits, delta):
        (value, _), back = jax.vjp(seen, logits, delta)
        of_term, along = back((jnp.zeros_like(value), 1.0))
        moves, _ = back((1.0 + jnp.arange(value.size).reshape(value.shape), 0.0))
        return value, moves, of_term - back((along, 0.0))[0]

    value, moves, rest = both(kept["logits"], jnp.zeros(3 if family == "OneHot" else ()))
    assert_made_as_declared(estimator, runs[0], value, moves, rest)


# ---- what is measured -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["pyro", "numpyro"])
@pytest.mark.parametrize("estimator", ROWS, ids=repr)
def test_what_is_measured_is_what_it_asks_for(estimator, library):
    """And nothing else is needed: what was not asked for is None in `local`."""
    family, particles = last_family(estimator), ROWS[estimator][2]
    if library == "pyro":
        elbo = TorchELBO({"z": estimator}, num_particles=particles)
        step = elbo.step(lambda: torch_site(family, "model"), lambda: torch_site(family, "guide"), (), {})
    else:
        hooked = jax_hook(lambda: jax_site(family, "guide"), {"z": estimator})
        trace = numpyro.handlers.trace(numpyro.handlers.seed(hooked, 0)).get_trace()
        kept = {k: s["value"] for k, s in trace.items() if s["type"] in ("param", "mutable")}
        elbo = JaxELBO({"z": estimator}, num_particles=particles)
        step = elbo.step(jax.random.key(0), kept, lambda: jax_site(family, "model"), hooked, (), {})
    asked = set()

    def noted(what, function):
        def measure(*args):
            asked.add(what)
            return function(*args)

        return measure

    step.library.log_q = noted(Measure.LOG_Q, step.library.log_q)
    step.library.score_norm = noted(Measure.SCORE_NORM, step.library.score_norm)
    if library == "pyro":
        step.loss()
    else:
        jax.eval_shape(lambda: step.loss()[0])
    assert asked == estimator.measures - {Measure.FUNCTIONS}
    assert (type(estimator).measured is not Estimator.measured) is (Measure.FUNCTIONS in estimator.measures)
    assert estimator.compares or particles == 1


@pytest.mark.parametrize("estimator", [e for e in ROWS if not e.value.whole], ids=repr)
def test_what_is_compared_and_what_is_subtracted(estimator):
    """A particle's gradient sees the costs of others if the estimator says so, and no level that all costs have if it
    says that a mean of the others is subtracted. `local` is the same in both libraries."""
    family, particles = last_family(estimator), max(2, ROWS[estimator][2])

    def model():
        z = torch_site(family, "model")
        loc = z @ torch.arange(3.0) if family == "OneHot" else 1.0 * z
        pyro.sample("x", tdist.Normal(loc**2, 1.0), obs=torch.tensor(0.4))

    elbo = TorchELBO({"z": estimator}, num_particles=particles)
    step = elbo.step(model, lambda: torch_site(family, "guide"), (), {})
    joined = step.library.particles(step.particle)
    facts, kept, found = joined.sites["z"], joined.kept["z"], joined.arrays["sites"]["z"]

    def slopes(shift):
        """Of the first particle, in everything that is its own, with so much more cost in each particle."""
        leaves = []

        def leaf(x):
            if isinstance(x, dict):
                return {k: leaf(y) for k, y in x.items()}
            if not torch.is_tensor(x) or not x.is_floating_point():
                return x
            leaves.append(x.detach().requires_grad_())
            return leaves[-1]

        site = facts.filled(lead=1, value=None, law=None, **leaf(found["site"]))
        draw = Draw(found["draw"]["value"], leaf(found["draw"]["extra"]))
        by_particle = shift.reshape(-1, *[1] * (found["cost"].ndim - 1))
        moved = {k: x if k == "relaxed_slope" else x + by_particle for k, x in found["elsewhere"].items()}
        costs = Costs(found["cost"] + by_particle, **moved)
        local = estimator.local(TORCH, site, draw, costs, replace(kept, given=found["given"]))
        gradient = torch.autograd.grad(local.surrogate.sum(), leaves, allow_unused=True)
        return torch.cat([g[0].reshape(-1) for g in gradient if g is not None])

    plain, others = slopes(torch.zeros(particles)), slopes(5.0 * torch.arange(particles) ** 2)
    assert torch.allclose(plain, others, atol=1e-5) is not estimator.compares
    if estimator.control is not Control.OWN:
        level = slopes(torch.full((particles,), 5.0))
        assert torch.allclose(plain, level, atol=1e-4) is (estimator.control is not Control.NOTHING)


# ---- the values that are evaluated ----------------------------------------------------------------------------------

COPIES = 20_000
LIBRARIES = {"pyro": (TORCH, torch.as_tensor), "numpyro": (JAX, jnp.asarray)}


def many(family, array):
    """A site of independent copies, in a plate."""
    logits, n = np.array([0.3, -0.2, 0.5]), (COPIES,)
    categories = {"Categorical": families.CATEGORICAL, "OneHot": families.ONEHOT}
    named = {
        "Bernoulli": {"logits": 0.3},
        "Poisson": {"rate": 1.3},
        "Normal": {"loc": 0.3, "scale": 1.2},
        **{key: {"logits": logits} for key in categories},
    }[family]
    named = {k: array(np.broadcast_to(x, (*n, *np.shape(x))).copy()) for k, x in named.items()}
    site = Site(
        "z", family, categories.get(family, family.lower()), n, (3,) * (family == "OneHot"),
        frozenset({Plate("n", -1, COPIES)}), logits=named.get("logits"), named=named,
    )  # fmt: skip
    p = np.exp(logits) / np.exp(logits).sum()
    value = {
        "Bernoulli": lambda rng: 1.0 * (rng.random(n) < 1 / (1 + np.exp(-0.3))),
        "Poisson": lambda rng: 1.0 * rng.poisson(1.3, n),
        "Normal": lambda rng: rng.normal(0.3, 1.2, n),
        "Categorical": lambda rng: rng.choice(3, n, p=p),
        "OneHot": lambda rng: np.eye(3)[rng.choice(3, n, p=p)],
    }[family]
    return site, value


def below(value, family):
    """Is it at most -0.5, 0.5, 1.5, 2.5? ``[COPIES, 4]``: enough to tell two laws."""
    value = np.asarray(value).argmax(-1) if family == "OneHot" else np.asarray(value)
    return 1.0 * (value[:, None] <= np.array([-0.5, 0.5, 1.5, 2.5]))


def distance(difference):
    """Of a mean from zero, in its own standard errors; what only rounding moves is zero."""
    spread = np.maximum(difference.std(0), 1e-6)
    moved = np.abs(difference.mean(0)) * (spread > 1e-6)
    return float(np.max(moved / spread)) * COPIES**0.5


def takes(estimator, family):
    return estimator.alternatives(many(family, np.asarray)[0]).count > 0


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("estimator", "family"), [(e, f) for e in ROWS for f in FAMILIES if f in ROWS[e][0] and takes(e, f)],
    ids=str,
)  # fmt: skip
def test_the_law_of_other_values_and_their_weights(estimator, family, library):
    """Draws have the law of the drawn value, moves do not; weights make up for it."""
    ops, array = LIBRARIES[library]
    site, value = many(family, array)
    rng = np.random.default_rng(0)
    laws = {
        "value": lambda n: value(rng),
        "uniform": lambda n: rng.random(n.shape),
        "normal": lambda n: rng.normal(size=n.shape),
        "poisson": lambda n: 1.0 * rng.poisson(np.asarray(n.concentration), n.shape),
    }
    noise = {k: array(laws[n.law](n)) for k, n in estimator.noise(site).items()}
    draw, asked = estimator.draw(ops, site, noise), estimator.alternatives(site)
    drawn = below(draw.value, family)
    seen = [below(estimator.alternative(ops, site, draw, array(np.array(i))), family) for i in range(asked.count)]
    worst = max(distance(x - drawn) for x in seen)
    assert worst < 4.5 if asked.own_law else worst > 8
    alike = np.full((1 + asked.count, COPIES), 1 / (1 + asked.count))
    known = asked.own_law or asked.weights is not None
    weights = np.asarray(asked.weights(ops, site, draw)) if asked.weights else alike
    mean = sum(w[:, None] * x for w, x in zip(weights, [drawn, *seen], strict=True))
    assert distance(mean - drawn) < 4.5 if known else distance(mean - drawn) > 4.5  # nothing weighs these alike


BITS = [e for e, (families, *_) in ROWS.items() if "Bernoulli" in families]
#: one of each class: what saturates is the site, and a baseline or an option of the estimator does not see it
FIRST = {type(e): e for e in reversed(BITS)}


@pytest.mark.parametrize(
    "estimator", [e if e is FIRST[type(e)] else pytest.param(e, marks=pytest.mark.slow) for e in BITS], ids=repr
)
def test_saturated_bernoulli_sites_stay_finite_in_float32(estimator):
    _, _, particles, _ = ROWS[estimator]

    def model():
        z = numpyro.sample("z", jdist.Bernoulli(logits=jnp.full(6, 0.2)).to_event(1))
        numpyro.sample("x", jdist.Normal(z.sum(), 1.0), obs=0.4)

    def guide():
        a = numpyro.param("a", jnp.array([-30.0, 30.0, 0.0, -30.0, 30.0, 1.0]))
        numpyro.sample("z", jdist.Bernoulli(logits=a).to_event(1))

    wrapped = jax_hook(guide, {"z": estimator})
    if isinstance(estimator, ControlVariate):
        estimator = ControlVariate(lambda z: z.sum(-1), lambda d: d.mean.sum(-1), 0.5)
        wrapped = jax_hook(guide, {"z": estimator})
    svi = numpyro.infer.SVI(model, wrapped, numpyro.optim.SGD(0.1), JaxELBO(num_particles=particles))
    result = svi.run(jax.random.key(1), 3, progress_bar=False)
    assert all(bool(jnp.all(jnp.isfinite(v))) for v in result.params.values())
    assert bool(jnp.all(jnp.isfinite(result.losses)))


HARD = (StraightThrough(), ReinMax(), GumbelStraightThrough(), RaoGumbel(3), GappedStraightThrough(), SmoothedTriple())


@pytest.mark.parametrize(
    ("estimator", "family"), [(e, f) for e in HARD for f in FAMILIES if f in ROWS[e][0]], ids=lambda x: str(x)
)
def test_a_hard_value_is_the_draw_to_the_last_bit(estimator, family):
    """Its made-up derivative adds 0; in another order of float32 sums 3 becomes 3.0000002, which is no count."""
    seen = []

    def model():
        with pyro.plate("n", 300):
            seen.append(torch_site(family, "model"))

    def guide():
        with pyro.plate("n", 300):
            torch_site(family, "guide")

    TorchELBO({"z": estimator}).loss_and_grads(model, guide)
    assert len(torch.unique(torch.cat(seen))) > 1
    for z in seen:
        assert torch.equal(z, z.round())


@pytest.mark.parametrize("p", [0.0, 1.0])
@pytest.mark.parametrize(
    "estimator",
    [
        Reinforce(LeaveOneOut()),
        DisARM(),
        Enumerate(),
        RELAX(),
        REBAR(),
        ARM(),
        ARMS(2),
        ARMS(4),
        BitFlip(),
        UGC(),
        *BIASED,
    ],
    ids=repr,
)
def test_probabilities_of_exactly_zero_and_one_stay_finite(estimator, p):
    particles = ROWS[estimator][2]

    def model():
        z = pyro.sample("z", tdist.Bernoulli(0.5))
        pyro.sample("x", tdist.Normal(z, 1.0), obs=torch.tensor(0.4))

    def guide():
        pyro.sample("z", tdist.Bernoulli(pyro.param("p", torch.tensor(p))))

    elbo = TorchELBO({"z": estimator}, num_particles=particles)
    elbo.loss_and_grads(model, guide)
    for name, value in pyro.get_param_store().named_parameters():
        assert value.grad is None or bool(torch.isfinite(value.grad).all()), name


@pytest.mark.parametrize(
    "estimator", [Enumerate(), *(e for e, (families, *_) in ROWS.items() if families == CATEGORICAL)], ids=repr
)
def test_saturated_categorical_sites_stay_finite_in_float32(estimator):
    """And so do probabilities of exactly 0 and 1, whose logits are very large in Pyro, infinite in NumPyro."""
    rows = torch.tensor([[30.0, -30.0, 0.0], [-30.0, -30.0, 30.0], [0.0, 0.0, 0.0]])
    sharp = torch.softmax(100 * rows, -1)

    def torch_model():
        z = pyro.sample("z", tdist.OneHotCategorical(logits=torch.zeros(3, 3)).to_event(1))
        k = pyro.sample("k", tdist.Categorical(torch.ones(3, 3)).to_event(1))
        pyro.sample("x", tdist.Normal(z[..., 0].sum(-1) + 1.0 * k.sum(-1), 1.0), obs=torch.tensor(0.4))

    def torch_guide():
        pyro.sample("z", tdist.OneHotCategorical(logits=pyro.param("a", rows.clone())).to_event(1))
        p = pyro.param("p", sharp.clone(), constraint=tdist.constraints.simplex)
        pyro.sample("k", tdist.Categorical(p).to_event(1))

    elbo = TorchELBO({"*": estimator})
    for _ in range(5):
        assert torch.isfinite(torch.tensor(elbo.loss_and_grads(torch_model, torch_guide)))
    for name, value in pyro.get_param_store().named_parameters():
        assert bool(torch.isfinite(value.grad).all()), name

    def model(*_):
        z = numpyro.sample("z", OneHotCategorical(logits=jnp.zeros((3, 3))).to_event(1))
        k = numpyro.sample("k", jdist.Categorical(jnp.full((3, 3), 1 / 3)).to_event(1))
        numpyro.sample("x", jdist.Normal(z[..., 0].sum(-1) + 1.0 * k.sum(-1), 1.0), obs=0.4)

    def guide(a, p):
        numpyro.sample("z", OneHotCategorical(logits=a).to_event(1))
        numpyro.sample("k", jdist.Categorical(p).to_event(1))

    def loss(a, key):
        return JaxELBO({"*": estimator}).loss(key, {}, model, guide, a, jnp.asarray(sharp.numpy()))

    many = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))
    value, gradient = many(jnp.asarray(rows.numpy()), jax.random.split(jax.random.key(0), 5))
    assert bool(jnp.all(jnp.isfinite(value)))
    assert bool(jnp.all(jnp.isfinite(gradient)))
    assert float(jnp.abs(gradient).max()) > 0  # the third row is far from decided


FEWER = (Reinforce(LeaveOneOut()), DisARM(), RELAX(), Reinforce(MovingAverage() + Learned()), StraightThrough())


@pytest.mark.parametrize(
    ("estimator", "particles"),
    [*((e, 5) for e in BITS), *((e, 3) for e in FEWER)],
    ids=repr,
)
def test_several_particles_in_a_subsampled_plate(estimator, particles):
    """The particle axis is neither the plate's (5 of each) nor a stranger to it (3 and 5): scales and networks fit."""

    def model():
        with numpyro.plate("n", 10, subsample_size=5):
            z = numpyro.sample("z", jdist.Bernoulli(0.3))
            numpyro.sample("x", jdist.Normal(1.0 * z, 1.0), obs=jnp.arange(5.0))

    def guide():
        a = numpyro.param("a", jnp.linspace(-1, 1, 5))
        with numpyro.plate("n", 10, subsample_size=5):
            numpyro.sample("z", jdist.Bernoulli(logits=a))

    elbo = JaxELBO(num_particles=particles)
    if estimator in FEWER:
        svi = numpyro.infer.SVI(model, jax_hook(guide, {"z": estimator}), numpyro.optim.SGD(1e-3), elbo)
        result = svi.run(jax.random.key(1), 3, progress_bar=False)
        assert all(bool(jnp.all(jnp.isfinite(v))) for v in result.params.values())
        assert result.params["a"].shape == (5,)

    def torch_model():
        with pyro.plate("n", 10, subsample_size=5):
            z = pyro.sample("z", tdist.Bernoulli(0.3))
            pyro.sample("x", tdist.Normal(z, 1.0), obs=torch.arange(5.0))

    def torch_guide():
        a = pyro.param("a", torch.linspace(-1, 1, 5))
        with pyro.plate("n", 10, subsample_size=5):
            pyro.sample("z", tdist.Bernoulli(logits=a))

    for vectorize in (False, True):
        loss = TorchELBO({"z": estimator}, num_particles=particles, vectorize_particles=vectorize, max_plate_nesting=1)
        svi = pyro.infer.SVI(torch_model, torch_guide, pyro.optim.SGD({"lr": 1e-3}), loss)
        for _ in range(3):
            svi.step()
        for name, value in pyro.get_param_store().named_parameters():
            assert bool(torch.isfinite(value).all()), name
