import time
from types import SimpleNamespace

import pytest

from lib.reporting.timing import REST, seconds_in, time_parts


@pytest.fixture
def machine():
    return SimpleNamespace(slow=lambda: time.sleep(0.02), fast=lambda value: value + 1)


def test_seconds_are_added_up_and_results_pass_through(machine):
    original = machine.slow
    with seconds_in({"slow part": (machine, "slow"), "fast part": (machine, "fast")}) as seconds:
        machine.slow()
        machine.slow()
        assert machine.fast(1) == 2
    assert 0.04 <= seconds["slow part"] < 0.5
    assert 0 < seconds["fast part"] < 0.02
    assert machine.slow is original


def test_a_failing_function_is_timed_and_fails(machine):
    machine.slow = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError), seconds_in({"part": (machine, "slow")}):
        machine.slow()


def test_parts_and_the_rest_make_the_whole(machine):
    def work():
        machine.slow()
        time.sleep(0.01)

    parts = time_parts(work, {"part": (machine, "slow")})
    assert parts["part"] >= 0.02 and parts[REST] >= 0.01
    assert parts["part"] + parts[REST] == pytest.approx(parts["all"], abs=0.003)
