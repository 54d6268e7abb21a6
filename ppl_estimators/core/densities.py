"""Where a log probability says how the parameters move the draw, and where it doesn't."""

from __future__ import annotations

from .errors import site_error
from .site import Site


def check_score(site: Site) -> None:
    """Refuses sites where log q does not say how the parameters move the draw: a Delta has no density, and at an end of
    the support that moves ∇ ∫ q f has a boundary term, which no score sees."""
    if site.distribution == "Delta":
        raise site_error(
            site.name,
            "a Delta has no score function, its draw is its parameter",
            "Use Pathwise() here; in an autoguide choose the estimator at the auxiliary site behind it.",
        )
    check_ends(site)
    check_density(site)


def check_ends(site: Site) -> None:
    """Where the support moves the score has another mean than zero: it can neither be used nor be left out."""
    if site.support_moves:
        fix = (
            "Use Pathwise() here." if site.reparameterised else "Draw it in fixed bounds, and shift and scale the draw."
        )
        raise site_error(
            site.name,
            f"the support of {site.distribution} moves with its parameters, and the score function misses what moves "
            "over the edge",
            fix,
        )


def check_density(site: Site) -> None:
    """The density of a straight-through draw is that of a relaxed value, which the hard one doesn't show."""
    if site.distribution.endswith("StraightThrough"):
        raise site_error(
            site.name,
            f"the value of a {site.distribution} is hard, and its density is that of the relaxed value behind it",
            "Use Pathwise() here, or OneHotCategorical with an estimator such as GumbelStraightThrough().",
        )
