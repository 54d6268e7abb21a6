"""Random programs in both libraries, with an exact answer that owes nothing to the package.

A `Program` (`description`) says which sites there are, in which plates, on what they depend, and which estimator each
has. `build` writes it in Pyro and in NumPyro, `oracle` sums it over all states in plain numpy, `generate` makes one up
from a seed, `check` compares, `shrink` looks for a smaller one that fails too. `python -m programs` runs many.
"""
