"""The house rules: file sizes, the order of imports, what training reaches, what nobody imports."""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent
ROOMS = ("medmax_jax", "configs", "data", "eval")
MAX_FILE_LINES = 600
# medmax_jax/train.py never reaches these by imports.
NOT_IN_TRAINING = ("eval", "medmax_jax.convert", "medmax_jax.plan", "medmax_jax.sweep")
MAX_SHIPPED_BYTES = 25_000_000  # of medmax_jax/tiny, all files together

# The house from the ground up. A module may import only what stands above it in this list.
ORDER = """
settings    configs configs.sampling configs.base configs.chameleon_30b configs.tiny
            configs.tiny_base configs.tiny_vqgan configs.eval_tiny configs.eval_suite
            configs.eval_paper configs.quickstart
            configs.medmax_7b_paper configs.medmax_7b_lora configs.medmax_7b_qlora
            configs.medmax_7b_full configs.chameleon_30b_lora configs.sweep_tiny
            configs.sweep_tiny_lora configs.sweep_medmax_7b_data configs.sample_meta
            configs.sample_medmax configs.biomedclip

facts       medmax_jax medmax_jax.io medmax_jax.io.errors medmax_jax.io.text_files
            medmax_jax.io.image_paths medmax_jax.io.run_files medmax_jax.io.csv_files
            medmax_jax.io.settings_files
            medmax_jax.config medmax_jax.vocab medmax_jax.mesh medmax_jax.image_headers
            medmax_jax.image_range medmax_jax.images
            medmax_jax.page medmax_jax.charts medmax_jax.cli medmax_jax.bucket medmax_jax.storage
            medmax_jax.new_folder medmax_jax.progress medmax_jax.unpickle medmax_jax.pth data
            data.mixture data.pack data.documents data.staging data.reader data.outgoing
            data.records data.mixing
            data.plan_file data.plan_report data.synthetic data.overlap data.journal
            data.chat_answers eval.cards
            data.endpoint data.asking medmax_jax.io.reasoning data.captions
            data.instruct_replies data.sample
            data.sample.manifest data.sample.phrases data.sample.questions data.sample.documents
            data.sample.sources data.sample.decode data.sample.dicoms data.sample.pictures
            data.sample.splits eval.stats eval.score_text medmax_jax.flops data.objective
            eval.paired eval.calibration eval.paper eval.answer_context eval.yes_no_parser
            eval.answer_parser eval.strict eval.judge eval.score_picture
            eval.picture_sets
            eval.settings eval.reading eval.history

parts       medmax_jax.weights medmax_jax.array_reader medmax_jax.arrays medmax_jax.tokenizer
            medmax_jax.splash medmax_jax.cudnn medmax_jax.attention medmax_jax.quant
            medmax_jax.layers medmax_jax.sampling medmax_jax.grammar data.loader data.texts
            data.sources data.sources.row data.sources.stream data.sources.prompts
            data.sources.conversations data.sources.captions data.sources.questions
            data.sources.choices data.sources.parquet data.sources.reports
            data.sources.dicom_bounds data.sources.dicom
            data.benchmarks
            medmax_jax.lanes

models      medmax_jax.cross_entropy medmax_jax.chameleon medmax_jax.vqgan medmax_jax.lpips
            medmax_jax.loss medmax_jax.spikes medmax_jax.optim data.codes data.batch_encoder
            data.code_reader data.picture_codes data.code_store data.scan data.looks data.held_out
            data.findings data.check data.stats_plots data.stats_page data.stats_command
            data.who_saw medmax_jax.cached medmax_jax.biomedclip medmax_jax.biomedclip_inputs
            medmax_jax.biomedclip_files medmax_jax.biomedclip_embed medmax_jax.efficientnet

laws        medmax_jax.scaling medmax_jax.scaling.laws medmax_jax.scaling.newton
            medmax_jax.scaling.fit medmax_jax.scaling.table medmax_jax.scaling.identify
            medmax_jax.scaling.bootstrap medmax_jax.scaling.holdout medmax_jax.scaling.allocate
            medmax_jax.scaling.mixed medmax_jax.scaling.study medmax_jax.scaling.checklist
            medmax_jax.scaling.plots medmax_jax.scaling.pages

machines    medmax_jax.metrics medmax_jax.step medmax_jax.integrity medmax_jax.checkpoint
            medmax_jax.export medmax_jax.decoding medmax_jax.batching medmax_jax.room
            medmax_jax.engine medmax_jax.serving medmax_jax.generator medmax_jax.answers
            medmax_jax.generate data.instruct eval.tasks eval.score_image
            eval.models eval.endpoint_model eval.predictions eval.looks eval.loop
            eval.evidence eval.paper_scores eval.scoring eval.baselines eval.probes eval.suites
            eval.judging eval.seeing eval.confidence eval.contamination
            eval.report_tables eval.report_curves medmax_jax.resume
            medmax_jax.runlog medmax_jax.tracking medmax_jax.reports medmax_jax.samples
            medmax_jax.startup medmax_jax.chat eval.comparing

layouts     medmax_jax.convert medmax_jax.convert.form medmax_jax.convert.ahead
            medmax_jax.convert.tensor_files medmax_jax.convert.vq_names
            medmax_jax.convert.hf_processor medmax_jax.convert.hf medmax_jax.convert.meta_shards
            medmax_jax.convert.meta_vqgan medmax_jax.convert.meta medmax_jax.convert.quantize
            medmax_jax.convert.native medmax_jax.convert.peft medmax_jax.convert.merge
            medmax_jax.convert.sources medmax_jax.convert.card medmax_jax.convert.run
            medmax_jax.convert.describe

programs    data.sample.build data.sample.train_tokenizer data.published data.archives
            data.eval_rows data.benchmark_command data.tfds_builders data.published_command
            data.instruct_command data.tokenize_command data.build data.prepare medmax_jax.train
            medmax_jax.train_vqgan eval.suite eval.report_page eval.report eval.opening eval.plan
            eval.stages eval.face eval eval.run medmax_jax.quickstart_page medmax_jax.quickstart
            medmax_jax.convert.torch_side medmax_jax.convert.check medmax_jax.convert.__main__
            medmax_jax.plan medmax_jax.plan.topology medmax_jax.plan.hlo medmax_jax.plan.analytic
            medmax_jax.plan.speed medmax_jax.plan.search medmax_jax.plan.compiled
            medmax_jax.plan.answers medmax_jax.plan.__main__ medmax_jax.plan.table
            medmax_jax.scaling.__main__ medmax_jax.sweep medmax_jax.sweep.axes
            medmax_jax.sweep.expand medmax_jax.sweep.workdirs medmax_jax.sweep.render
            medmax_jax.sweep.runner medmax_jax.sweep.__main__ eval.compare
"""


