"""Fit a categorical distribution by score function: 10 draws per step do what 1,000 did.

A guide q(z) = Categorical(softmax(θ)) is fitted to z ~ Categorical([0.1, 0.6, 0.3]). Nothing is differentiated but
log q: the model only has to return numbers, so any program that scores a value will do.

The model also scores data, and so log p(x, z) = log target(z) + log p(x): here every category explains the data
equally well, with log p(x) = -20 nats. The posterior is the target and ELBO − log p(x) = −KL(q ‖ target), but the
cost of every draw carries those −20, and plain score function multiplies them with the score:

    (1/N) Σ_k f(z_k) ∇ log q(z_k),   f(z) = log p(x, z) − log q(z)          variance ∝ E[f² s²] / N

The other draws' mean is a baseline that costs nothing and removes them:

    1/(K−1) Σ_k (f(z_k) − f̄) ∇ log q(z_k)                                  the sample covariance of f and the score

Ten fits run side by side in a plate. Elements of a plate are independent, so each has the gradient of a fit of its own.

Without any evidence (log p(x) = 0) the cost vanishes where q = target, and so does all noise: the right panel shows
that a baseline is not what one needs there, and how fast that changes.

    python examples/categorical_fit.py --backend pyro
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from _common import BLUE, LIBRARIES, ORANGE, PALE, RED, arguments, axes, heading, progress, save, table, variance

from ppl_estimators import EstimatorWarning, LeaveOneOut, Reinforce

TARGET = np.array([0.1, 0.6, 0.3])
LOG_EVIDENCE = -20.0  # nats
LEARNING_RATE = 0.02


@dataclass(frozen=True)
class Method:
    label: str
    estimator: Any
    draws: int
    colour: str


METHODS = [
    Method("no baseline, 10 draws", Reinforce(), 10, RED),
    Method("no baseline, 1,000 draws", Reinforce(), 1000, ORANGE),
    Method("leave-one-out, 10 draws", Reinforce(LeaveOneOut()), 10, BLUE),
]


# ---- the program and its fit, in both libraries --------------------------------------------------------------------


def numpyro_program(copies: int) -> tuple[Any, Any]:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist

    def model(log_evidence: float) -> None:
        with numpyro.plate("copies", copies):
            z = numpyro.sample("z", dist.Categorical(probs=jnp.asarray(TARGET)))
            numpyro.factor("likelihood", jnp.full(3, log_evidence)[z])

    def guide(log_evidence: float) -> None:
        theta = numpyro.param("theta", jnp.zeros((copies, 3)))
        with numpyro.plate("copies", copies):
            numpyro.sample("z", dist.Categorical(logits=theta))

    return model, guide


def fit_in_numpyro(method: Method, log_evidence: float, copies: int, steps: int, every: int) -> Iterator[np.ndarray]:
    import jax
    import numpyro
    from numpyro.infer import SVI

    from ppl_estimators.numpyro import EstimatorELBO

    elbo = EstimatorELBO({"z": method.estimator}, num_particles=method.draws)
    svi = SVI(*numpyro_program(copies), numpyro.optim.Adam(LEARNING_RATE), elbo)
    state = svi.init(jax.random.key(0), log_evidence)
    several = jax.jit(lambda state: jax.lax.scan(lambda s, _: svi.update(s, log_evidence), state, length=every)[0])
    for _ in range(steps // every):
        state = several(state)
        yield np.asarray(svi.get_params(state)["theta"])


def gradients_in_numpyro(method: Method, evidences: list[float], copies: int) -> Iterator[np.ndarray]:
    import jax
    import jax.numpy as jnp

    from ppl_estimators.numpyro import EstimatorELBO

    elbo = EstimatorELBO({"z": method.estimator}, num_particles=method.draws)
    program = numpyro_program(copies)
    parameters = {"theta": jnp.zeros((copies, 3))}
    gradient = jax.jit(jax.grad(lambda p, e: elbo.loss(jax.random.key(2), p, *program, e)))
    for log_evidence in evidences:
        yield -np.asarray(gradient(parameters, log_evidence)["theta"])


def pyro_program(copies: int) -> tuple[Any, Any]:
    import pyro
    import pyro.distributions as dist
    import torch

    def model(log_evidence: float) -> None:
        with pyro.plate("copies", copies):
            z = pyro.sample("z", dist.Categorical(probs=torch.as_tensor(TARGET, dtype=torch.float)))
            pyro.factor("likelihood", torch.full((3,), log_evidence)[z])

    def guide(log_evidence: float) -> None:
        theta = pyro.param("theta", torch.zeros(copies, 3))
        with pyro.plate("copies", copies):
            pyro.sample("z", dist.Categorical(logits=theta))

    return model, guide


def _pyro_elbo(method: Method) -> Any:
    from ppl_estimators.pyro import EstimatorELBO

    return EstimatorELBO(
        {"z": method.estimator}, num_particles=method.draws, vectorize_particles=True, max_plate_nesting=1
    )


def fit_in_pyro(method: Method, log_evidence: float, copies: int, steps: int, every: int) -> Iterator[np.ndarray]:
    import pyro
    from pyro.infer import SVI
    from pyro.optim import Adam

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = SVI(*pyro_program(copies), Adam({"lr": LEARNING_RATE}), _pyro_elbo(method))
    for step in range(steps):
        svi.step(log_evidence)
        if (step + 1) % every == 0:
            yield pyro.param("theta").detach().numpy().copy()


def gradients_in_pyro(method: Method, evidences: list[float], copies: int) -> Iterator[np.ndarray]:
    import pyro

    elbo, program = _pyro_elbo(method), pyro_program(copies)
    for log_evidence in evidences:
        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        elbo.loss_and_grads(*program, log_evidence)
        yield -pyro.param("theta").grad.numpy()


#: θ after every so many steps, [copies, 3]
FIT = {"numpyro": fit_in_numpyro, "pyro": fit_in_pyro}
#: estimates of the ELBO's gradient at θ = 0 for each log p(x), [copies, 3]
GRADIENTS = {"numpyro": gradients_in_numpyro, "pyro": gradients_in_pyro}


# ---- what is known exactly -----------------------------------------------------------------------------------------


def kl(theta: np.ndarray) -> np.ndarray:
    """KL(softmax(θ) ‖ target) in nats, for θ ``[..., 3]``."""
    theta = np.asarray(theta, dtype=float)
    log_q = theta - np.log(np.exp(theta).sum(-1, keepdims=True))
    return (np.exp(log_q) * (log_q - np.log(TARGET))).sum(-1)


def exact_variance(method: Method, log_evidence: float, theta: np.ndarray) -> float:
    """Variance of the gradient estimate, summed over θ, from moments of f and the score s under q.

    Plain, N draws:    (E[f² s²] − E[f s]²) / N
    Leave-one-out, K:  the variance of a sample covariance, (μ22 − μ11² (K−2)/(K−1) + μ20 μ02 / (K−1)) / K
    """
    q = np.exp(theta) / np.exp(theta).sum()
    f = (np.log(TARGET) + log_evidence - np.log(q))[:, None]  # [category, 1]
    s = np.eye(3) - q  # [category, logit]
    mean = q @ f
    cov = q @ ((f - mean) * s)
    if method.estimator == Reinforce():
        return float((q @ (f * s) ** 2 - cov**2).sum() / method.draws)
    k = method.draws
    spread = q @ (f - mean) ** 2
    total = q @ ((f - mean) * s) ** 2 - cov**2 * (k - 2) / (k - 1) + spread * (q @ s**2) / (k - 1)
    return float(total.sum() / k)


# ---- the comparison ------------------------------------------------------------------------------------------------


def main() -> None:
    args = arguments(__file__, __doc__)
    steps, every, copies, trials = (60, 20, 5, 200) if args.smoke else (600, 20, 10, 2000)
    evidences = [0.0, -5.0] if args.smoke else [0.0, -1.0, -2.0, -5.0, -10.0, -20.0, -50.0, -100.0]
    start = np.zeros(3)
    curves: dict[str, np.ndarray] = {}
    measured: dict[str, list[tuple[float, float]]] = {}
    warnings.simplefilter("ignore", EstimatorWarning)  # plain score function is what we came to see
    with progress(len(METHODS) * (steps + every * len(evidences))) as report:
        for method in METHODS:
            report(method.label)
            points = [np.full(copies, kl(start))]
            for theta in FIT[args.backend](method, LOG_EVIDENCE, copies, steps, every):
                points.append(kl(theta))
                report(every)
            curves[method.label] = np.array(points)  # [points, copies]
            measured[method.label] = []
            n = max(100, min(trials, 300_000 // method.draws))
            for estimates in GRADIENTS[args.backend](method, evidences, n):
                measured[method.label].append(variance(estimates))
                report(every)
    exact = {m.label: [exact_variance(m, e, start) for e in evidences] for m in METHODS}

    table(
        f"Fit of [0.1, 0.6, 0.3] in {LIBRARIES[args.backend]}, {steps:,} steps, {copies} fits",
        ["estimator", "draws\nin all", "KL at the\nend (nats)", "gradient\nvariance", "exact\nvariance"],
        [
            [
                m.label,
                f"{m.draws * steps:,}",
                f"{np.median(curves[m.label][-1]):.2g}",
                f"{measured[m.label][-1][0]:.3g} ± {measured[m.label][-1][1]:.1g}",
                f"{exact[m.label][-1]:.3g}",
            ]
            for m in METHODS
        ],
    )
    print(f"KL: median over the fits, log p(x) = {LOG_EVIDENCE:g}. Variance: at θ = 0, log p(x) = {evidences[-1]:g}.")

    figure, ((left, right),) = axes(2)
    for m in METHODS:
        x = np.arange(len(curves[m.label])) * every
        low, middle, high = np.quantile(curves[m.label], [0.1, 0.5, 0.9], axis=1)
        left.fill_between(x, low, high, color=m.colour, alpha=0.18, linewidth=0)
        left.plot(x, middle, color=m.colour, linewidth=1.8, label=m.label)
        axis = -np.array(evidences)
        right.plot(axis, exact[m.label], color=m.colour, linewidth=1.8)
        values, errors = np.transpose(measured[m.label])
        right.errorbar(axis, values, 2 * errors, fmt="o", color=m.colour, markersize=5)
    left.set(yscale="log", xlabel="step", ylabel="KL(q ‖ target)  (nats)", xlim=(0, steps))
    left.set_ylim(bottom=1e-7)  # where single precision ends
    left.legend(frameon=False, fontsize=9)
    heading(left, f"{LIBRARIES[args.backend]}: {copies} fits, median and 10–90%")
    right.set(yscale="log", xlabel="−log p(x)  (nats)", ylabel="gradient variance at the start")
    right.set_xscale("symlog", linthresh=1)
    right.set_xlim(left=-0.05)
    right.text(
        0.98, 0.04, "lines: exact; dots: measured", transform=right.transAxes, ha="right", color=PALE, fontsize=8
    )
    heading(right, "what the evidence does to the noise")
    save(
        args,
        figure,
        {
            "target": TARGET,
            "log_evidence": LOG_EVIDENCE,
            "steps": steps,
            "kl": {label: np.median(c, axis=1) for label, c in curves.items()},
            "evidences": evidences,
            "gradient_variance": measured,
            "exact_gradient_variance": exact,
        },
    )


if __name__ == "__main__":
    main()
