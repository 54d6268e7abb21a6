"""A topic model with gamma and normal latents: what closed divergences take off the gradient's variance.

    python benchmarks/analytic_kl.py

Scikit-learn's digits as short documents: 64 pixels are the words, and 2% of the ink are their counts, 100 documents of
six words or so. Each has gamma intensities of 10 topics, a topic is a softmax of 64 normals, counts are Poisson; the
guide is of the same families, with parameters for each document. Variance of one gradient, summed over the parameters
of the gammas and of the normals, over that of the library's `TraceMeanField_ELBO`, at the start and after training with
it (the same parameters for all of a library). In Pyro the losses are also held against each other under one seed: the
largest difference of an entry of the gradient, relative to the largest entry.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pyro
import pyro.distributions as tdist
import torch
from _harness import Report, arguments
from sklearn.datasets import load_digits

from ppl_estimators import AnalyticKL
from ppl_estimators.numpyro import EstimatorELBO as JaxELBO
from ppl_estimators.pyro import EstimatorELBO as TorchELBO

TOPICS, WORDS, DOCUMENTS = 10, 64, 100
STOCK = "`TraceMeanField_ELBO`"
Start = dict[str, np.ndarray]


def start() -> Start:
    """Logarithms of what is positive."""
    rng = np.random.default_rng(1)
    return {
        "a": np.full((DOCUMENTS, TOPICS), np.log(2.0)),
        "b": np.full((DOCUMENTS, TOPICS), np.log(5.0)),
        "m": rng.normal(size=(TOPICS, WORDS)),
        "s": np.full((TOPICS, WORDS), np.log(0.3)),
    }


def by_family(variances: Any) -> list[float]:
    """Of the gammas (a, b) and of the normals (m, s)."""
    a, b, m, s = (float(v.sum()) for v in variances)
    return [a + b, m + s]


def in_pyro(counts: np.ndarray, steps: int, draws: int) -> dict[str, list[float]]:
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    x = torch.tensor(counts, dtype=torch.float)
    first = {k: torch.tensor(v, dtype=torch.float) for k, v in start().items()}

    def model(x: Any, kl: str | None = None) -> None:
        topics = pyro.sample("topics", tdist.Normal(torch.zeros(TOPICS, WORDS), 1.0).to_event(2), infer={"kl": kl})
        with pyro.plate("documents", DOCUMENTS):
            each = pyro.sample("each", tdist.Gamma(torch.full((TOPICS,), 0.5), 2.5).to_event(1), infer={"kl": kl})
            pyro.sample("words", tdist.Poisson(each @ topics.softmax(-1) + 1e-6).to_event(1), obs=x)

    def guide(x: Any, kl: str | None = None) -> None:
        a, b, m, s = (pyro.param(k, first[k]) for k in "abms")
        pyro.sample("topics", tdist.Normal(m, s.exp()).to_event(2), infer={"kl": kl})
        with pyro.plate("documents", DOCUMENTS):
            pyro.sample("each", tdist.Gamma(a.exp(), b.exp()).to_event(1), infer={"kl": kl})

    losses = {
        STOCK: (pyro.infer.TraceMeanField_ELBO(), None),
        "the default": (TorchELBO(), None),
        "`AnalyticKL()`": (TorchELBO(objective=AnalyticKL()), None),
        '`infer={"kl": "analytic"}`': (TorchELBO(), "analytic"),
    }

    def gradient(loss: Any, kl: Any) -> list[np.ndarray]:
        store = dict(pyro.get_param_store().named_parameters())
        for p in store.values():
            p.grad = None
        loss.loss_and_grads(model, guide, x, kl)
        return [store[k].grad.numpy().copy() for k in "abms"]

    def at(loss: Any) -> list[float]:
        rows = zip(*(gradient(*loss) for _ in range(draws)), strict=True)
        return by_family(np.var(row, axis=0) for row in rows)

    def once(loss: Any) -> np.ndarray:
        pyro.set_rng_seed(1)
        return np.concatenate([g.ravel() for g in gradient(*loss)])

    for loss in losses.values():  # meet the program
        loss[0].loss_and_grads(model, guide, x, loss[1])
    before = {name: at(loss) for name, loss in losses.items()}
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), pyro.infer.TraceMeanField_ELBO())
    for _ in range(steps):
        svi.step(x)
    after, reference = {name: at(loss) for name, loss in losses.items()}, once(losses[STOCK])
    apart = {name: abs(once(loss) - reference).max() / abs(reference).max() for name, loss in losses.items()}
    return {name: [*before[name], *after[name], apart[name]] for name in losses}


def in_numpyro(counts: np.ndarray, steps: int, draws: int) -> dict[str, list[float]]:
    x = jnp.asarray(counts, dtype=jnp.float32)
    params = {k: jnp.asarray(v, dtype=jnp.float32) for k, v in start().items()}

    def program(kl: str | None) -> tuple[Any, Any]:
        infer = {"kl": kl}

        def model(x: Any) -> None:
            topics = numpyro.sample("topics", dist.Normal(jnp.zeros((TOPICS, WORDS)), 1.0).to_event(2), infer=infer)
            with numpyro.plate("documents", DOCUMENTS):
                each = numpyro.sample("each", dist.Gamma(jnp.full(TOPICS, 0.5), 2.5).to_event(1), infer=infer)
                numpyro.sample("words", dist.Poisson(each @ jax.nn.softmax(topics) + 1e-6).to_event(1), obs=x)

        def guide(x: Any) -> None:
            a, b, m, s = (numpyro.param(k, params[k]) for k in "abms")
            numpyro.sample("topics", dist.Normal(m, jnp.exp(s)).to_event(2), infer=infer)
            with numpyro.plate("documents", DOCUMENTS):
                numpyro.sample("each", dist.Gamma(jnp.exp(a), jnp.exp(b)).to_event(1), infer=infer)

        return model, guide

    losses = {
        STOCK: (numpyro.infer.TraceMeanField_ELBO(), None),
        "the default": (JaxELBO(), None),
        "`AnalyticKL()`": (JaxELBO(objective=AnalyticKL()), None),
        '`infer={"kl": "analytic"}`': (JaxELBO(), "analytic"),
    }

    def variances(loss: Any, kl: Any) -> Any:
        model, guide = program(kl)

        def gradient(params: Any, key: Any) -> Any:
            found = jax.grad(lambda params: loss.loss(key, params, model, guide, x))(params)
            return [found[k] for k in "abms"]

        def at(params: Any, keys: Any) -> Any:
            return [jnp.var(g, axis=0).sum() for g in jax.lax.map(lambda key: gradient(params, key), keys)]

        return jax.jit(at)

    compiled = {name: variances(*loss) for name, loss in losses.items()}
    keys = jax.random.split(jax.random.key(0), draws)
    svi = numpyro.infer.SVI(*program(None), numpyro.optim.Adam(0.03), losses[STOCK][0])
    trained = svi.run(jax.random.key(2), steps, x, progress_bar=False).params
    return {n: [*by_family(f(params, keys)), *by_family(f(trained, keys))] for n, f in compiled.items()}


def main() -> None:
    chosen = arguments(__doc__ or "", steps=1000, draws=300)
    torch.set_num_threads(1)
    ink = load_digits().data[:DOCUMENTS].astype(int)
    counts = np.random.default_rng(0).binomial(ink, 0.02)
    report = Report("analytic_kl", "Closed divergences, a topic model with gamma and normal latents")
    columns = ("gammas, start", "normals, start", "gammas, trained", "normals, trained", "under one seed")
    for library, measured in (("Pyro", in_pyro), ("NumPyro", in_numpyro)):
        found = measured(counts, chosen.steps, chosen.draws)
        stock, table = found[STOCK], []
        for name, row in found.items():
            shown = [f"{v / s:.2f}" for v, s in zip(row[:4], stock, strict=False)]
            table.append((name, *shown, *(f"{apart:.1e}" for apart in row[4:])))
        title = f"{library}: variance over that of TraceMeanField_ELBO, {chosen.draws} draws"
        report.table(title, ("", *columns[: len(stock)]), table)
    report.write()


if __name__ == "__main__":
    main()
