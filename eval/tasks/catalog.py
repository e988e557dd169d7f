"""Lists the suite's tasks in one table: their rows, prompts and metrics.

eval/suite.py prints it. The cards of MedMax's tasks are here; those of any other benchmark are in
its module of eval/benchmarks/, with its reader, which eval/tasks/benchmark_readers.py lists.
"""

from collections.abc import Mapping

from medmax_jax.endpoints.egress import CREDENTIALED, LICENCE_BOUND, OPEN
from medmax_jax.eval.benchmarks import (
    deeptumorvqa,
    gmai_mmbench,
    kormedmcqa,
    kvasir_vqa,
    medbookvqa,
    medframeqa,
    medgen,
    mediconfusion,
    medthink,
    medxpertqa,
    smmile,
)
from medmax_jax.eval.benchmarks.card import Published, TaskSpec, published_scores
from medmax_jax.eval.metrics.question_sets import QuestionSets

SITE = "the authors' site, results table"
CHART = "a chart on the authors' site, by eye"
CAPTIONS_CHART, CHAT_CHART, MULTI_CHART = (
    f"{CHART}: {name}"
    for name in ("perf_image_cap_gen_fig7", "visual_chabot_compare_fig9", "multimodal_gen_fig8")
)
EXPECTED_ROWS = {  # of a benchmark's own test files, by name in eval/tasks/benchmark_readers.py
    "vqa_rad": 451,  # its README.md on huggingface.co; the file that its card names
    "slake": 1_061,  # English; the file that its card names
    "pathvqa": 6_719,  # README.md
    "quilt_vqa": 1_283,  # Quilt-LLaVA, arXiv 2312.04746, abstract
    "probmed": 57_132,  # README.md
    "pmc_vqa_clean": 2_000,  # viewer of AdaptLLM/biomed-VQA-benchmark, a copy of it
    "llava_med": 193,  # the file
}
RELEASED = "mint-medmax/medmax_eval_data, split train; gated"


