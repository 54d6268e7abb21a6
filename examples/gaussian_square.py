"""Score function against pathwise gradient: z ~ Normal(μ, 1), f(z) = z², every variance known.

The true gradient is d/dμ E[z²] = d/dμ (μ² + 1) = 2μ. With z = μ + ε, ε ~ Normal(0, 1), and the moments
E ε² = 1, E ε⁴ = 3, E ε⁶ = 15, one estimate has

    estimator                          estimate                        variance
    pathwise                           2z                              4
    score function                     f(z) ε                          μ⁴ + 14μ² + 15
      with the mean cost as baseline   (f(z) − (μ² + 1)) ε             8μ² + 10
      with the best constant           (f(z) − (μ² + 3)) ε             8μ² + 6
      leave-one-out, two draws         ½ (f(z) − f(z′)) (ε − ε′)       8μ² + 6

The best constant is E[f s²] / E[s²] with s = ε the score: μ² + 3, not the mean cost.

To make z² the whole objective, the densities of z are masked out: an ELBO is E[log p(z) + z² − log q(z)], and under
`mask(False)` log p and log q cost nothing. The score is not a cost: it is never masked, so the estimators stay what
they are. (Without the mask −log q would add ½(z − μ)² to the cost: its *gradient* has mean zero and may be dropped,
its value may not.) The ELBO is maximised, and a loss is its negative: the estimate is minus the gradient of the loss.

One step gives as many independent estimates as the plate has elements.

    python examples/gaussian_square.py --backend pyro
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from _common import (
    BLUE,
    GREEN,
    LIBRARIES,
    ORANGE,
    PALE,
    PINK,
    RED,
    arguments,
    axes,
    heading,
    progress,
    save,
    table,
    variance,
)

from ppl_estimators import Constant, EstimatorWarning, LeaveOneOut, Pathwise, Reinforce


@dataclass(frozen=True)
class Method:
    label: str
    estimator: Callable[[float], Any]  # of μ
    exact: Callable[[float], float]
    colour: str
    draws: int = 1
    line: str = "-"


METHODS = [
    Method("score function", lambda mu: Reinforce(), lambda mu: mu**4 + 14 * mu**2 + 15, RED),
    Method("score function, mean cost", lambda mu: Reinforce(Constant(mu**2 + 1)), lambda mu: 8 * mu**2 + 10, ORANGE),
    Method("score function, best constant", lambda mu: Reinforce(Constant(mu**2 + 3)), lambda mu: 8 * mu**2 + 6, PINK),
    Method(
        "leave-one-out, 2 draws",
        lambda mu: Reinforce(LeaveOneOut()),
        lambda mu: 8 * mu**2 + 6,
        GREEN,
        draws=2,
        line="--",
    ),
    Method("pathwise", lambda mu: Pathwise(), lambda mu: 4.0, BLUE),
]


# ---- the program, in both libraries: `copies` independent estimates of the ELBO's gradient in μ --------------------


def estimates_in_numpyro(method: Method, mu: float, copies: int, seed: int = 0) -> np.ndarray:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro import handlers

    from ppl_estimators.numpyro import EstimatorELBO

    def model() -> None:
        with numpyro.plate("copies", copies):
            with handlers.mask(mask=False):
                z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.factor("square", z**2)

    def guide() -> None:
        loc = numpyro.param("loc", jnp.zeros(copies))
        with numpyro.plate("copies", copies), handlers.mask(mask=False):
            numpyro.sample("z", dist.Normal(loc, 1.0))

    elbo = EstimatorELBO({"z": method.estimator(mu)}, num_particles=method.draws)
    gradient = jax.jit(jax.grad(lambda p: elbo.loss(jax.random.key(seed), p, model, guide)))
    return -np.asarray(gradient({"loc": jnp.full(copies, mu)})["loc"], dtype=float)


def estimates_in_pyro(method: Method, mu: float, copies: int, seed: int = 0) -> np.ndarray:
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro import poutine

    from ppl_estimators.pyro import EstimatorELBO

    def model() -> None:
        with pyro.plate("copies", copies):
            with poutine.mask(mask=False):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("square", z**2)

    def guide() -> None:
        loc = pyro.param("loc", torch.full((copies,), mu))
        with pyro.plate("copies", copies), poutine.mask(mask=False):
            pyro.sample("z", dist.Normal(loc, 1.0))

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    EstimatorELBO({"z": method.estimator(mu)}, num_particles=method.draws).loss_and_grads(model, guide)
    return -pyro.param("loc").grad.double().numpy()


ESTIMATES = {"numpyro": estimates_in_numpyro, "pyro": estimates_in_pyro}


# ---- the comparison ------------------------------------------------------------------------------------------------


def main() -> None:
    args = arguments(__file__, __doc__)
    locations = [0.0, 2.0] if args.smoke else [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0]
    copies = 2_000 if args.smoke else 200_000
    shown = 2.0
    warnings.simplefilter("ignore", EstimatorWarning)  # plain score function is what we came to see
    measured: dict[str, list[tuple[float, float]]] = {m.label: [] for m in METHODS}
    samples = {}
    with progress(len(METHODS) * len(locations)) as report:
        for m in METHODS:
            report(m.label)
            for mu in locations:
                estimates = ESTIMATES[args.backend](m, mu, copies)
                measured[m.label].append(variance(estimates))
                if mu == shown:
                    samples[m.label] = estimates
                report(1)

    at = locations.index(shown)
    table(
        f"d/dμ E[z²] at μ = {shown:g} in {LIBRARIES[args.backend]}: exactly {2 * shown:g}; {copies:,} estimates each",
        ["estimator", "mean", "variance", "exact"],
        [
            [
                m.label,
                f"{samples[m.label].mean():.3f}",
                "{:.3f} ± {:.2g}".format(*measured[m.label][at]),
                f"{m.exact(shown):g}",
            ]
            for m in METHODS
        ],
    )

    figure, ((left, right),) = axes(2)
    fine = np.linspace(min(locations), max(locations), 100)
    bins = np.linspace(-12, 32, 89)
    for m in METHODS:
        left.plot(fine, [m.exact(mu) for mu in fine], color=m.colour, linewidth=1.8, linestyle=m.line, label=m.label)
        values, errors = np.transpose(measured[m.label])
        left.errorbar(locations, values, 2 * errors, fmt="o", color=m.colour, markersize=5)
        density, _ = np.histogram(samples[m.label], bins, density=True)
        right.plot((bins[1:] + bins[:-1]) / 2, density, color=m.colour, linewidth=1.5, label=m.label)
    left.set(yscale="log", xlabel="μ", ylabel="variance of one gradient estimate")
    left.legend(frameon=False, fontsize=8.5)
    left.text(0.98, 0.1, "lines: exact; dots: measured", transform=left.transAxes, ha="right", color=PALE, fontsize=8)
    heading(left, f"{LIBRARIES[args.backend]}: variance against μ")
    right.axvline(2 * shown, color=PALE, linewidth=1, linestyle="--")
    right.set(xlabel=f"gradient estimate at μ = {shown:g} (dashed: the gradient)", ylabel="density")
    right.set(yscale="log", ylim=(1e-4, 1))
    heading(right, "one estimate")
    exact = {m.label: [m.exact(mu) for mu in locations] for m in METHODS}
    save(args, figure, {"mu": locations, "estimates": copies, "variance": measured, "exact_variance": exact})


if __name__ == "__main__":
    main()
