"""Every bad choice gets an error that names site, fact and fix; every poor one a warning. In both libraries."""

from __future__ import annotations

import contextlib
import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as jdist
import pyro
import pyro.distributions as tdist
import pytest
import torch
from numpyro.contrib.control_flow import scan

from ppl_estimators import (
    REBAR,
    RELAX,
    AnalyticKL,
    ControlVariate,
    DeltaMethod,
    DisARM,
    DoublyReparameterized,
    Enumerate,
    EstimatorError,
    EstimatorWarning,
    ImportanceWeighted,
    KLAnnealed,
    Learned,
    LeaveOneOut,
    MovingAverage,
    OptimalConstant,
    PastSteps,
    Pathwise,
    Reinforce,
    RELAXWithModel,
    StickingTheLanding,
    UnorderedSet,
    WakeSleep,
)
from ppl_estimators import numpyro as ours_jax
from ppl_estimators import pyro as ours_torch
from ppl_estimators.testing import assert_unbiased


class Jax:
    name = "numpyro"
    sample, plate, dist = staticmethod(numpyro.sample), staticmethod(numpyro.plate), jdist
    factor = staticmethod(numpyro.factor)
    array = staticmethod(jnp.asarray)
    ELBO, hook = ours_jax.EstimatorELBO, staticmethod(ours_jax.with_estimators)

    @staticmethod
    def one_hot(logits):
        return ours_jax.OneHotCategorical(logits=logits)

    @staticmethod
    def param(name, value):
        return numpyro.param(name, jnp.asarray(value))

    @staticmethod
    def loss(elbo, model, guide, params=None):
        return jax.value_and_grad(lambda p: elbo.loss(jax.random.key(0), p, model, guide))(params or {})[0]


class Torch:
    name = "pyro"
    sample, plate, dist = staticmethod(pyro.sample), staticmethod(pyro.plate), tdist
    factor = staticmethod(pyro.factor)
    array = staticmethod(torch.as_tensor)
    ELBO, hook = ours_torch.EstimatorELBO, staticmethod(ours_torch.with_estimators)

    @staticmethod
    def one_hot(logits):
        return tdist.OneHotCategorical(logits=logits)

    @staticmethod
    def param(name, value):
        return pyro.param(name, torch.as_tensor(value))

    @staticmethod
    def loss(elbo, model, guide, params=None):
        return elbo.loss_and_grads(model, guide)


@pytest.fixture(params=[Jax, Torch], ids=["numpyro", "pyro"])
def lib(request):
    return request.param


def program(lib, make, guide_infer=None):
    """One latent site 'z' with distribution ``make(lib)`` in model and guide."""

    def model():
        lib.sample("z", make(lib))

    def guide():
        lib.sample("z", make(lib), infer=guide_infer or {})

    return model, guide


DISTRIBUTIONS = {
    "Normal": lambda lib: lib.dist.Normal(lib.array(0.3), 1.0),
    "Bernoulli": lambda lib: lib.dist.Bernoulli(logits=lib.array(0.3)),
    "Categorical": lambda lib: lib.dist.Categorical(logits=lib.array([0.3, -0.2, 0.1])),
    "OneHot": lambda lib: lib.one_hot(lib.array([0.3, -0.2, 0.1])),
    "Poisson": lambda lib: lib.dist.Poisson(lib.array(2.0)),
    "Mixture": lambda lib: lib.dist.MixtureSameFamily(
        lib.dist.Categorical(logits=lib.array([0.3, -0.2])), lib.dist.Normal(lib.array([0.0, 2.0]), 1.0)
    ),
    "Relaxed": lambda lib: lib.dist.RelaxedBernoulli(lib.array(0.7), logits=lib.array(0.3)),
}

