"""The law matrix in Pyro; the same tests for NumPyro are in `test_laws_numpyro.py`."""

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from measure import (
    SIGMAS,
    Measured,
    assert_exact,
    assert_exact_over_states,
    assert_mean_loss,
    assert_unbiased,
    moving_average_gradients,
    pyro_measure,
    states_of,
    until_every_state,
    with_power,
)
from mixes import (
    AVERAGED,
    EVERY_DRAW,
    EVERY_STATE,
    LOO,
    ON_AVERAGE,
    PAIRS_OF_STATES,
    PYRO_SEQUENTIAL,
    Mix,
    every_pair,
    kept,
    pairwise,
)
from pyro.infer import SVI
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
from ppl_estimators.pyro import EstimatorELBO, with_estimators
from ppl_estimators.testing import zoo
from ppl_estimators.testing.zoo import CASES, PyroLanguage
from ppl_estimators.testing.zoo.oracle import sigmoid

pytestmark = pytest.mark.filterwarnings("ignore:.*score function without a baseline")

PARTICLES, STEPS = 3_750, 24

#: cases that can be repeated in a plate around everything
COPIED = {"single", "chain", "mixed", "event", "mixture", "wrapped"}


@pytest.fixture(autouse=True)
def clear_param_store() -> None:
    pyro.clear_param_store()


def options(name: str) -> dict[str, Any]:
    nesting = CASES[name].nesting
    return {} if nesting is None else {"max_plate_nesting": nesting}


def program(name: str, **kwargs: Any) -> tuple[Any, Any]:
    case = CASES[name]
    return case.program(PyroLanguage(), case.params, **kwargs)


def measure(name: str, mix: Mix, steps: int, seed: int = 0, **kwargs: Any) -> Measured:
    chosen = None if mix.hook else mix.estimators
    elbo = EstimatorELBO(chosen, **options(name), **kwargs)
    hook = mix.estimators if mix.hook else None
    return pyro_measure(elbo, CASES[name], steps, seed, hook)


# Gradients.


@pytest.mark.parametrize(("name", "mix"), every_pair(EVERY_STATE))
def test_exact_over_states(name: str, mix: Mix) -> None:
    """Laws 1 to 4, 8, 10, 12, one particle at a time: nothing statistical in it."""
    case = CASES[name]
    measured = until_every_state(lambda seed: measure(name, mix, 100, seed), case)
    assert_exact_over_states(measured, case)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("name", PAIRS_OF_STATES)
def test_leave_one_out_is_exact_over_pairs_of_states(name: str, vectorize: bool) -> None:
    case = zoo.particles(CASES[name], 2)
    vectorize = vectorize and name not in PYRO_SEQUENTIAL
    elbo = EstimatorELBO({"z*": LOO}, num_particles=2, vectorize_particles=vectorize)
    measured = until_every_state(lambda seed: pyro_measure(elbo, case, 150, seed), case)
    assert_exact_over_states(measured, case)


@pytest.mark.parametrize(("name", "mix"), every_pair(EVERY_DRAW))
def test_every_draw_is_exact(name: str, mix: Mix) -> None:
    exact = CASES[name].exact_gradient()
    assert_exact(measure(name, mix, 10), {k: exact[k] for k in mix.exact})


@pytest.mark.parametrize(
    ("name", "mix"), [p for p in pairwise(ON_AVERAGE, "pyro") if p.values[0] not in PYRO_SEQUENTIAL]
)
def test_unbiased(name: str, mix: Mix) -> None:
    """Thousands of particles in one vectorised run."""
    case = CASES[name]

    def batch(seed: int) -> Measured:
        many = {"num_particles": PARTICLES, "vectorize_particles": True}
        return measure(name, mix, STEPS, seed, **many)

    measured = with_power(batch, case.exact_gradient())
    assert_unbiased(measured, case.exact_gradient())
    assert_mean_loss(measured, case)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(
    ("name", "mix"),
    [p for p in pairwise(ON_AVERAGE, "pyro") if p.values[0] in COPIED and p.values[1].particles > 1],
)
def test_unbiased_with_few_particles(name: str, mix: Mix, vectorize: bool) -> None:
    """Two to eight particles of thousands of copies: what the particles share is per copy."""
    number = 3_000
    case = zoo.copies(CASES[name], number)
    exact = CASES[name].exact_gradient()

    def batch(seed: int) -> Measured:
        elbo = EstimatorELBO(mix.estimators, num_particles=mix.particles, vectorize_particles=vectorize)
        return pyro_measure(elbo, case, STEPS, seed).divided_by(number)

    assert_unbiased(with_power(batch, exact), exact)


