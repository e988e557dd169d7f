"""What no linter checks of this codebase: sizes, folders, what training reaches, one name per file.

The direction of imports between packages is a contract of import-linter in pyproject.toml.
"""

import ast
import importlib.metadata
import pathlib
import re
import subprocess
import sys

import language
import module_map
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).parent.parent
LINKS = ("configs", "data", "eval")  # real folders at the top, linked into medmax_jax/
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
LONG_FUNCTIONS = {  # may shrink, never grow; no new ones
    "medmax_jax/config.py:_check_sizes": 99,
}
FOLDER_SIZES = range(3, 14)  # modules of a folder, without __init__ and __main__
SMALL_MODULE_LINES = 60
MAX_SHIPPED_BYTES = 25_000_000  # of medmax_jax/tiny, all files together
MAX_ADAPTER_BYTES = 500_000  # of medmax_jax/tiny_adapter
MAX_CORE_LINES = 2_500

# What a reader of one training step reads.
CORE = (
    "medmax_jax/train.py",
    *(f"medmax_jax/training/{name}.py" for name in ("batch", "loss", "cross_entropy", "step")),
    "medmax_jax/training/optimizer.py",
    *(f"medmax_jax/models/{name}.py" for name in ("layers", "attention", "chameleon")),
    "data/loader.py",
    "data/packing/pack.py",
)
# medmax_jax.train reaches these and no other.
TRAINING_REACHES = (
    *("config", "config_fields", "sharding", "flops", "cli", "arguments", "environment"),
    *("models", "training"),
    *("checkpoints", "io", "storage"),
    "endpoints",  # the guard of data that W&B would receive
    *("generation", "configs", "data.loader", "data.packing", "data.records", "data.mixture"),
)
# Programs that import against the direction eval -> data -> medmax_jax -> configs.
EXCEPTIONS = {
    "medmax_jax/train.py": {"data"},
    "medmax_jax/quickstart.py": {"data", "eval"},
    "medmax_jax/convert/__main__.py": {"data"},
    "medmax_jax/demo/page.py": {"data"},
    "medmax_jax/demo/uploads.py": {"data"},
    "data/prepare.py": {"eval"},
}
PROGRAMS = (
    *(f"medmax_jax.{name}" for name in ("quickstart", "train", "train_vqgan", "generate")),
    *(f"medmax_jax.{name}" for name in ("convert", "plan", "scaling", "sweep", "demo")),
    *("data.prepare", "data.objective", "data.tfds_builders", "data.sample.build"),
    *("data.sample.train_tokenizer", "eval.run", "eval.report", "eval.compare", "eval.suite"),
    "eval.rescore",
    *("eval.reproduce", "eval.leaderboard", "eval.export"),
)


def modules() -> dict[str, pathlib.Path]:
    """Each module by its import name."""
    found = {}
    for path in module_map.modules():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[f"medmax_jax.{name}" if name.split(".")[0] in LINKS else name] = path
    return found