UNSUITABLE = [
    ("Normal", DisARM(), 1, r"site 'z': DisARM needs a Bernoulli site, got Normal\. Use Pathwise\(\)"),
    ("Categorical", DisARM(), 1, r"site 'z': DisARM needs a Bernoulli site, got Categorical"),
    ("Normal", Enumerate(), 1, r"Enumerate needs a Bernoulli or Categorical or OneHotCategorical site, got Normal"),
    (
        "Poisson",
        Enumerate(),
        1,
        r"Enumerate needs .* got Poisson.*Reinforce\(LeaveOneOut\(\)\) with num_particles=2 or more\.",
    ),
    ("Poisson", Enumerate(), 2, r"site 'z': Enumerate needs .* got Poisson.*Reinforce\(LeaveOneOut\(\)\)\."),
    (
        "Bernoulli",
        Pathwise(),
        1,
        r"site 'z': Pathwise needs a reparameterisable distribution, got Bernoulli\. Use DisARM",
    ),
    ("Poisson", StickingTheLanding(), 1, r"StickingTheLanding needs a reparameterisable distribution, got Poisson"),
    (
        "Categorical",
        REBAR(),
        1,
        r"REBAR needs .* got Categorical\. Use OneHotCategorical here, RELAX\(\), or.* of ppl_estimators\.numpyro\.",
    ),
    ("Categorical", RELAXWithModel(), 1, r"RELAXWithModel needs .* Use OneHotCategorical here, RELAX\(\), or"),
    ("Normal", RELAX(), 1, r"RELAX needs a Bernoulli or Categorical or OneHotCategorical site, got Normal"),
    ("Bernoulli", Reinforce(LeaveOneOut()), 1, r"site 'z': LeaveOneOut needs at least two particles.*num_particles=2"),
    ("Bernoulli", Reinforce(OptimalConstant()), 1, r"OptimalConstant\(\) takes its moments from the other particles"),
    ("Bernoulli", ControlVariate(abs, abs), 2, r"ControlVariate estimates its coefficient .* got num_particles=2"),
    ("Normal", ControlVariate(abs, abs), 4, r"num_particles=4, and a slope .* no variance\. Pass num_particles=5 or"),
    ("Normal", DeltaMethod(), 4, r"num_particles=4, and a slope .* no variance\. Pass num_particles=5 or more"),
    ("Mixture", Reinforce(Learned()), 1, r"Learned\(\) sees the parameters .* shows none\. Pass .* Learned\(inputs="),
    ("Relaxed", Reinforce(OptimalConstant()), 2, r"OptimalConstant needs the score in .* Use LeaveOneOut\(\) or"),
]


@pytest.mark.parametrize(("kind", "estimator", "particles", "message"), UNSUITABLE)
def test_an_estimator_that_does_not_suit_the_site(lib, kind, estimator, particles, message):
    model, guide = program(lib, DISTRIBUTIONS[kind])
    elbo = lib.ELBO({"z": estimator}, num_particles=particles)
    with pytest.raises(EstimatorError, match=message):
        lib.loss(elbo, model, guide)
    model, guide = program(lib, DISTRIBUTIONS[kind], {"estimator": estimator})
    with pytest.raises(EstimatorError, match=message):
        lib.loss(lib.ELBO(num_particles=particles), model, lib.hook(guide))


def test_an_objective_that_counts_steps_is_declared_as_advised():
    model, guide = program(Jax, DISTRIBUTIONS["Normal"])
    elbo = Jax.ELBO(objective=KLAnnealed(lambda step: step / 10))
    with pytest.raises(EstimatorError, match=r"with_estimators\(guide, objective=elbo\.objective\)\."):
        Jax.loss(elbo, model, guide)
    svi = numpyro.infer.SVI(model, Jax.hook(guide, objective=elbo.objective), numpyro.optim.Adam(0.1), elbo)
    svi.update(svi.init(jax.random.key(0)))


def test_arguments_in_another_order(lib):
    model, guide = program(lib, DISTRIBUTIONS["Bernoulli"])
    with pytest.raises(EstimatorError, match=r"Pass \(elbo, model, guide, \*args\)\."):
        assert_unbiased(model, "guide", lib.ELBO())
    with pytest.raises(EstimatorError, match=r"elbo is the class EstimatorELBO, not an ELBO\. Write EstimatorELBO\(\)"):
        assert_unbiased(lib.ELBO, model, guide)


def test_a_closed_divergence_of_no_site(lib):
    model, guide = program(lib, DISTRIBUTIONS["Normal"])
    with pytest.raises(EstimatorError, match=r"AnalyticKL: 'w' matches no latent site of the guide\. Sites: 'z'"):
        lib.loss(lib.ELBO(objective=AnalyticKL("z", "w")), model, guide)
    lib.loss(lib.ELBO(objective=AnalyticKL("z*")), model, guide)


