"""What each library makes of a program, held against the oracle: biased, too noisy to tell, refused, or an exception.

A draw of NumPyro's is `jax.grad` of the loss at a key, many keys side by side. A draw of Pyro's is one lane of a
program that was copied into many. Every entry of the mean must lie within six standard errors of the exact one; draws
are added until a bias of `ABLE_TO_SEE` of the gradient's length could not hide there, and a cell that cannot tell after
`MAX_DRAWS` says so.
"""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ppl_estimators import EstimatorError, EstimatorWarning

from .build import InNumPyro, InPyro, build, estimators, named
from .description import SIZES, Program, minibatches, parameters, shaped
from .oracle import Exact, exact

LIBRARIES = ("numpyro", "pyro")

#: nothing that is right lies beyond six standard errors; a bias of that part of the gradient's length does, with 90%
SIGMAS, DETECTED, ABLE_TO_SEE = 6.0, 1.28, 0.1
MAX_DRAWS = 400_000
RARE = 40_000  # so many before it is believed that there is no other value
CHUNK = 2_000
LOSSES, LOSS_SIGMAS = 20, 10.0  # Pyro's loss is that of all lanes, so there are few of them
MOVED = 0.3  # standard deviation by which what estimators train is moved from its start, where networks are 0
EXACT = 1e-9  # where nothing is drawn
STEPS = 2  # of state, before anything is measured


@dataclass(frozen=True)
class Verdict:
    """``kind``: "right", "biased", "cannot tell", "refused", or the name of an exception."""

    library: str
    kind: str
    detail: str = ""
    draws: int = 0
    sees: float = 0.0  # the relative bias that could not have hidden

    @property
    def failed(self) -> bool:
        return self.kind not in ("right", "cannot tell", "refused")

    def __str__(self) -> str:
        return f"{self.library}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


def verdict(program: Program, library: str, answer: Exact | None = None, max_draws: int = MAX_DRAWS) -> Verdict:
    """What ``library`` makes of ``program``."""
    answer = answer or exact(program)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EstimatorWarning)
        try:
            source = {"numpyro": _NumPyroDraws, "pyro": _PyroDraws}[library](program, answer)
            return _judged(library, source, answer, max_draws)
        except EstimatorError as error:
            return Verdict(library, "refused", " ".join(str(error).split()))
        except Exception as error:
            return _raised(library, error)


def _raised(library: str, error: Exception) -> Verdict:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:200]
    return Verdict(library, type(error).__name__, f"{text}, at {where.filename.split('/')[-1]}:{where.name}")


def retried(program: Program, library: str, answer: Exact, max_draws: int) -> tuple[Program, Verdict, list[str]]:
    """A verdict, with the default at every site whose estimator is refused; and the refusals."""
    refusals: list[str] = []
    while True:
        found = verdict(program, library, answer, max_draws)
        named = set(re.findall(r"'(z\d+)'", found.detail)) if found.kind == "refused" else set()
        changed = [z for z in program.latents if z.name in named and z.estimator is not None]
        if not changed:
            return program, found, refusals
        refusals.append(f"{library}: {found.detail}")
        latents = tuple(replace(z, estimator=None) if z in changed else z for z in program.latents)
        program = replace(program, latents=latents)


def summed_exactly(program: Program, library: str, answer: Exact | None = None) -> Verdict:
    """The same for a program that draws nothing: its loss and gradient are no estimates."""
    answer = answer or exact(program)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EstimatorWarning)
        try:
            source = {"numpyro": _NumPyroDraws, "pyro": _PyroDraws}[library](program, answer)
            found = source.once()
        except EstimatorError as error:
            return Verdict(library, "refused", " ".join(str(error).split()))
        except Exception as error:
            return _raised(library, error)
    off = np.abs(found - [answer.loss, *source.target]).max()
    return Verdict(library, "right" if off < EXACT else "biased", f"{off:.1g} off", 1)


def _judged(library: str, source: _Draws, answer: Exact, max_draws: int) -> Verdict:
    target = source.target
    sums = _Sums(len(target))
    while True:
        sums = sums + source.differences()
        error = sums.error()
        sees = (SIGMAS + DETECTED) * float(np.linalg.norm(error)) / float(np.linalg.norm(target))
        off = np.abs(sums.mean()) - 1e-6 * (1 + np.abs(target))  # of differences; and rounding
        unseen = bool(((error == 0) & (off > 0)).any()) and sums.draws < RARE  # a value that was always the same so far
        if sums.broken.any() or (sees <= ABLE_TO_SEE and not unseen) or sums.draws >= max_draws:
            break
    labels = [f"{n}{list(i) if i else ''}" for n, g in answer.gradient.items() for i in np.ndindex(g.shape)]
    if sums.broken.any():
        worst = int(sums.broken.argmax())
        return Verdict(library, "not finite", f"{labels[worst]} in {sums.broken[worst]} draws", sums.draws)
    if (off > SIGMAS * error).any():
        worst = int((off / np.maximum(error, 1e-12)).argmax())
        found = target[worst] + sums.mean()[worst]
        detail = f"{labels[worst]}: exact {target[worst]:.4f}, measured {found:.4f} ± {error[worst]:.1g}"
        return Verdict(library, "biased", detail, sums.draws, sees)
    while source.losses.draws < LOSSES:
        source.differences()
    loss, error = source.losses.mean()[0], source.losses.error()[0]
    if not abs(loss - answer.loss) <= LOSS_SIGMAS * error + 1e-6:
        detail = f"loss: exact {answer.loss:.4f}, measured {loss:.4f} ± {error:.1g}"
        return Verdict(library, "biased", detail, sums.draws, sees)
    if sees > ABLE_TO_SEE:
        return Verdict(library, "cannot tell", f"a bias of {sees:.0%} could hide", sums.draws, sees)
    return Verdict(library, "right", f"sees {sees:.1%}", sums.draws, sees)


