"""The suite itself: it runs on whatever XLA there is."""

import os

from xla import QUICK_COMPILATION, known


def test_a_flag_that_this_xla_has_not_is_left_out() -> None:
    one = QUICK_COMPILATION[0]
    assert known([one, "--xla_cpu_no_such_flag=1"]) == [one] * (one in os.environ["XLA_FLAGS"])