def imports(path: pathlib.Path) -> set[str]:
    """Own modules that a file imports, lazily or not, without imports for types alone."""
    known, names, tree = modules(), set(), ast.parse(path.read_text())
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If)]
    typing = [b for b in blocks if isinstance(b.test, ast.Name) and b.test.id == "TYPE_CHECKING"]
    unused = {id(node) for block in typing for node in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in unused:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    own = {n for n in names if n in known}
    return {n for n in own if not any(o.startswith(n + ".") for o in own)}


def short(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def test_files_are_short():
    listed = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    counts = {name: len((ROOT / name).read_text().splitlines()) for name in listed}
    long = {name: count for name, count in counts.items() if count > MAX_FILE_LINES}
    assert not long, f"over {MAX_FILE_LINES} lines: {long}; split by subject"


def test_functions_are_short():
    found = {}
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                name = f"{short(path)}:{node.name}"
                if lines > LONG_FUNCTIONS.get(name, MAX_FUNCTION_LINES):
                    found[name] = lines
    assert not found, f"over {MAX_FUNCTION_LINES} lines: {found}; split them"


def test_folders_can_be_read():
    sizes = {}
    for path in modules().values():
        folder = short(path.parent)
        own = path.name not in ("__init__.py", "__main__.py")
        sizes[folder] = sizes.get(folder, 0) + own
    sizes.pop("configs")  # settings, one file a run
    wrong = {f: n for f, n in sizes.items() if n not in FOLDER_SIZES}
    assert not wrong, f"3 to 13 modules in a folder, not {wrong}"


def test_small_modules_have_two_readers():
    """A module under 60 lines has two importers, or is a program."""
    readers: dict[str, int] = {}
    others = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    for path in [*modules().values(), *others]:
        for name in imports(path):
            readers[name] = readers.get(name, 0) + 1
    lonely = [
        short(path)
        for name, path in modules().items()
        if not name.startswith("medmax_jax.configs")
        and path.name != "__init__.py"
        and len((text := path.read_text()).splitlines()) < SMALL_MODULE_LINES
        and 'if __name__ == "__main__"' not in text
        and readers.get(name, 0) < 2
    ]
    assert not lonely, f"{lonely}: fold into the one module that imports it"


def test_programs_alone_import_against_the_direction():
    """eval -> data -> medmax_jax -> configs; also import-linter's layers, which let programs be."""
    rank = {"configs": 0, "medmax_jax": 1, "data": 2, "eval": 3}
    found: dict[str, set[str]] = {}
    for path in modules().values():
        room = path.relative_to(ROOT).parts[0]
        for target in imports(path):
            parts = target.split(".")
            other = parts[1] if len(parts) > 1 and parts[1] in LINKS else "medmax_jax"
            if rank[other] > rank[room]:
                found.setdefault(short(path), set()).add(other)
    assert found == EXCEPTIONS


def test_training_reaches_what_it_needs_alone():
    known, seen, todo = modules(), set(), ["medmax_jax.train"]
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += imports(known[name])
    allowed = tuple(f"medmax_jax.{name}" for name in TRAINING_REACHES)
    packages = {"medmax_jax", "medmax_jax.train", "medmax_jax.data"}
    refused = [
        n for n in seen - packages if not any(n == a or n.startswith(a + ".") for a in allowed)
    ]
    lines = sum(len(known[n].read_text().splitlines()) for n in seen)
    print(f"train.py reaches {len(seen)} modules, {lines} lines")
    assert not refused, refused


def test_the_core_path_is_short():
    lines = sum(len((ROOT / name).read_text().splitlines()) for name in CORE)
    assert lines <= MAX_CORE_LINES


def test_old_folders_are_links():
    for name in LINKS:
        link = ROOT / "medmax_jax" / name
        assert link.is_symlink() and link.readlink() == pathlib.Path("..") / name, (
            f"{link} must be a relative link to ../{name}; git clone with core.symlinks=true"
        )


def test_the_wheel_has_one_top_level_name():
    setuptools = pytest.importorskip("setuptools")
    found = setuptools.find_packages(str(ROOT), include=["medmax_jax*"])
    assert {name.split(".")[0] for name in found} == {"medmax_jax"}
    assert {"medmax_jax.data.records", "medmax_jax.eval.metrics", "medmax_jax.configs"} <= set(
        found
    )


def test_the_list_of_modules_is_fresh():
    fix = "python -m tests.support.module_map --write"
    assert module_map.PAGE.read_text() == module_map.render(), fix


# Each program, up to its --help: who asks for torch or TensorFlow, installed or not, and which
# file is loaded under two names.
WATCH = """
import os, pathlib, runpy, sys, traceback

class Asked:
    by = set()

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "tensorflow"):
            callers = [f.filename for f in traceback.extract_stack()[:-1]]
            callers = [c for c in callers if "importlib" not in c]
            self.by.add((name, callers[-1]))

sys.meta_path.insert(0, Asked())
sys.path.insert(0, os.getcwd())
import flax.nnx, grain, jax, matplotlib, ml_collections, orbax.checkpoint  # once for all programs

def check(program):
    sys.argv = [program, "--help"]
    try:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert end.code in (None, 0), end.code
    assert not {"torch", "tensorflow"} & {m.split(".")[0] for m in sys.modules}
    # tensorboardX takes torch's tensors where it is installed, which here it is not
    left = {(name, by) for name, by in Asked.by if "tensorboardX" not in by}
    assert not left, left
    names = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file and pathlib.Path(file).resolve().is_relative_to(os.getcwd()):
            names.setdefault(pathlib.Path(file).resolve(), {})[id(module)] = name
    twice = [list(each.values()) for each in names.values() if len(each) > 1]
    assert not twice, twice
    assert len(names) > 1 or program in ("data.sample.build",), names

for program in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            check(program)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{program} failed")
"""


def test_programs_need_no_torch_and_load_no_file_twice():
    done = subprocess.run(
        [sys.executable, "-c", WATCH, *PROGRAMS], cwd=ROOT, timeout=300, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


# Values of the project's own that go through JSON and back; files are read by io/text_files.py.
ROUND_TRIPS = {
    "medmax_jax/io/text_files.py": 0,
    "medmax_jax/config.py": 1,
    "medmax_jax/generation/output_files.py": 1,
    "medmax_jax/models/tokenizer.py": 1,
    "medmax_jax/convert/hf.py": 2,
    "data/instruct/curation.py": 1,
    "eval/pipeline/inference.py": 1,
}


def test_json_is_read_within_bounds():
    """json.loads has no bound on depth, takes NaN and lets the last of two equal keys win."""
    found = {}
    for path in modules().values():
        names = [n.attr for n in ast.walk(ast.parse(path.read_text()))
                 if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)
                 and n.value.id == "json" and n.attr in ("loads", "load")]  # fmt: skip
        if names:
            found[short(path)] = len(names)
    more = {name: n for name, n in found.items() if n > ROUND_TRIPS.get(name, 0)}
    assert not more, f"read these with medmax_jax/io/text_files.py: {more}"


def test_every_requirement_is_bounded_and_has_a_reason():
    for name in (
        *("requirements.txt", "requirements-demo.txt"),
        *("requirements-dev.txt", "requirements-docs.txt"),
    ):
        for line in (ROOT / name).read_text().splitlines():
            if line and not line.startswith(("#", "-r")):
                spec, _, reason = line.partition("#")
                assert reason.strip(), f"{name}: {line}: give the reason"
                assert "<" in spec or "==" in spec, f"{name}: {line}: give an upper bound"


def test_libtpu_is_the_one_jax_asks_for():
    asked = [r for r in importlib.metadata.requires("jax") or [] if r.startswith("libtpu")]
    version = re.search(r"==([\d.]+)\.\*", asked[0]).group(1)
    assert f"libtpu=={version}.*" in (ROOT / "requirements-dev.txt").read_text()


@pytest.mark.parametrize("kind", ["", "-tpu", "-cuda"])
def test_the_locked_set_is_the_required_one(kind):
    """requirements*.lock: each requirement at a version within its bounds, everything hashed."""
    entries = re.split(r"\n(?=[a-z0-9])", (ROOT / f"requirements{kind}.lock").read_text())
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
    files = list((ROOT / "medmax_jax" / "tiny_adapter").iterdir())
    assert sum(p.stat().st_size for p in files) <= MAX_ADAPTER_BYTES


def test_language_has_no_forbidden_word():
    """The words of tests/support/language.py and what to write instead are in CONTRIBUTING.md."""
    assert language.findings(language.tracked()) == []


def test_language_is_read_in_code_and_prose(tmp_path, monkeypatch):
    monkeypatch.setattr(language, "ROOT", tmp_path)
    # Verbatim: part of the data.
    lines = [
        '"""A Picture."""',
        "picture_path = 1  # nobody",
        language.VERBATIM,
        'PROMPT = "Please describe this picture."',
        'LABEL = "two lanes"',
        'KEY = "by_picture"',
        "doublesize = largePictures = 2",
    ]
    (tmp_path / "a.py").write_text("\n".join(lines) + "\n")
    (tmp_path / "a.md").write_text("Fine.\nMend it.\n")
    # Verbatim: part of the data.
    assert language.findings(["a.py", "a.md"]) == [
        "a.md:2: Mend", "a.py:1: Picture", "a.py:2: picture_path", "a.py:2: nobody",
        "a.py:5: lanes", "a.py:6: picture", "a.py:7: largePictures",
    ]  # fmt: skip


def test_nothing_names_a_machine():
    """Paths of one machine would break on every other."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    bad = re.compile(r"(?<![\w.])/(?:work|opt|root|home)/\w")
    for name in listed:
        path = ROOT / name
        if path.is_dir():  # a link to a folder, whose files are listed themselves
            continue
        if path.suffix in {
            ".py",
            ".md",
            ".txt",
            ".toml",
            ".yaml",
            ".json",
            ".jsonl",
            ".ipynb",
            ".lock",
            "",
        }:
            assert not bad.search(path.read_text(errors="replace")), name
