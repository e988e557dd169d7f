"""Lines of long work that cannot report how much of it is done."""

import time

from medmax_jax.io.progress import waiting


def test_silence_is_broken_and_lines_of_the_block_postpone_it():
    lines = []
    with waiting("compiling", lines.append, every=0.2) as log:
        time.sleep(0.5)
        silent = len(lines)
        for _ in range(8):
            log("a line")
            time.sleep(0.05)
    assert 1 <= silent <= 2 and lines[0].startswith("compiling: 0")
    assert lines[silent:] == ["a line"] * 8
    time.sleep(0.3)
    assert len(lines) == silent + 8


def test_short_work_logs_nothing():
    lines = []
    with waiting("compiling", lines.append):
        pass
    assert not lines
