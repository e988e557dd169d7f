"""Define the command `python -m data.prepare pseudo`: its flags, its steps and its report.

python -m data.prepare pseudo R --model M --adapter A --out P [--tasks closed open caption]
python -m data.prepare pseudo R --endpoint NAME@URL --min_margin off --out P
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medmax_jax import arguments, cli
from medmax_jax.data.analysis import check
from medmax_jax.data.annotation import annotate, evidence, overlap, page
from medmax_jax.data.annotation.annotate import OUTCOMES, Caps, Verdict
from medmax_jax.data.annotation.filters import Thresholds
from medmax_jax.data.annotation.generators import EndpointGenerator, EngineGenerator, Prompt
from medmax_jax.data.annotation.kinds import KINDS
from medmax_jax.data.annotation.questions import (
    ImageFacts,
    Question,
    make_questions,
    read_images,
    view_of,
)
from medmax_jax.data.image_tokens.encoder import Encoder, PrepareError, log
from medmax_jax.data.packing.report import IMAX_PER_IMAGE, image_stats
from medmax_jax.data.records import writer
from medmax_jax.data.records.document import Document
from medmax_jax.data.records.reader import Records, open_records
from medmax_jax.data.records.staging import META
from medmax_jax.endpoints import cached_chat_api, egress
from medmax_jax.endpoints.chat_api import Endpoint, check_ready
from medmax_jax.endpoints.flags import add_call_flags, count, json_object, model_at_url, positive
from medmax_jax.environment import environment
from medmax_jax.generation.requests import GenerateError
from medmax_jax.io import html_page, journal
from medmax_jax.io.text_files import TextFileError, read_json_object
from medmax_jax.models import images as image_files
from medmax_jax.models.image_headers import ImageError
from medmax_jax.storage import image_paths
from medmax_jax.storage.atomic_folder import private_folder

ERRORS = (GenerateError, ImageError, journal.JournalError)
RUN, REPORT, PAGE, CALLS = "run.json", "report.json", "page.html", "calls.jsonl"
SHARD_SIZE = 4_096  # documents
MAX_REPLY_BYTES = 1_000_000
OFF = "off"


def add(commands: Any, tiny: Path) -> argparse.ArgumentParser:
    """Add `pseudo`; `tiny` is the model folder that is used by default."""
    parser = commands.add_parser(
        "pseudo", help="add documents of the missing kinds of each image, answered by a model"
    )
    add_flag = parser.add_argument
    add_flag("folder", type=arguments.folder, help="folder of records, of the split train")
    add_flag("--out", type=arguments.folder, required=True, help="folder to write, or to resume")
    add_flag(
        "--model", type=arguments.folder, default=tiny,
        help="model folder that answers; its tokenizer and VQGAN are those of the records",
    )  # fmt: skip
    add_flag("--adapter", type=arguments.folder, help="adapter of the model, or its training run")
    add_flag(
        "--endpoint", type=model_at_url, metavar="NAME@URL",
        help="model endpoint that answers in place of --model; requires --min_margin off",
    )  # fmt: skip
    add_flag(
        "--tasks", nargs="+", choices=tuple(KINDS), default=tuple(KINDS), metavar="KIND",
        help=f"kinds of documents to add: {', '.join(KINDS)}; default: all",
    )  # fmt: skip
    add_flag("--samples", type=_samples, default=4, metavar="K", help="samples of each answer")
    add_flag("--temperature", type=positive, default=0.7, help="temperature of the samples")
    add_flag(
        "--min_margin", type=_margin, default=0.0, metavar="NATS",
        help="least margin over distractors, in nats per token; off: not measured",
    )  # fmt: skip
    add_flag("--min_agreement", type=_share, default=0.6, help="least agreement of the samples")
    add_flag(
        "--min_order", type=_share, default=0.75,
        help="least share of the orders of the options in which the answer is chosen",
    )  # fmt: skip
    add_flag(
        "--max_source_share", type=_share, default=0.75, metavar="SHARE",
        help="of the documents of a source, at most this share is pseudo",
    )  # fmt: skip
    add_flag(
        "--max_task_share", type=_share, default=0.5, metavar="SHARE",
        help="of all documents, at most this share is pseudo and of one task",
    )  # fmt: skip
    add_flag(
        "--against", type=Path, action="append", default=[], metavar="EVALSET",
        help="evaluation set whose images are excluded: folder of records, or items.jsonl; may be "
        "repeated; default: the embedded test split",
    )  # fmt: skip
    add_flag("--eval_images", type=Path, help="folder of the images of an items.jsonl")
    add_flag("--images", type=Path, help="folder of the images, which an endpoint requires")
    add_flag("--seed", type=int, default=0, help="seed of questions, samples and distractors")
    add_flag("--rows", type=count, default=32, help="answers that are generated at once")
    _add_endpoint_flags(add_flag)
    add_flag("--dry_run", action="store_true", help="print the number of calls; answer nothing")
    parser.set_defaults(run=run, resumes=True, left="finished batches are kept")
    return parser


def _add_endpoint_flags(add_flag: Callable[..., Any]) -> None:
    add_flag("--key_env", metavar="NAME", help="environment variable with the API key")
    add_flag(
        "--parameters", type=json_object, default={}, metavar="JSON",
        help="request parameters, sent unchanged",
    )  # fmt: skip
    add_call_flags(add_flag, sent="images")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command; return the report without its details, or with --dry_run the estimate."""
    endpoint = _check_flags(args)
    records = open_records(args.folder)
    if (args.out / META).exists():
        raise PrepareError(f"--out {args.out}: already contains a finished data set")
    encoder = check.resolve_encoder(records, args.model)
    if records.layout.tokenizer not in ("", encoder.layout.tokenizer):
        raise PrepareError(
            f"{args.model}: its tokenizer did not write {args.folder}; set --model to the model "
            "folder that did"
        )
    images = read_images(records, encoder.tokenizer)
    evaluation = overlap.read_evaluation(args.against, args.eval_images, encoder)
    gate = overlap.compare(images, evaluation, encoder, log.info)
    questions, states = make_questions(
        images, args.tasks, gate.excluded, records.layout, seed=args.seed
    )
    if not questions:
        raise PrepareError(f"{args.folder}: no document to add; {_why_none(states)}")
    estimate = _estimate(questions, args)
    log.info(
        "%(questions)d questions about %(images)d images: %(samples)d samples, then at most "
        "%(orders)d prompts for likelihoods and orders", estimate,
    )  # fmt: skip
    if args.dry_run:
        return estimate
    _check_egress(questions, images, endpoint)
    with contextlib.ExitStack() as stack:
        if writer.has_credentialed(records):
            stack.enter_context(private_folder(args.out))
        with cli.open_workdir(args.out, "--out"):
            pass
        stop = stack.enter_context(cli.Stop())
        generator = _generator(args, endpoint, stop, stack)
        _check_same(args, records, generator.digest, evaluation.codes)
        work = evidence.Work(
            out=args.out,
            generator=generator,
            tokenizer=encoder.tokenizer,
            samples=args.samples,
            seed=args.seed,
            prompt_of=_prompt_maker(images, records, args.images),
            progress=log.info,
            stopped=lambda: bool(stop.requested),
        )
        lines = evidence.collect(questions, work)
        return _write(args, records, encoder, images, gate, (questions, states), lines, generator)


