"""Test that a reader killed in its second epoch is resumed bit for bit by another process."""

import hashlib
import os
import pathlib
import signal
import subprocess
import sys

import micro_run

from medmax_jax.data import loader

ROOT = pathlib.Path(__file__).parents[2]
SETTINGS = dict(data__batch_size=2, data__seed=5, train__steps=60)
READER = """
import sys
import micro_run, test_reader_kill as t
folder, start = sys.argv[1], int(sys.argv[2])
at = t.loader.train_batches(micro_run.run(data__train=folder, **t.SETTINGS), folder)
for step, batch in enumerate(at.stream(start), start=start):
    print(step, at.stats(step).epoch, t.digest(batch), flush=True)
    if sys.argv[3] == "wait" and at.stats(step).epoch == 1 and at.stats(step - 4).epoch == 1:
        sys.stdin.read()  # the middle of the second epoch: until the kill
"""


def digest(batch) -> str:
    sha256 = hashlib.sha256()
    for name in ("ids", "segments", "positions", "weights"):
        sha256.update(getattr(batch, name).tobytes())
    return sha256.hexdigest()


def reader(folder, start, how):
    return subprocess.Popen(
        [sys.executable, "-c", READER, folder, str(start), how],
        cwd=ROOT, text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'tests' / 'data'}:{ROOT / 'tests' / 'support'}"},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def test_reader_killed_in_the_second_epoch_resumes(tmp_path):
    folder = micro_run.write(tmp_path / "r")
    batches = loader.train_batches(micro_run.run(data__train=folder, **SETTINGS), folder)
    expected = [
        f"{s} {batches.stats(s).epoch} {digest(batches.batch(s))}" for s in range(len(batches))
    ]
    assert (
        batches.stats(len(batches) - 1).epoch > 1
    )  # there is more than the epoch in which it dies
    first, lines = reader(folder, 0, "wait"), []
    for line in first.stdout:
        lines.append(line.strip())
        epoch = [int(row.split()[1]) for row in lines[-5:]]
        if len(epoch) == 5 and min(epoch) == 1:
            break
    first.kill()
    assert first.wait() == -signal.SIGKILL
    first.stdin.close()
    first.stdout.close()
    assert len(lines) < len(expected) and expected[len(lines)].split()[1] == "1"
    rest, _ = reader(folder, len(lines), "go").communicate(timeout=300)
    assert lines + rest.splitlines() == expected
