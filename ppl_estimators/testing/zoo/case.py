"""A case of the zoo: a program for both libraries, and its exact ELBO beside it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .languages import language
from .oracle import Array, Params, expectation, gradient, value

Program = Callable[[Any, Params], tuple[Callable[[], None], Callable[[], None]]]
#: decorates the sum over states, or the ELBO, that a program is held against
Oracle = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Case:
    """A program, its parameters, and its ELBO as an explicit sum.

    table: for programs with finitely many states, θ ↦ (log q(state), f(state)): minus f is what the
        loss of one particle can be. Else None.
    elbo: θ ↦ E_q[f], a holomorphic function of θ.
    rows: the laws (L1 to L12) and stock defects (B1 to B17) it is for.
    minibatches: a partition of the data; the mean over its parts is the mean over all minibatches.
    nesting: the plate nesting to declare to Pyro where it can't be guessed.
    strict: whether Pyro's shape validation accepts the program.
    """

    name: str
    rows: tuple[str, ...]
    program: Program
    params: Mapping[str, Array]
    elbo: Callable[[Params], Array]
    table: Callable[[Params], tuple[Array, Array]] | None = None
    minibatches: tuple[tuple[int, ...], ...] = ()
    nesting: int | None = None
    strict: bool = True

    def build(self, library: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """``(model, guide)`` in "pyro" or "numpyro"."""
        return self.program(language(library), self.params)

    def exact_elbo(self) -> float:
        return value(self.elbo, self.params)

    def exact_gradient(self) -> dict[str, Array]:
        """Of the loss, that is of −ELBO."""
        return {k: -v for k, v in gradient(self.elbo, self.params).items()}


CASES: dict[str, Case] = {}


def case(program: Program, rows: str, params: Mapping[str, Any], *, name: str = "", **options: Any) -> Oracle:
    """Decorates the ELBO of ``program``, and enters both into `CASES`; ``name`` is the program's own by default."""
    called = name or program.__name__
    values = {k: np.asarray(v, dtype=float) for k, v in params.items()}

    def entered(elbo: Callable[[Params], Array]) -> Callable[[Params], Array]:
        CASES[called] = Case(called, tuple(rows.split()), program, values, elbo, **options)
        return elbo

    return entered


def finite(program: Program, rows: str, params: Mapping[str, Any], **options: Any) -> Oracle:
    """The same of a program with finitely many states: decorates what yields (log q, f) of each."""

    def entered(states: Callable[[Params], Any]) -> Callable[[Params], Any]:
        def table(theta: Params) -> tuple[Array, Array]:
            log_q, f = zip(*states(theta), strict=True)
            return np.array(log_q), np.array(f)

        case(program, rows, params, table=table, **options)(lambda theta: expectation(*table(theta)))
        return states

    return entered


def apart(program: Program, rows: str, params: Mapping[str, Any], parts: int, **options: Any) -> Oracle:
    """The same of so many independent parts, such as data: decorates what yields (log q, f) of the states of one, given
    the parameters and its number."""

    def entered(states: Callable[[Params, int], Any]) -> Callable[[Params, int], Any]:
        def elbo(theta: Params) -> Array:
            return np.sum([expectation(log_q, f) for i in range(parts) for log_q, f in states(theta, i)])

        case(program, rows, params, **options)(elbo)
        return states

    return entered


# The importance-weighted and Rényi bounds.


def bound(base: Case, particles: int, alpha: float) -> Case:
    """The case with E log[ (1/K) Σ_k exp((1−α) f_k) ] / (1−α) in place of E f.

    Its states are all K-tuples of states; f = log p − log q keeps its own dependence on the guide's
    parameters. α = 0 is the importance-weighted bound.
    """

    def table(theta: Params) -> tuple[Array, Array]:
        assert base.table is not None
        log_q, f = base.table(theta)
        tuples = np.indices([len(f)] * particles).reshape(particles, -1)
        inner = np.log(np.exp((1 - alpha) * f[tuples]).mean(0)) / (1 - alpha)
        return log_q[tuples].sum(0), inner

    name = f"{base.name}_bound_{particles}_{alpha}"
    return replace(base, name=name, table=table, elbo=lambda theta: expectation(*table(theta)))


def particles(base: Case, number: int) -> Case:
    """The same ELBO with the mean over `number` particles: its states are all tuples of states."""

    def table(theta: Params) -> tuple[Array, Array]:
        assert base.table is not None
        log_q, f = base.table(theta)
        tuples = np.indices([len(f)] * number).reshape(number, -1)
        return log_q[tuples].sum(0), f[tuples].mean(0)

    return replace(base, name=f"{base.name}_{number}", table=table)


def copies(base: Case, number: int) -> Case:
    """The case `number` times over in a plate: gradients are sums over independent copies."""

    def program(ppl: Any, init: Params) -> tuple[Callable[[], None], Callable[[], None]]:
        model, guide = base.program(ppl, init)

        def plated(inner: Callable[[], None]) -> Callable[[], None]:
            def run() -> None:
                with ppl.plate("copies", number):
                    inner()

            return run

        return plated(model), plated(guide)

    def elbo(theta: Params) -> Array:
        return number * base.elbo(theta)

    return replace(base, name=f"{base.name}_copies", program=program, elbo=elbo, table=None)
