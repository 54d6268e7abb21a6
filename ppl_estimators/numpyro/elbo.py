"""`EstimatorELBO`: the drop-in loss for `numpyro.infer.SVI`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.elbo import Trace_ELBO

from ..core.elbo import Configured, name_of, warn_of_costs
from ..core.errors import EstimatorError, of_the_other_library
from ..core.estimator import Estimator
from ..core.objectives import Objective
from ..core.posterior import Posterior
from ..core.site import Term
from ..core.step import Step
from ..measure.evaluation import Evaluation, arguments, chunks, evaluation
from ..policy import AUTOMATIC
from .keep import state_name
from .library import NumPyroLibrary
from .memory import Memory
from .randomness import Randomness
from .run import Program, promoting, ranks

Array = Any
_TRACED = object()  # stands for an array among arguments


class EstimatorELBO(Configured, Trace_ELBO):
    """An ELBO that chooses a gradient estimator per sample site. Swap it for `Trace_ELBO`, nothing else changes.

    ``estimators``: ``{site name or glob pattern: estimator}``, or one estimator for every site. It overrides the
    guide hook `with_estimators`, which overrides ``infer={"estimator": ...}`` at the site, which overrides
    ``default``.

    ``num_particles``, ``vectorize_particles``, ``sum_sites``: as in `numpyro.infer.Trace_ELBO`, whose place it takes
    wherever one is asked for. All particles see one minibatch.

    ``default``: "auto", or the estimator of every site that nothing else names. "auto" is: reparameterisable sites
    Pathwise(); with several particles Reinforce(LeaveOneOut()); with one, at most two further evaluations for all other
    sites together (every value, three categories, or pairs); where these do not suffice for every site, two
    further particles, each the others' baseline. See `ppl_estimators.policy`.

    ``debug``: name the sites whose cost is not finite, also from compiled steps, by a callback to the host. Without it
    such a step shows in the loss, and changes no running average.

    ``objective``: None for the ELBO, or ImportanceWeighted(), Renyi(alpha), WakeSleep(), ...: the page "Objectives".

    ``max_parallel``: how many counterfactual evaluations run side by side; the rest wait their turn. Memory grows
    with it, not with the number of evaluations.

    ``average_model``: also average the gradient of the model's own parameters, and of pathwise sites, over the values
    that the estimators evaluate (pairs of DisARM, sets of UnorderedSet, ...), each by its weight. It costs a backward
    pass through every evaluation.

    Raises `EstimatorError` (site, fact, reason, fix) for a choice that cannot work.

    >>> from ppl_estimators import DisARM
    >>> EstimatorELBO({"z": DisARM()}, num_particles=4).num_particles
    4
    """

    can_infer_discrete = True
    automatic = AUTOMATIC

    def __init__(
        self,
        estimators: Mapping[str, Estimator] | Estimator | None = None,
        *,
        num_particles: int = 1,
        vectorize_particles: bool | Callable[..., Any] = True,
        default: str | Estimator = "auto",
        objective: Objective | None = None,
        max_parallel: int = 16,
        average_model: bool = False,
        debug: bool = False,
        multi_sample_guide: bool = False,
        sum_sites: bool = True,
    ):
        if multi_sample_guide:
            raise EstimatorError(
                "EstimatorELBO(multi_sample_guide=True): in a guide that draws several samples at once it can't be "
                "told which cost belongs to which. Leave it out, and pass num_particles=K for K samples."
            )
        if not sum_sites:
            raise EstimatorError(
                "EstimatorELBO(sum_sites=False): the gradient is that of the sum over sites. Leave it out; for the "
                "costs by site use Trace_ELBO(sum_sites=False).loss(...), which shares the guide and its parameters."
            )
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles)
        self._configure(estimators, default, objective, max_parallel, average_model)
        self.debug = debug
        self.randomness, self._memory = Randomness(), Memory()

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """As Pyro's `SVI` calls a loss that it does not know."""
        raise of_the_other_library("NumPyro", "Pyro")

    def loss_with_mutable_state(
        self,
        rng_key: Array,
        param_map: Mapping[str, Array],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """``{"loss": −ELBO (scalar), "mutable_state": new state or None}``; the loss's gradient is the estimate."""
        step = self.step(rng_key, param_map, model, guide, args, kwargs)
        with promoting():
            loss, states, joined = step.loss()
            mutable = jax.tree.map(_over_particles, joined.arrays["mutable"])
            for name, kept in joined.kept.items():
                if kept.state:
                    mutable[state_name(name)] = states.get(name, dict(kept.state))
            if self.debug and "finite" in joined.arrays:
                loss = _report(step.library.plan().terms, joined.arrays["finite"], loss)
        return {"loss": loss, "mutable_state": mutable or None}

    def evaluate(
        self,
        rng_key: Array,
        params: Mapping[str, Array],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        num_particles: int = 5000,
        chunk: int = 100,
        batches: Iterable[Any] | None = None,
        **kwargs: Any,
    ) -> Evaluation:
        """A bound on the log-likelihood, from ``num_particles`` particles as guide and model themselves draw them.

        ``params``: of `SVI.get_params`. ``chunk``: so many particles are held at once. ``batches``: a data loader, or
        any iterable of tuples of arguments (or of first arguments), each batch a call of model and guide; ``args`` come
        after them. See `Evaluation`. Estimators and objective play no part.

        >>> elbo.evaluate(key, svi.get_params(state), model, guide, batches=test_set).value  # doctest: +SKIP
        """
        sizes = chunks(num_particles, chunk)

        @partial(jax.jit, static_argnums=(0, 1, 2))
        def weights(count: int, tree: Any, rest: tuple[Any, ...], key: Array, arrays: Sequence[Array]) -> Any:
            there = iter(arrays)
            args, kwargs = jax.tree.unflatten(tree, [next(there) if x is _TRACED else x for x in rest])
            return self.step(key, params, model, guide, args, kwargs).log_weights(count)

        def each() -> Iterator[tuple[Any, float]]:
            for i, given in enumerate(arguments(args, batches)):
                leaves, tree = jax.tree.flatten((given, kwargs))
                arrays = [x for x in leaves if isinstance(x, (jax.Array, np.ndarray))]
                rest = tuple(_TRACED if isinstance(x, (jax.Array, np.ndarray)) else x for x in leaves)
                keys = jax.random.split(jax.random.fold_in(rng_key, i), len(sizes))
                rows = [weights(n, tree, rest, k, arrays) for n, k in zip(sizes, keys, strict=True)]
                yield np.concatenate([np.asarray(x) for x, _ in rows]), float(rows[0][1])

        return evaluation(each())

    def posterior(
        self,
        rng_key: Array,
        params: Mapping[str, Array],
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *args: Any,
        num_samples: int = 1,
        chunk: int = 100,
        **kwargs: Any,
    ) -> Posterior:
        """The posterior of what is summed, given what the guide draws: marginals, and joint draws of all latent sites.

        In plates, chains and scans: see `Posterior`. What is summed is what a step would sum, by its mark or by its
        name. ``params``: of `SVI.get_params`. ``chunk``: so many draws are made side by side.

        >>> found = elbo.posterior(key, params, model, guide, data, num_samples=100)  # doctest: +SKIP
        >>> found.marginals["z"].mean(0), found.samples["z"]  # doctest: +SKIP
        """
        plain = copy(self)
        plain.vectorize_particles_fn = partial(jax.lax.map, batch_size=min(chunk, num_samples))
        return plain.step(rng_key, params, model, guide, args, kwargs).posterior(num_samples)

    def step(self, rng_key: Array, params: Mapping[str, Array], model: Any, guide: Any, args: Any, kwargs: Any) -> Step:
        """One evaluation of the loss, before it is evaluated."""
        settings, mapped = self.settings, self.vectorize_particles_fn
        program = Program(model, guide, args, kwargs, dict(params), rng_key, ranks())
        with promoting():
            library = NumPyroLibrary(settings, self.randomness, self._memory, program, mapped, self.debug)
        return Step(settings, library)


def _over_particles(x: Array) -> Array:
    """The user's own mutable state: averaged where that makes sense, else the first particle's."""
    return jnp.mean(x, axis=0) if jnp.issubdtype(x.dtype, jnp.inexact) else x[0]


def _report(terms: Sequence[Term], finite: Array, loss: Array) -> Array:
    """``loss``, after a warning that names the costs that are not finite.

    A pure callback, whose zero is added to the loss: unlike one with effects it leaves jit's fast path open, and it
    runs on a bad step only.
    """
    dtype = loss.dtype  # the callback outlives the trace, and must not hold the loss
    names = [name_of(t) for t in terms]

    def say(finite: Any) -> Any:
        if bad := [n for n, ok in zip(names, finite, strict=True) if not ok]:
            warn_of_costs(bad, "use stable_update")
        return np.zeros((), dtype)

    nothing = jax.ShapeDtypeStruct((), dtype)

    @jax.custom_batching.custom_vmap
    def check(finite: Array) -> Array:
        return jax.lax.cond(
            jnp.all(finite), lambda f: jnp.zeros((), dtype), lambda f: jax.pure_callback(say, nothing, f), finite
        )

    @check.def_vmap
    def once(size: int, batched: Any, finite: Array) -> tuple[Array, bool]:  # many losses at once: one report
        return check(jnp.all(finite, axis=0)), False

    return loss + jax.lax.stop_gradient(check(jnp.all(finite.reshape(-1, len(names)), axis=0)))