@pytest.mark.parametrize(("name", "mix"), [p for p in pairwise(ON_AVERAGE, "pyro") if p.values[0] in PYRO_SEQUENTIAL])
def test_unbiased_one_after_another(name: str, mix: Mix) -> None:
    """Where a Python branch on a value forbids vectorised particles."""
    case = CASES[name]

    def batch(seed: int) -> Measured:
        return measure(name, mix, 300, seed, num_particles=mix.particles, vectorize_particles=False)

    measured = with_power(batch, case.exact_gradient())
    assert_unbiased(measured, case.exact_gradient())
    assert_mean_loss(measured, case)


@pytest.mark.parametrize(("name", "mix"), pairwise(AVERAGED, "pyro"))
def test_the_averaged_model_is_unbiased(name: str, mix: Mix) -> None:
    case = CASES[name]

    def batch(seed: int) -> Measured:
        many = {"num_particles": PARTICLES, "vectorize_particles": True}
        return measure(name, mix, STEPS, seed, average_model=True, **many)

    measured = with_power(batch, case.exact_gradient())
    assert_unbiased(measured, case.exact_gradient())
    assert_mean_loss(measured, case)


def test_a_site_in_one_branch_is_exact_over_states() -> None:
    """Law 10: which sites there are depends on a value."""
    case = CASES["dynamic"]
    mix = Mix("reinforce", {"*": Reinforce()})
    assert_exact_over_states(until_every_state(lambda seed: measure("dynamic", mix, 100, seed), case), case)


@pytest.mark.parametrize("estimator", [Enumerate(), DisARM()], ids=repr)
def test_a_counterfactual_run_meets_a_site_that_was_not_there(estimator: Any) -> None:
    """Where z1 = 0 was drawn, z2 is drawn in the other run alone: at single draws by hand, and as often as q says."""
    case = CASES["dynamic"]
    f, a = np.real(case.table(case.params)[1]), case.params["a"]
    measured = measure("dynamic", Mix("counterfactual", {"z1": estimator, "*": Enumerate()}), 400)
    factor = {Enumerate(): sigmoid(a) * sigmoid(-a), DisARM(): 0.5 * sigmoid(abs(a))}[estimator]
    possible = np.append(-factor * (f[1:] - f[0]), 0.0)  # z2 = 0, z2 = 1; both draws of DisARM alike
    distance = np.abs(measured.gradients["a"][:, None] - possible)
    assert distance.min(-1).max() < 1e-10
    found, state = distance.argmin(-1), states_of(measured.losses, case)
    assert (found == 2).any() == (estimator == DisARM())
    for z2 in (0, 1):
        assert set(found[state == 1 + z2]) <= {z2, 2}
    ones = found[(state == 0) & (found != 2)]
    q, n = sigmoid(case.params["b"]), len(ones)
    assert n > 40
    assert abs(ones.mean() - q) < SIGMAS * np.sqrt(q * (1 - q) / n)
    summed = np.where(state > 0, -q * (1 - q) * (f[2] - f[1]), 0.0)
    np.testing.assert_allclose(measured.gradients["b"], summed, atol=1e-10)


def test_antithetic_run_takes_the_other_branch() -> None:
    """½ σ(|a|) (f(1) − f(0)) where the draws differ: at single draws, by hand."""
    case = CASES["branching"]
    f, a = np.real(case.table(case.params)[1]), case.params["a"]
    drawn = measure("branching", Mix("disarm", {"z": DisARM()}), 60).gradients["a"]
    possible = np.array([0.0, -0.5 * sigmoid(abs(a)) * (f[1] - f[0])])
    distance = np.abs(drawn[:, None] - possible)
    assert distance.min(-1).max() < 1e-10
    assert set(distance.argmin(-1)) == {0, 1}


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
    """Each loss is −f of some state."""
    drawn = states_of(measure("chain", mix, 60).losses, CASES["chain"])
    assert len(set(drawn)) > 1


