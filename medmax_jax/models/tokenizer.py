"""Converts text to token ids and back, and builds token sequences from text and image codes.

    document_ids  "Is it a CT? <image>" + codes  ->  BOS | Is it a CT? | BOI c+4 c+4 ... EOI | EOS
    prompt_ids    ["Is it a CT?", codes]         ->  BOS | Is it a CT? | BOI c+4 c+4 ... EOI | SEP

Only this module joins text and image codes. The file is a Hugging Face `tokenizers` JSON of the
Chameleon family: byte-level BPE whose vocabulary also has the special tokens and image names at the
ids of `vocab.py`. Meta's `text_tokenizer.json`, MedMax's `text_tokenizer_modified.json`, the HF
`tokenizer.json` and the included tiny one can all be loaded; any other file raises an error that
states what is wrong with it.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int, Int32

from medmax_jax.config import BOUNDS, Vocab
from medmax_jax.io.errors import FileError, printable, quoted
from medmax_jax.io.settings_files import parse_settings
from medmax_jax.io.text_files import TextFileError
from medmax_jax.models import vocab as vocabulary
from medmax_jax.models.vocab import BOI, BOS, EOI, EOS, IMAGE, PAD, SEP

IMAGE_NAME, SEP_NAME = "<image>", "<reserved08706>"
UNMODIFIED_IMAGE_NAME = "<reserved08707>"  # the name of id 8711 in Meta's own file
# Names that every file of the family must have. The others (<unk>, sentinels, <reservedN>) may be
# missing, but where present they must have their ids.
_REQUIRED = ("<s>", "<pad>", "</s>", "<eoss>", "<racm3:break>", SEP_NAME, IMAGE_NAME)
# Chameleon's pre-tokenizer, in order; single digits, single punctuation and GPT-2's split follow.
_SPLITS = (
    r"(<sentinel:[0-9]+>)",
    r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",  # A..I: nine letters, as released, though names use ten
    r"([\t\n]|    |  )",
)
MAX_ID = BOUNDS["vocab.size"][1]
_MIN_PAIR_COUNT = 2  # a pair seen once is specific to one document


class TokenizerError(FileError):
    """Raised for a tokenizer file that does not fit the vocabulary, or an invalid text."""


class Tokenizer:
    """Encodes and decodes text with a tokenizer file. `fingerprint`: sha256 of the file's bytes.

    `barred`: text ids whose names exclude them from generated text, see `vocab.is_barred_name`.
    """

    def __init__(self, backend: tokenizers.Tokenizer, vocab: Vocab, fingerprint: str):
        self._backend = backend
        self.vocab = vocab
        self.fingerprint = fingerprint
        names = backend.get_vocab(with_added_tokens=True)
        self.barred = tuple(
            sorted(
                i for name, i in names.items()
                if vocab.text_start <= i < vocab.size and vocabulary.is_barred_name(name)
            )
        )  # fmt: skip

    @classmethod
    def from_file(cls, path: str | Path, vocab: Vocab) -> "Tokenizer":
        """Load and check a tokenizer JSON; raise TokenizerError on one that does not fit."""
        try:
            raw = Path(path).read_bytes()
        except OSError as error:
            raise TokenizerError(
                f"{path}: cannot be read ({error.strerror}); use a tokenizer.json"
            ) from error
        spec = parse_spec(raw, path)
        names = spec["model"]["vocab"]
        if IMAGE_NAME not in names and UNMODIFIED_IMAGE_NAME in names:
            _rename(spec, UNMODIFIED_IMAGE_NAME, IMAGE_NAME)
        _check_names(names, vocab, path)
        backend = _backend(spec, path)
        backend.no_truncation()
        backend.no_padding()
        backend.add_special_tokens([_literal(IMAGE_NAME), _literal(SEP_NAME)])
        return cls(backend, vocab, hashlib.sha256(raw).hexdigest())

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, nothing added.

        `<image>` in the text becomes 8711, `<reserved08706>` becomes 8710.
        """
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of ids without BOS, PAD and EOS; other special tokens appear by name."""
        shown = [int(i) for i in ids if i not in (BOS, PAD, EOS)]
        return self._backend.decode(shown, skip_special_tokens=False)


def document_ids(
    tokenizer: Tokenizer,
    text: str,
    codes: Int[np.ndarray, "K"] | Sequence[Int[np.ndarray, "K"]] | None,
    vocab: Vocab,
) -> Int32[np.ndarray, "T"]:
    """Return a complete document: BOS, the text with each `<image>` replaced by the image, EOS.

    `codes`: of the image, or of each `<image>` in order.

    With text ids 8720.. and an image of two codes:
        document_ids(t, "A CT<image>", [7, 0], v)  ->  [0, 8745, 8761, 8197, 11, 4, 8196, 2]
    Raises TokenizerError when text and image do not match, or when the text contains a control
    token other than `<image>` and `<reserved08706>`.
    """
    ids = np.asarray(tokenizer.encode(text), np.int32)
    places = np.flatnonzero(ids == IMAGE)
    if places.size and codes is None:
        raise TokenizerError(
            f"the text contains {IMAGE_NAME} but there is no image: {_short(text)}"
        )
    if codes is not None and not places.size:
        raise TokenizerError(
            f"there is an image but the text does not contain {IMAGE_NAME}: {_short(text)}"
        )
    each = len(places) * [codes] if isinstance(codes, np.ndarray) else list(codes or ())
    if len(each) != len(places):
        raise TokenizerError(
            f"{len(each)} images for {len(places)} times {IMAGE_NAME} in the text: {_short(text)}"
        )
    _check_text(ids, text, vocab, allowed=(IMAGE, SEP))
    parts: list[Any] = [[BOS]]
    for i, piece in enumerate(np.split(ids, places)):
        parts.append(piece if i == 0 else piece[1:])
        if i < len(places):
            parts.append(_image_ids(each[i], vocab))
    return np.concatenate([*parts, [EOS]]).astype(np.int32)


def prompt_ids(
    tokenizer: Tokenizer, segments: Sequence[str | np.ndarray], vocab: Vocab, end_of_turn: bool
) -> Int32[np.ndarray, "T"]:
    """Return BOS, the segments in order (str or array of VQ codes), then SEP if `end_of_turn`."""
    parts: list[Any] = [[BOS]]
    for segment in segments:
        if isinstance(segment, str):
            ids = np.asarray(tokenizer.encode(segment), np.int32)
            if (ids == IMAGE).any():
                raise TokenizerError(
                    f"the text of a prompt contains {IMAGE_NAME}; pass the image there as a "
                    f"separate part (in --prompt: {{a.png}}): {_short(segment)}"
                )
            _check_text(ids, segment, vocab, allowed=(SEP,))
            parts.append(ids)
        else:
            parts.append(_image_ids(segment, vocab))
    return np.concatenate([*parts, [SEP] if end_of_turn else []]).astype(np.int32)


def split_segments(
    ids: Int[np.ndarray, "T"], vocab: Vocab
) -> list[tuple[str, Int32[np.ndarray, "_"]]]:
    """Split a sequence into ("text", ids) and ("image", codes) in order.

    Each run of image codes is one image, complete or not. BOS, PAD, EOS, BOI and EOI belong to no
    segment; SEP is text.
        [0, 8745, 8197, 11, 4, 8196, 8761, 2]
        ->  [("text", [8745]), ("image", [7, 0]), ("text", [8761])]
    """
    ids = np.asarray(ids, np.int32)
    kind = np.where(vocabulary.is_image(ids, vocab), 1, 2)  # 1 image, 2 text, 0 neither
    kind[np.isin(ids, (BOS, PAD, EOS, BOI, EOI))] = 0
    cuts = np.flatnonzero(np.diff(kind)) + 1
    segments = []
    for run, k in zip(np.split(ids, cuts), np.split(kind, cuts), strict=True):
        if run.size and k[0] == 1:
            segments.append(("image", vocabulary.ids_to_codes(run, vocab).astype(np.int32)))
        elif run.size and k[0] == 2:
            segments.append(("text", run))
    return segments


def train(texts: Iterable[str], vocab: Vocab) -> str:
    """Train the text BPE of a Chameleon-family tokenizer on `texts`; return its JSON.

    All 256 bytes come first ("!" is `vocab.text_start`, as released), then merges up to
    `vocab.size`, fewer when the texts have no more. The result is deterministic.
    """
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = _pre_tokenizer()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab.size - vocab.text_start,
        min_frequency=_MIN_PAIR_COUNT,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (p for t in texts for part in t.split(IMAGE_NAME) for p in part.split(SEP_NAME) if p)
    bpe.train_from_iterator(pieces, trainer)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    spec = json.loads(bpe.to_str())
    learned = sorted(spec["model"]["vocab"].items(), key=lambda item: item[1])
    names = vocabulary.special_names(vocab.text_start)
    names |= {name: vocab.text_start + i for name, i in learned}
    spec["model"]["vocab"] = names
    # Only these two are special inside a text: no input text can contain an end of document.
    spec["added_tokens"] = [_added(SEP_NAME, SEP), _added(IMAGE_NAME, IMAGE)]
    return json.dumps(spec, ensure_ascii=False, indent=0) + "\n"


def _pre_tokenizer() -> tokenizers.pre_tokenizers.PreTokenizer:
    pre = tokenizers.pre_tokenizers
    return pre.Sequence(
        [pre.Split(tokenizers.Regex(r), "isolated") for r in _SPLITS]
        + [
            pre.Digits(individual_digits=True),
            pre.Punctuation("isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _image_ids(codes: np.ndarray, vocab: Vocab) -> Int32[np.ndarray, "_"]:
    ids = vocabulary.codes_to_ids(np.asarray(codes).reshape(-1), vocab)
    return np.concatenate([[BOI], ids, [EOI]]).astype(np.int32)


def _check_text(ids: np.ndarray, text: str, vocab: Vocab, *, allowed: tuple[int, ...]) -> None:
    control = ids[(ids < vocab.text_start) & ~np.isin(ids, allowed)]
    if control.size:
        raise TokenizerError(
            f"the text contains control token {control[0]}; remove its name: {_short(text)}"
        )


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _added(name: str, i: int) -> dict[str, Any]:
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return dict(id=i, content=name, special=True) | plain


def _literal(name: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(name, normalized=False, special=True)


def parse_spec(raw: bytes, where: object) -> dict[str, Any]:
    """Return the JSON of a tokenizer file: byte-level BPE whose ids are integers.

    Raises TokenizerError naming `where` on anything else.
    """
    try:
        spec = parse_settings(raw, where)
    except TextFileError as error:
        raise TokenizerError(f"{error}; use the tokenizer.json of a Chameleon model") from error
    model = spec.get("model") if isinstance(spec, dict) else None
    names = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(names, dict) or not isinstance(model.get("merges"), list):
        raise TokenizerError(
            f"{where}: not a BPE tokenizer file; use the tokenizer.json of a Chameleon model"
        )
    for name, i in names.items():
        if type(i) is not int or not 0 <= i < MAX_ID:
            raise TokenizerError(
                f"{where}: {quoted(name)} has id {quoted(i)}; expected an integer in "
                f"0..{MAX_ID - 1}: not a tokenizer of this family"
            )
    tokens = spec.get("added_tokens")
    if tokens is not None and not _are_tables(tokens):
        raise TokenizerError(f"{where}: added_tokens is {quoted(tokens)}; not a tokenizer file")
    if "ByteLevel" not in json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")]):
        raise TokenizerError(
            f"{where}: not byte-level BPE; use a tokenizer of the Chameleon family"
        )
    return spec


def _are_tables(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, dict) for value in values)


def _backend(spec: dict[str, Any], path: str | Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except BaseException as error:  # the library raises bare Exception; a panic is a BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise TokenizerError(
            f"{path}: not a usable tokenizer file ({printable(error, 200)})"
        ) from error


def _rename(spec: dict[str, Any], old: str, new: str) -> None:
    names = spec["model"]["vocab"]
    names[new] = names.pop(old)
    for token in spec.get("added_tokens") or []:
        if token.get("content") == old:
            token["content"] = new


def _check_names(names: dict[str, int], vocab: Vocab, path: str | Path) -> None:
    expected = vocabulary.special_names(vocab.text_start)
    required = {*_REQUIRED, *map(vocabulary.image_token_name, range(vocab.image_codes))}
    for name, i in expected.items():
        if name in names and names[name] != i:
            raise TokenizerError(
                f"{path}: {name} has id {names[name]}, but this vocabulary requires {i}: the ids "
                "are shifted, so the file belongs to another model"
            )
        if name in required and name not in names:
            raise TokenizerError(
                f"{path}: {name} (id {i}) is missing: the file belongs to another model"
            )
    top = max(names.values())
    if top >= vocab.size:
        raise TokenizerError(
            f"{path}: has id {top} but vocab.size is {vocab.size}:"
            " the model has too few rows for this tokenizer"
        )
    for symbol in tokenizers.pre_tokenizers.ByteLevel.alphabet():
        if names.get(symbol, -1) < vocab.text_start:
            raise TokenizerError(
                f"{path}: byte symbol {symbol!r} has id {names.get(symbol)}, but text ids start"
                f" at {vocab.text_start}: the file belongs to another model"
            )
