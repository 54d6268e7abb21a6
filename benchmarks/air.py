"""Attend, infer, repeat under the importance-weighted bound: who learns to count?

    python benchmarks/air.py

The program of the gallery's page (docs/gallery/air.ipynb) in NumPyro: pictures with no, one or two handwritten zeros;
two bits, each above a place. Five particles, batches of 32, Adam at 0.001, three seeds. A pair of DisARM costs two
evaluations of a particle, so it has half the steps. Counted right: the share of 200 test pictures whose count has the
most probability under the guide, mean and range of the seeds, on the way. Off: the distance in total variation of the
guide's q(count) from the exact posterior, at the end. Held out: the bound of 500 particles, in nats of a picture.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _harness import Report, arguments
from numpyro.infer import SVI, RenyiELBO, TraceGraph_ELBO
from numpyro.optim import Adam
from rich.progress import track
from scipy.special import logsumexp, softmax
from sklearn.datasets import load_digits

from ppl_estimators import DisARM, ImportanceWeighted, LeaveOneOut, Reinforce
from ppl_estimators.numpyro import EstimatorELBO

SIDE, NOISE, HIDDEN, NEVER, BATCH, PARTICLES = 16, 0.25, 128, -15.0, 32, 5
ZEROS = (load_digits().images / 16.0)[load_digits().target == 0]
TEMPLATE = ZEROS.mean(0).astype(np.float32)


def pictures(number: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)

    def picture(count: int) -> np.ndarray:
        canvas = np.zeros((SIDE, SIDE))
        for _ in range(count):
            row, column = rng.integers(0, SIDE - 8 + 1, 2)
            canvas[row : row + 8, column : column + 8] += ZEROS[rng.integers(len(ZEROS))]
        return canvas

    counts = rng.integers(0, 3, number)
    return np.array([picture(c) for c in counts], dtype=np.float32).reshape(-1, SIDE**2), counts


def exact(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The posterior of the count and the evidence, by a sum over a grid of places."""

    def spread(at: np.ndarray) -> np.ndarray:
        return np.maximum(0, 1 - abs(np.arange(SIDE)[:, None] - np.arange(8) - at[..., None, None]))

    line = np.linspace(0, 8, 17)
    places = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    painted = (spread(places[:, 0]) @ TEMPLATE @ spread(places[:, 1]).swapaxes(-1, -2)).reshape(len(places), -1)
    prior = -0.5 * (((places - 4) / 2.5) ** 2).sum(-1)
    prior -= logsumexp(prior)
    square = (painted**2).sum(-1)
    pairs = square[:, None] + square + 2 * painted @ painted.T

    def joint(x: np.ndarray) -> np.ndarray:
        match = painted @ x
        one = prior - 0.5 * (square - 2 * match) / NOISE**2
        two = prior[:, None] + prior - 0.5 * (pairs - 2 * (match[:, None] + match)) / NOISE**2
        level = -0.5 * x @ x / NOISE**2 - len(x) * np.log(NOISE * np.sqrt(2 * np.pi)) - np.log(3)
        return level + np.array([0.0, logsumexp(one), logsumexp(two)])

    found = np.array([joint(each.astype(float)) for each in x])
    return softmax(found, -1), logsumexp(found, -1)


# ---- the program ----------------------------------------------------------------------------------------------------


def paint(place: Any) -> Any:
    rows, columns = (
        jnp.maximum(0, 1 - abs(jnp.arange(SIDE)[:, None] - jnp.arange(8) - place[..., i, None, None])) for i in (0, 1)
    )
    return (rows @ jnp.asarray(TEMPLATE) @ columns.swapaxes(-1, -2)).reshape(*place.shape[:-1], -1)


def model(x: Any) -> None:
    with numpyro.plate("pictures", len(x)):
        present, canvas = 1.0, jnp.zeros_like(x)
        for i, odds in enumerate((np.log(2.0), 0.0)):
            present = numpyro.sample(f"z_{i}", dist.Bernoulli(logits=jnp.where(present == 1, odds, NEVER)))
            place = numpyro.sample(f"where_{i}", dist.Normal(4 * jnp.ones(2), 2.5).to_event(1).mask(present == 1))
            canvas = canvas + present[..., None] * paint(place)
        numpyro.sample("x", dist.Normal(canvas, NOISE).to_event(1), obs=x)


def weights(name: str, n: int, m: int, scale: float = 1.0) -> Any:
    return numpyro.param(name, lambda key: scale * jax.random.normal(key, (n, m)) / jnp.sqrt(n))


def look(params: Any, left: Any) -> Any:
    out = jax.nn.relu(left @ params[0] + params[1]) @ params[2]
    return out[..., 0] + 1.0, 8 * jax.nn.sigmoid(out[..., 1:3]), 0.05 + 0.5 * jax.nn.softplus(out[..., 3:5])


