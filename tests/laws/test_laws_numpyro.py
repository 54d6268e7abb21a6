"""The law matrix in NumPyro; the same tests for Pyro are in `test_laws_pyro.py`."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from measure import (
    Measured,
    assert_exact,
    assert_exact_over_states,
    assert_frequencies,
    assert_mean_loss,
    assert_unbiased,
    moving_average_gradients,
    numpyro_measure,
    states_of,
    with_power,
)
from mixes import (
    AVERAGED,
    EVERY_DRAW,
    EVERY_STATE,
    LOO,
    ON_AVERAGE,
    PAIRS_OF_STATES,
    Mix,
    every_pair,
    kept,
    pairwise,
)
from numpyro import optim
from numpyro.infer import SVI
from scipy import stats

from ppl_estimators import (
    REBAR,
    RELAX,
    ControlVariate,
    DisARM,
    Enumerate,
    ImportanceWeighted,
    LeaveOneOut,
    MovingAverage,
    OptimalConstant,
    PastSteps,
    Reinforce,
    RELAXWithModel,
    Renyi,
)
from ppl_estimators.core.errors import EstimatorError, EstimatorWarning
from ppl_estimators.numpyro import EstimatorELBO, with_estimators
from ppl_estimators.testing import zoo
from ppl_estimators.testing.zoo import CASES, NumPyroLanguage
from ppl_estimators.testing.zoo.oracle import gradient, sigmoid

pytestmark = pytest.mark.filterwarnings("ignore:.*score function without a baseline")


def measure(name: str, mix: Mix, draws: int, **options: Any) -> Any:
    case = CASES[name]
    chosen = None if mix.hook else mix.estimators
    elbo = EstimatorELBO(chosen, num_particles=mix.particles, **options)
    return numpyro_measure(elbo, case, draws, hook=mix.estimators if mix.hook else None)


def program(name: str, **options: Any) -> tuple[Any, Any, dict[str, Any]]:
    case = CASES[name]
    params = {k: jnp.asarray(v) for k, v in case.params.items()}
    return *case.program(NumPyroLanguage(), case.params, **options), params


# Gradients.


@pytest.mark.parametrize(("name", "mix"), every_pair(EVERY_STATE))
def test_exact_over_states(name: str, mix: Mix) -> None:
    """Laws 1 to 4, 8, 10, 12: nothing statistical in it."""
    assert_exact_over_states(measure(name, mix, 20_000)(0), CASES[name])


@pytest.mark.parametrize(("name", "vectorize"), [*((name, True) for name in PAIRS_OF_STATES), ("chain", False)])
def test_leave_one_out_is_exact_over_pairs_of_states(name: str, vectorize: bool) -> None:
    case = zoo.particles(CASES[name], 2)
    elbo = EstimatorELBO({"z*": LOO}, num_particles=2, vectorize_particles=vectorize)
    assert_exact_over_states(numpyro_measure(elbo, case, 5_000)(0), case)


@pytest.mark.parametrize(("name", "mix"), every_pair(EVERY_DRAW))
def test_every_draw_is_exact(name: str, mix: Mix) -> None:
    exact = CASES[name].exact_gradient()
    assert_exact(measure(name, mix, 50)(0), {k: exact[k] for k in mix.exact})


@pytest.mark.parametrize(("name", "mix"), pairwise(ON_AVERAGE, "numpyro"))
def test_unbiased(name: str, mix: Mix) -> None:
    case = CASES[name]
    measured = with_power(measure(name, mix, mix.draws), case.exact_gradient())
    assert_unbiased(measured, case.exact_gradient())
    assert_mean_loss(measured, case)


@pytest.mark.parametrize(("name", "mix"), pairwise(AVERAGED, "numpyro"))
def test_the_averaged_model_is_unbiased(name: str, mix: Mix) -> None:
    case = CASES[name]
    measured = with_power(measure(name, mix, mix.draws, average_model=True), case.exact_gradient())
    assert_unbiased(measured, case.exact_gradient())
    assert_mean_loss(measured, case)


# Law 1: the value.

VALUES = [
    Mix("reinforce", {"*": Reinforce()}),
    Mix("disarm", {"*": DisARM()}),
    Mix("enumerate", {"*": Enumerate()}),
    kept("moving_average", {"*": Reinforce(MovingAverage())}),
    kept("rebar", {"*": REBAR()}),
    kept("relax", {"*": RELAXWithModel()}),
]


@pytest.mark.parametrize("mix", VALUES, ids=lambda mix: mix.name)
def test_loss_is_the_elbo_of_the_particle(mix: Mix) -> None:
    """Each loss is −f of some state, and states come up as often as q says."""
    assert_frequencies(measure("chain", mix, 50_000)(0), CASES["chain"])


def test_loss_is_the_elbo_of_the_particle_where_the_model_is_averaged() -> None:
    assert_frequencies(measure("chain", VALUES[1], 20_000, average_model=True)(0), CASES["chain"])


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("mix", VALUES[3:], ids=lambda mix: mix.name)
def test_loss_of_two_particles_is_their_mean(mix: Mix, vectorize: bool) -> None:
    two = Mix(mix.name, mix.estimators, particles=2, hook=mix.hook)
    losses = measure("single", two, 100, vectorize_particles=vectorize)(0).losses
    f = np.real(CASES["single"].table(CASES["single"].params)[1])
    possible = -np.array([f[0], (f[0] + f[1]) / 2, f[1]])
    assert np.abs(losses[:, None] - possible).min(-1).max() < 1e-9


@pytest.mark.parametrize("mix", VALUES, ids=lambda mix: mix.name)
def test_evaluate_is_the_elbo_of_a_particle(mix: Mix) -> None:
    """`SVI.evaluate` passes no mutable state."""
    case = CASES["chain"]
    model, guide, _ = program("chain")
    svi = SVI(model, with_estimators(guide, mix.estimators), optim.SGD(0.0), EstimatorELBO())
    states_of(np.array([svi.evaluate(svi.init(jax.random.key(i))) for i in range(3)]), case)


# Law 2: the score is not masked.


def test_the_score_of_a_masked_normal_at_single_draws() -> None:
    """loss = ½ (x − z)² + ½ log 2π, gradient = loss · (z − m): z from the one, put into the other."""
    x, m = 1.3, jnp.asarray(0.4)

    def model() -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide() -> None:
        numpyro.sample("z", dist.Normal(numpyro.param("m", m), 1.0).mask(False))

    def loss(m: Any, key: Any) -> Any:
        return EstimatorELBO({"z": Reinforce()}).loss(key, {"m": m}, model, guide)

    many = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))
    losses, gradients = many(m, jax.random.split(jax.random.key(0), 20))
    z = m + gradients / losses
    np.testing.assert_allclose(losses, 0.5 * (x - z) ** 2 + 0.5 * np.log(2 * np.pi), rtol=1e-10)


# Law 3 and section 5: elements of a plate are independent, and gradients know it.


def test_plate_elements_get_their_own_cost() -> None:
    case = CASES["local"]
    drawn = measure("local", Mix("plain", {"z": Reinforce()}), 1_000)(0).gradients["a"]
    a = case.params["a"]
    for e in range(3):
        expected = [-zoo.dimensions.local_costs(np.full(3, z), a)[e] * (z - sigmoid(a[e])) for z in (0, 1)]
        distance = np.abs(drawn[:, e, None] - np.array(expected))
        assert distance.min(-1).max() < 1e-10
        assert set(distance.argmin(-1)) == {0, 1}


@pytest.mark.parametrize("number", [2, 12])  # few terms are added up, many are a product with a matrix
def test_a_site_is_charged_with_nothing_that_it_cannot_move(number: int) -> None:
    """Sites side by side: the gradient of each is one of two, for its own values, whatever the others are."""
    a, x = np.linspace(-1.0, 1.5, number), np.linspace(2.0, -1.0, number)

    def model() -> None:
        for i in range(number):
            z = numpyro.sample(f"z{i}", dist.Bernoulli(logits=jnp.asarray(-0.4)))
            numpyro.sample(f"x{i}", dist.Normal(1.5 * z, 1.0), obs=jnp.asarray(x[i]))

    def guide() -> None:
        logits = numpyro.param("a", jnp.asarray(a))
        for i in range(number):
            numpyro.sample(f"z{i}", dist.Bernoulli(logits=logits[i]))

    def loss(a: Any, key: Any) -> Any:
        return EstimatorELBO({"*": Reinforce()}).loss(key, {"a": a}, model, guide)

    gradients = jax.jit(jax.vmap(jax.grad(loss), in_axes=(None, 0)))
    drawn = np.asarray(gradients(jnp.asarray(a), jax.random.split(jax.random.key(0), 60)))
    for i in range(number):
        f = [stats.bernoulli.logpmf(z, sigmoid(-0.4)) + stats.norm.logpdf(x[i], 1.5 * z)
             - stats.bernoulli.logpmf(z, sigmoid(a[i])) for z in (0, 1)]  # fmt: skip
        distance = np.abs(drawn[:, i, None] - [-f[z] * (z - sigmoid(a[i])) for z in (0, 1)])
        assert distance.min(-1).max() < 1e-10
        assert set(distance.argmin(-1)) == {0, 1}


@pytest.mark.xfail(strict=True, reason="a broken promise, of which a warning says so; docs/why.md")
def test_total_of_a_plate_by_arithmetic() -> None:
    """z_e acts on x_e' of its own plate through z.sum(), with no site on the way."""
    assert_exact_over_states(measure("summed", Mix("reinforce", {"*": Reinforce()}), 5_000)(0), CASES["summed"])


