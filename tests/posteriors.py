"""Five posteriors known exactly, and how far a guide with given parameters is from each. Neither Pyro nor NumPyro.

Every guide is rich enough to hold its posterior, so that KL(q ‖ posterior) can reach 0. A case says where the guide
starts, and how close it must come. `CASES` also lists the mixes of estimators that each case is trained with.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
from scipy import special, stats

from ppl_estimators import (
    REBAR,
    RELAX,
    ControlVariate,
    DisARM,
    Enumerate,
    Learned,
    LeaveOneOut,
    MovingAverage,
    OptimalConstant,
    PastSteps,
    Pathwise,
    Reinforce,
    RELAXWithModel,
    StickingTheLanding,
)

Parameters = Mapping[str, np.ndarray]


def kl_categorical(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p ‖ q) of probabilities, summed over the last axis and whatever is before it."""
    return float(np.sum(special.xlogy(p, p) - special.xlogy(p, q)))


def kl_normal(m: Any, s: Any, m0: Any, s0: Any) -> np.ndarray:
    return np.log(s0 / s) + (s**2 + (m - m0) ** 2) / (2 * s0**2) - 0.5


class BetaBernoulli:
    """A Beta prior on a probability, nine draws observed."""

    prior = (2.0, 3.0)
    data = np.array([1, 1, 0, 1, 1, 1, 0, 1, 1], dtype=float)
    start: ClassVar[Parameters] = {"alpha": np.array(1.0), "beta": np.array(1.0)}

    def __init__(self) -> None:
        heads = self.data.sum()
        self.alpha, self.beta = self.prior[0] + heads, self.prior[1] + len(self.data) - heads

    def kl(self, q: Parameters) -> float:
        a, b, a0, b0 = q["alpha"], q["beta"], self.alpha, self.beta
        psi = special.digamma
        return float(
            special.betaln(a0, b0) - special.betaln(a, b)
            + (a - a0) * psi(a) + (b - b0) * psi(b) + (a0 - a + b0 - b) * psi(a + b)
        )  # fmt: skip


class NormalNormal:
    """A Normal prior on a mean, five observations with known noise."""

    prior, noise = (0.5, 2.0), 1.5
    data = np.array([2.9, 0.4, 3.1, 1.7, 2.2])
    start: ClassVar[Parameters] = {"loc": np.array(-1.0), "scale": np.array(1.0)}

    def __init__(self) -> None:
        precision = self.prior[1] ** -2 + len(self.data) * self.noise**-2
        self.scale = precision**-0.5
        self.loc = (self.prior[0] * self.prior[1] ** -2 + self.data.sum() * self.noise**-2) / precision

    def kl(self, q: Parameters) -> float:
        return float(kl_normal(q["loc"], q["scale"], self.loc, self.scale))


class Mixture:
    """Three components; each datum has an assignment z and a latent value y, seen with noise: x ~ Normal(y, noise)."""

    weights = np.array([0.5, 0.3, 0.2])
    locs, scales, noise = np.array([-2.0, 0.5, 2.0]), np.array([0.8, 0.5, 1.2]), 0.6
    data = np.array([-1.4, -0.6, 0.1, 0.9, 1.6])
    start: ClassVar[Parameters] = {"logits": np.zeros((5, 3)), "loc": np.zeros((5, 3)), "scale": np.ones((5, 3))}

    def __init__(self) -> None:
        x = self.data[:, None]
        joint = self.weights * stats.norm.pdf(x, self.locs, np.hypot(self.scales, self.noise))
        self.assignment = joint / joint.sum(-1, keepdims=True)  # [datum, component]
        precision = self.scales**-2 + self.noise**-2
        self.scale = np.broadcast_to(precision**-0.5, self.assignment.shape)
        self.loc = (self.locs * self.scales**-2 + x * self.noise**-2) / precision

    def kl(self, q: Parameters) -> float:
        p = special.softmax(q["logits"], axis=-1)
        values = kl_normal(q["loc"], q["scale"], self.loc, self.scale)
        return kl_categorical(p, self.assignment) + float((p * values).sum())


