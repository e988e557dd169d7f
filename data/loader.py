"""Map a step number to the batch of that step: packed rows, and the loss weight of every token.

A batch is a function of (records, run, step). The loader has no reader state: a resumed run
requests the next step, on any number of hosts. Row r of step s is row s * batch_size + r of the
packed epochs; host h of H reads the h-th of H equal parts of the rows of a step.

    documents   A = 0 11 12 8710 13 2        one turn: scored 13 2
                B = 0 21 22 2                no separator: scored 21 22 2
    one row, seq_len 12, loss_weight document (two documents in the batch):
    ids         0  11  12  8710  13   2   0  21  22   2   1   1
    segments    1   1   1     1   1   1   2   2   2   2   0   0
    positions   0   1   2     3   4   5   0   1   2   3   0   0
    weights     0   0   0     0  1/4 1/4  0  1/6 1/6 1/6  0   0

`weights[:, t]` belongs to the prediction of ids[:, t] from the tokens before it, so the loss of a
step is sum(weights * nll); the weights sum to 1 over the global batch. With loss_weight token, each
scored token above has weight 1/5. The factors of config.loss.weights multiply these weights before
their sum is made 1 again.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Float

from medmax_jax.config import ConditionDropout, LossWeights, Run, task_weights, view_text
from medmax_jax.data.packing import condition_dropout, mixing
from medmax_jax.data.packing.condition_dropout import trained_tokens
from medmax_jax.data.packing.pack import Row
from medmax_jax.data.packing.stages import StagedLoader
from medmax_jax.data.records import reader
from medmax_jax.data.records.document import RecordsError
from medmax_jax.endpoints import egress
from medmax_jax.models.guidance_streams import FULL
from medmax_jax.models.vocab import PAD, is_image
from medmax_jax.training.batch import MAX_GROUPS, Batch, BatchStats


def train_batches(run: Run, folder: str) -> "BatchLoader | StagedLoader":
    """Return the training batches: `run.train.steps` batches, over as many epochs as they need."""
    if not run.stages:
        return BatchLoader(run, folder, one_pass=False)
    opened = functools.cache(reader.open_records)  # the folder of several stages is opened once

    def load(part: Run, own: str) -> BatchLoader:
        return BatchLoader(part, own or folder, opened(own or folder), one_pass=False)

    return StagedLoader(run, load)


def eval_batches(run: Run, folder: str) -> "BatchLoader":
    """Return the evaluation batches: every document once; empty rows fill up the last batch."""
    return BatchLoader(run, folder, one_pass=True)


class BatchLoader:
    """Loads `len(self)` steps; a batch holds this host's rows of a step, stats cover all rows."""

    def __init__(
        self,
        run: Run,
        folder: str,
        records: reader.Records | None = None,  # of the folder, if it is open
        *,
        one_pass: bool,
        host: int | None = None,  # default: this process
        hosts: int | None = None,  # default: all processes
    ):
        self.records = reader.open_records(folder) if records is None else records
        self._run = run
        self._host = jax.process_index() if host is None else host
        self._hosts = jax.process_count() if hosts is None else hosts
        self._check(one_pass)
        self._mixing = run.mixing
        if one_pass:  # each held-out document once and complete, whatever training draws or weighs
            self._mixing = dataclasses.replace(run.mixing, weights="", leave_out="", fraction=1.0)
            complete = dataclasses.replace(run.data, condition_dropout=ConditionDropout.off())
            unweighted = dataclasses.replace(run.loss, weights=LossWeights.off())
            run = self._run = dataclasses.replace(run, data=complete, loss=unweighted)
        self._set_task_weights()
        self._epochs = mixing.epochs(self.records, run.data, self._mixing)
        self.plan = self._epochs.first.fingerprint  # of epoch 0
        self.plans = [self.plan]
        if run.data.plan not in ("", self.plan) and not one_pass:
            raise RecordsError(
                f"config.data.plan is {run.data.plan}, but these records and settings give plan "
                f"{self.plan}; restore them, or leave config.data.plan empty"
            )
        self._last = len(self._epochs.first) if one_pass else None
        # (source, task) of each kind; the kind of each document
        self.kinds, self._kind = _kinds(self.records)
        self.available = run.train.steps
        steps = -(-self._last // run.data.batch_size) if one_pass else run.train.steps
        self._steps = grain.MapDataset.range(0, steps).map(self._make)

    def __len__(self) -> int:
        return len(self._steps)

    def batch(self, step: int) -> Batch:
        """Return the rows of this host at a step."""
        return self._steps[self._in_range(step)]

    def stream(self, start_step: int) -> Iterator[Batch]:
        """Yield the batches from `start_step` to the end; a thread prepares the next one."""
        if start_step == len(self):
            return iter(())
        rest = self._steps.slice(slice(self._in_range(start_step), None))
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        return iter(rest.to_iter_dataset(options))

    def stats(self, step: int) -> BatchStats:
        """Return the counts of the complete batch of a step, without reading its documents."""
        size, seq_len = self._run.data.batch_size, self._run.data.seq_len
        rows = self._rows(self._in_range(step))
        documents, lengths, streams = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        columns = (mask := self._run.data.mask, f"{mask}_image")
        scored, image = (self.records.index[n][documents].astype(np.int64) for n in columns)
        dropped, codes = streams != FULL, self.records.layout.codes_per_image
        scored, image = (np.where(dropped, codes, n) for n in (scored, image))
        lengths = lengths.astype(np.int64)
        tokens = int(lengths.sum())
        return BatchStats(
            epoch=self._epochs.epoch(step * size),
            documents=len(documents),
            scored_text=int((scored - image).sum()),
            scored_image=int(image.sum()),
            loss_weight=float(self._loss_weight(documents, scored, image).sum()),
            tokens=tokens,
            squared_lengths=int((lengths**2).sum()),
            fill=tokens / (size * seq_len),
        )

    def documents_of_rows(self, step: int) -> list[np.ndarray]:
        """Return the numbers of the documents of each row of a step, over all hosts."""
        return [row.documents for row in self._rows(self._in_range(step))]

    def document_names(self, step: int) -> list[str]:
        """Return the documents of a step as source/id; for credentialed ones a digest of the id."""
        return [
            f"{d.source}/sha256:{hashlib.sha256(d.id.encode()).hexdigest()[:16]}"
            if egress.is_credentialed(d.credential)
            else f"{d.source}/{d.id}"
            for d in self.records.read(self._documents(self._in_range(step)))
        ]

    def use_kinds(self, kinds: list[tuple[str, str]]) -> None:
        """Set the numbers of kinds to those in `kinds`, which has all kinds of this loader."""
        self._kind = np.array([kinds.index(kind) for kind in self.kinds], np.int32)[self._kind]
        self.kinds = kinds

    def records_of_stages(self) -> list[reader.Records]:
        """Return the records of each stage that can be loaded; a run without stages is one."""
        return [self.records]

    def records_at(self, step: int) -> reader.Records:
        """Return the records that the numbers of a step's documents refer to."""
        return self.records

    def epoch_tokens(self) -> int:
        """Return the tokens of the documents that this run may draw, each counted once."""
        documents = mixing.eligible_documents(self.records, self._run.data, self._mixing)
        return int(self.records.index["length"][documents].sum())

    def describe(self) -> list[str]:
        """Return log lines about an epoch: a summary, a table of shares, and what is left out."""
        records, data, plan = self.records, self._run.data, self._epochs.first
        tokens = int(plan.lengths.sum())
        lines = [
            f"{len(records):,} documents of {records.folder}; an epoch draws "
            f"{len(plan.documents):,} into {len(plan):,} rows of {data.seq_len:,} tokens, "
            f"{tokens / (len(plan) * data.seq_len):.1%} filled; plan {self.plan[:12]}"
        ]
        shares = mixing.mixture_shares(records, data, self._mixing)
        width = max(map(len, (self._mixing.by, *shares)))
        lines.append(f"{self._mixing.by:{width}}  documents   tokens  repeats per epoch")
        lines += [
            f"{name:{width}}  {d:9.1%}  {t:7.1%}  {n:17.3g}" for name, (d, t, n) in shares.items()
        ]
        if data.condition_dropout != ConditionDropout.off():
            counts = condition_dropout.stream_counts(plan).items()
            lines.append("condition dropout: " + ", ".join(f"{n} {name}" for name, n in counts))
        long = np.flatnonzero(records.index["length"] > data.document_limit)
        if long.size:
            names = ", ".join(d.id for d in records.read(long[:5])) + ", ..." * (long.size > 5)
            lines.append(
                f"excluded, longer than data.document_limit = {data.document_limit}: {long.size:,} "
                f"documents: {names}; python -m data.prepare plan lists all"
            )
        return lines

    def _make(self, step: int) -> Batch:
        rows, stats = self._rows(int(step)), self.stats(int(step))
        share = len(rows) // self._hosts
        rows = rows[self._host * share : (self._host + 1) * share]
        numbers, _, streams = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        mask = self._run.data.mask
        trained = [
            TrainedDocument(*trained_tokens(document, stream, self.records, mask), kind, weight)
            for document, stream, kind, weight in zip(
                self.records.read(numbers),
                streams.tolist(),
                self._kind[numbers],
                self._document_weight(numbers),
                strict=True,
            )
        ]
        documents = iter(trained)
        return _batch([[next(documents) for _ in row.documents] for row in rows], stats, self._run)

    def _rows(self, step: int) -> list[Row]:
        """Return the rows of the global batch."""
        size, none = self._run.data.batch_size, Row(*3 * [np.zeros(0, np.int32)])
        return [
            self._epochs.row(i) if self._last is None or i < self._last else none
            for i in range(step * size, (step + 1) * size)
        ]

    def _documents(self, step: int) -> np.ndarray:
        """Return the numbers of the documents of a step."""
        return np.concatenate([row.documents for row in self._rows(step)])

    def _loss_weight(
        self, documents: np.ndarray, scored: np.ndarray, image: np.ndarray
    ) -> Float[np.ndarray, "n"]:
        """Return the sum of each document's loss weights before their sum is made 1.

        `scored`, `image`: its scored tokens, and those of them that are image codes.
        """
        run, weights = self._run, self._run.loss.weights
        sums = weights.text * (scored - image) + weights.image * image
        if run.train.loss_weight == "document":
            sums = sums / np.maximum(scored, 1)
        return self._document_weight(documents) * sums

    def _document_weight(self, documents: np.ndarray) -> Float[np.ndarray, "n"]:
        """Return the factor of all targets of each document: of its task, and of pseudo ones."""
        index = self.records.index
        pseudo = np.where(index["pseudo"][documents] == 1, self._run.loss.weights.pseudo, 1.0)
        return self._task_weight[index["task"][documents]] * pseudo

    def _set_task_weights(self) -> None:
        """Set the factor of each task; raise RecordsError if the weights train no document."""
        weights, names = self._run.loss.weights, self.records.names("task")
        named, folder = task_weights(weights), self.records.folder
        if unknown := [name for name in named if name not in names]:
            raise RecordsError(
                f"config.loss.weights.tasks is {weights.tasks!r}: {folder} has no task "
                f"{unknown[0]!r}; use names from {', '.join(names)}"
            )
        self._task_weight = np.array([named.get(name, 1.0) for name in names])
        columns = (mask := self._run.data.mask, f"{mask}_image")
        counts = (self.records.index[name] for name in columns)
        if not self._loss_weight(np.arange(len(self.records)), *counts).any():
            raise RecordsError(
                f"config.loss.weights is {weights}: every scored token of {folder} has weight 0, "
                "so nothing would train; increase a weight"
            )

    def _in_range(self, step: int) -> int:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}; increase train.steps to continue")
        return step

    def _check(self, held_out: bool) -> None:
        run, layout, folder = self._run, self.records.layout, self.records.folder
        if held_out and (count := self.records.meta.get("pseudo", 0)):
            raise RecordsError(
                f"config.data.validation is {folder}, in which a model generated the answers of "
                f"{count} documents; a held-out loss is one of real answers: use other records"
            )
        if layout.vocab != run.vocab:
            raise RecordsError(
                f"{folder}: vocabulary is {layout.vocab}, but config.vocab is {run.vocab}; prepare "
                "the data with this model's tokenizer"
            )
        if layout.codes_per_image != run.vq.codes_per_image:
            raise RecordsError(
                f"{folder}: images have {layout.codes_per_image} codes, but config.vq produces "
                f"{run.vq.codes_per_image}; prepare the data with this model's VQGAN"
            )
        if view_text(layout) != view_text(run.vq) and self.records.index["image"].any():
            raise RecordsError(
                f"{folder}: images have {view_text(layout)}, but config.vq has "
                f"{view_text(run.vq)}; change these, or prepare the data with --view, --answer_view"
            )
        if run.data.batch_size % self._hosts:
            raise RecordsError(
                f"config.data.batch_size is {run.data.batch_size}; "
                f"it must be a multiple of the {self._hosts} hosts"
            )


