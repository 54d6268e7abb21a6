"""`recommend`: which estimator for which site, by measurement."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import ppl_estimators

from ..backends import Library
from ..catalogue import ENTRIES, Kind
from ..core.errors import EstimatorError
from ..core.estimator import Estimator
from ..core.plan import Plan
from .candidates import Program, opened, resolve
from .compare import Compared, Comparison, draw_frontier, reason, row
from .groups import Alike, alike, mapping_of
from .library import Advance, bar, quiet
from .measured import Measured, time_together, trained
from .moments import Moments
from .program import within
from .reference import UNBIASED, Reference, reference_for
from .show import Showable, Shown, axes, number

#: an estimator that adds more evaluations to a step is not tried
MOST_EVALUATIONS = 32
#: fewest draws that a variance is judged by
FEWEST = 50
#: the joint stage: the winner of every group's own search, all together
TOGETHER, DEFAULT = "the best of each", "default"
#: steps of training, and Adam's step size in them, after which the joint stage looks again
LATER, STEP_SIZE = 200, 0.02
#: scores that differ by less are alike, beside what chance makes of them: of noise, and of two that have none
ALIKE, ALIKE_EXACT = 1.15, 1.5


@dataclass(frozen=True)
class Choice:
    """For sites that are alike: the estimator; the runner-up and the price of taking that instead, how many times the
    score is in the best sound row of the joint stage that has it here (None: there is none); ``evidence``: every
    estimator tried here, the others' held, each at the last round that it reached."""

    sites: tuple[str, ...]
    estimator: Estimator
    runner_up: str | None
    price: float | None
    evidence: Comparison

    @property
    def considered(self) -> int:
        return len(self.evidence.rows) + len(self.evidence.failed)


@dataclass(frozen=True, repr=False)
class Recommendation(Showable):
    """What `recommend` found. ``elbo()`` makes the ELBO, and ``code`` is that line to paste: ``mapping`` alone lacks
    the particles. ``joint`` compares it, all sites together, with the default (its first row) and with each runner-up
    in its place; ``later`` has the variance × ms of these rows after some training."""

    library: str
    num_particles: int
    mapping: Mapping[str, Estimator]
    choices: tuple[Choice, ...]
    joint: Comparison
    later: Mapping[str, float]

    def elbo(self) -> Any:
        """The ELBO that is recommended, to be passed as `SVI`'s loss."""
        elbo_class = Library(self.library).adapter.EstimatorELBO
        return elbo_class(dict(self.mapping), num_particles=self.num_particles)

    def __getitem__(self, site: str) -> Choice:
        """The choice for a site."""
        for choice in self.choices:
            if site in choice.sites:
                return choice
        raise KeyError(f"no site '{site}': {', '.join(n for c in self.choices for n in c.sites)}")

    @property
    def code(self) -> str:
        """Python that makes the ELBO, imports included."""
        entries = [f"{json.dumps(k, ensure_ascii=False)}: {e!r}" for k, e in self.mapping.items()]
        call = f"{{{', '.join(entries)}}}, num_particles={self.num_particles}"
        if len(call) > 58:  # what 80 columns leave
            lines = "".join(f"        {entry},\n" for entry in entries)
            call = f"\n    {{\n{lines}    }},\n    num_particles={self.num_particles},\n"
        used = set(re.findall(r"\w+", " ".join(map(repr, self.mapping.values()))))
        names = sorted(used & set(ppl_estimators.__all__))
        return (
            f"from ppl_estimators import {', '.join(names)}\n"
            f"from ppl_estimators.{self.library} import EstimatorELBO\n\n"
            f"elbo = EstimatorELBO({call})"
        )

    def tables(self) -> list[Shown]:
        rows = tuple(
            (
                _listed(c.sites), repr(c.estimator), str(c.considered), c.runner_up or "–",
                "–" if c.price is None else f"{number(c.price)}×" if c.price < 1e6 else "> 10⁶×",
            )
            for c in self.choices
        )  # fmt: skip
        headings = ("site", "estimator", "considered", "runner-up", "which costs")
        caption = (
            f"Of up to {self.joint.num_draws:,} draws each. What the runner-up costs: how many times the score of all "
            "sites together. Of this machine and this point; two that are alike may change places."
        )
        (joint,) = self.joint.tables()
        joint_rows = tuple(
            (*row[:4], number(self.later.get(r.label)), *row[4:])
            for row, r in zip(joint.rows, self.joint.rows, strict=True)
        )
        together = Shown(
            "All sites together",
            (*joint.headings[:4], f"after {LATER}\nsteps", *joint.headings[4:]),
            joint_rows,
            f"{joint.caption}\nAfter {LATER} steps: variance × ms where Adam has got to by then. The score is the "
            "geometric mean of both; of rows that are alike the simplest is chosen, the default first.",
        )
        return [Shown(f"Recommended ({self.library})", headings, rows, caption, self.code), together]

    def records(self) -> list[dict[str, Any]]:
        return [
            {
                "sites": list(c.sites), "estimator": repr(c.estimator), "runner_up": c.runner_up, "price": c.price,
                "considered": c.considered,
            }
            for c in self.choices
        ]  # fmt: skip

    def facts(self) -> dict[str, Any]:
        return {
            "library": self.library,
            "num_particles": self.num_particles,
            "mapping": {k: repr(e) for k, e in self.mapping.items()},
            "code": self.code,
            "choices": [
                {**record, "evidence": c.evidence.facts()}
                for record, c in zip(self.records(), self.choices, strict=True)
            ],
            "joint": self.joint.facts(),
            "later": dict(self.later),
        }

    def plot(self) -> Any:
        """Variance against milliseconds: all sites together, then the estimators tried at each."""
        panels = [("all sites together", self.joint), *((_listed(c.sites), c.evidence) for c in self.choices)]
        figure, places = axes(max(len(c.rows) for _, c in panels), len(panels), width=7.5)
        for ax, (title, comparison) in zip(places, panels, strict=True):
            draw_frontier(ax, comparison.rows, comparison.chosen)
            ax.set_title(title, loc="left")
        return figure