# Law 6: baselines are of the past.


@pytest.mark.parametrize("particles", [1, 3])
def test_moving_average_is_of_the_past(particles: int) -> None:
    case = CASES["single"]
    model, guide, params = program("single")
    guide = with_estimators(guide, {"z": Reinforce(MovingAverage(0.8))})
    elbo = EstimatorELBO(num_particles=particles)
    state = SVI(model, guide, optim.SGD(0.0), elbo).init(jax.random.key(0)).mutable_state

    @jax.jit
    def step(state: Any, key: Any) -> Any:
        def loss(params: Any) -> Any:
            out = elbo.loss_with_mutable_state(key, {**params, **state}, model, guide)
            return out["loss"], out["mutable_state"]

        return jax.value_and_grad(loss, has_aux=True)(params)

    losses, gradients = [], []
    for key in jax.random.split(jax.random.key(3), 12):
        (loss, state), grad = step(state, key)
        losses.append(float(loss))
        gradients.append(float(grad["a"]))
    expected = moving_average_gradients(case, np.array(losses), particles, 0.8)
    assert len(set(np.round(losses, 9))) > 1
    np.testing.assert_allclose(gradients, expected, atol=1e-10)


@pytest.mark.parametrize("baseline", [MovingAverage(0.8), OptimalConstant(PastSteps(0.8))], ids=repr)
def test_average_of_minibatches_of_any_size(baseline: Any) -> None:
    """B9: a smaller last minibatch, other numbers of particles: one average all the same."""

    def model(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Bernoulli(logits=-0.4))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def plain(x: Any) -> None:
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("a", 0.7)))

    guide = with_estimators(plain, {"z": Reinforce(baseline)})
    svi = SVI(model, guide, optim.SGD(0.0), EstimatorELBO())
    state = svi.init(jax.random.key(0), jnp.ones(8)).mutable_state
    structure = jax.tree.map(jnp.shape, state)
    for size, particles in ((8, 1), (5, 1), (5, 3), (1, 2)):
        elbo = EstimatorELBO(num_particles=particles)
        step = jax.jit(lambda key, held, x, elbo=elbo: elbo.loss_with_mutable_state(key, held, model, guide, x))
        out = step(jax.random.key(size), {"a": jnp.asarray(0.7), **state}, jnp.linspace(-1.0, 2.0, size))
        state = out["mutable_state"]
        assert jnp.isfinite(out["loss"]) and jax.tree.map(jnp.shape, state) == structure


