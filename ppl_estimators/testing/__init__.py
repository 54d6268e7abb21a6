"""Tests of gradients, for your programs and your estimators as well as ours.

`exact_gradient` sums over every state of a small program; `assert_unbiased` holds any ELBO of either library against
that, with a stated power; `assert_same_gradient` puts one noise through a Pyro program and its NumPyro twin; `zoo` has
small hard models with their exact ELBOs. Importing this imports neither torch nor jax.
"""

from .exact import exact_gradient
from .states import Exact

__all__ = ["Exact", "exact_gradient"]
