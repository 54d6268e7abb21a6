"""One row of the table in NumPyro: train with `SVI`, evaluate, measure the gradient."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro import infer, optim
from numpyro.handlers import replay, seed, trace
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.svi import SVIState

from ppl_estimators.demo.experiment import Row, Settings
from ppl_estimators.demo.network import Digits
from ppl_estimators.demo.numpyro_program import program
from ppl_estimators.numpyro import EstimatorELBO, with_estimators
from ppl_estimators.numpyro.gradients import Gradients


class FrozenAdam(optim.Adam):
    """Adam that leaves the parameters named in `frozen` where they are."""

    def __init__(self, step_size: float, frozen: frozenset[str]) -> None:
        super().__init__(step_size)
        self.frozen = frozen

    def update(self, g: dict, state: tuple, value: jax.Array | None = None) -> tuple:
        g = {name: jnp.zeros_like(x) if name in self.frozen else x for name, x in g.items()}
        return super().update(g, state, value)


class Trainer:
    """`row`'s ELBO on the digits network, from the starting point `initial`."""

    def __init__(self, row: Row, digits: Digits, initial: Mapping[str, np.ndarray], settings: Settings) -> None:
        self.settings = settings
        self.train = jnp.asarray(digits.train)
        self.held_out = jnp.asarray(digits.held_out)
        self.names = frozenset(initial)
        self.model, self.guide = program(initial)
        if row.stock is None:
            self.elbo = EstimatorELBO(num_particles=row.num_particles)
            self.guide = with_estimators(self.guide, row.estimators)
        else:
            self.elbo = vars(infer)[row.stock]()
        self.svi = SVI(self.model, self.guide, optim.Adam(settings.learning_rate), self.elbo)
        self.state = self.svi.init(random.key(settings.seed), self.train[: settings.batch_size])

    def steps(self, minibatches: np.ndarray, chunks: int) -> Iterator[tuple[int, float]]:
        """Train on every minibatch; yields, after each chunk, the steps done and its seconds a step.

        The first chunk's time includes the compilation.
        """

        scan, done = self._scan(self.svi), 0
        for chunk in np.array_split(minibatches, chunks):
            start = time.perf_counter()
            self.state = jax.block_until_ready(scan(self.state, jnp.asarray(chunk)))
            done += len(chunk)
            yield done, (time.perf_counter() - start) / len(chunk)

    def _scan(self, svi: SVI) -> Any:
        def step(state: SVIState, batch: jax.Array) -> tuple[SVIState, None]:
            return svi.update(state, self.train[batch])[0], None

        return jax.jit(lambda state, batches: lax.scan(step, state, batches)[0])

    def parameters(self) -> dict[str, np.ndarray]:
        """The model's and the guide's parameters, without what the estimators keep."""
        parameters = self.svi.get_params(self.state)
        return {name: np.asarray(parameters[name]) for name in self.names}

    def held_out_elbo(self) -> float:
        """Nats per held-out image, by the library's own ELBO whatever trained the parameters."""
        return float(evaluate(self.parameters(), self.held_out, self.settings.held_out_particles))

    def gradients(self, reference: Mapping[str, np.ndarray]) -> Gradients:
        """At `reference`, on the first minibatch. First what the estimator keeps is trained on, with the network frozen
        there."""
        settings, images = self.settings, self.train[: self.settings.batch_size]
        svi = SVI(self.model, self.guide, FrozenAdam(settings.learning_rate, self.names), self.elbo)
        svi.init(random.key(0), images)
        parameters = self.svi.get_params(self.state) | {name: jnp.asarray(x) for name, x in reference.items()}
        state = self.state._replace(optim_state=svi.optim.init(parameters))
        order = np.arange(settings.burn_in * settings.batch_size) % len(self.train)
        state = self._scan(svi)(state, order.reshape(settings.burn_in, -1))
        kept = {"params": svi.get_params(state), "mutable_state": state.mutable_state}
        return Gradients(self.elbo, self.model, self.guide, (images,), **kept)

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Expected share of ink of each pixel, after one pass through guide and model."""
        model, guide = program(self.parameters())
        drawn = trace(seed(guide, random.key(0))).get_trace(images)
        return np.asarray(replay(seed(model, random.key(1)), drawn)(images))


@partial(jax.jit, static_argnames="particles")
def evaluate(parameters: dict[str, jax.Array], images: jax.Array, particles: int) -> jax.Array:
    """Compiled once for all rows: the parameters are the values that the program starts at."""
    model, guide = program(parameters)  # type: ignore[arg-type]  # traced arrays stand where numbers were
    return -Trace_ELBO(num_particles=particles).loss(random.key(2), {}, model, guide, images) / len(images)
