"""Is a program what its first run said of it? Run again with the same values, and with others at some sites.

The same values must give the same cost terms: else a further run is another program, and nothing that is learnt from it
can be used. Other values at some sites must move no term that is not credited to one of them: else a dependency was
lost on the way. Sites are tested in groups, each against the terms that are credited to none of the group. By the same
search a term is found that moves with a site and has no derivative in its value, where the site's estimator needs one;
and one whose element in a plate moves with the values of other elements. If there is time (`check_program`), also one
whose derivative is not what its differences say.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from .errors import EstimatorError, site_error, warn
from .estimator import Estimator
from .library import Library, Run
from .ops import Array, Ops
from .plan import Plan, Settings
from .site import Plate, Term

#: side and site of a cost term
Key = tuple[str, str]
#: the cost terms when some latent sites take other values, in the elements of a pattern (see `elements`)
Evaluate = Callable[[Sequence[str], int], Mapping[Key, Array]]
#: says whether a term has the same value as another time
Same = Callable[[Array, Array], bool]

#: most further runs of the program at a step, and in a test
BUDGET, THOROUGH = 24, 1000
_CANDIDATES = 32  # groups that are looked at for each
#: of elements in the values of one site, beyond all at once
_PATTERNS = 3


@dataclass(frozen=True)
class Checked:
    """What `check_program` found where nothing was wrong.

    ``estimators``: of each latent site of the guide. ``depends_on``: of each cost term, by side ("model": log p,
    "guide": -log q) and site, the latent sites that it is credited to. ``repeatable``: does the program cost the same
    when it is run again with the same values? Where it doesn't, no estimator here runs it again.
    """

    estimators: Mapping[str, Estimator]
    depends_on: Mapping[Key, frozenset[str]]
    repeatable: bool

    def __str__(self) -> str:
        lines = [] if self.repeatable else ["the program cannot be run again, and is not"]
        for name, estimator in self.estimators.items():
            costs = ", ".join(cost_of(k) for k, sites in self.depends_on.items() if name in sites)
            lines.append(f"site '{name}': {estimator!r}, credited with {costs}")
        return "\n".join(lines)


def checked(library: Library, run: Run) -> Checked:
    """All that can be asked of the program of a particle's first run. Raises `EstimatorError`."""
    found = look(library, run, THOROUGH)
    if found.changing and (names := run_again(library, run.plan)):
        raise not_the_same(library, run.plan, [n for _, n in found.changing], names) from found.cause
    if found.lost is not None:
        term, site = found.lost
        raise site_error(
            site,
            f"{cost_of(term)} moves with its value, by a way that cannot be followed",
            "Compute it by operations on the value itself, not by code that keeps or copies it out of sight.",
        )
    if not found.changing:
        warn_of_coupling(coupled_by_values(library, run))
    cuts = library.cut(run)
    warn_of_cuts(library.settings, run.plan, cuts)
    points = {n for n, s in run.plan.sites.items() if s.distribution == "Delta"}  # nowhere else does their log q exist
    terms = [k for k in run.plan.depends_on if k[0] == "model" or k[1] not in points]
    sites = [n for n in library.leading(run) if n not in cuts]
    for wrong in wrong_slopes(partial(library.tilted, run), terms, sites):
        warn_of_slope(library.settings, run.plan, wrong)
    return Checked(dict(run.plan.estimators), dict(run.plan.depends_on), not found.changing)


@dataclass(frozen=True)
class Found:
    """Terms that are not the same when run again, or the exception that this raised; a term that moves with a site on
    which it was said not to depend."""

    changing: list[Key]
    cause: Exception | None = None
    lost: tuple[Key, str] | None = None