class SpikeAndSlab:
    """Regression on three features, each included or not: y ~ Normal(X (γ ∘ β), noise).

    The guide draws γ bit by bit, each given those before it, then β from a full Gaussian for each of the eight γ.
    """

    inclusion, slab, noise = 0.4, 1.5, 1.0
    features = np.array(
        [[1.0, 0.8, 0.1], [0.3, 0.5, -1.0], [-1.2, -0.9, 0.4], [0.6, 0.1, 0.9], [-0.4, -0.8, -0.5], [0.2, 0.6, 0.7]]
    )
    data = np.array([1.9, -0.4, -1.1, 1.0, -0.9, 0.8])
    states = np.array(list(itertools.product((0, 1), repeat=3)), dtype=float)  # [8, 3]
    start: ClassVar[Parameters] = {
        "table_0": np.zeros(()),
        "table_1": np.zeros(2),
        "table_2": np.zeros((2, 2)),
        "loc": np.zeros((2, 2, 2, 3)),
        "root": np.zeros((2, 2, 2, 3, 3)),  # Cholesky factor: below the diagonal, and the logarithm of the diagonal
    }

    def __init__(self) -> None:
        log_joint, self.loc, self.covariance = [], [], []
        for state in self.states:
            x = self.features * state
            seen = self.noise**2 * np.eye(len(self.data)) + self.slab**2 * x @ x.T
            log_joint.append(
                stats.multivariate_normal.logpdf(self.data, cov=seen)
                + stats.bernoulli.logpmf(state, self.inclusion).sum()
            )
            covariance = np.linalg.inv(np.eye(3) / self.slab**2 + x.T @ x / self.noise**2)
            self.covariance.append(covariance)
            self.loc.append(covariance @ x.T @ self.data / self.noise**2)
        self.probabilities = special.softmax(log_joint)

    def kl(self, q: Parameters) -> float:
        p = autoregressive([q[f"table_{i}"] for i in range(3)])
        loc, root = q["loc"].reshape(8, 3), q["root"].reshape(8, 3, 3)
        total = kl_categorical(p, self.probabilities)
        for i in range(8):
            factor = np.tril(root[i], -1) + np.diag(np.exp(np.diag(root[i])))
            precision = np.linalg.inv(self.covariance[i])
            away = loc[i] - self.loc[i]
            total += p[i] * 0.5 * (
                np.trace(precision @ factor @ factor.T) + away @ precision @ away - 3
                + np.linalg.slogdet(self.covariance[i])[1] - 2 * np.diag(root[i]).sum()
            )  # fmt: skip
        return float(total)


class BeliefNetwork:
    """Two bits on top, three below, four observed: p(t) p(l | t) p(x | l). The guide draws all five in this order,
    each given all before it."""

    names = ("t_0", "t_1", "l_0", "l_1", "l_2")
    top = np.array([0.3, -0.6])
    down, below = np.array([[1.4, -0.9], [0.7, 1.8], [-1.3, 0.4]]), np.array([-0.2, 0.3, 0.5])
    out, seen = (
        np.array([[1.1, -1.6, 0.8], [-0.7, 1.2, 1.5], [2.0, 0.6, -1.1], [0.4, -0.5, 0.9]]),
        np.array([0.1, -0.4, 0.2, -0.3]),
    )
    data = np.array([1.0, 0.0, 1.0, 1.0])
    states = np.array(list(itertools.product((0, 1), repeat=5)), dtype=float)  # [32, 5]
    start: ClassVar[Parameters] = {f"table_{i}": np.zeros((2,) * i) for i in range(5)}

    def __init__(self) -> None:
        top, low = self.states[:, :2], self.states[:, 2:]
        log_joint = (
            _log_bernoulli(top, self.top)
            + _log_bernoulli(low, top @ self.down.T + self.below)
            + _log_bernoulli(self.data, low @ self.out.T + self.seen)
        )
        self.probabilities = special.softmax(log_joint)

    def kl(self, q: Parameters) -> float:
        return kl_categorical(autoregressive([q[f"table_{i}"] for i in range(5)]), self.probabilities)


def _log_bernoulli(x: np.ndarray, logits: np.ndarray) -> np.ndarray:
    return (x * logits - np.logaddexp(0, logits)).sum(-1)


def autoregressive(tables: list[np.ndarray]) -> np.ndarray:
    """Probabilities of all states, in the order of `itertools.product`, of bits whose logits are looked up by the
    bits before them: ``tables[i]`` has shape ``(2,) * i``."""
    log_p = np.zeros(())
    for table in tables:
        both = np.stack([-np.logaddexp(0, table), -np.logaddexp(0, -table)], axis=-1)
        log_p = log_p[..., None] + both
    return np.exp(log_p).reshape(-1)


@dataclass(frozen=True)
class Mix:
    """A choice of estimators for one case, and how it is trained."""

    name: str
    estimators: Mapping[str, Any]
    particles: int = 16
    rate: float = 0.05
    steps: int = 1500
    options: Mapping[str, Any] = field(default_factory=dict)  # of the program


