"""Pictures and captions before real scorers: BiomedCLIP at random weights, EfficientNet-Lite0."""

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


def see(scorers, records, folder, lines=None, **more):
    return image_scoring.score_images(
        records,
        scorers,
        folder,
        images_folder=folder,
        resampling=Resampling(0, 2_000),
        progress=(lines if lines is not None else []).append,
        **more,
    )


def told(records, folder):
    found = aggregate.summary(
        records, per_record.read(folder), mode="strict", resampling=Resampling(0, 2_000)
    )
    return {(row["task"], row["metric"]): row for row in found}


def test_captions_pictures_and_places(clip, tmp_path):
    records = eval_setup.records(tmp_path)
    sets = see([clip], records, tmp_path)
    known = per_record.read(tmp_path)
    assert known.scorers == {"biomedclip": clip.fingerprint}
    lines = known.image_scores["biomedclip"]
    caption = lines["captioning_pmc_oa/2"]
    (shown,) = clip.embed_images([PIL.Image.open(tmp_path / "2.png")], released=False)
    said, wanted = clip.embed_texts(["An MRI of the head", "A slide"])
    assert caption["image_text"] == pytest.approx([shown @ said], abs=1e-6)
    assert caption["text_text"] == pytest.approx(said @ wanted, abs=1e-6)
    seen, same = max(0, shown @ said), max(0, said @ wanted)
    mean = 2 * seen * same / (seen + same) if seen + same else 0
    assert caption["combined"] == pytest.approx(mean, abs=1e-6)
    assert lines["captioning_pmc_oa/0"]["text_text"] == pytest.approx(1)
    # two captions twice: each shares its place with its double
    texts = clip.embed_texts(["A CT of the chest", "An MRI of the head"])
    pictures = clip.embed_images(
        [PIL.Image.open(tmp_path / f"{n}.png").convert("RGB") for n in range(4)], released=False
    )
    for n in range(4):
        near = pictures @ texts[n // 2]
        assert lines[f"captioning_pmc_oa/{n}"]["rank"] == 1 + (near > near[n]).sum()
    drawn = lines["image_generation_pmc_oa/0"]
    assert drawn["image_image"] == pytest.approx([1.0]) and len(drawn["image_text"]) == 1
    none = lines["image_generation_pmc_oa/3"]
    assert none["image_text"] == none["image_image"] == [] and none["rank"] == none["of"] == 4
    diversity = next(one for one in sets if one["metric"] == "diversity")
    assert diversity["n"] == 3 and 0 < diversity["value"] < 2 and diversity["references"] > 0


def test_captions_of_probes_are_compared_with_the_true_picture(clip, tmp_path):
    """A model that says of each picture what it saw: shown another, it describes that one."""
    records = [r for r in eval_setup.records(tmp_path) if r["family"] == "captioning"]
    other = {r["id"]: records[(n + 2) % 4] for n, r in enumerate(records)}
    swapped = [
        r | {"image": other[r["id"]]["image"], "text": other[r["id"]]["text"]} for r in records
    ]
    see([clip], records, tmp_path)
    before, said = (tmp_path / per_record.IMAGE_SCORES).read_bytes(), []
    (some,) = probes.captions_to_score(records, {"swapped": swapped}).values()
    see([clip], some, tmp_path, said, out=per_record.probe_scores_file("swapped"))
    assert (tmp_path / per_record.IMAGE_SCORES).read_bytes() == before
    assert said == ["biomedclip: 0 images and texts to embed"]  # all are stored by content
    looked = per_record.load_image_scores(tmp_path / "probe_swapped_image_scores.jsonl")
    for record in records:
        (cosine,) = looked.image_scores["biomedclip"][record["id"]]["image_text"]
        (shown,) = clip.embed_images(
            [PIL.Image.open(tmp_path / record["image"]).convert("RGB")], released=False
        )
        (words,) = clip.embed_texts([other[record["id"]]["text"]])
        assert cosine == pytest.approx(shown @ words, abs=1e-6), record["id"]
    known = per_record.read(tmp_path)
    resampling = Resampling(0, 2_000)
    (row,) = probes.summary(
        records, {"swapped": swapped}, known, {"swapped": looked}, resampling=resampling
    )
    assert row["metric"] == "clip_image_text" and row["before"] != row["after"]
    (scored,) = [row["value"] for (_, m), row in told(records, tmp_path).items()
                 if m == "clip_image_text"]  # fmt: skip
    assert row["before"] == pytest.approx(scored) and row["flips"] == 1


def test_reasoning_text_is_in_the_released_cosine_only(clip, tmp_path):
    records = [r for r in eval_setup.records(tmp_path) if r["family"] == "captioning"][:2]
    thought = [r | {"text": f"<think>An MRI.</think>{r['text']}"} for r in records]
    see([clip], records, tmp_path)
    plain = per_record.read(tmp_path).image_scores["biomedclip"]
    see([clip], thought, tmp_path)
    for name, line in per_record.read(tmp_path).image_scores["biomedclip"].items():
        for key in ("image_text", "text_text", "combined", "rank"):
            assert line[key] == pytest.approx(plain[name][key]), key
        assert line["image_text_released"] != plain[name]["image_text_released"]


def test_whole_sets_have_intervals_over_groups(clip, tmp_path):
    eval_setup.pictures(tmp_path)
    items = [
        eval_setup.item("image_generation_x", "image_generation", n, prompt="A CT", group=f"g{n}")
        for n in range(4)
    ]
    drawn = [eval_setup.record(one, "", [f"records_images/{n}.png"]) for n, one in enumerate(items)]
    found = {one["metric"]: one for one in see([clip], drawn, tmp_path)}
    kid, kinds = found["kid"], found["diversity"]
    assert (kid["n"], kid["groups"], kid["size"]) == (4, 4, 2)
    assert kid["ci_low"] <= kid["value"] <= kid["ci_high"] and kid["subsets_std"] >= 0
    assert kinds["ci_low"] <= kinds["value"] <= kinds["ci_high"] and kinds["references_high"] > 0
    # of one patient nothing can be said of others
    one = [record | {"group": "g"} for record in drawn]
    assert see([clip], one, tmp_path) == []


def test_rows_with_floors_and_the_paper_s_numbers(clip, tmp_path):
    records = eval_setup.records(tmp_path)
    see([clip], records, tmp_path)
    lines, rows = per_record.read(tmp_path).image_scores["biomedclip"], told(records, tmp_path)
    many = rows["image_generation_pmc_oa", "clip_image_text"]
    drawn = [lines[f"image_generation_pmc_oa/{n}"]["image_text"][0] for n in range(3)]
    blank = lines["image_generation_pmc_oa/3"]["blank_image_text"]
    assert many["headline"] and many["value"] == pytest.approx((sum(drawn) + blank) / 4)
    assert many["paper"] is None and "takes the first 100" in many["paper_why"]
    both = rows["multimodal", "clip_image_image"]
    first = lines["multimodal/0"]["image_image"][0]
    floor = sum(lines[f"multimodal/{n}"]["blank_image_image"] for n in (1, 2))
    assert both["paper"] == pytest.approx(first) and both["paper_n"] == 1  # who drew, only
    assert both["value"] == pytest.approx((first + floor) / 3)
    assert rows["multimodal", "has_image"]["value"] == pytest.approx(1 / 3)
    caption = rows["captioning_pmc_oa", "clip_image_text"]
    assert caption["headline"] and caption["paper_n"] == 4
    # a palette picture is resized before it is converted in the release, and converted first here
    ours = [lines[f"captioning_pmc_oa/{n}"] for n in range(4)]
    differs = [line["image_text"] != line["image_text_released"] for line in ours]
    assert differs == [False, True, False, False]
    assert caption["paper"] == pytest.approx(np.mean([x["image_text_released"][0] for x in ours]))
    assert {"clip_caption_caption", "clip_combined", "clip_recall_1", "clip_recall_5"} <= {
        metric for task, metric in rows if task == "captioning_pmc_oa"
    }


def test_interrupted_it_embeds_only_what_is_not_there(clip, tmp_path):
    records = eval_setup.records(tmp_path)
    see([clip], records, tmp_path)
    whole = (tmp_path / per_record.IMAGE_SCORES).read_bytes()
    rows = (tmp_path / image_scoring.STORE).read_bytes().splitlines(keepends=True)
    (tmp_path / image_scoring.STORE).write_bytes(b"".join(rows[:-4]) + rows[-4][:50])
    (tmp_path / per_record.IMAGE_SCORES).unlink()
    said = []
    see([clip], records, tmp_path, said)
    assert said == ["biomedclip: 4 images and texts to embed"]
    assert len((tmp_path / image_scoring.STORE).read_bytes().splitlines()) == len(rows)
    found = [json.loads(x) for x in (tmp_path / per_record.IMAGE_SCORES).read_bytes().splitlines()]
    for one, other in zip(found, map(json.loads, whole.splitlines()), strict=True):
        assert one.keys() == other.keys()
        np.testing.assert_allclose(one.get("rank", 0), other.get("rank", 0))


def test_what_cannot_be_seen_is_unscored(clip, tmp_path):
    records = eval_setup.records(tmp_path)
    (tmp_path / "0.png").write_bytes(b"no picture")
    (tmp_path / "2.png").unlink()
    see([clip], records, tmp_path)
    row = told(records, tmp_path)["captioning_pmc_oa", "clip_image_text"]
    assert (
        row["n"] == 4 and row["n_unscored"] == 2 and row["value"] < row["scored_only"] < row["best"]
    )
    assert row["paper_n"] == 2
    lines = per_record.read(tmp_path).image_scores["biomedclip"]
    assert "not a picture this program reads" in lines["captioning_pmc_oa/0"]["problem"]
    assert "does not exist" in lines["captioning_pmc_oa/2"]["problem"]


def test_efficientnet_compares_pictures_only_under_its_own_name(tmp_path):
    records = eval_setup.records(tmp_path)
    see([EfficientNetScorer(efficientnet.from_tensors(lite_tensors()), batch=2)], records, tmp_path)
    rows = told(records, tmp_path)
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
