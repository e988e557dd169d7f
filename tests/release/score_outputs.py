"""1,200 or 1,000 raw outputs for each published scoring, the same on every machine.

    scoring               {answer, text, ..}: what is scored
    mediconfusion         600 pairs: the option of each image, and both texts in turn
    smmile_open           a reference and a response
    smmile_mcq            five options, the letter of the right one, a response
    deeptumorvqa_mcq, deeptumorvqa_numeric, deeptumorvqa_closed, deeptumorvqa_open
    medgen_bench          1,000 pairs of images: width, height and the seeds of their pixels

Each is in part a plain answer, in part a form that the published code looks for, in part pieces
that are put together at random.
"""

import random
from collections.abc import Sequence
from typing import Any

SEED = 22
COUNT = 1_200
ANSWERS = (
    *("Black.", "Hydropneumothorax, left", "Yes, Charcot's foot, left.", "None", "NA", "nan"),
    *("Melanoma", "T2-weighted MRI", "3.5 cm", "Grade II/III", "left lower lobe", "No", "ß-cell"),
)
PIECES = (
    "A B C D E a b . : , ) ( * ** _ <answer> </answer> <think> </think> \n \n\n \t Answer Answer: "
    "The answer is answer: option choice select chose choose correct best final left Black "
    "Hydropneumothorax yes no Yes, No. normal not none 12 3.5 -4 1,200 0 1e3 .5 90% mL cm3 N/A I "
    '(" ") ": ").'
).split(" ")
FORMS = (  # {x}: a letter, {t}: a text, {y}: another letter
    '{x}|{x}.|{x}:|.{x}|.{x}:|({x})|("{x}")|("{x}":|("{x}").|{x}")|{x}\n|\n{x}|{x} {y}|'
    "{x}. {t}|The answer is {x}.|the answer is: {x} because|**Answer:** {x}|**Answer**: {x}. {t}|"
    "*Answer*: {x}|Answer: {x}|The correct answer is {x}|{x} is the correct answer|option {x}|"
    "I chose {x}. It fits|choose {x} |final answer: {x}|final answer {x}|*{x}*|_{x}_|<answer>{x}|"
    "<answer>{x}. {t}</answer>|<think>{y}</think><answer>{x}</answer>|<answer></answer>{x}|"
    "<answer>{t}\n\n{x}|<answer>12</answer>|<think>{x}|<think>{y}</think>{x}|{t}|It is {t}|x|"
    "Best: {x}|select {x}|I think that {t} fits, not {y}|<answer> {x}\n</answer> <answer>{y}"
).split("|")
NUMBERS = (
    "{n}|{n} mL|about {n}|{n}.|The volume is {n} mL.|{n} of 20|{m} to {n}|-{n}|{n},000|<think>{m}"
    "</think>{n}|<think>{m}|none|no {m} but {n}|T2 shows {n}|{n}%|.{n}|{n}e1|{n}.{m}|{n} {n}"
).split("|")
YES_NO = (
    "yes|no|Yes.|No, it is not|normal|None|not seen|nothing|yesterday|It is yes|I say no|yes and no"
    "|<think>yes</think>no|<think>no|Yes</think>|unknown|maybe| YES |NO LESION|The answer is no."
).split("|")


def images(row: dict[str, Any]) -> tuple[Any, Any]:
    """Return (generated, reference) of a row of medgen_bench: blocks, equal or with noise.

    Every fourth generated image has another size.
    """
    import PIL.Image

    rng = random.Random(row["seed"])
    width, height = row["size"]
    blocks = [[int(rng.random() * 256) for _ in range(3)] for _ in range(4)]
    pixels = [
        bytes(blocks[2 * (y * 2 // height) + x * 2 // width])
        for y in range(height)
        for x in range(width)
    ]
    reference = PIL.Image.frombytes("RGB", (width, height), b"".join(pixels))
    noise = row["noise"]
    changed = bytes(
        min(255, max(0, value + int((rng.random() - 0.5) * 2 * noise)))
        for value in b"".join(pixels)
    )
    generated = PIL.Image.frombytes("RGB", (width, height), changed)
    if row["seed"] % 4 == 3:
        generated = generated.resize(row["other"], PIL.Image.Resampling.NEAREST)
    return generated, reference


def rows(name: str) -> list[dict[str, Any]]:
    """Return what one scoring reads."""
    rng = random.Random(f"{SEED} {name}")

    def one(found: Sequence):
        return found[int(rng.random() * len(found))]  # random() alone is promised to stay the same

    def noise() -> str:
        return one(("", " ", " ", "\n")).join(one(PIECES) for _ in range(int(rng.random() * 9)))

    def choice(letters: str, answer: str, options: Sequence[str]) -> str:
        kind = rng.random()
        x = answer if rng.random() < 0.6 else one(letters)
        if kind < 0.1:
            return x
        if kind < 0.75:
            return one(FORMS).format(x=x, y=one(letters), t=options[letters.index(x)])
        return noise()

    if name == "medgen_bench":
        sizes = (7, 8, 12, 16, 31)
        return [
            dict(
                size=[one(sizes), one(sizes)], other=[one(sizes), one(sizes)], seed=n, noise=n % 60
            )
            for n in range(1_000)
        ]
    made = []
    for number in range(COUNT):
        if name == "mediconfusion":
            answer = "AB"[number % 2] if number % 4 < 2 else "BA"[number % 2]
            made.append(dict(answer=answer, text=choice("AB", answer, ("A cyst", "A mass"))))
        elif name in ("smmile_mcq", "deeptumorvqa_mcq"):
            letters = "ABCDE" if name == "smmile_mcq" else "ABCD"
            start = int(rng.random() * len(ANSWERS))
            options = [ANSWERS[(start + n) % len(ANSWERS)] for n in range(len(letters))]
            answer = one(letters)
            text = choice(letters, answer, options)
            made.append(dict(answer=answer, options=options, text=text))
        elif name == "deeptumorvqa_numeric":
            answer = one(("12", "90.5", "0", "-4", "1,200", "none", "100 mL", "3", "7.25"))
            plain = answer.split(" ")[0] if rng.random() < 0.5 else one(("11", "95", "0", "3.1"))
            text = one(NUMBERS).format(n=plain, m=one(("2", "50", "0")))
            made.append(dict(answer=answer, text=text if rng.random() < 0.85 else noise()))
        elif name == "deeptumorvqa_closed":
            text = one(YES_NO) if rng.random() < 0.85 else noise()
            made.append(dict(answer=one(("yes", "no", "Yes", "No.")), text=text))
        else:
            answer, other = one(ANSWERS), one(ANSWERS)
            forms = ("{0}", "{0}", "{0}.", " {0}\n", "The {0}", "<think>{1}</think> {0}", "{1}")
            text = one(forms).format(answer, other)
            text = one((text, text, text.upper(), text.replace(",", " -  "), text.replace(".", "")))
            made.append(dict(answer=answer, text=text if rng.random() < 0.9 else noise()))
    return made
