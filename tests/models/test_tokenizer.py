"""The tokenizer: round trips, the id layout, the file of the MedMax release, and wrong files."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medmax_jax.config import Vocab, build
from medmax_jax.configs import base, tiny
from medmax_jax.models import tokenizer as tk
from medmax_jax.models import vocab as vocabulary
from medmax_jax.models.vocab import BOI, BOS, EOI, EOS, IMAGE, SEP

TINY = Vocab(size=9_100, image_codes=512, text_start=8_712)
FULL = Vocab(size=16_900, image_codes=8_192, text_start=16_384)
CORPUS = [
    "Is this a CT of the chest? <image><reserved08706>Yes, this is a CT of the chest.",
    "Which plane is shown? <image><reserved08706>The axial plane, 12 mm below the apex.",
] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    (folder / "tiny.json").write_text(tk.train(CORPUS, TINY))
    (folder / "full.json").write_text(tk.train(CORPUS, FULL))
    return folder


@pytest.fixture(scope="module", params=["tiny", "full"])
def tokenizer(request, folder):
    vocab = {"tiny": TINY, "full": FULL}[request.param]
    return tk.Tokenizer.from_file(folder / f"{request.param}.json", vocab)


def edited(folder, edit):
    """Write the tiny file with `edit` applied to its JSON."""
    spec = json.loads((folder / "tiny.json").read_text())
    edit(spec)
    path = folder / "edited.json"
    path.write_text(json.dumps(spec))
    return path


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_byte_has_an_id(tokenizer):
    every = "".join(map(chr, range(256))) + "漢字 🫁"
    ids = tokenizer.encode(every)
    assert tokenizer.decode(ids) == every
    assert min(ids) >= tokenizer.vocab.text_start
    assert tokenizer.encode("!") == [tokenizer.vocab.text_start]  # as released: "!" is the first


def test_only_placeholder_and_separator_are_special_in_text(tokenizer):
    ids = tokenizer.encode("a<image>b<reserved08706>c")
    assert [i for i in ids if i < tokenizer.vocab.text_start] == [IMAGE, SEP]
    assert tokenizer.decode(ids) == "a<image>b<reserved08706>c"
    typed = tokenizer.encode("</s><racm3:break>IMGIMGAZ<sentinel:3>")
    assert min(typed) >= tokenizer.vocab.text_start


def test_digits_and_punctuation_are_separate_tokens(tokenizer):
    assert len(tokenizer.encode("2024")) == 4
    assert len(tokenizer.encode("...")) == 3


def test_merges_are_learned(tokenizer):
    assert len(tokenizer.encode(" chest")) == 1


def test_training_is_deterministic():
    assert tk.train(CORPUS, TINY) == tk.train(iter(CORPUS), TINY)


def test_decode_omits_tokens_that_are_not_text(tokenizer):
    ids = [BOS, *tokenizer.encode("CT"), SEP, *tokenizer.encode("no"), EOS, 1, 1]
    assert tokenizer.decode(np.asarray(ids)) == "CT<reserved08706>no"


def test_unmodified_chameleon_file(folder):
    """In Meta's own file 8711 is <reserved08707>, and no placeholder is marked."""

    def unmodify(spec):
        names = spec["model"]["vocab"]
        names["<reserved08707>"] = names.pop("<image>")
        spec["added_tokens"] = []

    tokenizer = tk.Tokenizer.from_file(edited(folder, unmodify), TINY)
    modified = tk.Tokenizer.from_file(folder / "tiny.json", TINY)
    text = "A <image> here<reserved08706>yes"
    assert tokenizer.encode(text) == modified.encode(text)
    assert tokenizer.fingerprint != modified.fingerprint


def test_unmodified_file_that_lists_its_specials(folder):
    def unmodify(spec):
        names = spec["model"]["vocab"]
        names["<reserved08707>"] = names.pop("<image>")
        for token in spec["added_tokens"]:
            token["content"] = token["content"].replace("<image>", "<reserved08707>")

    tokenizer = tk.Tokenizer.from_file(edited(folder, unmodify), TINY)
    assert tokenizer.encode("<image>") == [IMAGE]


def test_post_processor_and_truncation_are_ignored(folder):
    """HF files have a post-processor that adds <s>, and may truncate: both are disabled."""

    def add(spec):
        a, b = ({"Sequence": {"id": i, "type_id": 0}} for i in "AB")
        spec["post_processor"] = dict(
            type="TemplateProcessing",
            single=[{"SpecialToken": {"id": "<s>", "type_id": 0}}, a],
            pair=[a, b],
            special_tokens={"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        )
        spec["truncation"] = dict(
            direction="Right", max_length=2, strategy="LongestFirst", stride=0
        )

    tokenizer = tk.Tokenizer.from_file(edited(folder, add), TINY)
    assert tokenizer.decode(tokenizer.encode("no beginning, no end")) == "no beginning, no end"
    assert BOS not in tokenizer.encode("no beginning, no end")


def shift(spec):
    names = spec["model"]["vocab"]
    spec["model"]["vocab"] = {n: i + (i >= 8_710) for n, i in names.items()}


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda s: s.update(model={"type": "WordPiece", "vocab": {}}), "not a BPE tokenizer"),
        (
            lambda s: s.update(pre_tokenizer=None, decoder=None),
            "use a tokenizer of the Chameleon family",
        ),
        (shift, "<reserved08706> has id 8711, but this vocabulary requires 8710"),
        (lambda s: s["model"]["vocab"].update({"toomuch": 9_100}), "vocab.size is 9100"),
        (lambda s: s["model"]["vocab"].pop("<eoss>"), "<eoss> .id 8196. is missing"),
        (lambda s: s["model"]["vocab"].pop("IMGIMGAZ"), "IMGIMGAZ"),
        (lambda s: s["model"]["vocab"].pop("Ġ"), "byte symbol"),
    ],
)
def test_wrong_files_raise(folder, edit, message):
    with pytest.raises(tk.TokenizerError, match=message):
        tk.Tokenizer.from_file(edited(folder, edit), TINY)


