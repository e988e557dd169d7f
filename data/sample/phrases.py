"""Write text for facts: names, short phrases, captions and reports made from one manifest row.

    MRI, brain, axial, T1, lesion   "Axial T1 MRI of the brain. A lesion is marked."
    X-ray, chest, AP, child, normal "AP X-ray of the chest. The patient is a child. It is normal."

Text about an image states only facts of its row. GLOSSARY holds general sentences about a kind of
image.
"""

import random

# Verbatim: part of the data.
NOUNS = {
    "X-ray": "X-ray",
    "MRI": "MRI",
    "CT": "CT",
    "ultrasound": "ultrasound",
    "angiography": "angiography image",
    "bone scan": "bone scan",
    "cryo-electron tomography": "cryo-electron tomography slice",
    "histology": "histology slide",
    "fluorescence microscopy": "fluorescence microscopy image",
    "fundus photograph": "fundus photograph",
    "phase microscopy": "phase microscopy image",
    "blood smear": "blood smear",
}
GLOSSARY = {
    "X-ray": "An X-ray shows bones in white and air in black.",
    "MRI": "An MRI is made with a strong magnet.",
    "CT": "A CT is made of many X-ray views.",
    "ultrasound": "An ultrasound is made with sound waves.",
    "angiography": "An angiography image shows vessels with contrast.",
    "bone scan": "A bone scan shows a tracer in the bones.",
    "cryo-electron tomography": "A cryo-electron tomography slice shows frozen material.",
    "histology": "A histology slide shows stained tissue.",
    "fluorescence microscopy": "A fluorescence microscopy image shows glowing dye.",
    "fundus photograph": "A fundus photograph shows the back of the eye.",
    "phase microscopy": "A phase microscopy image shows how a cell slows light.",
    "blood smear": "A blood smear shows blood cells.",
}
_PARTS = {"cell nuclei": "cell nuclei", "cell": "a cell", "lymph node": "a lymph node"}
_PARTS |= {"blood": "blood", "whole body": "the whole body"}
RADIOLOGY = ("X-ray", "MRI", "CT", "ultrasound", "angiography", "bone scan")

# Pairs of values that one image may both show: never used in questions as if they excluded each
# other.
_NEAR = (
    {"brain", "head"},
    {"heart", "chest"},
    {"breast", "chest"},
    {"shoulder", "chest"},
    {"chest", "abdomen"},
    {"pelvis", "abdomen"},
    {"cell", "cell nuclei"},
    {"cell", "blood"},
    {"skin", "breast"},
    {"angiography", "X-ray"},
)


def exclude(value: str, other: str) -> bool:
    """Return whether an image of `one` is surely not `other`: brain, leg yes; brain, head no."""
    near = value == other or {value, other} in _NEAR or "whole body" in (value, other)
    return not near


def with_article(words: str) -> str:
    """Return `words` with their article: "an MRI", "a CT", "an H&E histology slide"."""
    first = words.split()[0]
    an = first[0].lower() in "aeiou" or first in ("MRI", "X-ray", "H&E")
    return f"{'an' if an else 'a'} {words}"


def capitalize_first(words: str) -> str:
    """Return `words` with a capital first letter."""
    return words[0].upper() + words[1:]


def body_part_phrase(row_or_value: dict | str) -> str:
    """Return the body part with its article: "the brain", "cell nuclei", "a lymph node"."""
    value = row_or_value if isinstance(row_or_value, str) else row_or_value["body_part"]
    return _PARTS.get(value, f"the {value}")


def image_phrase(row: dict) -> str:
    """Describe the image, without article: "axial T1 MRI of the brain", "H&E histology slide"."""
    words = [row["view"], row["plane"], row["sequence"], row["stain"], NOUNS[row["modality"]]]
    text = " ".join(word for word in words if word)
    if row["body_part"] and row["modality"] != "blood smear":
        text += f" of {body_part_phrase(row)}"
    if row["species"]:
        text += f" of a {row['species']}"
    return text


def patient(row: dict) -> str:
    """Describe the patient as far as known: "28-year-old female", "male", "child"; else ""."""
    if row["age"] is not None:
        return f"{row['age']}-year-old {row['sex'] or 'person'}"
    return row["sex"] or row["age_group"] or ""


def findings(row: dict) -> str:
    """Return sentences about finding, lesion and count; "" if nothing is known."""
    sentences = []
    if row["finding"] == "normal":
        sentences.append("It is normal.")
    elif row["finding"]:
        sentences.append(f"The finding is {row['finding']}.")
    if row["lesion"] is not None:
        where = f" on the {row['side']} side" if row["side"] and row["lesion"] else ""
        sentences.append(f"A lesion is marked{where}." if row["lesion"] else "No lesion is marked.")
    if row["count"] is not None:
        sentences.append(f"It shows {row['count']} nuclei.")
    return " ".join(sentences)


def details(row: dict) -> str:
    """Return every fact that `image_phrase` does not state, in short sentences."""
    sentences = []
    if row["organ"]:
        sentences.append(f"It shows the {row['organ']}.")
    if row["contrast"]:
        sentences.append("Contrast was given.")
    person = patient(row)
    if person:
        sentences.append(
            f"The patient is {person if person in ('male', 'female') else with_article(person)}."
        )
    if row["modality"] == "fundus photograph" and row["side"]:
        sentences.append(f"It is the {row['side']} eye.")
    return " ".join([*sentences, findings(row)]).strip()


def caption(row: dict, rng: random.Random) -> str:
    """Return all facts of the row in one of four wordings."""
    name = image_phrase(row)
    openings = (
        f"{capitalize_first(name)}.",
        f"This is {with_article(name)}.",
        f"The image shows {with_article(name)}.",
        f"{capitalize_first(with_article(name))}.",
    )
    return f"{rng.choice(openings)} {details(row)}".strip()


def report(row: dict) -> str:
    """Return a report of the facts, or "" if no fact that a report would state is known."""
    if row["modality"] not in RADIOLOGY or not row["body_part"] or not findings(row):
        return ""
    lines = [f"Examination: {image_phrase(row)}."]
    if patient(row):
        lines.append(f"Patient: {patient(row)}.")
    lines.append(f"Findings: {findings(row)}")
    short = row["finding"] or ("lesion" if row["lesion"] else "no lesion")
    return "\n".join([*lines, f"Impression: {short}."])
