"""Names of JAX and NumPyro that no documentation promises and that this adapter relies on: what each is for, and where
it is. A test looks each up, so that a release which drops one is told by its name; another finds what is missing here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.ad_checkpoint
import jax.extend
import numpyro
from jax.interpreters import ad
from numpyro.contrib.control_flow.cond import cond_wrapper
from numpyro.ops.pytree import PytreeTrace


def _scans() -> Any:
    return importlib.import_module("numpyro.contrib.control_flow.scan")  # beside the function of the same name


PRIVATES: dict[str, tuple[str, Callable[[], Any]]] = {
    # ---- JAX: following values ----------------------------------------------------------------------------------
    "Tracer": ("a value that is not known yet", lambda: jax.core.Tracer),
    "eval_jaxpr": ("runs a program that was looked at", lambda: jax.core.eval_jaxpr),
    "Jaxpr": ("the traced program", lambda: jax.extend.core.Jaxpr),
    "ClosedJaxpr": ("the same with its constants", lambda: jax.extend.core.ClosedJaxpr),
    "Literal": ("a constant inside it", lambda: jax.extend.core.Literal),
    "checkpoint_name": ("marks a value by name in the traced program", lambda: jax.ad_checkpoint.checkpoint_name),
    "primitive_jvps": ("which primitives have a derivative", lambda: ad.primitive_jvps),
    "JVPTracer": ("a value that is differentiated in forward mode", lambda: ad.JVPTracer),
    # ---- NumPyro ------------------------------------------------------------------------------------------------
    "PytreeTrace": ("the sites inside a scan or a cond, in the outer trace", lambda: PytreeTrace({}).trace),
    "_promote_fn_shapes": ("gives a distribution in a scan the rank of its value", lambda: _scans()._promote_fn_shapes),
    "cond_wrapper": ("tells a cond from a scan", lambda: cond_wrapper),
    "_mask": (
        "of a masked distribution",
        lambda: numpyro.distributions.Normal(0.0, 1.0).mask(jax.numpy.asarray(True))._mask,
    ),
    "_intervener_id": (
        "marks a site that `do` has put another value in the place of",
        lambda: numpyro.handlers.do(data={})._intervener_id,
    ),
    "_NumPyroOptim": ("the class of an optimiser of SVI", lambda: numpyro.optim._NumPyroOptim),
}