def test_the_elbo_of_the_other_library():
    def program():
        numpyro.sample("z", jdist.Bernoulli(0.4))

    with pytest.raises(EstimatorError, match=r"SVI .* is NumPyro's\. Type: from ppl_estimators\.numpyro import"):
        numpyro.infer.SVI(program, program, numpyro.optim.Adam(0.1), ours_torch.EstimatorELBO()).init(jax.random.key(0))
    with pytest.raises(EstimatorError, match=r"SVI .* is Pyro's\. Type: from ppl_estimators\.pyro import"):
        pyro.infer.SVI(lambda: None, lambda: None, pyro.optim.Adam({}), ours_jax.EstimatorELBO()).step()


def test_a_key_that_matches_no_site(lib):
    model, guide = program(lib, DISTRIBUTIONS["Normal"])
    message = r"'w_\*' matches no latent site of the guide\. Sites: 'z'"
    with pytest.raises(EstimatorError, match="EstimatorELBO: " + message):
        lib.loss(lib.ELBO({"w_*": Pathwise()}), model, guide)
    with pytest.raises(EstimatorError, match="with_estimators: " + message):
        lib.loss(lib.ELBO(), model, lib.hook(guide, {"w_*": Pathwise()}))


def test_things_that_are_no_estimators(lib):
    with pytest.raises(TypeError, match=r"the entry for 'z' is not an estimator.*with parentheses"):
        lib.ELBO({"z": DisARM})
    with pytest.raises(TypeError, match=r"takes a mapping from site names"):
        lib.ELBO(["z"])
    with pytest.raises(TypeError, match=r"takes a mapping.*got .*DisARM'> \(write it with parentheses\)\."):
        lib.ELBO(DisARM)
    with pytest.raises(TypeError, match=r"takes a mapping.*got 5 \(particles are num_particles=5\)\."):
        lib.ELBO(5)  # as Trace_ELBO(5)
    with pytest.raises(TypeError, match=r'takes "auto" or an estimator'):
        lib.ELBO(default="automatic")
    with pytest.raises(ValueError, match=r"max_parallel=...\) needs 1 or more"):
        lib.ELBO(max_parallel=0)
    with pytest.raises(ValueError, match=r"num_particles=...\) needs 1 or more, got 0"):
        lib.ELBO(num_particles=0)


@pytest.mark.parametrize(
    "estimator",
    [Reinforce(MovingAverage()), Reinforce(Learned()), Reinforce(OptimalConstant(PastSteps(0.9))), RELAX(), REBAR()],
)
def test_numpyro_state_without_the_hook_shows_the_fix(estimator):
    model, guide = program(Jax, DISTRIBUTIONS["OneHot"])
    for elbo, wrapped in (
        (ours_jax.EstimatorELBO({"z": estimator}), guide),
        (ours_jax.EstimatorELBO({"z": estimator}), ours_jax.with_estimators(guide, {"z": Reinforce()})),
        (ours_jax.EstimatorELBO(), program(Jax, DISTRIBUTIONS["OneHot"], {"estimator": estimator})[1]),
    ):
        with pytest.raises(EstimatorError, match=r"does not declare\. Wrap the guide: guide = with_estimators\(guide"):
            Jax.loss(elbo, model, wrapped)


def test_pyro_networks_outside_svi_without_the_hook_show_the_fix():
    model, guide = program(Torch, DISTRIBUTIONS["Bernoulli"])
    elbo = ours_torch.EstimatorELBO({"z": RELAX()})
    with pytest.raises(EstimatorError, match=r"outside SVI .* Wrap the guide: guide = with_estimators\(guide"):
        elbo(model, guide)()
    assert torch.isfinite(elbo.differentiable_loss(model, ours_torch.with_estimators(guide, {"z": RELAX()})))


def test_a_latent_of_the_model_that_the_guide_does_not_draw(lib):
    def model():
        lib.sample("k", lib.dist.Bernoulli(logits=lib.array(0.3)))
        lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))

    def guide():
        lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))

    with pytest.raises(
        EstimatorError, match=r"site 'k': a latent site of the model that the guide does not draw\. Add"
    ):
        lib.loss(lib.ELBO(), model, guide)


