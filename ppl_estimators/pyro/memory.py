"""What an ELBO remembers between steps, and what it knows a program and its structure by."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from ..core.plan import Plan
from ..core.site import Site
from ..policy import requested
from .buffers import Buffers
from .dependencies import Holdings
from .randomness import Generators
from .run import Message, plates_of


class Recent(OrderedDict[Hashable, Any]):
    """A dictionary that forgets what was not asked for longest."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def recall(self, key: Hashable) -> Any:
        try:
            self.move_to_end(key)
        except KeyError:
            return None
        return self[key]

    def store(self, key: Hashable, value: Any) -> None:
        self[key] = value
        self.move_to_end(key)
        while len(self) > self.size:
            self.popitem(last=False)


@dataclass
class Memory:
    """What an ELBO remembers between steps: plans by structure, which of them a call is expected to have, and what its
    programs write and read beside their parameters."""

    plans: Recent = field(default_factory=lambda: Recent(64))
    expected: Recent = field(default_factory=lambda: Recent(64))
    buffers: Buffers = field(default_factory=Buffers)
    generators: Generators = field(default_factory=Generators)
    holdings: Recent = field(default_factory=lambda: Recent(64))
    seen: set[str] = field(default_factory=set)  # latent sites of all structures
    verified: Recent = field(default_factory=lambda: Recent(256))
    distrusted: set[Hashable] = field(default_factory=set)  # programs whose dependencies were found incomplete
    broadcasts: Recent = field(default_factory=lambda: Recent(256))
    standing: Recent = field(default_factory=lambda: Recent(256))  # of which sites' other values a guide knows nothing
    narrow: set[Hashable] = field(default_factory=set)  # programs that do not broadcast
    enumerating: set[Hashable] = field(default_factory=set)  # programs some of whose values are laid out side by side
    undifferentiated: list[Mapping[str, Site]] = field(default_factory=list)  # plans verified but for derivatives
    last: Plan | None = None

    def __reduce__(self) -> tuple[type[Memory], tuple[()]]:
        """A copy of an ELBO, or one that was pickled, looks at its programs anew."""
        return Memory, ()

    def holdings_of(self, program: Hashable) -> Holdings:
        """What is known of the tensors that a program holds."""
        known: Holdings | None = self.holdings.recall(program)
        if known is None:
            self.holdings.store(program, known := Holdings())
        return known


def kind_of(msg: Message) -> tuple[Any, ...]:
    """What a choice depends on, of one latent site: not the sizes of its plates."""
    fn, infer = msg["fn"], msg["infer"]
    asked, baseline = requested(msg["name"], infer), infer.get("baseline")
    plates = plates_of(msg)
    dims, n = {p.dim for p in plates}, len(fn.batch_shape)
    return (
        type(fn),
        type(getattr(fn, "base_dist", None)),
        tuple(size if i - n not in dims else None for i, size in enumerate(fn.batch_shape)),
        fn.event_shape,
        frozenset((p.name, p.dim) for p in plates),
        None if asked is None else asked.structure(),
        tuple((k, baseline[k] if isinstance(baseline[k], (bool, float)) else None) for k in sorted(baseline))
        if baseline
        else None,
        infer.get("enumerate"),
        infer.get("kl"),
    )


def code_of(fn: Any) -> Hashable:
    """What a program is known by: its code, not the object, of which there may be a new one at every step."""
    inner = getattr(fn, "__wrapped__", None) or getattr(fn, "func", None)
    if isinstance(fn, partial) and inner is not None:
        return code_of(inner)
    function = getattr(fn, "__func__", fn)
    kind: type = type(fn)
    return getattr(function, "__code__", kind)


def shape_of(x: Any) -> Hashable:
    """What of an argument may decide the structure of a program."""
    if isinstance(x, torch.Tensor):
        return tuple(x.shape)
    if isinstance(x, (tuple, list)):
        return tuple(map(shape_of, x))
    if isinstance(x, Mapping):
        return tuple((k, shape_of(v)) for k, v in x.items())
    kind: type = type(x)
    return x if x is None or isinstance(x, (bool, int, str)) else kind