def _check_flags(args: argparse.Namespace) -> Endpoint | None:
    """Return the endpoint, or None; raise PrepareError where flags do not fit together."""
    if args.endpoint is None:
        return None
    if args.adapter is not None:
        raise PrepareError("--adapter and --endpoint are both set; an endpoint has no adapter")
    if args.min_margin is not None:
        raise PrepareError(
            "--endpoint: an endpoint returns no likelihoods, so the margin over distractors cannot "
            "be measured; set --min_margin off to keep answers without this filter"
        )
    if args.images is None or not args.images.is_dir():
        raise PrepareError(
            f"--endpoint: the images are sent from their files, but --images is {args.images}; set "
            "it to the folder of the images"
        )
    name, url = args.endpoint
    return Endpoint(
        model=name,
        url=url,
        parameters=args.parameters,
        listed=egress.parse_allowed_hosts(args.credentialed_host),
        key_env=args.key_env or "",
        timeout_s=args.timeout,
        retries=args.retries,
        max_wait_s=90.0,
        max_reply_bytes=MAX_REPLY_BYTES,
        price_in=None,
        price_out=None,
    )


def _check_egress(
    questions: Sequence[Question], images: Sequence[ImageFacts], endpoint: Endpoint | None
) -> None:
    """Raise before the first call where an image may not be sent to the endpoint."""
    if endpoint is not None:
        credentials = {images[q.image].credential for q in questions}
        strictest = egress.strictest(map(egress.class_of_credential, credentials))
        egress.check(endpoint.url, strictest, listed=endpoint.listed)