@pytest.mark.parametrize(
    "baseline",
    [MovingAverage(0.5), OptimalConstant(PastSteps(0.5))],
    ids=repr,
)
def test_unbiased_with_state_of_five_steps(baseline: Any) -> None:
    """Chains of six steps from the start; the last gradient is exact on average."""
    spec = Reinforce(baseline)
    assert_unbiased(*six_steps(spec))


def test_unbiased_with_a_coefficient_of_five_steps() -> None:
    """Law 7 with a coefficient estimated from the past."""
    spec = ControlVariate(lambda z: 2.0 * z, lambda d: 2.0 * d.mean, PastSteps(0.5))
    assert_unbiased(*six_steps(spec))


def six_steps(spec: Any) -> tuple[Measured, dict[str, np.ndarray]]:
    case = CASES["chain"]
    model, guide, params = program("chain")
    guide = with_estimators(guide, {"*": spec})
    elbo = EstimatorELBO()
    state = SVI(model, guide, optim.SGD(0.0), elbo).init(jax.random.key(0)).mutable_state

    def loss(params: Any, state: Any, key: Any) -> Any:
        out = elbo.loss_with_mutable_state(key, {**params, **state}, model, guide)
        return out["loss"], out["mutable_state"]

    def step(state: Any, key: Any) -> Any:
        (value, state), grad = jax.value_and_grad(loss, has_aux=True)(params, state, key)
        return state, (value, grad)

    @jax.jit
    @jax.vmap
    def chain(key: Any) -> Any:
        _, (losses, gradients) = jax.lax.scan(step, state, jax.random.split(key, 6))
        return losses[-1], jax.tree.map(lambda g: g[-1], gradients)

    def measure_chains(seed: int) -> Measured:
        losses, gradients = chain(jax.random.split(jax.random.key(seed), 100_000))
        return Measured(np.asarray(losses), {k: np.asarray(v) for k, v in gradients.items()})

    return with_power(measure_chains, case.exact_gradient()), case.exact_gradient()


