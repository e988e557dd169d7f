"""Load the stages of a run in sequence: each has its own mixture, epochs and plans.

    config.stages    steps 3                      steps 2
    steps            0      1       2             3      4
    rows             0..B-1 B..2B-1 2B..3B-1      0..B-1 B..2B-1     of the stage
    epochs           0, and on                    0, and on

A stage is loaded as the run that config.run_of_stage describes: its rows begin at row 0 of its own
epoch 0, whose order differs from that of the other stages. So the input is a function of the step
alone, as in a run without stages, and a run resumes inside any stage.

A stage may read records of its own, which need not exist when the run starts: the model of the
stage before may be what makes them. The loader then ends with the last stage whose records, and
those of all stages before it, are complete.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from medmax_jax.config import Data, Mixing, Run, Stage, data_of_stage, run_of_stage
from medmax_jax.data.packing import mixing
from medmax_jax.data.packing.pack import PackError
from medmax_jax.data.records.document import RecordsError
from medmax_jax.data.records.reader import Records
from medmax_jax.data.records.staging import META
from medmax_jax.storage.folder import Folder
from medmax_jax.training import stages
from medmax_jax.training.batch import MAX_GROUPS, Batch, BatchSource, BatchStats


class StagedLoader:
    """Loads all steps of a run with stages; `make` returns the loader of a run without any."""

    def __init__(self, run: Run, make: Callable[[Run, str], BatchSource]):
        self._run, self._ends = run, stages.ends(run)
        self._loaders = [_load_stage(run, number, make) for number in range(ready(run.stages))]
        self.available = self._ends[len(self._loaders) - 1]
        self.records = self._loaders[0].records
        self.kinds = _number_kinds(self._loaders)
        self.plans = [loader.plan for loader in self._loaders]
        self.plan = fingerprint(self.plans)
        if run.data.plan not in ("", self.plan) and self.available == len(self):
            raise PackError(
                f"config.data.plan is {run.data.plan}, but these records, settings and stages give "
                f"plan {self.plan}; restore them, or leave config.data.plan empty"
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def batch(self, step: int) -> Batch:
        """Return the rows of this host at a step."""
        loader, own_step = self._at(step)
        return loader.batch(own_step)

    def stream(self, start_step: int) -> Iterator[Batch]:
        """Yield the batches from `start_step` to the end."""
        starts = [0, *self._ends]
        return itertools.chain.from_iterable(
            loader.stream(max(start_step - start, 0))
            for loader, start, end in zip(self._loaders, starts, self._ends, strict=False)
            if start_step < end
        )

    def stats(self, step: int) -> BatchStats:
        """Return the counts of the complete batch of a step; `epoch` is of its stage."""
        loader, own_step = self._at(step)
        return loader.stats(own_step)

    def documents_of_rows(self, step: int) -> list[np.ndarray]:
        """Return the numbers of the documents of each row of a step."""
        loader, own_step = self._at(step)
        return loader.documents_of_rows(own_step)

    def document_names(self, step: int) -> list[str]:
        """Return the names of the documents of a step."""
        loader, own_step = self._at(step)
        return loader.document_names(own_step)

    def epoch_tokens(self) -> int:
        """Return the tokens of the documents that any stage may draw, each counted once.

        Of several folders it is the one with the most: records with pseudo documents have all
        others too.
        """
        totals = []
        for records in _distinct(self.records_of_stages()):
            draws = [
                mixing.eligible_documents(records, self._run.data, stage.mixing)
                for stage, loader in zip(self._run.stages, self._loaders, strict=False)
                if loader.records is records
            ]
            totals.append(int(records.index["length"][np.unique(np.concatenate(draws))].sum()))
        return max(totals)

    def records_of_stages(self) -> list[Records]:
        """Return the records of each stage that can be loaded."""
        return [loader.records for loader in self._loaders]

    def records_at(self, step: int) -> Records:
        """Return the records that the numbers of a step's documents refer to."""
        return self._at(step)[0].records

    def describe(self) -> list[str]:
        """Return log lines: a summary, and what each stage's loader describes."""
        summary = f"{len(self._loaders)} stages, plan {self.plan[:12]}"
        lines = [(n, line) for n, loader in enumerate(self._loaders) for line in loader.describe()]
        if self.available < len(self):
            missing = self._run.stages[len(self._loaders)].records
            lines.append((len(self._loaders), f"its records {missing} do not exist yet"))
        return [summary, *(f"stage {number}: {line}" for number, line in lines)]

    def _at(self, step: int) -> tuple[BatchSource, int]:
        """Return the loader of a step, and the step counted from the start of its stage."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}; increase train.steps to continue")
        number = stages.at(self._run, step)
        if number >= len(self._loaders):
            raise IndexError(
                f"step {step}: the records {self._run.stages[number].records} of "
                f"config.stages[{number}] did not exist when the run started; start it again"
            )
        return self._loaders[number], step - [0, *self._ends][number]


def fingerprint(plans: Sequence[str]) -> str:
    """Return the SHA-256 of the fingerprints of all stages' plans; that of a single one is kept."""
    return plans[0] if len(plans) == 1 else hashlib.sha256(" ".join(plans).encode()).hexdigest()


def parts(
    data: Data, mixture: Mixing, run_stages: Sequence[Stage]
) -> list[tuple[Data, Mixing, int, float]]:
    """Return the rows' settings, and the first step and the end, of each stage of a run.

    The steps are counted from 0, and the end of the last stage is infinite.
    """
    if not run_stages:
        return [(data, mixture, 0, float("inf"))]
    ends = [float(end) for end in itertools.accumulate(stage.steps for stage in run_stages)]
    starts = [0, *map(int, ends[:-1])]
    return [
        (data_of_stage(data, stage, number), stage.mixing, starts[number], end)
        for number, (stage, end) in enumerate(zip(run_stages, ends, strict=True))
    ]


def ready(run_stages: Sequence[Stage]) -> int:
    """Return how many stages can be loaded: those before the first whose own records are missing.

    An address on the hub is taken to exist, so that a wrong one is an error.
    """
    for number, stage in enumerate(run_stages):
        if stage.records and not stage.records.startswith("hf:"):
            if not Folder(stage.records).has(META):
                return number
    return len(run_stages)


def _number_kinds(loaders: Sequence[Any]) -> list[tuple[str, str]]:
    """Give a kind of documents the same number in all stages; return the list of all kinds.

    Those of stage 0 come first, so that their numbers are the same before and after the records of
    a later stage exist: a checkpoint may hold sums by these numbers.
    """
    kinds = list(dict.fromkeys(kind for loader in loaders for kind in loader.kinds))
    if len(kinds) > MAX_GROUPS:
        raise PackError(
            f"config.stages: their records have {len(kinds)} pairs of source and task; at most "
            f"{MAX_GROUPS} can be reported separately; merge some of their names"
        )
    for loader in loaders:
        loader.use_kinds(kinds)
    return kinds


def _distinct(records: Sequence[Records]) -> list[Records]:
    return list({id(each): each for each in records}.values())


def _load_stage(run: Run, number: int, make: Callable[[Run, str], BatchSource]) -> BatchSource:
    """Return the loader of a stage; its errors name the stage."""
    try:
        return make(run_of_stage(run, number), run.stages[number].records)
    except (PackError, RecordsError) as error:
        raise PackError(f"{error} (config.stages[{number}])") from error
