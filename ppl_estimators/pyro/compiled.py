"""Compiled steps: what a step did is noted, and done again without Python, Pyro or autograd.

The first step of a program, for the shapes of its arguments, runs as ever; the second is noted (`tape.py`); the third
runs both ways under the same random numbers, and the two must agree. After that the tape runs, on a card as one graph
(`graphs.py`), as long as all that the program reads beside its arguments is what it was (`guards.py`), and is compared
again from time to time. A program that cannot be noted runs as ever, and says why once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer.util import torch_backward
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_map

from ..core.errors import EstimatorWarning
from .graphs import Graph
from .guards import Guard
from .memory import Memory, Recent
from .ops import CONSTANTS
from .tape import Program, Recorded, Tape, compiled

Array = torch.Tensor
#: the loss of one uncompiled step with these arguments, and its runs
Evaluate = Callable[[tuple[Any, ...], dict[str, Any]], tuple[Array, Sequence[Any]]]

_PROGRAMS = 16  # with their kinds of arguments, kept by one ELBO
_CHANGES = 8  # so often may what a program reads change before its steps run uncompiled
_UNKNOWN = 50  # steps with something new about their arguments, before that is said
_TRIES = 3
_KINDS = ("cpu", "cuda")
_APART = torch.__version__ < "2.4"  # autocast on each had functions of its own


@dataclass
class Result:
    """The loss of a step and its gradient, or an uncompiled ``loss`` that still leads to its parameters."""

    loss: Array
    leaves: Sequence[Array] = ()
    gradients: Sequence[Array] = ()
    runs: Sequence[Any] | None = None
    known: bool = True
    start: Any = None  # of the generators, if it ran compiled

    def differentiable(self) -> Array:
        if not self.known:
            return self.loss
        found: Array = _Known.apply(self.loss, self.gradients, *self.leaves)
        return found

    def backward(self, retain_graph: bool | None) -> None:
        hooked = any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self.leaves)
        if hooked or not self.known:
            torch_backward(self.differentiable(), retain_graph=retain_graph)
            return
        with torch.no_grad():
            for p, gradient in zip(self.leaves, self.gradients, strict=True):
                if p.grad is not None:
                    p.grad += gradient
                elif gradient.layout is not torch.strided or p.stride() == gradient.stride():
                    p.grad = gradient
                else:
                    p.grad = torch.empty_like(p).copy_(gradient)


class _Known(torch.autograd.Function):
    """A loss whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, loss: Array, gradients: Sequence[Array], *leaves: Array) -> Array:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *slope: Array) -> Any:
        return None, None, *(g * slope[0] for g in ctx.gradients)


@dataclass
class _Steps:
    """Of one program and one kind of arguments."""

    roots: Any  # whose identity is part of the key
    ran: bool = False
    refused: bool = False
    changes: int = 0
    tries: int = 0
    uses: int = 0
    next_check: int = 0
    noted: _Noted | None = None


@dataclass
class _Noted:
    program: Program
    guard: Guard
    leaves: Sequence[Array]
    stored: Sequence[tuple[str, Array, Any]]  # parameters of the store, and their constraints
    facts: Sequence[tuple[Array, int, bool, Any]]  # tensors from outside: where their data are, and so on

    def changed(self) -> str | None:
        """Something that the program reads and that is another now, in words."""
        for x, address, differentiable, fact in self.facts:
            if (x.data_ptr() != address or x.requires_grad is not differentiable) and _fact(x) != fact:
                return "the type, shape or device of a tensor"
        store = pyro.get_param_store()
        for name, parameter, constraint in self.stored:
            if store._params.get(name) is not parameter or store._constraints.get(name) is not constraint:
                return f"parameter '{name}'"
        return self.guard.changed()


