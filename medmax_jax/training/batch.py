"""Defines the batch of one training step, its counts, and the interface of a batch loader."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Float32, Int32

MAX_GROUPS = 128  # pairs of source and task at most; MedMax has 13 x 6


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Holds the rows of one step: NumPy here, global arrays after `sharding.shard_batch`."""

    ids: Int32[Array | np.ndarray, "B T"]
    segments: Int32[Array | np.ndarray, "B T"]  # 0 padding, documents 1..n in each row
    positions: Int32[Array | np.ndarray, "B T"]  # within the document
    weights: Float32[Array | np.ndarray, "B T"]  # of the loss of predicting this token
    kinds: Int32[Array | np.ndarray, "B T"]  # of the document, an index into `BatchSource.kinds`


@dataclasses.dataclass(frozen=True)
class BatchStats:
    """Holds the counts of the batch of one step, over all hosts."""

    epoch: int  # of the first row
    documents: int
    scored_text: int  # tokens
    scored_image: int
    tokens: int  # without padding
    squared_lengths: int  # sum of the squared lengths; over `tokens`: the mean attended length
    loss_weight: float  # sum of the loss weights before it is made 1
    fill: float  # tokens over positions


@runtime_checkable
class DocumentSource(Protocol):
    """Defines the records that training reports on: columns by name, and documents by number."""

    index: Mapping[str, np.ndarray] | np.ndarray
    fingerprint: str
    meta: dict[str, Any]
    layout: Any

    def __getitem__(self, number: int) -> Any:
        """Return a document: tokens, source, task, id and credential."""

    def names(self, label: str) -> list[str]:
        """Return the names that the numbers of index["source"] or index["task"] refer to."""


@runtime_checkable
class BatchSource(Protocol):
    """Defines what training requires of a loader; data/loader.py has one that reads records."""

    records: DocumentSource
    plan: str  # fingerprint of the packing plan of epoch 0
    plans: list[str]  # of each stage that can be loaded
    kinds: list[tuple[str, str]]  # (source, task) of each kind of document
    available: int  # steps that can be loaded; fewer than all while a stage's records are missing

    def __len__(self) -> int:
        """Return the number of steps."""

    def batch(self, step: int) -> Batch:
        """Return the rows of this host at a step."""

    def stream(self, start_step: int) -> Iterator[Batch]:
        """Yield the batches from `start_step` to the end."""

    def stats(self, step: int) -> BatchStats:
        """Return the counts of the batch of a step, over all hosts."""

    def documents_of_rows(self, step: int) -> list[Int32[np.ndarray, "_"]]:
        """Return the numbers of the documents of each row of a step, over all hosts."""

    def document_names(self, step: int) -> list[str]:
        """Return the names of the documents of a step."""

    def records_of_stages(self) -> Sequence[DocumentSource]:
        """Return the records of each stage that can be loaded; a run without stages is one."""

    def records_at(self, step: int) -> DocumentSource:
        """Return the records that the numbers of a step's documents refer to."""

    def describe(self) -> list[str]:
        """Return a description of an epoch, one line of the log each; the first summarizes it."""

    def epoch_tokens(self) -> int:
        """Return the tokens of the documents that the run may draw."""
