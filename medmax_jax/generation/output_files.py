"""Read prompts from flags or a file; write answers to JSONL, PNG files and a gallery.

    D/request.json    the settings and a digest of the prompts: the same command resumes from here
    D/answers.jsonl   {"id", "prompt", "mode", "segments": [{"text"}, {"image": "0003_1.png"}], ..}
    D/gallery.html    prompts and answers with their images

A line is written after its images are on disk, so a killed run leaves only complete answers.
"""

import collections
import dataclasses
import hashlib
import io
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
from PIL.PngImagePlugin import PngInfo

from medmax_jax.generation.model_bundle import MAX_PIXELS, Image, Text
from medmax_jax.generation.requests import GenerateError, check_no_path
from medmax_jax.io import html_page, image_paths, text_files
from medmax_jax.io.errors import printable
from medmax_jax.io.text_files import TextFileError
from medmax_jax.models import images

NOTICE = "Research only, not for clinical use."
SHOWN = 200  # answers in a gallery
_PICTURE = re.compile(r"\{([^{}]+)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt with its id; `parts` are text and paths of images."""

    id: str
    named: bool  # the user gave the id, so the random numbers derive from it
    parts: tuple[str | Path, ...]

    def shown(self) -> str:
        """Return the prompt as one line, with images by their file names."""
        return " ".join(f"{{{p.name}}}" if isinstance(p, Path) else p.strip() for p in self.parts)


def prompts_from_flags(prompts: Sequence[str], pictures: Sequence[str]) -> list[Prompt]:
    """Return prompts from flags: {a.png} in the text is an image; `pictures` precede the rest."""
    first = tuple(map(Path, pictures))
    for words in prompts:
        fix = f"write --prompt='{{{words[:80]}}} ...' or --image={words[:80]}"
        check_no_path(words, where="--prompt", fix=fix)
    return [
        Prompt(id=str(number), named=False, parts=first + _parts(words, Path))
        for number, words in enumerate(prompts)
    ]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Return the prompts of a JSONL file; image paths are relative to its folder."""
    path = Path(path)
    try:
        rows = text_files.read_objects(path)
    except TextFileError as error:
        raise GenerateError(f"--prompts: {error}; name a JSONL file") from error
    found = [
        _question(row, where, str(number), path.parent) for number, (where, row) in enumerate(rows)
    ]
    if not found:
        raise GenerateError(f"{path} has no prompts; write one JSON object a line")
    counts = collections.Counter(question.id for question in found)
    if twice := [name for name, n in counts.items() if n > 1]:
        name = printable(repr(min(twice)), 80)
        raise GenerateError(f"{path}: id {name} comes twice; give each prompt its own")
    return found


def check_images(questions: Sequence[Prompt]) -> None:
    """Raise ImageError on the first image that cannot be read."""
    for path in dict.fromkeys(p for q in questions for p in q.parts if isinstance(p, Path)):
        images.load(path, max_pixels=MAX_PIXELS)


class OutputFolder:
    """The output folder of answers: the records so far, and a method to add one."""

    def __init__(self, folder: Path, questions: Sequence[Prompt], settings: dict[str, Any]):
        """Raise GenerateError when the folder holds answers to another request."""
        self._folder, self._questions = folder, list(questions)
        self._file = folder / "answers.jsonl"
        asked = json.dumps([[q.id, *map(str, q.parts)] for q in questions])
        facts = settings | {"prompts": hashlib.sha256(asked.encode()).hexdigest()}
        facts = json.loads(json.dumps(facts))
        place, old = folder / "request.json", folder / "asked.json"
        if old.exists() and not place.exists():
            raise GenerateError(
                f"{old} is named {place.name} now; use a new --out, or rename: "
                f"{shlex.join(['mv', str(old), str(place)])}"
            )
        self.records = {record["id"]: record for record in self._read()}
        if self.records and place.exists():
            before = _own(text_files.read_json_object, place)
            if different := sorted(k for k in facts | before if facts.get(k) != before.get(k)):
                raise GenerateError(
                    f"{folder} holds answers with another {different[0]}; name a fresh --out"
                )
        _write(place, json.dumps(facts, indent=1))

    def add(self, question: Prompt, answer: Sequence[Text | Image], mode: str) -> dict[str, Any]:
        """Write the images first, then the line that refers to them."""
        number = self._questions.index(question)
        record = dict(
            id=question.id,
            prompt=[
                {"image": str(p)} if isinstance(p, Path) else {"text": p} for p in question.parts
            ],
            mode=mode,
            segments=[self._saved(part, f"{number:04d}_{i}.png") for i, part in enumerate(answer)],
            notice=NOTICE,
        )
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.records[question.id] = record
        return record

    def gallery(self) -> Path:
        """Write the page of all answers and return its path."""
        shown = [q for q in self._questions if q.id in self.records][:SHOWN]
        body = html_page.paragraph(NOTICE)
        if len(self.records) > len(shown):
            body += html_page.paragraph(
                f"The first {len(shown)} of {len(self.records)}.", note=True
            )
        drawn = [q for q in shown if self._only_drawn(q)]
        if drawn:
            held = [(self._png(self.records[q.id]["segments"][0]), q.shown()) for q in drawn]
            body += html_page.section("Pictures from words", html_page.figures(held))
        rest = [q for q in shown if q not in drawn]
        body += "".join(self._section(q, self.records[q.id]) for q in rest)
        target = self._folder / "gallery.html"
        _write(target, html_page.document("Generated answers", body))
        return target

    def _read(self) -> list[dict[str, Any]]:
        if not self._file.exists():
            return []
        data = self._file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:  # the last line was truncated by a kill
            self._file.write_bytes(whole)
        rows = _own(text_files.parse_jsonl, whole, self._file)
        for number, row in rows:
            if not (isinstance(row.get("id"), str) and isinstance(row.get("segments"), list)):
                raise GenerateError(
                    f"{self._file} line {number}: no answer; delete that line, and its prompt is "
                    "answered again"
                )
        return [row for _, row in rows]

    def _saved(self, part: Text | Image, name: str) -> dict[str, str]:
        if isinstance(part, Text):
            return {"text": part.text}
        about = PngInfo()
        about.add_text("Comment", f"Generated by a model. {NOTICE}")
        part.image.save(self._folder / name, pnginfo=about)
        return {"image": name}

    def _only_drawn(self, question: Prompt) -> bool:
        """Return whether the answer is one image from text, which is shown in a grid."""
        segments = self.records[question.id]["segments"]
        given = any(isinstance(part, Path) for part in question.parts)
        return not given and len(segments) == 1 and "image" in segments[0]

    def _png(self, segment: dict[str, str]) -> bytes:
        return (self._folder / segment["image"]).read_bytes()

    def _section(self, question: Prompt, record: dict[str, Any]) -> str:
        given = [p for p in question.parts if isinstance(p, Path)]
        body = ""
        if given:
            body += html_page.figures([(_thumbnail(path), f"given: {path.name}") for path in given])
        for part in record["segments"]:
            if "text" in part:
                lines = part["text"].strip().splitlines() or ["(no words)"]
                body += "".join(map(html_page.paragraph, lines))
            else:
                body += html_page.figures([(self._png(part), f"generated: {part['image']}")])
        return html_page.section(question.shown(), body)


def _question(row: dict[str, Any], where: str, number: str, folder: Path) -> Prompt:
    if not {"prompt"} <= set(row) <= {"id", "prompt"}:
        raise GenerateError(f"{where}: write an object with prompt, and id if you like; no more")
    if type(row.get("id", number)) not in (str, int, float):
        raise GenerateError(f"{where}: id is {printable(repr(row['id']), 80)}; write a text")
    prompt, name = row["prompt"], dict(id=str(row.get("id", number)), named="id" in row)
    fix = 'write {"image": "FILE"} as a part of the prompt'
    if isinstance(prompt, str):
        check_no_path(prompt, where=where, fix=fix, folder=folder)
        return Prompt(parts=_parts(prompt, lambda path: _file(folder, path, where)), **name)
    parts: list[str | Path] = []
    for part in prompt if isinstance(prompt, list) else [None]:
        if not isinstance(part, dict) or len(part) != 1 or not isinstance(*part.values(), str):
            raise GenerateError(
                f'{where}: prompt must be words or a list of {{"text": ..}} and {{"image": ..}}'
            )
        ((kind, value),) = part.items()
        if kind not in ("text", "image"):
            kind = printable(repr(kind), 80)
            raise GenerateError(f"{where}: {kind} is no part of a prompt; text and image are")
        if kind == "text":
            check_no_path(value, where=where, fix=fix, folder=folder)
        parts.append(value if kind == "text" else _file(folder, value, where))
    return Prompt(parts=tuple(parts), **name)


def _file(folder: Path, name: str, where: str) -> Path:
    """Return the image that a prompt file refers to; it must be inside the folder of the file."""
    try:
        return image_paths.resolve(folder, name)
    except image_paths.ImagePathError as error:
        raise GenerateError(f"{where}: {error}") from error


def _own(read: Callable[..., Any], *what: Any) -> Any:
    """Return what `read` returns for a file of the folder; damage raises GenerateError.

    Damage is an error because the same command may be run again.
    """
    try:
        return read(*what)
    except TextFileError as error:
        raise GenerateError(f"{error}; mend that line, or name a fresh --out") from error


def _parts(words: str, file_of: Callable[[str], Path]) -> tuple[str | Path, ...]:
    """Split text into parts: "Is {a.png} it?" -> "Is ", a.png, " it?"."""
    pieces = _PICTURE.split(words)
    parts = [file_of(p) if i % 2 else p for i, p in enumerate(pieces)]
    return tuple(p for p in parts if isinstance(p, Path) or p) or ("",)


def _thumbnail(path: Path) -> bytes:
    picture = images.load(path, max_pixels=MAX_PIXELS)
    picture.thumbnail((512, 512), PIL.Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def _write(path: Path, content: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content + "\n", encoding="utf-8")
    partial.replace(path)