def look(library: Library, run: Run, budget: int = BUDGET) -> Found:
    """Run the program of a particle's first run again, and see."""
    plan, evaluate, same = run.plan, partial(library.moved, run), partial(equal, library.ops)
    terms = {(t.side, t.site): library.ops.stop_gradient(t.value) for t in run.terms}
    depends_on = {k: plan.depends_on[k] for k in terms}
    try:
        changing = unstable(evaluate, terms, same)
    except Exception as error:
        return Found(list(terms), error)
    if changing:
        return Found(changing)
    held = [n for n in plan.local if n not in plan.branches]  # other values of those may take another branch
    patterns = 1 + min(_PATTERNS, max(((plan.sites[n].lanes - 1).bit_length() for n in held), default=0))
    return Found([], lost=lost(evaluate, terms, depends_on, held, same, budget, patterns))


class Along(NamedTuple):
    """All elements of a site whose number along batch dimension ``dim`` has this bit. To the number its multiples of 8,
    64, ... are added, so that elements that far apart differ in one of the lowest bits too."""

    dim: int
    bit: int

    def moves(self, ops: Ops, x: Array, events: int = 0) -> Array:
        """Is it one of them? For the axes of ``x`` from that dimension on; ``events``: of its dimensions."""
        count = x.shape[self.dim - events]
        numbers = sum(ops.indices(count, x) // 8**i for i in range(1 + int(math.log(count, 8))))
        return ops.reshape(numbers // 2**self.bit % 2 == 1, (-1, *(1,) * (events - self.dim - 1)))

    def kept(self, ops: Ops, costs: Array) -> Array:
        """The costs of the others; of all, where they have one."""
        if costs.ndim < -self.dim or costs.shape[self.dim] == 1:
            return costs
        return ops.where(self.moves(ops, costs), ops.zeros_like(costs), costs)


class Coupled(NamedTuple):
    """A term of which an element in a plate moves with a site's values in other elements."""

    site: str
    term: Key
    plate: Plate
    where: str  # by which operation, as far as it is known


#: of a plate, some sites in it and some cost terms: a term of which an element moves with other elements of the sites,
#: and by which operation
Moved = Callable[[Plate, Sequence[str], Sequence[Term]], tuple[Key, str] | None]


def coupled(plan: Plan, moved: Moved) -> list[Coupled]:
    """One for each plate with sites that are credited with the costs of their own elements: if these and what depends
    on them take other values in some elements, those costs of the others stay."""
    graph, found = plan.graph, list[Coupled]()
    local = [plan.sites[n] for n in plan.local if n not in plan.branches]
    for plate in sorted({p for s in local for p in s.plates if p.size > 1 and not p.values}):
        names = frozenset(s.name for s in local if plate in s.plates)
        below = graph.descendants(names) - plan.branches
        sites = [n for n in plan.sites if n in names | below and plate in plan.sites[n].plates]
        terms = [t for t in plan.terms if any(plate in graph.shared_plates(n, t) for n in names & t.depends_on)]
        try:
            if (term := moved(plate, sites, terms)) is not None:
                site = next((n for n in sites if moved(plate, [n], terms)), sites[0])
                found.append(Coupled(site, term[0], plate, term[1]))
        except Exception:  # a value that the program does not take
            continue
    return found


def coupled_by_values(library: Library, run: Run) -> list[Coupled]:
    """As further runs of the program show it."""
    ops = library.ops
    values = {(t.side, t.site): ops.stop_gradient(t.value) for t in run.terms}

    def moved(plate: Plate, sites: Sequence[str], terms: Sequence[Term]) -> tuple[Key, str] | None:
        for bit in range(min(_PATTERNS, (plate.size - 1).bit_length())):
            part = Along(plate.dim, bit)
            elsewhere = library.moved(run, sites, part)
            for key in [(t.side, t.site) for t in terms]:
                if key in elsewhere and not equal(ops, part.kept(ops, values[key]), part.kept(ops, elsewhere[key])):
                    return key, ""
        return None

    found = coupled(run.plan, moved)
    if found and unstable(partial(library.moved, run), values, partial(equal, ops)):
        return []  # not by these values
    return found


def warn_of_coupling(found: Sequence[Coupled]) -> None:
    for site, term, plate, where in found:
        warn(
            f"site '{site}': {cost_of(term)} of an element of plate '{plate.name}' moves with '{site}' of other "
            f"elements{where}, and a plate says that none does: each element is credited with the costs of its own, "
            "so the gradient is biased. Compute it from values of its own element (batch normalisation: by "
            "module.eval(), in flax use_running_average=True); "
            f"or sample '{site}' outside of the plate, by dist.expand([{plate.size}]).to_event(1)."
        )


def cut(
    evaluate: Evaluate, terms: Mapping[Key, Array], leads: Mapping[Key, frozenset[str]], plan: Plan,
    sites: Sequence[str], same: Same, budget: int = BUDGET,
) -> dict[str, Key]:  # fmt: skip
    """Of ``sites``, those with which a term moves from which no derivative leads to them, and that term. ``leads``: to
    which values of sites it does."""
    found: dict[str, Key] = {}
    while True:
        left = [n for n in sites if n not in found]
        others = {k: leads[k] | frozenset(left) - plan.depends_on[k] for k in terms}
        missed = lost(evaluate, terms, others, left, same, budget, 1 + _PATTERNS)
        if missed is None:
            return found
        found[missed[1]] = missed[0]


def warn_of_cuts(settings: Settings, plan: Plan, found: Mapping[str, Key]) -> None:
    """``found``: see `Library.cut`."""
    if not found:
        return
    facts = ", ".join(f"{cost_of(t)} moves with '{n}'" for n, t in list(found.items())[:3])
    names = ", ".join(f"'{n}'" for n in found)
    used = ", ".join(dict.fromkeys(repr(plan.estimators[n]) for n in found))
    warn(
        f"site {names}: {facts}, and no derivative leads from one to the other (a value that is detached, rounded, "
        f"compared, or handed to numpy): {used} takes it for a constant there, so the gradient is biased. "
        f"{_without_derivative(settings, plan, list(found))}. If it is meant to be a constant, filter this warning."
    )


def _without_derivative(settings: Settings, plan: Plan, names: Sequence[str]) -> str:
    """What to do about sites that lack a derivative."""
    scored = [n for n in names if not plan.sites[n].support_moves and plan.sites[n].distribution != "Delta"]
    fix = "Compute it by operations that have a derivative"
    if scored:
        chosen = ", ".join(f'"{n}": Reinforce(LeaveOneOut())' for n in scored)
        fix += f"; or type EstimatorELBO({{{chosen}}}, num_particles={max(2, settings.particles)})"
    return fix


class Height(NamedTuple):
    """Of a cost term, summed, at some step along a line through the values of sites: it, its derivative along the line,
    the sum of what was added by magnitude, and the precision of that."""

    value: float
    slope: float
    size: float
    precision: float


class Slope(NamedTuple):
    """A term whose derivative in the value of a site is not what its differences say."""

    site: str
    term: Key
    derivative: float
    difference: float


#: the heights of all terms, given sites, a step, and the number of a line
Tilted = Callable[[Sequence[str], float, int], Mapping[Key, Height]]
_LINES = 2  # along all of which a derivative must be wrong to be called so
_WRONG = 0.1  # by so much of itself


def wrong_slopes(tilted: Tilted, terms: Sequence[Key], sites: Sequence[str]) -> list[Slope]:
    """All that are wrong: all sites are moved at once, and halves of them where something is not as it should be."""
    if not sites:
        return []
    found = [_slopes(partial(tilted, sites), terms, line) for line in range(_LINES)]
    left = [k for k in terms if any(slopes.get(k) is not True for slopes in found)]
    if len(sites) > 1:
        half = len(sites) // 2
        return [s for part in (sites[:half], sites[half:]) for s in wrong_slopes(tilted, left, part)] if left else []
    wrong = [(k, found[0][k]) for k in left if all(type(slopes.get(k)) is tuple for slopes in found)]
    return [Slope(sites[0], k, *slopes) for k, slopes in wrong if isinstance(slopes, tuple)]


def _slopes(
    tilted: Callable[[float, int], Mapping[Key, Height]], terms: Sequence[Key], line: int
) -> dict[Key, bool | tuple[float, float]]:
    """Of each term: is its derivative right; or the derivative and the difference, if these are not one. Terms that
    have a kink there, are not finite, or have no derivative at all (see `cut`) are left out."""
    found: dict[Key, bool | tuple[float, float]] = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that are not the program's own
            here = tilted(0.0, line)
            step = 4 * max((h.precision for h in here.values()), default=1.0) ** (1 / 3)
            near = {x: tilted(x * step, line) for x in (-1.0, -0.5, 0.5, 1.0)}
    except Exception:  # what the program does not take, or nobody can differentiate
        return found
    for key in terms:
        if key not in here or not all(key in heights for heights in near.values()):
            continue
        f, values = here[key], {x: heights[key].value for x, heights in near.items()}
        if not all(map(math.isfinite, (f.value, f.slope, *values.values()))):
            continue
        noise = 4 * f.precision * f.size / step
        wide, narrow = (values[1.0] - values[-1.0]) / (2 * step), (values[0.5] - values[-0.5]) / step
        bends = [(values[x] + values[-x] - 2 * f.value) / (x * step) for x in (1.0, 0.5)]
        gap, scale = abs(narrow - f.slope), max(abs(narrow), abs(f.slope))
        if gap <= max(2 * abs(wide - narrow) + 4 * noise, _WRONG * scale):
            found[key] = True
        elif f.slope and abs(wide - narrow) <= _WRONG / 2 * scale and abs(bends[1]) <= 0.75 * abs(bends[0]) + 4 * noise:
            found[key] = f.slope, narrow
    return found


def warn_of_slope(settings: Settings, plan: Plan, wrong: Slope) -> None:
    site, term, derivative, difference = wrong
    warn(
        f"site '{site}': {cost_of(term)} changes by {difference:.3g} for each unit of a step of '{site}', and its "
        f"derivative says {derivative:.3g} (a part of it is detached or rounded, or has a backward pass of its own): "
        f"{plan.estimators[site]!r} follows the derivative, so the gradient is biased. "
        f"{_without_derivative(settings, plan, [site])}. If it is meant so, filter this warning."
    )


def run_again(library: Library, plan: Plan) -> list[str]:
    """Sites whose estimators need further runs of the program, beside the particles that were asked for."""
    names = {n for group in plan.groups for n in group.sites} | plan.sticking
    if plan.particles > library.settings.particles:
        names |= {n for n, e in plan.estimators.items() if e.control.of_others}
    return [n for n in plan.estimators if n in names]


def not_the_same(library: Library, plan: Plan, changing: Sequence[str], names: Sequence[str]) -> EstimatorError:
    """``changing``: sites whose cost does. ``names``: see `run_again`."""
    sites = plan.sites
    chosen = ", ".join(
        f'"{n}": {"Pathwise()" if sites[n].reparameterised else "Reinforce(MovingAverage())"}' for n in names
    )
    return EstimatorError(
        f"site {', '.join(dict.fromkeys(map(repr, changing)))}: its cost is another when the program is "
        "run again with the same values and random numbers, so it reads something that changes (an iterator, a "
        "counter), and the estimators here run it more than once. Fetch what changes outside and pass it in, "
        f"{library.passing}; or choose estimators that need one run: {library.choosing.format(f'{{{chosen}}}')}."
    )


def equal(ops: Ops, a: Array, b: Array) -> bool:
    """As equal as two runs of one computation are."""
    if a.shape != b.shape:
        return False
    near = (a == b) | (ops.isnan(a) & ops.isnan(b)) | (ops.abs(a - b) <= 1e-5 + 1e-4 * ops.abs(b))
    return bool(ops.all(near))


def cost_of(term: Key) -> str:
    side, site = term
    return f"log p of '{site}'" if side == "model" else f"-log q of '{site}'"


def unstable(evaluate: Evaluate, terms: Mapping[Key, Array], same: Same) -> list[Key]:
    """The terms that are not the same when the program is run again with the same values."""
    again = evaluate((), 0)
    return [k for k, value in terms.items() if k not in again or not same(value, again[k])]


def lost(
    evaluate: Evaluate, terms: Mapping[Key, Array], depends_on: Mapping[Key, frozenset[str]], sites: Sequence[str],
    same: Same, budget: int = BUDGET, patterns: int = 1,
) -> tuple[Key, str] | None:  # fmt: skip
    """A term that moves with a site on which it was said not to depend, if there is one."""
    asked = {k: depends_on[k] for k in terms}
    for pattern in range(patterns):
        change = partial(_moved, evaluate, terms, same, pattern)
        for group, silent in groups(asked, sites, budget):
            budget -= 1
            moved = change(group, silent)
            if moved is None:
                continue
            while len(group) > 1:
                half = group[: len(group) // 2]
                group = half if change(half, [moved]) else group[len(half) :]
            return moved, group[0]
    return None


def _moved(
    evaluate: Evaluate,
    terms: Mapping[Key, Array],
    same: Same,
    pattern: int,
    group: Sequence[str],
    silent: Sequence[Key],
) -> Key | None:
    try:
        elsewhere = evaluate(group, pattern)
    except Exception:  # a value that the program does not take: those of some of the group it may
        half = len(group) // 2
        parts = (group[:half], group[half:]) if half else ()
        return next((k for p in parts if (k := _moved(evaluate, terms, same, pattern, p, silent))), None)
    return next((k for k in silent if k in elsewhere and not same(terms[k], elsewhere[k])), None)


def elements(ops: Ops, pattern: int, count: int, like: Array) -> Array:
    """Whether each of a site's elements takes another value, ``[count]``. Pattern 0: all; what depends on whether two
    are alike is then what it was. Pattern k: those whose number has the bit k - 1. Any two of 2^k elements differ in
    one of k patterns."""
    numbers = ops.indices(count, like)
    return numbers >= 0 if pattern == 0 else numbers // 2 ** (pattern - 1) % 2 == 1


def groups(
    depends_on: Mapping[Key, frozenset[str]], sites: Sequence[str], budget: int = BUDGET
) -> Iterator[tuple[list[str], list[Key]]]:
    """Groups of sites, each with the terms that are credited to none of it, until every pair was met or the budget is
    spent: each time the group that tests most pairs, of those that some term is not credited to, and halves of them."""
    bit = {n: 1 << i for i, n in enumerate(sorted(sites))}  # sets as integers: there may be a thousand sites
    credited = {k: sum(bit[n] for n in deps if n in bit) for k, deps in depends_on.items()}
    open_pairs = {k: sum(bit.values()) & ~deps for k, deps in credited.items()}
    choose = random.Random(0)
    for _ in range(budget):
        candidates = sorted({pairs for pairs in open_pairs.values() if pairs})
        if not candidates:
            return
        candidates = choose.sample(candidates, min(_CANDIDATES, len(candidates)))
        for pairs in list(candidates):
            members = [b for b in bit.values() if b & pairs]
            candidates.append(sum(choose.sample(members, max(1, len(members) // 2))))

        def tested(group: int) -> int:
            return sum((group & open_pairs[k]).bit_count() for k, deps in credited.items() if not group & deps)

        group = max(candidates, key=tested)
        silent = [k for k, deps in credited.items() if not group & deps and open_pairs[k]]
        for k in silent:
            open_pairs[k] &= ~group
        yield [n for n, b in bit.items() if b & group], silent
