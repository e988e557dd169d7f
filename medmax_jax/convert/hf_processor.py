"""Hugging Face's tokenizer and processor files, written by transformers itself.

Meta's text_tokenizer.json holds all names in one BPE vocabulary; the two differ in three things:

                       Meta                      HF
    id 8711            <reserved08707>           <image>
    special in text    none                      <s> .. <eoss> <racm3:break> .. <image>
    BOS                added by the caller       added by the tokenizer
"""

import json
import os
import pathlib
import tempfile
from typing import Any

import tokenizers

from medmax_jax.convert.form import Checkpoint, ConvertError
from medmax_jax.storage import Folder
from medmax_jax.tokenizer import IMAGE_NAME, SEP_NAME, UNMODIFIED_IMAGE_NAME, parse_spec

WHERE = "the tokenizer file"  # in messages, where its path is not known
BOS, PAD, EOS, UNK = "<s>", "<pad>", "</s>", "<unk>"
SPECIAL = (BOS, PAD, EOS, UNK, "<eoss>", "<racm3:break>", SEP_NAME, IMAGE_NAME)
RESCALE = 0.0078  # HF's image processor; Meta divides by 127.5, which is 0.00784
MEAN = STD = [1.0, 1.0, 1.0]


def vocabulary(tokenizer: bytes, where: str = WHERE) -> dict[str, int]:
    """Name -> id, with 8711 named <image>; raises TokenizerError when it is no tokenizer file."""
    names = dict(parse_spec(tokenizer, where)["model"]["vocab"])
    if UNMODIFIED_IMAGE_NAME in names and IMAGE_NAME not in names:
        names[IMAGE_NAME] = names.pop(UNMODIFIED_IMAGE_NAME)
    return dict(sorted(names.items(), key=lambda item: item[1]))


def modified(tokenizer: bytes) -> bytes:
    """The file as MedMax's text_tokenizer_modified.json: `<reserved08707>` renamed `<image>`."""
    spec = parse_spec(tokenizer, WHERE)
    spec["model"]["vocab"] = vocabulary(tokenizer)
    for token in spec.get("added_tokens") or []:
        if token.get("content") == UNMODIFIED_IMAGE_NAME:
            token["content"] = IMAGE_NAME
    return json.dumps(spec, ensure_ascii=False).encode()


def unmodified(tokenizer: bytes) -> bytes:
    """The file as Meta's text_tokenizer.json; Meta's own comes back byte for byte."""
    spec = parse_spec(tokenizer, WHERE)
    names = spec["model"]["vocab"]
    if IMAGE_NAME not in names:
        return tokenizer
    names[UNMODIFIED_IMAGE_NAME] = names.pop(IMAGE_NAME)
    spec["model"]["vocab"] = dict(sorted(names.items(), key=lambda item: item[1]))
    spec |= {"added_tokens": [], "post_processor": None}
    return json.dumps(spec, ensure_ascii=False).encode()


def write(folder: Folder, checkpoint: Checkpoint) -> None:
    """tokenizer.json, tokenizer_config.json, processor and generation settings."""
    # Without torch it warns, at its import already; nothing that is written here needs torch.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers  # seconds to import, and only this function needs it

    transformers.logging.set_verbosity_error()
    spec = json.loads(modified(checkpoint.tokenizer))
    names = spec["model"]["vocab"]
    if missing := [name for name in (BOS, PAD, EOS, SEP_NAME, IMAGE_NAME) if name not in names]:
        raise ConvertError(
            f"{checkpoint.path}: its tokenizer has no {missing[0]}, which Hugging Face's processor "
            "needs; use the tokenizer that came with the weights"
        )
    spec["added_tokens"] = [_added(name, names[name]) for name in SPECIAL if name in names]
    spec["post_processor"] = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, names[BOS])]
    )
    spec["post_processor"] = json.loads(spec["post_processor"].__getstate__())
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    text = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK,
        sep_token=SEP_NAME, clean_up_tokenization_spaces=False, padding_side="left",
        model_max_length=checkpoint.model.context_length,
    )  # fmt: skip
    vq = checkpoint.vq
    size = dict(height=vq.image_size, width=vq.image_size)
    pictures = transformers.ChameleonImageProcessor(
        size={"shortest_edge": vq.image_size}, crop_size=size, rescale_factor=RESCALE,
        image_mean=MEAN, image_std=STD,
    )  # fmt: skip
    processor = transformers.ChameleonProcessor(
        pictures, text, image_seq_length=vq.codes_per_image, image_token=IMAGE_NAME
    )
    with tempfile.TemporaryDirectory() as scratch:
        pictures.save_pretrained(scratch)  # preprocessor_config.json, which transformers 4 reads
        processor.save_pretrained(scratch)
        for path in sorted(pathlib.Path(scratch).iterdir()):
            folder.write(path.name, [path.read_bytes()])
    generation = dict(bos_token_id=0, eos_token_id=2, pad_token_id=1)
    folder.write("generation_config.json", [json.dumps(generation, indent=2).encode() + b"\n"])


def _added(name: str, number: int) -> dict[str, Any]:
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    return dict(id=number, content=name, special=True) | plain
