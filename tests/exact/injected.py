"""ELBOs whose noise the test chooses, and grids of noise to integrate over.

The engine asks ``elbo.randomness``; here it answers from a table ``{site: {label: array}}``. Labels are the
estimator's own ("u", "v"), and "value" for a draw from the distribution itself. Integrating a gradient over a grid
of tables gives its exact mean and variance: no seed, no tolerance.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyro
import torch

from ppl_estimators.core.step import Step
from ppl_estimators.numpyro import EstimatorELBO as JaxELBO
from ppl_estimators.numpyro.randomness import Randomness as JaxRandomness
from ppl_estimators.pyro import EstimatorELBO as TorchELBO
from ppl_estimators.pyro.randomness import Randomness as TorchRandomness

Table = Mapping[str, Mapping[str, Any]]


class FromTableJax(JaxRandomness):
    """Row ``row`` of each array in the table."""

    def __init__(self) -> None:
        self.table: Table = {}
        self.row = 0

    def value(self, name: str, fn: Any, key: Any, step: Any = None) -> Any:
        given = jnp.asarray(self.table[name]["value"])[self.row]
        given = given if step is None else given[step]
        if fn.support.is_discrete:
            return given.astype(jax.eval_shape(fn.sample, key).dtype), []
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        return fn.loc + fn.scale * given, []  # Normal sites take standard noise

    def noise(self, names: Sequence[str], label: str, noise: Any, keys: Any, step: Any = None) -> Any:
        rows = [jnp.asarray(self.table[name][label])[self.row] for name in names]
        rows = rows if step is None else [row[step] for row in rows]
        return jnp.stack([jnp.broadcast_to(row, noise.shape) for row in rows])


class InjectedJax(JaxELBO):
    """Particles run one after another; particle k reads the k-th row of each array in the table."""

    source = FromTableJax

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, vectorize_particles=self._in_turn, **kwargs)
        self.randomness = self.source()

    def _in_turn(self, fn: Callable[..., Any], keys: Any) -> Any:
        out = []
        for self.randomness.row, key in enumerate(keys):
            out.append(fn(key))
        self.randomness.row = 0
        return jax.tree.map(lambda *x: jnp.stack(x), *out)


class InTurn(FromTableJax):
    """Draws from the site itself are read one after another: ``value [K, n, ...]``."""

    calls = -1

    def value(self, name: str, fn: Any, key: Any, step: Any = None) -> Any:
        self.calls += 1
        given = self.table[name]["value"][self.row]
        return given[self.calls % given.shape[0]].astype(jax.eval_shape(fn.sample, key).dtype), []


class OneAfterAnother(InjectedJax):
    source = InTurn


class FromTableTorch(TorchRandomness):
    def __init__(self) -> None:
        self.table: Table = {}
        self.row = 0

    def value(self, name: str, fn: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = torch.as_tensor(np.array(self.table[name]["value"]))[self.row]
        if getattr(fn.support, "is_discrete", False):
            return given.to(fn.sample())
        while hasattr(fn, "base_dist"):
            fn = fn.base_dist
        return fn.loc + fn.scale * given

    def noise(self, name: str, label: str, noise: Any, like: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(np.array(self.table[name][label]))[self.row].expand(noise.shape)


class InjectedTorch(TorchELBO):
    """The twin: particle k reads the k-th row."""

    source = FromTableTorch

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.randomness = self.source()

    def step(self, *args: Any, **kwargs: Any) -> Any:
        step, self.randomness.row = super().step(*args, **kwargs), 0
        return InTurnTorch(step.settings, step.library)


class InTurnTorch(Step):
    def particle(self, source: Any) -> Any:
        found = super().particle(source)  # or it is drawn once more
        self.library.randomness.row += 1
        return found


def jax_gradients(
    elbo: InjectedJax, model: Any, guide: Any, params: Mapping[str, Any], tables: Table, **state: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Losses ``[G]`` and gradients ``[G, P]`` at every table of a grid (arrays ``[G, K, ...]``)."""

    def one(table: Table) -> tuple[Any, Any]:
        def loss(p: Any) -> Any:
            elbo.randomness.table = table
            return elbo.loss(jax.random.key(0), {**p, **state}, model, guide)

        value, gradient = jax.value_and_grad(loss)(dict(params))
        return value, jnp.concatenate([jnp.ravel(gradient[k]) for k in sorted(gradient)])

    loss, gradient = jax.jit(lambda t: jax.lax.map(one, t, batch_size=2000))(jax.tree.map(np.asarray, tables))
    return np.asarray(loss), np.asarray(gradient)


def torch_gradients(
    elbo: InjectedTorch, model: Any, guide: Any, params: Mapping[str, Any], tables: Table
) -> tuple[np.ndarray, np.ndarray]:
    """The same in Pyro, one table after another."""
    size = len(next(iter(next(iter(tables.values())).values())))
    losses, gradients = [], []
    for i in range(size):
        elbo.randomness.table = {s: {k: np.asarray(x)[i] for k, x in t.items()} for s, t in tables.items()}
        losses.append(elbo.loss_and_grads(model, guide))
        store = pyro.get_param_store()
        found = []
        for k in sorted(params):
            p = store[k].unconstrained()
            found.append(torch.zeros_like(p).ravel() if p.grad is None else p.grad.ravel().clone())
            p.grad = None
        gradients.append(torch.cat(found))
    return np.array(losses), torch.stack(gradients).numpy()


def cells(*breaks: float) -> tuple[np.ndarray, np.ndarray]:
    """Midpoints and widths of the cells that ``breaks`` cut (0, 1) into: exact for what is constant on each."""
    edges = np.unique(np.concatenate([[0.0], [float(b) for b in breaks], [1.0]]))
    return (edges[1:] + edges[:-1]) / 2, np.diff(edges)


def legendre(n: int, *breaks: float) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and weights on each cell, graded towards its ends, where logit u is singular."""
    x, w = np.polynomial.legendre.leggauss(n)
    t, w = (x + 1) / 2, w / 2
    smooth, slope = t**3 * (10 - 15 * t + 6 * t**2), 30 * t**2 * (1 - t) ** 2
    edges = np.unique(np.concatenate([[0.0], [float(b) for b in breaks], [1.0]]))
    nodes = [a + (b - a) * smooth for a, b in itertools.pairwise(edges)]
    weights = [(b - a) * slope * w for a, b in itertools.pairwise(edges)]
    return np.concatenate(nodes), np.concatenate(weights)


def grid(*axes: tuple[np.ndarray, np.ndarray]) -> tuple[list[np.ndarray], np.ndarray]:
    """All combinations: a list of ``[G]`` arrays, one per axis, and the weights ``[G]``."""
    values = np.meshgrid(*[a for a, _ in axes], indexing="ij")
    weights = np.meshgrid(*[w for _, w in axes], indexing="ij")
    return [v.ravel() for v in values], np.prod([w.ravel() for w in weights], axis=0)


def moments(gradients: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Exact mean and variance per parameter."""
    assert abs(weights.sum() - 1) < 1e-12
    mean = weights @ gradients
    return mean, weights @ (gradients - mean) ** 2


def columns(arrays: Sequence[np.ndarray], *shape: int) -> np.ndarray:
    """Columns of a grid as one array ``[G, *shape]``."""
    return np.stack(arrays, axis=-1).reshape(len(arrays[0]), *shape)
