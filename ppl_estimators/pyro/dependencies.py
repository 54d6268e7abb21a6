"""Which latent sites each tensor depends on, followed while guide and model run.

A torch function mode sees the operations of the running thread and notes the sites behind each result, as bits of an
integer. What it cannot follow is assumed, never denied:

- a tensor that exists when the first site is drawn depends on nothing; one that turns up later and that no observed
  operation returned (TorchScript, `vmap`, threads, `nn.Parameter(z)`, pickle, C++) depends on all sites drawn so far;
- a tensor changed by an operation that was not seen (its version has moved) depends on all sites drawn so far; one
  changed by an operation that was seen, by any alias of its memory, also on what was written;
- turning a tensor into a Python value (`if z:`, `.item()`, `.numpy()`, `.data_ptr()`) makes everything after depend on
  it.

Not seen: Python numbers that another thread reads out of a tensor and hands back. A program that starts threads is
verified anew (`Threads`), as one that uses those there are is at its first step.
"""

from __future__ import annotations

import functools
import sys
import threading
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions.distribution import COERCIONS
from pyro.poutine.trace_struct import Trace
from torch.autograd.graph import get_gradient_edge
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import Constraint
from torch.overrides import TorchFunctionMode, _get_current_function_mode

#: a set of sites: bit i stands for the site that was drawn i-th
Sites = int

# Questions about a tensor that its data do not answer, or only in words.
_METADATA = frozenset(
    "__get__ size dim ndimension numel nelement stride element_size is_floating_point is_complex is_contiguous "
    "__len__ type get_device storage_offset __hash__ __repr__ __str__ "
    "register_hook backward retain_grad broadcast_shapes result_type can_cast is_same_size is_tensor is_signed "
    "is_inference has_names requires_grad_ is_shared is_pinned register_post_accumulate_grad_hook is_cuda "
    "is_set_to is_conj is_neg _is_view is_nonzero_static __dlpack_device__ promote_types".split()
)
# They look at the shape, type and device of their first argument, not at its data.
_LIKE = frozenset(
    "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new new_zeros new_ones new_empty "
    "new_full new_tensor".split()
)
# Likewise of all but the first.
_AS = frozenset("expand_as view_as reshape_as type_as to".split())
# The shape of their result answers questions about the data.
_SHAPES = ("nonzero", "argwhere", "unique", "_unique", "masked_select", "repeat_interleave", "bincount")
# Statements that change their first argument and return nothing.
_STATEMENTS = frozenset(("__setitem__", "__setstate__"))
_TENSOR: Any = torch.Tensor
_SET_DATA, _GET_GRAD = _TENSOR.data.__set__, _TENSOR.grad.__get__
_ACCESSOR = types.MethodWrapperType
# With `training`, they change the buffers among their arguments, and no version moves.
_RUNNING = frozenset(("batch_norm", "instance_norm"))
# Python wrappers of torch: what their caller wants the answer for is what counts.
_WRAPPERS = frozenset((__name__, "torch._tensor", "torch.functional", "torch.overrides"))
# Validation inside these packages asks for Python booleans, but only to raise errors.
CHECKS = ("torch.distributions.", "pyro.distributions.", "pyro.util", "pyro.poutine.scale_messenger")
# Their constructors make everything that a distribution holds from what they are given.
_LIBRARIES = ("torch.distributions.", "pyro.distributions.")
# What their objects compute, they compute from what they hold.
_KNOWN = ("torch.", "pyro.")
_ATOMS = frozenset(
    (bool, int, float, complex, str, bytes, slice, type(None), type(...), torch.Size, torch.dtype, torch.device, Trace)
)


@functools.lru_cache(maxsize=512)
def _peculiar(func: Any) -> str:
    """The name of an operation whose result does not simply depend on its arguments."""
    name: str = getattr(func, "__name__", "")
    known = name in _LIKE or name in _AS or name in _RUNNING or name.startswith(_SHAPES)
    return name if known or name in ("where", "__getitem__") else ""


class _Known(weakref.ref[torch.Tensor]):
    """A tensor, the sites behind it, and its version when that was found. One object for each tensor of a run: what the
    garbage collector has to look through."""

    __slots__ = ("deps", "version")
    deps: Sites
    version: int


