"""Many gradients of an ELBO, and three ways to compare them with the exact one.

`assert_unbiased` has the statistics, and so the power, of `ppl_estimators.testing.assert_unbiased`, on draws that are
made here: all minibatches in a draw, networks moved away from their start, chains of steps. The other two have no
statistics in them.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppl_estimators.testing.power import Outcome, Sums, Wanted
from ppl_estimators.testing.power import measure as judged
from ppl_estimators.testing.zoo import Case, NumPyroLanguage, PyroLanguage

Gradient = dict[str, np.ndarray]

SIGMAS, ROUNDING = 5.0, 1e-9

#: a bias of 5% in whatever direction is seen with 80%; one in a hundred thousand right gradients fails
WANTED = Wanted(able_to_see=0.05, false_alarms=1e-5, detection=0.8)


@dataclass(frozen=True)
class Measured:
    """losses [draws] and gradients {name: [draws, *shape]}; a draw is one step of an ELBO."""

    losses: np.ndarray
    gradients: Gradient

    def __add__(self, other: "Measured") -> "Measured":
        gradients = {k: np.concatenate([g, other.gradients[k]]) for k, g in self.gradients.items()}
        return Measured(np.concatenate([self.losses, other.losses]), gradients)

    def mean(self) -> Gradient:
        return {k: g.mean(0) for k, g in self.gradients.items()}

    def error(self) -> Gradient:
        """The standard error of the mean."""
        return {k: g.std(0, ddof=1) / np.sqrt(len(g)) for k, g in self.gradients.items()}

    def total_variance(self) -> float:
        return float(sum(g.var(0, ddof=1).sum() for g in self.gradients.values()))

    def divided_by(self, number: int) -> "Measured":
        return Measured(self.losses / number, {k: g / number for k, g in self.gradients.items()})


def flatten(gradient: Mapping[str, np.ndarray], like: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(gradient[k]) for k in sorted(like)])


def sums(measured: Measured, exact: Gradient) -> Sums:
    n = len(measured.losses)
    drawn = np.concatenate([measured.gradients[k].reshape(n, -1) for k in sorted(exact)], 1)
    away = drawn - flatten(exact, exact)
    return Sums(n, away.sum(0), (away**2).sum(0), (~np.isfinite(away)).sum(0))


def judge(drawn: Sums, exact: Gradient) -> Outcome:
    """The kit's verdict on these draws."""
    length = float(np.linalg.norm(flatten(exact, exact)))
    return judged(lambda first, more: drawn, length, WANTED, drawn.draws, lambda spread: ROUNDING * (length + spread))


def with_power(measure: Callable[[int], Measured], exact: Gradient, batches: int = 60) -> Measured:
    """Batches of draws, one seed each, until there are as many as the test needs (or the batches run out).

    Stopping looks at the variance only, never at the mean.
    """
    found = [measure(0)]
    total = sums(found[0], exact)
    while len(found) < batches and total.draws < judge(total, exact).needed:
        found.append(measure(len(found)))
        total += sums(found[-1], exact)
    losses = np.concatenate([m.losses for m in found])
    return Measured(losses, {k: np.concatenate([m.gradients[k] for m in found]) for k in found[0].gradients})


def assert_unbiased(measured: Measured, exact: Gradient) -> None:
    for name in exact:
        assert measured.gradients[name].shape[1:] == exact[name].shape, name
    outcome = judge(sums(measured, exact), exact)
    summary = f"mean {measured.mean()}\nexact {exact}\nstandard error {measured.error()}"
    assert not outcome.biased, f"{outcome.sigmas.max():.1f} standard errors from the exact gradient:\n{summary}"
    assert not np.isnan(outcome.sigmas).any(), summary
    assert outcome.draws >= outcome.needed, f"{outcome.draws} draws, {outcome.needed:.0f} are needed:\n{summary}"


def assert_mean_loss(measured: Measured, case: Case) -> None:
    """The mean loss is −ELBO, within five standard errors."""
    error = measured.losses.std(ddof=1) / np.sqrt(len(measured.losses))
    difference = abs(measured.losses.mean() + case.exact_elbo())
    assert difference < SIGMAS * error + ROUNDING, f"{measured.losses.mean()}, {case.exact_elbo()}"


