"""The ten checks of published weights that only their owner can run, and a page of the results.

python -m medmax_jax.convert check P --full --out D [--only NAME] [--codes F] [--torch_python PY]

    D/checks.json, checks.html    the results; a check that is run again replaces its row
    D/images/                   the three images as the VQGAN reads them, and reconstructed by it
    D/codes.json                their codes, in the format of --codes:
                                {"tool": "what made them", "images": {"ct-head_00.png": [7, 0, ..]}}
    D/native/                   P in this project's layout; delete it when all checks are done

Tensors are read one at a time; the two checks that generate load the model in a process of their
own. A check that cannot run states the reason, and counts as not run. Exit code 1: a check failed.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

import medmax_jax
from medmax_jax.checkpoints import safetensors_file
from medmax_jax.config import VQ
from medmax_jax.convert import check, convert, inspect_checkpoint, safetensors_stream
from medmax_jax.convert import vqgan as vqgan_layout
from medmax_jax.convert.state_dict import Checkpoint, ConvertError, LazyTensor, check_finite
from medmax_jax.environment import environment
from medmax_jax.io import html_page, text_files
from medmax_jax.io.errors import printable
from medmax_jax.io.progress import ByteProgress
from medmax_jax.models import images, vqgan
from medmax_jax.models.image_headers import ImageError
from medmax_jax.storage import hub
from medmax_jax.storage.folder import Folder, StorageError

PASSED, FAILED, NOT_RUN = "passed", "failed", "not run"
PAGE, RESULTS, CODES = "checks.html", "checks.json", "codes.json"
ISSUES = "https://github.com/medmax-jax/medmax_jax/issues"
EMBEDDED = ("ct-head_00", "angiogram_00", "blood-smear_00")  # of data/sample/images
TEXTS = (
    "A 63-year-old man, 7.5 mg/dL; is it a CT?",
    "Größe: 12 µm × 3 µm\n\n\tα-SMA (+)  —  “no” ≤ 5%",
    "#### a) Clinical Interpretation\n- **Ki-67**: 30%\n",
    "患者の胸部X線 🫁",
)
MIN_EQUAL_CODES = 0.99  # a latent halfway between two rows may go to either one on another machine
MIN_STD = 8.0  # gray levels; an image of one color has 0
MEMORY_FACTOR = 1.3  # bytes of memory per byte of weights while generating
PROMPT = "A chest X-ray."


@dataclasses.dataclass(frozen=True)
class Published:
    """What the published weights are known to be; tests replace it for their stand-ins."""

    md5: Mapping[str, str]  # file name -> digest
    models: Sequence[str]  # names of inspect_checkpoint.NAMED
    vocab_size: int
    vq: VQ
    min_psnr: float  # dB, of the worst of the images
    question: str
    answer: str  # a word that a greedy continuation of the question contains


RELEASED = Published(
    md5=check.PUBLISHED, models=("7B", "30B"), vocab_size=65_536, vq=vqgan.RELEASED, min_psnr=20.0,
    question="The capital of France is", answer="Paris",
)  # fmt: skip


class NotRunError(Exception):
    """Raised by a check that cannot run; the message states the reason."""


class Measured(NamedTuple):
    """The outcome of a check that ran; `value` and `limit` are texts for the page."""

    ok: bool
    value: str
    limit: str
    details: Sequence[str] = ()


@dataclasses.dataclass
class Subject:
    """The weights under test, and the options of the program."""

    path: str  # as given
    out: pathlib.Path
    codes: str | None = None
    torch_python: str | None = None
    published: Published = RELEASED
    say: Callable[[str], None] = print
    child_peak: int = 0  # bytes, of the processes that a check started

    @functools.cached_property
    def local(self) -> str:
        return hub.locate(self.path)

    @functools.cached_property
    def source(self) -> Checkpoint:
        return convert.read_model(self.local, "as these checks require")

    @property
    def checkpoint(self) -> Checkpoint:
        """The same; raises NotRunError where it cannot be read, which `tensors` reports."""
        try:
            return self.source
        except convert.ERRORS as error:
            reason = "the checkpoint cannot be read; see the check `tensors`"
            raise NotRunError(reason) from error

    @functools.cached_property
    def native(self) -> Checkpoint:
        """The model in this project's layout, converted to D/native unless it is there."""
        if self.checkpoint.layout == "native":
            return self.checkpoint
        target = self.out / "native"
        if not (target / "config.json").exists():
            needed, free = self.checkpoint.nbytes * 1.05, shutil.disk_usage(self.out).free
            if free < needed:
                raise NotRunError(_too_little(f"of disk at {self.out}", needed, free))
            convert.convert(self.local, str(target), layout="native", say=self.say)
        converted = convert.read_model(target, "as a conversion writes")
        if converted.fingerprint != self.checkpoint.fingerprint:
            raise ConvertError(f"{target}: of other weights than {self.path}; delete that folder")
        return converted

    @functools.cached_property
    def network(self) -> vqgan.VQGAN:
        """The VQGAN of the checkpoint, in float32."""
        source = self.checkpoint
        if not source.vqgan:
            raise NotRunError("the checkpoint has no VQGAN")
        places = vqgan_layout.key_map(source.vq)
        arrays = {
            places[name].name: vqgan_layout.as_native(tensor, places[name].shape)
            for name, tensor in source.vqgan.items()
        }

        def put(path: Any, leaf: Any) -> jax.Array:
            return jnp.asarray(arrays[safetensors_file.dotted_name(path)].read(), leaf.dtype)

        like = vqgan.abstract(source.vq, decoder=source.has_decoder)
        return jax.tree_util.tree_map_with_path(put, like)

    @functools.cached_property
    def encoded(self) -> dict[str, np.ndarray]:
        """The codes of the embedded images, by name; also written to D/codes.json."""
        codes = {}
        for name, pixels in self.pixels().items():
            codes[name] = np.asarray(vqgan.encode(self.network, jnp.asarray(pixels[None])))
        content = {
            "tool": f"medmax_jax {medmax_jax.__version__}",
            "images": {name: c.ravel().tolist() for name, c in codes.items()},
        }
        (self.out / CODES).write_text(json.dumps(content) + "\n")
        return codes

    def pixels(self) -> dict[str, np.ndarray]:
        """Return the embedded images as the VQGAN reads them, and write them as D/images/*.png."""
        folder = pathlib.Path(medmax_jax.__file__).parent / "data" / "sample" / "images"
        size, pixels = self.checkpoint.vq.image_size, {}
        (self.out / "images").mkdir(exist_ok=True)
        for name in EMBEDDED:
            image = images.load(folder / f"{name}.jpg", max_pixels=images.MAX_PIXELS)
            pixels[f"{name}.png"] = images.preprocess(image, size)
            levels = _levels(pixels[f"{name}.png"])
            PIL.Image.fromarray(levels).save(self.out / "images" / f"{name}.png")
        return pixels


