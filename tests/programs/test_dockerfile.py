"""The Dockerfile: its lint, and its steps executed in a clean root, since docker may be absent."""

import fnmatch
import json
import os
import pathlib
import shlex
import shutil
import string
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
# what programs read of the machine's /etc
ETC = "resolv.conf hosts nsswitch.conf login.defs ld.so.cache ssl pip.conf xdg".split()
# $0: the root; then owner, working directory, command. The machine's /usr is read only in it, and
# all mounts end with the process.
CHROOT = """
set -e
mount --make-rprivate /
for name in usr proc dev sys; do mount --rbind /$name "$0/$name"; done
mount -o remount,bind,ro "$0/usr"
mount --bind "$0/local" "$0/usr/local"
exec chroot --userspec="$1" "$0" /bin/sh -c 'cd "$0" && exec /bin/sh -c "$1"' "$2" "$3"
"""


def stages():
    """Stage -> (its parent, its instructions)."""
    text = "".join(
        line for line in (ROOT / "Dockerfile").read_text().splitlines(True) if line[0] != "#"
    )
    found = {}
    for line in text.replace("\\\n", "").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "FROM":
            parent, _, name = rest.partition(" AS ")
            found[name] = (parent, [])
        elif word:
            found[name][1].append((word, " ".join(rest.split())))
    return found


def context():
    """The files that .dockerignore leaves, as docker reads it: the last match counts."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    rules = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in "#"
    ]

    def kept(name):
        path, keep = pathlib.PurePosixPath(name), True
        for rule in rules:
            pattern = rule.removeprefix("!")
            if any(fnmatch.fnmatch(str(p), pattern) for p in (path, *path.parents[:-1])):
                keep = rule.startswith("!")
        return keep

    return sorted(filter(kept, listed.splitlines()))


class Image:
    """A stage of the Dockerfile, built in a folder."""

    def __init__(self, folder, name):
        self.folder, self.root = folder, folder / name
        self.env, self.workdir, self.user, self.entrypoint, self.command = {}, "/", "0", [], []
        parent, steps = stages()[name]
        if parent in stages():
            base = Image(folder, parent)
            self.env, self.workdir, self.user = dict(base.env), base.workdir, base.user
            self.entrypoint, self.command = base.entrypoint, base.command
            subprocess.run(["cp", "-a", base.root, self.root], check=True)
        else:
            self._bare()
        for word, rest in steps:
            getattr(self, f"_{word.lower()}")(rest)

    def _bare(self):
        """What python:slim has: a system, and python and pip in /usr/local; no user but root."""
        for name in ("usr", "proc", "dev", "sys", "local", "etc", "root", "home"):
            (self.root / name).mkdir(parents=True)
        (self.root / "tmp").mkdir(mode=0o777)
        (self.root / "tmp").chmod(0o1777)
        for name in ("bin", "sbin", "lib", "lib64"):
            (self.root / name).symlink_to(f"usr/{name}")
        etc = self.root / "etc"
        for name in ETC:
            subprocess.run(["cp", "-a", "--dereference", f"/etc/{name}", etc], check=False)
        (etc / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
        (etc / "group").write_text("root:x:0:\n")
        (etc / "shadow").write_text("root:*:19000:0:99999:7:::\n")
        self.env = {"PATH": PATH}
        self._run("/usr/bin/python3 -m venv /usr/local")

    def start(self, command):
        """The finished process of a shell command in the image."""
        own = {n: v for n, v in os.environ.items() if n.lower().endswith("_proxy") or "PIP" in n}
        homes = [line.split(":") for line in (self.root / "etc/passwd").read_text().splitlines()]
        own["HOME"] = next(home for _, _, uid, *_, home, _ in homes if uid == self.user)
        words = ["unshare", "--mount", "sh", "-c", CHROOT, str(self.root)]
        words += [f"{self.user}:{self.user}", self.workdir, command]
        return subprocess.run(words, env=own | self.env, capture_output=True, text=True)

    def _run(self, command):
        done = self.start(command)
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-3000:]}"

    def _copy(self, words):
        *sources, target = shlex.split(words)
        target = self.root / os.path.join(self.workdir, target).lstrip("/")
        if sources[0].startswith("--from="):
            other = Image(self.folder, sources[0].removeprefix("--from="))
            subprocess.run(["cp", "-a", other.root / sources[1].lstrip("/"), target], check=True)
            return
        for name in context():
            if "." in sources or any(fnmatch.fnmatch(name, pattern) for pattern in sources):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target / name, follow_symlinks=False)

    def _env(self, words):
        for word in shlex.split(words):
            name, _, value = word.partition("=")
            self.env[name] = string.Template(value).substitute(self.env)

    def _workdir(self, path):
        self.workdir = path
        (self.root / path.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def _user(self, user):
        self.user = user

    def _entrypoint(self, words):
        self.entrypoint = json.loads(words)

    def _cmd(self, words):
        self.command = json.loads(words)

    def _label(self, words):
        assert "=" in words


def test_lint():
    subprocess.run(["hadolint", str(ROOT / "Dockerfile")], check=True, timeout=60)


def test_targets_differ_in_their_lock_alone():
    steps = {name: found[1] for name, found in stages().items()}
    for name in ("tpu", "cuda"):
        built = [(word, rest.replace(f"-{name}", "")) for word, rest in steps[f"build-{name}"]]
        assert built == steps["build-cpu"] and f"requirements-{name}.lock" in str(steps)
        copied = [(word, rest.replace(f"-{name}", "-cpu")) for word, rest in steps[name]]
        assert [step for step in copied if step[0] == "COPY"] == steps["cpu"]


def test_context_is_what_programs_need():
    names = context()
    files = {"LICENSE", "NOTICE", "pyproject.toml"}
    files |= {path.name for path in ROOT.glob("requirements*.lock")}
    assert {n.split("/")[0] for n in names} == files | {"configs", "data", "eval", "medmax_jax"}
    assert {"medmax_jax/configs", "medmax_jax/tiny/config.json", "configs/tiny.py"} <= set(names)
    assert not [name for name in names if "__pycache__" in name]


@pytest.mark.slow
def test_steps_in_a_clean_root(tmp_path, request):
    """The target cpu with this machine's Python: no python:3.12-slim is at hand."""
    allowed = ["unshare", "--mount", "mount", "--make-rprivate", "/"]
    if os.getuid() or subprocess.run(allowed, capture_output=True).returncode:
        pytest.skip("needs root and the right to mount")
    request.addfinalizer(lambda: shutil.rmtree(tmp_path))  # 2.7 GB
    image = Image(tmp_path, "cpu")
    packages = next((image.root / "venv/lib").glob("python3*")) / "site-packages"
    left = {path.name.partition("-")[0] for path in packages.iterdir()}
    assert {"jax", "numpy"} <= left and not {"pip", "setuptools", "wheel"} & left
    shown = image.start(shlex.join([*image.entrypoint, *image.command]))
    assert shown.returncode == 0 and shown.stdout.startswith("usage: medmax COMMAND"), shown.stderr
    assert image.start("id -u").stdout == "1000\n" and image.start("touch /app/x").returncode
    question = "generate --model=medmax_jax/tiny --adapter=medmax_jax/tiny_adapter"
    question += " --image=data/sample/images/film-child-1431_00.jpg --out=runs/answer"
    words = [*image.entrypoint, *question.split(), "--prompt=Does the image show the chest?"]
    answered = image.start(shlex.join(words))
    assert answered.returncode == 0 and "  -> yes\n" in answered.stdout, answered.stderr[-3000:]
    assert (image.root / "app/runs/answer/answers.jsonl").stat().st_uid == 1000