def assert_exact(measured: Measured, exact: Gradient, tolerance: float = 1e-10) -> None:
    """Every single draw is the exact gradient."""
    for name, gradient in exact.items():
        difference = np.abs(measured.gradients[name] - gradient).max()
        assert difference < tolerance, f"{name}: off by {difference}, exact {gradient}"


def states_of(losses: np.ndarray, case: Case, tolerance: float = 1e-9) -> np.ndarray:
    """The state that each loss is the value of: a loss is exactly −f of what was drawn."""
    possible = -np.real(case.table(case.params)[1])
    distance = np.abs(losses[:, None] - possible)
    state = distance.argmin(-1)
    worst = distance.min(-1).max()
    assert worst < tolerance, f"a loss is {worst} away from every value that a draw can have"
    return state


def until_every_state(measure: Callable[[int], Measured], case: Case, batches: int = 20) -> Measured:
    """Batches of draws, one seed each, until every state has been seen (or the batches run out)."""
    number = len(np.unique(np.round(np.real(case.table(case.params)[1]), 9)))
    measured = measure(0)
    for seed in range(1, batches):
        if len(np.unique(np.round(measured.losses, 9))) >= number:
            break
        measured = measured + measure(seed)
    return measured


def assert_exact_over_states(measured: Measured, case: Case, tolerance: float = 1e-9) -> None:
    """Σ over states of q(state) · gradient(state) is the exact gradient.

    For estimators whose gradient is a function of the drawn state. States are told apart by their
    loss; states of equal loss (permuted particles) must have equal gradients.
    """
    log_q, f = (np.real(x) for x in case.table(case.params))
    values, group = np.unique(np.round(f, 9), return_inverse=True)
    weight = np.bincount(group, np.exp(log_q))
    seen = group[states_of(measured.losses, case)]
    assert set(seen) == set(range(len(values))), "draw more: a state has not been seen"
    total = {name: np.zeros(np.shape(value)) for name, value in case.params.items()}
    for index in range(len(values)):
        for name in total:
            drawn = measured.gradients[name][seen == index]
            spread = np.ptp(drawn, axis=0).max()
            assert spread < tolerance, f"{name}: gradients of one state differ by {spread}"
            total[name] += weight[index] * drawn[0]
    for name, gradient in case.exact_gradient().items():
        difference = np.abs(total[name] - gradient).max()
        assert difference < tolerance, f"{name}: {total[name]}, exact {gradient}"


def assert_frequencies(measured: Measured, case: Case) -> None:
    """States are drawn as often as q says, within five standard errors."""
    q = np.exp(np.real(case.table(case.params)[0]))
    n = len(measured.losses)
    frequency = np.bincount(states_of(measured.losses, case), minlength=len(q)) / n
    assert (np.abs(frequency - q) < SIGMAS * np.sqrt(q * (1 - q) / n)).all(), f"{frequency}, {q}"


# Pyro


def pyro_measure(elbo: Any, case: Case, steps: int, seed: int = 0, hook: Mapping[str, Any] | None = None) -> Measured:
    """`steps` calls of `loss_and_grads`, parameters held fixed.

    What estimators keep is moved away from its start, so that a network that starts as a constant
    has something to say. A case with minibatches is averaged over all of them in each step.
    """
    import pyro
    import torch

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    language = PyroLanguage()
    model, guide = case.program(language, case.params)
    if hook is not None:
        from ppl_estimators.pyro import with_estimators

        guide = with_estimators(guide, hook)
    store = pyro.get_param_store()
    losses: list[float] = []
    gradients: dict[str, list[np.ndarray]] = {name: [] for name in case.params}

    def one() -> None:
        for _, parameter in store.named_parameters():
            parameter.grad = None
        losses.append(elbo.loss_and_grads(model, guide))
        named = dict(store.named_parameters())
        for name, collected in gradients.items():
            grad = named[name].grad
            grad = torch.zeros_like(named[name]) if grad is None else grad
            collected.append(grad.detach().numpy().copy())

    minibatches = case.minibatches or (None,)
    with nullcontext() if case.strict else pyro.validation_enabled(False):
        if hook is not None:
            language.minibatch = minibatches[0]
            elbo.loss(model, guide)
            perturb_pyro(store, case)
        for step in range(steps):
            with nullcontext() if step < 3 else pyro.validation_enabled(False):
                for language.minibatch in minibatches:
                    one()

    def mean(values: Any) -> np.ndarray:
        stacked = np.array(values)
        return stacked.reshape(steps, len(minibatches), *stacked.shape[1:]).mean(1)

    return Measured(mean(losses), {k: mean(v) for k, v in gradients.items()})