def run(subject: Subject, only: Sequence[str] = ()) -> int:
    """Run the checks, or only those named; write the results; return 1 if one failed."""
    subject.out.mkdir(parents=True, exist_ok=True)
    rows = _earlier(subject)
    subject.say(f"weights: {hub.origin(subject.local)}")
    for number, (name, (purpose, measure)) in enumerate(CHECKS.items(), start=1):
        if only and name not in only:
            continue
        subject.say(f"{number} of {len(CHECKS)}, {name}: {purpose}")
        rows[name] = row = _row(subject, name, purpose, measure)
        subject.say(f"  {row['result']}: {row['measured']} ({row['seconds']} s)")
        _write(subject, [rows[name] for name in CHECKS if name in rows])
    subject.say(f"results: {subject.out / PAGE} and {subject.out / RESULTS}")
    return int(any(row["result"] == FAILED for row in rows.values()))


def _row(
    subject: Subject, name: str, purpose: str, measure: Callable[[Subject], Measured]
) -> dict[str, Any]:
    """Run one check and return its row of the results."""
    start, subject.child_peak = time.monotonic(), 0
    _reset_peak()
    try:
        found = measure(subject)
        result = PASSED if found.ok else FAILED
    except (NotRunError, MemoryError) as reason:
        result, found = NOT_RUN, Measured(False, str(reason) or "not enough memory", "")
    except (*convert.ERRORS, text_files.TextFileError, ImageError, OSError) as error:
        result, found = FAILED, Measured(False, printable(error, 500), "no error")
    peak = max(_peak("self"), subject.child_peak)
    words = ["python", "-m", "medmax_jax.convert", "check", subject.path, "--full"]
    words += ["--only", name, "--out", str(subject.out)]
    own = {"codes": ("--codes", subject.codes), "torch": ("--torch_python", subject.torch_python)}
    words += [word for word in own.get(name, ()) if own[name][1]]
    return dict(
        name=name, purpose=purpose, result=result, measured=found.value, limit=found.limit,
        details=list(found.details), seconds=round(time.monotonic() - start, 1),
        peak_gb=round(peak / 1e9, 2) or None, command=shlex.join(words),
    )  # fmt: skip


