"""1,200 raw outputs of each benchmark, the same on every machine: questions and what models wrote.

Each is {question, options, answer (letter), context (the rationale, of MedThink), text}. Most
texts are statements, more often of the right option; the others are put together from pieces that
the benchmarks' own code looks for, from words of the options, or are empty.
"""

import random
from collections.abc import Sequence
from typing import Any

SEED = 21
COUNT = 1_200
LETTERS = "ABCDE"
OPTIONS = (  # some end like others, some begin like others, some have a period inside
    ("CT", "MRI", "functional MRI", "X-ray", "Ultrasound"),
    ("E. coli", "E. faecalis", "S. aureus. It is gram-positive", "K. pneumoniae", "None"),
    ("Left lung", "Left lung base", "Right lung", "Heart", "A or B"),
    ("Pneumonia", "Tuberculosis", "Pneumothorax", "Lung cancer", "Asthma"),
    ("An effusion grows.", "Nothing", "the heart, enlarged", "A catheter. It moves", "No change"),
    ("폐렴", "결핵", "기흉", "폐암", "천식"),
    ("0.5 cm", "5 cm", "15 cm", "1.5 cm", "50 cm"),
    ("Vitamin A", "Vitamin B", "Vitamin C", "Vitamin D", "Vitamin E"),
    ("İleum", "Straße", "naïve T cells", "β-cells", "É"),
)
WHOLE = (  # {x}: a letter, {t}: its option, {y}: another letter, {p}: a vertical bar
    "{x}|{x}.|({x})|{x}. {t}|{x}: {t}|{t}|Answer: {x}|The answer is {x}|The answer is ({x}).|"
    "the correct answer is **{x}**. Here is why: it fits.|\\boxed{{{x}}}|$\\boxed{{{x}}}$|"
    "\\boxed{{{x}. {t}}}|Final Answer: {x}|final answer\n{x}|**Answer**: {x}|Answer*: ({x})|"
    "I think it is {t}.|It is {t}, not the other one, as the image shows.|{x} or {y}|({x}) "
    "and ({y})|{x}. but {y}. is possible|Therefore, among A through E, the answer is {x}.|"
    "Therefore, among A through D, the answer is {x}|So the answer is {x}, I understand.|"
    'The answer is {x}. No, the answer is {y}.|{{"정답": "{x}"}}|{{"answer": "{x}"}}|'
    '{{\'answer\': \'{x}\'}}|```json\n{{"정답": "{x}"}}\n```|{{"정답": "A"}} {{"정답": "{x}"}}|'
    '{{"정답": null, "answer": "{x}"}}|[THINK]{y}[/THINK]{{"answer": "{x}"}}|정답은 {x}입니다.|'
    "The answer is ({x}).\nSolution: The image shows {t}.|{t}\nAnswer: The answer is ({x}).|"
    "The answer is ({x}) because the answer is ({y}).|The answer is ({x}). The answer is ({x}).|"
    " {x}|{x}\n|{x} |{lx}|({lx})|Z|I'm sorry, but without the image provided I cannot say {x}|"
    "Cannot determine the answer, maybe {x}|Failed to obtain answer via API. {x}|"
    "Sorry, I can't help with images of people yet.|Option {x} is correct and option {y} is not|"
    "A CT shows {t}, so {x} is right|{x}!|{x};|#{x}|*{x}*|<answer>{x}</answer>|"
    '◁think▷{y}◁/think▷{{"정답": "{x}"}}|...thinking...{y}....thinking....\\boxed{{{x}}}'
).split("|")
OF_BENCHMARK = {  # the forms that its code reads, and what it reads wrongly
    "medframeqa": "final answer {y}. Answer: {x}|Final Answer: {y}\nfinal answer {x}|Answer: ?|"
    "Answer: because of it, {x}|Answer: {t}|({y}) is wrong and ({x}) is right|It is {t}, all told.|"
    "boxed{{F}} boxed{{{x}}}|Answer: {x}. Answer: {y}|Not {y}. Rather {x}.|The right one: {t}",
    "kormedmcqa": '{{"answer": "{y}", "정답": "{x}"}}|{{"정답": "{x}"}}|{{"정답": "{p}{x}"}}|'
    '◁think▷{{"정답": "{x}"}}◁/think▷ I do not know.|{{"answer": "({lx})"}}|{{"정답": "정답 {x}"}}|'
    '[THINK]{{"answer": "{y}"}}[/THINK]{{"answer": "{x}"}}|{{"정답": "{y}"}} -> {{"정답": "{x}"}}|'
    '```JSON\n{{"정답": "{x}"}}\n``` {{"정답": "{y}"}}|{{\'정답\': \'{x}\'}}|'
    "{{'a': {{'정답': '{x}'}}}}|{{'정답': '\\d{x}'}}|\\boxed{{{lx}}}|\\boxed{{{p}}}|[THINK]{x}",
    "medbookvqa": "{x}|{x}|{x}|{x}|{x}.|{x} |{lx}",
    "medxpertqa": "among A through E, the answer is {y}. Therefore, among A through E, the answer "
    "is {x}|Therefore, among A through E, the answer is {x}. Or the answer is {y}.|"
    "A through E: {x}|A {t}, so {x}|I think the answer is {t}, {x}|A through D or {x}|"
    "I understand: {x}|{x}{y}",
    "gmai_mmbench": "Sorry, I can't help with images of people yet. {x}|{t}|It is {t}|{x} {t}|"
    "I can't process this file. {x}|The correct answer is {x} and not {y}, I am very sure of it|"
    "{x} one two three|{x} one two three four|{x} {x}|Answer IS **{lx}**, or {y}, one of both|"
    "Z {t}",
    "medthink": "The answer is ({x}).|The answer is ({x}).\nSolution: {t}|"
    "The answer is ({x}) ({y})|the answer is ({x})|The answer is {x}.|The answer is (C).|"
    "The answer is ({x}). The answer is ({y}).|{t}\nAnswer: The answer is ({x}).|"
    "The answer is\n({x}).",
}
PIECES = (
    "A B C D E a b Z ( ) (A) (B). C. D: boxed{ } \\boxed{A} \\boxed{F} Answer: Answer* Final the "
    'final answer is correct. ** { } {} {\'answer\':\'B\'} {"answer":"|"} {"정답":"b"} 정답 '
    "```json ``` [THINK] [/THINK] . , ; ! ? \n \t ' \" yes no not I understand A, among through 5 "
    "0.5 cm CT MRI lung Vitamin coli"
).split(" ")
PHRASES = ("The answer is (A)", "The answer is (B)", " answer is ", "A through E", "among")


