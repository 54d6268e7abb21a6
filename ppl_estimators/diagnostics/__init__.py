"""How noisy a gradient is, at which site, and at what price.

`gradient_report` looks at one ELBO, `compare` at several, `recommend` chooses. They draw gradients of any ELBO of
either library, ours or stock, and change nothing: no parameter, no state, no random state. Importing this imports
neither torch nor jax.
"""

from .candidates import Candidate
from .compare import Compared, Comparison, compare
from .monitor import GradientMonitor, MonitorReport, MonitorRow
from .recommend import Choice, Recommendation, recommend
from .report import ParameterRow, Report, SiteRow, gradient_report

__all__ = [
    "Candidate",
    "Choice",
    "Compared",
    "Comparison",
    "GradientMonitor",
    "MonitorReport",
    "MonitorRow",
    "ParameterRow",
    "Recommendation",
    "Report",
    "SiteRow",
    "compare",
    "gradient_report",
    "recommend",
]
