"""Cost terms of programs some of whose sites take all their values at once.

A site that only the model has is *summed out*: its log probability and all that its values move are one block, a cost
term log Σ Π (`core.elimination`). A site that the guide enumerates gives every cost that its values move an axis, along
which it is weighted by their probabilities: Σ_v q(v) cost(v).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from . import elimination
from .elimination import Axis, Factor, Time, blocks, chain, factor, log_probability, marginal, remaining
from .errors import EstimatorError, site_error, warn
from .ops import Array, Ops
from .plan import requested
from .site import Plate, Term, weighed


class Unplaced(EstimatorError):
    """A site may have to be enumerated, in a run that has no place for its values."""

    def __init__(self, name: str):
        self.site = name
        super().__init__(
            f"site '{name}': a latent site of the model that the guide does not draw, or one that is enumerated. Here "
            "the guide must draw every site: add it there, unmarked."
        )


def missing(name: str, countable: bool) -> EstimatorError:
    """A latent site that the guide lacks, and that nobody wants to be summed out."""
    fix = "Add a site of this name to the guide, or observe it with obs=..."
    if countable:
        fix += (
            '; or have it summed out exactly: mark it infer={"enumerate": "parallel"} in the model, or name it, '
            f'EstimatorELBO({{"{name}": Enumerate()}})'
        )
    return site_error(name, "a latent site of the model that the guide does not draw", f"{fix}.")


def marked(infer: Mapping[str, Any], side: str) -> bool:
    """Is a site marked to be enumerated? In the guide "sequential" is an estimator's affair."""
    mark = infer.get("enumerate")
    return bool(mark) and not (side == "guide" and mark == "sequential" and not infer.get("num_samples"))


def check_mark(name: str, infer: Mapping[str, Any]) -> None:
    """A mark must mean what it says."""
    mark = f'infer={{"enumerate": "{infer["enumerate"]}"}}'
    if infer.get("num_samples"):
        what = f'marked {mark} with "num_samples", which draws several values instead of summing over all'
        raise site_error(name, what, "Leave num_samples out, or the mark.")
    if infer["enumerate"] != "parallel":
        raise site_error(
            name,
            f"marked {mark}, and values are summed side by side; one after another only for a site of the guide",
            'Write infer={"enumerate": "parallel"}.',
        )
    asked = None if "_with_estimators" in infer else requested(name, infer)  # a hook's pattern is for all
    if asked is not None and not asked.sums:
        raise site_error(
            name,
            f'marked {mark}, which sums over all its values, beside infer={{"estimator": {asked!r}}}, which draws one',
            'Leave one of them out; where config_enumerate sets the mark, write infer={"enumerate": None, ...}.',
        )


def check_elements(
    name: str, fn: Any, base: Any, countable: bool, plates: frozenset[int], nesting: int
) -> None:  # fmt: skip
    """A site is enumerated for all values of one element, or of elements that are independent. ``base`` is its
    distribution ``fn`` without `to_event`; ``plates`` are their dimensions, of ``nesting`` that there are."""
    if not countable:
        what = f"to be summed over all its values, and {type(base).__name__} has no finite number of them"
        raise site_error(name, what, "Remove the mark, and draw it in the guide.")
    loose = [d for d in range(-min(len(fn.batch_shape), nesting), 0) if d not in plates and fn.batch_shape[d] != 1]
    if loose or base.event_shape != fn.event_shape:
        where = f"batch dimension {loose[0]}, which no plate declares" if loose else "event dimensions"
        raise site_error(
            name,
            f"to be summed over all its values, it has several elements in {where}: every combination would count",
            "Put the elements in a plate, if they are independent given all else; or remove the mark and draw the site "
            "in the guide.",
        )


def check_reach(cells: Mapping[str, Cell]) -> None:
    """Elements that a plate makes independent move nothing together that is outside of it."""
    for other, cell in cells.items():
        for name in (a for a in cell.axes.values() if isinstance(a, str) and a in cells):
            if outside := cells[name].plates - cell.plates:
                plate = min(outside).name
                raise site_error(
                    name,
                    f"summed out inside plate '{plate}', and site '{other}' outside of it depends on its elements: "
                    "every combination of their values would count",
                    f"Put '{other}' in the plate too, if it has an element for each; or draw '{name}' in the guide.",
                )