def test_other_vocabulary_raises(folder):
    with pytest.raises(tk.TokenizerError, match="this vocabulary requires|byte symbol"):
        tk.Tokenizer.from_file(folder / "tiny.json", FULL)
    with pytest.raises(tk.TokenizerError, match=r"vocab\.size|byte symbol"):
        tk.Tokenizer.from_file(folder / "full.json", TINY)


def test_missing_file_and_invalid_json_raise(folder):
    with pytest.raises(tk.TokenizerError, match="cannot be read"):
        tk.Tokenizer.from_file(folder / "absent.json", TINY)
    (folder / "text.json").write_text("<html>")
    with pytest.raises(tk.TokenizerError, match="not JSON"):
        tk.Tokenizer.from_file(folder / "text.json", TINY)


def test_document(tokenizer):
    vocab = tokenizer.vocab
    ids = tk.document_ids(tokenizer, "CT<image>no", np.array([7, 0]), vocab)
    expected = [BOS, *tokenizer.encode("CT"), BOI, 11, 4, EOI, *tokenizer.encode("no"), EOS]
    assert ids.tolist() == expected and ids.dtype == np.int32
    twice = tk.document_ids(tokenizer, "<image><image>", np.array([7]), vocab)
    assert twice.tolist() == [BOS, BOI, 11, EOI, BOI, 11, EOI, EOS]
    plain = tk.document_ids(tokenizer, "no image", None, vocab)
    assert plain.tolist() == [BOS, *tokenizer.encode("no image"), EOS]


def test_document_without_its_image_or_placeholder_raises(tokenizer):
    vocab = tokenizer.vocab
    with pytest.raises(tk.TokenizerError, match="there is no image"):
        tk.document_ids(tokenizer, "a <image>", None, vocab)
    with pytest.raises(tk.TokenizerError, match="the text does not contain <image>"):
        tk.document_ids(tokenizer, "a", np.array([1]), vocab)
    with pytest.raises(ValueError, match="VQ code"):
        tk.document_ids(tokenizer, "<image>", np.array([vocab.image_codes]), vocab)


def test_control_tokens_in_text_raise(folder):
    """The released file encodes special names in text; a document must not end inside its text."""

    def add_special(spec):
        end = dict(spec["added_tokens"][0], id=EOS, content="</s>")
        spec["added_tokens"] = [end, *spec["added_tokens"]]

    tokenizer = tk.Tokenizer.from_file(edited(folder, add_special), TINY)
    assert tokenizer.encode("</s>") == [EOS]
    with pytest.raises(tk.TokenizerError, match="control token 2"):
        tk.document_ids(tokenizer, "the </s> end", None, TINY)
    with pytest.raises(tk.TokenizerError, match="control token 2"):
        tk.prompt_ids(tokenizer, ["the </s> end"], TINY, end_of_turn=True)


def test_prompt(tokenizer):
    vocab = tokenizer.vocab
    ids = tk.prompt_ids(tokenizer, [np.array([7, 0]), "CT?"], vocab, end_of_turn=True)
    assert ids.tolist() == [BOS, BOI, 11, 4, EOI, *tokenizer.encode("CT?"), SEP]
    assert tk.prompt_ids(tokenizer, [], vocab, end_of_turn=False).tolist() == [BOS]
    with pytest.raises(tk.TokenizerError, match="contains <image>; pass the image there"):
        tk.prompt_ids(tokenizer, ["<image>CT?"], vocab, end_of_turn=True)


def test_split_segments_inverts_document_ids(tokenizer):
    vocab = tokenizer.vocab
    codes = np.array([7, 0, 3])
    ids = tk.document_ids(tokenizer, "CT<image>no", codes, vocab)
    kinds = [(k, v.tolist()) for k, v in tk.split_segments(ids, vocab)]
    assert kinds == [
        ("text", tokenizer.encode("CT")),
        ("image", [7, 0, 3]),
        ("text", tokenizer.encode("no")),
    ]
    unfinished = tk.split_segments(np.array([BOS, BOI, 11, 4], np.int32), vocab)
    assert [(k, v.tolist()) for k, v in unfinished] == [("image", [7, 0])]
    assert tk.split_segments(np.array([BOS, EOS], np.int32), vocab) == []
    two = tk.split_segments(np.array([BOI, 5, EOI, BOI, 6, EOI], np.int32), vocab)
    assert [v.tolist() for _, v in two] == [[1], [2]]


def test_special_names_agree_with_the_layout(tokenizer):
    names = vocabulary.special_names(tokenizer.vocab.text_start)
    assert sorted(names.values()) == list(range(tokenizer.vocab.text_start))


def test_released_vocabulary_is_that_of_the_base_config():
    assert build(Vocab, base.get_config().vocab) == vocabulary.RELEASED


def test_included_tiny_tokenizer():
    vocab = build(Vocab, tiny.get_config().vocab)
    shipped = Path(tk.__file__).parents[1] / "tiny" / "tokenizer.json"
    tokenizer = tk.Tokenizer.from_file(shipped, vocab)
    question = "<image>Is this a CT of the chest?<reserved08706>yes"
    assert len(tokenizer.encode(question)) == 11 and tokenizer.encode(" chest")[0] > 8_967
    assert tokenizer.decode(tokenizer.encode(question)) == question
    assert all(len(tokenizer.encode(answer)) == 1 for answer in ("yes", "no", "A", "D"))