class Compiler:
    """Runs the steps of one ELBO; ``backend`` is that of `torch.compile`, or None for plain Python."""

    def __init__(self, memory: Memory, backend: str | None):
        self.memory, self.backend = memory, backend
        self._known = Recent(_PROGRAMS)
        self._unknown = 0  # steps since the last that ran from a tape, or nearly

    def __reduce__(self) -> tuple[type[Compiler], tuple[Any, ...]]:
        """A copy notes its steps anew."""
        return Compiler, (self.memory, self.backend)

    def step(
        self, evaluate: Evaluate, settings: Hashable, model: Any, guide: Any, args: Any, kwargs: Any
    ) -> Result | None:
        """A step; None if it is to run uncompiled."""
        if any(type(m) is not TraceMessenger or not m.param_only for m in _PYRO_STACK):
            return None  # handlers may change anything
        modes = _get_current_function_mode_stack()
        if any(type(m) is not DeviceContext for m in modes):
            return None  # so may these
        facts: list[Hashable] = [settings, *map(_identity, (model, guide)), torch.get_default_dtype(), *_autocast()]
        facts += [m.device for m in modes]
        tensors = _flat((args, kwargs), facts)
        names: dict[int, int] = {}
        if len(set(map(id, tensors))) < len(tensors):  # of two that are one, one may be noted for both
            facts.append(tuple(names.setdefault(id(x), len(names)) for x in tensors))
        if any(x.requires_grad for x in tensors):
            return None  # the loss leads to them, and on to whatever they were made from
        steps: _Steps | None = self._known.recall(key := tuple(facts))
        if steps is None:
            self._known.store(key, steps := _Steps((model, guide, args, kwargs)))
            self._unknown += 1
            if self._unknown == _UNKNOWN:
                _warn(f"of the last {_UNKNOWN} steps no two had arguments of the same kind. Numbers are constants of a "
                      "compiled step: pass them as tensors; other sizes need other tapes: pad batches")  # fmt: skip
        if steps.refused:
            return None
        if steps.noted is not None:
            changed = steps.noted.changed()
            if changed is None:
                return self._run(steps, steps.noted, evaluate, args, kwargs, tensors)
            steps.changes, steps.noted, steps.ran = steps.changes + 1, None, False
            if steps.changes > _CHANGES:
                _refuse(steps, f"{changed} changes between steps, and the program reads it. Pass it as an argument, "
                        "a number as a tensor: svi.step(x, torch.tensor(weight))")  # fmt: skip
                return None
        if not steps.ran:
            steps.ran = True
            return None
        return self._note(steps, evaluate, args, kwargs)

    def _note(self, steps: _Steps, evaluate: Evaluate, args: Any, kwargs: Any) -> Result | None:
        """A real step, noted; None if it raises, as some of torch does under a dispatch mode: then it runs as ever."""
        store, roots = pyro.get_param_store(), steps.roots
        guard, before = Guard(*roots, _global_forward_hooks, _global_forward_pre_hooks), dict(store._params)
        with TraceMessenger(param_only=True) as captured:
            start = self.memory.generators.state()
            try:
                tape, result = self._taped(evaluate, args, kwargs)
            except Exception as error:
                self.memory.generators.restore(start)
                steps.tries += 1
                if steps.tries == _TRIES:
                    _refuse(steps, f"the program raises {type(error).__name__} while its operations are noted")
                return None
        names = list(captured.trace.nodes)
        if tape.unsteady or before.keys() != store._params.keys():
            steps.tries += 1
            if steps.tries < _TRIES:
                return result
            tape.refuse("has another structure at every step")
        changed = guard.settled()
        if changed is not None:
            tape.refuse(f"changes {changed} when it runs")
        origin = {*map(id, before.values()), *guard.tensors, *CONSTANTS}
        for value, where in tape.outside.items():
            if id(tape.tensors[value]) not in origin:
                tape.refuse(f"reads a tensor that neither its arguments nor what it names lead to{where}")
        if self.memory.generators.foreign or self.memory.generators.own:
            tape.refuse("draws from a random generator that is not torch's own")
        if _PYRO_STACK and not before.keys() >= set(names):
            tape.refuse("has parameters that are not in the store (module_local_params); pass ELBOModule, not SVI")
        if not result.known and tape.reason is None:
            tape.refuse("has no parameter to train")
        if tape.reason is not None:
            _refuse(steps, f"the program {tape.reason}")
            return result
        program = compiled(tape, [result.loss, *result.gradients], self.memory.generators, self.backend)
        stored = [(n, before[n], store._constraints[n]) for n in names if n in before]
        outside = [tape.tensors[v] for v in tape.outside]
        facts = [(x, x.data_ptr(), x.requires_grad, _fact(x)) for x in outside]
        steps.noted, steps.uses, steps.next_check = _Noted(program, guard, result.leaves, stored, facts), 0, 0
        return result

    def _taped(self, evaluate: Evaluate, args: Any, kwargs: Any) -> tuple[Tape, Result]:
        """A real step, and its tape."""
        memory, store = self.memory, pyro.get_param_store()
        args, kwargs = tree_map(_renamed, (args, kwargs))
        before = dict(store._params)
        tape = Tape(_flat((args, kwargs), []))
        generators, memory.generators = memory.generators, Recorded(memory.generators, tape)
        try:
            with tape:
                loss, runs = evaluate(args, kwargs)
                leaves = [x for v in tape.outside if (x := tape.tensors[v]).requires_grad]
                made = any(before.get(n) is not p for n, p in store._params.items())  # on the tape, not outside
                if made or not loss.requires_grad or not all(x.is_leaf for x in leaves):
                    return tape, Result(loss, runs=runs, known=False)
                if _reenters(loss):
                    tape.refuse("calls checkpoint(..., use_reentrant=True); use_reentrant=False can be compiled")
                    return tape, Result(loss, runs=runs, known=False)
                with _unhooked(leaves):
                    found = torch.autograd.grad(loss, leaves, allow_unused=True)
                loss = loss.detach()
        finally:
            memory.generators = generators
        reached = [(x, g) for x, g in zip(leaves, found, strict=True) if g is not None]
        return tape, Result(loss, [x for x, _ in reached], [g for _, g in reached], runs)

    def _run(
        self, steps: _Steps, noted: _Noted, evaluate: Evaluate, args: Any, kwargs: Any, tensors: Sequence[Array]
    ) -> Result | None:
        generators, program = self.memory.generators, noted.program
        self._unknown = 0
        new = isinstance(program.run, Graph) and program.run.captures_next
        check, start = new or steps.uses == steps.next_check, generators.state()
        given = [*tensors, *program.constants]
        written = [given[i] for i in program.written] if check else []
        before = [x.clone() for x in written]
        if _PYRO_STACK:
            for name, *_ in noted.stored:
                pyro.param(name)  # for `SVI`, which asks what there is to train
        try:
            with torch.no_grad(), _cast_already():
                loss, *gradients = program.run(*given)
        except Exception as error:  # a draw from nan, memory that is short: the step that runs as ever will say
            generators.restore(start)
            _copied(written, before)
            if steps.uses == 0:
                _refuse(steps, f"what it noted of a step raises {type(error).__name__} when it is run")
            return None
        steps.uses += 1
        result = Result(loss, noted.leaves, gradients, start=start)
        if not check:
            return result
        if steps.uses > steps.next_check:
            steps.next_check = max(10, 10 * steps.next_check)
        found = [*_ordered(result), *(x.clone() for x in written), *_held(generators.state())]
        _copied(written, before)
        generators.restore(start)
        tape, result = self._taped(evaluate, args, kwargs)
        again = [*_ordered(result), *written, *_held(generators.state())]
        with torch.no_grad():
            alike = _close if self.backend is not None else _same
            same = len(found) == len(again) and all(map(alike, found, again))
        if not tape.unsteady and not same:
            _refuse(steps, "what it noted of a step is not what a later step does: the program reads something that "
                    "changes (an iterator, a clock, a file), and whose change cannot be seen")  # fmt: skip
        return result


