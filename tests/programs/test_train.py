"""The training program: the files of a run, equality of resumed runs, invalid inputs."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import micro_run
import numpy as np
import pytest
from run_setup import rows, same_numbers
from safetensors.numpy import load_file, save_file

from medmax_jax import cli, config, train
from medmax_jax.checkpoints import checksums, export, manager, safetensors_file
from medmax_jax.configs import tiny, tiny_base, tiny_instruct
from medmax_jax.data.packing.pack import PackError
from medmax_jax.data.records.document import RecordsError
from medmax_jax.models import vocab
from medmax_jax.storage.folder import Folder
from medmax_jax.training import reporting, setup

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {
        "data__train": micro_run.write(folder / "train", count=40),
        "data__validation": micro_run.write(folder / "validation", count=9, seed=1),
    }


@pytest.fixture(scope="module")
def base(data, tmp_path_factory) -> pathlib.Path:
    """A model folder, made by a full run."""
    folder = tmp_path_factory.mktemp("full")
    run = micro_run.run(**data, train__trains="full", lora__rank=0, train__steps=2)
    result = train.run(run, folder)
    assert result["export"] == str(folder / "model") and result["step"] == 2
    return folder / "model"


@pytest.fixture(scope="module")
def done(data, base, tmp_path_factory) -> tuple[config.Run, pathlib.Path, dict]:
    """A finished run of five steps; the tests take copies of its folder."""
    folder = tmp_path_factory.mktemp("lora")
    run = micro_run.run(**data, train__init_from=str(base), train__eval_every=4)
    return run, folder, train.run(run, folder)


def copy(folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(folder, tmp_path / "copy"))


def test_full_run_exports_a_model_folder(base):
    assert json.loads((base / "config.json").read_text())["model"]["hidden_size"] == 32
    assert {p.name for p in base.iterdir()} == {"config.json", "model.safetensors"}
    log = (base.parent / "train.log").read_text()
    assert "has no tokenizer.json" in log and "has no vqgan.safetensors" in log


def test_lora_run_writes_the_documented_files(done, base):
    run, folder, result = done
    left = {p.name.split(".1")[0] for p in folder.iterdir()}
    assert left >= {"config.json", "metrics.jsonl", "train.log", "events.out.tfevents", "adapter"}
    facts = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert facts["base"] == Folder(base).file("model.safetensors").digest("sha256")
    assert (facts["rank"], facts["alpha"], facts["step"]) == (4, 4.0, 5)
    adapters = load_file(folder / "adapter" / "adapter.safetensors")
    assert "layers.self_attn.q_proj.lora_a" in adapters
    assert all(np.abs(a).max() > 0 for a in adapters.values())
    assert list(rows(folder, "train")) == [1, 2, 3, 4, 5]
    held = rows(folder, "validation")
    assert list(held) == [4, 5] and held[5]["text_nll"] != held[5]["image_nll"]
    assert result["validation_loss"] == held[5]["loss"]
    assert result["loss"] == rows(folder, "train")[5]["loss"]
    written = json.loads((folder / "config.json").read_text())
    assert config.from_config_dict(written["config"]) == run
    assert written["versions"]["jax"] == jax.__version__ and written["data"]
    assert set(written["environment"]) == {"date", "medmax_jax", "commit", "machine"}
    log = (folder / "train.log").read_text()
    assert re.search(
        r"step 5/5 loss \d\.\d+ text \d\.\d+ image \d\.\d+ log Z .* lr .* eta 0:00", log
    )
    assert "layers.self_attn.q_proj.lora_a" in log  # the parameter table
    assert f"plan {written['plan'][:12]}" in log and "train: generated     100.0%" in log
    steps = [int(p.name) for p in (folder / "checkpoints").iterdir()]
    assert sorted(steps) == [4, 5]


def test_finished_run_only_repeats_the_export(done, tmp_path):
    run, folder, result = done
    again = copy(folder, tmp_path)
    shutil.rmtree(again / "adapter")
    second = train.run(run, again)
    assert second["loss"] == result["loss"]
    assert second["validation_loss"] == result["validation_loss"]
    assert (again / "adapter" / "adapter.safetensors").read_bytes() == (
        folder / "adapter" / "adapter.safetensors"
    ).read_bytes()
    assert list(rows(again, "train")) == [1, 2, 3, 4, 5]


def test_the_group_may_read_a_run_of_open_data(done, tmp_path):
    (tmp_path / "plain").touch()  # by the umask of the tests
    expected = (tmp_path / "plain").stat().st_mode & 0o777
    files = [p for p in done[1].rglob("*") if p.is_file()]
    assert {p.name for p in files} >= {"adapter.safetensors", "metrics.jsonl"}
    assert {
        str(p): p.stat().st_mode & 0o777 for p in files if p.stat().st_mode & 0o777 != expected
    } == {}


def test_the_log_of_a_resumed_run_has_no_second_tables(done, tmp_path):
    run, folder, _ = done
    again = copy(folder, tmp_path)
    (again / "train.log").unlink()
    train.run(run, again)
    first, second = ((f / "train.log").read_text() for f in (folder, again))
    for text in ("layers.self_attn.q_proj.lora_a", "repeats per epoch"):
        assert text in first and text not in second
    for text in (
        "parameters",
        "an epoch draws",
        "loss: mean over documents",
        "tensorboard --logdir",
    ):
        assert text in first and text in second
    assert not re.search("[0-9a-f]{64}", first)


def test_run_continues_without_its_logs(done, tmp_path, capsys):
    """Folders are in place of the files, which no permission of a user can override."""
    run, folder, result = done
    shutil.copytree(folder, tmp_path / "run")
    logs = ("train.log", "metrics.jsonl", "history.jsonl")
    for name in logs:
        (tmp_path / "run" / name).unlink()
        (tmp_path / "run" / name).mkdir()
    again = train.run(run, tmp_path / "run")
    out = capsys.readouterr().out
    assert again["step"] == result["step"] and "Traceback" not in out
    for name in logs:
        assert f"WARNING: cannot write {tmp_path / 'run' / name} (" in out, name


def test_damaged_metrics_row_is_skipped(done, tmp_path, capsys):
    run, folder, result = done
    shutil.copytree(folder, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    rows = path.read_bytes().count(b"\n")
    path.write_bytes(path.read_bytes().replace(b'"step"', b'"ste\xff"', 1))
    assert train.run(run, tmp_path / "run")["step"] == result["step"]
    assert "skipped 1 unreadable line" in capsys.readouterr().out
    assert path.read_bytes().count(b"\n") == rows - 1


def test_damaged_checkpoint_is_reported_and_written_again(done, tmp_path):
    run, folder, _ = done
    again = copy(folder, tmp_path)
    newest = again / "checkpoints" / "5"
    victim = max((p for p in newest.rglob("d/*") if p.is_file()), key=lambda p: p.stat().st_size)
    flipped = bytearray(victim.read_bytes())
    flipped[len(flipped) // 2] ^= 16
    victim.write_bytes(flipped)
    train.run(run, again)
    log = (again / "train.log").read_text()
    assert "checkpoint 5 is damaged" in log and "resuming after step 4" in log
    assert same_numbers(again, folder)
    assert checksums.find_corrupt_file(Folder(newest)) == ""


def test_signal_interrupts_an_evaluation(data, base, tmp_path):
    """The state is saved at once; the next start repeats the evaluation and continues."""
    held = micro_run.write(tmp_path / "held", count=90, seed=1)  # several batches
    run = micro_run.run(
        **data | {"data__validation": held}, train__init_from=str(base), train__eval_every=4,
        train__checkpoint_every=9,
    )  # fmt: skip
    folder = tmp_path / "w"

    def terminate() -> None:
        log = folder / "train.log"
        while not (log.exists() and "step 4/5" in log.read_text()):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)  # while the first evaluation is compiled

    watch = threading.Thread(target=terminate, daemon=True)
    watch.start()
    with pytest.raises(cli.Interrupted, match="SIGTERM: stopped after step 4"):
        train.run(run, folder)
    watch.join()
    log = (folder / "train.log").read_text()
    assert "validation after step 4 was interrupted" in log and "checkpoint 4: blocked" in log
    assert not rows(folder, "validation")
    train.run(run, folder)
    assert list(rows(folder, "validation")) == [4, 5] and list(rows(folder, "train"))[-1] == 5


def test_settings_that_do_not_affect_results_may_change(done, data, base, tmp_path):
    _, folder, _ = done
    again = copy(folder, tmp_path)
    common = dict(data, train__init_from=str(base), train__eval_every=4)
    with pytest.raises(manager.CheckpointError, match="config.lora.alpha was 4.0, is now 8.0"):
        train.run(micro_run.run(**common, lora__alpha=8.0), again)
    with pytest.raises(manager.CheckpointError, match="plan was .*data.seed|data.seed .*plan"):
        train.run(micro_run.run(**common, data__seed=3), again)
    with pytest.raises(manager.CheckpointError, match="base was .*see config.train.init_from"):
        train.run(micro_run.run(**common | {"train__init_from": ""}), again)
    free = dict(train__keep=1, mesh__fsdp=2, mesh__tp=2, model__remat="attn")
    train.run(micro_run.run(**common, **free), again)
    log = (again / "train.log").read_text()
    assert "changed since the last checkpoint: config.train.keep was 2, is now 1" in log
    assert "config.mesh.tp was 1, is now 2" in log


def test_longer_schedule_requires_extend(done, data, base, tmp_path):
    _, folder, _ = done
    again = copy(folder, tmp_path)
    longer = micro_run.run(**data, train__init_from=str(base), train__eval_every=4, train__steps=7)
    with pytest.raises(manager.CheckpointError, match="steps was 5, is now 7 .use --extend"):
        train.run(longer, again)
    assert train.run(longer, again, setup.Options(extend=True))["step"] == 7
    assert list(rows(again, "train")) == [1, 2, 3, 4, 5, 6, 7]


def test_run_resumes_on_another_mesh(done, data, base, tmp_path):
    """Batches, losses and results are those of the run that never changed its mesh."""
    _, folder, _ = done
    again = copy(folder, tmp_path)
    shutil.rmtree(again / "checkpoints" / "5")
    common = dict(data, train__init_from=str(base), train__eval_every=4)
    train.run(micro_run.run(**common, mesh__data=2, mesh__fsdp=2, mesh__tp=2), again)
    ours, theirs = rows(again, "train")[5], rows(folder, "train")[5]
    assert ours["tokens"] == theirs["tokens"] and ours["epoch"] == theirs["epoch"]
    for name in ("loss", "text_nll", "image_nll", "grad_norm"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_prng_implementation_is_a_setting(done, data, base, tmp_path):
    """Adapters are drawn with train.prng_impl, so the first gradient differs; else nothing does."""
    _, folder, _ = done
    run = micro_run.run(**data, train__init_from=str(base), train__prng_impl="rbg", train__steps=1)
    train.run(run, tmp_path)
    (ours,), theirs = rows(tmp_path, "train").values(), rows(folder, "train")[1]
    assert ours["grad_norm"] != theirs["grad_norm"]
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)  # B is zero still


@pytest.mark.slow
def test_rows_may_be_longer_than_the_context_of_the_model(done, data, base, tmp_path):
    """Positions begin anew in each document, so held-out losses do not depend on the row length."""
    common = dict(data, train__init_from=str(base), train__steps=1, train__eval_every=1)
    for seq_len in (32, 160):
        run = micro_run.run(**common, data__seq_len=seq_len, optim__peak_lr=0.0)
        assert run.model.context_length == 64
        train.run(run, tmp_path / str(seq_len))
    short, long = (rows(tmp_path / n, "validation")[1] for n in ("32", "160"))
    for name in ("text_nll", "image_nll"):
        assert long[name] == pytest.approx(short[name], abs=1e-5)


def test_loss_that_is_not_finite_stops_the_run(done, data, base, tmp_path):
    broken = copy(base, tmp_path)
    tensors = load_file(broken / "model.safetensors")
    tensors["norm.scale"][0] = np.nan
    save_file(tensors, broken / "model.safetensors")
    run = micro_run.run(**data, train__init_from=str(broken), train__eval_every=4)
    with pytest.raises(
        reporting.TrainError, match="step 1: loss nan.*generated/0-.*no checkpoint yet"
    ):
        train.run(run, tmp_path / "w")
    assert not (tmp_path / "w" / "adapter").exists()
    assert "is not finite;" in (tmp_path / "w" / "train.log").read_text().splitlines()[-1]
    named = json.loads((tmp_path / "w" / "not_finite_1.json").read_text())["documents"]
    assert len(named) >= 8 and all(name.startswith("generated/0-") for name in named)


def test_missing_records_are_made_by_the_printed_command(tmp_path):
    folders = {split: str(tmp_path / split) for split in ("train", "validation")}
    run = config.from_config_dict(tiny.get_config())
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, **folders))
    with pytest.raises(RecordsError, match="To make it: python -m medmax_jax.data.pre") as caught:
        train.run(run, tmp_path / "w")
    commands = str(caught.value).partition("To make it: ")[2].split(" && ")
    assert len(commands) == 2
    done = subprocess.run(commands[1], shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "validation" / "dataset.json").exists(), done.stderr
    with pytest.raises(RecordsError, match=f"^{folders['train']}: no such folder"):
        train.run(run, tmp_path / "w")
    released = dataclasses.replace(run, vocab=vocab.RELEASED)
    with pytest.raises(RecordsError, match="To make it: docs/guides/data.md"):
        train.load_data(released)


@pytest.mark.parametrize("demo", [tiny_base, tiny_instruct])
def test_the_printed_commands_are_those_of_the_config_file(demo, tmp_path, monkeypatch):
    defaults = {"--split": "train", "--kind": "instruction", "--views": "1", "--rounds": "1"}

    def commands(text: str) -> list[dict[str, str]]:
        found = re.findall(r"data\.prepare sample (.*?)(?: && |$)", text, re.M)
        return [defaults | dict(zip(*[iter(words.split())] * 2, strict=True)) for words in found]

    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecordsError) as caught:
        train.load_data(config.from_config_dict(demo.get_config()))
    assert commands(str(caught.value)) == commands(demo.__doc__) != []


def test_dry_run_compiles_and_writes_nothing(data, base, tmp_path, capsys):
    run = micro_run.run(**data, train__init_from=str(base), mesh__fsdp=2)
    found = train.run(run, tmp_path / "w", setup.Options(dry_run=True))
    assert not (tmp_path / "w").exists() and "temporaries" in found["memory"]
    output = capsys.readouterr().out
    assert "mesh data 1 x fsdp 2 x tp 1" in output and "compiled the first step" in output
    broken = micro_run.run(**data, train__init_from=str(base), model__rope_theta=5.0)
    with pytest.raises(export.ExportError, match="rope_theta"):
        train.run(broken, tmp_path / "w", setup.Options(dry_run=True))
    large = micro_run.run(**data, mesh__fsdp=128, data__batch_size=128)
    with pytest.raises(config.ConfigError, match="128 devices.*python -m medmax_jax.plan"):
        train.run(large, tmp_path / "w", setup.Options(dry_run=True))


def test_a_signal_during_the_compilation_stops_before_the_first_step(
    data, base, tmp_path, monkeypatch, capfd
):
    run = micro_run.run(**data, train__init_from=str(base))
    monkeypatch.setattr(train, "barrier", lambda _: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(cli.Interrupted, match="SIGINT: stopped before step 1; run the same"):
        train.run(run, tmp_path)
    begin = time.monotonic()
    while "SIGINT: stopping after" not in capfd.readouterr().err:
        assert time.monotonic() < begin + 2
        time.sleep(0.02)


def test_profile_steps_write_a_trace(data, base, tmp_path):
    run = micro_run.run(**data, train__init_from=str(base))
    with pytest.raises(config.ConfigError, match="profile_steps=2:9 is out of range; .* 5"):
        train.run(run, tmp_path, setup.Options(profile=(2, 9)))
    train.run(run, tmp_path, setup.Options(profile=(2, 3)))
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000
    assert "trace of steps (2, 3)" in (tmp_path / "train.log").read_text()


@pytest.mark.parametrize(
    "changes, error, message",
    [
        (dict(data__train="nowhere"), RecordsError, "nowhere: no such folder"),
        (dict(data__document_limit=4), PackError, "exceed data.document_limit = 4"),
        (dict(mixing__weights="VQA=1"), PackError, "one for each of generated; 0 excludes"),
        (dict(data__seq_len=16), config.ConfigError, "document_limit is 32; .* in 1..16"),
        (dict(vocab__image_codes=8, vq__num_codes=8), RecordsError, "config.vocab is"),
        (dict(train__init_from="nowhere"), export.ExportError, "to a model folder"),
        (dict(model__rope_theta=5.0), export.ExportError, "model.rope_theta is 10000.0, .* 5.0"),
        (dict(mesh__tp=16), config.ConfigError, "requires .* 16 devices"),
        (dict(mesh__tp=3), config.ConfigError, "not divisible by config.mesh.tp = 3"),
        (dict(train__trains="none"), config.ConfigError, "must be one of lora, full"),
        (dict(train__trains="full"), config.ConfigError, "lora.rank"),
        (dict(train__trains="full", lora__rank=0, model__param_dtype="bfloat16"),
         config.ConfigError, "param_dtype"),
    ],
)  # fmt: skip
def test_invalid_settings_are_rejected(data, base, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train.run(micro_run.run(**{**data, "train__init_from": str(base), **changes}), tmp_path)


def test_weights_of_another_shape_are_refused(data, base, tmp_path):
    broken = copy(base, tmp_path)
    tensors = load_file(broken / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n != "norm.scale"}, broken / "model.safetensors")
    with pytest.raises(safetensors_file.WeightsError, match="norm.scale"):
        train.run(micro_run.run(**data, train__init_from=str(broken)), tmp_path / "w")


def test_records_of_another_tokenizer_are_refused(base, tmp_path):
    folder = copy(base, tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    run = micro_run.run()
    export.check_base(str(folder), run, tokenizer="", vqgan="")
    with pytest.raises(export.ExportError, match="tokenizer.json that differs"):
        export.check_base(str(folder), run, tokenizer="0" * 64, vqgan="")


def test_only_one_run_per_folder(data, tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", LOCK, str(tmp_path / ".lock")], stdout=subprocess.PIPE
    )
    holder.stdout.readline()
    try:
        with pytest.raises(reporting.TrainError, match="in use by another run"):
            train.run(micro_run.run(**data), tmp_path)
    finally:
        holder.kill()
        holder.communicate()


LOCK = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def test_first_signal_requests_a_stop():
    before = signal.getsignal(signal.SIGTERM)
    with cli.Stop() as stop:
        assert stop.requested == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == "SIGTERM"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # the next one ends the process
    assert signal.getsignal(signal.SIGTERM) is before