def perturb_pyro(store: Any, case: Case) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in store.named_parameters():
            if name not in case.params:
                parameter.add_(0.3 * torch.randn_like(parameter))


# NumPyro


def numpyro_measure(
    elbo: Any,
    case: Case,
    draws: int,
    hook: Mapping[str, Any] | None = None,
    program: Any = None,
) -> Callable[[int], Measured]:
    """seed ↦ `draws` independent values and gradients of `elbo.loss`; compiled once.

    What estimators keep is found by `SVI.init` and moved away from its start, see above.
    """
    import jax
    import jax.numpy as jnp

    model, guide = program or case.program(NumPyroLanguage(), case.params)
    held: dict[str, Any] = {}
    if hook is not None:
        from ppl_estimators.numpyro import with_estimators

        guide = with_estimators(guide, hook)
        held = perturbed_numpyro(elbo, model, guide, case)
    params = {k: jnp.asarray(v) for k, v in case.params.items()}

    def loss(params: Mapping[str, Any], key: Any) -> Any:
        return elbo.loss(key, {**held, **params}, model, guide)

    many = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0)))

    def measure(seed: int) -> Measured:
        losses, gradients = many(params, jax.random.split(jax.random.key(seed), draws))
        return Measured(np.asarray(losses), {k: np.asarray(v) for k, v in gradients.items()})

    return measure


def perturbed_numpyro(elbo: Any, model: Any, guide: Any, case: Case) -> dict[str, Any]:
    import jax
    from numpyro import optim
    from numpyro.infer import SVI

    svi = SVI(model, guide, optim.SGD(0.0), elbo)
    state = svi.init(jax.random.key(0))
    kept = {k: v for k, v in svi.get_params(state).items() if k not in case.params}
    leaves, tree = jax.tree.flatten(kept)
    keys = jax.random.split(jax.random.key(1), max(len(leaves), 1))
    moved = [x + 0.3 * jax.random.normal(key, x.shape, x.dtype) for x, key in zip(leaves, keys, strict=False)]
    return {**jax.tree.unflatten(tree, moved), **(state.mutable_state or {})}


# What a moving-average baseline must do, step by step.


def moving_average_gradients(case: Case, losses: np.ndarray, particles: int, decay: float) -> np.ndarray:
    """∂loss/∂a of a single Bernoulli site at each step, given only the losses of the steps.

    −mean_k (f_k − m)(z_k − p), with m the average *before* the step: none at the first, the first
    mean cost at the second, then m ← decay · m + (1 − decay) · mean_k f_k. A step whose loss is not
    finite moves nothing; its gradient is reported as nan.
    """
    f0, f1 = np.real(case.table(case.params)[1])
    p = 1 / (1 + np.exp(-case.params["a"]))
    ones = np.arange(particles + 1)
    possible = -(ones * f1 + (particles - ones) * f0) / particles
    mean: float | None = None
    expected = []
    for loss in losses:
        if not np.isfinite(loss):
            expected.append(np.nan)
            continue
        n = int(np.abs(possible - loss).argmin())
        assert abs(possible[n] - loss) < 1e-9, "not a loss that particles can have"
        m = 0.0 if mean is None else mean
        up, down = n * (f1 - m) * (1 - p), (particles - n) * (f0 - m) * (0 - p)
        expected.append(-(up + down) / particles)
        mean = -loss if mean is None else decay * mean - (1 - decay) * loss
    return np.array(expected)
