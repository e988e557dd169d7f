"""Records of all families with scripted answers, and a judge that scores them."""

import dataclasses
import json
import pathlib
import time

import PIL.Image
from llm_server import completion

from medmax_jax.eval.records import EvalRecord, Item

ITEMS = 24
PROMPT = "Which?\nA: CT\nB: MRI\nC: PET"
CLOSED = [("Yes.", "yes"), ("normal", "no"), ("No, it is not.", "no"), ("", "yes"), ("no", "yes")]
CHOICES = [("B", "B"), ("The answer is B", "B"), ("an MRI", "B"), ("A or B", "A"), ("C", "A")]
OPENED = ["A CT.", "A CT of the chest.", "An MRI.", "refuses", "marked"]
CHATS = ["A CT.", "An MRI.", "refuses"]


def item(task, family, n, **changes):
    """Return an item: groups of two items, with the image of its number."""
    fields = dict(id=f"{task}/{n}", task=task, family=family, prompt="What?", answer="A CT.")
    fields |= dict(image=f"{n % 4}.png", group=f"g{n // 2}", template=family, facts=(), modality="")
    fields |= dict(slices=(), context="", data_class="open")
    return Item(**(fields | changes))


def record(item, text, images=(), **changes):
    """As the loop returns it."""
    answer = EvalRecord.of(item, text=text, generated=tuple(images))
    return dataclasses.replace(answer, **changes)


def content(summary):
    """Return what a program reads in summary.json."""
    return json.loads(json.dumps(summary.to_json()))


def records(folder):
    """All seven families; images 0..3 in `folder`, generated ones in its records_images."""
    write_images(folder)
    rows = [record(item("vqa_rad_closed", "vqa_closed", n, answer=a), t)
             for n, (t, a) in enumerate(CLOSED)]  # fmt: skip
    rows += [
        record(item("pmc_vqa_mcq", "vqa_mcq", n, answer=a, prompt=PROMPT), t)
        for n, (t, a) in enumerate(CHOICES)
    ]
    rows += [record(item("slake_open", "vqa_open", n), t) for n, t in enumerate(OPENED)]
    for kind, family in (("visual_chat_conversation", "visual_chat"), ("multimodal", "multimodal")):
        generated = ["records_images/0.png"] if family == "multimodal" else []
        rows += [
            record(item(kind, family, n), t, generated if n == 0 else ())
            for n, t in enumerate(CHATS)
        ]
    words = ["A CT of the chest", "An MRI of the head", "A slide", "A CT of the chest"]
    rows += [
        record(item("captioning_pmc_oa", "captioning", n, answer=words[n]), words[n // 2])
        for n in range(4)
    ]
    rows += [
        record(
            item("image_generation_pmc_oa", "image_generation", n, prompt=words[n], answer=""),
            "",
            [f"records_images/{n}.png"] if n < 3 else [],
        )
        for n in range(4)
    ]
    return rows


def write_images(folder):
    """Write four input images, one of them with a palette, and four generated ones."""
    (folder / "records_images").mkdir(parents=True, exist_ok=True)
    for n, color in enumerate(("red", "green", "blue", "white")):
        image = PIL.Image.new("RGB", (40, 48), "black")
        image.paste(color, (5 * n, 4 * n, 5 * n + 18, 4 * n + 20))
        (image.convert("P") if n == 1 else image).save(folder / f"{n}.png")
        image.rotate(90 * (n % 2)).save(folder / "records_images" / f"{n}.png")


def judge(request, n=0):
    """Right if the answer begins as the reference, in the form asked for; refuses "refuses"."""
    text = request["messages"][-1]["content"]
    if request["messages"][0]["content"].startswith("You "):
        return _ours(json.loads(text))
    if "refuses" in text:
        return completion("I'm sorry, I can't help with that.")
    if "Correctness" in text:
        answer = text.split("to be determined: ")[1].split("\n")[0]
        mark = "**Correctness:** 1" if answer == "marked" else f"Correctness: {right(answer)}"
        return completion(mark)
    answer = text.split("[Assistant 2]\n")[1]
    return completion("8 8\nAlike." if "a ct" in answer.lower() else "8 4\nThe first.")


def right(answer):
    return int(answer.lower().startswith("a ct"))


def _ours(request):
    answers = [request.get("answer"), request.get("first"), request.get("second")]
    if "refuses" in answers:
        return completion("I'm sorry, I can't help with that.")
    if "first" in request:
        scores = {name: 8 if right(request[name]) else 4 for name in ("first", "second")}
        return completion(json.dumps({"case": request["case"]} | scores))
    return completion(
        json.dumps({"case": request["case"], "correct": bool(right(request["answer"]))})
    )


def write_items(folder: pathlib.Path, count: int = ITEMS, **changes) -> pathlib.Path:
    """Write closed questions about small images, two about each."""
    folder.mkdir(exist_ok=True)
    rows = []
    for n in range(count):
        image = f"{n // 2}.png"
        PIL.Image.new("RGB", (16, 16), (n, 0, 0)).save(folder / image)
        rows.append(
            dict(
                task_name="vqa_rad", question_type="closed", prompt=f"Is it number {n}?",
                answer="yes" if n % 3 else "no", image_path=image, id=f"q{n}", data_class="open",
            ) | changes
        )  # fmt: skip
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def says_yes_after(seconds: float):
    """Return what answers a request for `serving`, after some seconds."""

    def slowly(request: dict, n: int) -> bytes:
        time.sleep(seconds)
        return completion("yes")

    return slowly
