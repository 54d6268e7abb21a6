"""From what a user writes, "DisARM" or a mapping or an ELBO, to an ELBO and a guide."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ppl_estimators

from ..backends import Library
from ..core.errors import EstimatorError
from ..core.estimator import Estimator
from ..core.plan import Plan, match
from .library import library_of, quiet
from .program import check_call, check_program, within


@dataclass(frozen=True)
class Program:
    """What is measured, and where: a point of the parameters, a seed."""

    library: Library
    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    params: Mapping[str, Any] | None
    seed: int


@dataclass(frozen=True)
class Candidate:
    """An ELBO to measure, with the guide that it needs."""

    label: str
    elbo: Any
    guide: Callable[..., Any]
    mapping: Mapping[str, Estimator] | None = None  # None for an ELBO that was given
    unbiased: bool | None = None  # as declared; None for stock ELBOs


def opened(
    call: str, model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, *,
    params: Mapping[str, Any] | None = None, seed: int = 0, backend: str | None = None, particles: int = 1,
) -> tuple[Program, Plan]:  # fmt: skip
    """A program that runs, and the plan of the default: the guide's sites as our engine sees them. Raises
    `EstimatorError` for what ``call`` was given in another order, and for a mistake in model or guide."""
    check_call(call, model, guide, args, backend)
    kwargs = dict(kwargs or {})
    library = check_program(model, guide, args, kwargs, backend=backend, anywhere=not params)
    program = Program(library, model, guide, args, kwargs, params, seed)
    elbo = library.adapter.EstimatorELBO(num_particles=particles)
    with within("EstimatorELBO"), quiet():
        return program, library.gradients(elbo, model, guide, args, kwargs, params).plan()


def resolve(
    given: Any, label: str | None, library: Library, guide: Callable[..., Any], plan: Any, particles: int
) -> Candidate:
    """A candidate from an ELBO, a mapping, a spec, or a name.

    A spec stands at every site that admits it; the others keep the default. Raises `EstimatorError` where none does.
    """
    text = given if isinstance(given, str) else None
    if text is not None:
        given = parse(text, library)
    if isinstance(given, type) and issubclass(given, Estimator):
        given = _instance(given)
    if isinstance(given, Estimator):
        return _spec(given, label or text or repr(given), library, guide, plan, particles)
    if isinstance(given, Mapping):
        found = {n: given[key] for n in plan.sites if (key := match(given, n)) is not None}
        fewest = max([particles, *(particles_for(e, plan.sites[n], particles) for n, e in found.items())])
        return _mapped(dict(given), label or _short(given), library, guide, fewest)
    if library_of(given) != library:
        raise EstimatorError(f"candidate {given!r} is an ELBO of {library_of(given)}, the program is of {library}.")
    mapping = getattr(given, "estimators", None)
    name = text or (type(given).__name__ if mapping is None else repr(given))
    unbiased = all(e.unbiased for e in mapping.values()) if mapping is not None else None
    if text == "TraceEnum_ELBO":  # without marked sites it would sum nothing
        guide = library.part("look").summed_out(guide)
    return Candidate(label or name, given, guide, None, unbiased)


def _short(mapping: Mapping[str, Estimator]) -> str:
    return ", ".join(f"{k}: {v!r}" for k, v in mapping.items()) or "default"


def particles_for(estimator: Estimator, site: Any, particles: int) -> int:
    """``particles``, or two where it compares particles. Raises its own `EstimatorError` if neither will do."""
    try:
        estimator.check(site, particles)
    except EstimatorError:
        if particles > 1:
            raise
        estimator.check(site, 2)
        return 2
    except AttributeError:  # a question about the distribution itself, which a plan does not hold: the ELBO asks it
        return particles
    return particles


def admitted(estimator: Estimator, plan: Any, particles: int) -> dict[str, EstimatorError | None]:
    """For each site None, or why the estimator refuses it."""
    found: dict[str, EstimatorError | None] = {}
    for name, site in plan.sites.items():
        try:
            if estimator.value.library and not site.reparameterised:
                raise EstimatorError(f"site '{name}': {site.distribution} has no reparameterised draw.")
            particles_for(estimator, site, particles)
            found[name] = None
        except EstimatorError as error:
            found[name] = error
    return found


def _spec(given: Estimator, label: str, library: Library, guide: Any, plan: Any, particles: int) -> Candidate:
    reasons = admitted(given, plan, particles)
    fits = [n for n, why in reasons.items() if why is None]
    # at sites that could be reparameterised a score function is a choice, not a default
    if any(not plan.sites[n].reparameterised for n in fits):
        fits = [n for n in fits if not plan.sites[n].reparameterised]
    if not fits:
        raise EstimatorError(f"candidate {label}: no site admits it. {next(iter(reasons.values()))}")
    mapping = dict.fromkeys(fits, given)
    return _mapped(mapping, label, library, guide, max(particles_for(given, plan.sites[n], particles) for n in fits))


def _mapped(mapping: dict[str, Estimator], label: str, library: Library, guide: Any, particles: int) -> Candidate:
    module = library.adapter
    guide = module.with_estimators(guide, mapping)
    elbo = module.EstimatorELBO(mapping, num_particles=particles)
    return Candidate(label, elbo, guide, mapping, all(e.unbiased for e in mapping.values()))


def parse(text: str, library: Library) -> Any:
    """ "Trace_ELBO", "DisARM", "Reinforce(LeaveOneOut())", "ARMS(4)", "default": what it names.

    Only names of the package, calls and literals; nothing else is evaluated.
    """
    if text == "default":
        return library.adapter.EstimatorELBO()
    if text.endswith("ELBO"):
        found = library.stock(text)
        if found is None:
            raise EstimatorError(f"'{text}' is not in {library}.infer.")
        return found()
    try:
        value = _evaluate(ast.parse(text, mode="eval").body)
    except (SyntaxError, TypeError, ValueError) as error:
        raise EstimatorError(f"candidate '{text}' does not read as an estimator: {error}") from None
    value = _instance(value) if inspect.isclass(value) and issubclass(value, Estimator) else value
    if not isinstance(value, Estimator):
        raise EstimatorError(
            f"candidate '{text}' is no estimator. Write for example DisARM or Reinforce(LeaveOneOut())."
        )
    return value


def _instance(kind: type[Estimator]) -> Estimator:
    """As in the catalogue where the class needs arguments: ``UnorderedSet(3)``."""
    try:
        return kind()
    except TypeError:
        from ..catalogue import ENTRIES

        found = [e.subject for e in ENTRIES if type(e.subject) is kind]
        if not found:
            raise EstimatorError(f"{kind.__name__} needs arguments. Write {kind.__name__}(...).") from None
        return found[0]


def _evaluate(node: ast.AST) -> Any:
    if isinstance(node, ast.Name):
        if node.id in ppl_estimators.__all__:
            return getattr(ppl_estimators, node.id)
        raise ValueError(f"'{node.id}' is not a name of ppl_estimators ('ppl-estimators list' shows them)")
    if isinstance(node, ast.Call):
        keywords = {k.arg: _evaluate(k.value) for k in node.keywords if k.arg}
        return _evaluate(node.func)(*map(_evaluate, node.args), **keywords)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _evaluate(node.left) + _evaluate(node.right)
    if isinstance(node, ast.Tuple):
        return tuple(map(_evaluate, node.elts))
    return ast.literal_eval(node)
