"""Nothing of a patient on the whole road: canaries in every tag, path and report, then programs.

    DICOM + reports -> build -> records -> check, stats, plan, who_saw, train, who_saw again

Every byte that is written below the folder, and every one that is printed, is searched; records and
plans are compressed, so they are searched decoded too. tests/data/test_mimic.py has the source.
"""

import json
import pathlib
import stat

import numpy as np
import pytest
from forked_programs import forked
from source_setup import DICOM_IDS, STUDY, SUBJECT
from test_mimic import SECRETS, everything_written, marked_source

from medmax_jax.data import prepare
from medmax_jax.data.packing import plan_file
from medmax_jax.data.records import writer

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from medmax_jax.configs import tiny


def get_config():
    c = tiny.get_config()
    c.data.update(train={records!r}, validation={records!r}, batch_size=2)
    c.train.update(steps=3, log_every=1, checkpoint_every=2, eval_every=3, samples=2)
    return c
"""


def run(*commands: tuple) -> list[str]:
    """What commands of data.prepare, or of training, print; each begins with its exit status."""
    module = lambda words: "medmax_jax.train" if words[0].startswith("--") else "data.prepare"  # noqa: E731
    lines = [list(map(str, words)) for _, *words in commands]
    results = forked(*([module(words), *words] for words in lines))
    assert [status for status, _ in results] == [status for status, *_ in commands], results
    return [output for _, output in results]


@pytest.fixture(scope="module")
def road(tmp_path_factory):
    """(folder, what all programs printed) after the whole road."""
    top = tmp_path_factory.mktemp("road")
    source = tmp_path_factory.mktemp("source") / f"{SECRETS[0]}-folder"
    marked_source(source)
    r, codes = top / "r", top / "codes"
    tiny, tiny_mimic = ["--model", prepare.TINY], top / "tiny_mimic.py"
    tiny_mimic.write_text(CONFIG.format(records=str(r)))
    build = ["build", "--source", "MIMIC-CXR", "--from", source, *tiny]
    report = run(
        (1, *build, "--out", top / "no"),
        (0, *build, "--out", r, "--max_bad", "0.6"),
        (1, "check", r, "--against", r),  # all of it leaks into itself
        (0, "stats", r, "--out", top / "page.html"),
        (0, "stats", r, "--out", top / "shown.html", "--show_credentialed"),
        (0, "plan", r, "--seq_len", "256", "--row", "0", "--save", top / "plan.npz"),
        (0, "plan", top / "plan.npz", "--row", "0"),
        (0, f"--config={tiny_mimic}", f"--workdir={top / 'run'}"),
    )
    ids = (DICOM_IDS[0], writer.open_records(r)[0].id)
    report += run(
        *((0, "who_saw", request, "--in", top) for request in ids),
        (0, "tokenize", "--images", source, *tiny, "--credentialed", "--out", codes,
         "--max_bad", "0.6"),
    )  # fmt: skip
    return top, report


def decoded(top):
    """What compressed files say."""
    written, count = everything_written(top / "r")
    saved = plan_file.load(top / "plan.npz")
    return written + json.dumps(saved.header), count


def test_no_canary_in_any_byte(road):
    top, report = road
    heaps = {"decoded": decoded(top)[0], "printed": "\n".join(report)}
    for path in top.rglob("*"):
        heaps[str(path.relative_to(top))] = path.name
        if path.is_file():
            heaps[f"{path.relative_to(top)} bytes"] = path.read_bytes().decode("latin-1")
    names = " ".join(heaps)
    for expected in (
        "page.html",
        "plan.npz",
        "train.log",
        "history.jsonl",
        "events.out",
        "/meta/",
        "codes/",
        "samples/000003.html",
    ):
        assert expected in names
    assert {SUBJECT, STUDY, *DICOM_IDS} <= set(SECRETS)
    assert not [(s, name) for s in SECRETS for name, heap in heaps.items() if s in heap]


def test_canary_pipeline_ran_completely(road):
    """Silence means something only where something was said."""
    top, report = road
    _, count = decoded(top)
    assert count == 3 and "shared_codes\tdocument 0" in report[2]
    page, shown = ((top / n).read_text() for n in ("page.html", "shown.html"))
    assert "no focal consolidation" in shown and "focal" not in page
    assert "no focal consolidation" in (top / "run" / "samples" / "000003.html").read_text()
    for path in (top / "page.html", top / "run" / "samples" / "000003.html"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert "step 3/3" in report[7] and "MIMIC-CXR" in (top / "run" / "config.json").read_text()
    assert "shards  shard " not in report[8] and "shards  shard " in report[9]
    assert "checkpoints  checkpoint " in report[9] and "first_step" in report[9]


def test_files_of_a_credentialed_run_are_private(road):
    run = road[0] / "run"
    modes = {p: stat.S_IMODE(p.stat().st_mode) for p in [run, *run.rglob("*")] if p.name != ".lock"}
    assert len(modes) > 20
    assert all(mode == (0o700 if p.is_dir() else 0o600) for p, mode in modes.items()), modes


def test_images_are_printed_as_hashes(road):
    """Not even the records' own names, which are hashes of the ids, stand in who_saw or check."""
    top, report = road
    found = writer.open_records(top / "r")
    for d in found:
        for output in (report[2], report[9]):
            assert d.id not in output and d.image_path not in output and d.group not in output
    words = " ".join("".join(report).split())
    assert "focal consolidation" not in words  # no program prints a report
    assert np.all([d.image_sha256 for d in found])
