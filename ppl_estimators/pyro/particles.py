"""Particles that run side by side: an axis of theirs, leftmost, in the arrays of a program written for one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_map

from ..core.errors import EstimatorError
from ..core.site import Plate, Site

Array = torch.Tensor
PARTICLES = "num_particles_vectorized"  # Pyro's name of their plate


@dataclass(frozen=True)
class Particles:
    """``vectorized``: do they run side by side? ``nesting``: of plates, that of the particles included."""

    vectorized: bool
    nesting: float

    def facts(self, site: Site) -> Site:
        """The site as it is in one particle."""
        if not self.vectorized:
            return site
        if len(site.batch_shape) - self._left(site) != self.nesting:
            raise EstimatorError(
                f"site '{site.name}': batch shape {site.batch_shape} with max_plate_nesting={self.nesting}, "
                "the particles included: the particle axis must be the leftmost. Pass a max_plate_nesting that covers "
                "every batch dimension, or vectorize_particles=False."
            )
        return site.filled(**self._without(site))

    def _left(self, site: Site) -> int:
        """How many axes of values that the guide enumerates lie left of all particles."""
        values = self.vectorized and any(p.values for p in site.plates)
        return len(site.batch_shape) - int(self.nesting) if values else 0

    def _without(self, site: Site) -> dict[str, Any]:
        """Plates and batch shape of a vectorised site, the particle axis being its leading one."""
        left, shape = self._left(site), site.batch_shape
        return {
            "plates": frozenset(moved(p, 1) if p.values else p for p in site.plates if p.name != PARTICLES),
            "batch_shape": (*shape[:left], *shape[left + 1 :]),
        }

    def led(self, site: Site) -> Site:
        """A vectorised site with the particles in front."""
        arrays, left = {}, self._left(site)
        if left:
            found = {k: getattr(site, k) for k in ("scale", "logits", "named", "log_q", "score_norm", "value")}
            arrays = _first(found, left)
        return replace(site, lead=1, **{**arrays, **self._without(site)})

    def joined(self, rows: Sequence[Any], axis: int = 0) -> Any:
        """Arrays of one particle each, joined along a new particle axis (or as they are, if vectorised)."""
        first = rows[0]
        if len(rows) == 1:
            return first if self.vectorized else _alone(first, axis)
        if type(first) is dict:
            return {k: self.joined([r[k] for r in rows], 1 if k == "elsewhere" else axis) for k in first}
        if first is None or self.vectorized or not isinstance(first, torch.Tensor):
            return first
        return torch.stack(list(rows), axis)

    def of_site(self, site: Site, rows: Sequence[dict[str, Any]]) -> Any:
        """The same of a site, whose values may be enumerated left of the particles."""
        found, left = self.joined(rows), self._left(site)
        return _first(found, left) if left else found

    def collected(self, rows: Sequence[Array | None], total: int) -> Array | None:
        """What the objective has of each particle, particles first."""
        present = [x for x in rows if x is not None]
        if not present:
            return None
        if self.vectorized:
            return present[0] if present[0].ndim else present[0][None] / total
        return torch.stack(present)


def _alone(found: Mapping[str, Any], axis: int) -> dict[str, Any]:
    """Arrays of the only particle, with a particle axis."""
    joined: dict[str, Any] = {}
    for key, x in found.items():
        if isinstance(x, torch.Tensor):
            joined[key] = x.unsqueeze(axis)
        elif key == "named" and x.keys() == {"logits"}:
            joined[key] = {"logits": joined["logits"]}  # the same
        elif x and type(x) is dict:
            joined[key] = _alone(x, 1 if key == "elsewhere" else axis)
        else:
            joined[key] = x
    return joined


def moved(plate: Plate, by: int) -> Plate:
    """``by`` dimensions to the right."""
    return plate._replace(dim=plate.dim + by)


def _first(found: Mapping[str, Any], left: int) -> dict[str, Any]:
    """Arrays whose particle axis comes behind ``left`` others, with that in front (behind the alternatives)."""
    placed: dict[str, Any] = {}
    for key, x in found.items():
        first = 1 if key == "elsewhere" else 0
        placed[key] = tree_map(lambda a: a.movedim(left + first, first) if _has(a, left + first) else a, x)  # noqa: B023
    return placed


def _has(x: Any, axis: int) -> bool:
    return isinstance(x, torch.Tensor) and x.ndim > axis
