"""Parse a compiled program's text: its collectives, their counts and bytes; cycles.

    ENTRY  while (condition: i < 32, body) -> body: fusion(calls=f) -> f: all-gather, channel 7
           an instruction of f runs 32 times; the same channel in ten pieces of one asynchronous
           gather is one gather

An instruction's line may be broken inside its metadata, so the parser searches only for the start
of a computation and the start of an instruction.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
WIDTHS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "bf16": 16, "f16": 16,
    "s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64,
}  # fmt: skip

_HEAD = re.compile(r"^(ENTRY )?%([\w.\-]+) \(")
_LINE = re.compile(r"^\s+(?:ROOT )?%[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective of the program, with the loops around it."""

    kind: str
    times: int  # per step
    size: int  # bytes, once: of the complete gathered, reduced or sent array
    group: int  # devices that take part
    overlapped: bool  # started and awaited separately, so that other work may run between

    @property
    def bytes_sent(self) -> float:
        """Return the bytes that leave a device in a step, by the ring algorithm."""
        n = self.group
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1}.get(self.kind, (n - 1) / n)
        return float(self.times * self.size * share)


@dataclasses.dataclass(frozen=True)
class _Op:
    name: str
    shape: str
    rest: str


class Program:
    """The computations of a module, and their calls."""

    def __init__(self, text: str):
        self._bodies: dict[str, list[_Op]] = {}
        self._entry, current = "", None
        for line in text.splitlines():
            if (head := _HEAD.match(line)) and line.rstrip().endswith("{"):
                current = self._bodies.setdefault(head[2], [])
                self._entry = head[2] if head[1] else self._entry
            elif current is not None and (op := _LINE.match(line)):
                current.append(_Op(op[2], op[1], line[op.end() :]))
            elif current:  # the rest of a broken line
                current[-1] = dataclasses.replace(current[-1], rest=current[-1].rest + line)
        if not self._entry:
            raise ValueError("not the text of a compiled program: it has no ENTRY")

    def collectives(self) -> list[Collective]:
        """Return each collective once, however many pieces it was split into."""
        collectives: dict[tuple, Collective] = {}
        for name, op, times in self._reached():
            kind = op.name.removesuffix("-start")
            if kind not in KINDS:
                continue
            size, group = _size(op, kind), _group(op.rest)
            if kind == "reduce-scatter":
                size *= group  # its result is one shard
            if kind == "all-reduce" and name.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            channel = re.search(r"channel_id=(\d+)", op.rest)
            key = (kind, channel[1] if channel else (name, op.rest))
            is_async = name.startswith("async_collective") or "AsyncCollective" in self._calls(name)
            new = Collective(
                kind=kind, times=times, size=size, group=group,
                overlapped=op.name.endswith("-start") or is_async,
            )  # fmt: skip
            old = collectives.get(key, new)
            collectives[key] = dataclasses.replace(
                new,
                times=max(new.times, old.times),
                size=max(new.size, old.size),
                overlapped=new.overlapped or old.overlapped,
            )
        return list(collectives.values())

    def cycles(self) -> int:
        """Return the compiler's estimate for the scheduled operations; kernels are not included."""
        return self._cycles(self._entry)

    def data_dependent_loops(self) -> list[int]:
        """Return cycles per iteration of each outermost data-dependent loop, in order."""
        return [self._cycles(body) for body, turns in self._loops(self._entry) if turns is None]

    def _cycles(self, name: str) -> int:
        """Return the cycles of ENTRY or a loop's body: they are on its lines, not in fusions."""
        own = sum(
            int(estimate[1])
            for op in self._bodies[name]
            if op.name != "while"
            and (estimate := re.search(r'"estimated_cycles":"(\d+)"', op.rest))
        )
        return own + sum((turns or 1) * self._cycles(body) for body, turns in self._loops(name))

    def _loops(self, name: str) -> Iterator[tuple[str, int | None]]:
        """Yield (body, iterations) of the loops in a computation; None: the count is unknown."""
        for op in self._bodies[name]:
            if op.name == "while":
                condition = re.search(r"condition=%([\w.\-]+)", op.rest)[1]
                yield re.search(r"body=%([\w.\-]+)", op.rest)[1], self._turns(condition)

    @functools.cached_property
    def _times(self) -> dict[str, int]:
        """Return how often each computation runs; in the text, callees precede their callers."""
        counts = dict.fromkeys(self._bodies, 0) | {self._entry: 1}
        for name in reversed(self._bodies):
            for target, turns in self._targets(name):
                counts[target] += counts[name] * turns
        return {name: count for name, count in counts.items() if count}

    def _reached(self) -> Iterator[tuple[str, _Op, int]]:
        for name, times in self._times.items():
            for op in self._bodies[name]:
                yield name, op, times

    def _targets(self, name: str) -> Iterator[tuple[str, int]]:
        for body, turns in self._loops(name):
            yield body, turns or 1
        for op in self._bodies[name]:
            called = re.findall(r"(?:calls|to_apply|branch_computations)=\{?(%[^,})]+)", op.rest)
            for target in (each.lstrip("%").split()[0] for each in called):
                if target in self._bodies:
                    yield target, 1

    def _turns(self, condition: str) -> int | None:
        """Return a loop's iterations: JAX's loops count from 0 to their condition's constant."""
        ops = self._bodies[condition]
        if any(op.name in ("and", "or", "fusion", "call") for op in ops):
            return None  # it depends on more than a counter
        constants = [op.rest.partition(")")[0] for op in ops if op.name == "constant"]
        limits = {int(each) for each in constants if each.isdigit()}
        return limits.pop() if len(limits) == 1 else None

    def _calls(self, name: str) -> str:
        """Return the custom calls of a computation."""
        return " ".join(
            target for op in self._bodies[name] if op.name == "custom-call"
            for target in re.findall(r'custom_call_target="(\w+)"', op.rest)
        )  # fmt: skip


def summary(collectives: list[Collective]) -> list[dict]:
    """Return one row for each kind, overlapped or not: count and bytes per step."""
    rows: dict[tuple[str, bool], dict] = {}
    for collective in collectives:
        row = rows.setdefault(
            (collective.kind, collective.overlapped),
            {
                "kind": collective.kind,
                "overlapped": collective.overlapped,
                "count": 0,
                "bytes": 0,
                "sent": 0,
            },
        )
        row["count"] += collective.times
        row["bytes"] += collective.times * collective.size
        row["sent"] += round(collective.bytes_sent)
    return [rows[key] for key in sorted(rows)]


def _size(op: _Op, kind: str) -> int:
    """Return bytes of the arrays that move; of (operand, result) of a started one, the greater."""
    arrays = []
    for dtype, dims in _ARRAY.findall(op.shape):
        if dtype in WIDTHS and not (dtype == "u32" and not dims):  # u32[]: a flag of its transport
            count = 1
            for n in filter(None, dims.split(",")):
                count *= int(n)
            arrays.append(count * WIDTHS[dtype] // 8)
    started = op.name.endswith("-start") and kind != "all-reduce"
    return max(arrays, default=0) if started else sum(arrays)


def _group(rest: str) -> int:
    """Return the devices of one group: {{0,1},{2,3}} 2, [2,4]<=[8] 4, mesh['a'=2,'b'=4] {'b'} 4."""
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = {k: int(n) for k, n in re.findall(r"'(\w+)'=(\d+)", named[1])}
        count = 1
        for axis in re.findall(r"'(\w+)'", named[2]):
            count *= sizes[axis]
        return count
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(iota[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return len(listed[1].split(","))
    return 2  # of a permutation: each device sends to one other