def _listed(sites: tuple[str, ...]) -> str:
    if len(sites) <= 3:
        return ", ".join(sites)
    return f"{sites[0]} … {sites[-1]} ({len(sites)})"


def recommend(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...] = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    budget: int = 600,
    num_particles: int = 1,
    params: Mapping[str, Any] | None = None,
    seed: int = 0,
    backend: str | None = None,
    progress: bool | None = None,
) -> Recommendation:
    """Choose an unbiased estimator for each site by measuring variance × ms.

    First site by site, the noisiest first, the others at the default or at what has been chosen for them: every
    unbiased estimator of the catalogue that the site admits, that keeps nothing (what is learned shows only after
    training), that adds at most 32 evaluations to a step, and that has no measurable bias here (so that a pathwise
    gradient through a model with jumps falls out); the better half goes on to twice the draws. Sites of one family and
    shape, in the same plates, share one search and one choice.

    Then all sites together, the default first: it, these choices, and the choices with one runner-up in its place. They
    are measured twice, at this point and after 200 steps of training from it (Adam, 0.02): what is best at the start
    may be noisy near the optimum. The row with the least geometric mean of variance × ms at both is recommended. Where
    others are as good, within 15% and two standard errors, the simplest of them is: the default, then the fewest
    evaluations, then the order of the catalogue.

    ``budget``: how many gradients are drawn of each candidate in the last round, and of each row of the joint
    measurement; earlier rounds draw fewer. ``num_particles``: where an estimator needs no more. ``params``, ``seed``,
    ``backend``, ``progress``: as in `compare`. Milliseconds are those of this machine and moment.

    Raises `EstimatorError` where no estimator works at a site, and names a mistake in model or guide.
    """
    if budget < 2:
        raise EstimatorError(
            f"recommend(budget=...) is how many gradients are drawn of each candidate, 2 or more, got {budget!r}."
        )
    point: dict[str, Any] = {"params": params, "seed": seed, "backend": backend, "particles": num_particles}
    program, plan = opened("recommend(model, guide, args)", model, guide, args, kwargs, **point)
    with within("EstimatorELBO"):
        reference = reference_for(program, plan, "auto", 2000, budget, progress)
    search = _Search(program, plan, reference, budget, num_particles)
    with bar("recommend", search.expected(), progress) as search.advance:
        return search.run()