MODELS = (
    ("Chameleon 7B", "48.6 59.1 58.9 71.4 32.0 5.3 18.0 15.3 31.0 45.7 34.5 52.8"),
    ("LLaVA-Med v1.5 7B", "61.0 48.7 62.7 63.0 23.0 25.1 6.2 17.2 18.9 28.7 29.8 58.5"),
    ("GPT-4o mini", "55.8 50.4 48.7 38.5 13.0 49.3 7.3 28.0 39.6 45.1 35.6 50.6"),
    ("GPT-4o", "54.2 50.1 59.2 44.6 17.6 63.7 9.1 36.1 40.8 40.9 39.1 48.3"),
    ("HuatuoGPT-Vision 7B", "74.5 70.7 65.9 55.7 19.0 53.3 6.0 22.2 51.6 75.6 55.4 78.7"),
    ("MedMax 7B", "75.3 88.4 91.8 61.2 46.5 82.2 40.6 26.0 49.0 99.5 49.3 75.8"),
)
COLUMNS = (
    *("vqa_rad_closed", "slake_closed", "pathvqa_closed", "quilt_vqa_closed"),
    *("vqa_rad_open", "slake_open", "pathvqa_open", "quilt_vqa_open"),
    *("pmc_vqa_mcq", "omnimed_vqa_mcq", "path_mmu_mcq", "probmed_closed"),
)
AVERAGES = tuple(  # plain means of the twelve tasks of COLUMNS
    Published(model=model, value=value, metric="mean accuracy of 12 VQA tasks, %", read=read)
    for model, value, read in (
        ("Chameleon 7B", 39.4, SITE),
        ("LLaVA-Med v1.5 7B", 36.6, f"{SITE}; the mean of its row is 36.9"),
        ("GPT-4o mini", 38.5, SITE),
        ("GPT-4o", 42.0, SITE),
        ("GPT-4o", 47.2, "the paper's abstract: MedMax is 18.3 points above GPT-4o"),
        ("HuatuoGPT-Vision 7B", 52.4, SITE),
        ("MedMax 7B", 65.5, SITE),
    )
)
CHARTS: Mapping[str, tuple[str, str, tuple[tuple[str, float], ...]]] = {
    "captioning_pmc_oa": (
        "BiomedCLIP image-text cosine",
        CAPTIONS_CHART,
        (("Chameleon 7B", 0.25), ("MedMax 7B", 0.37), ("reference captions", 0.33)),
    ),
    "captioning_quilt": (
        "BiomedCLIP image-text cosine",
        CAPTIONS_CHART,
        (("Chameleon 7B", 0.24), ("MedMax 7B", 0.32), ("reference captions", 0.31)),
    ),
    "captioning_report": (
        "BiomedCLIP image-text cosine",
        CAPTIONS_CHART,
        (("Chameleon 7B", 0.36), ("MedMax 7B", 0.41), ("reference captions", 0.40)),
    ),
    "image_generation_pmc_oa": (
        "BiomedCLIP image-text cosine",
        CAPTIONS_CHART,
        (("Chameleon 7B", 0.10), ("MedMax 7B", 0.20), ("reference images", 0.33)),
    ),
    "image_generation_quilt": (
        "BiomedCLIP image-text cosine",
        CAPTIONS_CHART,
        (("Chameleon 7B", 0.21), ("MedMax 7B", 0.24), ("reference images", 0.31)),
    ),
    "image_generation_report": (
        "BiomedCLIP image-text cosine",
        CAPTIONS_CHART,
        (("Chameleon 7B", 0.20), ("MedMax 7B", 0.30), ("reference images", 0.40)),
    ),
    "visual_chat_conversation": (
        "gpt-4o-mini relative score",
        CHAT_CHART,
        (
            *(("Chameleon 7B", 28.0), ("LLaVA-Med v1", 55.0), ("HuatuoGPT-Vision 7B", 61.0)),
            *(("LLaVA-Med v1.5 7B", 66.3), ("MedMax 7B", 64.4)),
        ),
    ),
    "visual_chat_detailed_description": (
        "gpt-4o-mini relative score",
        CHAT_CHART,
        (
            *(("Chameleon 7B", 21.7), ("LLaVA-Med v1", 36.4), ("HuatuoGPT-Vision 7B", 58.8)),
            *(("LLaVA-Med v1.5 7B", 51.6), ("MedMax 7B", 48.8)),
        ),
    ),
    "multimodal": (
        "gpt-4o-mini relative score of the text",
        MULTI_CHART,
        (("Chameleon 7B", 75.3), ("MedMax 7B", 94.3)),
    ),
}
INTERLEAVED_IMAGE_SCORES = (
    ("Chameleon 7B", 0.35),
    ("MedMax 7B", 0.46),
)  # image-image cosine, same chart
LLADA = "images/table.png of github.com/LLM-VLM-GSL/LLaDA-MedV at 70f733e"
UNIMEDVL = "README.md of github.com/uni-medical/UniMedVL at 64a9915; split not stated"
KIT = "assets/mm_eval.png of github.com/alibaba-damo-academy/MedEvalKit at 9b12e3b"
TOGETHER = "accuracy of closed and open questions together, %"
TUNED = "accuracy after training on the benchmark, %"
RECALL = "token recall after training on the benchmark, %"
UNMATCHED = (TOGETHER, RECALL)  # metrics that are no row of this suite
OTHERS: Mapping[str, tuple[tuple[str, float, str, str], ...]] = {  # model, value, metric, read
    "vqa_rad_closed": (
        ("LLaDA-MedV", 84.93, TUNED, LLADA),
        ("UniMedVL", 61.9, TOGETHER, UNIMEDVL),
        ("HealthGPT-L14 by UniMedVL", 58.3, TOGETHER, UNIMEDVL),
        ("HealthGPT-14B by MedEvalKit", 65.0, TOGETHER, KIT),
    ),
    "slake_closed": (
        ("LLaDA-MedV", 92.31, TUNED, LLADA),
        ("UniMedVL", 75.4, TOGETHER, UNIMEDVL),
        ("HealthGPT-L14 by UniMedVL", 64.5, TOGETHER, UNIMEDVL),
        ("HealthGPT-14B by MedEvalKit", 66.1, TOGETHER, KIT),
    ),
    "pathvqa_closed": (
        ("LLaDA-MedV", 95.15, TUNED, LLADA),
        ("UniMedVL", 53.5, TOGETHER, UNIMEDVL),
        ("HealthGPT-L14 by UniMedVL", 44.4, TOGETHER, UNIMEDVL),
        ("HealthGPT-14B by MedEvalKit", 56.7, TOGETHER, KIT),
    ),
    "vqa_rad_open": (("LLaDA-MedV", 45.60, RECALL, LLADA),),
    "slake_open": (("LLaDA-MedV", 68.85, RECALL, LLADA),),
    "pathvqa_open": (("LLaDA-MedV", 31.96, RECALL, LLADA),),
    "pmc_vqa_mcq": (("HealthGPT-14B", 56.4, "accuracy by MedEvalKit, %", KIT),),
    "omnimed_vqa_mcq": (
        ("UniMedVL", 85.8, "accuracy by UniMedVL's authors, %", UNIMEDVL),
        ("HealthGPT-L14", 74.4, "accuracy by UniMedVL's authors, %", UNIMEDVL),
        ("HealthGPT-14B", 75.2, "accuracy by MedEvalKit, %", KIT),
    ),
    "visual_chat_conversation": (("LLaDA-MedV", 54.141, "GPT-4.1 relative score", LLADA),),
    "visual_chat_detailed_description": (("LLaDA-MedV", 48.214, "GPT-4.1 relative score", LLADA),),
}
OWN_SCORERS = {  # by family
    family: f"evaluation/{file} of the MedMax release at 20b7055: agrees on {count} of {count} "
    "outputs"
    for family, file, count in (
        ("vqa_closed", "vqa.py", "1,600"),
        ("vqa_mcq", "vqa.py", "1,600"),
        ("vqa_open", "vqa.py", "1,400"),
        ("multimodal", "mm_out.py", "1,000"),
    )
}
CHAT_OVERALL = published_scores(  # over the questions of both types of visual chat
    "gpt-4o-mini relative score",
    CHAT_CHART,
    *(("Chameleon 7B", 26.5), ("LLaVA-Med v1", 50.2), ("HuatuoGPT-Vision 7B", 60.5)),
    *(("LLaVA-Med v1.5 7B", 62.5), ("MedMax 7B", 60.4)),
)
DIFFERS = {  # by family; docs/reference/release_defects.md has all of them
    "vqa_closed": "1 token, repetition penalty 1.2 over the prompt too, substring match",
    "vqa_mcq": "1 token, repetition penalty 1.2 over the prompt too, the letter alone",
    "vqa_open": "60 tokens, penalty 1.2; one gpt-4o-mini verdict, unreadable ones dropped",
    "captioning": "penalty 1.2; image against text only, over 256 tokens cut",
    "image_generation": "the first 100 rows",
    "multimodal": "penalty 1.2; the reference always first; images over the answers that have one",
    "visual_chat": "penalty 1.2; the reference always first, the model's complete record shown",
}


