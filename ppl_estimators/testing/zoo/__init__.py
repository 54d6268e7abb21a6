"""The zoo: tiny models and guides that are easy to get wrong, written once for both libraries.

A program is a function of `ppl` (see `languages`: sample, param, plate, dist, scale, mask, ...) and of its initial
parameters, so the Pyro model and its NumPyro twin are the same text. The exact ELBO beside it is an explicit sum over
states in NumPy that shares no code with either library.

Conventions: z, k are discrete latents, w, u are continuous ones, x, y are observed. All parameters are unconstrained.
Everything is asymmetric and logits keep away from zero on purpose, except where zero is the point.

>>> from ppl_estimators.testing import zoo
>>> case = zoo.CASES["chain"]
>>> sorted(case.exact_gradient())
['a', 'b', 'c', 't', 'u', 'v']
>>> model, guide = case.build("numpyro")  # doctest: +SKIP
"""

from . import branches, categories, continuous, dimensions, minibatches, misuse, sites
from .case import CASES, Case, apart, bound, case, copies, finite, particles
from .languages import NumPyroLanguage, PyroLanguage, language

__all__ = [
    "CASES",
    "Case",
    "NumPyroLanguage",
    "PyroLanguage",
    "apart",
    "bound",
    "branches",
    "case",
    "categories",
    "continuous",
    "copies",
    "dimensions",
    "finite",
    "language",
    "minibatches",
    "misuse",
    "particles",
    "sites",
]