# ---- The checks ----


def _checksums(subject: Subject) -> Measured:
    files = list(check.digests(subject.local, subject.published.md5))
    stated = [file for file in files if file.kind]
    if not stated:
        raise NotRunError(
            "no published digest: no checklist.chk, and not downloaded by huggingface_hub; "
            "give P as hf://ORG/NAME"
        )
    wrong = [
        f"{file.name}: {file.kind} {file.found or 'of no file'}, published {file.published}"
        for file in stated
        if file.found != file.published
    ]
    unknown = [f"{file.name}: no published digest" for file in files if not file.kind]
    count = len({file.name for file in stated})
    return Measured(not wrong, f"{count} files, {len(wrong)} differ", "0 differ", wrong + unknown)


def _tensors(subject: Subject) -> Measured:
    published, checkpoint = subject.published, subject.source
    name = inspect_checkpoint.model_name(checkpoint)
    wrong = []
    if name not in published.models:
        wrong.append(f"sizes of no published model: {checkpoint.model}")
    if checkpoint.vocab.size != published.vocab_size:
        wrong.append(f"{checkpoint.vocab.size} ids, published {published.vocab_size}")
    if checkpoint.vq != published.vq:
        wrong.append(f"{checkpoint.vq}, published {published.vq}")
    wrong += index_problems(Folder(subject.local))
    count = f"{len(checkpoint.language)} + {len(checkpoint.vqgan)} tensors"
    facts = [f"{key}: {value}" for key, value in inspect_checkpoint.describe(checkpoint).items()]
    return Measured(
        not wrong, f"{count}, {checkpoint.nbytes / 1e9:.2f} GB, {name}",
        f"every name and shape of {' or '.join(published.models)}, and those of the index",
        [*wrong, *facts],
    )  # fmt: skip


def index_problems(folder: Folder) -> list[str]:
    """Return what is wrong with the size that the index of a folder states."""
    if not folder.has(safetensors_stream.INDEX):
        return []
    metadata = folder.json(safetensors_stream.INDEX).get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    found = sum(tensor.nbytes for tensor in safetensors_stream.read(folder).values())
    return [] if stated in (None, found) else [f"{found} bytes, but the index states {stated}"]


def _values(subject: Subject) -> Measured:
    checkpoint = subject.checkpoint
    progress = ByteProgress(checkpoint.nbytes, subject.say)
    tensors = (*checkpoint.language.values(), *checkpoint.vqgan.values())
    for tensor in tensors:
        check_finite(tensor.read(), tensor.where)
        progress(tensor.nbytes)
    spread = inspect_checkpoint.describe(checkpoint)["image_rows"]
    return Measured(
        not spread["all_zero"],
        f"{len(tensors)} tensors finite; image rows of the head: std {spread['std']}",
        "all finite; image rows not zero", [f"fingerprint {checkpoint.fingerprint}"],
    )  # fmt: skip


def _tokenizer(subject: Subject) -> Measured:
    checkpoint, lines = subject.checkpoint, []
    if not checkpoint.tokenizer:
        raise NotRunError("the checkpoint has no tokenizer")
    report = check.Report(lines.append)
    check.tokenizer_ids(checkpoint.tokenizer, checkpoint.vocab, report)
    if report.bad:
        return Measured(False, next(line for line in lines if "NOT OK" in line), "ids as published")
    tokenizer = check.load_tokenizer(checkpoint.tokenizer, checkpoint.vocab)
    changed = [text for text in TEXTS if tokenizer.decode(tokenizer.encode(text)) != text]
    lines += [f"{text!r} becomes {tokenizer.decode(tokenizer.encode(text))!r}" for text in changed]
    equal = f"ids as published, {len(TEXTS) - len(changed)} of {len(TEXTS)} texts unchanged"
    return Measured(not changed, equal, f"{len(TEXTS)} of {len(TEXTS)}", lines)