class _Kept:
    """The same of a tensor from before the run, or a parameter: no weak reference, with which a tensor is refused by
    `torch.utils.swap_tensors`. One that was swapped is another."""

    __slots__ = ("content", "deps", "version", "x")
    deps: Sites
    version: int

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.content = x, x._cdata

    def __call__(self) -> torch.Tensor | None:
        return self.x if self.x._cdata == self.content else None


class _Written(NamedTuple):
    """Memory that observed operations wrote to. Holding it keeps its address from being used again."""

    memory: torch.UntypedStorage
    deps: Sites
    version: int  # of the tensor, after the last of them


class Provenance(TorchFunctionMode):
    """Follows latent values through torch operations; use as a context manager around guide and model."""

    def __init__(self, holdings: Holdings | None = None) -> None:
        super().__init__()
        self._holdings = Holdings() if holdings is None else holdings
        self.order: list[str] = []
        self._names: dict[Sites, frozenset[str]] = {}
        self.control: Sites = 0  # behind Python control flow
        self._of: dict[int, _Known | _Kept] = {}  # by id, which lives as long as its tensor
        self._written: dict[int, _Written] = {}
        self._marked = False  # something that depends on a site was written
        self._program: tuple[Any, ...] = ()
        self._arguments: tuple[Any, ...] = ()
        self.unknown = False  # did a tensor turn up whose origin is not known?
        self._left: dict[int, _Known | _Kept] = {}  # the same, of the guide
        self._handed = False  # is the guide over?
        self.carried: Sites = 0  # behind what the model reads of the guide's otherwise than as a site's value
        self.stored: set[str] = set()  # names in the parameter store when the first site was drawn
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
        self._of, self._left, self._written = {}, {}, {}  # of tensors nothing is asked any more

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._aside:
            return func(*args, **kwargs) if kwargs else func(*args)
        if type(func) is _ACCESSOR and func.__name__ == "__get__":
            return self._accessed(func, args)
        deps = 0  # before the arguments change
        for a in args:
            kind = type(a)
            if kind is _TENSOR:
                deps |= self.of(a)
            elif kind not in _ATOMS:
                deps |= self._behind((a,))
        if kwargs:
            deps |= self._behind(kwargs.values())
            result = func(*args, **kwargs)
            if "out" in kwargs:
                self._write(kwargs["out"], deps)
        else:
            result = func(*args)
        if deps and (name := _peculiar(func)):
            deps = self._special(name, args, kwargs or {}, deps)
        if type(result) is _TENSOR or isinstance(result, torch.Tensor):
            if not (args and result is args[0]):
                self._record(result, deps)
            else:
                self._returned(result, deps)
        elif result is None:
            name = getattr(func, "__name__", "")
            if func == _SET_DATA:  # other memory, which nobody wrote to
                self._record(args[0], self.of(args[1]))
            elif name in _STATEMENTS or (name.endswith("_") and not name.endswith("__")):
                self._write(args[0], deps)
        elif isinstance(result, (tuple, list)):
            self._results(func, result, deps)
        elif deps:
            self._python_value(func, deps)
        return result

    def _accessed(self, func: Any, args: Any) -> Any:
        """An attribute of a tensor."""
        result = func(*args)
        deps = self.of(args[0])
        if isinstance(result, torch.Tensor):  # else a question such as `requires_grad`
            if func == _GET_GRAD:
                deps |= self.of(result)  # whatever was differentiated
            self._record(result, deps)
        return result

    def _special(self, name: str, args: Any, kwargs: Mapping[str, Any], deps: Sites) -> Sites:
        """What the result of an operation depends on, given what its arguments do; notes what else it does."""
        if name in _LIKE:
            return self._behind(args[1:]) | self._behind(kwargs.values())
        if name in _AS:
            return self.of(args[0])
        if name.startswith(_SHAPES) or (name == "where" and len(args) == 1):
            self.control |= deps
        elif name == "__getitem__":
            index = args[1] if isinstance(args[1], (tuple, list)) else (args[1],)
            self.control |= self._behind(i for i in index if isinstance(i, torch.Tensor) and i.dtype == torch.bool)
        elif name in _RUNNING and kwargs.get("training", kwargs.get("use_input_stats", (*args, *[False] * 6)[5])):
            others = (*args[1:], *(v for k, v in kwargs.items() if k != "input"))
            self._write([x for x in others if isinstance(x, torch.Tensor) and not x.requires_grad], deps)
        return deps

    def _behind(self, args: Iterable[Any]) -> Sites:
        deps = 0
        for a in args:
            kind = type(a)
            if kind is torch.Tensor or (kind not in _ATOMS and isinstance(a, torch.Tensor)):
                deps |= self.of(a)
            elif kind is tuple or kind is list or isinstance(a, (tuple, list)):
                deps |= self._behind(a)
        return deps

    # ---- one tensor -------------------------------------------------------------------------------------------------

    def of(self, x: torch.Tensor) -> Sites:
        """The sites behind a tensor."""
        entry = self._of.get(id(x))
        try:
            version = x._version
        except RuntimeError:  # inference tensors count no versions
            version = -1
        known = entry is not None and entry() is x
        if not known:
            entry = self._left.get(id(x))
        if entry is None or entry() is not x:
            deps = self.drawn  # nothing, before the first draw
            self.unknown |= deps != 0
            self._record(x, deps, _Kept if isinstance(x, torch.nn.Parameter) else _Known)
        else:
            deps = entry.deps
            if entry.version != version:
                deps |= self._changed(x)
            if entry.version != version or not known:
                self._record(x, deps, type(entry))
        if self._marked:
            written = self._written.get(_memory(x)[1])
            if written is not None:
                deps |= written.deps
        if not known and self._handed:
            self.carried |= deps
        return deps

    def _record(self, x: torch.Tensor, deps: Sites, kind: type[_Known | _Kept] = _Known) -> None:
        entry = kind(x)
        entry.deps = deps
        try:
            entry.version = x._version
        except RuntimeError:
            entry.version = -1
        self._of[id(x)] = entry

    def _changed(self, x: torch.Tensor) -> Sites:
        """What was written into a tensor whose version moved: known if the last to move it was seen."""
        written = self._written.get(_memory(x)[1])
        if written is not None and written.version == x._version:
            return written.deps
        self.carried |= self.drawn
        return self.drawn

    def _returned(self, x: torch.Tensor, deps: Sites) -> None:
        """An observed operation returned its first argument: changed, if its version moved."""
        before = self._of[id(x)].version
        if before < 0 or before != x._version:
            self._write(x, deps)

    def _write(self, x: Any, deps: Sites) -> None:
        """An observed operation changed ``x`` in place, and with it all that shares its memory."""
        if isinstance(x, (tuple, list)):
            for item in x:
                self._write(item, deps)
        if not isinstance(x, torch.Tensor):
            return
        entry = self._of.get(id(x))
        if entry is not None and entry() is x:
            deps |= entry.deps
        self._record(x, deps)
        memory, key = _memory(x)
        if memory is None:  # sparse, or inside vmap: who shares its memory cannot be known
            self.control |= deps
            return
        before = self._written[key].deps if key in self._written else 0
        self._written[key] = _Written(memory, before | deps, self._of[id(x)].version)
        self._marked |= deps != 0

    def _results(self, func: Any, results: Iterable[Any], deps: Sites) -> None:
        for item in results:
            if isinstance(item, torch.Tensor):
                self._record(item, deps)
            elif isinstance(item, (tuple, list)):
                self._results(func, item, deps)
            elif deps:
                self._python_value(func, deps)

    def _python_value(self, func: Any, deps: Sites) -> None:
        if getattr(func, "__name__", "") in _METADATA or not deps & ~self.control:
            return
        frame: types.FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__") in _WRAPPERS:
            frame = frame.f_back
        if frame is None or not frame.f_globals.get("__name__", "").startswith(CHECKS):
            self.control |= deps

    # ---- distributions ----------------------------------------------------------------------------------------------

    def _construct(self, cls: Any, args: Any, kwargs: Any) -> Any:
        """Pyro asks here before it makes a distribution. Those of the libraries are made unobserved, which saves
        following their validation: all that they hold depends on what they were given."""
        if self._aside or COERCIONS[-1] != self._construct or not _of_a_library(cls):
            return None
        self.leave()
        try:
            deps, clear = self.inside((*args, *kwargs.values()))
            made = type.__call__(cls, *args, **kwargs)
            self._adopt(made.__dict__.values(), deps if clear else self.drawn)
        finally:
            self.resume()
        return made

    def inside(self, things: Iterable[Any]) -> tuple[Sites, bool]:
        """The sites behind all that things hold; is this all that they can compute from?"""
        deps, objects = 0, []
        for thing in things:
            kind = type(thing)
            if kind is _TENSOR:
                deps |= self.of(thing)
            elif kind not in _ATOMS:
                objects.append(thing)
        if not objects:
            return deps, True
        held, clear = holds(*objects)
        return deps | self._behind(held), clear

    def _adopt(self, things: Iterable[Any], deps: Sites, through: Any = (Distribution, Transform)) -> list[Any]:
        """What things hold that was not there before depends on ``deps``. Returns those that are no tensors."""
        objects: list[Any] = []
        for thing in things:
            kind = type(thing)
            if kind is _TENSOR or kind is torch.nn.Parameter:
                entry = self._of.get(id(thing))
                if entry is None or entry() is not thing:
                    self._adopted(thing, deps)
            elif kind not in _ATOMS:
                objects.append(thing)
        if objects:
            found: list[torch.Tensor] = []
            _gather(objects, through, found, set())
            for x in found:
                entry = self._of.get(id(x))
                if entry is None or entry() is not x:
                    self._adopted(x, deps)
        return objects

    def _adopted(self, x: torch.Tensor, deps: Sites) -> None:
        left = self._left.get(id(x))
        if left is not None and left() is x:
            self.of(x)
        else:
            self._record(x, deps)

    # ---- what the adapter tells and asks ----------------------------------------------------------------------------

    def begin(self, program: tuple[Any, ...], arguments: tuple[Any, ...]) -> None:
        """Model and guide, and what they are called with: these lead to the tensors that exist before the run."""
        self._program, self._arguments = program, arguments

    def hand_over(self) -> None:
        """The guide is over, the model is next."""
        self._left, self._of, self._handed = self._of, {}, True

    def handed(self, value: torch.Tensor) -> torch.Tensor:
        """The value of a site of the guide, for the model: as a tensor of its own, by which it is told from one that
        the guide has put away; unless that would have another history."""
        self.leave()
        entry = self._left.get(id(value))
        if not value.requires_grad:
            value = value.detach()
        self._record(value, self.drawn if entry is None else entry.deps)
        self.resume()
        return value

    def before_draw(self) -> None:
        """A site is about to be drawn. Whatever exists before the first depends on nothing."""
        if not self.order:
            stored = dict(pyro.get_param_store().named_parameters())
            self.stored = set(stored)
            for x in (*stored.values(), *reachable(*self._arguments), *self._holdings.of(*self._program)):
                self._record(x, 0, _Kept)

    def stale(self) -> bool:
        """Did a tensor turn up that may have existed before, and nobody looked?"""
        return self.unknown and self._holdings.unsettled()

    def parameter(self, name: str, value: torch.Tensor) -> None:
        """A parameter that the store did not hold starts where it starts, whatever was drawn before."""
        unconstrained = getattr(value, "unconstrained", None)
        if unconstrained is not None:  # else a module's own
            self._record(value, 0)
            self._record(unconstrained(), 0)
        self.stored.add(name)

    def leave(self) -> None:
        """Until `resume`, operations are the adapter's own."""
        self._aside += 1
        if self._aside == 1 and _get_current_function_mode() is self:  # else a mode of the user's is above
            self._popped = True
            TorchFunctionMode.__exit__(self, None, None, None)

    def resume(self) -> None:
        self._aside -= 1
        if self._popped and not self._aside:
            self._popped = False
            TorchFunctionMode.__enter__(self)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Between `leave` and `resume`, operations of the program's own after all."""
        aside, popped, self._aside = self._aside, self._popped, 0
        if popped:
            super().__enter__()
        try:
            yield
        finally:
            if popped:
                super().__exit__(None, None, None)
            self._aside, self._popped = aside, popped

    def adopt(self, x: torch.Tensor) -> None:
        """Indices of a minibatch: drawn by Pyro, whichever run did it."""
        self.leave()
        self._record(x, 0)
        self.resume()

    def behind(self, held: Iterable[Any]) -> Sites:
        """The sites behind tensors, and behind the control flow so far."""
        return self._behind(held) | self.control

    def distribution(self, fn: Any) -> tuple[Sites, bool]:
        """The sites behind a distribution, and behind the control flow so far; is this all that it computes from?"""
        deps, clear = self.inside(_parts(fn))
        return deps | self.control, clear

    def drawn_at(self, name: str, fn: Any, value: torch.Tensor, deps: Sites) -> None:
        """``value`` was drawn at site ``name`` from ``fn``, which held tensors that depend on ``deps``."""
        here = deps | 1 << len(self.order)
        self.order.append(name)
        # now with what it computed lazily: from its parameters,
        objects = self._adopt(_parts(fn), deps, (Distribution,))
        self._adopt(objects, here)  # or, in a transform's cache, from the value
        self._record(value, here)

    def names(self, deps: Sites) -> frozenset[str]:
        """The sites of a set: one object for all that ask for the same, of which long chains have many."""
        if deps not in self._names:
            self._names[deps] = frozenset(name for i, name in enumerate(self.order) if deps >> i & 1)
        return self._names[deps]


