"""Topics of 2,000 documents over 1,000 words, documents in minibatches: peak memory and learning in both libraries.

The topic of every word is summed out in the model; topics and documents are points of the guide, documents by a network
of their counts. Each row is a fresh process; memory is what it has resident at most, above what it has before the
first step.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
from _harness import Report, arguments
from rich.progress import track

TOPICS, WORDS, DOCUMENTS = 8, 1000, 2000
MIB = 2**20


def data(length: int) -> Any:
    """Words ``[length, documents]`` of 8 topics."""
    rng = np.random.default_rng(0)
    of_topic, of_document = rng.dirichlet(np.full(WORDS, 0.05), TOPICS), rng.dirichlet(np.full(TOPICS, 0.3), DOCUMENTS)
    u, upto = rng.uniform(size=(length, DOCUMENTS)), (of_document @ of_topic).cumsum(-1)
    return np.stack([np.minimum(np.searchsorted(upto[i], u[:, i]), WORDS - 1) for i in range(DOCUMENTS)], 1)


def resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / MIB


def in_pyro(length: int, batch: int, steps: int) -> tuple[float, float, float]:
    """MiB, nats a word at the first and the last steps."""
    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.infer import SVI
    from pyro.optim import Adam

    from ppl_estimators.pyro import EstimatorELBO

    warnings.simplefilter("ignore")
    words = torch.tensor(data(length))
    net = torch.nn.Sequential(torch.nn.Linear(WORDS, 64), torch.nn.Softplus(), torch.nn.Linear(64, TOPICS))

    def model(words: Any) -> None:
        with pyro.plate("topics", TOPICS):
            of_topic = pyro.sample("of_topic", dist.Dirichlet(torch.full((WORDS,), 1.0)))
        with pyro.plate("documents", DOCUMENTS, subsample=words[0], dim=-1):
            of_document = pyro.sample("of_document", dist.Dirichlet(torch.ones(TOPICS)))
            with pyro.plate("words", length, dim=-2):
                topic = pyro.sample("topic", dist.Categorical(of_document), infer={"enumerate": "parallel"})
                pyro.sample("word", dist.Categorical(of_topic[topic]), obs=words)

    def guide(words: Any) -> None:
        pyro.module("net", net)
        with pyro.plate("topics", TOPICS):
            logits = pyro.param("topics_", lambda: 0.1 * torch.randn(TOPICS, WORDS))
            pyro.sample("of_topic", dist.Delta(logits.softmax(-1), event_dim=1))
        counts = torch.zeros(words.shape[1], WORDS).scatter_add_(1, words.T, torch.ones(words.T.shape))
        with pyro.plate("documents", DOCUMENTS, subsample=words[0], dim=-1):
            pyro.sample("of_document", dist.Delta((net(counts / length)).softmax(-1), event_dim=1))

    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    svi = SVI(model, guide, Adam({"lr": 0.03}), EstimatorELBO(max_plate_nesting=2, verify=False))
    before, losses = resident(), []
    for _ in range(steps):
        losses.append(svi.step(words[:, torch.randint(DOCUMENTS, (batch,))]))
    return (resident() - before, *_ends(losses, length))


def in_numpyro(length: int, batch: int, steps: int) -> tuple[float, float, float]:
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import SVI
    from numpyro.optim import Adam

    from ppl_estimators.numpyro import EstimatorELBO

    warnings.simplefilter("ignore")
    words, rng = jnp.asarray(data(length)), np.random.default_rng(1)
    start_of = {
        "topics_": 0.1 * rng.normal(size=(TOPICS, WORDS)), "in": rng.uniform(-1, 1, size=(WORDS, 64)) / WORDS**0.5,
        "out": rng.uniform(-1, 1, size=(64, TOPICS)) / 8,
    }  # fmt: skip

    def model(words: Any) -> None:
        with numpyro.plate("topics", TOPICS):
            of_topic = numpyro.sample("of_topic", dist.Dirichlet(jnp.full(WORDS, 1.0)))
        with numpyro.plate("documents", DOCUMENTS, subsample_size=batch, dim=-1):
            of_document = numpyro.sample("of_document", dist.Dirichlet(jnp.ones(TOPICS)))
            with numpyro.plate("words", length, dim=-2):
                topic = numpyro.sample("topic", dist.Categorical(of_document), infer={"enumerate": "parallel"})
                numpyro.sample("word", dist.Categorical(of_topic[topic]), obs=words)

    def guide(words: Any) -> None:
        p = {n: numpyro.param(n, jnp.asarray(x)) for n, x in start_of.items()}
        with numpyro.plate("topics", TOPICS):
            numpyro.sample("of_topic", dist.Delta(jax.nn.softmax(p["topics_"]), event_dim=1))
        counts = jax.nn.one_hot(words, WORDS).sum(0)
        with numpyro.plate("documents", DOCUMENTS, subsample_size=batch, dim=-1):
            logits = jax.nn.softplus(counts / length @ p["in"]) @ p["out"]
            numpyro.sample("of_document", dist.Delta(jax.nn.softmax(logits), event_dim=1))

    svi = SVI(model, guide, Adam(0.03), EstimatorELBO())
    state = svi.init(jax.random.key(0), words[:, :batch])
    update = jax.jit(lambda state, words: svi.update(state, words))
    before, losses = resident(), []
    for _ in range(steps):
        state, loss = update(state, words[:, rng.integers(DOCUMENTS, size=batch)])
        losses.append(float(loss))
    return (resident() - before, *_ends(losses, length))


def _ends(losses: list[float], length: int) -> tuple[float, float]:
    few = max(1, len(losses) // 10)
    a_word = np.array(losses) / (DOCUMENTS * length)
    return float(a_word[:few].mean()), float(a_word[-few:].mean())


def main() -> None:
    options = arguments(__doc__, steps=300, long_steps=20)
    report = Report("topics", f"{TOPICS} topics of {DOCUMENTS:,} documents over {WORDS:,} words, in minibatches")
    settings = [(64, 32, options.steps), (1000, 8, options.long_steps)]
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as processes:
        jobs = [(name, s, processes.submit(f, *s)) for s in settings for name, f in
                (("Pyro", in_pyro), ("NumPyro", in_numpyro))]  # fmt: skip
        rows = []
        for name, (length, batch, steps), job in track(jobs, "processes", transient=True):
            peak, first, last = job.result()
            rows.append((f"{name}, {length} words a document, {batch} documents a step, {steps} steps",
                         f"{peak:.0f}", f"{first:.3f}", f"{last:.3f}"))  # fmt: skip
    columns = ("", "peak MiB above the start", "loss a word at first", "at the end")
    report.table("Memory of training, and −ELBO in nats a word", columns, rows)
    report.remark(
        "All topics of all words side by side, with a probability for every word of the vocabulary, would be "
        f"{TOPICS * 64 * DOCUMENTS * WORDS * 4 / 2**30:.0f} GiB for each array of all data at 64 words a document, "
        f"and {TOPICS * 1000 * DOCUMENTS * WORDS * 4 / 2**30:.0f} GiB at 1,000. The loss holds the priors' densities."
    )
    report.write()


if __name__ == "__main__":
    main()
