"""The house rules: file sizes, import layers, what training reaches, and what must never be imported."""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
ROOMS = ("medmax_jax", "configs", "data", "eval")
MAX_FILE_LINES = 400
MAX_TRAIN_CLOSURE = 4_000  # lines reachable from medmax_jax/train.py by imports
MAX_TRAIN_FILES = 25

# A module may import modules of lower layers only. See docs/design.md for what each layer is.
LAYERS = [
    "configs.*",
    "medmax_jax medmax_jax.config medmax_jax.vocab medmax_jax.mesh medmax_jax.images medmax_jax.page "
    "data data.records data.mixture data.pack data.sample.* eval.stats eval.score_text",
    "medmax_jax.layers medmax_jax.attention medmax_jax.weights medmax_jax.cli medmax_jax.tokenizer "
    "medmax_jax.sampling data.loader eval.tasks eval.score_image eval.scoring",
    "medmax_jax.chameleon medmax_jax.vqgan medmax_jax.lpips medmax_jax.loss medmax_jax.optim "
    "medmax_jax.grammar",
    "medmax_jax.step medmax_jax.checkpoint medmax_jax.metrics medmax_jax.export "
    "medmax_jax.decoding medmax_jax.batching medmax_jax.generate eval.loop",
    "medmax_jax.train medmax_jax.train_vqgan medmax_jax.quickstart data.prepare eval.run eval.report eval",
]
# Same-layer imports that are part of the design: the importer may use the imported.
BESIDE = {
    "medmax_jax.layers": {"medmax_jax.attention"},
    "medmax_jax.batching": {"medmax_jax.decoding"},
    "medmax_jax.generate": {"medmax_jax.decoding", "medmax_jax.batching"},
    "eval.loop": {"medmax_jax.generate"},
    "eval.run": {"eval.report"},
    "medmax_jax.step": {"medmax_jax.metrics"},
    "medmax_jax.export": {"medmax_jax.checkpoint"},
}


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


def layer(module: str) -> int:
    for depth, line in enumerate(LAYERS):
        for pattern in line.split():
            if module == pattern or (pattern.endswith(".*") and module.startswith(pattern[:-1])):
                return depth
            if pattern.endswith(".*") and module == pattern[:-2]:
                return depth
    raise AssertionError(f"{module} has no layer: give it one in tests/test_house.py")


def test_files_are_short():
    long = {
        str(p.relative_to(ROOT)): n
        for p in ROOT.rglob("*.py")
        if not any(part.startswith(".venv") for part in p.relative_to(ROOT).parts)
        and (n := len(p.read_text().splitlines())) > MAX_FILE_LINES
    }
    assert not long, f"over {MAX_FILE_LINES} lines: {long}; split the room"


def test_imports_run_downwards():
    upwards = [
        f"{name} -> {target}"
        for name, path in modules().items()
        for target in imports(path)
        if layer(target) >= layer(name) and target not in BESIDE.get(name, ()) and target != name
    ]
    assert not upwards, upwards


def test_training_reaches_little():
    known, seen, todo = modules(), set(), ["medmax_jax.train"]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += imports(known[name])
    lines = sum(len(known[name].read_text().splitlines()) for name in seen)
    assert lines <= MAX_TRAIN_CLOSURE and len(seen) <= MAX_TRAIN_FILES, (lines, sorted(seen))


@pytest.mark.parametrize(
    "program",
    [
        "medmax_jax.quickstart",
        "medmax_jax.train",
        "medmax_jax.train_vqgan",
        "data.prepare",
        "eval.run",
    ],
)
def test_programs_need_neither_torch_nor_tensorflow(program):
    code = (
        f"import {program}, sys; "
        "bad = {m.split('.')[0] for m in sys.modules} & {'torch', 'tensorflow'}; assert not bad, bad"
    )
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
