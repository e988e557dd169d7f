"""Records of all families with scripted answers, and a judge of them."""

import json

import PIL.Image
from llm_server import completion

from medmax_jax.eval.tasks import items

PROMPT = "Which?\nA: CT\nB: MRI\nC: PET"
CLOSED = [("Yes.", "yes"), ("normal", "no"), ("No, it is not.", "no"), ("", "yes"), ("no", "yes")]
CHOICES = [("B", "B"), ("The answer is B", "B"), ("an MRI", "B"), ("A or B", "A"), ("C", "A")]
OPENED = ["A CT.", "A CT of the chest.", "An MRI.", "refuses", "marked"]
CHATS = ["A CT.", "An MRI.", "refuses"]


def item(task, family, n, **changes):
    """Return item `n` of groups of two, with one of four images."""
    fields = dict(id=f"{task}/{n}", task=task, family=family, prompt="What?", answer="A CT.")
    fields |= dict(image=f"{n % 4}.png", group=f"g{n // 2}", template=family, facts=(), modality="")
    fields |= dict(slices=(), context="", data_class="open")
    return items.Item(**(fields | changes))


def record(question, text, images=(), **changes):
    """Return the record that an evaluation writes for an item."""
    fields = json.loads(json.dumps(vars(question)))
    return (
        fields | dict(text=text, images=list(images), codes=[], predicted_modality=None) | changes
    )


def records(folder):
    """Return records of all seven families, with their images in `folder`."""
    save_images(folder)
    all_records = [record(item("vqa_rad_closed", "vqa_closed", n, answer=a), t)
             for n, (t, a) in enumerate(CLOSED)]  # fmt: skip
    all_records += [
        record(item("pmc_vqa_mcq", "vqa_mcq", n, answer=a, prompt=PROMPT), t)
        for n, (t, a) in enumerate(CHOICES)
    ]
    all_records += [record(item("slake_open", "vqa_open", n), t) for n, t in enumerate(OPENED)]
    for kind, family in (("visual_chat_conversation", "visual_chat"), ("multimodal", "multimodal")):
        generated = ["records_images/0.png"] if family == "multimodal" else []
        all_records += [
            record(item(kind, family, n), t, generated if n == 0 else ())
            for n, t in enumerate(CHATS)
        ]
    captions = ["A CT of the chest", "An MRI of the head", "A slide", "A CT of the chest"]
    all_records += [
        record(item("captioning_pmc_oa", "captioning", n, answer=captions[n]), captions[n // 2])
        for n in range(4)
    ]
    all_records += [
        record(
            item("image_generation_pmc_oa", "image_generation", n, prompt=captions[n], answer=""),
            "",
            [f"records_images/{n}.png"] if n < 3 else [],
        )
        for n in range(4)
    ]
    return all_records


def save_images(folder):
    """Write four images to be shown, one of them with a palette, and four generated ones."""
    (folder / "records_images").mkdir(parents=True, exist_ok=True)
    for n, color in enumerate(("red", "green", "blue", "white")):
        image = PIL.Image.new("RGB", (40, 48), "black")
        image.paste(color, (5 * n, 4 * n, 5 * n + 18, 4 * n + 20))
        (image.convert("P") if n == 1 else image).save(folder / f"{n}.png")
        image.rotate(90 * (n % 2)).save(folder / "records_images" / f"{n}.png")


def judge(request, n=0):
    """Reply that an answer is right if it begins as the reference; refuse to judge "refuses"."""
    content = request["messages"][-1]["content"]
    if request["messages"][0]["content"].startswith("You "):
        return _verdict(json.loads(content))
    if "refuses" in content:
        return completion("I'm sorry, I can't help with that.")
    if "Correctness" in content:
        answer = content.split("to be determined: ")[1].split("\n")[0]
        mark = "**Correctness:** 1" if answer == "marked" else f"Correctness: {right(answer)}"
        return completion(mark)
    answer = content.split("[Assistant 2]\n")[1]
    return completion("8 8\nAlike." if "a ct" in answer.lower() else "8 4\nThe first.")


def right(answer):
    return int(answer.lower().startswith("a ct"))


def _verdict(fields):
    answers = [fields.get("answer"), fields.get("first"), fields.get("second")]
    if "refuses" in answers:
        return completion("I'm sorry, I can't help with that.")
    if "first" in fields:
        scores = {name: 8 if right(fields[name]) else 4 for name in ("first", "second")}
        return completion(json.dumps({"case": fields["case"]} | scores))
    return completion(
        json.dumps({"case": fields["case"], "correct": bool(right(fields["answer"]))})
    )