def _published(task: str) -> tuple[Published, ...]:
    others = OTHERS.get(task, ())
    return _of_medmax(task) + tuple(
        Published(model=model, value=value, metric=metric, read=read)
        for model, value, metric, read in others
    )


def _of_medmax(task: str) -> tuple[Published, ...]:
    if task in COLUMNS:
        metric = "right by gpt-4o-mini, %" if task.endswith("_open") else "accuracy, %"
        column = COLUMNS.index(task)
        scores = ((model, float(line.split()[column])) for model, line in MODELS)
        return published_scores(metric, SITE, *scores)
    if task not in CHARTS:
        return ()
    metric, read, values = CHARTS[task]
    published = published_scores(metric, read, *values)
    if task == "multimodal":
        image_metric = "BiomedCLIP image-image cosine"
        published += published_scores(image_metric, read, *INTERLEAVED_IMAGE_SCORES)
    return published


def _task_spec(task: str, title: str, family: str, **fields) -> TaskSpec:
    defaults = dict(
        differs=DIFFERS[family],
        published=_published(task),
        own_scorer=OWN_SCORERS.get(family, ""),
    )
    return TaskSpec(task=task, title=title, family=family, **defaults | fields)


def _vqa(
    name: str, title: str, closed: int | None, opened: int | None, left_out: int = 0, **fields
) -> list[TaskSpec]:
    return [
        _task_spec(
            f"{name}_closed",
            f"{title}, closed",
            "vqa_closed",
            counts=closed,
            left_out=left_out,
            metric="accuracy",
            **fields,
        ),
        _task_spec(
            f"{name}_open",
            f"{title}, open",
            "vqa_open",
            counts=opened,
            metric="judge_correct",
            **fields,
        ),
    ]