def modules() -> dict[str, pathlib.Path]:
    found = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: pathlib.Path) -> set[str]:
    """Names of the project's own modules that a file imports, lazily or not."""
    known, names = modules(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    own = {n for n in names if n in known}
    return {n for n in own if not any(o.startswith(n + ".") for o in own)}


def test_files_are_short():
    long = {
        str(p.relative_to(ROOT)): n
        for p in ROOT.rglob("*.py")
        if not any(part.startswith(".venv") for part in p.relative_to(ROOT).parts)
        and (n := len(p.read_text().splitlines())) > MAX_FILE_LINES
    }
    assert not long, f"over {MAX_FILE_LINES} lines: {long}; split the room"


def test_imports_run_downwards():
    layers = {"settings", "facts", "parts", "models", "laws", "machines", "layouts", "programs"}
    place = {name: i for i, name in enumerate(w for w in ORDER.split() if w not in layers)}
    found = modules()
    assert set(place) == set(found), f"give each module its place: {set(place) ^ set(found)}"
    upwards = [
        f"{name} -> {target}"
        for name, path in found.items()
        for target in imports(path) - {name}
        if place[target] > place[name]
    ]
    assert not upwards, upwards


def test_the_readme_maps_every_module():
    text = (ROOT / "README.md").read_text()
    named = text[text.index("## File map") : text.index("## Status")]
    files = {path.name for name, path in modules().items() if not name.startswith("configs")}
    assert {name for name in files if name not in named} == {"__init__.py"}


def test_training_imports_no_other_program():
    known, seen, todo = modules(), set(), ["medmax_jax.train"]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += imports(known[name])
    refused = [n for n in seen if any(n == p or n.startswith(p + ".") for p in NOT_IN_TRAINING)]
    assert not refused, refused


# Whoever imports torch or TensorFlow is written down, whether they are installed or not.
WHO_ASKS = """
import sys, traceback

class Asked:
    by = set()

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "tensorflow"):
            callers = [f.filename for f in traceback.extract_stack()[:-1]]
            callers = [c for c in callers if "importlib" not in c]
            self.by.add((name, callers[-1]))

sys.meta_path.insert(0, Asked())
import {program}
assert not {"torch", "tensorflow"} & {m.split(".")[0] for m in sys.modules}
# tensorboardX takes torch's tensors where it is installed, which here it is not
left = {(name, by) for name, by in Asked.by if "tensorboardX" not in by}
assert not left, left
"""


@pytest.mark.parametrize(
    "program",
    [
        "medmax_jax.quickstart",
        "medmax_jax.train",
        "medmax_jax.train_vqgan",
        "medmax_jax.convert.__main__",
        "medmax_jax.generate",
        "medmax_jax.plan.__main__",
        "medmax_jax.scaling.__main__",
        "medmax_jax.sweep.__main__",
        "data.prepare",
        "data.sample.build",
        "data.sample.train_tokenizer",
        "eval.run",
    ],
)
def test_programs_need_neither_torch_nor_tensorflow(program):
    code = WHO_ASKS.replace("{program}", program)
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_every_requirement_is_bounded_and_has_a_reason():
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            if line and not line.startswith(("#", "-r")):
                spec, _, reason = line.partition("#")
                assert reason.strip(), f"{name}: {line}: give the reason"
                assert "<" in spec or "==" in spec, f"{name}: {line}: give a ceiling"


def test_libtpu_is_the_one_jax_asks_for():
    asked = [r for r in importlib.metadata.requires("jax") or [] if r.startswith("libtpu")]
    version = re.search(r"==([\d.]+)\.\*", asked[0]).group(1)
    assert f"libtpu=={version}.*" in (ROOT / "requirements-dev.txt").read_text()


def test_the_locked_set_is_the_required_one():
    """requirements.lock: each requirement at a version within its bounds, everything hashed."""
    entries = re.split(r"\n(?=[a-z0-9])", (ROOT / "requirements.lock").read_text())
    locked = {}
    for entry in (e for e in entries if not e.startswith("#")):
        name, version = re.match(r"([\w.-]+)==([\w.]+)", entry).groups()
        assert "--hash=sha256:" in entry, f"{name}: no hash"
        locked[canonicalize_name(name)] = version
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if not line.startswith("#"):
            asked = Requirement(line.partition("#")[0].strip())
            assert asked.specifier.contains(locked[canonicalize_name(asked.name)]), line


def test_shipped_weights_are_small():
    files = [p for p in (ROOT / "medmax_jax" / "tiny").rglob("*") if p.is_file()]
    assert {"model.safetensors", "vqgan.safetensors", "tokenizer.json"} <= {p.name for p in files}
    assert sum(p.stat().st_size for p in files) <= MAX_SHIPPED_BYTES


# Values of the project's own that go through JSON and back; files are read by io/text_files.py.
ROUND_TRIPS = {
    "medmax_jax/io/text_files.py": 0,
    "medmax_jax/config.py": 1,
    "medmax_jax/answers.py": 1,
    "medmax_jax/tokenizer.py": 1,
    "medmax_jax/convert/hf_processor.py": 2,
    "data/instruct.py": 1,
    "eval/loop.py": 1,
}


def test_json_is_read_within_bounds():
    """json.loads has no bound on depth, takes NaN and lets the last of two equal keys win."""
    found = {}
    for path in modules().values():
        names = [n.attr for n in ast.walk(ast.parse(path.read_text()))
                 if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
                 and n.value.id == "json" and n.attr in ("loads", "load")]  # fmt: skip
        if names:
            found[str(path.relative_to(ROOT))] = len(names)
    more = {name: n for name, n in found.items() if n > ROUND_TRIPS.get(name, 0)}
    assert not more, f"read these with medmax_jax/io/text_files.py: {more}"


def test_nothing_names_a_machine():
    """Paths of one machine would break on every other."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    bad = re.compile(r"(?<![\w.])/(?:work|opt|root|home)/\w")
    for name in listed:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".txt", ".toml", ".yaml", ".json", ".jsonl", ".lock", ""}:
            assert not bad.search(path.read_text(errors="replace")), name
