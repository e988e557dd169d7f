"""Scores raw_outputs.py with the MedMax release's own functions; writes verdicts.json.

python tests/release/run_release.py --release CHECKOUT [--write]     (a checkout at 20b7055; 1 min)

The release is imported as it is. Stubs replace what it would load, request or generate: the
gated rows, the model (raw outputs), the judge (replies) and BiomedCLIP (cosines). One thing is
fixed, because it cannot run otherwise: load_dataset returns rows also without a split. Without
--write it checks that verdicts.json agrees with the release.
"""

import argparse
import contextlib
import enum
import hashlib
import importlib
import io
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import raw_outputs
import scripts

VERDICTS = Path(__file__).parent / "verdicts.json"
COMMIT = "20b7055"


class Rows(list):
    """A data set as the release uses one."""

    def filter(self, keep):
        return Rows(row for row in self if keep(row))

    def select(self, numbers):
        return Rows(self[n] for n in numbers)

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)


class World:
    """What the stand-ins give: rows of the data set, answers, replies, cosines, in turn."""

    rows: Rows
    answers: Any
    replies: Any
    cosines: Any
    messages: list


def install(release: Path) -> None:
    """Puts stand-ins into sys.modules, and the release on the path."""

    def module(name: str, **members) -> None:
        sys.modules[name] = types.ModuleType(name)
        for key, value in members.items():
            setattr(sys.modules[name], key, value)

    def load_dataset(name, split=None):
        return World.rows

    module("datasets", load_dataset=load_dataset)
    module("tqdm", tqdm=lambda x, **_: x)
    module("torch", Tensor=object, no_grad=contextlib.nullcontext)
    module("transformers")
    module("openai", OpenAI=lambda **_: None)
    module("tiktoken", encoding_for_model=lambda name: None)
    module("shortuuid", uuid=lambda: "answer-id")
    module("open_clip", create_model_from_pretrained=None, get_tokenizer=None)
    module("inference")
    module("inference.inference_utils", chameleon_generate=lambda *_, **__: next(World.answers))
    sys.path.insert(0, str(release))


def patch(name: str) -> types.ModuleType:
    """A module of the release with the judge and BiomedCLIP replaced."""
    found = importlib.import_module(f"evaluation.{name}")

    class Judge:
        def __init__(self, model_id):
            assert model_id == "gpt-4o-mini"

        def infer(self, messages):
            World.messages.append(messages)
            reply = next(World.replies)
            # eval_utils sends one message list, the others a list of such lists
            return [reply] if isinstance(messages[0], list) else reply

    class Similarity:
        def calculate_similarity(self, one, two, kind: enum.Enum):
            return next(World.cosines)

    utils = importlib.import_module("evaluation.eval_utils")
    utils.GPT = Judge
    if hasattr(found, "GPT"):
        found.GPT = Judge
    found.get_biomed_clip_model = Similarity
    return found


def row(**changes) -> dict[str, str]:
    fields = dict(
        task_name="t", question_type="closed", prompt="q", answer="yes", image_path="a.png"
    )
    return fields | changes


def vqa(kind: str, pairs: list[tuple[str, str]]) -> tuple[str, dict]:
    """One character a sample: 1, 0, or - where the release dropped it; and its results."""
    World.rows = Rows(
        row(question_type=kind, prompt=str(n), answer=a) for n, (a, _) in enumerate(pairs)
    )
    # the judge's replies are what varies for open questions, the model's answers for the others
    World.answers = iter([["Said"] if kind == "open" else [raw] for _, raw in pairs])
    World.replies, World.messages = iter([raw for _, raw in pairs]), []
    with tempfile.TemporaryDirectory() as out:
        processor = importlib.import_module("evaluation.eval_utils").sft_prompt_processor
        patch("vqa").run_vqa_eval("t", kind, None, processor, out, "x", "d")
        logs = json.loads(Path(out, "logs/x.json").read_text())[f"t_{kind}"]
        results = json.loads(Path(out, "results/x.json").read_text())[f"t_{kind}"]
    known = {int(log["question"]): "1" if log["is_correct"] else "0" for log in logs}
    return "".join(known.get(n, "-") for n in range(len(pairs))), results