_TASKS = (
    *_vqa(
        "vqa_rad",
        "VQA-RAD",
        251,
        179,
        left_out=21,
        counted="data/testset.json of github.com/Awenbocc/med-vqa at 0cca6811, by answer_type",
        source="osf.io/89kps, VQA_RAD Dataset Public.json",
        licence="CC0 1.0",
        data_class=OPEN,
        run_by="MedEvalKit",
    ),
    *_vqa(
        "slake",
        "SLAKE, English",
        355,
        645,
        left_out=61,
        counted="Slake1.0/test.json of github.com/xiaoman-zhang/PMC-VQA at 1678ec2c, English",
        source="huggingface.co/datasets/BoKelvin/SLAKE",
        licence="CC BY 4.0",
        data_class=OPEN,
        run_by="MedEvalKit, lmms-eval, MedVLMBench",
    ),
    *_vqa(
        "pathvqa",
        "PathVQA",
        None,
        None,
        counted="6,719 together: README.md of the source",
        source="huggingface.co/datasets/flaviagiammarino/path-vqa",
        licence="MIT; the images belong to their publishers",
        run_by="MedEvalKit, VLMEvalKit, MedVLMBench",
    ),
    *_vqa(
        "quilt_vqa",
        "Quilt-VQA",
        343,
        940,
        counted="by its users; 1,283 together: arXiv 2312.04746",
        source="huggingface.co/datasets/wisdomik/Quilt_VQA",
        licence="CC BY-NC-ND 3.0, gated",
    ),
    _task_spec(
        "pmc_vqa_mcq",
        "PMC-VQA",
        "vqa_mcq",
        source="huggingface.co/datasets/xmcmic/PMC-VQA, test_2.csv or test.csv",
        counts=33_430,
        counted="test_2.csv: README.md of huggingface.co/datasets/mdwiratathya/PMC-VQA_small, a "
        "copy; test.csv, version 1, has about 50,000",
        run_by="MedEvalKit",
        licence="CC BY-SA: README.md of the source",
        metric="accuracy",
    ),
    _task_spec(
        "pmc_vqa_clean_mcq",
        "PMC-VQA, the checked part of version 1",
        "vqa_mcq",
        source="huggingface.co/datasets/xmcmic/PMC-VQA, test_clean.csv",
        counts=2_000,
        counted="viewer of huggingface.co/datasets/AdaptLLM/biomed-VQA-benchmark, a copy",
        licence="CC BY-SA: README.md of the source",
        metric="accuracy",
    ),
    _task_spec(
        "omnimed_vqa_mcq",
        "OmniMedVQA, open access",
        "vqa_mcq",
        source="huggingface.co/datasets/foreverbeliever/OmniMedVQA",
        split="9 % of the images by hash, as in training here: none is published",
        licence="that of each of its 42 data sets",
        run_by="MedEvalKit, VLMEvalKit",
        metric="accuracy",
    ),
    _task_spec(
        "path_mmu_mcq",
        "PathMMU",
        "vqa_mcq",
        source="huggingface.co/datasets/jamessyx/PathMMU, data.json",
        split="test and test_tiny of all subsets",
        licence="CC BY-ND 4.0, gated; the images belong to their publishers",
        run_by="VLMEvalKit",
        metric="accuracy",
    ),
    _task_spec(
        "probmed_closed",
        "ProbMed",
        "vqa_closed",
        source="huggingface.co/datasets/rippleripple/ProbMed, test.json",
        counts=57_132,
        counted="README.md of github.com/eric-ai-lab/ProbMed",
        licence="MIT: its page on huggingface.co; images of MedICaT and ChestX-ray14",
        metric="accuracy",
        sets=QuestionSets(
            metric="paired_accuracy", key=("image", "question_type"), by="question_type"
        ),
        differs=f"{DIFFERS['vqa_closed']}; the poster counts ProbMed as multiple choice, its rows "
        "are closed questions",
    ),
    *(
        _task_spec(
            f"{family}_{name}",
            f"{title}, {what}",
            family,
            source=source,
            licence=licence,
            data_class=data_class,
            split=split,
            prompt=prompt,
            metric="clip_image_text",
        )
        for name, title, source, split, licence, data_class in (
            (
                "pmc_oa",
                "PMC-OA",
                "huggingface.co/datasets/axiong/pmc_oa, test.jsonl",
                "test",
                "not stated; articles of the PMC open-access subset",
                LICENCE_BOUND,
            ),
            ("quilt", "Quilt-1M", RELEASED, "released", "research only", LICENCE_BOUND),
            ("report", "MIMIC-CXR", RELEASED, "released", "PhysioNet credentialed", CREDENTIALED),
        )
        for family, what, prompt in (
            ("captioning", "captions", "one fixed sentence"),
            ("image_generation", "images", "the row's caption, no image"),
        )
    ),
    *(
        _task_spec(
            f"visual_chat_{kind}",
            f"LLaVA-Med bench, {kind.replace('_', ' ')}",
            "visual_chat",
            source="github.com/microsoft/LLaVA-Med, data/eval/llava_med_eval_qa50_qa.jsonl",
            revision="821e1c7e34a458ef492b63da26e6863b55e05abf",
            counts=counts,
            counted="the file at that revision",
            licence="CC BY-NC 4.0, research only",
            prompt=prompt,
            metric="judge_relative",
        )
        for kind, counts, prompt in (
            ("conversation", 143, "the row's, the image at the mark <image>"),
            ("detailed_description", 50, "one fixed sentence"),
        )
    ),
    _task_spec(
        "multimodal",
        "Interleaved generation",
        "multimodal",
        source=RELEASED,
        split="released",
        licence="not stated",
        prompt="the row's, no image",
        metric="judge_relative",
    ),
    *mediconfusion.CARDS,
    *medgen.CARDS,
    *smmile.CARDS,
    *deeptumorvqa.CARDS,
    *kvasir_vqa.CARDS,
    *medframeqa.CARDS,
    *kormedmcqa.CARDS,
    *medbookvqa.CARDS,
    *medxpertqa.CARDS,
    *gmai_mmbench.CARDS,
    *medthink.CARDS,
)
TASKS = {spec.task: spec for spec in _TASKS}


def task_spec(task: str, family: str) -> TaskSpec | None:
    """Return the task of a row of the tables; interleaved tasks of the release share one."""
    return TASKS.get(task) or (TASKS["multimodal"] if family == "multimodal" else None)
