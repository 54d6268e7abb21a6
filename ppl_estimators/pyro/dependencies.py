"""Which latent sites each tensor depends on, followed while guide and model run.

A torch function mode sees every operation and notes the sites behind its result, as bits of an integer. Turning a
tensor into a Python value (`if z:`, `.item()`, `.numpy()`) makes everything after depend on it.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyro.distributions.distribution import COERCIONS
from torch.distributions import Distribution, Transform
from torch.overrides import TorchFunctionMode, _get_current_function_mode

#: a set of sites: bit i stands for the site that was drawn i-th
Sites = int

# Questions about a tensor that its data do not answer.
_METADATA = frozenset(
    "__get__ size dim ndimension numel nelement stride element_size is_floating_point is_complex is_contiguous "
    "__len__ type get_device storage_offset data_ptr untyped_storage storage __hash__ __repr__ __str__ "
    "register_hook backward retain_grad broadcast_shapes result_type can_cast is_same_size is_tensor is_signed "
    "is_inference has_names requires_grad_ is_shared is_pinned register_post_accumulate_grad_hook __set__ is_cuda "
    "is_set_to is_conj is_neg _is_view is_nonzero_static __dlpack_device__ __setstate__ __reduce_ex__ "
    "promote_types".split()
)
# They look at the shape, type and device of their last argument, not at its data.
_LIKE = frozenset("zeros_like ones_like empty_like rand_like randn_like new_zeros new_ones new_empty".split())
_AS = frozenset("expand_as view_as reshape_as type_as to".split())
# The shape of their result answers questions about the data.
_SHAPES = ("nonzero", "argwhere", "unique", "_unique", "masked_select", "repeat_interleave", "bincount")
# Python wrappers of torch: what their caller wants the answer for is what counts.
_WRAPPERS = frozenset((__name__, "torch._tensor", "torch.functional", "torch.overrides"))
# Validation inside these packages asks for Python booleans, but only to raise errors.
_CHECKS = ("torch.distributions.", "pyro.distributions.", "pyro.util", "pyro.poutine.scale_messenger")
# Their constructors make everything that a distribution holds from what they are given.
_LIBRARIES = ("torch.distributions.", "pyro.distributions.")
_PLAIN = (bool, int, float, str, torch.Size, type(None))


class Provenance(TorchFunctionMode):
    """Follows latent values through torch operations; use as a context manager around guide and model.

    TorchScript functions and C++ extensions called without torch functions are not seen: their differentiable results
    count as depending on every site drawn so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []
        self.control: Sites = 0  # behind Python control flow
        self._of: dict[int, tuple[weakref.ref[torch.Tensor], Sites]] = {}  # by id, which lives as long as its tensor
        self._written = False
        self._aside = 0
        self._popped = False

    @property
    def drawn(self) -> Sites:
        return (1 << len(self.order)) - 1

    def __enter__(self) -> Provenance:
        COERCIONS.append(self._construct)
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        COERCIONS.remove(self._construct)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        if self._aside:
            return result
        deps = self._behind(args)
        if kwargs:
            deps |= self._behind(kwargs.values())
        if deps:
            deps = self._special(getattr(func, "__name__", ""), args, kwargs, deps)
        if isinstance(result, torch.Tensor):
            if not (args and result is args[0]):
                self._record(result, deps)
        elif isinstance(result, (tuple, list)):
            self._results(func, result, deps)
        elif deps and result is not None:
            self._python_value(func, deps)
        return result

    def _special(self, name: str, args: Any, kwargs: Any, deps: Sites) -> Sites:
        """What the result of an operation depends on, given what its arguments do; notes what else it does."""
        if name in _LIKE:
            return 0
        if name in _AS:
            return self.of(args[0])
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i"):
            self._write(args[0], deps)
        elif name.startswith(_SHAPES) or (name == "where" and len(args) == 1):
            self.control |= deps
        elif name == "__getitem__":
            index = args[1] if isinstance(args[1], (tuple, list)) else (args[1],)
            self.control |= self._behind(i for i in index if isinstance(i, torch.Tensor) and i.dtype == torch.bool)
        if kwargs and isinstance(kwargs.get("out"), torch.Tensor):
            self._write(kwargs["out"], deps)
        return deps

    def _behind(self, args: Iterable[Any]) -> Sites:
        deps = 0
        for a in args:
            if isinstance(a, torch.Tensor):
                deps |= self.of(a)
            elif isinstance(a, (tuple, list)):
                deps |= self._behind(a)
        return deps

    def of(self, x: Any) -> Sites:
        """The sites behind a tensor."""
        entry = self._of.get(id(x))
        if entry is not None and entry[0]() is x:
            deps = entry[1]
        elif x.is_leaf:
            deps = 0
        else:  # a result that no torch function returned while we looked
            deps = self.drawn
            self._record(x, deps)
        if self._written and x._base is not None:
            base = self._of.get(id(x._base))
            if base is not None:
                deps |= base[1]
        return deps

    def _record(self, x: torch.Tensor, deps: Sites) -> None:
        if deps or not x.is_leaf:
            self._of[id(x)] = (weakref.ref(x), deps)

    def _results(self, func: Any, results: Iterable[Any], deps: Sites) -> None:
        for item in results:
            if isinstance(item, torch.Tensor):
                self._record(item, deps)
            elif isinstance(item, (tuple, list)):
                self._results(func, item, deps)
            elif deps:
                self._python_value(func, deps)

    def _write(self, x: torch.Tensor, deps: Sites) -> None:
        """An operation that changed ``x`` in place, and with it what ``x`` is a view of."""
        self._written = True
        self._record(x, deps | self.of(x))
        if x._base is not None:
            self._record(x._base, deps | self.of(x._base))

    def _python_value(self, func: Any, deps: Sites) -> None:
        if getattr(func, "__name__", "") in _METADATA or not deps & ~self.control:
            return
        frame = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__") in _WRAPPERS:
            frame = frame.f_back
        if frame is None or not frame.f_globals.get("__name__", "").startswith(_CHECKS):
            self.control |= deps

    # ---- distributions ----------------------------------------------------------------------------------------------

    def _construct(self, cls: Any, args: Any, kwargs: Any) -> Any:
        """Pyro asks here before it makes a distribution. Those of the libraries are made unobserved, which saves
        following their validation: all that they hold depends on what they were given."""
        if self._aside or COERCIONS[-1] != self._construct or not cls.__module__.startswith(_LIBRARIES):
            return None
        self.leave()
        try:
            made = type.__call__(cls, *args, **kwargs)
            given = tensors(*args, *kwargs.values())
            self._adopt(tensors(made), given, self._behind(given))
        finally:
            self.resume()
        return made

    def _adopt(self, held: list[torch.Tensor], known: list[torch.Tensor], deps: Sites) -> None:
        for x in held:
            if not any(x is k for k in known):
                self._record(x, deps)

    # ---- what the adapter tells and asks ----------------------------------------------------------------------------

    def begin(self, *arguments: Any) -> None:
        """Tensors that exist before the first draw depend on nothing."""
        for x in tensors(*arguments):
            self._record(x, 0)

    def leave(self) -> None:
        """Until `resume`, operations are the adapter's own."""
        self._aside += 1
        if self._aside == 1:
            self._popped = _get_current_function_mode() is self  # else a mode of the user's is above
            if self._popped:
                super().__exit__(None, None, None)

    def resume(self) -> None:
        self._aside -= 1
        if self._popped and not self._aside:
            super().__enter__()

    def behind(self, held: Iterable[Any]) -> Sites:
        """The sites behind tensors, and behind the control flow so far."""
        return self._behind(held) | self.control

    def drawn_at(self, name: str, fn: Any, value: torch.Tensor, held: list[torch.Tensor], deps: Sites) -> None:
        """``value`` was drawn at site ``name`` from ``fn``, which held tensors that depend on ``deps``."""
        here = deps | 1 << len(self.order)
        self.order.append(name)
        now = tensors(fn)
        if len(now) > len(held):  # computed lazily: from its parameters, or (in a transform's cache) from the value
            self._adopt(now, held, here)
            self._adopt(tensors(fn, through=Distribution), held, deps)
        self._record(value, here)

    def names(self, deps: Sites) -> frozenset[str]:
        return frozenset(name for i, name in enumerate(self.order) if deps >> i & 1)