def _conversion(subject: Subject) -> Measured:
    source = subject.checkpoint
    if source.layout == "native":
        raise NotRunError("P is in this project's layout already; give the published files")
    converted = subject.native
    progress = ByteProgress(2 * source.nbytes, subject.say)
    different = []
    for group in ("language", "vqgan"):
        ours, theirs = getattr(converted, group), getattr(source, group)
        for name, tensor in theirs.items():
            if name not in ours or not _same_bits(tensor, ours[name]):
                different.append(name)
            progress(2 * tensor.nbytes)
    total = len(source.language) + len(source.vqgan)
    equal = f"{total - len(different)} of {total} tensors equal in dtype and bits"
    return Measured(not different, equal, f"{total} of {total}", different)


def _same_bits(a: LazyTensor, b: LazyTensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    first, second = a.read(), b.read()
    bits = {2: np.uint16, 4: np.uint32}[first.dtype.itemsize]
    return bool((first.view(bits) == second.view(bits)).all())


def _torch(subject: Subject) -> Measured:
    if not subject.torch_python:
        raise NotRunError("set --torch_python to a Python with torch and transformers")
    checkpoint, lines = subject.checkpoint, []
    _require_memory(checkpoint)
    needed, free = 2.1 * checkpoint.nbytes, shutil.disk_usage(subject.out).free
    if free < needed:
        raise NotRunError(_too_little(f"of disk at {subject.out}", needed, free))
    report = check.Report(lines.append)
    check.against_torch(checkpoint, subject.torch_python, str(subject.out), report)
    limits = f"logits {check.FP32_TOLERANCE} (float32), {check.BF16_TOLERANCE} (bfloat16)"
    return Measured(not report.bad, "; ".join(lines), f"{limits}; all codes equal")


def _codes(subject: Subject) -> Measured:
    codes = subject.encoded
    if not subject.codes:
        raise NotRunError(f"no --codes; those of this run are in {CODES}, for another owner")
    recorded = _read_codes(subject.codes, subject.checkpoint.vq)
    shares = {
        name: float((codes[name].ravel() == np.asarray(recorded["images"][name])).mean())
        for name in codes
    }
    details = [f"recorded by {printable(recorded['tool'])}"]
    details += [f"{name}: {share:.2%} equal" for name, share in shares.items()]
    worst = min(shares.values())
    return Measured(
        worst >= MIN_EQUAL_CODES, f"{worst:.2%} equal in the worst image",
        f"{MIN_EQUAL_CODES:.0%}", details,
    )  # fmt: skip


def _read_codes(path: str, vq: VQ) -> dict[str, Any]:
    """Return recorded codes; raise ConvertError unless they are of these images and this VQGAN."""
    recorded = text_files.read_json_object(path)
    by_name = recorded.get("images")
    valid = isinstance(by_name, dict) and isinstance(recorded.get("tool"), str)
    for name in (f"{name}.png" for name in EMBEDDED):
        codes = by_name.get(name) if valid else None
        integers = isinstance(codes, list) and all(type(code) is int for code in codes)
        if not integers or len(codes) != vq.codes_per_image:
            raise ConvertError(
                f'--codes {path}: images."{name}" must be {vq.codes_per_image} integers, and '
                '"tool" a text; the format is that of D/codes.json'
            )
    return recorded


def _psnr(subject: Subject) -> Measured:
    if not subject.checkpoint.has_decoder:
        raise NotRunError(
            "the files have no VQGAN decoder, as Hugging Face's of this family; give Meta's"
        )
    decibels = {}
    for name, pixels in subject.pixels().items():
        decoded = vqgan.decode_codes(subject.network, jnp.asarray(subject.encoded[name]))[0]
        shown = np.asarray(vqgan.to_uint8(decoded))
        target = subject.out / "images" / name.replace(".png", "_decoded.png")
        PIL.Image.fromarray(shown).save(target)
        error = ((shown.astype(np.float64) - _levels(pixels)) ** 2).mean()
        decibels[name] = 10 * math.log10(255**2 / max(error, 1e-9))
    worst, limit = min(decibels.values()), subject.published.min_psnr
    details = [f"{name}: {value:.2f} dB" for name, value in decibels.items()]
    return Measured(worst >= limit, f"{worst:.1f} dB in the worst image", f"{limit:g} dB", details)


def _answer(subject: Subject) -> Measured:
    published = subject.published
    answer = _generate(
        subject, "answer", "--mode=text", f"--prompt={published.question}", "--noend_of_turn",
        "--config.sample.text_greedy=True", "--config.sample.repetition_penalty=1.0",
        "--config.sample.max_gen_len=16",
    )  # fmt: skip
    text = " ".join(segment.get("text", "") for segment in answer)
    return Measured(
        published.answer.casefold() in text.casefold(),
        f"{published.question!r} continues {printable(text)!r}", f"contains {published.answer!r}",
    )  # fmt: skip


def _image(subject: Subject) -> Measured:
    size = subject.checkpoint.vq.image_size
    if not subject.checkpoint.has_decoder:
        raise NotRunError("the files have no VQGAN decoder; give Meta's")
    answer = _generate(subject, "image", "--mode=image", f"--prompt={PROMPT}")
    names = [segment["image"] for segment in answer if "image" in segment]
    if len(names) != 1:
        return Measured(False, f"{len(names)} images", "1 image")
    with images.open_image(subject.out / "image" / names[0], max_pixels=2**24) as image:
        image.load()
        image.save(subject.out / "images" / "generated.png")
        spread, found = float(np.asarray(image.convert("L")).std()), image.size
    return Measured(
        found == (size, size) and spread >= MIN_STD,
        f"{found[0]} x {found[1]} pixels, standard deviation {spread:.1f}",
        f"{size} x {size} pixels, standard deviation {MIN_STD:g}; look at the image",
    )  # fmt: skip


CHECKS: dict[str, tuple[str, Callable[[Subject], Measured]]] = {
    "checksums": ("files against the publisher's digests", _checksums),
    "tensors": ("names, shapes and sizes against the published ones", _tensors),
    "values": ("all numbers finite; the head has image rows", _values),
    "tokenizer": ("ids of the vocabulary; texts to ids and back", _tokenizer),
    "conversion": ("to this project's layout, bit for bit", _conversion),
    "torch": ("logits and codes against transformers", _torch),
    "codes": ("codes of three embedded images against recorded ones", _codes),
    "psnr": ("three embedded images through the VQGAN and back", _psnr),
    "answer": ("a greedy continuation", _answer),
    "image": (f"an image generated from {PROMPT!r}", _image),
}


# ---- Processes and memory ----


def _generate(subject: Subject, folder: str, *options: str) -> list[dict[str, Any]]:
    """Return the segments of one answer of medmax_jax.generate; its output is in D/folder.log."""
    native, out = subject.native.path, subject.out / folder
    _require_memory(subject.checkpoint)
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "medmax_jax.generate", f"--model={native}", f"--out={out}"]
    log = subject.out / f"{folder}.log"
    subject.say(f"  generating; its log is {log}")
    with (
        open(log, "wb") as file,
        subprocess.Popen([*command, *options], stdout=file, stderr=subprocess.STDOUT) as process,
    ):
        try:
            while process.poll() is None:
                subject.child_peak = max(subject.child_peak, _peak(str(process.pid)))
                time.sleep(0.1)
        except BaseException:
            process.kill()
            raise
    if process.returncode == -signal.SIGKILL:
        raise NotRunError("its process was killed, as the kernel does when memory runs out")
    if process.returncode:
        lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
        raise ConvertError(f"medmax_jax.generate ended with {process.returncode}: {lines[-1]}")
    (_, answer), *_ = text_files.read_objects(out / "answers.jsonl")
    return answer["segments"]


