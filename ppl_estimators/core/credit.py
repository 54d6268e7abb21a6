"""Credit assignment: which cost terms count for which site, element by element (Rao-Blackwellisation).

    R_i = Σ_t  1[z_i can move t] · t,   summed to the plates that keep z_i and t element-wise apart

A plate keeps them apart if both are inside it and every latent site on the way from z_i to t is inside it too: a
site outside the plate that z_i moves and that moves t carries the influence of one element to all the others, drawn or
enumerated.

The steps of a scan are kept apart by the same rule, but a step moves others: all that read its value, all that read
theirs, and so on. What counts for it is the sum over these. Everything else (event dimensions, batch dimensions without
a plate) is summed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, reduce
from typing import NamedTuple

from .ops import Array, Ops
from .site import Plate, Site, Term, Window, sum_to, within


class Steps(NamedTuple):
    """Of a term with a part for each step of a scan of the guide, whose name is ``order``: for each site of the scan,
    the steps that read the value of one. ``flipped``: the parts are counted from the other end. ``inner``: of a scan
    inside of each step its name, and whether it is flipped."""

    order: str
    readers: Mapping[str, Window]
    flipped: bool = False
    inner: tuple[str, bool] | None = None

    def itself(self) -> Window:
        """A step of a site moves that step."""
        return Window(0, 0, inner=self.inner and Window(0, 0))


class Credit(NamedTuple):
    """Term number ``term``, summed to ``plates`` (and, if it has steps, for each over those in ``window``), counts for
    the sites of number ``sites``."""

    term: int
    plates: frozenset[Plate]
    window: Window | None
    sites: frozenset[int]


class Graph:
    """Who depends on whom among the latent sites of the guide, and in which plates they are."""

    def __init__(
        self,
        ancestors: Mapping[str, frozenset[str]],
        plates: Mapping[str, frozenset[Plate]],
        steps: Mapping[tuple[str, str], Steps] | None = None,
        enumerated: Mapping[str, Term] | None = None,
    ):
        self.ancestors = ancestors  # strict: a site is not its own ancestor
        self.plates = plates
        self.steps = steps or {}  # of terms, by side and site
        self.enumerated = enumerated or {}  # -log q of the sites that the guide enumerates
        self._reached: dict[str, dict[str, Window]] = {}
        self._leaks: dict[tuple[str, frozenset[str]], frozenset[Plate]] = {}
        self._credits: dict[tuple[object, ...], tuple[Credit, ...]] = {}

    def descendants(self, sites: frozenset[str]) -> frozenset[str]:
        return frozenset(name for name, up in self.ancestors.items() if up & sites)

    def shared_plates(self, site: str, term: Term) -> frozenset[Plate]:
        """Plates along which an element of ``term`` depends on the same element of ``site`` only."""
        both = self.plates[site] & term.plates
        if any(p.of_step for p in both) and ((w := self.window(site, term)) is None or (w.first, w.last) != (0, 0)):
            both = frozenset(p for p in both if not p.of_step)  # other steps have other values
        return both - self._leaking(site, term.depends_on) - self._decided(site, term) if both else both

    def window(self, site: str, term: Term) -> Window | None:
        """Which steps of ``term`` a step of ``site`` moves; None if that may be any."""
        steps = self.steps.get((term.side, term.site))
        if steps is None or not self._along(site, steps.order):
            return None
        if not all(self._along(w, steps.order) for w in term.depends_on if site in self.ancestors[w]):
            return None
        reached = self.reached(site)
        found = [reached[w].then(direct) for w, direct in steps.readers.items() if w in reached]
        if not found:
            return None
        window = reduce(Window.joined, found)
        if window.first == -window.last == -math.inf:
            return None
        own, inner = self.steps["guide", site].inner, None
        if own is not None and steps.inner is not None and own[0] == steps.inner[0]:
            inner = window.inner and window.inner._replace(flipped=steps.inner[1])
        return window._replace(flipped=steps.flipped, inner=inner)

    def _along(self, site: str, order: str) -> bool:
        own = self.steps.get(("guide", site))
        return own is not None and own.order == order

    def follows(self, site: Site) -> bool:
        """Is it known what each step of ``site`` moves?"""
        steps = self.steps.get(("guide", site.name))
        return steps is not None and site.time == 1 + (steps.inner is not None)

    def circular(self, site: str) -> bool:
        """Does a step of ``site`` move others of it?"""
        return ("guide", site) in self.steps and self.reached(site)[site] != self.steps["guide", site].itself()

    def apart(self, site: str, terms: Sequence[Term]) -> float:
        """How far apart two steps of ``site`` must be for no term to see both: 1 if none sees two of them."""
        windows = [self.window(site, t) for t in terms if site in t.depends_on]
        known = [w for w in windows if w is not None and self.steps["guide", site].inner is None]
        return 1 + max(w.last for w in known) - min(w.first for w in known) if len(known) == len(windows) else math.inf

    def reached(self, site: str) -> dict[str, Window]:
        """Which steps of the sites in the same scan a step of ``site`` moves; its own included."""
        if site not in self._reached:
            own = self.steps["guide", site]
            found, rounds = {site: own.itself()}, 0
            while True:
                grown = dict(found)
                for (side, w), steps in self.steps.items():
                    for up, direct in steps.readers.items() if side == "guide" and steps.order == own.order else ():
                        if up in found and (up != w or direct != Window(0, 0)):
                            new = found[up].then(direct)
                            grown[w] = grown[w].joined(new) if w in grown else new
                if grown == found:
                    break
                rounds += 1
                if rounds > len(self.steps):  # round a loop: there is no end of it
                    grown |= {w: grown[w].endless(found[w]) for w in grown.keys() & found.keys()}
                found = grown
            self._reached[site] = found
        return self._reached[site]

    def _leaking(self, site: str, via: frozenset[str]) -> frozenset[Plate]:
        key = (site, via)
        if key not in self._leaks:
            mine = self.plates[site]
            leaks: frozenset[Plate] = frozenset()
            for w in via:
                if not mine <= self.plates[w] and site in self.ancestors[w]:
                    leaks |= mine - self.plates[w]
            self._leaks[key] = leaks
        return self._leaks[key]

    def _decided(self, site: str, term: Term) -> frozenset[Plate]:
        """The same for enumerated values that weigh the term: what moves their probabilities moves it."""
        values = [self.enumerated[p.name] for p in term.plates if p.values and p.name in self.enumerated]
        return frozenset().union(*(self.plates[site] - t.plates for t in values if site in t.depends_on))

    def closed_plates(self, site: str, terms: Sequence[Term]) -> frozenset[Plate]:
        """Plates whose elements no cost couples: all of them can take counterfactual values at once."""
        closed = self.plates[site]
        for term in terms:
            if site in term.depends_on:
                closed &= self.shared_plates(site, term)
        return closed

    def credits(self, sites: Sequence[Site], terms: Sequence[Term]) -> tuple[Credit, ...]:
        """Which terms count for which of ``sites``, all in the same plates. Worked out once for each structure."""
        plates = sites[0].plates
        key: tuple[object, ...]
        key = (plates, tuple(s.name for s in sites), tuple((t.plates, t.depends_on) for t in terms))
        if self.steps:
            key = (*key, tuple((t.side, t.site) for t in terms))
        if key not in self._credits:
            found, same = [], dict[frozenset[int], frozenset[int]]()  # of which long chains have many
            for index, term in enumerate(terms):
                by_axes: dict[tuple[frozenset[Plate], Window | None], set[int]] = {}
                for i, site in enumerate(sites):
                    if site.name in term.depends_on:
                        axes = self.shared_plates(site.name, term) & plates, self.window(site.name, term)
                        by_axes.setdefault(axes, set()).add(i)
                for axes, members in by_axes.items():
                    its = frozenset(members)
                    found.append(Credit(index, *axes, same.setdefault(its, its)))
            self._credits[key] = tuple(found)
        return self._credits[key]

    def levels(self, sites: Sequence[str]) -> list[frozenset[str]]:
        """``sites`` in groups, such that no member of a group descends from another member."""
        depth: dict[str, int] = {}
        for name in sites:  # in the order of the guide, so ancestors come first
            depth[name] = 1 + max((depth[up] for up in self.ancestors[name] if up in depth), default=-1)
        return [frozenset(n for n in sites if depth[n] == d) for d in range(1 + max(depth.values(), default=-1))]


def downstream_costs(ops: Ops, graph: Graph, terms: Sequence[Term], sites: Sequence[Site]) -> dict[str, Array]:
    """R_i for each of ``sites``, ``[*plates]`` in the rank of the site's batch shape.

    Sites of one shape share their reductions: each term is summed to their plates once, then all R_i are one product
    of a 0-1 matrix [sites, terms] with the stacked terms; or sums, if no term counts for two of them.
    """
    result: dict[str, Array] = {}
    alike: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        alike.setdefault((site.plates, site.batch_shape), []).append(site)
    for group in alike.values():
        ndim = len(group[0].batch_shape)
        # by shape: terms reduced to it, and for each the numbers of the sites that count it
        columns: dict[tuple[int, ...], tuple[list[Array], list[frozenset[int]]]] = {}
        windows: dict[tuple[Window | None, frozenset[int], object], Array] = {}  # what is summed to the same: once
        for index, plates, window, members in graph.credits(group, terms):
            times = 0 if window is None else 1 + (window.inner is not None)
            reduced = sum_to(ops, terms[index].value, plates, ndim, times)
            key = window, members, index if window is None else tuple(reduced.shape)
            windows[key] = windows[key] + reduced if key in windows else reduced
        for (window, members, _), each in windows.items():
            reduced = each if window is None else within(ops, each, window)
            arrays, counts = columns.setdefault(tuple(reduced.shape), ([], []))
            arrays.append(reduced)
            counts.append(members)
        for site in group:
            result[site.name] = None
        for arrays, counts in columns.values():
            for i, total in _products(ops, arrays, tuple(counts), len(group)):
                name = group[i].name
                result[name] = total if result[name] is None else result[name] + total
        for site in group:
            if site.time and result[site.name] is not None:  # what cannot be told apart counts for every step
                result[site.name] = ops.broadcast_to(result[site.name], site.plate_shape)
    return result


def _products(ops: Ops, arrays: list[Array], counts: tuple[frozenset[int], ...], n: int) -> Iterable[tuple[int, Array]]:
    """Σ over the terms that count for site i, for each i that counts any."""
    if n * len(arrays) <= 64 or all(len(members) == 1 for members in counts):
        totals: dict[int, Array] = {}
        for x, members in zip(arrays, counts, strict=True):
            for i in members:
                totals[i] = totals[i] + x if i in totals else x
        return totals.items()
    stacked = ops.stack(arrays)
    # XLA takes the product of a known matrix with stacked arrays apart and repeats it in each use: what it compiles
    # would grow with the square of the number of sites.
    matrix = ops.memberships(counts, n, stacked)
    product = ops.matmul(matrix, ops.reshape(stacked, (len(arrays), -1)))
    product = ops.reshape(product, (n, *stacked.shape[1:]))
    return [(i, product[i]) for i in _members(counts)]


@lru_cache(maxsize=64)  # of a long chain there are many, and large ones
def _members(sets: tuple[frozenset[int], ...]) -> list[int]:
    return sorted(frozenset().union(*sets))
