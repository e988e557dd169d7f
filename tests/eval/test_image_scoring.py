"""Images and captions with real scorers: BiomedCLIP at random weights, EfficientNet-Lite0."""

import dataclasses
import json
import sys

import eval_setup
import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import save_file
from test_biomedclip import CONFIG, TINY, tensors
from test_efficientnet import PARITY
from test_efficientnet import tensors as lite_tensors

from medmax_jax.eval.encoders import biomedclip, efficientnet, scorer
from medmax_jax.eval.encoders.scorer import EfficientNetScorer, ImageScoringError
from medmax_jax.eval.metrics import aggregate, per_record
from medmax_jax.eval.pipeline import image_scoring
from medmax_jax.eval.stats.intervals import Resampling
from medmax_jax.eval.tasks import probes

sys.path.insert(0, str(PARITY))
import biomedclip_cases as cases  # noqa: E402


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("biomedclip")
    (folder / "vocab.txt").write_text("\n".join(cases.WORDS) + "\n", "utf-8")
    (folder / "open_clip_config.json").write_text(json.dumps(CONFIG))
    save_file(tensors("tiny"), folder / biomedclip.SAFE)
    return folder


@pytest.fixture(scope="module")
def clip(published):
    return scorer.open_scorer(f"biomedclip:{published}", batch=3, sizes=TINY)


def score(scorers, records, folder, lines=None, **options):
    return image_scoring.score_images(
        records,
        scorers,
        folder,
        images_folder=folder,
        resampling=Resampling(0, 2_000),
        progress=(lines if lines is not None else []).append,
        **options,
    )


def summary_rows(records, folder):
    rows = aggregate.summary(
        records, per_record.read(folder), mode="strict", resampling=Resampling(0, 2_000)
    )
    return {(row.task, row.metric): vars(row) for row in rows}


