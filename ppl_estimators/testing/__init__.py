"""Tests of gradients, for your programs and your estimators as well as ours.

`exact_gradient` sums over every state of a small program; `assert_unbiased` holds any ELBO of either library against
that, with a stated power; `assert_same_gradient` puts one noise through a Pyro program and its NumPyro twin;
`check_program` asks whether a program is what an `EstimatorELBO` takes it for; `zoo` has small hard models with their
exact ELBOs. Importing this imports neither torch nor jax.
"""

from ..core.verify import Checked
from ..measure.chosen import Twin
from ..measure.states import Exact
from . import zoo
from .exact import exact_gradient
from .program import check_program
from .twins import Differ, assert_same_gradient
from .unbiased import Biased, TooFewDraws, Unbiased, assert_unbiased

__all__ = [
    "Biased",
    "Checked",
    "Differ",
    "Exact",
    "TooFewDraws",
    "Twin",
    "Unbiased",
    "assert_same_gradient",
    "assert_unbiased",
    "check_program",
    "exact_gradient",
    "zoo",
]