def _kinds(records: reader.Records) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Return the pairs of source and task that occur, and the index of each document's pair."""
    sources, tasks = records.names("source"), records.names("task")
    numbers = records.index["source"].astype(np.int64) * len(tasks) + records.index["task"]
    occurring, kind = np.unique(numbers, return_inverse=True)
    if len(occurring) > MAX_GROUPS:
        raise RecordsError(
            f"{records.folder}: {len(occurring)} pairs of source and task; at most {MAX_GROUPS} "
            "can be reported separately; merge some of their names"
        )
    names = [(sources[n // len(tasks)], tasks[n % len(tasks)]) for n in occurring.tolist()]
    return names, kind.astype(np.int32)


class TrainedDocument(NamedTuple):
    """What a batch needs of a document; with condition dropout, of one of its streams."""

    tokens: np.ndarray
    scored: np.ndarray
    kind: int
    weight: float  # of its task, and of a generated answer


def _batch(rows: list[list[TrainedDocument]], stats: BatchStats, run: Run) -> Batch:
    shape = (len(rows), run.data.seq_len)
    ids, weights = np.full(shape, PAD, np.int32), np.zeros(shape, np.float32)
    segments, positions, kinds = (np.zeros(shape, np.int32) for _ in range(3))
    factors, total = run.loss.weights, stats.loss_weight or 1.0  # 0: no document is weighted
    for r, row in enumerate(rows):
        start = 0
        for n, (tokens, mask, kind, weight) in enumerate(row):
            span = slice(start, start + len(tokens))
            ids[r, span] = tokens
            segments[r, span], kinds[r, span] = n + 1, kind
            positions[r, span] = np.arange(len(tokens))
            weighted = mask * np.where(is_image(tokens, run.vocab), factors.image, factors.text)
            scored = mask.sum() if run.train.loss_weight == "document" else 1
            weights[r, span] = weight * weighted / (scored * total)
            start = span.stop
    return Batch(ids, segments, positions, weights, kinds)
