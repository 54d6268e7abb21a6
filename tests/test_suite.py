"""The suite itself: it runs on whatever XLA there is."""

from xla import QUICK_COMPILATION, known


def test_a_flag_that_this_xla_has_not_is_left_out() -> None:
    assert known([*QUICK_COMPILATION, "--xla_cpu_no_such_flag=1"]) == known(QUICK_COMPILATION)