def tensors(*things: Any, through: Any = (Distribution, Transform)) -> list[torch.Tensor]:
    """All tensors that distributions, transforms, modules, containers, partial functions and closures hold."""
    found: list[torch.Tensor] = []
    _gather(things, through, found, set())
    return found


def _gather(things: Iterable[Any], through: Any, found: list[torch.Tensor], seen: set[int]) -> None:
    for thing in things:
        if isinstance(thing, torch.Tensor):
            found.append(thing)
        elif isinstance(thing, _PLAIN):
            continue
        elif isinstance(thing, through):
            if id(thing) in seen:  # a transform and its inverse hold each other
                continue
            seen.add(id(thing))
            _gather(vars(thing).values(), through, found, seen)
        elif isinstance(thing, (tuple, list)):
            _gather(thing, through, found, seen)
        elif isinstance(thing, Mapping):
            _gather(thing.values(), through, found, seen)
        elif isinstance(thing, torch.nn.Module):
            for module in thing.modules():
                _gather((module._parameters, module._buffers), through, found, seen)
                found += [x for x in vars(module).values() if isinstance(x, torch.Tensor)]
        elif isinstance(thing, functools.partial):
            _gather((thing.args, thing.keywords), through, found, seen)
        elif cells := getattr(thing, "__closure__", None):
            _gather((c.cell_contents for c in cells if c.cell_contents is not thing), through, found, seen)


class StopParameters(TorchFunctionMode):
    """Every leaf that requires a gradient enters operations as a constant; other tensors keep their history."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _METADATA:  # a question about the parameter itself, such as requires_grad
            answer = func(*args, **kwargs)
            if not (isinstance(answer, torch.Tensor) and answer.grad_fn is not None):
                return answer
        return func(*map(_constant, args), **{k: _constant(v) for k, v in kwargs.items()})


def _constant(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return x.detach() if x.requires_grad and x.is_leaf else x
    if type(x) in (tuple, list):
        return type(x)(map(_constant, x))
    return x