def rows(name: str) -> list[dict[str, Any]]:
    """Return the questions and texts of a benchmark."""
    rng = random.Random(f"{SEED} {name}")
    count = {"medthink": 2, "medbookvqa": 4}.get(name, 5)

    def one(found: Sequence):
        return found[int(rng.random() * len(found))]  # random() alone is promised to stay the same

    def text(letters: str, options: Sequence[str], answer: str) -> str:
        kind = rng.random()
        if kind < 0.1:
            return one(letters)
        if kind < 0.7:
            forms = WHOLE if kind < 0.4 else OF_BENCHMARK[name].split("|")
            x, y = answer if rng.random() < 0.6 else one(letters), one(letters)
            values = dict(x=x, y=y, lx=x.lower(), t=options[letters.index(x)], p="|")
            return one(forms).format(**values)
        pieces = (*PIECES, *PHRASES, *options)
        joint = one(("", " ", " ", "\n"))
        return joint.join(one(pieces) for _ in range(int(rng.random() * 9)))

    made = []
    for number in range(COUNT):
        options = ("yes", "no") if name == "medthink" else one(OPTIONS)[:count]
        letters = LETTERS[: len(options)]
        answer = one(letters)
        solution = "The answer is (B) if so." if number % 50 == 0 else "The ribs are intact."
        made.append(
            dict(
                question=f"Question {number}?",
                options=list(options),
                answer=answer,
                context=solution if name == "medthink" else "",
                text=text(letters, options, answer),
            )
        )
    return made