class _Search:
    """``held``: the estimator of each site so far; ``known``: what has been measured and may be asked again;
    ``loudest``: the largest variance that was seen."""

    def __init__(
        self, program: Program, plan: Plan, reference: Reference, budget: int, particles: int,
        advance: Advance = lambda draws, what="": None,
    ):  # fmt: skip
        self.program, self.plan, self.reference = program, plan, reference
        self.budget, self.particles, self.advance = budget, particles, advance
        self.catalogue = candidates()
        self.groups = alike(plan, self.catalogue, particles)
        self.held: dict[str, Estimator] = dict(plan.estimators)
        self.known: dict[Any, Measured] = {}
        self.loudest = 1e-6

    def expected(self) -> int:
        """Draws, if every candidate works."""
        total = 0
        for left in (len(group.candidates) for group in self.groups):
            rounds = max(left - 1, 1).bit_length()
            draws, done = max(FEWEST, self.budget >> rounds), 0
            while True:
                draws = min(draws, self.budget)
                total, done = total + left * (draws - done), draws
                if draws >= self.budget or left == 1:
                    break
                left, draws = max(2, (left + 1) // 2), 2 * draws
        return total + 2 * self.budget * (2 + len(self.groups))

    def run(self) -> Recommendation:
        found = []
        for group in self._noisiest_first():
            best, second, evidence = self._choose(group)
            self.held.update(dict.fromkeys(group.sites, best))
            found.append((group, best, second, evidence))
        return self._jointly(found)

    def _noisiest_first(self) -> list[Alike]:
        """What is chosen for the loud quietens what the others are judged in."""
        if len(self.groups) == 1:
            return self.groups
        gradients, moments = self._measured(self.held).gradients, Moments()
        with quiet():
            for losses, parts in gradients.parts(FEWEST, self.program.seed):
                moments.add_parts(losses, parts)
        squares = np.sum(list(moments.part_squares.values()), axis=0)
        noise = dict(zip(gradients.part_names, squares, strict=True))
        return sorted(self.groups, key=lambda group: -sum(noise[site] for site in group.sites))

    # ---- one group of sites -------------------------------------------------------------------------------------

    def _choose(self, group: Alike) -> tuple[Estimator, Estimator | None, Comparison]:
        """Successive halving: the best and the second, and every candidate's last row."""
        left: dict[Estimator, Measured] = {}
        failed: dict[str, str] = {}
        for e in group.candidates:
            try:
                left[e] = self._measured({**self.held, **dict.fromkeys(group.sites, e)})
            except Exception as error:  # the program itself runs
                failed[repr(e)] = reason(error)
        rounds = max(len(left) - 1, 1).bit_length()
        draws, rows = max(FEWEST, self.budget >> rounds), {}
        while True:
            draws = min(draws, self.budget)
            for e, why in self._go_on(left, draws, min(20, draws // 10)).items():
                failed[repr(e)] = why
                del left[e]
            rows.update({e: self._row(m, repr(e)) for e, m in left.items()})
            sound = self._sorted([e for e in left if not rows[e].biased], rows)
            score = {e: self._score(rows[e]) for e in sound}
            sound = self._simplest_first(sound, rows, score, left, {e: {group.sites[0]: e} for e in sound})
            if not sound:
                raise EstimatorError(
                    f"site '{group.sites[0]}': no estimator that it admits works here. "
                    + " ".join(f"{n}: {why}" for n, why in failed.items())
                    + (f" Biased: {', '.join(repr(e) for e in rows)}." if rows else "")
                )
            if draws >= self.budget or len(sound) == 1:
                break
            left = {e: left[e] for e in sound[: max(2, (len(sound) + 1) // 2)]}
            draws *= 2
        best, second = sound[0], sound[1] if len(sound) > 1 else None
        self.known = {k: m for k, m in self.known.items() if m in (left[best], left[second] if second else None)}
        order = self._sorted(rows, rows)
        evidence = self._comparison([rows[e] for e in order], failed, repr(best))
        return best, second, evidence

    # ---- all sites together ---------------------------------------------------------------------------------------

    def _jointly(self, found: list[tuple[Alike, Estimator, Estimator | None, Comparison]]) -> Recommendation:
        default = dict(self.plan.estimators)
        whole = {DEFAULT: default} if self.held == default else {DEFAULT: default, TOGETHER: dict(self.held)}
        together, swapped = list(whole)[-1], {}
        for group, _, second, _ in found:
            if second is not None:
                label = f"{_listed(group.sites)}: {second!r}"
                swapped[label] = group
                whole[label] = {**self.held, **dict.fromkeys(group.sites, second)}
        rows, failed = self._measure_whole(whole)
        bar = self._score(rows[together]) if together in rows else float("inf")
        better = [n for n in swapped if n in rows and not rows[n].biased and self._score(rows[n]) < bar]
        if len(better) > 1:
            label = "the runners-up that were better"
            whole[label] = {**self.held, **{s: whole[n][s] for n in better for s in swapped[n].sites}}
            more, why = self._measure_whole({label: whole[label]})
            rows, failed = {**rows, **more}, {**failed, **why}
        sound = self._sorted([n for n in rows if not rows[n].biased], rows)
        if not sound:
            raise EstimatorError(
                "every combination of estimators shows a bias or fails here. "
                + " ".join(f"{n}: {w}" for n, w in failed.items())
            )
        several = {n: self._measured(whole[n]) for n in sound}
        later = self._later(several)
        score = {n: (self._score(rows[n]) * self._score(later.get(n, rows[n]))) ** 0.5 for n in sound}
        sound = self._simplest_first(sorted(sound, key=score.__getitem__), rows, score, several, whole)
        chosen = sound[0]
        others = self._sorted([n for n in rows if n != DEFAULT], rows)
        order = [n for n in (DEFAULT, *others) if n in rows]
        joint = self._comparison([rows[n] for n in order], failed, chosen)
        final, choices = whole[chosen], []
        for group, best, second, evidence in found:
            taken = final[group.sites[0]]
            other = second if taken == best else best
            using = [score[n] for n in sound if whole[n][group.sites[0]] == other]
            price = max(min(using) / score[chosen], 1.0) if using else None  # below 1: alike, and not as simple
            choices.append(Choice(group.sites, taken, None if other is None else repr(other), price, evidence))
        mapping = mapping_of(final, [g.sites for g in self.groups])
        ordered = sorted(choices, key=lambda c: list(self.plan.sites).index(c.sites[0]))
        return Recommendation(
            self.program.library, rows[chosen].num_particles, mapping, tuple(ordered), joint,
            {n: r.variance_times_milliseconds for n, r in later.items()},
        )  # fmt: skip

    def _later(self, several: Mapping[str, Measured]) -> dict[str, Compared]:
        """The same rows where training by the first has got to."""
        first, *_ = several.values()
        away, found = trained(first.gradients, LATER, STEP_SIZE, self.program.seed), {}
        for name, m in several.items():
            try:
                moved = m.moved(away)
                moved.draw(self.budget, self.advance)
                found[name] = self._row(moved, name, judged=False)
            except Exception:  # no place to be measured at: the first one counts
                continue
        return found

    def _measure_whole(
        self, whole: Mapping[str, Mapping[str, Estimator]]
    ) -> tuple[dict[str, Compared], dict[str, str]]:
        left: dict[str, Measured] = {}
        failed: dict[str, str] = {}
        for label, chosen in whole.items():
            try:
                left[label] = self._measured(chosen)
            except Exception as error:
                failed[label] = reason(error)
        failed |= self._go_on(left, self.budget, 20)
        return {label: self._row(m, label) for label, m in left.items() if label not in failed}, failed

    # ---- measuring --------------------------------------------------------------------------------------------------

    def _measured(self, chosen: Mapping[str, Estimator]) -> Measured:
        key = tuple(chosen.items())
        if key not in self.known:
            p = self.program
            particles = self.plan.particles if chosen == self.plan.estimators else self.particles
            candidate = resolve(dict(chosen), None, p.library, p.guide, self.plan, particles)
            measured = Measured(p, candidate, FEWEST // 10)
            added = sum(g.alternatives + g.relaxations for g in measured.gradients.plan().groups)
            usual = sum(g.alternatives + g.relaxations for g in self.plan.groups)
            if added > max(MOST_EVALUATIONS, usual):
                raise EstimatorError(
                    f"it adds {added} evaluations to a step, and up to {MOST_EVALUATIONS} are tried. "
                    "`compare` measures it, if you ask for it."
                )
            measured.evaluations = candidate.elbo.num_particles * (1 + added)
            self.known[key] = measured
        return self.known[key]

    def _go_on(self, left: Mapping[Any, Measured], draws: int, steps: int) -> dict[Any, str]:
        """Time and draw; which failed, and why."""
        failed = {}
        for name, m in left.items():
            try:
                if m.moments.count == 0:
                    m.time(1)
                m.draw(draws, self.advance)
            except Exception as error:
                failed[name] = reason(error)
        time_together([m for n, m in left.items() if n not in failed], steps)
        return failed

    def _row(self, m: Measured, label: str, judged: bool = True) -> Compared:
        found = row(m, self.reference if judged else Reference("none", None), label)
        self.loudest = max(self.loudest, found.variance)
        return found

    def _score(self, r: Compared) -> float:
        """Variance × ms, where all variances below rounding are alike: the gradient's length and the noise that others
        have there say what rounding is."""
        return (r.variance + 1e-12 * ((self.reference.norm or 0.0) ** 2 + self.loudest)) * r.milliseconds

    def _sorted(self, names: Any, rows: Mapping[Any, Compared]) -> list[Any]:
        return sorted(names, key=lambda n: self._score(rows[n]))

    def _simplest_first(
        self, names: list[Any], rows: Mapping[Any, Compared], score: Mapping[Any, float],
        several: Mapping[Any, Measured], chosen: Mapping[Any, Mapping[str, Estimator]],
    ) -> list[Any]:  # fmt: skip
        """``names``, from the best score up, but with the simplest of those that are as good as the first in front:
        what the default does, then few evaluations, then the catalogue's order."""
        default, order = self.plan.estimators, {e: i for i, e in enumerate(self.catalogue)}

        def rank(name: Any) -> tuple[Any, ...]:
            moved = [e for n, e in chosen[name].items() if e != default[n]]
            return len(moved), several[name].evaluations, [order.get(e, len(order)) for e in moved]

        def alike(a: Compared, b: Compared) -> float:
            if max(a.variance, b.variance) <= 1e-10 * self.loudest:
                return ALIKE_EXACT
            errors = [r.variance_error / r.variance for r in (a, b) if r.variance_error > 0]
            return ALIKE + 2 * float(np.linalg.norm(errors))

        if not names:
            return names
        first = names[0]
        simplest = min((n for n in names if score[n] <= score[first] * alike(rows[n], rows[first])), key=rank)
        return [simplest, *(n for n in names if n != simplest)]

    def _comparison(self, rows: list[Compared], failed: Mapping[str, str], chosen: str) -> Comparison:
        r = self.reference
        return Comparison(
            self.program.library, self.budget, self.program.seed, r.what, r.norm, tuple(rows), failed, chosen
        )


def candidates() -> list[Estimator]:
    """The unbiased estimators of the catalogue that keep nothing and need no function of the user's; plain score
    function only beside leave-one-out."""
    found = [
        e.subject
        for e in ENTRIES
        if e.unbiased and e.kind is not Kind.composition and isinstance(e.subject, Estimator)
        and not e.kept and not any(map(callable, vars(e.subject).values()))
    ]  # fmt: skip
    same: dict[bool, Estimator] = {}  # for the ELBO there are two draws of the library's
    return [*(e for e in found if not e.value.library or same.setdefault(e.sticks, e) is e), UNBIASED]
