"""Pyro's own words for a baseline: ``infer={"baseline": {...}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.errors import EstimatorError
from ..core.estimator import Estimator
from ..estimators.baselines.learned import Given, Learned
from ..estimators.baselines.moving_average import MovingAverage
from ..estimators.reinforce import Reinforce


def from_baseline(baseline: Mapping[str, Any] | None) -> Estimator | None:
    """The estimator that means the same."""
    options = dict(baseline or {})
    parts: list[Any] = []
    decay = options.pop("baseline_beta", 0.9)
    if options.pop("use_decaying_avg_baseline", False):
        parts.append(MovingAverage(decay))
    network, inputs = options.pop("nn_baseline", None), options.pop("nn_baseline_input", None)
    value = options.pop("baseline_value", None)
    if network is not None and value is not None:
        raise EstimatorError('infer={"baseline": ...}: give nn_baseline or baseline_value, not both.')
    if network is not None:
        parts.append(Learned(network, inputs))
    if value is not None:
        parts.append(Given(value))
    if options:
        raise EstimatorError(
            f'infer={{"baseline": ...}}: unknown options {sorted(options)}. Known: use_decaying_avg_baseline, '
            "baseline_beta, nn_baseline, nn_baseline_input, baseline_value."
        )
    if not parts:
        return None
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return Reinforce(total)
