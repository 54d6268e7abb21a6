"""What the estimators share whose value is the library's own reparameterised draw."""

from __future__ import annotations

from typing import ClassVar

from ..core.errors import site_error
from ..core.estimator import Estimator, Site, Value


class LibraryDraw(Estimator):
    """Base: the value comes from the distribution's `rsample`, and carries its gradient."""

    value: ClassVar[Value] = Value.LIBRARY
    instead: ClassVar[str] = "Use DisARM() for Bernoulli sites, or, for any, Reinforce(LeaveOneOut())"

    def check(self, site: Site, particles: int) -> None:
        if not site.reparameterised:
            raise site_error(
                site.name,
                f"{type(self).__name__} needs a reparameterisable distribution, got {site.distribution}",
                self.advice(site, particles),
            )