@pytest.mark.parametrize("first", [LeaveOneOut(), OptimalConstant()], ids=repr)
@pytest.mark.parametrize("second", [LeaveOneOut(), OptimalConstant()], ids=repr)
def test_two_baselines_of_the_other_particles_are_refused(first: Any, second: Any) -> None:
    """The second is fitted to what the first leaves of the others' costs, and that has seen this particle's."""
    with pytest.raises(ValueError, match=r"other particles"):
        mix = Mix("sum", {"z": Reinforce(first + second)}, particles=4)
        measure("single", mix, 2)(0)


# Law 7, at single draws: (f − c h) ∇log q + c ∇E[h], by hand.


def test_control_variate_adds_back_its_mean() -> None:
    case = CASES["single"]
    mix = Mix("h", {"z": ControlVariate(lambda z: 2.0 * z, lambda d: 2.0 * d.mean, 0.7)})
    measured = measure("single", mix, 100)(0)
    z = states_of(measured.losses, case)
    f, p = np.real(case.table(case.params)[1]), sigmoid(case.params["a"])
    expected = -((f[z] - 0.7 * 2.0 * z) * (z - p) + 0.7 * 2.0 * p * (1 - p))
    np.testing.assert_allclose(measured.gradients["a"], expected, atol=1e-10)


# Law 8: the bounds keep the gradient of −log q.

BOUNDS = [
    ("single", 2, ImportanceWeighted()),
    ("single", 3, ImportanceWeighted()),
    ("single", 2, Renyi(0.5)),
    ("single", 3, Renyi(2.0)),
    ("single", 2, Renyi(-0.5)),
    ("chain", 2, ImportanceWeighted()),
    ("chain", 2, Renyi(0.5)),
    ("event", 2, ImportanceWeighted()),
]


@pytest.mark.parametrize(("name", "particles", "objective"), BOUNDS)
def test_bound_is_exact_over_states(name: str, particles: int, objective: Any) -> None:
    """B6: gradients in the guide's and the model's parameters."""
    case = zoo.bound(CASES[name], particles, objective.alpha)
    elbo = EstimatorELBO(num_particles=particles, objective=objective)
    assert_exact_over_states(numpyro_measure(elbo, case, 40_000)(0), case)


def test_bound_of_the_estimator_that_it_takes_by_itself() -> None:
    case = zoo.bound(CASES["single"], 2, 0.0)
    elbo = EstimatorELBO(LOO, num_particles=2, objective=ImportanceWeighted())
    assert_exact_over_states(numpyro_measure(elbo, case, 5_000)(0), case)