def _parts(fn: Any) -> Iterable[Any]:
    """What a distribution is looked into by: attributes, if it is one of the libraries' and these are all."""
    return fn.__dict__.values() if _of_a_library(type(fn)) else (fn,)


def _memory(x: torch.Tensor) -> tuple[torch.UntypedStorage | None, int]:
    """The memory of a tensor, and its key; it has none if it is sparse or a batch inside `vmap`."""
    try:
        memory = x.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None, 0
    return memory, memory._cdata


# ---- what objects hold -------------------------------------------------------------------------------------------


def tensors(*things: Any, through: Any = (Distribution, Transform)) -> list[torch.Tensor]:
    """All tensors that distributions, transforms, modules, containers, partial functions and closures hold."""
    found: list[torch.Tensor] = []
    _gather(things, through, found, set())
    return found


def holds(*things: Any) -> tuple[list[torch.Tensor], bool]:
    """The same, and whether these are all that the things can compute from: not so for classes of the user's, whose
    methods may read anything."""
    found: list[torch.Tensor] = []
    clear = _gather(things, (Distribution, Transform), found, set())
    return found, clear


def _gather(things: Iterable[Any], through: Any, found: list[torch.Tensor], seen: set[int]) -> bool:
    clear = True
    for thing in things:
        kind = type(thing)
        if kind is torch.Tensor:
            found.append(thing)
            continue
        if kind in _ATOMS:
            continue
        sort = _sort(kind)
        if sort is torch.Tensor:
            found.append(thing)
        elif sort is tuple:
            clear &= _gather(thing, through, found, seen)
        elif sort in through:
            if id(thing) in seen:  # a transform and its inverse hold each other
                continue
            seen.add(id(thing))
            clear &= _gather(thing.__dict__.values(), through, found, seen) and _of_a_library(kind)
        elif sort is Mapping:
            clear &= _gather(thing.values(), through, found, seen)
        elif sort is torch.nn.Module or (sort is Transform and isinstance(thing, torch.nn.Module)):
            for module in thing.modules():
                clear &= type(module).__module__.startswith(_KNOWN)
                _gather((module._parameters, module._buffers), through, found, seen)
                found += [x for x in vars(module).values() if isinstance(x, torch.Tensor)]
        elif sort is functools.partial:
            clear &= _gather((thing.func, thing.args, thing.keywords), through, found, seen)
        elif sort in _NOT_ASKED:
            continue
        elif not _module(thing).startswith(_KNOWN):
            clear = False
        elif id(thing) not in seen:
            seen.add(id(thing))
            clear &= _gather(getattr(thing, "__dict__", {}).values(), through, found, seen)
    return clear


