"""One row of the table in Pyro: train with `SVI`, evaluate, measure the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro import infer, optim
from pyro.infer import SVI, Trace_ELBO
from pyro.poutine import replay, trace

from ppl_estimators.demo.experiment import Row, Settings
from ppl_estimators.demo.network import Digits, program
from ppl_estimators.pyro import EstimatorELBO, with_estimators
from ppl_estimators.pyro.gradients import Gradients


class Trainer:
    """`row`'s ELBO on the digits network, from the starting point `initial`."""

    def __init__(self, row: Row, digits: Digits, initial: Mapping[str, np.ndarray], settings: Settings) -> None:
        torch.set_num_threads(1)  # the matrices are too small to share: two threads only wait for each other
        pyro.clear_param_store()
        pyro.set_rng_seed(settings.seed)
        self.settings, self.names = settings, frozenset(initial)
        self.data, self.held_out = torch.tensor(digits.train), torch.tensor(digits.held_out)
        self.model, self.plain_guide = program("pyro", initial)
        self.elbo: Any
        self.guide: Any = self.plain_guide
        if row.stock is None:
            options: Any = {"num_particles": row.num_particles, "vectorize_particles": row.num_particles > 1}
            self.elbo = EstimatorELBO(max_plate_nesting=1, **options)
            self.guide = with_estimators(self.plain_guide, row.estimators)
        else:
            self.elbo = vars(infer)[row.stock]()
        self.svi = SVI(self.model, self.guide, optim.Adam({"lr": settings.learning_rate}), self.elbo)

    def train(self, minibatches: np.ndarray) -> None:
        """One step on each, `[steps, size]` indices of training images."""
        for batch in minibatches:
            self.svi.step(self.data[batch])

    def parameters(self) -> dict[str, np.ndarray]:
        """The model's and the guide's parameters, without what the estimators keep."""
        return {name: pyro.param(name).detach().numpy().copy() for name in self.names}

    def held_out_elbo(self) -> float:
        """Nats per held-out image, by the library's own ELBO whatever trained the parameters."""
        particles = self.settings.held_out_particles
        elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(2)
            return -elbo.loss(self.model, self.plain_guide, self.held_out) / len(self.held_out)

    def gradients(self, reference: Mapping[str, np.ndarray], settling: np.ndarray) -> Gradients:
        """At `reference`, on the first minibatch. What the estimator keeps is trained on first, on the minibatches
        `settling`, with the network frozen there."""
        with torch.no_grad():
            for name, value in reference.items():
                pyro.param(name).copy_(torch.tensor(value))
        rate = self.settings.learning_rate
        self.svi.optim = optim.Adam(lambda name: {"lr": 0.0 if name in self.names else rate})
        self.train(settling)
        return Gradients(self.elbo, self.model, self.guide, (self.data[: self.settings.batch_size],))

    def reconstruct(self, images: np.ndarray) -> np.ndarray:
        """Expected share of ink of each pixel, after one pass through guide and model."""
        pyro.set_rng_seed(0)
        data = torch.tensor(images)
        with torch.no_grad():
            drawn = trace(self.plain_guide).get_trace(data)
            return np.asarray(replay(self.model, drawn)(data))
