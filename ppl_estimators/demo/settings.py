"""How long and how thoroughly: the defaults take both libraries four to six minutes on two cores."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Settings:
    """Sizes of a run; `steps` by backend, because a step of NumPyro's is compiled and a step of Pyro's is not."""

    steps: dict[str, int] = field(default_factory=lambda: {"numpyro": 3_000, "pyro": 400})
    batch_size: int = 100
    learning_rate: float = 3e-3
    checkpoints: int = 20
    held_out_particles: int = 10
    burn_in: int = 200  # steps that an estimator's own networks get to settle at the reference
    gradient_draws: int = 150
    seed: int = 0

    def with_steps(self, steps: int) -> Settings:
        """The same, with `steps` in every backend."""
        return replace(self, steps=dict.fromkeys(self.steps, steps))

    def smoke(self) -> Settings:
        """A few seconds of everything, to see that it works; the figures mean nothing."""
        return replace(self.with_steps(20), checkpoints=4, held_out_particles=2, burn_in=4, gradient_draws=8)
