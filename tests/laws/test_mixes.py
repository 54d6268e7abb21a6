"""What `make test` leaves out of the law matrix has been seen elsewhere: to the engine, a choice is but its profile."""

import pytest
from mixes import AVERAGED, LEFT_OUT, ON_AVERAGE, Mix, profile, quick

TABLES = pytest.mark.parametrize("table", [ON_AVERAGE, AVERAGED], ids=["on average", "averaged"])


def profiles(*several: list[Mix]) -> frozenset:
    return frozenset().union(*(profile(mix) for mixes in several for mix in mixes))


@TABLES
@pytest.mark.parametrize("library", LEFT_OUT)
def test_each_profile_and_each_program_is_seen(table: dict[str, list[Mix]], library: str) -> None:
    chosen = quick(table, library)
    admitted = {c: [m for m in mixes if (c, m.name) not in LEFT_OUT[library]] for c, mixes in table.items()}
    here = {c: [m for m in mixes if (c, m.name) in chosen] for c, mixes in admitted.items()}
    if table is ON_AVERAGE:
        assert all(here[c] for c, mixes in admitted.items() if mixes)
    assert profiles(*here.values()) == profiles(*admitted.values())
    if library == "pyro":
        for case, mixes in admitted.items():
            assert profiles(here[case]) == profiles(mixes), case
