"""Pyro on a card and on the processor: the same variance, and one seed gives one result.

    python benchmarks/devices.py            # prints a table; without a card only the processor's column

A bit above a pathwise site above an observation, in 20,000 lanes of a plate with parameters of their own, so that one
step gives as many draws. The further runs of DisARM(), Enumerate() and REBAR() share the noise of the pathwise site
only if every generator of random numbers is where the first run found it.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch

from ppl_estimators import REBAR, DisARM, Enumerate
from ppl_estimators.pyro import EstimatorELBO

LANES, STEPS = 20_000, 5


def program(device: str):
    def lanes(x: float) -> torch.Tensor:
        return torch.full((LANES,), x, device=device)

    def model() -> None:
        with pyro.plate("lanes", LANES):
            z = pyro.sample("z", dist.Bernoulli(lanes(0.4)))
            w = pyro.sample("w", dist.Normal(z, lanes(1.0)))
            pyro.sample("x", dist.Normal(3.0 * w + z, lanes(1.0)), obs=lanes(2.0))

    def guide() -> None:
        logits, mean = pyro.param("l", lanes(0.3)), pyro.param("m", lanes(0.1))
        with pyro.plate("lanes", LANES):
            z = pyro.sample("z", dist.Bernoulli(logits=logits))
            drop = torch.nn.functional.dropout(torch.ones(LANES, device=device), 0.3)
            pyro.sample("w", dist.Normal(mean + 0.5 * z * drop, lanes(0.8)))

    return model, guide


def gradients(elbo: EstimatorELBO, device: str, seed: int, steps: int = STEPS) -> torch.Tensor:
    """Of the logits, ``[steps, LANES]``."""
    model, guide = program(device)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    rows = []
    for _ in range(steps):
        elbo.loss_and_grads(model, guide)
        p = pyro.get_param_store()["l"].unconstrained()
        rows.append(p.grad.cpu().clone())
        p.grad = None
    return torch.stack(rows)


def main() -> None:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    names = [torch.cuda.get_device_name() if d == "cuda" else d for d in devices]
    print("| estimator |", " | ".join(f"variance, {n}" for n in names), "| ratio | one seed, one result |")
    for estimator in (DisARM(), Enumerate(), REBAR()):
        variances, same = [], True
        for device in devices:
            elbo = EstimatorELBO({"z": estimator})
            first, again = (gradients(elbo, device, 0) for _ in range(2))
            same &= torch.equal(first, again)
            variances.append(first.var().item())
        ratio = f"{variances[-1] / variances[0]:.3f}"
        print(f"| {estimator} |", " | ".join(f"{v:.4g}" for v in variances), f"| {ratio} | {'yes' if same else 'NO'} |")


if __name__ == "__main__":
    main()