def test_scores_of_captions_images_and_ranks(clip, tmp_path):
    records = eval_setup.records(tmp_path)
    sets = score([clip], records, tmp_path)
    inputs = per_record.read(tmp_path)
    assert inputs.scorers == {"biomedclip": clip.fingerprint}
    lines = inputs.image_scores["biomedclip"]
    caption = lines["captioning_pmc_oa/2"]
    (shown,) = clip.embed_images([PIL.Image.open(tmp_path / "2.png")], released=False)
    answer, expected = clip.embed_texts(["An MRI of the head", "A slide"])
    assert caption["image_text"] == pytest.approx([shown @ answer], abs=1e-6)
    assert caption["text_text"] == pytest.approx(answer @ expected, abs=1e-6)
    image_cosine, text_cosine = max(0, shown @ answer), max(0, answer @ expected)
    total = image_cosine + text_cosine
    mean = 2 * image_cosine * text_cosine / total if total else 0
    assert caption["combined"] == pytest.approx(mean, abs=1e-6)
    assert lines["captioning_pmc_oa/0"]["text_text"] == pytest.approx(1)
    # two captions twice: each shares its rank with its duplicate
    texts = clip.embed_texts(["A CT of the chest", "An MRI of the head"])
    images = clip.embed_images(
        [PIL.Image.open(tmp_path / f"{n}.png").convert("RGB") for n in range(4)], released=False
    )
    for n in range(4):
        near = images @ texts[n // 2]
        assert lines[f"captioning_pmc_oa/{n}"]["rank"] == 1 + (near > near[n]).sum()
    generated = lines["image_generation_pmc_oa/0"]
    assert generated["image_image"] == pytest.approx([1.0]) and len(generated["image_text"]) == 1
    none = lines["image_generation_pmc_oa/3"]
    assert none["image_text"] == none["image_image"] == [] and none["rank"] == none["of"] == 4
    diversity = next(one for one in sets if one["metric"] == "diversity")
    assert diversity["n"] == 3 and 0 < diversity["value"] < 2 and diversity["references"] > 0


def test_captions_of_probes_are_compared_with_the_true_image(clip, tmp_path):
    """A model that describes the image it receives, shown another image."""
    records = [r for r in eval_setup.records(tmp_path) if r.family == "captioning"]
    other = {r.id: records[(n + 2) % 4] for n, r in enumerate(records)}
    swapped = [
        dataclasses.replace(r, image=other[r.id].image, text=other[r.id].text) for r in records
    ]
    score([clip], records, tmp_path)
    before, lines = (tmp_path / per_record.IMAGE_SCORES).read_bytes(), []
    (captions,) = probes.captions_to_score(records, {"swapped": swapped}).values()
    score([clip], captions, tmp_path, lines, out=per_record.probe_scores_file("swapped"))
    assert (tmp_path / per_record.IMAGE_SCORES).read_bytes() == before
    assert lines == ["biomedclip: 0 images and texts to embed"]  # all are stored by content
    probe_inputs = per_record.load_image_scores(tmp_path / "probe_swapped_image_scores.jsonl")
    for record in records:
        (cosine,) = probe_inputs.image_scores["biomedclip"][record.id]["image_text"]
        (shown,) = clip.embed_images(
            [PIL.Image.open(tmp_path / record.image).convert("RGB")], released=False
        )
        (text,) = clip.embed_texts([other[record.id].text])
        assert cosine == pytest.approx(shown @ text, abs=1e-6), record.id
    inputs = per_record.read(tmp_path)
    resampling = Resampling(0, 2_000)
    (row,) = probes.summary(
        records, {"swapped": swapped}, inputs, {"swapped": probe_inputs}, resampling=resampling
    )
    assert row["metric"] == "clip_image_text" and row["before"] != row["after"]
    (scored,) = [row["value"] for (_, m), row in summary_rows(records, tmp_path).items()
                 if m == "clip_image_text"]  # fmt: skip
    assert row["before"] == pytest.approx(scored) and row["flips"] == 1


def test_reasoning_text_is_in_the_released_cosine_only(clip, tmp_path):
    records = [r for r in eval_setup.records(tmp_path) if r.family == "captioning"][:2]
    thought = [dataclasses.replace(r, text=f"<think>An MRI.</think>{r.text}") for r in records]
    score([clip], records, tmp_path)
    plain = per_record.read(tmp_path).image_scores["biomedclip"]
    score([clip], thought, tmp_path)
    for name, line in per_record.read(tmp_path).image_scores["biomedclip"].items():
        for key in ("image_text", "text_text", "combined", "rank"):
            assert line[key] == pytest.approx(plain[name][key]), key
        assert line["image_text_released"] != plain[name]["image_text_released"]


def test_complete_image_sets_have_intervals_over_groups(clip, tmp_path):
    eval_setup.write_images(tmp_path)
    items = [
        eval_setup.item("image_generation_x", "image_generation", n, prompt="A CT", group=f"g{n}")
        for n in range(4)
    ]
    generated = [
        eval_setup.record(item, "", [f"records_images/{n}.png"]) for n, item in enumerate(items)
    ]
    sets = {row["metric"]: row for row in score([clip], generated, tmp_path)}
    kid, kinds = sets["kid"], sets["diversity"]
    assert (kid["n"], kid["groups"], kid["size"]) == (4, 4, 2)
    assert kid["ci_low"] <= kid["value"] <= kid["ci_high"] and kid["subsets_std"] >= 0
    assert kinds["ci_low"] <= kinds["value"] <= kinds["ci_high"] and kinds["references_high"] > 0
    # one patient carries no information about others
    one_patient = [dataclasses.replace(record, group="g") for record in generated]
    assert score([clip], one_patient, tmp_path) == []


def test_missing_images_get_the_blank_score_and_the_release_drops_them(clip, tmp_path):
    records = eval_setup.records(tmp_path)
    score([clip], records, tmp_path)
    lines = per_record.read(tmp_path).image_scores["biomedclip"]
    rows = summary_rows(records, tmp_path)
    many = rows["image_generation_pmc_oa", "clip_image_text"]
    generated = [lines[f"image_generation_pmc_oa/{n}"]["image_text"][0] for n in range(3)]
    blank = lines["image_generation_pmc_oa/3"]["blank_image_text"]
    assert many["headline"] and many["value"] == pytest.approx((sum(generated) + blank) / 4)
    assert many["paper"] is None and "takes the first 100" in many["paper_why"]
    both = rows["multimodal", "clip_image_image"]
    first = lines["multimodal/0"]["image_image"][0]
    blank_scores = sum(lines[f"multimodal/{n}"]["blank_image_image"] for n in (1, 2))
    assert (
        both["paper"] == pytest.approx(first) and both["paper_n"] == 1
    )  # only answers with an image
    assert both["value"] == pytest.approx((first + blank_scores) / 3)
    assert rows["multimodal", "has_image"]["value"] == pytest.approx(1 / 3)
    caption = rows["captioning_pmc_oa", "clip_image_text"]
    assert caption["headline"] and caption["paper_n"] == 4
    # a palette image is resized before it is converted in the release, and converted first here
    ours = [lines[f"captioning_pmc_oa/{n}"] for n in range(4)]
    differs = [line["image_text"] != line["image_text_released"] for line in ours]
    assert differs == [False, True, False, False]
    assert caption["paper"] == pytest.approx(np.mean([x["image_text_released"][0] for x in ours]))
    assert {"clip_caption_caption", "clip_combined", "clip_recall_1", "clip_recall_5"} <= {
        metric for task, metric in rows if task == "captioning_pmc_oa"
    }


def test_an_interrupted_run_embeds_only_missing_inputs(clip, tmp_path):
    records = eval_setup.records(tmp_path)
    score([clip], records, tmp_path)
    whole = (tmp_path / per_record.IMAGE_SCORES).read_bytes()
    rows = (tmp_path / image_scoring.STORE).read_bytes().splitlines(keepends=True)
    (tmp_path / image_scoring.STORE).write_bytes(b"".join(rows[:-4]) + rows[-4][:50])
    (tmp_path / per_record.IMAGE_SCORES).unlink()
    lines = []
    score([clip], records, tmp_path, lines)
    assert lines == ["biomedclip: 4 images and texts to embed"]
    assert len((tmp_path / image_scoring.STORE).read_bytes().splitlines()) == len(rows)
    content = (tmp_path / per_record.IMAGE_SCORES).read_bytes()
    rescored = [json.loads(line) for line in content.splitlines()]
    for line, other in zip(rescored, map(json.loads, whole.splitlines()), strict=True):
        assert line.keys() == other.keys()
        np.testing.assert_allclose(line.get("rank", 0), other.get("rank", 0))


def test_unreadable_images_are_unscored(clip, tmp_path):
    records = eval_setup.records(tmp_path)
    (tmp_path / "0.png").write_bytes(b"no image")
    (tmp_path / "2.png").unlink()
    score([clip], records, tmp_path)
    row = summary_rows(records, tmp_path)["captioning_pmc_oa", "clip_image_text"]
    assert (
        row["n"] == 4 and row["n_unscored"] == 2 and row["value"] < row["scored_only"] < row["best"]
    )
    assert row["paper_n"] == 2
    lines = per_record.read(tmp_path).image_scores["biomedclip"]
    assert "not an image in a supported format" in lines["captioning_pmc_oa/0"]["problem"]
    assert "does not exist" in lines["captioning_pmc_oa/2"]["problem"]


def test_efficientnet_scores_images_only_under_its_own_name(tmp_path):
    records = eval_setup.records(tmp_path)
    lite = EfficientNetScorer(efficientnet.from_tensors(lite_tensors()), batch=2)
    score([lite], records, tmp_path)
    rows = summary_rows(records, tmp_path)
    metrics = {metric for _, metric in rows if "_image" in metric or metric.startswith("clip")}
    assert metrics == {"efficientnet_image_image", "efficientnet_image_image_best", "has_image"}
    same = per_record.read(tmp_path).image_scores["efficientnet_lite0"]["image_generation_pmc_oa/0"]
    assert same["image_image"] == pytest.approx([1.0], abs=1e-5)
    assert rows["multimodal", "efficientnet_image_image"]["paper"] is None


@pytest.mark.parametrize("name", ["biomedclip", "clip:x", "efficientnet_lite0:"])
def test_other_scorers_are_refused(name):
    with pytest.raises(ImageScoringError, match="use biomedclip:FOLDER or efficientnet_lite0"):
        scorer.open_scorer(name, batch=2)


def test_published_files_are_checked(published, tmp_path):
    with pytest.raises(ValueError, match="missing"):
        scorer.open_scorer(f"biomedclip:{tmp_path}", batch=2, sizes=TINY)
    with pytest.raises(ValueError):  # of other sizes than the published ones
        scorer.open_scorer(f"biomedclip:{published}", batch=2)
