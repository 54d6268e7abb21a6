"""Values of enumerated sites, laid out side by side to the left of all plates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.runtime import _ENUM_ALLOCATOR
from pyro.poutine.util import site_is_subsample

from ..core.elimination import Axis
from ..core.enumeration import Cell, check_elements, check_mark, marked, placed
from ..core.errors import site_error
from ..core.site import Plate
from .distributions import unwrapped

Message = dict[str, Any]


class Layout:
    """Where the values of enumerated sites lie in one run of guide and model: Pyro's own handler sees to it, with
    dimensions that `pyro.markov` uses again.

    ``nesting``: how many dimensions are the plates'. ``asked``: is a site that only the model has to be summed out,
    though no mark says so?
    """

    def __init__(self, nesting: int, asked: Callable[[str, Mapping[str, Any]], bool]):
        self.nesting, self.asked = nesting, asked
        self.axes: dict[int, Axis] = {}  # by Pyro's number
        self._guide, self._model = _Side(self, -1 - nesting, None), _Side(self, None, {})

    def around(self, guide: Any, model: Any, drawn: Mapping[str, Message]) -> tuple[Any, Any]:
        """Guide and model with enumerated sites laid out; ``drawn`` will hold what the guide drew."""
        self._model.drawn = drawn
        return self._guide(guide), model and self._model(model)

    @staticmethod
    def handed(msg: Message, drawn: Message) -> None:
        """A message of the model gets the value of the guide's."""
        for dim, axis in drawn["scope"].items():
            if (other := msg["scope"].get(dim, axis)) != axis:
                names = [a if isinstance(a, str) else getattr(a, "name", "") for a in (axis, other)]
                raise site_error(
                    names[0],
                    f"enumerated in the guide along the dimension of site '{names[1]}', which pyro.markov used again, "
                    "and the model's remembers both",
                    "Give pyro.markov in the guide as large a history as in the model.",
                )
        msg["infer"] = {**drawn["infer"], "_dim_to_id": dict(drawn["infer"].get("_dim_to_id", {}))}
        msg["scope"] = {**msg["scope"], **drawn["scope"]}


class _Side(EnumMessenger):
    """``drawn``: what the guide drew, for a run of the model."""

    def __init__(self, layout: Layout, first: int | None, drawn: Mapping[str, Message] | None):
        super().__init__(first)
        self.layout, self.drawn = layout, drawn

    def __enter__(self) -> Any:
        if self.drawn:  # by the guide, along dimensions that its `pyro.markov` uses again: the model has others
            taken = [d for m in self.drawn.values() for d in m["infer"].get("_dim_to_id", ())]
            _ENUM_ALLOCATOR.next_available_dim = min([_ENUM_ALLOCATOR.next_available_dim, *(d - 1 for d in taken)])
        return super().__enter__()

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            return
        name, known = msg["name"], self.layout.axes
        wanted, mark = self._wanted(msg), msg["infer"].get("enumerate")
        msg["infer"] = {**msg["infer"], "enumerate": "parallel" if wanted else None if mark == "parallel" else mark}
        super()._pyro_sample(msg)
        scope = dict(self._param_dims.get(name, {}))
        if wanted:
            dim, its = msg["infer"]["_enumerate_dim"], msg["infer"]["_dim_to_id"]
            size = msg["value"].shape[dim - msg["fn"].event_dim]
            known[its[dim]] = name if self.drawn is not None else Plate(name, dim, size, values=True)
            scope |= its
        msg["scope"] = {d: known[i] for d, i in scope.items() if i in known}
        msg["nesting"] = self.layout.nesting

    def _wanted(self, msg: Message) -> bool:
        name = msg["name"]
        if msg["is_observed"] or msg["value"] is not None or (self.drawn is not None and name in self.drawn):
            return False
        if marked(msg["infer"], "guide" if self.drawn is None else "model"):
            check_mark(name, msg["infer"])
        elif self.drawn is None or not self.layout.asked(name, msg["infer"]) or not countable(msg["fn"]):
            return False
        dims = frozenset(f.dim for f in msg["cond_indep_stack"] if f.dim is not None)
        base = unwrapped(msg["fn"])
        check_elements(name, msg["fn"], base, countable(base), dims, self.layout.nesting)
        return True


def countable(fn: Any) -> bool:
    """Has a distribution finitely many values, which it lists?"""
    return bool(getattr(fn, "has_enumerate_support", False))


def support(fn: Any) -> Any:
    """The values of one element, ``[values, *event]``."""
    values = fn.enumerate_support(expand=False)
    return values.reshape(values.shape[0], *values.shape[1 + len(fn.batch_shape) :])


def is_enumerated(msg: Message) -> bool:
    return msg["infer"].get("_enumerate_dim") is not None


def is_summed(msg: Message) -> bool:
    """Is it a site that only the model has, and enumerates?"""
    return msg.get("scope", {}).get(msg["infer"].get("_enumerate_dim")) == msg["name"]


_NO_PLATES: frozenset[Plate] = frozenset()  # one for all that have none


def declared(msg: Message) -> frozenset[Plate]:
    """The vectorised plates of a message."""
    frames = msg["cond_indep_stack"]
    if not frames:
        return _NO_PLATES
    return frozenset(
        Plate(f.name, f.dim, f.size, (f.full_size or f.size) / f.size) for f in frames if f.dim is not None
    )


def cell(msg: Message) -> Cell:
    """Where a message's log probability lies."""
    if "scope" not in msg:
        return Cell(declared(msg), scale=msg["scale"])
    shape = msg["fn"].batch_shape
    if msg["value"] is not None:
        shape = torch.broadcast_shapes(shape, msg["value"].shape[: msg["value"].ndim - msg["fn"].event_dim])
    axes = placed(msg["name"], shape, msg["scope"], msg["nesting"])
    return Cell(declared(msg), axes, is_summed(msg), msg["scale"])