@pytest.mark.parametrize("mix", VALUES[1:3], ids=lambda mix: mix.name)
def test_loss_is_the_elbo_of_the_particle_where_the_model_is_averaged(mix: Mix) -> None:
    assert len(set(states_of(measure("chain", mix, 40, average_model=True).losses, CASES["chain"]))) > 1


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("mix", VALUES, ids=lambda mix: mix.name)
def test_loss_of_two_particles_is_their_mean(mix: Mix, vectorize: bool) -> None:
    losses = measure("single", mix, 20, num_particles=2, vectorize_particles=vectorize).losses
    f = np.real(CASES["single"].table(CASES["single"].params)[1])
    possible = -np.array([f[0], (f[0] + f[1]) / 2, f[1]])
    assert np.abs(losses[:, None] - possible).min(-1).max() < 1e-9


@pytest.mark.parametrize("mix", VALUES, ids=lambda mix: mix.name)
def test_evaluate_is_the_elbo_of_a_particle(mix: Mix) -> None:
    model, guide = program("chain")
    guide = with_estimators(guide, mix.estimators)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.0}), EstimatorELBO())
    svi.step()
    states_of(np.array([svi.evaluate_loss() for _ in range(5)]), CASES["chain"])


@pytest.mark.parametrize("objective", [None, ImportanceWeighted(), Renyi(0.5)], ids=repr)
def test_elbo_module_gives_the_same_loss_and_gradient(objective: Any) -> None:
    """B8: `elbo(model, guide)` and plain torch."""
    model, guide = program("chain")
    elbo = EstimatorELBO(num_particles=2, objective=objective)
    pyro.set_rng_seed(0)
    expected = elbo.loss_and_grads(model, guide)
    store = dict(pyro.get_param_store().named_parameters())
    gradients = {k: p.grad.clone() for k, p in store.items()}
    for p in store.values():
        p.grad = None
    pyro.set_rng_seed(0)
    loss = elbo(model, guide)()
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    for k, p in store.items():
        torch.testing.assert_close(p.grad, gradients[k], rtol=0, atol=1e-12)


# Law 3 and section 5: elements of a plate are independent, and gradients know it.


@pytest.mark.parametrize("estimators", [{"z": Reinforce()}], ids=["reinforce"])
def test_plate_elements_get_their_own_cost(estimators: dict[str, Any]) -> None:
    """B11: one gradient of an element for each of its own values, whatever the others are."""
    case = CASES["local"]
    drawn = measure("local", Mix("plain", estimators), 60).gradients["a"]
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
            z = pyro.sample(f"z{i}", pyro.distributions.Bernoulli(logits=torch.as_tensor(-0.4)))
            pyro.sample(f"x{i}", pyro.distributions.Normal(1.5 * z, 1.0), obs=torch.as_tensor(x[i]))

    def guide() -> None:
        logits = pyro.param("a", torch.as_tensor(a))
        for i in range(number):
            pyro.sample(f"z{i}", pyro.distributions.Bernoulli(logits=logits[i]))

    drawn = pyro_steps(EstimatorELBO({"*": Reinforce()}), model, guide, [()] * 60)[1]["a"]
    for i in range(number):
        f = [stats.bernoulli.logpmf(z, sigmoid(-0.4)) + stats.norm.logpdf(x[i], 1.5 * z)
             - stats.bernoulli.logpmf(z, sigmoid(a[i])) for z in (0, 1)]  # fmt: skip
        distance = np.abs(drawn[:, i, None] - [-f[z] * (z - sigmoid(a[i])) for z in (0, 1)])
        assert distance.min(-1).max() < 1e-10
        assert set(distance.argmin(-1)) == {0, 1}


@pytest.mark.xfail(strict=True, reason="a broken promise, of which a warning says so; docs/why.md")
def test_total_of_a_plate_by_arithmetic() -> None:
    """z_e acts on x_e' of its own plate through z.sum(), with no site on the way."""
    case = CASES["summed"]
    mix = Mix("reinforce", {"*": Reinforce()})
    assert_exact_over_states(until_every_state(lambda seed: measure("summed", mix, 100, seed), case), case)


# Law 6: baselines are of the past.