@dataclass(frozen=True)
class Cell:
    """Where one log probability lies: in which plates, and along which axes of enumerated values. ``summed``: is it
    that of a site that is summed out?"""

    plates: frozenset[Plate]
    axes: Mapping[int, Axis] = field(default_factory=dict)
    summed: bool = False
    scale: Any = 1.0

    @property
    def values(self) -> frozenset[Plate]:
        """Axes of values that the guide enumerates, as plates."""
        return frozenset(a for a in self.axes.values() if isinstance(a, Plate))

    @property
    def time(self) -> Time | None:
        """The steps of a scan that it is inside of."""
        return next((a for a in self.axes.values() if isinstance(a, Time)), None)

    @property
    def reversed(self) -> bool:
        """Is it inside of a scan that runs from the last step to the first?"""
        return self.time is not None and self.time.reverse

    @property
    def named(self) -> dict[int, Axis]:
        """All of its axes, by dimension."""
        return {**self.axes, **{p.dim: p for p in self.plates}}

    def factor(self, ops: Ops, log_p: Array) -> Factor:
        return factor(ops, log_p, self.named)


def placed(name: str, shape: tuple[int, ...], scope: Mapping[int, Axis], nesting: int) -> dict[int, Axis]:
    """The axes of enumerated values in a batch shape, whose last ``nesting`` dimensions are the plates'."""
    axes = {}
    for dim in range(-len(shape), -nesting):
        if shape[dim] != 1:
            if dim not in scope:
                raise site_error(
                    name,
                    f"its log probability has size {shape[dim]} in dimension {dim}, left of all plates, where no "
                    "enumerated site in its reach has its values",
                    "In a chain of pyro.markov give a larger history, and put what depends on the last state into the "
                    "last step; after a scan use the last value that it carries, not those of its steps; elsewhere "
                    "count max_plate_nesting dimensions for plates.",
                )
            axes[dim] = scope[dim]
    return axes


class Block(NamedTuple):
    """Sites of the model that are one cost term; it goes by the name of the first that is summed out."""

    members: tuple[str, ...]
    plates: frozenset[Plate]