def test_a_forgotten_site_is_summed_out_as_advised(lib):
    def model(**infer):
        lib.sample("k", lib.dist.Bernoulli(logits=lib.array(0.3)), infer=infer)

    with pytest.raises(
        EstimatorError, match=r'mark it infer=\{"enumerate": "parallel"\} in the model, or name it, Est'
    ):
        lib.loss(lib.ELBO(), model, lambda: None)
    assert abs(lib.loss(lib.ELBO(), lambda: model(enumerate="parallel"), lambda: None)) < 1e-6
    assert abs(lib.loss(lib.ELBO({"k": Enumerate()}), model, lambda: None)) < 1e-6


@pytest.mark.parametrize("side", ["model", "guide"])
def test_marks_that_cannot_be_meant(lib, side):
    def program(law, plates=(), **infer):
        return lambda: lib.sample("k", law, infer={"enumerate": "parallel", **infer})

    bits, array = lib.dist.Bernoulli, lib.array
    laws = [
        (program(bits(logits=array(0.3)), enumerate="in turn"), r"values are summed side by side; one after another"),
        (program(bits(logits=array(0.3)), num_samples=3), "Leave num_samples out"),
        (program(lib.dist.Normal(array(0.3), 1.0)), "Normal has no finite number of them. Remove the mark"),
        (program(bits(logits=array([0.3, 1.0])).to_event(1)), "several elements in event dimensions.*in a plate"),
    ]
    for marked, message in laws:
        with pytest.raises(EstimatorError, match=f"site 'k': .*{message}"):
            lib.loss(lib.ELBO(), marked, marked if side == "guide" else lambda: None)


def test_a_name_for_a_site_that_a_mark_sums_over(lib):
    def bit(**infer):
        return lambda: lib.sample("k", lib.dist.Bernoulli(logits=lib.array(0.3)), infer=infer)

    message = r"site 'k': EstimatorELBO names DisARM\(\) for it.*sums over all\. Leave one of them out"
    marked = bit(enumerate="parallel")
    for guide in (marked, lambda: None):
        with pytest.raises(EstimatorError, match=message):
            lib.loss(lib.ELBO({"k": DisARM()}), marked, guide)
        lib.loss(lib.ELBO({"*": DisARM()}), marked, guide)  # a pattern is for those that are drawn
        lib.loss(lib.ELBO({"k": Enumerate()}), marked, guide)
    lib.loss(lib.ELBO({"k": DisARM()}), marked, bit())  # the model's mark is of no account there


def test_relaxed_values_upstream_of_a_site_that_cannot_be_relaxed(lib):
    def program():
        z = lib.sample("z", lib.dist.Bernoulli(logits=lib.array(0.3)))
        lib.sample("k", lib.dist.Poisson(1.0 + z))

    guide = lib.hook(program, {"z": REBAR(), "k": Reinforce(LeaveOneOut())})
    with pytest.raises(EstimatorError, match=r"site 'z': REBAR .* site 'k' \(Poisson\) depends on it"):
        lib.loss(lib.ELBO(num_particles=2), program, guide)


def test_a_name_used_twice(lib):
    def twice():
        lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
        lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))

    with pytest.raises(EstimatorError, match=r"site 'z': the name is used twice"):
        lib.loss(lib.ELBO(), twice, twice)


def test_bounds_refuse_what_estimates_the_elbo(lib):
    model, guide = program(lib, DISTRIBUTIONS["Bernoulli"])
    with pytest.raises(EstimatorError, match=r"bound of several particles, got num_particles=1\. Pass num_particles=2"):
        lib.loss(lib.ELBO(objective=ImportanceWeighted()), model, guide)
    for estimator in (Reinforce(OptimalConstant()), Reinforce(LeaveOneOut() + MovingAverage())):
        elbo = lib.ELBO({"z": estimator}, objective=ImportanceWeighted(), num_particles=2)
        with pytest.raises(EstimatorError, match=r"site 'z': .* compares particles with one another, and under"):
            lib.loss(elbo, model, lib.hook(guide, {"z": estimator}))
    model, guide = program(lib, DISTRIBUTIONS["Normal"])
    options = {"objective": ImportanceWeighted(), "num_particles": 2, "average_model": True}
    with pytest.raises(EstimatorError, match=r"site 'z': DoublyReparameterized\(\) under a bound weighs the path"):
        lib.loss(lib.ELBO(DoublyReparameterized(), **options), model, guide)


