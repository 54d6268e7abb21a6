"""`exact_gradient`: what the gradient of a small program is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ..backends import named, of_program
from ..core.objectives import Dreamt, EvidenceLowerBound, Objective, check_dreams
from ..measure.states import Asked, Exact, Minibatches


def exact_gradient(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    params: Mapping[str, Any] | None = None,
    nodes: int = 24,
    max_states: int = 20_000,
    minibatches: Minibatches | None = None,
    backend: str | None = None,
    objective: Objective | None = None,
    num_particles: int = 1,
    **kwargs: Any,
) -> Exact:
    """The exact loss −ELBO of a small Pyro or NumPyro program, and its gradient in the unconstrained parameters.

    Discrete latents of finite support are summed out jointly, whatever they depend on: Bernoulli, Categorical,
    one-hot, Binomial, in plates, batches and events; in Pyro also sites that only some branches have. Continuous ones
    are integrated with ``nodes`` Gauss nodes per element: Normal and MultivariateNormal (Hermite), mixtures and
    transforms of them, and whatever has a quantile function (Legendre); others are refused by name. Masks and scales
    count as in the ELBO. Nodes stand still while the density moves over them, so a cost that jumps in a continuous
    latent has its derivative too, to the accuracy that a jump leaves (``quadrature_error`` is an estimate of it).

    ``params``: the point, ``{name: constrained value}`` as the parameter store or ``svi.get_params(state)`` give
    them. What is not named has its value in Pyro's parameter store, else its initial value.
    ``minibatches``: ``{plate: [indices, ...]}`` to average over instead of all minibatches of a subsampled plate. One
    list is the gradient given that minibatch; a partition of the data has the same mean as all of them.
    ``max_states``: the most states to sum, nodes and minibatches included. Pyro runs the program once for each (about
    a millisecond); NumPyro compiles one run and maps it over them.
    ``objective``: another than the ELBO, such as ``ImportanceWeighted()``, of ``num_particles`` particles: the sum then
    is over every tuple of so many states. One that counts steps stands at the first. Of ``WakeSleep()``, whose gradient
    is that of no function, it is the mean of what a step gives, dreams included, whose observed sites are summed too.
    ``backend``: "pyro" or "numpyro"; found out by whose sample statements run.
    Other keyword arguments go to model and guide.

    Changes nothing: parameter store, ``.grad`` and random states stay as they are. (An autoguide that has not run yet
    sets itself up.) Compute in double precision if the reference is to be better than 1e-6.

    Raises `EstimatorError` for more than ``max_states`` states, for a site it cannot sum over, a latent that the guide
    forgets, a guide without latents, a cost that is not finite, and parameters that do not exist or have another shape.

    >>> exact_gradient(model, guide, data).gradient["loc"]  # doctest: +SKIP
    """
    if not 2 <= nodes <= 200:
        raise ValueError(f"exact_gradient(nodes=...) takes 2 to 200 Gauss nodes per element, got {nodes!r}.")
    library = of_program(model, guide, args, kwargs) if backend is None else named(backend)
    asked = Asked(nodes, max_states, minibatches, objective or EvidenceLowerBound(), num_particles)
    exact, given = library.part("exact").exact, (args, kwargs, params)
    found: Exact = exact(model, guide, *given, asked)
    if weight := asked.objective.dreams():
        check_dreams(guide)
        turned = library.part("run").turned(model, guide)
        found = found.and_of(exact(*turned, *given, replace(asked, objective=Dreamt(weight), num_particles=1)))
    return found
