"""One row of the table in NumPyro: train with `SVI`, evaluate, measure the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro import infer, optim
from numpyro.handlers import replay, seed, trace
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.svi import SVIState

from ppl_estimators.demo.experiment import Row, Settings
from ppl_estimators.demo.network import Digits, program
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
        self.settings, self.names = settings, frozenset(initial)
        self.data, self.held_out = jnp.asarray(digits.train), jnp.asarray(digits.held_out)
        self.model, self.guide = program("numpyro", initial)
        if row.stock is None:
            self.elbo = EstimatorELBO(num_particles=row.num_particles)
            self.guide = with_estimators(self.guide, row.estimators)
        else:
            self.elbo = vars(infer)[row.stock]()
        self.svi = SVI(self.model, self.guide, optim.Adam(settings.learning_rate), self.elbo)
        self.state = self.svi.init(random.key(settings.seed), self.data[: settings.batch_size])
        self.steps = jax.jit(partial(self._steps, self.svi))

    def _steps(self, svi: SVI, state: SVIState, minibatches: jax.Array) -> SVIState:
        return lax.scan(lambda at, batch: (svi.update(at, self.data[batch])[0], None), state, minibatches)[0]

    def train(self, minibatches: np.ndarray) -> None:
        """One step on each, `[steps, size]` indices of training images; the first call compiles."""
        self.state = jax.block_until_ready(self.steps(self.state, jnp.asarray(minibatches)))

    def parameters(self) -> dict[str, np.ndarray]:
        """The model's and the guide's parameters, without what the estimators keep."""
        parameters = self.svi.get_params(self.state)
        return {name: np.asarray(parameters[name]) for name in self.names}

    def held_out_elbo(self) -> float:
        """Nats per held-out image, by the library's own ELBO whatever trained the parameters."""
        return float(evaluate(self.parameters(), self.held_out, self.settings.held_out_particles))

    def gradients(self, reference: Mapping[str, np.ndarray], settling: np.ndarray) -> Gradients:
        """At `reference`, on the first minibatch. What the estimator keeps is trained on first, on the minibatches
        `settling`, with the network frozen there."""
        images = self.data[: self.settings.batch_size]
        svi = SVI(self.model, self.guide, FrozenAdam(self.settings.learning_rate, self.names), self.elbo)
        svi.init(random.key(0), images)
        parameters = self.svi.get_params(self.state) | {name: jnp.asarray(x) for name, x in reference.items()}
        state = self.state._replace(optim_state=svi.optim.init(parameters))
        state = jax.jit(partial(self._steps, svi))(state, jnp.asarray(settling))
        kept = {"params": svi.get_params(state), "mutable_state": state.mutable_state}
        return Gradients(self.elbo, self.model, self.guide, (images,), **kept)

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Expected share of ink of each pixel, after one pass through guide and model."""
        model, guide = program("numpyro", self.parameters())
        drawn = trace(seed(guide, random.key(0))).get_trace(images)
        return np.asarray(replay(seed(model, random.key(1)), drawn)(images))


@partial(jax.jit, static_argnames="particles")
def evaluate(parameters: dict[str, jax.Array], images: jax.Array, particles: int) -> jax.Array:
    """Compiled once for all rows: the parameters are the values that the program starts at."""
    model, guide = program("numpyro", parameters)
    return -Trace_ELBO(num_particles=particles).loss(random.key(2), {}, model, guide, images) / len(images)