def test_a_module_that_cannot_be_told_of_dreams():
    class Guide(pyro.nn.PyroModule):
        def forward(self):
            pyro.sample("z", tdist.Normal(pyro.param("a", torch.tensor(0.2)), 1.0))

    elbo = ours_torch.EstimatorELBO(objective=WakeSleep(sleep_phi=0.5), num_particles=2)
    with pytest.raises(EstimatorError, match=r"calls the guide with observations="):
        elbo.loss_and_grads(lambda: pyro.sample("z", tdist.Normal(torch.tensor(0.0), 1.0)), Guide())


def test_a_minibatch_of_a_part_of_every_weight(lib):
    """Both fixes of the message, as typed; and what no latent moves may stand anywhere."""

    def model(part=2, outside=True):
        w = lib.sample("w", lib.dist.Normal(lib.array(0.0), 1.0)) if outside else lib.array(0.5)
        lib.factor("prior", lib.array(-0.3))
        with lib.plate("data", 4, subsample_size=part):
            z = lib.sample("z", lib.dist.Normal(w, 1.0))
            lib.sample("x", lib.dist.Normal(z, 1.0), obs=lib.array([0.5] * (part or 4)))

    def guide(part=2, outside=True):
        if outside:
            lib.sample("w", lib.dist.Normal(lib.array(0.1), 1.0))
        with lib.plate("data", 4, subsample_size=part):
            lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))

    options = {"objective": ImportanceWeighted(), "num_particles": 2}
    with pytest.raises(EstimatorError, match=r"plate 'data': .* and 'w' outside of it is part of the weight of every"):
        lib.loss(lib.ELBO(**options), model, guide)
    assert lib.loss(lib.ELBO(**options), lambda: model(None), lambda: guide(None)) > 0
    assert lib.loss(lib.ELBO(num_particles=2), model, guide) > 0
    assert lib.loss(lib.ELBO(**options), lambda: model(outside=False), lambda: guide(outside=False)) > 0


def test_a_minibatch_of_a_loop_over_a_plate():
    def guide(part=2):
        for i in pyro.plate("data", 4, subsample_size=part):
            pyro.sample(f"z_{i}", tdist.Normal(torch.tensor(0.0), 1.0))

    def model(part=2):
        for i in pyro.plate("data", 4, subsample_size=part):
            z = pyro.sample(f"z_{i}", tdist.Normal(torch.tensor(0.2), 1.0))
            pyro.sample(f"x_{i}", tdist.Normal(z, 1.0), obs=torch.tensor(0.5))

    bound = ours_torch.EstimatorELBO(objective=ImportanceWeighted(), num_particles=2)
    for refused in (bound.loss, ours_torch.EstimatorELBO().evaluate):
        with pytest.raises(EstimatorError, match=r"plate 'data': .* a loop over its elements has one weight for all"):
            refused(model, guide)
    assert bound.loss(lambda: model(None), lambda: guide(None)) > 0
    assert ours_torch.EstimatorELBO().loss_and_grads(model, guide) > 0


def test_dreams_that_cannot_be(lib):
    """What the guide cannot be told, what no draw of the model has, and what the model has no value for."""

    def observed(factor=0.0):
        z = lib.sample("z", lib.dist.Bernoulli(logits=lib.array(0.3)))
        lib.factor("f", factor * z if factor else lib.array(0.1))
        lib.sample("x", lib.dist.Bernoulli(logits=1.0 * z), obs=lib.array(1.0))

    def deaf():
        lib.sample("z", lib.dist.Bernoulli(logits=lib.param("a", lib.array(0.2))))

    def awake(observations=None):
        deaf()

    def more(observations=None):
        deaf()
        lib.sample("u", lib.dist.Normal(lib.array(0.0), 1.0), infer={"is_auxiliary": True})

    elbo = lib.ELBO(objective=WakeSleep(sleep_phi=0.5), num_particles=2)
    assert lib.loss(elbo, observed, awake, {"a": 0.2}) > 0
    with pytest.raises(EstimatorError, match=r"calls the guide with observations=.* Give it one, observations=None"):
        lib.loss(elbo, observed, deaf, {"a": 0.2})
    with pytest.raises(EstimatorError, match=r"site 'f': a factor of the model that depends on what is drawn"):
        lib.loss(elbo, lambda: observed(0.5), awake, {"a": 0.2})
    with pytest.raises(EstimatorError, match=r"site 'u': drawn by the guide only"):
        lib.loss(elbo, observed, more, {"a": 0.2})