_NOT_ASKED = (Distribution, Transform, Constraint)


def _sorted(kind: type) -> Any:
    """The first of these that a class is one of, and of the two sequences the tuple."""
    sorts = (torch.Tensor, Distribution, Transform, tuple, list, Mapping, torch.nn.Module, functools.partial)
    sort = next((s for s in (*sorts, Constraint) if issubclass(kind, s)), None)
    return tuple if sort is list else sort


_sort: Callable[[type], Any] = functools.lru_cache(maxsize=1024)(_sorted)
_of_a_library: Callable[[type], bool] = functools.lru_cache(maxsize=1024)(
    lambda kind: kind.__module__.startswith(_LIBRARIES)
)


def _module(thing: Any) -> str:
    """Where a function or a class, or the class of an object, was written."""
    named = isinstance(thing, (types.FunctionType, types.BuiltinFunctionType, type))
    return getattr(thing if named else type(thing), "__module__", None) or ""


# ---- what a program holds from before ------------------------------------------------------------------------------


def _reference(x: torch.Tensor) -> Callable[[], torch.Tensor | None]:
    return _Kept(x) if isinstance(x, torch.nn.Parameter) else weakref.ref(x)


class Threads:
    """Were threads started while a program ran? What a thread reads out of a tensor as numbers nobody follows."""

    started = False

    def __enter__(self) -> Threads:
        self.started, self._profile = False, threading.getprofile()
        threading.setprofile(self._note)
        return self

    def __exit__(self, *exc: Any) -> None:
        threading.setprofile(self._profile)

    def _note(self, frame: types.FrameType, event: Any, arg: Any) -> None:
        """In the new thread, at the first function that it calls."""
        self.started = True
        sys.setprofile(self._profile)
        if self._profile is not None:
            self._profile(frame, event, arg)


