"""A compiled step as one CUDA graph: the card runs its operations at a single call.

A graph works where its tensors lay when it was captured. What the program reads beside its arguments is used in place,
and a tensor that has moved calls for another graph; arguments are copied to memory of the graph's own, and results from
there, for the next step writes over them. A graph draws from states of its own, put before every step to where the
generator is: it draws what the operations would, one by one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

Array = torch.Tensor
Run = Callable[..., list[Array]]
Replay = Callable[[], list[Array]]  # results where the next replay puts its own

_CAPTURES = 8  # of one step, whose tensors move, before its operations run one by one


@dataclass
class Draws:
    """How far a step brings the generator, and how far it was at each of the times that it was put back."""

    total: int
    rewinds: Sequence[int]


class Card:
    """A CUDA device."""

    def __init__(self, device: torch.device):
        self.device = device

    def watched(self, run: Replay, names: dict[str, Any]) -> tuple[list[Array], Draws | None]:
        """The results of ``run``, and what it draws: None if it waits for the card, which a graph can't.

        ``names`` has what ``run`` calls to ``restore`` the generators.
        """
        generator, restore, rewinds = self._generator(), names["restore"], list[int]()
        start, mode = generator.get_offset(), torch.cuda.get_sync_debug_mode()

        def noted(state: Any) -> None:
            restore(state)
            rewinds.append(generator.get_offset() - start)

        names["restore"] = noted
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                results = run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            names["restore"] = restore
        waits = [w for w in seen if "synchroniz" in str(w.message)]
        for w in seen:
            if w not in waits:
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        return results, None if waits else Draws(generator.get_offset() - start, rewinds)

    def captured(self, run: Replay, names: dict[str, Any], draws: Draws) -> Replay:
        generator, graph = self._generator(), torch.cuda.CUDAGraph()
        # One for the start, one for each time that the generator is put back. Its own is never captured: it would be
        # unusable if a capture failed.
        states: list[Any] = [generator.clone_state() for _ in (0, *draws.rewinds)]
        for state in states[1:]:
            graph.register_generator_state(state)
        further, calls = iter(states[1:]), {k: names[k] for k in ("save", "restore")}
        own = generator.graphsafe_get_state()
        with torch.cuda.device(self.device):
            before, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            try:
                names.update(save=lambda: None, restore=lambda _: generator.graphsafe_set_state(next(further)))
                generator.graphsafe_set_state(states[0])
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    results = run()
            finally:
                torch.cuda.set_stream(before)  # after an error it would be the other
                generator.graphsafe_set_state(own)
                names.update(calls)

        def replay() -> list[Array]:
            seed, now = generator.initial_seed(), generator.get_offset()
            for state, ahead in zip(states, (0, *draws.rewinds), strict=True):
                if state.initial_seed() != seed:
                    state.manual_seed(seed)
                state.set_offset(now + ahead)
            graph.replay()
            generator.set_offset(now + draws.total)
            return results

        return replay

    def _generator(self) -> Any:
        return torch.cuda.default_generators[self.device.index or 0]


class Graph:
    """``run`` of a program, called with ``given`` arguments and what else it reads, by graphs from the second call on.

    ``names`` are its globals. ``trials`` calls come before, in which a compiler does its work.
    """

    def __init__(self, run: Run, names: dict[str, Any], given: int, card: Any, trials: int = 0):
        self.run, self.names, self.given, self.card, self.trials = run, names, given, card, trials
        self.captures, self.refused = 0, False
        self._draws: Draws | None = None
        self._places: list[int] = []
        self._inputs: list[Array] = []
        self._replay: Replay | None = None

    @property
    def captures_next(self) -> bool:
        """Whether the next call is the first by a graph."""
        return self._replay is None and self._draws is not None and not self.refused

    def __call__(self, *tensors: Array) -> list[Array]:
        if self.refused or self.trials:
            self.trials = max(0, self.trials - 1)
            return self.run(*tensors)
        if self._draws is None:
            results, self._draws = self.card.watched(lambda: self.run(*tensors), self.names)
            self.refused = self._draws is None
            return results
        places = [x.data_ptr() for x in tensors[self.given :]]
        if self._replay is None or places != self._places:
            self._capture(tensors, self._draws)
            self._places = places
        if self._replay is None:
            return self.run(*tensors)
        _copy(self._inputs, tensors[: self.given])
        results = self._replay()
        own = [torch.empty_like(x) for x in results]
        _copy(own, results)
        return own

    def _capture(self, tensors: Sequence[Array], draws: Draws) -> None:
        self._replay, self.captures = None, self.captures + 1
        if self.captures <= _CAPTURES:
            given, others = tensors[: self.given], tensors[self.given :]
            self._inputs = [self._place(x) for x in given]
            with suppress(Exception):  # what can't be captured, memory that is short
                self._replay = self.card.captured(lambda: self.run(*self._inputs, *others), self.names, draws)
        if self._replay is None:
            self.refused, self._inputs = True, []

    def _place(self, x: Array) -> Array:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=self.card.device)


def _copy(to: list[Array], values: list[Array] | tuple[Array, ...]) -> None:
    if to:
        torch._foreach_copy_(to, values)


def card_of(made: Iterable[Array], given: Iterable[Array], fixed: Iterable[Array]) -> Card | None:
    """The card on which all lies that a step reads and computes. Numbers may lie elsewhere if they are ``given``, then
    they are copied there, or ``fixed``, then they become part of operations. None if there is no such card."""
    given = list(given)
    there = [*made, *(x for x in (*given, *fixed) if x.dim() or x.is_cuda)]
    devices = {x.device for x in there}
    if len(devices) != 1 or any(x.layout is not torch.strided for x in there):
        return None
    if any(n > 1 and s == 0 for x in given for n, s in zip(x.shape, x.stride(), strict=True)):
        return None  # nothing can be copied to memory of that kind
    (device,) = devices
    known = torch.__version__ >= "2.4"  # before, generators have no states that can be exchanged
    return Card(device) if device.type == "cuda" and known else None