def _require_memory(checkpoint: Checkpoint) -> None:
    """Raise NotRunError where the weights do not fit; where it is unknown, the check is tried."""
    needed, free = MEMORY_FACTOR * checkpoint.nbytes, available_memory()
    if free is not None and free < needed:
        raise NotRunError(_too_little("of memory", needed, free))


def available_memory() -> int | None:
    """Return bytes of memory that a new process can have, by the kernel and by its cgroup."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        free = int(next(n for n in lines if n.startswith("MemAvailable")).split()[1]) * 1024
        group = pathlib.Path("/sys/fs/cgroup")
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            limit = int((group / "memory.max").read_text())
            free = min(free, limit - int((group / "memory.current").read_text()))
        return free
    return None


def _too_little(what: str, needed: float, free: int) -> str:
    return f"needs {needed / 1e9:.1f} GB {what}, but {free / 1e9:.1f} GB are free"


def _reset_peak() -> None:
    """Let the kernel count this process's peak memory anew; elsewhere peaks are unknown."""
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def _peak(process: str) -> int:
    """Return the peak resident memory of a process in bytes, 0 where it is unknown."""
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
        return int(next(n for n in lines if n.startswith("VmHWM")).split()[1]) * 1024
    return 0


# ---- The results ----


def _earlier(subject: Subject) -> dict[str, dict[str, Any]]:
    """Return the rows of an earlier run on the same weights, by name."""
    path = subject.out / RESULTS
    if not path.exists():
        return {}
    try:
        found = text_files.read_json_object(path)
        rows = {row["name"]: row for row in found["checks"]}
    except (text_files.TextFileError, KeyError, TypeError) as error:
        raise StorageError(f"{path}: not a result of this program; use another --out") from error
    if found.get("weights") != hub.origin(subject.local):
        raise StorageError(
            f"{path}: results of {printable(found.get('weights'))}; use another --out"
        )
    return rows