class Holdings:
    """The tensors that a program holds from before a run. To find them takes a walk through all that it can lead to, at
    each run: until two walks have found the same, if no tensor turned up that they had not found. Parameters are held,
    others only referred to: see `_Kept`."""

    def __init__(self) -> None:
        self._known: dict[int, Callable[[], torch.Tensor | None]] = {}
        self._settled = self._restless = False

    def of(self, *program: Any) -> list[torch.Tensor]:
        """Tensors of which it is known that they exist."""
        if self._settled:
            return [x for ref in self._known.values() if (x := ref()) is not None]
        found = reachable(*program)
        if not self._restless:
            now = {id(x): _reference(x) for x in found}
            self._settled = now.keys() == self._known.keys() and all(x() is self._known[i]() for i, x in now.items())
            self._known = now
        return found

    def unsettled(self) -> bool:
        """A tensor turned up that is not known: from now on each run is preceded by a walk. Was this one not?"""
        missed, self._settled, self._restless, self._known = self._settled, False, True, {}
        return missed


#: autograd's names of operations whose derivative is zero everywhere
_FLAT = tuple(f"{name}Backward" for name in ("Round", "Floor", "Ceil", "Trunc", "Sign", "Sgn", "Heaviside"))


def led(heights: Mapping[Any, torch.Tensor], values: Mapping[str, torch.Tensor]) -> dict[Any, frozenset[str]]:
    """To which of some values a derivative of each height leads, otherwise than through another of the values."""
    ends = {get_gradient_edge(v)[:2]: name for name, v in values.items() if v.requires_grad}
    known: dict[Any, frozenset[str]] = {}  # behind each node of the graph

    def behind(edge: Any) -> frozenset[str]:
        return frozenset([ends[edge]]) if edge in ends else known[edge[0]]

    found = {}
    for key, height in heights.items():
        found[key] = frozenset[str]()
        if not height.requires_grad:
            continue
        root: Any = get_gradient_edge(height)[:2]
        stack: list[Any] = [] if root in ends else [root[0]]
        while stack:
            node = stack[-1]
            edges = [] if node.name().startswith(_FLAT) else [e for e in node.next_functions if e[0] is not None]
            missing: list[Any] = [e[0] for e in edges if e not in ends and e[0] not in known]
            if missing:
                stack += missing
            else:
                known[stack.pop()] = frozenset().union(*map(behind, edges))
        found[key] = behind(root)
    return found


