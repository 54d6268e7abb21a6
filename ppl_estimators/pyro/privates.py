"""Names of torch and Pyro that no documentation promises and that this adapter relies on: what each is for, and where
it is. A test looks each up, so that a release which drops one is told by its name; another finds what is missing here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch


def _enumerated() -> tuple[Any, Any]:
    """Pyro's handler, and the ``infer`` of a site that it enumerated."""
    handler = pyro.poutine.enum_messenger.EnumMessenger(-1)

    def program() -> None:
        pyro.sample("z", pyro.distributions.Bernoulli(0.5), infer={"enumerate": "parallel"})

    return handler, pyro.poutine.trace(handler(program)).get_trace().nodes["z"]["infer"]


PRIVATES: dict[str, tuple[str, Callable[[], Any]]] = {
    # ---- torch: following values --------------------------------------------------------------------------------
    "_get_current_function_mode": (
        "is the mode that follows values the uppermost one?",
        lambda: torch.overrides._get_current_function_mode,
    ),
    "_version": ("has a tensor been written to since?", lambda: torch.zeros(())._version),
    "_cdata": ("the identity of a storage", lambda: torch.zeros(()).untyped_storage()._cdata),
    "_unique": ("what torch.unique calls", lambda: torch._unique),
    "_is_view": ("a question that needs no data", lambda: torch.zeros(())._is_view),
    "_python_dispatch": (
        "`TorchDispatchMode`, which sees every random operation of a run",
        lambda: torch.utils._python_dispatch.TorchDispatchMode,
    ),
    "_schema": ("does an operation write in place?", lambda: torch.ops.aten.add_.Tensor._schema.is_mutable),
    "_pytree": ("maps over arguments of any structure", lambda: torch.utils._pytree.tree_map),
    # ---- torch: compiled steps ------------------------------------------------------------------------------------
    "_foreach_copy_": ("copies many tensors by one launch", lambda: torch._foreach_copy_),
    "_backward_hooks": ("a parameter's hooks, which run once", lambda: torch.zeros(())._backward_hooks),
    "_post_accumulate_grad_hooks": ("likewise", lambda: torch.zeros(())._post_accumulate_grad_hooks),
    "_C": (
        "torch's own functions and methods by an operation's name",
        lambda: (torch._C._VariableFunctions.add, torch._C.TensorBase.expand),
    ),
    "_VariableFunctions": ("holds them", lambda: torch._C._VariableFunctions),
    "_op": ("calls any other operation", lambda: torch.ops.aten.slice.Tensor._op),
    "_validate_sample": (
        "checks values, and reads nothing else out of them",
        lambda: torch.distributions.Distribution._validate_sample,
    ),
    "_validate_args": (
        "do distributions check their parameters?",
        lambda: torch.distributions.Distribution._validate_args,
    ),
    # ---- torch: modules -----------------------------------------------------------------------------------------
    "_buffers": ("what a module counts, restored before a re-run", lambda: torch.nn.Module()._buffers),
    "_parameters": ("a module's own parameters", lambda: torch.nn.Module()._parameters),
    "_modules": ("a module's parts", lambda: torch.nn.Module()._modules),
    "_forward_pre_hooks": ("what acts on a module's results", lambda: torch.nn.Module()._forward_pre_hooks),
    "_forward_hooks": ("likewise", lambda: torch.nn.Module()._forward_hooks),
    "_backward_pre_hooks": ("likewise", lambda: torch.nn.Module()._backward_pre_hooks),
    "_global_forward_hooks": ("of all modules", lambda: torch.nn.modules.module._global_forward_hooks),
    "_global_forward_pre_hooks": ("likewise", lambda: torch.nn.modules.module._global_forward_pre_hooks),
    "_get_current_function_mode_stack": (
        "which modes are at work around a step?",
        lambda: torch.overrides._get_current_function_mode_stack,
    ),
    "_device": ("`DeviceContext`, the mode of a default device", lambda: torch.utils._device.DeviceContext),
    # ---- torch: distributions -----------------------------------------------------------------------------------
    "_standard_gamma": ("the gamma draw that Gamma.rsample differentiates", lambda: torch._standard_gamma),
    "_cached_x_y": (
        "what a transform remembers, forgotten in a copy",
        lambda: torch.distributions.ExpTransform(cache_size=1)._cached_x_y,
    ),
    "_inv": ("a transform's inverse, likewise", lambda: torch.distributions.ExpTransform()._inv),
    # ---- Pyro ---------------------------------------------------------------------------------------------------
    "_intervener_id": (
        "marks a site that `do` has put another value in the place of",
        lambda: pyro.poutine.do_messenger.DoMessenger({})._intervener_id,
    ),
    "_PYRO_STACK": ("which handlers are at work", lambda: pyro.poutine.runtime._PYRO_STACK),
    "COERCIONS": (
        "is asked whenever a distribution is made: values are followed into it",
        lambda: pyro.distributions.distribution.COERCIONS.append,
    ),
    "_mask": ("of a masked distribution", lambda: pyro.distributions.Normal(0.0, 1.0).mask(torch.tensor(True))._mask),
    "_params": ("the store's unconstrained tensors by name", lambda: pyro.get_param_store()._params),
    "_constraints": ("the store's constraints by name", lambda: pyro.get_param_store()._constraints),
    "_pyro_params": ("a PyroModule's own names", lambda: pyro.nn.PyroModule()._pyro_params),
    "_param_dims": ("the dimensions of enumerated values that a site may see", lambda: _enumerated()[0]._param_dims),
    "_ENUM_ALLOCATOR": (
        "says which dimension enumerated values take next",
        lambda: pyro.poutine.runtime._ENUM_ALLOCATOR.allocate,
    ),
    "_enumerate_dim": ("in a site's infer: where its values lie", lambda: _enumerated()[1]["_enumerate_dim"]),
    "_dim_to_id": ("in a site's infer: whose values lie where", lambda: _enumerated()[1]["_dim_to_id"]),
    "_guess_max_plate_nesting": (
        "how many plates lie below the particles'",
        lambda: pyro.infer.ELBO._guess_max_plate_nesting,
    ),
    "_vectorized_num_particles": (
        "the plate of the particles",
        lambda: pyro.infer.ELBO._vectorized_num_particles,
    ),
    "_loss_and_surrogate_loss": (
        "the surrogate of TraceGraph_ELBO, which has no `differentiable_loss`",
        lambda: pyro.infer.TraceGraph_ELBO._loss_and_surrogate_loss,
    ),
}
