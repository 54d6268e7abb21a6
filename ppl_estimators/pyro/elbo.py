"""`EstimatorELBO`: the drop-in loss for `pyro.infer.SVI`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
import torch
from pyro.infer import ELBO
from pyro.poutine.trace_struct import Trace

from ..core.elbo import Configured, name_of, warn_of_costs
from ..core.errors import of_the_other_library
from ..core.estimator import Estimator
from ..core.objectives import Objective
from ..core.posterior import Posterior
from ..core.site import Term
from ..core.step import Step
from ..measure.evaluation import Evaluation, arguments, chunks, evaluation
from ..policy import AUTOMATIC
from .buffers import Buffers
from .compiled import Compiler, Result
from .keep import Keeper, update_state
from .library import PyroLibrary
from .memory import Memory
from .randomness import Randomness, State
from .run import traced

Array = torch.Tensor


class EstimatorELBO(Configured, ELBO):
    """An ELBO that chooses a gradient estimator per sample site. Swap it for `Trace_ELBO`, nothing else changes.

    ``estimators``: ``{site name or glob pattern: estimator}``, or one estimator for every site. It overrides the
    guide hook `with_estimators`, which overrides ``infer={"estimator": ...}`` at the site (and Pyro's
    ``infer={"baseline": {...}}``), which overrides ``default``.

    ``num_particles``, ``vectorize_particles``, ``max_plate_nesting``, ``retain_graph`` and the rest: as in
    `pyro.infer.ELBO`. All particles see one minibatch.

    ``default``: "auto", or the estimator of every site that nothing else names. "auto" is: reparameterisable sites
    Pathwise(); with several particles Reinforce(LeaveOneOut()); with one, at most two further evaluations for all other
    sites together (every value, three categories, or pairs); where these do not suffice for every site, two
    further particles, each the others' baseline. See `ppl_estimators.policy`.

    ``objective``: None for the ELBO, or ImportanceWeighted(), Renyi(alpha), WakeSleep(), ...: the page "Objectives".

    ``max_parallel``: how many counterfactual evaluations run side by side where ``vectorize_particles=True`` says
    that model and guide can be vectorised; otherwise they run one after another.

    ``verify``: at the first step of a program, run it again with the same values and with others, and see that its
    costs are what they were, move with no site that they were said not to depend on, and have a derivative in the
    values of sites whose estimators need one.

    ``average_model``: also average the gradient of the model's own parameters, and of pathwise sites, over the values
    that the estimators evaluate (pairs of DisARM, sets of UnorderedSet, ...), each by its weight. It costs a backward
    pass through every evaluation, and holds their activations.

    ``compile``: note what a step does, tensor by tensor, and do the next ones from the notes; True, or a backend of
    `torch.compile` such as "inductor". See the page "Compiled steps".

    Raises `EstimatorError` (site, fact, reason, fix) for a choice that cannot work.

    >>> from ppl_estimators import DisARM
    >>> EstimatorELBO({"z": DisARM()}, num_particles=4).num_particles
    4
    """

    automatic = AUTOMATIC

    def __init__(
        self,
        estimators: Mapping[str, Estimator] | Estimator | None = None,
        *,
        num_particles: int = 1,
        vectorize_particles: bool = False,
        default: str | Estimator = "auto",
        objective: Objective | None = None,
        max_parallel: int = 16,
        average_model: bool = False,
        verify: bool = True,
        compile: bool | str = False,
        **kwargs: Any,
    ):
        super().__init__(num_particles=num_particles, vectorize_particles=vectorize_particles, **kwargs)
        self._several = vectorize_particles and num_particles > 1  # does max_plate_nesting count an axis of particles?
        self._configure(estimators, default, objective, max_parallel, average_model)
        self.randomness = Randomness()
        self.keeper = Keeper()
        self.verify = verify
        self.memory = Memory()
        self.compiler = Compiler(self.memory, compile if isinstance(compile, str) else None) if compile else None

    @property
    def can_infer_discrete(self) -> bool:
        """What NumPyro's `SVI` asks of its loss where a program has discrete sites."""
        raise of_the_other_library("Pyro", "NumPyro")

    # ---- Pyro's interface ---------------------------------------------------------------------------------------

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """−ELBO of fresh particles, as a float. Changes no state."""
        with torch.no_grad():
            return float(self.step(model, guide, args, kwargs).value())

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Array:
        """−ELBO as a tensor whose gradient is the estimate."""
        return self._result(model, guide, args, kwargs, standalone=True).differentiable()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """−ELBO as a float; adds the gradient estimate to the parameters' ``.grad``."""
        result = self._result(model, guide, args, kwargs, standalone=False)
        result.backward(self.retain_graph)
        value = result.loss.item()
        if not math.isfinite(value):
            _report(self._explained(result.start, model, guide, args, kwargs) if result.runs is None else result.runs)
        return value

    def _result(self, model: Any, guide: Any, args: Any, kwargs: Any, *, standalone: bool) -> Result:
        def evaluate(args: Any, kwargs: Any) -> tuple[Array, Sequence[Sequence[Term]]]:
            return self._differentiable(model, guide, args, kwargs, standalone=standalone)

        if self.compiler is not None:
            settings = self.settings, self.vectorize_particles
            found = self.compiler.step(evaluate, settings, model, guide, args, kwargs)
            if found is not None:
                return found
        loss, runs = evaluate(args, kwargs)
        return Result(loss, runs=runs, known=False)

    def evaluate(
        self,
        model: Any,
        guide: Any,
        *args: Any,
        num_particles: int = 5000,
        chunk: int = 100,
        batches: Iterable[Any] | None = None,
        **kwargs: Any,
    ) -> Evaluation:
        """A bound on the log-likelihood, from ``num_particles`` particles as guide and model themselves draw them.

        ``chunk``: so many particles run side by side with ``vectorize_particles=True``. ``batches``: a data loader, or
        any iterable of tuples of arguments (or of first arguments), each batch a call of model and guide; ``args`` come
        after them. See `Evaluation`. Estimators and objective play no part.

        >>> elbo.evaluate(model, guide, batches=test_loader).value  # doctest: +SKIP
        """
        sizes, plain = chunks(num_particles, chunk), copy(self)
        plain.memory = Memory()

        def each() -> Iterator[tuple[Any, float]]:
            for given in arguments(args, batches):
                rows = []
                for plain.num_particles in sizes:
                    with torch.no_grad():
                        found, scale = plain.step(model, guide, given, kwargs).log_weights(plain.num_particles)
                    rows.append(found.cpu().numpy())
                yield np.concatenate(rows), scale

        return evaluation(each())

    def posterior(self, model: Any, guide: Any, *args: Any, num_samples: int = 1, **kwargs: Any) -> Posterior:
        """The posterior of what is summed, given what the guide draws: marginals, and joint draws of all latent sites.

        In plates, chains and scans: see `Posterior`. What is summed is what a step would sum, by its mark or by its
        name.

        >>> found = elbo.posterior(model, guide, data, num_samples=100)  # doctest: +SKIP
        >>> found.marginals["z"].mean(0), found.samples["z"]  # doctest: +SKIP
        """
        plain = copy(self)
        plain.memory, plain.vectorize_particles = Memory(), False
        with torch.no_grad():
            return plain.step(model, guide, args, kwargs).posterior(num_samples)

    def _differentiable(
        self, model: Any, guide: Any, args: Any, kwargs: Any, *, standalone: bool
    ) -> tuple[Array, Sequence[Sequence[Term]]]:
        with torch.enable_grad():
            loss, states, joined = self.step(model, guide, args, kwargs, standalone=standalone).loss()
            for name, state in states.items():
                update_state(name, state)
            # of the runs their terms: all the rest would be in memory during the backward pass
            return loss, [run.terms for run in joined.arrays["runs"]]

    def _explained(self, start: State, model: Any, guide: Any, args: Any, kwargs: Any) -> Sequence[Sequence[Term]]:
        """The runs of a compiled step, run as ever: what raises an error there raises it now."""
        memory = self.memory
        after = memory.generators.state()
        memory.generators.restore(start)
        try:
            with torch.no_grad(), Buffers.lent(memory.buffers.held()):
                runs = [run.terms for run in self.step(model, guide, args, kwargs).loss()[2].arrays["runs"]]
        finally:
            memory.generators.restore(after)
        return runs

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Trace, Trace]:
        """One trace of the model and one of the guide, values drawn by the chosen estimators."""
        step = self.step(model, guide, args, kwargs)
        traces = step.library.particles(step.drawn, 1).arrays["runs"][0].traces
        return traced(traces.model), traced(traces.guide)

    def step(self, model: Any, guide: Any, args: Any, kwargs: Any, *, standalone: bool = False) -> Step:
        """One evaluation of the loss, before it is evaluated."""
        several = self.vectorize_particles and self.num_particles > 1
        self.max_plate_nesting += several - self._several  # there may be more particles than at the last step, or one
        self._several = several
        if self.vectorize_particles and self.max_plate_nesting == math.inf:
            self._guess_max_plate_nesting(model, guide, args, kwargs)

        def guess() -> int:
            self._guess_max_plate_nesting(model, guide, args, kwargs)
            return int(self.max_plate_nesting)

        settings = self.settings
        library = PyroLibrary(
            settings, self.randomness, self.memory, self.keeper, model, guide, args, kwargs,
            max_plate_nesting=self.max_plate_nesting, side_by_side=self.vectorize_particles,
            vectorize=self._vectorized_num_particles if several else None, standalone=standalone,
            verify=self.verify, guess=guess,
        )  # fmt: skip
        return Step(settings, library)


def JitEstimatorELBO(*args: Any, compile: bool | str = True, **kwargs: Any) -> EstimatorELBO:
    """`EstimatorELBO` with ``compile=True``, under the name that users of `JitTrace_ELBO` look for."""
    return EstimatorELBO(*args, compile=compile, **kwargs)


def _report(runs: Sequence[Sequence[Term]]) -> None:
    """Warn, by name, of costs that are not finite."""
    bad = [name_of(t) for terms in runs for t in terms if not torch.isfinite(t.value.detach()).all()]
    warn_of_costs(bad or ["(their sum)"], "lower the learning rate")