class Enumeration:
    """The cells of one run, and what they say of its cost terms."""

    def __init__(self, guide: Mapping[str, Cell], model: Mapping[str, Cell]):
        self.guide, self.model = guide, model
        self.blocks: dict[str, Block] = {}
        axes = {n: tuple(c.named.values()) for n, c in model.items()}
        names = list(axes)
        if any(c.summed for c in model.values()):
            for numbers in blocks(list(axes.values())):
                members = tuple(names[i] for i in numbers)
                first = next(n for n in members if model[n].summed)
                self.blocks[first] = Block(members, remaining([axes[n] for n in members]))
        check_reach(model)
        check_chains(self)
        self.inside = {n: name for name, b in self.blocks.items() for n in b.members}
        self._weights: dict[frozenset[Plate], Array] = {}
        self._chances: dict[frozenset[Plate], Factor] = {}
        self._order = {n: i for i, n in enumerate(guide)}
        self._laws: dict[tuple[str, ...], tuple[Factor, ...]] = {}
        self._above: dict[str, frozenset[Plate]] = {}
        for name, cell in guide.items():
            self._above[name] = cell.values.union(*(self._above.get(v.name, ()) for v in cell.values))

    def term(self, side: str, name: str) -> str:
        """The term that a site's log probability is part of."""
        return self.inside.get(name, name) if side == "model" else name

    def plates(self, side: str, term: str) -> frozenset[Plate]:
        """The axes of a term."""
        if side == "model" and term in self.blocks:
            return self.blocks[term].plates
        cell = (self.model if side == "model" else self.guide)[term]
        return cell.plates | cell.values

    def steps(self, term: str) -> Time | None:
        """The scan, each of whose steps has a part of a block of its own."""
        cells = [self.model[n] for n in self.blocks[term].members]
        time, *others = {c.time for c in cells}
        carried = {n for names, _ in (time.carried if time else ()) for n in names}
        return None if others or any(a in carried for c in cells for a in c.axes.values()) else time

    def deciding(self, side: str, name: str) -> frozenset[str]:
        """The sites that decide how probable the values are that a site's cost is weighted for."""
        return frozenset(v.name for v in self._ancestry((self.guide if side == "guide" else self.model)[name].values))

    def _ancestry(self, values: frozenset[Plate]) -> frozenset[Plate]:
        """These values, and those that decide how probable they are, and so on."""
        return values.union(*(self._above[v.name] for v in values))

    def total(self, ops: Ops, name: str, log_p: Mapping[str, Array]) -> Array:
        """The value of a block, scaled. ``log_p``: of its members, masked but for those that are summed out, and not
        scaled."""
        block = self.blocks[name]
        sum_ = elimination.placed(ops, self.sum(ops, name, log_p))
        first = _beyond(self.model[name])
        for other in block.members:
            if not _equal(_beyond(self.model[other]), first):
                raise site_error(
                    name,
                    f"summed out together with site '{other}', whose log probability has another scale: a sum has one",
                    "Put both under the same handler, and give it a number.",
                )
        scale = math.prod(p.scale for p in block.plates)
        sum_ = sum_ * scale if scale != 1 else sum_
        return sum_ if _equal(first, 1.0) else sum_ * first

    def sum(self, ops: Ops, name: str, log_p: Mapping[str, Array]) -> Factor:
        """The logarithm of a block's sum, not scaled."""
        cells = {n: self.model[n] for n in self.blocks[name].members}
        above = {v: self.guide[v.name].plates for c in cells.values() for v in c.values}
        return marginal(ops, [c.factor(ops, log_p[n]) for n, c in cells.items()], above)

    def expected(self, ops: Ops, name: str, log_p: Mapping[str, Array], log_q: Callable[[str], Array]) -> Array:
        """The same, its mean over values of the guide."""
        sum_, plates = elimination.placed(ops, self.sum(ops, name, log_p)), self.blocks[name].plates
        return self.weighted(ops, Term("model", name, sum_, plates, frozenset()), log_q).value

    def weighted(self, ops: Ops, term: Term, log_q: Callable[[str], Array]) -> Term:
        """A term along values of the guide, times their probability; ``log_q`` of a site of the guide, neither masked
        nor scaled."""
        values = frozenset(p for p in term.plates if p.values)
        if not values:
            return term
        chance = self.chance(ops, values, term.plates, term.site, log_q)
        if any(v.of_step for v in values):
            flipped = term.side == "model" and self.model[term.site].reversed
            chance = ops.flip(chance, axis=0) if flipped else chance
            chance = steps_first(ops, chance, term.value.ndim)
        return weighed(ops, term, chance)

    def chance(
        self,
        ops: Ops,
        values: frozenset[Plate],
        plates: frozenset[Plate],
        site: str,
        log_q: Callable[[str], Array],
    ) -> Array:
        """The probability of values of the guide, for what ``site`` has in ``plates``."""
        ancestry = self._ancestry(values)
        for v in ancestry:
            if outside := self.guide[v.name].plates - plates:
                raise site_error(
                    v.name,
                    f"enumerated in the guide inside plate '{min(outside).name}', and the cost of site '{site}' "
                    "outside of it depends on every combination of its elements",
                    f"Remove the mark of '{v.name}' in the guide: its estimator then draws it.",
                )
        if values not in self._weights:
            self._weights[values] = ops.exp(elimination.placed(ops, self._log_chance(ops, values, log_q)))
        return self._weights[values]

    def _log_chance(self, ops: Ops, values: frozenset[Plate], log_q: Callable[[str], Array]) -> Factor:
        """q(v) = Σ q(v_last | parents) q(the others, parents): along a chain, in time proportional to its steps."""
        wanted, steps = values, []
        while values and values not in self._chances:
            last = max(values, key=lambda v: self._order[v.name])
            sites = self._together(last, values)
            own = frozenset(v for v in values if v.name in sites)
            parents = frozenset(v for n in sites for v in self.guide[n].values if v.name not in sites)
            steps.append((values, last, sites, rest := (values - own) | parents))
            values = rest
        for values, last, sites, rest in reversed(steps):
            factors = [self._law(ops, last, sites, log_q), *([self._chances[rest]] if rest else [])]
            self._chances[values] = log_probability(ops, factors, values)
        return self._chances[wanted]

    def _together(self, value: Plate, values: frozenset[Plate]) -> tuple[str, ...]:
        """The site of a value; in a scan, with all that go from step to step and decide how probable it is, or are
        decided by the same, of those that ``values`` depend on."""
        if value.ago is None:
            return (value.name,)
        time = self.guide[value.name].time
        above = {n: {v.name for v in c.values if v.of_step} for n, c in self.guide.items() if c.time == time}
        wanted = {v.name for v in values if v.name in above}
        while more := {n for name in wanted for n in above[name]} - wanted:
            wanted |= more
        found = {value.name}
        while more := {n for name in wanted if above[name] & found for n in above[name]} - found:
            found |= more
        return tuple(n for n in above if n in found)

    def _law(self, ops: Ops, value: Plate, sites: tuple[str, ...], log_q: Callable[[str], Array]) -> Factor:
        """log q of a value, and of those of its scan, given all that come before."""
        if sites not in self._laws:
            if value.ago is None:
                (name,) = sites
                self._laws[sites] = (self.guide[name].factor(ops, log_q(name)),)
            else:
                self._laws[sites] = self.laws(ops, sites, log_q)
        return self._laws[sites][value.last]

    def chain(self, name: str) -> tuple[str, ...]:
        """A site of the guide that is enumerated in a scan, with all that are so together with it."""
        inside = frozenset(v for c in self.guide.values() if c.time == self.guide[name].time for v in c.values)
        return self._together(next(v for v in self.guide[name].values if v.name == name), inside)

    def laws(self, ops: Ops, sites: tuple[str, ...], log_q: Callable[[str], Array]) -> tuple[Factor, Factor]:
        """log q of what a scan of the guide enumerates, at each step and after the last."""
        cells = [*self.guide.values(), *self.model.values()]
        values = frozenset(v for c in cells for v in c.values if v.name in sites)
        return chain(ops, [self.guide[n].factor(ops, log_q(n)) for n in sites], values)