@pytest.mark.parametrize("objective", [ImportanceWeighted(), Renyi(0.5)], ids=repr)
def test_bound_with_pathwise_and_score_sites(objective: Any) -> None:
    grid = replace(CASES["mixed"], table=zoo.sites.mixed_grid)
    case = replace(zoo.bound(grid, 2, objective.alpha), table=None)
    elbo = EstimatorELBO(num_particles=2, objective=objective)
    measured = with_power(numpyro_measure(elbo, case, 100_000), case.exact_gradient())
    assert_unbiased(measured, case.exact_gradient())
    assert_mean_loss(measured, case)


def test_bound_per_element_of_a_plate_around_everything() -> None:
    base = zoo.bound(CASES["single"], 2, 0.0)
    case = zoo.copies(base, 4)
    elbo = EstimatorELBO(num_particles=2, objective=ImportanceWeighted())
    measured = with_power(numpyro_measure(elbo, case, 50_000), case.exact_gradient())
    assert_unbiased(measured, case.exact_gradient())


# Law 9: one minibatch a step.


def distance_to(values: np.ndarray, possible: np.ndarray) -> np.ndarray:
    return np.abs(np.ravel(values)[:, None] - possible).min(-1)


@pytest.mark.parametrize(
    ("particles", "vectorize"), [(1, True), pytest.param(3, True, marks=pytest.mark.slow), (3, False)]
)
@pytest.mark.parametrize("where", ["minibatch_local", "minibatch_global"])
def test_counterfactual_runs_see_the_same_minibatch(where: str, vectorize: bool, particles: int) -> None:
    """Enumerated, the gradient is exact for the minibatch: there are 15 of them."""
    elbo = EstimatorELBO({"z": Enumerate()}, num_particles=particles, vectorize_particles=vectorize)
    measured = numpyro_measure(elbo, CASES[where], 200)(0)
    assert distance_to(measured.gradients["a"], zoo.minibatches.minibatch_gradients()).max() < 1e-9
    assert len(set(np.round(np.ravel(measured.gradients["a"]), 6))) == 15


def test_antithetic_run_sees_the_same_minibatch() -> None:
    measured = numpyro_measure(EstimatorELBO({"z": DisARM()}), CASES["minibatch_global"], 500)(0)
    p = sigmoid(zoo.minibatches.BATCH_LOGIT)
    # ½ Δ σ(|a|) where b ≠ b̃, 0 where they agree; minibatch_gradients() is −p (1 − p) Δ
    possible = np.append(zoo.minibatches.minibatch_gradients() / (1 - p) / 2, 0.0)
    assert distance_to(measured.gradients["a"], possible).max() < 1e-9


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("where", ["minibatch_local", "minibatch_global"])
def test_particles_see_the_same_minibatch(where: str, vectorize: bool) -> None:
    model, guide, params = program(where, slope=0.0)
    elbo = EstimatorELBO(num_particles=4, vectorize_particles=vectorize)
    loss = jax.jit(jax.vmap(lambda key: elbo.loss(key, params, model, guide)))
    losses = np.asarray(loss(jax.random.split(jax.random.key(0), 200)))
    assert distance_to(losses, zoo.minibatches.minibatch_losses()).max() < 1e-9
    assert len(set(np.round(losses, 6))) == 15


@pytest.mark.parametrize("where", ["minibatch_local", "minibatch_global"])
def test_minibatches_are_drawn_uniformly(where: str) -> None:
    """Law 2 with random subsampling: the mean over minibatches is the full gradient."""
    measured = numpyro_measure(EstimatorELBO({"z": Enumerate()}), CASES[where], 20_000)
    exact = {"a": np.mean(zoo.minibatches.minibatch_gradients())}
    assert_unbiased(with_power(measured, exact), exact)


# Law 11: one bad step.

KEEPERS = [
    Reinforce(MovingAverage(0.8)),
    Reinforce(OptimalConstant(PastSteps(0.8))),
    ControlVariate(lambda z: 2.0 * z, lambda d: 2.0 * d.mean, PastSteps(0.8)),
    RELAX(hidden=4),
]