def _write(subject: Subject, rows: list[dict[str, Any]]) -> None:
    counts = {r: sum(row["result"] == r for row in rows) for r in (PASSED, FAILED, NOT_RUN)}
    facts = dict(weights=hub.origin(subject.local), **environment(devices=jax.devices()))
    facts |= dict(jax=jax.__version__, python=sys.version.split()[0])
    content = dict(format=1, **facts, counts=counts, checks=rows)
    Folder(subject.out).write(RESULTS, [json.dumps(content, indent=1).encode() + b"\n"])
    page = html_page.document("Checks of published weights", _body(subject, rows, counts, facts))
    Folder(subject.out).write(PAGE, [page.encode()])


def _body(
    subject: Subject, rows: list[dict[str, Any]], counts: dict[str, int], facts: dict[str, Any]
) -> str:
    total = f"{len(rows)} of {len(CHECKS)} checks: " + ", ".join(
        f"{count} {result}" for result, count in counts.items()
    )
    status: dict[str, html_page.Status] = {PASSED: "good", FAILED: "bad", NOT_RUN: "neutral"}
    complete = status[PASSED if counts[PASSED] == len(CHECKS) else NOT_RUN]
    verdicts = [html_page.Verdict("bad" if counts[FAILED] else complete, total, facts["weights"])]
    verdicts += [
        html_page.Verdict(status[row["result"]], f"{row['name']}: {row['result']}", row["measured"])
        for row in rows
    ]
    table = html_page.table(
        ["check", "result", "limit", "seconds", "peak GB"],
        [[r["name"], r["result"], r["limit"], f"{r['seconds']:.1f}", r["peak_gb"]] for r in rows],
    )
    commands = html_page.table(["check", "command"], [[r["name"], r["command"]] for r in rows])
    details = "".join(
        html_page.details(row["name"], "".join(map(html_page.paragraph, row["details"])))
        for row in rows
        if row["details"]
    )
    attach = (
        f"Attach this page and {RESULTS} to an issue at {ISSUES}, titled with the name and the "
        "revision of the weights. They contain the paths of the commands below, and no weights. "
        f"{CODES} lets another owner compare: attach it too."
    )
    return (
        html_page.provenance(facts)
        + html_page.verdicts(verdicts)
        + html_page.section("What to attach", html_page.paragraph(attach))
        + html_page.section("Limits and costs", table)
        + html_page.section("Images", html_page.figures(_figures(subject.out / "images")))
        + html_page.section("Findings", details)
        + html_page.section("Run a check alone", commands)
    )


def _figures(folder: pathlib.Path) -> list[tuple[bytes, str]]:
    """Return the images of the folder, at most 256 pixels wide, each with its name."""
    figures = []
    for path in sorted(folder.glob("*.png")):
        image = images.load(path, max_pixels=2**24)
        image.thumbnail((256, 256))
        figures.append((html_page.png(image), path.stem))
    return figures


def _levels(pixels: np.ndarray) -> np.ndarray:
    """Return the 8-bit levels from which `images.preprocess` made these pixels."""
    return np.rint((pixels + 1) / 2 * 255).astype(np.uint8)