class _Sums:
    """Of so many rows: Σ x, Σ x², and how many were not finite, each ``[entries]``."""

    def __init__(self, entries: int):
        self.draws, self.broken = 0, np.zeros(entries, int)
        self.total, self.squares = np.zeros(entries), np.zeros(entries)

    def __add__(self, rows: np.ndarray) -> _Sums:
        finite = np.isfinite(rows)
        rows = np.where(finite, rows, 0)
        new = _Sums(rows.shape[1])
        new.draws, new.broken = self.draws + len(rows), self.broken + (~finite).sum(0)
        new.total, new.squares = self.total + rows.sum(0), self.squares + (rows**2).sum(0)
        return new

    def mean(self) -> np.ndarray:
        return self.total / self.draws

    def error(self) -> np.ndarray:
        variance = np.maximum(self.squares / self.draws - self.mean() ** 2, 0)
        return np.sqrt(variance / max(self.draws - 1, 1))


class _Draws:
    """Chunks of gradients, minus the exact one; and of losses, on the way."""

    def __init__(self, program: Program, answer: Exact):
        self.program, self.losses = program, _Sums(1)
        self.names = list(parameters(program))
        self.target = np.concatenate([answer.gradient[n].ravel() for n in self.names])

    def differences(self) -> np.ndarray:
        losses, rows = self.chunk()
        self.losses = self.losses + losses[:, None]
        return rows - self.target

    def once(self) -> np.ndarray:
        """The loss, then the gradient in the order of the oracle's, where all minibatches were seen."""
        raise NotImplementedError

    def chunk(self) -> tuple[np.ndarray, np.ndarray]:
        """Independent losses ``[any]`` and gradients ``[draws, entries]``, in the order of the oracle's."""
        raise NotImplementedError


def _places(program: Program, name: str) -> np.ndarray:
    """For each entry of a library's parameter, which entry of the oracle's it is."""
    axes, categories = parameters(program)[name]
    shape = tuple(SIZES[a] for a in axes) + ((categories,) if categories else ())
    return shaped(program, np.arange(int(np.prod(shape))).reshape(shape), axes, bool(categories)).ravel()


class _NumPyroDraws(_Draws):
    def __init__(self, program: Program, answer: Exact):
        import jax
        from numpyro import optim
        from numpyro.infer import SVI

        from ppl_estimators.numpyro import EstimatorELBO, with_estimators

        super().__init__(program, answer)
        elbo = EstimatorELBO(
            named(program),
            num_particles=program.particles,
            vectorize_particles=program.vectorized,
            average_model=program.average_model,
        )
        model, guide = build(program, InNumPyro())
        guide = with_estimators(guide, estimators(program))
        with double_precision():
            svi = SVI(model, guide, optim.SGD(0.0), elbo)
            state = svi.init(jax.random.key(0))
            values = svi.get_params(state)
            self.own = {n: values[n] for n in self.names}
            kept = {n: v for n, v in values.items() if n not in self.own}
            leaves, tree = jax.tree.flatten(kept)
            rng = np.random.default_rng(5)
            kept = jax.tree.unflatten(tree, [x + MOVED * rng.normal(size=x.shape) for x in leaves])
            self.state, self.key = state.mutable_state or {}, jax.random.key(1)

            def loss(own: Any, state: Any, key: Any) -> Any:
                out = elbo.loss_with_mutable_state(key, {**kept, **state, **own}, model, guide)
                return out["loss"], out["mutable_state"] or {}

            one = jax.value_and_grad(loss, has_aux=True)
            self.many = jax.jit(jax.vmap(one, (None, None, 0)))
            self.steps = STEPS if self.state else 0

    def chunk(self) -> tuple[np.ndarray, np.ndarray]:
        import jax

        with double_precision():
            while True:
                self.key, key = jax.random.split(self.key)
                (loss, states), gradient = self.many(self.own, self.state, jax.random.split(key, CHUNK))
                if not self.steps:
                    break
                self.steps -= 1
                self.state = jax.tree.map(lambda x: x[0], states)
        rows = []
        for n in self.names:
            row = np.zeros((CHUNK, gradient[n][0].size))
            row[:, _places(self.program, n)] = np.asarray(gradient[n]).reshape(CHUNK, -1)
            rows.append(row)
        return np.asarray(loss), np.concatenate(rows, 1)

    def once(self) -> np.ndarray:
        loss, rows = self.chunk()  # as many different ones as there are minibatches
        table = np.column_stack([loss, rows])
        return table[np.unique(table.round(9), axis=0, return_index=True)[1]].mean(0)


