"""Read prompts from flags or a file; write answers to JSONL, PNG files and a gallery.

    D/request.json    the settings and a digest of the prompts: the same command resumes from here;
                      and of each start that answered, its date, version, commit and machine
    D/answers.jsonl   {"id", "prompt", "mode", "segments": [{"text"}, {"image": "0003_1.png"}], ..}
    D/gallery.html    prompts and answers with their images

Each of several hosts writes D/answers.host_1_of_2.jsonl, and the first one merges these files.
A line is written after its images are on disk, so a killed run leaves only complete answers.
"""

import collections
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import PIL.Image
from PIL.PngImagePlugin import PngInfo

from medmax_jax.environment import environment
from medmax_jax.generation.model_bundle import MAX_PIXELS, Image, Text
from medmax_jax.generation.requests import GenerateError, check_no_path
from medmax_jax.io import html_page, text_files
from medmax_jax.io.errors import printable
from medmax_jax.io.text_files import TextFileError
from medmax_jax.models import images
from medmax_jax.storage import image_paths

NOTICE = "Research only, not for clinical use."
STARTS = "starts"  # field of request.json, see above
MAX_SHOWN = 200  # answers in a gallery
_IMAGE = re.compile(r"\{([^{}]+)\}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt with its id; `parts` are text and paths of images."""

    id: str
    named: bool  # the id is the user's, so the random numbers derive from it
    parts: tuple[str | Path, ...]

    def shown(self) -> str:
        """Return the prompt as one line, with images by their file names."""
        return " ".join(f"{{{p.name}}}" if isinstance(p, Path) else p.strip() for p in self.parts)


def prompts_from_flags(texts: Sequence[str], image_files: Sequence[str]) -> list[Prompt]:
    """Return prompts from flags: {a.png} in a text is an image; `image_files` precede the rest."""
    first = tuple(map(Path, image_files))
    for text in texts:
        fix = f"write --prompt='{{{text[:80]}}} ...' or --image={text[:80]}"
        check_no_path(text, where="--prompt", fix=fix)
    return [
        Prompt(id=str(number), named=False, parts=first + _parts(text, Path))
        for number, text in enumerate(texts)
    ]


def read_prompts(path: str | Path) -> list[Prompt]:
    """Return the prompts of a JSONL file; image paths are relative to its folder."""
    path = Path(path)
    try:
        rows = text_files.read_objects(path)
    except TextFileError as error:
        raise GenerateError(f"--prompts: {error}; use a JSONL file") from error
    prompts = [
        _prompt(row, where, str(number), path.parent) for number, (where, row) in enumerate(rows)
    ]
    if not prompts:
        raise GenerateError(f"{path} has no prompts; write one JSON object per line")
    counts = collections.Counter(prompt.id for prompt in prompts)
    if repeated := [name for name, count in counts.items() if count > 1]:
        name = printable(repr(min(repeated)), 80)
        raise GenerateError(f"{path}: id {name} is not unique; each prompt requires its own id")
    return prompts


def check_images(prompts: Sequence[Prompt]) -> None:
    """Raise ImageError on the first image that cannot be read."""
    parts = (part for prompt in prompts for part in prompt.parts)
    for path in dict.fromkeys(part for part in parts if isinstance(part, Path)):
        images.load(path, max_pixels=MAX_PIXELS)


class OutputFolder:
    """The output folder of answers: the records so far, and a method to add one."""

    def __init__(self, folder: Path, prompts: Sequence[Prompt], settings: dict[str, Any]):
        """Raise GenerateError when the folder holds answers to another request."""
        self._folder, self._prompts = folder, list(prompts)
        self._merged, self._file = folder / "answers.jsonl", folder / "answers.jsonl"
        self._first, self._answering = jax.process_index() == 0, False
        if (hosts := jax.process_count()) > 1:
            self._file = folder / f"answers.host_{jax.process_index()}_of_{hosts}.jsonl"
        request_file, old = folder / "request.json", folder / "asked.json"
        if old.exists() and not request_file.exists():
            raise GenerateError(
                f"{old} is named {request_file.name} now; use a new --out, or rename: "
                f"{shlex.join(['mv', str(old), str(request_file)])}"
            )
        contents = json.dumps([[prompt.id, *map(str, prompt.parts)] for prompt in prompts])
        request = settings | {"prompts": hashlib.sha256(contents.encode()).hexdigest()}
        request = json.loads(json.dumps(request))
        _drop_incomplete_line(self._file)
        self.records = self._read()
        self._request, self._starts = request, []
        if self.records and request_file.exists():
            earlier = _read_own(text_files.read_json_object, request_file)
            self._starts = earlier.pop(STARTS, [])
            fields = sorted(request | earlier)
            if changed := [name for name in fields if request.get(name) != earlier.get(name)]:
                raise GenerateError(
                    f"{folder} holds answers to a request with another value of {changed[0]}; "
                    "use a new --out"
                )
        self._write_request()

    def add(self, prompt: Prompt, answer: Sequence[Text | Image], mode: str) -> dict[str, Any]:
        """Write the images first, then the line that refers to them."""
        if not self._answering:
            self._answering = True
            self._starts.append(environment(devices=jax.devices()))
            self._write_request()
        number = self._prompts.index(prompt)
        record = dict(
            id=prompt.id,
            prompt=[
                {"image": str(part)} if isinstance(part, Path) else {"text": part}
                for part in prompt.parts
            ],
            mode=mode,
            segments=[self._save(part, f"{number:04d}_{i}.png") for i, part in enumerate(answer)],
            notice=NOTICE,
        )
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.records[prompt.id] = record
        return record

    def merge(self) -> None:
        """Read the answers of all hosts; the first host writes them to one file."""
        self.records, parts = self._read(), self._parts()
        if self._first and parts:
            lines = [self.records[p.id] for p in self._prompts if p.id in self.records]
            text = "\n".join(json.dumps(record, ensure_ascii=False) for record in lines)
            _write(self._merged, text)
            for part in parts:
                part.unlink()

    def gallery(self) -> Path:
        """Write the page of all answers and return its path."""
        shown = [prompt for prompt in self._prompts if prompt.id in self.records][:MAX_SHOWN]
        body = html_page.provenance(self._facts())
        for number, start in enumerate(self._starts, start=1):
            body += html_page.provenance({"start": number, **start} if number > 1 else start)
        body += html_page.paragraph(NOTICE)
        if len(self.records) > len(shown):
            body += html_page.paragraph(
                f"The first {len(shown)} of {len(self.records)} answers.", note=True
            )
        for in_grid, prompts in itertools.groupby(shown, key=self._is_image_from_text):
            if in_grid:
                body += self._grid(list(prompts))
            else:
                body += "".join(self._section(p, self.records[p.id]) for p in prompts)
        target = self._folder / "gallery.html"
        _write(target, html_page.document("Generated answers", body))
        return target

    def _write_request(self) -> None:
        if not self._first:
            return
        content = self._request | {STARTS: self._starts}
        _write(self._folder / "request.json", json.dumps(content, indent=1))

    def _parts(self) -> list[Path]:
        """Return the files of hosts, also of an earlier run with another number of hosts."""
        return sorted(self._folder.glob("answers.host_*_of_*.jsonl"))

    def _read(self) -> dict[str, dict[str, Any]]:
        """Return the records by id; another host may be writing a last line."""
        records = {}
        for path in (self._merged, *self._parts()):
            with contextlib.suppress(FileNotFoundError):
                data = path.read_bytes()
                records |= _parse(data[: data.rfind(b"\n") + 1], path)
        return records

    def _save(self, part: Text | Image, name: str) -> dict[str, str]:
        if isinstance(part, Text):
            return {"text": part.text}
        (self._folder / name).write_bytes(png_with_notice(part.image))
        return {"image": name}

    def _is_image_from_text(self, prompt: Prompt) -> bool:
        """Return whether the answer is one image from text, which is shown in a grid."""
        segments = self.records[prompt.id]["segments"]
        has_image = any(isinstance(part, Path) for part in prompt.parts)
        return not has_image and len(segments) == 1 and "image" in segments[0]

    def _png(self, segment: dict[str, str]) -> bytes:
        return (self._folder / segment["image"]).read_bytes()

    def _facts(self) -> dict[str, Any]:
        """Return the settings that the answers depend on most; request.json has all."""
        names = ("model", "adapter", "mode", "seed", "temperature", "top_p")
        facts = {name: self._request.get(name) for name in names}
        return facts | {"prompts": f"{len(self._prompts)}, digest {self._request['prompts'][:16]}"}

    def _grid(self, prompts: Sequence[Prompt]) -> str:
        """Return the generated images of successive prompts without an image."""
        segments = [self.records[prompt.id]["segments"][0] for prompt in prompts]
        captions = [f"generated: {prompt.shown()}" for prompt in prompts]
        figures = html_page.figures(
            list(zip(map(self._png, segments), captions, strict=True)),
            links=[segment["image"] for segment in segments],
        )
        return html_page.section("Images generated from text", figures)

    def _section(self, prompt: Prompt, record: dict[str, Any]) -> str:
        paths = [part for part in prompt.parts if isinstance(part, Path)]
        body = ""
        if paths:
            inputs = [(_thumbnail(path), f"input: {path.name}") for path in paths]
            body += html_page.figures(inputs)
        for part in record["segments"]:
            if "text" in part:
                text = part["text"].strip() or "(empty text)"
                body += html_page.table(["", ""], [["generated text", text]])
            else:
                caption = f"generated: {part['image']}"
                body += html_page.figures([(self._png(part), caption)], links=[part["image"]])
        return html_page.section(prompt.shown(), body)


def png_with_notice(image: PIL.Image.Image) -> bytes:
    """Return the PNG file of a generated image; its metadata contain the notice."""
    metadata, file = PngInfo(), io.BytesIO()
    metadata.add_text("Comment", f"Generated by a model. {NOTICE}")
    image.save(file, format="PNG", pnginfo=metadata)
    return file.getvalue()


def _prompt(row: dict[str, Any], where: str, number: str, folder: Path) -> Prompt:
    if not {"prompt"} <= set(row) <= {"id", "prompt"}:
        raise GenerateError(
            f"{where}: the fields are {printable(', '.join(row), 80)}; expected prompt and, "
            "optionally, id"
        )
    if type(row.get("id", number)) not in (str, int, float):
        raise GenerateError(f"{where}: id is {printable(repr(row['id']), 80)}; expected a string")
    prompt, name, named = row["prompt"], str(row.get("id", number)), "id" in row
    fix = 'write {"image": "FILE"} as a part of the prompt'
    if isinstance(prompt, str):
        check_no_path(prompt, where=where, fix=fix, folder=folder)
        parts = _parts(prompt, lambda path: _file(folder, path, where))
        return Prompt(id=name, named=named, parts=parts)
    parts: list[str | Path] = []
    for part in prompt if isinstance(prompt, list) else [None]:
        if not isinstance(part, dict) or len(part) != 1 or not isinstance(*part.values(), str):
            raise GenerateError(
                f'{where}: prompt must be a string or a list of {{"text": ..}} and {{"image": ..}}'
            )
        ((kind, value),) = part.items()
        if kind not in ("text", "image"):
            kind = printable(repr(kind), 80)
            raise GenerateError(f"{where}: a part of the prompt is {kind}; expected text or image")
        if kind == "text":
            check_no_path(value, where=where, fix=fix, folder=folder)
        parts.append(value if kind == "text" else _file(folder, value, where))
    return Prompt(id=name, named=named, parts=tuple(parts))


def _file(folder: Path, name: str, where: str) -> Path:
    """Return the image that a prompt file refers to; it must be inside the folder of the file."""
    try:
        return image_paths.resolve(folder, name)
    except image_paths.ImagePathError as error:
        raise GenerateError(f"{where}: {error}") from error


def _drop_incomplete_line(path: Path) -> None:
    """Remove a last line that was truncated by a kill."""
    if path.exists():
        data = path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        if complete != data:
            path.write_bytes(complete)


def _parse(data: bytes, path: Path) -> dict[str, dict[str, Any]]:
    """Return the records of the lines of a file by id."""
    for number, row in (rows := _read_own(text_files.parse_jsonl, data, path)):
        if not (isinstance(row.get("id"), str) and isinstance(row.get("segments"), list)):
            raise GenerateError(
                f"{path} line {number} is not an answer with id and segments; delete that line to "
                "answer its prompt again"
            )
    return {row["id"]: row for _, row in rows}


def _read_own(read: Callable[..., Any], *arguments: Any) -> Any:
    """Return the content of a file of the output folder; damage raises GenerateError.

    Damage is an error because the same command may be run again.
    """
    try:
        return read(*arguments)
    except TextFileError as error:
        raise GenerateError(f"{error}; correct that line, or use a new --out") from error


def _parts(text: str, file_of: Callable[[str], Path]) -> tuple[str | Path, ...]:
    """Split text into parts: "Is {a.png} it?" -> "Is ", a.png, " it?"."""
    pieces = _IMAGE.split(text)
    parts = [file_of(piece) if i % 2 else piece for i, piece in enumerate(pieces)]
    return tuple(part for part in parts if isinstance(part, Path) or part) or ("",)


def _thumbnail(path: Path) -> bytes:
    image = images.load(path, max_pixels=MAX_PIXELS)
    image.thumbnail((512, 512), PIL.Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _write(path: Path, content: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(content + "\n", encoding="utf-8")
    partial.replace(path)