def test_plain_score_function_with_one_particle_warns(lib):
    model, guide = program(lib, DISTRIBUTIONS["Poisson"])
    with pytest.warns(EstimatorWarning, match=r"site 'z': score function without a baseline and with one particle"):
        lib.loss(lib.ELBO({"z": Reinforce()}), model, guide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lib.loss(lib.ELBO({"z": Reinforce(LeaveOneOut())}, num_particles=2), model, guide)


def test_a_warning_is_one_for_all_sites_and_points_at_the_users_line(lib):
    def guide(law=lambda: lib.dist.Bernoulli(logits=lib.array(0.3))):
        for i in range(5):
            lib.sample(f"z{i}", law())

    def labels():
        guide(lambda: lib.dist.Categorical(logits=lib.array([0.3, 0.1])))

    with pytest.warns(EstimatorWarning) as said:
        lib.loss(lib.ELBO(default=Reinforce()), guide, guide)
    (only,) = said
    assert only.filename == __file__
    assert re.match(
        r"sites 'z0', 'z1', 'z2', ... \(5 sites\): .*DisARM\(\) \(1 for all.*num_particles=2", str(only.message)
    )
    with pytest.warns(EstimatorWarning, match=r"UnorderedSet\(3\) \(10\)"):
        lib.loss(lib.ELBO(default=UnorderedSet(1)), labels, labels)


def test_a_cost_that_is_not_finite_is_named_and_poisons_nothing(lib):
    """The site is named; every running average is as it was; the next good step goes on from there."""

    def model(x):
        z = lib.sample("z", lib.dist.Bernoulli(logits=lib.array(0.3)))
        lib.sample("x", lib.dist.Normal(z, 1.0), obs=x)

    def guide(x):
        lib.sample("z", lib.dist.Bernoulli(logits=lib.param("a", 0.4)))

    wrapped = lib.hook(guide, {"z": Reinforce(MovingAverage())})
    states = []
    data = [(lib.array(x), x != x) for x in (0.7, -0.2, float("nan"), 1.1)]
    if lib is Jax:
        svi = numpyro.infer.SVI(model, wrapped, numpyro.optim.SGD(0.0), lib.ELBO(debug=True))
        state = svi.init(jax.random.key(0), data[0][0])
        update = jax.jit(svi.stable_update)
    else:
        elbo = lib.ELBO()
    with pyro.validation_enabled(False):
        for x, broken in data:
            with _expected(broken):
                if lib is Jax:
                    state, _ = update(state, x)
                    jax.effects_barrier()
                    states.append(float(state.mutable_state["z$state"]["mean"]))
                else:
                    elbo.loss_and_grads(model, wrapped, x)
                    states.append(float(pyro.get_param_store()["z$state.mean"].detach()))
    assert states[0] != 0
    assert states[2] == states[1]
    assert abs(states[3]) < 100


def _expected(broken):
    message = r"site 'x' \(log p\): the cost is not finite"
    return pytest.warns(EstimatorWarning, match=message) if broken else contextlib.nullcontext()


@pytest.mark.parametrize("library", ["pyro", "numpyro"])
@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (DisARM, "write it with parentheses"),
        ("DisARM", "write the estimator itself, not its name"),
        (MovingAverage(), r"a baseline goes inside: Reinforce\(MovingAverage\(\)\)"),
    ],
    ids=["class", "name", "baseline"],
)
def test_what_a_site_asks_for_must_be_an_estimator(library, wrong, hint):
    sample, bernoulli = (pyro.sample, tdist.Bernoulli) if library == "pyro" else (numpyro.sample, jdist.Bernoulli)

    def model():
        sample("z", bernoulli(0.4))

    def guide():
        sample("z", bernoulli(0.4), infer={"estimator": wrong})

    with pytest.raises(EstimatorError, match=rf"site 'z': infer=.* is not an estimator.*{hint}.*Give one"):
        if library == "pyro":
            ours_torch.EstimatorELBO().loss(model, guide)
        else:
            ours_jax.EstimatorELBO().loss(jax.random.key(0), {}, model, guide)


