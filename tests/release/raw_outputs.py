"""5,600 raw outputs, the same on every machine: what models and judges wrote, edges, and noise.

    closed 1,600 and mcq 1,600   (answer, what the model wrote)
    open   1,400                 (answer, what the judge replied)
    relative 1,000               (reference score, what the judge replied)

A third of each is real (real.jsonl: answers of the shipped tiny model and of the sample's
references), a third is edges put together from pieces, a third is random characters.
"""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

SEED = 20
COUNTS = {"closed": 1_600, "mcq": 1_600, "open": 1_400, "relative": 1_000}
HERE = Path(__file__).parent
WORDS = (
    "yes no Yes No YES NO normal None Not unknown noted diagnosis abnormal now nodule eyes "
    "yesterday nothing neither nor both maybe the a The A B C D E I is it answer: option ( ) . , ; "
    "** ``` \n \t ( (A) B. C: D) b c d Ä ß İ K 是 不 0 1 x-ray CT MRI lung There cannot determine "
    "evidence of idea No, Yes, yes. no."
).split(" ")
VERDICTS = (
    "Correctness: 1|Correctness: 0|**Correctness:** 1|Correctness:1|correctness: 1|Correctness: 10|"
    "Correctness: 0.5|1|0|Correctness: your answer|Correctness: 1\n\nCorrectness: 0|I'm sorry|"
    'Correctness : 1|Correctness:  1|{"correct": true}|Correct|Incorrect|"Correctness: 0"|Output:|'
    "The answer is a good match.|\n|Correctness: 0\nBecause Correctness: 1 needs more."
).split("|")
PAIRS = (
    "8 7|8  7|8, 7|Assistant 1: 8|Assistant 1: 8 Assistant 2: 7|8 7\nBoth are good.|9 9.5|0 5|5 0|"
    "10 10|1 10|8/10 7/10|8\t7|7|8 7 6|eight seven|I cannot rate these.|\n8 7|  8 7  \nok|"
    "nan 5|5 inf|-3 4|1_0 5|٣ ٤|8 7.|**8 7**|8 7\r\nfine|6 7 |.5 2."
).split("|")
LETTERS = "ABCD"


def rows() -> dict[str, list[tuple[str, str]]]:
    """Kind -> (answer, raw output)."""
    rng = random.Random(SEED)

    def one(found: Sequence):
        return found[int(rng.random() * len(found))]  # random() alone is promised to stay the same

    def noise() -> str:
        ranges = (
            (32, 126),
            (9, 13),
            (160, 383),
            (0x400, 0x45F),
            (0x3040, 0x30FF),
            (0x1F600, 0x1F640),
        )
        size = int(rng.random() * 12)
        spans = [one(ranges) for _ in range(size)]
        return "".join(chr(low + int(rng.random() * (high - low))) for low, high in spans)

    def edge(pieces: Sequence[str], most: int) -> str:
        return one(("", " ", "\n", "")).join(
            one(pieces) for _ in range(1 + int(rng.random() * most))
        )

    real = [json.loads(line) for line in (HERE / "real.jsonl").read_text().splitlines()]
    made: dict[str, list[tuple[str, str]]] = {}
    for kind, count in COUNTS.items():
        answers, raw = _kind(kind, real, edge, one)
        made[kind] = [
            (one(answers), (raw[0] if n % 3 == 0 else raw[1] if n % 3 == 1 else noise)())
            for n in range(count)
        ]
    return made


def _kind(kind: str, real: list, edge: Callable, one: Callable):
    """Answers of a kind, and what makes its real and its edge outputs."""

    def wrote() -> str:
        return one(real)["text"]

    def said(pieces: Sequence[str], most: int) -> Callable[[], str]:
        return lambda: edge((*pieces, *WORDS[:8]), most)

    if kind == "closed":
        return ("yes", "no", "yes", "no", "Yes"), (wrote, said(WORDS, 3))
    if kind == "mcq":
        return LETTERS, (wrote, said((*LETTERS, *(f" {x} " for x in LETTERS), *WORDS), 2))
    if kind == "open":
        return (
            [row["answer"] for row in real],
            (lambda: f"{one(VERDICTS[:2])}\n{wrote()}", said(VERDICTS, 2)),
        )
    scores = tuple("12345678910"[i] for i in range(9)) + ("10",)
    return (
        scores,
        (lambda: f"{one(scores)} {one(scores)}\n{wrote()}", lambda: edge(PAIRS, 1)),
    )