def _estimate(questions: Sequence[Question], args: argparse.Namespace) -> dict[str, Any]:
    """Return the number of calls, at most: as if every question had a usable answer."""
    return dict(
        questions=len(questions),
        images=len({q.image for q in questions}),
        samples=len(questions) * args.samples,
        orders=sum(len(evidence.orders(q)) for q in questions),
    )


def _why_none(states: dict[str, Counter[str]]) -> str:
    parts = [
        f"{kind}: " + ", ".join(f"{n} {state}" for state, n in of_images.items() if n)
        for kind, of_images in states.items()
    ]
    return f"images by kind ({'; '.join(parts)}); set --tasks to kinds that are missing"


def _generator(
    args: argparse.Namespace, endpoint: Endpoint | None, stop: cli.Stop, stack: Any
) -> EngineGenerator | EndpointGenerator:
    sampling = dict(temperature=args.temperature, seed=args.seed)
    if endpoint is None:
        return EngineGenerator(args.model, args.adapter, rows=args.rows, **sampling)
    check_ready(endpoint)
    calls = stack.enter_context(journal.open_journal(args.out / CALLS))
    return EndpointGenerator(
        endpoint,
        cached_chat_api.Cache(calls),
        concurrency=args.concurrency,
        stopped=lambda: bool(stop.requested),
        **sampling,
    )


def _check_same(
    args: argparse.Namespace, records: Records, generator: str, evaluation: frozenset[str]
) -> None:
    """Reject a folder whose answers are to other questions or by another generator."""
    facts = dict(
        records=records.fingerprint, generator=generator, tasks=sorted(set(args.tasks)),
        samples=args.samples, temperature=args.temperature, seed=args.seed,
        parameters=args.parameters,
        evaluation=hashlib.sha256("".join(sorted(evaluation)).encode()).hexdigest(),
    )  # fmt: skip
    path = args.out / RUN
    if not path.exists():
        return journal.write_json(path, facts)
    try:
        stored = read_json_object(path)
    except TextFileError as error:
        raise PrepareError(f"{error}: damaged; use another --out") from error
    if differing := [name for name in facts if stored.get(name) != facts[name]]:
        raise PrepareError(
            f"{args.out}: was started with other {differing[0]}; use another --out, or the same "
            "flags (thresholds and shares may differ)"
        )


def _prompt_maker(
    images: Sequence[ImageFacts], records: Records, folder: Path | None
) -> Callable[[Question, evidence.Order], Prompt]:
    """Return a function that makes the prompt of a question in one order."""

    @functools.lru_cache(maxsize=2 * evidence.BATCH)
    def png(number: int) -> bytes:
        image = images[number]
        label = image.name if egress.is_credentialed(image.credential) else image.path
        file = image_paths.resolve(folder, image.path, label=label)
        pixels = image_files.load(file, max_pixels=image_files.MAX_PIXELS, name=label)
        return html_page.png(pixels)  # the pixels only: a file's metadata stays here

    def make(question: Question, order: evidence.Order) -> Prompt:
        image = images[question.image]
        view = view_of("caption", records.layout)  # that of prompts
        codes = image.codes.get(view, next(iter(image.codes.values()))).astype(np.int32)
        return Prompt(
            name=question.id,
            question=question,
            text=order.text,
            image_first=order.image_first,
            codes=codes,
            png=lambda: png(question.image),
            credential=image.credential,
        )

    return make


