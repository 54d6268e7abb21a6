"""Which costs count for whom, added up: many sites of one shape share one product of a matrix, few are sums."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ppl_estimators.core.credit import Graph, downstream_costs
from ppl_estimators.core.families import BERNOULLI
from ppl_estimators.core.site import Plate, Site, Term
from ppl_estimators.numpyro.ops import OPS as JAX
from ppl_estimators.pyro.ops import OPS as TORCH


@pytest.mark.parametrize("sites", [3, 12])
@pytest.mark.parametrize("ops", [TORCH, JAX], ids=["pyro", "numpyro"])
def test_a_site_of_a_chain_counts_what_comes_after_it(ops, sites):
    rng, names = np.random.default_rng(0), [f"z{i}" for i in range(sites)]
    numbers = rng.normal(size=(sites, 5))  # [terms, plate]
    with jax.enable_x64(True):
        plates = frozenset({Plate("data", -1, 5)})
        array = torch.tensor if ops is TORCH else jnp.asarray
        graph = Graph({n: frozenset(names[:i]) for i, n in enumerate(names)}, dict.fromkeys(names, plates))
        terms = [Term("model", f"x{i}", array(numbers[i]), plates, frozenset(names[: i + 1])) for i in range(sites)]
        shaped = [Site(n, "Bernoulli", BERNOULLI, (5,), (), plates) for n in names]
        found = downstream_costs(ops, graph, terms, shaped)
        for i, name in enumerate(names):
            np.testing.assert_allclose(np.asarray(found[name]), numbers[i:].sum(0), rtol=1e-12)