LOO = Reinforce(LeaveOneOut())
AVERAGE = Reinforce(MovingAverage())
NVIL = Reinforce(MovingAverage() + Learned(hidden=8))


def value(z: Any) -> Any:
    return z


def mean(distribution: Any) -> Any:
    return distribution.mean


def square(z: Any) -> Any:
    return z**2


def mean_square(distribution: Any) -> Any:
    return distribution.mean**2 + distribution.variance


#: name: (case, tolerance in nats, mixes)
CASES: dict[str, tuple[Any, float, list[Mix]]] = {
    "beta_bernoulli": (
        BetaBernoulli(),
        0.005,
        [
            Mix("moving_average", {"p": AVERAGE}),
            Mix("leave_one_out", {"p": LOO}),
            Mix("optimal_constant", {"p": Reinforce(OptimalConstant())}),
            Mix("control_variate", {"p": ControlVariate(value, mean, baseline=LeaveOneOut())}),
        ],
    ),
    "normal_normal": (
        NormalNormal(),
        0.005,
        [
            Mix("pathwise", {"m": Pathwise()}),
            Mix("sticking_the_landing", {"m": StickingTheLanding()}, particles=1),
            Mix("leave_one_out", {"m": LOO}),
            Mix("nvil", {"m": NVIL}),
            Mix(
                "control_variate", {"m": ControlVariate(square, mean_square, PastSteps(0.9), baseline=MovingAverage())}
            ),
        ],
    ),
    "mixture": (
        Mixture(),
        0.04,
        [
            Mix("enumerate_pathwise", {"z": Enumerate(), "y": Pathwise()}, options={"one_hot": False}),
            Mix("leave_one_out_sticking", {"z": LOO, "y": StickingTheLanding()}),
            Mix("nvil_leave_one_out", {"z": NVIL, "y": LOO}),
            Mix("relax_pathwise", {"z": RELAX(hidden=8), "y": Pathwise()}),
            Mix("rebar_sticking", {"z": REBAR(), "y": StickingTheLanding()}),
        ],
    ),
    "spike_and_slab": (
        SpikeAndSlab(),
        0.02,
        [
            Mix("disarm_sticking", {"bit_*": DisARM(), "slab": StickingTheLanding()}),
            Mix("enumerate_pathwise", {"bit_*": Enumerate(), "slab": Pathwise()}),
            Mix(
                "one_of_each",
                {"bit_0": Enumerate(), "bit_1": AVERAGE, "bit_2": DisARM(), "slab": StickingTheLanding()},
            ),
            Mix("relax_sticking", {"bit_*": RELAX(hidden=8), "slab": StickingTheLanding()}),
        ],
    ),
    "belief_network": (
        BeliefNetwork(),
        0.01,
        [
            Mix("disarm", {"*": DisARM()}),
            Mix("leave_one_out", {"*": LOO}),
            Mix("nvil_disarm", {"t_*": NVIL, "l_*": DisARM()}),
            Mix("relax_disarm", {"t_0": RELAXWithModel(hidden=8), "t_1": RELAX(hidden=8), "l_*": DisARM()}),
            Mix(
                "rebar_enumerate", {"t_0": AVERAGE, "t_1": REBAR(), "l_0": Enumerate(), "l_1": NVIL, "l_2": Enumerate()}
            ),
        ],
    ),
}

#: each posterior once, by estimators that keep something where there are some
QUICK = {
    "numpyro": ("beta_bernoulli-moving_average", "mixture-relax_pathwise", "belief_network-rebar_enumerate"),
    "pyro": ("normal_normal-nvil", "mixture-nvil_leave_one_out", "spike_and_slab-one_of_each"),
}


def runs(library: str) -> list[Any]:
    """Case and mix; what is not in `QUICK` is slow."""
    return [
        pytest.param(name, mix, id=label, marks=() if label in QUICK[library] else pytest.mark.slow)
        for name, (_, _, mixes) in CASES.items()
        for mix in mixes
        for label in [f"{name}-{mix.name}"]
    ]


def assert_reached(name: str, parameters: Parameters) -> None:
    """The assertion that the start must fail and the end must pass."""
    case, tolerance, _ = CASES[name]
    distance = case.kl({k: np.asarray(parameters[k], dtype=float) for k in case.start})
    assert distance < tolerance, f"KL(q ‖ posterior) is {distance:.4f} nats"