def _write(
    args: argparse.Namespace,
    records: Records,
    encoder: Encoder,
    images: Sequence[ImageFacts],
    gate: overlap.Gate,
    asked: tuple[list[Question], dict[str, Counter[str]]],
    lines: tuple[dict[str, evidence.Line], dict[str, evidence.Line]],
    generator: EngineGenerator | EndpointGenerator,
) -> dict[str, Any]:
    """Judge the answers, write the folder, its report and its page; return the report."""
    questions, states = asked
    thresholds = Thresholds(
        margin=args.min_margin, agreement=args.min_agreement, order=args.min_order
    )
    verdicts = annotate.judge(questions, images, *lines, encoder.tokenizer, thresholds)
    caps = Caps(source=args.max_source_share, task=args.max_task_share)
    annotate.apply_caps(verdicts, images, records, caps)
    outcomes = Counter(v.outcome for v in verdicts)
    if not outcomes["kept"]:
        reasons = ", ".join(f"{name} {outcomes[name]}" for name in OUTCOMES if outcomes[name])
        raise PrepareError(
            f"none of {len(questions)} answers is kept ({reasons}); no records were written. The "
            f"answers stay in {args.out}: rerun with lower thresholds, or use another generator"
        )
    pseudo = dict(
        records=records.fingerprint, generator=generator.digest, seed=args.seed,
        samples=args.samples, temperature=args.temperature,
        thresholds=dataclasses.asdict(thresholds), caps=dataclasses.asdict(caps),
    )  # fmt: skip
    made = annotate.documents(verdicts, images, records.layout, encoder.tokenizer, generator.digest)
    meta = writer.write(
        args.out,
        _joined(records, made),
        shard_size=SHARD_SIZE,
        layout=records.layout,
        notes=records.meta["notes"] | dict(pseudo=pseudo),
    )
    written = open_records(args.out)
    report = pseudo | dict(
        questions=len(questions),
        outcomes={name: outcomes[name] for name in OUTCOMES},
        kinds=annotate.counts(verdicts, states),
        images=len(images),
        overlap=gate.counts() | dict(images=len(gate.excluded)),
        pseudo_documents_checked=overlap.assert_none(written, gate),
        documents=dict(before=len(records), after=len(written)),
        per_image=_per_image(records, written),
        sha256=meta["sha256"],
    )
    journal.write_json(args.out / REPORT, report)
    _write_page(args, report, verdicts, images, lines[0], encoder)
    return _summary(report)


def _joined(records: Records, made: Iterator[Document]) -> Iterator[Document]:
    yield from records
    yield from made


def _per_image(records: Records, written: Records) -> dict[str, dict[str, float]]:
    """Return tasks and documents per image before and after, and those published of IMAX."""
    table = {}
    for name, folder in (("before", records), ("after", written)):
        stats = image_stats(folder)
        table[name] = dict(tasks=stats["tasks"], entries=stats["entries"])
    return table | {"IMAX (published)": dict(IMAX_PER_IMAGE)}


def _write_page(
    args: argparse.Namespace,
    report: dict[str, Any],
    verdicts: Sequence[Verdict],
    images: Sequence[ImageFacts],
    sampled: dict[str, evidence.Line],
    encoder: Encoder,
) -> None:
    facts = {
        "data": str(args.folder), "generator": report["generator"][:16], "samples": args.samples,
        "temperature": args.temperature, "seed": args.seed,
    }  # fmt: skip
    replies = {name: line["replies"] for name, line in sampled.items()}
    markup = page.build(
        report, verdicts, images, replies, encoder, facts=facts | environment(), seed=args.seed
    )
    journal.write_text(args.out / PAGE, markup)


def _summary(report: dict[str, Any]) -> dict[str, Any]:
    """Return what the command prints: the report with one line for each kind."""
    kinds = {
        kind: dict(missing=row["images"]["missing"], questions=row["questions"])
        | {name: n for name, n in row["outcomes"].items() if report["outcomes"][name]}
        for kind, row in report["kinds"].items()
    }
    return report | dict(kinds=kinds)


# ---- Types of flags ----


def _margin(text: str) -> float | None:
    if text == OFF:
        return None
    if not math.isfinite(number := float(text)):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number; use a number or {OFF}")
    return number


def _share(text: str) -> float:
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share; use 0 to 1")
    return number


def _samples(text: str) -> int:
    if (number := int(text)) < 2:
        raise argparse.ArgumentTypeError(f"{text} samples cannot agree; use 2 or more")
    return number