@pytest.mark.parametrize(("particles", "vectorize"), [(1, False), (3, True), (3, False)])
def test_moving_average_is_of_the_past(particles: int, vectorize: bool) -> None:
    case = CASES["single"]
    hook = {"z": Reinforce(MovingAverage(0.8))}
    elbo = EstimatorELBO(num_particles=particles, vectorize_particles=vectorize)
    model, guide = program("single")
    losses, gradients = pyro_steps(elbo, model, with_estimators(guide, hook), [()] * 12)
    expected = moving_average_gradients(case, losses, particles, 0.8)
    assert len(set(np.round(losses, 9))) > 1
    np.testing.assert_allclose(gradients["a"], expected, atol=1e-10)


def pyro_steps(
    elbo: Any, model: Any, guide: Any, arguments: list[tuple[Any, ...]], seed: int = 3
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Loss and gradient of one step after another, parameters held fixed."""
    pyro.set_rng_seed(seed)
    store = pyro.get_param_store()
    losses, gradients = [], []
    for args in arguments:
        for _, p in store.named_parameters():
            p.grad = None
        losses.append(elbo.loss_and_grads(model, guide, *args))
        named = dict(store.named_parameters())
        gradients.append({k: p.grad for k, p in named.items() if p.grad is not None})
    names = set.intersection(*(set(g) for g in gradients))
    return np.array(losses), {k: np.array([g[k].detach().numpy().copy() for g in gradients]) for k in names}


def test_pyro_baseline_dictionary_is_a_moving_average() -> None:
    """`infer={"baseline": {"use_decaying_avg_baseline": True, "baseline_beta": 0.8}}`."""
    case = CASES["single"]
    model, _ = program("single")
    infer = {"baseline": {"use_decaying_avg_baseline": True, "baseline_beta": 0.8}}

    def guide() -> None:
        a = pyro.param("a", torch.tensor(0.7))
        pyro.sample("z", pyro.distributions.Bernoulli(logits=a), infer=infer)

    elbo = EstimatorELBO()
    losses, gradients = pyro_steps(elbo, model, with_estimators(guide), [()] * 12)
    expected = moving_average_gradients(case, losses, 1, 0.8)
    np.testing.assert_allclose(gradients["a"], expected, atol=1e-10)


@pytest.mark.parametrize("baseline", [MovingAverage(0.8), OptimalConstant(PastSteps(0.8))], ids=repr)
@pytest.mark.parametrize("vectorize", [True, False])
def test_average_of_minibatches_of_any_size(baseline: Any, vectorize: bool) -> None:
    """B9: a smaller last minibatch, other numbers of particles: one average all the same."""

    def model(x: torch.Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Bernoulli(logits=torch.tensor(-0.4)))
            pyro.sample("x", pyro.distributions.Normal(z, 1.0), obs=x)

    def guide(x: torch.Tensor) -> None:
        a = pyro.param("a", torch.tensor(0.7))
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro.distributions.Bernoulli(logits=a))

    guide = with_estimators(guide, {"z": Reinforce(baseline)})
    for sizes, particles in (((8, 8, 5), 1), ((8, 5, 1), 3), ((5, 8), 2)):
        elbo = EstimatorELBO(num_particles=particles, vectorize_particles=vectorize)
        batches = [(torch.linspace(-1.0, 2.0, n),) for n in sizes]
        losses, gradients = pyro_steps(elbo, model, guide, batches)
        assert np.isfinite(losses).all() and np.isfinite(gradients["a"]).all()


@pytest.mark.parametrize("baseline", [MovingAverage(0.5), OptimalConstant(PastSteps(0.5))], ids=repr)
def test_unbiased_with_state(baseline: Any) -> None:
    """Hundreds of particles a step, their state carried from one to the next."""
    mix = kept("state", {"*": Reinforce(baseline)})
    assert_unbiased(*stateful(mix))


def test_unbiased_with_a_coefficient_of_the_past() -> None:
    """Law 7 with a coefficient estimated from the past."""
    spec = ControlVariate(lambda z: 2.0 * z, lambda d: 2.0 * d.mean, PastSteps(0.5))
    assert_unbiased(*stateful(kept("state", {"*": spec})))


def stateful(mix: Mix) -> tuple[Measured, dict[str, np.ndarray]]:
    exact = CASES["chain"].exact_gradient()

    def batch(seed: int) -> Measured:
        return measure("chain", mix, 200, seed, num_particles=300, vectorize_particles=True)

    return with_power(batch, exact), exact


@pytest.mark.parametrize("first", [LeaveOneOut(), OptimalConstant()], ids=repr)
@pytest.mark.parametrize("second", [LeaveOneOut(), OptimalConstant()], ids=repr)
def test_two_baselines_of_the_other_particles_are_refused(first: Any, second: Any) -> None:
    """The second is fitted to what the first leaves of the others' costs, and that has seen this particle's."""
    with pytest.raises(ValueError, match=r"other particles"):
        mix = Mix("sum", {"z": Reinforce(first + second)}, particles=4)
        measure("single", mix, 1, num_particles=4)


# Law 7, at single draws: (f − c h) ∇log q + c ∇E[h], by hand.


def test_control_variate_adds_back_its_mean() -> None:
    case = CASES["single"]
    mix = Mix("h", {"z": ControlVariate(lambda z: 2.0 * z, lambda d: 2.0 * d.mean, 0.7)})
    measured = measure("single", mix, 30)
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
    ("auxiliary", 2, ImportanceWeighted()),
]


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(("name", "particles", "objective"), BOUNDS)
def test_bound_is_exact_over_states(name: str, particles: int, objective: Any, vectorize: bool) -> None:
    """B6: gradients in the guide's and the model's parameters."""
    case = zoo.bound(CASES[name], particles, objective.alpha)
    elbo = EstimatorELBO(num_particles=particles, vectorize_particles=vectorize, objective=objective)
    measured = until_every_state(lambda seed: pyro_measure(elbo, case, 150, seed), case)
    assert_exact_over_states(measured, case)


@pytest.mark.parametrize("objective", [ImportanceWeighted(), Renyi(0.5)], ids=repr)
def test_bound_with_pathwise_and_score_sites(objective: Any) -> None:
    """Thousands of copies in a plate around everything: a bound per element."""
    grid = replace(CASES["mixed"], table=zoo.sites.mixed_grid)
    case = replace(zoo.bound(grid, 2, objective.alpha), table=None)
    copies = zoo.copies(case, 3_000)
    elbo = EstimatorELBO(num_particles=2, vectorize_particles=True, objective=objective)

    def batch(seed: int) -> Measured:
        return pyro_measure(elbo, copies, STEPS, seed).divided_by(3_000)

    measured = with_power(batch, case.exact_gradient())
    assert_unbiased(measured, case.exact_gradient())
    assert_mean_loss(measured, case)


# Law 9: one minibatch a step.


def distance_to(values: np.ndarray, possible: np.ndarray) -> np.ndarray:
    return np.abs(np.ravel(values)[:, None] - possible).min(-1)


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("where", ["minibatch_local", "minibatch_global"])
def test_counterfactual_runs_see_the_same_minibatch(where: str, vectorize: bool, particles: int) -> None:
    """Enumerated, the gradient is exact for the minibatch: there are 15 of them."""
    elbo = EstimatorELBO({"z": Enumerate()}, num_particles=particles, vectorize_particles=vectorize)
    measured = pyro_measure(elbo, CASES[where], 150)
    assert distance_to(measured.gradients["a"], zoo.minibatches.minibatch_gradients()).max() < 1e-9
    assert len(set(np.round(np.ravel(measured.gradients["a"]), 6))) == 15


def test_antithetic_run_sees_the_same_minibatch() -> None:
    measured = pyro_measure(EstimatorELBO({"z": DisARM()}), CASES["minibatch_global"], 200)
    p = sigmoid(zoo.minibatches.BATCH_LOGIT)
    # ½ Δ σ(|a|) where b ≠ b̃, 0 where they agree; minibatch_gradients() is −p (1 − p) Δ
    possible = np.append(zoo.minibatches.minibatch_gradients() / (1 - p) / 2, 0.0)
    assert distance_to(measured.gradients["a"], possible).max() < 1e-9


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("where", ["minibatch_local", "minibatch_global"])
def test_particles_see_the_same_minibatch(where: str, vectorize: bool) -> None:
    model, guide = program(where, slope=0.0)
    elbo = EstimatorELBO(num_particles=4, vectorize_particles=vectorize)
    pyro.set_rng_seed(0)
    losses = np.array([elbo.loss_and_grads(model, guide) for _ in range(150)])
    assert distance_to(losses, zoo.minibatches.minibatch_losses()).max() < 1e-9
    assert len(set(np.round(losses, 6))) == 15


# Law 11: one bad step.

KEEPERS = [
    Reinforce(MovingAverage(0.8)),
    Reinforce(OptimalConstant(PastSteps(0.8))),
    ControlVariate(lambda z: 2.0 * z, lambda d: 2.0 * d.mean, PastSteps(0.8)),
    RELAX(hidden=4),
]


def kept_state() -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in pyro.get_param_store().items() if name != "a"}


@pytest.mark.parametrize("spec", KEEPERS, ids=["average", "optimal", "control", "relax"])
def test_a_bad_step_moves_no_state(spec: Any) -> None:
    model, guide = program("spoiled")
    guide = with_estimators(guide, {"z": spec})
    elbo = EstimatorELBO()
    for _ in range(3):
        elbo.loss_and_grads(model, guide, 0.0)
    before = kept_state()
    assert before
    with pytest.warns(EstimatorWarning, match=r"'x'.*not finite"):
        loss = bad_step(elbo, model, guide)
    assert not np.isfinite(loss)
    after = kept_state()
    assert all(np.array_equal(before[k], after[k]) for k in before)
    for _ in range(12):  # a moving average stands still while draws repeat
        assert np.isfinite(elbo.loss_and_grads(model, guide, 0.0))
    moved = kept_state()
    assert not all(np.array_equal(moved[k], after[k]) for k in after)


def bad_step(elbo: Any, model: Any, guide: Any) -> float:
    """A step whose cost is infinite; Pyro's own remarks about it are not what is tested."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Encountered")
        return elbo.loss_and_grads(model, guide, np.inf)


def test_the_average_goes_on_as_if_the_bad_step_had_not_been() -> None:
    model, guide = program("spoiled")
    guide = with_estimators(guide, {"z": Reinforce(MovingAverage(0.8))})
    shifts = [0.0, 0.0, np.inf, 0.0, 0.0, np.inf, 0.0, 0.0]
    with pytest.warns(UserWarning, match="not finite"):
        losses, gradients = pyro_steps(EstimatorELBO(), model, guide, [(s,) for s in shifts])
    expected = moving_average_gradients(CASES["spoiled"], losses, 1, 0.8)
    good = np.isfinite(expected)
    assert good.tolist() == [s == 0.0 for s in shifts]
    np.testing.assert_allclose(gradients["a"][good], expected[good], atol=1e-10)


# Law 12: nothing is silently ignored.


def test_a_latent_that_the_guide_forgets_is_refused() -> None:
    model, guide = program("forgotten")
    with pytest.raises(EstimatorError, match=r"site 'z_forgotten': .*guide does not draw.*Add"):
        EstimatorELBO().loss(model, guide)


def test_a_forgotten_latent_that_is_marked_is_summed_out() -> None:
    model, guide = program("forgotten", infer={"enumerate": "parallel"})
    EstimatorELBO({"z": Enumerate()}).loss_and_grads(model, guide)
    found = dict(pyro.get_param_store().named_parameters())["a"].grad
    np.testing.assert_allclose(found, CASES["forgotten"].exact_gradient()["a"], rtol=1e-9)


# B14: a continuous distribution that can't be reparameterised is not taken for one that can.


def test_mixture_is_not_pathwise_by_default() -> None:
    exact = CASES["mixture"].exact_gradient()

    def batch(seed: int) -> Measured:
        many = {"num_particles": PARTICLES, "vectorize_particles": True}
        return measure("mixture", Mix("auto", None), STEPS, seed, **many)

    assert_unbiased(with_power(batch, exact), exact)


# The default with one particle and with two.


@pytest.mark.parametrize("particles", [1, 2])
@pytest.mark.parametrize("name", ["chain", "chain3", "mixed"])
def test_default_is_unbiased(name: str, particles: int) -> None:
    number = 3_000
    case = zoo.copies(CASES[name], number)
    exact = CASES[name].exact_gradient()

    def batch(seed: int) -> Measured:
        return pyro_measure(EstimatorELBO(num_particles=particles), case, STEPS, seed).divided_by(number)

    assert_unbiased(with_power(batch, exact), exact)