_OBJECTS = 2000  # looked into at each run, and tensors of one container; what lies beyond counts as unknown
_ELEMENTS = 200  # of a container of anything else than tensors
_OURS = __name__.partition(".")[0]
_ELSEWHERE = frozenset({_OURS, "torch", "pyro", "numpy", "pandas", "scipy", *sys.stdlib_module_names})
# objects of these may hold what is the user's
_WALKED = (f"{_OURS}.", "torch.", "pyro.", "types", "argparse", "functools", "collections")
_MODULE = {*vars(torch.nn.Module()), "_pyro_params"} - {"_parameters", "_buffers", "_modules"}


def reachable(*roots: Any, kinds: Any = torch.Tensor) -> list[Any]:
    """Tensors (or things of other ``kinds``) that functions, methods, modules and plain objects of the user's can lead
    to, through closures, defaults, globals that code names, attributes and containers."""
    return [thing for thing in walked(*roots) if isinstance(thing, kinds)]


def walked(*roots: Any) -> list[Any]:
    """All that they lead to; a tensor as often as they do."""
    found: list[Any] = []
    seen: set[int] = set()
    queue = list(roots)
    for thing in queue:  # which grows
        kind: Any = type(thing)
        if kind in _ATOMS:
            continue
        if isinstance(thing, torch.Tensor):
            found.append(thing)
        elif id(thing) not in seen:
            seen.add(id(thing))
            if len(seen) > _OBJECTS:
                break
            found.append(thing)
            queue += _way_into(kind)(thing)
    return found


