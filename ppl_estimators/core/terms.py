"""The cost terms of one run, from the log probabilities of its sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .errors import EstimatorError
from .ops import Array, Ops
from .posterior import Tables
from .site import Term


class LogProbs:
    """Of a run's sites. A subclass asks the library's distributions."""

    ops: ClassVar[Ops]
    traces: Any

    def log_prob(self, side: str, name: str, msg: Any) -> Array:
        """Of one site, not scaled; masked where that is an affair of the distribution."""
        raise NotImplementedError

    def factor(self, msg: Any, log_p: Array) -> Array:
        """The same as a factor of a sum: masked, unless the site is summed out; then its probabilities sum to one."""
        raise NotImplementedError

    def scaled(self, msg: Any, log_p: Array) -> Array:
        """The same as a cost term of its own: scaled and masked."""
        raise NotImplementedError

    def failed(self, side: str, name: str, record: Mapping[str, Any], error: Exception) -> None:
        """Says where that was; raises another error, or adds to this one."""
        raise NotImplementedError

    def log_q(self, name: str) -> Array:
        """Of an enumerated site of the guide, neither masked nor scaled."""
        raise NotImplementedError

    def one_by_one(self, msg: Any) -> str | None:
        """See `Term`; a library whose plates are all vectorised has none."""
        return None

    def support(self, msg: Any) -> Array | None:
        """The values of one element, ``[values, *event]``; None if the site is not enumerated."""
        raise NotImplementedError

    def terms(
        self, depends_on: Mapping[tuple[str, str], frozenset[str]], otherwise: frozenset[str],
        only: frozenset[str] | None = None,
    ) -> list[Term]:  # fmt: skip
        """Every cost term: log p of the model's sites, then -log q of the guide's. ``otherwise``: what a term depends
        on that is not in ``depends_on``. ``only``: terms that depend on one of these sites."""
        traces, values, of_blocks, terms = self.traces, self.traces.values, dict[str, Array](), list[Term]()
        for side, record in (("model", traces.model), ("guide", traces.guide)):
            for name, msg in record.items():
                if msg["type"] != "sample":
                    continue
                term = name if values is None else values.term(side, name)
                deps = depends_on.get((side, term), otherwise)
                if only is not None and not deps & only:
                    continue
                try:
                    log_p = self.log_prob(side, name, msg)
                    if side == "model" and values is not None and term in values.blocks:
                        of_blocks[name] = self.factor(msg, log_p)
                        if name != values.blocks[term].members[-1]:
                            continue
                        log_p = values.total(self.ops, term, of_blocks)
                    else:
                        log_p = self.scaled(msg, log_p)
                except EstimatorError:
                    raise
                except Exception as error:
                    self.failed(side, name, record, error)
                    raise
                found = Term(side, term, log_p if side == "model" else -log_p, traces.plates(side, term), deps)
                found.one_by_one = self.one_by_one(msg)
                terms.append(found if values is None else values.weighted(self.ops, found, self.log_q))
        return terms

    def tables(self) -> Tables:
        """What the posterior of enumerated values is made of."""
        traces, values = self.traces, self.traces.values
        drawn = {n: (m["value"], m["fn"].event_dim) for n, m in traces.latents().items()}
        if values is None:
            return Tables({}, {}, {}, drawn)
        factors = {n: traces.model[n] for n in values.inside}
        enumerated = {n: x for n, m in traces.guide.items() if (x := self.support(m)) is not None}
        summed = {n: self.support(m) for n, m in factors.items() if values.model[n].summed}
        log_p = {n: self.factor(m, self.log_prob("model", n, m)) for n, m in factors.items()}
        return Tables(log_p, {n: self.log_q(n) for n in enumerated}, {**enumerated, **summed}, drawn)
