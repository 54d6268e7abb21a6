"""One row of the table in NumPyro: train with `SVI`, evaluate, measure the gradient."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.flatten_util import ravel_pytree
from numpyro import optim
from numpyro.handlers import replay, seed, trace
from numpyro.infer import ELBO, SVI, Trace_ELBO, TraceGraph_ELBO
from numpyro.infer.svi import SVIState

from ppl_estimators.demo.digits import Digits
from ppl_estimators.demo.numpyro_program import program
from ppl_estimators.demo.rows import Row
from ppl_estimators.demo.settings import Settings
from ppl_estimators.numpyro import EstimatorELBO, with_estimators

STOCK = {"TraceGraph_ELBO": TraceGraph_ELBO}


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
        self.elbo = make_elbo(row)
        if row.needs_hook:
            self.guide = with_estimators(self.guide, row.estimators)
        self.svi = SVI(self.model, self.guide, optim.Adam(settings.learning_rate), self.elbo)
        self.state = self.svi.init(random.key(settings.seed), self.train[: settings.batch_size])

    def steps(self, minibatches: np.ndarray, chunks: int) -> Iterator[tuple[int, float]]:
        """Train on every minibatch; yields, after each chunk, the steps done and its seconds a step.

        The first chunk's time includes the compilation.
        """

        def step(state: SVIState, batch: jax.Array) -> tuple[SVIState, None]:
            return self.svi.update(state, self.train[batch])[0], None

        scan = jax.jit(lambda state, batches: lax.scan(step, state, batches)[0])
        done = 0
        for chunk in np.array_split(minibatches, chunks):
            start = time.perf_counter()
            self.state = jax.block_until_ready(scan(self.state, jnp.asarray(chunk)))
            done += len(chunk)
            yield done, (time.perf_counter() - start) / len(chunk)

    def parameters(self) -> dict[str, np.ndarray]:
        """The model's and the guide's parameters, without what the estimators keep."""
        parameters = self.svi.get_params(self.state)
        return {name: np.asarray(parameters[name]) for name in self.names}

    def held_out_elbo(self) -> float:
        """Nats per held-out image, by the library's own ELBO whatever trained the parameters."""
        return float(evaluate(self.parameters(), self.held_out, self.settings.held_out_particles))

    def gradient_variance(self, reference: Mapping[str, np.ndarray]) -> float:
        """Total variance of the guide's gradient at `reference`, on the first minibatch.

        In (nats per image)², the loss being the minibatch's mean. First what the estimator keeps is trained on, with
        the network frozen at `reference`.
        """
        settings = self.settings
        adam = FrozenAdam(settings.learning_rate, self.names)
        parameters = self.svi.get_params(self.state) | dict(reference)
        order = (np.arange(settings.burn_in * settings.batch_size) % len(self.train)).reshape(settings.burn_in, -1)
        batches = np.concatenate([order, np.tile(order[:1], (settings.gradient_draws, 1))])
        counts = np.maximum(np.arange(1, len(batches) + 1) - settings.burn_in, 0)

        def loss(parameters: dict, kept: dict | None, key: jax.Array, images: jax.Array) -> tuple:
            if kept is None:
                return self.elbo.loss(key, parameters, self.model, self.guide, images), None
            out = self.elbo.loss_with_mutable_state(key, parameters | kept, self.model, self.guide, images)
            return out["loss"], out["mutable_state"]

        def step(carry: tuple, given: tuple[jax.Array, jax.Array]) -> tuple[tuple, None]:
            adam_state, kept, key, mean, squares = carry
            batch, count = given
            key, own = random.split(key)
            gradients, kept = jax.grad(loss, has_aux=True)(adam.get_params(adam_state), kept, own, self.train[batch])
            trained = adam.update(gradients, adam_state)
            adam_state = jax.tree.map(lambda old, new: jnp.where(count > 0, old, new), adam_state, trained)
            guide = {name: g for name, g in gradients.items() if name in self.names and name.startswith("guide.")}
            gradient, _ = ravel_pytree(guide)
            delta = gradient - mean  # Welford's running moments, from the end of the burn-in on
            mean = jnp.where(count > 0, mean + delta / jnp.maximum(count, 1), mean)
            squares = squares + jnp.where(count > 0, delta * (gradient - mean), 0.0)
            return (adam_state, kept, key, mean, squares), None

        zeros = jnp.zeros(sum(value.size for name, value in reference.items() if name.startswith("guide.")))
        start = (adam.init(parameters), self.state.mutable_state, self.state.rng_key, zeros, zeros)
        squares = jax.jit(lambda *given: lax.scan(step, start, given)[0][-1])(batches, counts)
        return float(squares.sum()) / (settings.gradient_draws - 1) / settings.batch_size**2

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


def make_elbo(row: Row) -> ELBO:
    """The library's own ELBO, or ours with the row's estimators."""
    if row.stock is not None:
        return STOCK[row.stock]()
    if row.needs_hook:
        return EstimatorELBO(num_particles=row.num_particles)
    return EstimatorELBO(row.estimators, num_particles=row.num_particles)