class _PyroDraws(_Draws):
    def __init__(self, program: Program, answer: Exact):
        import pyro

        from ppl_estimators.pyro import EstimatorELBO, with_estimators

        super().__init__(program, answer)
        self.wide, self.language = program.in_lanes(), InPyro()
        self.elbo = EstimatorELBO(
            named(program),
            num_particles=program.particles,
            vectorize_particles=program.vectorized,
            max_plate_nesting=len(self.wide.layout),
            average_model=program.average_model,
        )
        self.model, guide = build(self.wide, self.language)
        self.guide = with_estimators(guide, estimators(program))
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        self.steps = STEPS

    def _step(self) -> float:
        import pyro
        import torch

        with double_precision(), pyro.validation_enabled(False):  # `u` is a dimension that nothing declares
            known = set(pyro.get_param_store().keys())
            loss = float(self.elbo.loss_and_grads(self.model, self.guide))
            rng = np.random.default_rng(5)
            for name, p in pyro.get_param_store().named_parameters():
                if name not in known and "$" in name and "$state." not in name:
                    with torch.no_grad():
                        p += MOVED * torch.as_tensor(rng.normal(size=tuple(p.shape)))
        return loss

    def chunk(self) -> tuple[np.ndarray, np.ndarray]:

        while self.steps:
            self._step()
            self.steps -= 1
        batches = minibatches(self.program)
        drawn = [self._one(batch) for batch in batches]  # all lanes see one minibatch, so a draw is the mean over all
        return np.array([np.mean([loss for loss, _ in drawn])]), np.mean([rows for _, rows in drawn], axis=0)

    def once(self) -> np.ndarray:
        loss, rows = self.chunk()
        return np.concatenate([loss, rows[0]])

    def _one(self, minibatch: tuple[int, ...]) -> tuple[float, np.ndarray]:
        import pyro

        own = {n: pyro.param(n).unconstrained() for n in self.names}
        for p in own.values():
            p.grad = None
        self.language.minibatch = minibatch
        lanes = SIZES["lanes"]
        loss = self._step() / lanes
        rows = []
        for n, p in own.items():
            flat = np.zeros(p.numel())
            if p.grad is not None:
                flat[_places(self.wide, n)] = p.grad.numpy().ravel()
            axes, categories = parameters(self.wide)[n]
            shape = tuple(SIZES[a] for a in axes) + ((categories,) if categories else ())
            rows.append(np.moveaxis(flat.reshape(shape), axes.index("lanes"), 0).reshape(lanes, -1))
        return loss, np.concatenate(rows, 1)


@contextmanager
def double_precision() -> Iterator[None]:
    import jax
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with jax.enable_x64(True):
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Cell:
    """What was made of a seed's program in each library; ``refusals`` led to the default at a site."""

    seed: int
    programs: dict[str, Program]
    verdicts: dict[str, Verdict]
    refusals: list[str]


def cell(seed: int, max_draws: int = MAX_DRAWS, sums: bool = False) -> Cell:
    """The seed's program in both libraries, one with sums or without. An estimator that a library refuses gives way to
    the default there."""
    from .generate import generate, with_sums

    drawn = with_sums(seed) if sums else generate(seed)
    answer = exact(drawn)
    programs, verdicts, refusals = {}, {}, []
    for library in LIBRARIES:
        programs[library], verdicts[library], refused = retried(drawn, library, answer, max_draws)
        refusals += refused
    return Cell(seed, programs, verdicts, refusals)


def summed(seed: int) -> Cell:
    """The same for a program that draws nothing."""
    from .generate import with_sums

    program = with_sums(seed, drawn=False)
    answer = exact(program)
    verdicts = {library: summed_exactly(program, library, answer) for library in LIBRARIES}
    return Cell(seed, dict.fromkeys(LIBRARIES, program), verdicts, [])


def shrunk(program: Program, failure: Verdict, seconds: float = 120.0) -> tuple[Program, Verdict]:
    """A smaller program with the same failure, and its verdict."""
    from .shrink import shrink

    last = [failure]

    def same(candidate: Program) -> bool:
        found = verdict(candidate, failure.library)
        if found.kind == failure.kind:
            last[0] = found
        return found.kind == failure.kind

    return shrink(program, same, seconds), last[0]