def steps_first(ops: Ops, x: Array, ndim: int) -> Array:
    """``x [steps, *batch]`` with so many dimensions."""
    return ops.reshape(x, (x.shape[0], *(1,) * (ndim - x.ndim), *x.shape[1:]))


def check_chains(values: Enumeration) -> None:
    """What a scan of the model carries is summed out along its steps; so is what a scan of the guide carries, but not
    one given the other."""
    for name, block in values.blocks.items():
        if values.steps(name) is None:
            for v in (v for n in block.members for v in values.model[n].values if v.of_step):
                raise site_error(
                    name,
                    f"summed out over several steps of a scan, which depend on site '{v.name}', enumerated in a scan "
                    "of the guide: every combination of its values in all steps would count",
                    f"Mark '{name}' in the guide too, or remove the mark of '{v.name}' there.",
                )


def warn_of_minibatches(values: Enumeration) -> None:
    """A site that is summed out above a plate of which a step sees a minibatch: the logarithm of an estimate."""
    for block in values.blocks.values():
        cells = {n: values.model[n] for n in block.members}
        for name, cell in cells.items():
            inner = [p for c in cells.values() for p in c.plates - cell.plates - block.plates if p.scale != 1]
            if cell.summed and inner:
                warn(
                    f"site '{name}': summed out above plate '{min(inner).name}', of which a step sees a minibatch. Its "
                    "elements stand for all of the plate (N/B times their log probability), and the logarithm of that "
                    "sum is biased. Draw the site in the guide, or pass all of the data."
                )


def check_objective(objective: Any, terms: Sequence[Term], in_model: Container[str]) -> None:
    """A sum of weights over values, each times its probability, is that of the model's own: nothing of q is left. And
    of what is part of a sum nothing can be weighed by itself."""
    apart = {t.site for t in terms if t.side == "model"}
    for t in terms if objective.weighs_apart else ():
        if t.side == "guide" and t.site in in_model and t.site not in apart:
            raise site_error(
                t.site,
                f"its log p depends on values that are summed out, and {objective!r} weighs it apart from the rest",
                "Draw in the guide, unmarked, what is summed out there; or leave out objective=, for the ELBO.",
            )
    for values in (p for t in terms for p in t.plates if p.values and objective.keeps_score):
        name = values.name
        raise site_error(
            name,
            f"enumerated in the guide, and under {type(objective).__name__} the sum of q · p / q over its values is "
            "that of p, which leaves nothing to the guide",
            f"Leave '{name}' out of the guide and mark it in the model, which sums it out of every weight. Or remove "
            f'the mark in the guide: it is drawn then, and EstimatorELBO({{"{name}": Enumerate()}}) sums its gradient.',
        )


def _beyond(cell: Cell) -> Any:
    """What of a scale is not the N/B of plates."""
    own = math.prod(p.scale for p in cell.plates)
    return cell.scale if own == 1 else cell.scale / own


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    try:
        return math.isclose(a, b, rel_tol=1e-6)
    except (TypeError, ValueError, RuntimeError):  # several numbers, or one that is not known while tracing
        return False
