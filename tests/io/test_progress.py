"""Long waits are reported; short ones, and lines that a stopped program refuses, are not."""

import time

import pytest

from medmax_jax.io import progress


def test_a_long_wait_is_reported_until_it_ends():
    lines = []
    with progress.report_waiting("compiling", lines.append, every=0.02):
        deadline = time.monotonic() + 20
        while len(lines) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
    count = len(lines)
    assert count >= 2 and lines[0] == "compiling: 0 s"
    time.sleep(0.1)
    assert len(lines) == count


def test_a_short_wait_is_not_reported():
    lines = []
    with progress.report_waiting("compiling", lines.append, every=60.0):
        pass
    assert list(progress.report_waits(range(3), "batch", lines.append)) == [0, 1, 2]
    assert not lines


def test_a_restarted_wait_counts_from_zero():
    lines = []
    with progress.report_waiting("compiling", lines.append, every=0.5) as restart:
        for _ in range(100):
            restart()
            time.sleep(0.01)
    assert not lines


def test_a_log_that_raises_leaves_the_work_alone():
    raised = []

    def log(line):
        raised.append(line)
        raise RuntimeError("stopped")

    with pytest.raises(ValueError, match="the work"):
        with progress.report_waiting("compiling", log, every=0.01):
            while not raised:
                time.sleep(0.01)
            raise ValueError("the work")
