"""`check_program`: is a program what `EstimatorELBO` takes it for?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..backends import of_elbo
from ..core.elbo import Configured
from ..core.errors import EstimatorError
from ..core.verify import Checked
from ..measure.gradients import check_program as check_roles


def check_program(
    elbo: Any, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any
) -> Checked:
    """Assert that a step of ``elbo`` on this program rests on what the program does.

    ``elbo``: an `EstimatorELBO` of either library; other arguments go to model and guide. Guide and model are run once
    and must agree (sites, shapes, plates), every estimator must suit its site, and what the distributions claim of
    themselves must be so. Then they are run again:

    - with the same values and random numbers. A cost that changes is an error where the estimators need further runs
      (a batch taken from an iterator inside);
    - with other values at some latent sites, in groups. A cost that moves without being credited to any of the group is
      an error: it reads the value by a way that cannot be followed;
    - a small step further along a line, at sites whose estimator follows derivatives. A warning names a cost that
      changes by something else than its derivative says, by more than a tenth (a value that is detached in part, a
      straight-through value, a backward pass that is wrong), with both numbers. Kinks, and what rounding hides, are
      left out.

    Pyro's `EstimatorELBO` asks the same at the first step of a program, within 24 further runs, and there credits a
    cost that moves from then on, with a warning. Here every pair of site and cost is met, and nothing is changed: no
    parameter, buffer or random state. (An autoguide that has not run yet sets itself up.)

    Returns which estimator each site has and what it is credited with; prints as a line for each site. Raises
    `EstimatorError` (site, fact, fix).

    >>> print(check_program(EstimatorELBO(), model, guide, data))  # doctest: +SKIP
    site 'z': Enumerate(), credited with log p of 'z', log p of 'x', -log q of 'z'
    """
    library = of_elbo(elbo)
    if library is None or not isinstance(elbo, Configured):
        raise EstimatorError(
            f"check_program(elbo, model, guide, ...) takes an EstimatorELBO first, got {elbo!r:.60}. Write "
            "check_program(EstimatorELBO(), model, guide, data)."
        )
    check_roles(elbo, model, guide)
    found: Checked = library.part("look").checked(elbo, model, guide, args, kwargs)
    return found