def _refuse(steps: _Steps, why: str) -> None:
    steps.refused, steps.noted = True, None
    _warn(f"{why}. Its steps run uncompiled: right, and slower")


def _copied(to: Sequence[Array], values: Sequence[Array]) -> None:
    with torch.no_grad():
        for x, value in zip(to, values, strict=True):
            x.copy_(value)


def _autocast() -> tuple[Hashable, ...]:
    """What `torch.autocast` does at present, on the processor and on a card."""
    if _APART:
        return (
            torch.is_autocast_cpu_enabled() and torch.get_autocast_cpu_dtype(),
            torch.is_autocast_enabled() and torch.get_autocast_gpu_dtype(),
        )
    return tuple(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in _KINDS)


@contextmanager
def _cast_already() -> Iterator[None]:
    """What was noted is what `torch.autocast` made of a program."""
    with ExitStack() as without:
        for kind, on in zip(_KINDS, _autocast(), strict=True):
            if on:
                without.enter_context(torch.autocast(kind, enabled=False))
        yield


def _warn(what: str) -> None:
    warnings.warn(f"EstimatorELBO(compile=...): {what}.", EstimatorWarning, stacklevel=2)


def _reenters(loss: Array) -> bool:
    """Does a backward pass inside the backward pass reach parameters?"""
    queue, seen = [loss.grad_fn], set[Any]()
    for node in queue:
        if type(node).__name__ == "CheckpointFunctionBackward":
            return True
        further = [n for n, _ in node.next_functions if n is not None and n not in seen] if node is not None else []
        seen.update(further)
        queue += further
    return False