def guide(x: Any) -> None:
    params = weights("look", SIDE**2, HIDDEN), numpyro.param("bias", jnp.zeros(HIDDEN)), weights("see", HIDDEN, 5, 0.3)
    with numpyro.plate("pictures", len(x)):
        present, left = 1.0, x
        for i in range(2):
            odds, loc, scale = look(params, left)
            present = numpyro.sample(f"z_{i}", dist.Bernoulli(logits=jnp.where(present == 1, odds, NEVER)))
            place = numpyro.sample(f"where_{i}", dist.Normal(loc, scale).to_event(1).mask(present == 1))
            left = left - present[..., None] * paint(place)


@partial(jax.jit, static_argnums=2)
def counted(params: Any, test: Any, draws: int = 20) -> Any:
    """q(count) of the test pictures, averaged over places."""
    params = params["look"], params["bias"], params["see"]
    first, loc, scale = look(params, test)
    place = loc + scale * jax.random.normal(jax.random.key(0), (draws, *loc.shape))
    another = jax.nn.sigmoid(look(params, test - paint(place))[0]).mean(0)
    p = jax.nn.sigmoid(first)
    return jnp.stack([1 - p, p * (1 - another), p * another], -1)


# ---- training -------------------------------------------------------------------------------------------------------


def train(elbo: Any, data: Any, lengths: list[int], seeds: int) -> list[list[Any]]:
    """Parameters after so many steps, and so many more, ..., of each seed."""
    svi = SVI(model, guide, Adam(1e-3), elbo)

    def update(state: Any, key: Any) -> Any:
        return svi.update(state, data[jax.random.randint(key, (BATCH,), 0, len(data))])[0], None

    @jax.jit
    def more(state: Any, keys: Any) -> Any:
        return jax.lax.scan(update, state, keys)[0]

    found = []
    for seed in range(seeds):
        state, path = svi.init(jax.random.key(seed), data[:BATCH]), []
        for i, length in enumerate(lengths):
            for key in jax.random.split(jax.random.key(1000 * seed + i + 1), length // 50):  # one length: one compile
                state = more(state, jax.random.split(key, 50))
            path.append(svi.get_params(state))
        found.append(path)
    return found


def shown(values: list[float], form: str) -> str:
    return f"{np.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def main() -> None:
    chosen = arguments(__doc__ or "", steps=1600, seeds=3)
    warnings.simplefilter("ignore", UserWarning)  # RenyiELBO says that it does not support discrete latents
    x, counts = pictures(2200)
    data, test, right = jnp.asarray(x[:2000]), jnp.asarray(x[2000:]), counts[2000:]
    posterior, evidence = exact(x[2000:])
    bound = {"num_particles": PARTICLES, "objective": ImportanceWeighted()}
    contestants = {
        "`RenyiELBO(alpha=0)`": (RenyiELBO(alpha=0, num_particles=PARTICLES), 1),
        "`TraceGraph_ELBO()`": (TraceGraph_ELBO(num_particles=PARTICLES), 1),
        "`EstimatorELBO()`": (EstimatorELBO(num_particles=PARTICLES), 1),
        "the same, `ImportanceWeighted()`": (EstimatorELBO({"z_*": Reinforce(LeaveOneOut())}, **bound), 1),
        '... and `{"z_*": DisARM()}`': (EstimatorELBO({"z_*": DisARM()}, **bound), 2),
    }
    whole = chosen.steps
    table = []
    for name, (elbo, cost) in track(contestants.items(), "training", transient=True):
        lengths = [whole // 8 // cost, whole // 8 // cost, 3 * whole // 4 // cost]
        paths = train(elbo, data, lengths, chosen.seeds)
        q = [[np.asarray(counted(params, test)) for params in path] for path in paths]
        shares = [[float((at.argmax(-1) == right).mean()) for at in path] for path in q]
        off = [abs(path[-1] - posterior).sum(-1).mean() / 2 for path in q]
        held = [
            EstimatorELBO().evaluate(jax.random.key(9), path[-1], model, guide, test, num_particles=500).each.mean()
            for path in paths
        ]
        row = [shown(list(share), ".0%") for share in zip(*shares, strict=True)]
        table.append((name, *row, shown(off, ".3f"), shown(held, ".1f")))
    after = [f"{whole // 8:,} steps", f"{whole // 4:,}", f"{whole:,}"]
    report = Report("air", "Attend, infer, repeat with five particles: who learns to count?")
    report.table(f"Counted right, {chosen.seeds} seeds", ("", *after, "q(count) off by", "held-out bound"), table)
    report.remark(
        f"The exact posterior counts {(posterior.argmax(-1) == right).mean():.0%} right; the evidence is "
        f"{evidence.mean():.1f} nats. Always saying the commonest count: {np.bincount(right).max() / len(right):.0%}."
    )
    report.write()


if __name__ == "__main__":
    main()