def mm_out(replies: list[str], outputs: list[list[str]], cosines: list[float]) -> dict:
    World.rows = Rows(row(task_name="mm_out", prompt="Explain.", answer="It is.") for _ in replies)
    World.answers, World.replies = iter(outputs), iter(replies)
    World.cosines, World.messages = iter(cosines), []
    with tempfile.TemporaryDirectory() as out:
        processor = importlib.import_module("evaluation.eval_utils").sft_prompt_processor
        patch("mm_out").run_mm_out_eval(None, processor, out, "x", "d")
        return json.loads(Path(out, "results/x.json").read_text())["mm_out"]


def relative(reply: str) -> list[float] | None:
    """The release's numbers of one reply alone, None where it stops."""
    with contextlib.suppress(ValueError, ZeroDivisionError):
        patch("mm_out")
        module = sys.modules["evaluation.mm_out"]
        World.replies, World.messages = iter([reply]), []
        found = mm_out([reply], [["text"]], [])
        first, second = (
            module.get_avg([x]) for x in reply.strip().split("\n")[0].strip().split(" ")
        )
        return [first, second, found["text_score"]]
    return None


def visual_chat() -> dict:
    rows = scripts.CHAT
    World.rows = Rows(
        row(
            task_name="visual_chat",
            question_type=kind,
            prompt="What?\n<image>",
            answer=repr(answer),
        )
        for kind, answer, _ in rows
    )
    World.answers = iter([["A CT."] for _ in rows])
    World.replies, World.messages = iter([reply for *_, reply in rows]), []
    with tempfile.TemporaryDirectory() as out:
        patch("visual_chat").run_visual_chat_eval(None, lambda *_: True, out, "x", "d")
        return json.loads(Path(out, "results/x.json").read_text())["visual_chat"]


def image_text(task: str, cosines: list[float]) -> dict:
    names = ("pmc_oa", "quilt", "report")
    World.rows = Rows(row(task_name=task, question_type=n) for n in names for _ in cosines)
    World.answers = iter([["x.png"]] * (3 * len(cosines)))
    scored = cosines[:100] if task == "image_generation" else cosines
    World.cosines = iter([c * k for k in (1.0, 0.5, 0.25) for c in scored])
    with tempfile.TemporaryDirectory() as out:
        module = patch("image_text")
        processor = importlib.import_module("evaluation.eval_utils").sft_prompt_processor
        getattr(module, f"run_{task}_eval")(None, processor, out, "x", "d")
        return json.loads(Path(out, "results/x.json").read_text())[task]


def digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def verdicts() -> dict[str, Any]:
    raw = raw_outputs.rows()
    found: dict[str, Any] = {"release": COMMIT, "inputs": digest(raw), "tasks": {}, "messages": {}}
    for kind in ("closed", "mcq", "open"):
        found[kind], found["tasks"][kind] = vqa(kind, raw[kind])
    found["messages"]["open"] = digest(World.messages)
    found["relative"] = [relative(reply) for _, reply in raw["relative"]]
    good = [r for (_, r), v in zip(raw["relative"], found["relative"], strict=True) if v]
    good = [r for r in good if "nan" not in r and "inf" not in r][: len(scripts.OUTPUTS)]
    found["tasks"]["mm_out"] = mm_out(good, scripts.OUTPUTS, scripts.COSINES)
    found["messages"]["mm_out"] = digest(World.messages)
    found["tasks"]["visual_chat"] = visual_chat()
    found["messages"]["visual_chat"] = digest(World.messages)
    for task in ("image_captioning", "image_generation"):
        found["tasks"][task] = image_text(task, scripts.COSINES)
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--release", type=Path, required=True)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("OAI_KEY", "none")
    install(args.release)
    with contextlib.redirect_stdout(io.StringIO()):
        found = verdicts()
    text = json.dumps(found, separators=(",", ":")) + "\n"
    if args.write:
        VERDICTS.write_text(text)
    same = VERDICTS.read_text() == text
    total = sum(len(found[kind]) for kind in raw_outputs.COUNTS)
    print(f"{total} verdicts of the release: {'as committed' if same else 'NOT as committed'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