@contextmanager
def _unhooked(leaves: Sequence[Array]) -> Iterator[None]:
    """Hooks run once, when the gradient arrives at the parameter."""
    hooks = [(x, x._backward_hooks) for x in leaves if x._backward_hooks]
    for x, _ in hooks:
        x._backward_hooks = None
    try:
        yield
    finally:
        for x, hook in hooks:
            x._backward_hooks = hook


def _renamed(x: Any) -> Any:
    """An argument under a name of its own: the program may know the same tensor by other ways."""
    return x.detach() if isinstance(x, torch.Tensor) else x


def _identity(program: Any) -> Hashable:
    """Methods are made anew whenever they are asked for."""
    return id(getattr(program, "__func__", program)), id(getattr(program, "__self__", None))


def _flat(x: Any, facts: list[Hashable]) -> list[Array]:
    """The tensors of arguments, in order; ``facts``, to which it adds, are what a step is noted for."""
    if isinstance(x, torch.Tensor):
        facts.append(_fact(x))
        return [x]
    if isinstance(x, (tuple, list)):
        facts.append((type(x), len(x)))
        return [t for i in x for t in _flat(i, facts)]
    if isinstance(x, dict):
        facts.append((type(x), tuple(x)))
        return [t for i in x.values() for t in _flat(i, facts)]
    known = x is None or isinstance(x, (bool, int, float, complex, str, bytes))
    facts.append((type(x), x if known else id(x)))
    return []


def _fact(x: Array) -> Hashable:
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad, type(x)


def _ordered(result: Result) -> list[Array]:
    by_leaf = dict(zip(map(id, result.leaves), result.gradients, strict=True))
    return [result.loss.detach(), *(by_leaf[k] for k in sorted(by_leaf))]


def _held(state: Any) -> list[Array]:
    return [state[0], *state[1]]


def _same(a: Array, b: Array) -> bool:
    """To the last bit, but for a card, where sums may be in any order."""
    if a.is_cuda or a.is_sparse:
        return _close(a, b)
    return bool(((a == b) | ((a != a) & (b != b))).all()) if a.shape == b.shape else False


def _close(a: Array, b: Array) -> bool:
    if a.is_sparse or b.is_sparse:
        a, b = a.to_dense(), b.to_dense()
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    unit = b.abs().amax() if b.numel() else 1.0
    return torch.allclose(a, b, rtol=1e-4, atol=float(1e-5 * unit + 1e-6), equal_nan=True)