@functools.lru_cache(maxsize=1024)
def _way_into(kind: Any) -> Callable[[Any], Iterable[Any]]:
    """How objects of a class are looked into."""
    for known, way in _WAYS.items():
        if issubclass(kind, known):
            return way
    where = kind.__module__
    if issubclass(kind, torch.nn.Module) and where.startswith("torch.nn."):
        return lambda m: (*m._parameters.values(), *m._buffers.values(), *m._modules.values())
    if where.partition(".")[0] in _ELSEWHERE and not where.startswith(_WALKED):
        return lambda thing: ()
    slots = [s for c in kind.__mro__ for s in vars(c).get("__slots__", ()) if s not in ("__dict__", "__weakref__")]
    return functools.partial(_attributes, tuple(slots))


def _attributes(slots: tuple[str, ...], thing: Any) -> list[Any]:
    held = getattr(thing, "__dict__", {})
    parts = [type(thing), *(getattr(thing, s, None) for s in slots)]
    return parts + [v for k, v in held.items() if k not in _MODULE]


def _elements(things: Any) -> Iterable[Any]:
    few = len(things) <= _ELEMENTS or (len(things) <= _OBJECTS and isinstance(next(iter(things)), torch.Tensor))
    return things if few else ()


def _parts_of_class(kind: type) -> Iterable[Any]:
    return () if kind.__module__.partition(".")[0] in _ELSEWHERE else (*vars(kind).values(), *kind.__bases__)


def _parts_of_function(function: types.FunctionType) -> list[Any]:
    parts = [function.__defaults__, function.__kwdefaults__, *vars(function).values()]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # empty
            parts.append(cell.cell_contents)
    held = function.__globals__
    for value in [held[n] for n in globals_of(function)]:
        if type(value) is not types.ModuleType:
            parts.append(value)
        elif value.__name__.partition(".")[0] not in _ELSEWHERE:
            parts += [vars(value)[n] for n in _names(function.__code__) if n in vars(value)]
    return parts


def globals_of(function: types.FunctionType) -> list[str]:
    """The globals that a function of the user's names."""
    if _module(function).partition(".")[0] in _ELSEWHERE:
        return []
    return [n for n in _names(function.__code__) if n in function.__globals__]


def own_attributes(thing: Any) -> dict[str, Any] | None:
    """Those of an object or a class of the user's, without what every module or class has."""
    kind = thing if isinstance(thing, type) else type(thing)
    if kind.__module__.partition(".")[0] in _ELSEWHERE:
        return None
    return {k: v for k, v in getattr(thing, "__dict__", {}).items() if k not in _MODULE and not k.startswith("__")}


_WAYS: dict[type, Callable[[Any], Iterable[Any]]] = {
    types.FunctionType: _parts_of_function,
    types.MethodType: lambda method: (method.__self__, method.__func__),
    dict: lambda mapping: _elements(dict.values(mapping)),  # another Mapping may load or compute what it returns
    **dict.fromkeys((tuple, list, set, frozenset, deque), _elements),
    functools.partial: lambda partial: (partial.func, partial.args, partial.keywords),
    staticmethod: lambda method: (method.__func__,),
    classmethod: lambda method: (method.__func__,),
    property: lambda attribute: (attribute.fget,),
    types.ModuleType: lambda module: (),
    type: _parts_of_class,
}


def _names(code: types.CodeType) -> tuple[str, ...]:
    """Names that code looks up outside of itself, that of the functions inside it included."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return code.co_names + tuple(n for names in inner for n in names) if inner else code.co_names


def as_written() -> AbstractContextManager[Any]:
    """Functions of `torch.compile` run uncompiled: what they do can be followed, nothing of ours is compiled with them,
    and all runs of a program draw the same numbers inside them."""
    in_use = "torch._dynamo" in sys.modules  # which takes a second to load
    return torch.compiler.set_stance("force_eager") if in_use else nullcontext()


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
