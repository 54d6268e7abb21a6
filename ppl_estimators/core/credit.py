"""Credit assignment: which cost terms count for which site, element by element (Rao-Blackwellisation).

    R_i = Σ_t  1[z_i can move t] · t,   summed to the plates that keep z_i and t element-wise apart

A plate keeps them apart if both are inside it and every latent site on the way from z_i to t is inside it too: a
site outside the plate that z_i moves and that moves t carries the influence of one element to all the others.

The steps of a scan are kept apart by the same rule, but a step moves all later ones: what counts for it is the sum from
its own step on. Everything else (event dimensions, batch dimensions without a plate) is summed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .ops import Array, Ops
from .site import Plate, Site, Term, from_each_step, sum_to


class Credit(NamedTuple):
    """Term number ``term``, summed to ``plates`` (``ordered``: and from each step on), counts for the sites of number
    ``sites``."""

    term: int
    plates: frozenset[Plate]
    ordered: bool
    sites: frozenset[int]


class Graph:
    """Who depends on whom among the latent sites of the guide, and in which plates they are."""

    def __init__(
        self,
        ancestors: Mapping[str, frozenset[str]],
        plates: Mapping[str, frozenset[Plate]],
        orders: Mapping[str, str | None] | None = None,
    ):
        self.ancestors = ancestors  # strict: a site is not its own ancestor
        self.plates = plates
        self.orders = orders or {}  # of sites inside a scan, its name
        self._leaks: dict[tuple[str, frozenset[str]], frozenset[Plate]] = {}
        self._credits: dict[tuple[object, ...], tuple[Credit, ...]] = {}

    def descendants(self, sites: frozenset[str]) -> frozenset[str]:
        return frozenset(name for name, up in self.ancestors.items() if up & sites)

    def shared_plates(self, site: str, term: Term) -> frozenset[Plate]:
        """Plates along which an element of ``term`` depends on the same element of ``site`` only."""
        both = self.plates[site] & term.plates
        return both - self._leaking(site, term.depends_on) if both else both

    def ordered(self, site: str, term: Term) -> bool:
        """Does a step of ``site`` move its own and later steps of ``term`` only?"""
        order = self.orders.get(site)
        if order is None or term.order != order:
            return False
        return all(self.orders.get(w) == order for w in term.depends_on if site in self.ancestors[w])

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
        key = (plates, tuple(s.name for s in sites), tuple((t.plates, t.depends_on, t.order) for t in terms))
        if key not in self._credits:
            found = []
            for index, term in enumerate(terms):
                by_axes: dict[tuple[frozenset[Plate], bool], set[int]] = {}
                for i, site in enumerate(sites):
                    if site.name in term.depends_on:
                        axes = self.shared_plates(site.name, term) & plates, self.ordered(site.name, term)
                        by_axes.setdefault(axes, set()).add(i)
                found += [Credit(index, *axes, frozenset(members)) for axes, members in by_axes.items()]
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
    of a 0-1 matrix [sites, terms] with the stacked terms.
    """
    result: dict[str, Array] = {}
    alike: dict[tuple[object, ...], list[Site]] = {}
    for site in sites:
        alike.setdefault((site.plates, site.batch_shape), []).append(site)
    for group in alike.values():
        ndim = len(group[0].batch_shape)
        # by shape: terms reduced to it, and for each the numbers of the sites that count it
        columns: dict[tuple[int, ...], tuple[list[Array], list[frozenset[int]]]] = {}
        for index, plates, ordered, members in graph.credits(group, terms):
            reduced = (from_each_step if ordered else sum_to)(ops, terms[index].value, plates, ndim)
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
    if n * len(arrays) <= 64 or n == 1:
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
    return [(i, product[i]) for i in sorted(frozenset().union(*counts))]