@pytest.mark.parametrize(
    ("spec", "shift"), list(zip(KEEPERS, [np.inf, np.nan, np.inf, np.nan], strict=True)),
    ids=["average", "optimal", "control", "relax"],
)  # fmt: skip
def test_a_bad_step_moves_no_state(spec: Any, shift: float) -> None:
    model, guide, _ = program("spoiled")
    guide = with_estimators(guide, {"z": spec})
    svi = SVI(model, guide, optim.SGD(0.0), EstimatorELBO(debug=True))
    state = svi.init(jax.random.key(0), 0.0)
    update = jax.jit(svi.update)
    for _ in range(3):
        state, _ = update(state, 0.0)
    before = jax.tree.map(np.asarray, state.mutable_state)
    with pytest.warns(EstimatorWarning, match=r"'x'.*not finite"):
        state, loss = update(state, shift)
        jax.effects_barrier()
    assert not np.isfinite(loss)
    after = jax.tree.map(np.asarray, state.mutable_state)
    assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(after))
    state = state._replace(optim_state=svi.init(jax.random.key(1), 0.0).optim_state)
    for _ in range(12):  # a moving average stands still while draws repeat
        state, loss = update(state, 0.0)
    moved = jax.tree.map(np.asarray, state.mutable_state)
    assert np.isfinite(loss)
    assert not jax.tree.all(jax.tree.map(np.array_equal, moved, after))


def test_the_average_goes_on_as_if_the_bad_step_had_not_been() -> None:
    model, guide, params = program("spoiled")
    guide = with_estimators(guide, {"z": Reinforce(MovingAverage(0.8))})
    elbo = EstimatorELBO(debug=True)
    state = SVI(model, guide, optim.SGD(0.0), elbo).init(jax.random.key(0), 0.0).mutable_state

    @jax.jit
    def step(state: Any, key: Any, shift: Any) -> Any:
        def loss(params: Any) -> Any:
            out = elbo.loss_with_mutable_state(key, {**params, **state}, model, guide, shift)
            return out["loss"], out["mutable_state"]

        return jax.value_and_grad(loss, has_aux=True)(params)

    shifts = [0.0, 0.0, np.inf, 0.0, 0.0, np.nan, 0.0, 0.0]
    losses, gradients = [], []
    with pytest.warns(EstimatorWarning, match="not finite"):
        for key, shift in zip(jax.random.split(jax.random.key(5), 8), shifts, strict=True):
            (loss, state), grad = step(state, key, shift)
            losses.append(float(loss))
            gradients.append(float(grad["a"]))
        jax.effects_barrier()
    expected = moving_average_gradients(CASES["spoiled"], np.array(losses), 1, 0.8)
    good = np.isfinite(expected)
    assert good.tolist() == [s == 0.0 for s in shifts]
    np.testing.assert_allclose(np.array(gradients)[good], expected[good], atol=1e-10)


# Law 12: nothing is silently ignored.


def test_a_latent_that_the_guide_forgets_is_refused() -> None:
    model, guide, params = program("forgotten")
    with pytest.raises(EstimatorError, match=r"site 'z_forgotten': .*guide does not draw.*Add"):
        EstimatorELBO().loss(jax.random.key(0), params, model, guide)


def test_a_forgotten_latent_that_is_marked_is_summed_out() -> None:
    model, guide, params = program("forgotten", infer={"enumerate": "parallel"})
    elbo = EstimatorELBO({"z": Enumerate()})
    found = jax.grad(lambda p: elbo.loss(jax.random.key(0), p, model, guide))(params)
    np.testing.assert_allclose(found["a"], CASES["forgotten"].exact_gradient()["a"], rtol=1e-9)


# B14: a continuous distribution that can't be reparameterised is not taken for one that can.


def test_mixture_is_not_pathwise_by_default() -> None:
    case = CASES["mixture"]
    measure_mixture = numpyro_measure(EstimatorELBO(num_particles=4), case, 100_000)
    assert_unbiased(with_power(measure_mixture, case.exact_gradient()), case.exact_gradient())


# Oracle of the oracle: a gradient from the complex step is the gradient.


def test_oracle_differentiates() -> None:
    at = {"a": np.array([0.3, -0.7]), "b": np.array(1.1)}
    exact = gradient(lambda p: np.log(1 + np.exp(p["a"] * p["b"])).sum(), at)
    s = sigmoid(at["a"] * at["b"])
    np.testing.assert_allclose(exact["a"], s * at["b"], rtol=1e-14)
    np.testing.assert_allclose(exact["b"], (s * at["a"]).sum(), rtol=1e-14)