MEANT_FOR_THE_GUIDE = [
    ({"estimator": DisARM()}, r'or guide = with_estimators\(guide, \{"z": DisARM\(\)\}\)'),
    ({"estimators": DisARM()}, r"with_estimators"),
    ({"kl": "analytic"}, r'EstimatorELBO\(objective=AnalyticKL\("z"\)\)'),
    ({"baseline": {"use_decaying_avg_baseline": True}}, r"guide's site 'z'\."),
]


@pytest.mark.parametrize(("infer", "fix"), MEANT_FOR_THE_GUIDE, ids=["estimator", "misspelt", "kl", "baseline"])
def test_what_the_models_site_asks_for_is_not_ignored(lib, infer, fix):
    """Unless it is said where it counts, too; the fix works as it stands."""
    model = program(lib, DISTRIBUTIONS["Bernoulli"], infer)[1]
    guide = program(lib, DISTRIBUTIONS["Bernoulli"])[1]
    with pytest.raises(EstimatorError, match=rf"site 'z': infer=.* stands at the site of the model.* {fix}"):
        lib.loss(lib.ELBO(), model, guide)
    if "kl" in infer:
        lib.loss(lib.ELBO(objective=AnalyticKL("z")), model, guide)
    elif "estimators" not in infer:
        lib.loss(lib.ELBO({"z": DisARM()}), model, guide)
        lib.loss(lib.ELBO(), model, lib.hook(guide, {"z": DisARM()}))
        lib.loss(lib.ELBO(), model, program(lib, DISTRIBUTIONS["Bernoulli"], {"estimator": Enumerate()})[1])


def test_what_a_step_of_the_models_scan_asks_for_is_not_ignored():
    """Beside a plate."""

    def part(**infer):
        def step(carry, x):
            numpyro.sample("z", jdist.Bernoulli(0.3 + 0.2 * x), infer=infer)
            return carry, None

        def both():
            with numpyro.plate("n", 2):
                numpyro.sample("w", jdist.Normal(0.0, 1.0))
            scan(step, 0.0, jnp.ones(2))

        return both

    with pytest.raises(EstimatorError, match=r"site 'z': infer=.* stands at the site of the model"):
        Jax.loss(Jax.ELBO(), part(estimator=DisARM()), part())
    Jax.loss(Jax.ELBO(), part(estimator=DisARM()), part(estimator=Enumerate()))


WORDS = [
    ({"estimators": DisARM()}, r'by a word that nothing reads\. Write infer=\{"estimator": DisARM\(\)\}'),
    ({"kl": "analytical"}, r'is not known. Write infer=\{"kl": "analytic"\}'),
    ({"baseline": MovingAverage()}, r'of Pyro.*Write infer=\{"estimator": Reinforce\('),
    (
        {"enumerate": "parallel", "estimator": DisARM()},
        r"marked .*sums over all its values, beside .*Leave one",
    ),
]


@pytest.mark.parametrize(("infer", "message"), WORDS, ids=["misspelt", "kl", "baseline", "mark"])
def test_words_that_nothing_reads(lib, infer, message):
    with pytest.raises(EstimatorError, match=rf"site 'z': .*{message}"):
        lib.loss(lib.ELBO(), *program(lib, DISTRIBUTIONS["Bernoulli"], infer))


def test_numpyro_reads_no_baseline():
    with pytest.raises(EstimatorError, match=r"site 'z': .* a word of Pyro's"):
        Jax.loss(Jax.ELBO(), *program(Jax, DISTRIBUTIONS["Bernoulli"], {"baseline": {"baseline_beta": 0.5}}))


def test_a_site_that_only_the_model_has_may_ask_to_be_summed_out(lib):
    """As the ELBO may for it."""

    def model(infer):
        z = lib.sample("z", lib.dist.Bernoulli(lib.array(0.3)), infer=infer)
        lib.sample("x", lib.dist.Bernoulli(0.2 + 0.6 * z), obs=lib.array(1.0))

    wanted = -math.log(0.7 * 0.2 + 0.3 * 0.8)
    for infer, elbo in (({"estimator": Enumerate()}, lib.ELBO()), ({}, lib.ELBO({"z": Enumerate()}))):
        assert float(lib.loss(elbo, lambda infer=infer: model(infer), lambda: None)) == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(EstimatorError, match="site 'z': a latent site of the model that the guide does not draw"):
        lib.loss(lib.ELBO(), lambda: model({"estimator": DisARM()}), lambda: None)
