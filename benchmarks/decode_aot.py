"""Compiles the 7B decode loop for TPUs on a machine without one: memory use and copies.

    python benchmarks/decode_aot.py --topology=v5e:2x2 --mesh=1,1,4 --rows=8 --slots=2048

Printed as JSON, GiB per device:
    weights, cache   the arguments
    temp             temporaries
    peak, hbm        the peak memory of the program, and the memory of the chip
    fits             peak <= hbm
    copies           of all keys or values: in the program's loops, that is for each pass,
                     and around them, that is for each chunk of 16 passes
    read             the bytes that a pass reads from memory, by the program's text
    pass_ms          of a pass, by the compiler's schedule

--window=16 compiles the loop that verifies 16 codes per pass (sample.jacobi_window).
"""

import argparse
import json
import math
import os
import re
import sys
import time
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "true"  # another process may use it
sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))

import jax
from step_aot import make_topology_mesh

from medmax_jax import arguments, config
from medmax_jax.configs import base
from medmax_jax.generation import decode_loop, jacobi, sampling_params
from medmax_jax.models import chameleon, kv_cache
from medmax_jax.plan import hlo_analysis
from medmax_jax.plan.compile import CLOCK

HBM = {"v5e": 15.75, "v6e": 31.25, "v5p": 95.74}  # GiB that a program may use
STREAMS = {"text": 1, "image": 3, "mixed": 3}


def main() -> None:
    """Parse the flags, compile, and print one JSON object."""
    parser = arguments.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--mesh", default="1,1,4", help="data,fsdp,tp")
    parser.add_argument("--mode", choices=STREAMS, default="text")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--slots", type=int, default=2_048, help="cache length in tokens")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--cache", choices=kv_cache.CACHE_DTYPES, default="model")
    parser.add_argument("--quant", choices=["none", "int8"], default="none")
    parser.add_argument("--window", type=int, default=0, help="sample.jacobi_window")
    parser.add_argument("--rule", choices=jacobi.RULES, default="gumbel")
    parser.add_argument("--hlo", default="", help="file for the compiled program")
    args = parser.parse_args()
    begin = time.monotonic()
    report = vars(args) | measure(args)
    print(json.dumps(report | dict(compile_s=round(time.monotonic() - begin, 1))))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return the compiler's report on the loop."""
    settings = base.get_config()
    settings.model.update(num_layers=args.layers, quant=args.quant)
    model = config.build(config.Model, settings.model)
    vocab = config.build(config.Vocab, settings.vocab)
    machine = make_topology_mesh(args.topology, args.mesh)
    shards = machine.shape["data"] * machine.shape["fsdp"]
    num_slots = -(-STREAMS[args.mode] * args.rows // shards) * shards
    settings.sample.update(jacobi_window=args.window, jacobi_rule=args.rule)
    sample = config.build(config.Sample, settings.sample)
    decode = sampling_params.resolve(sample, vocab, mode=args.mode, codes=1_024).config
    draws = {"text": "text", "image": "codes", "mixed": "both"}[args.mode]
    with jax.set_mesh(machine):
        like = chameleon.abstract_model(model, vocab, chameleon.NO_LORA)
        compiled = decode_loop.lower_decode(
            like, decode, batch_size=args.rows, num_slots=num_slots, cache_length=args.slots,
            cache_dtype=args.cache, draws=draws,
        ).compile()  # fmt: skip
    if args.hlo:
        with open(args.hlo, "w") as file:
            file.write(compiled.as_text())
    memory = compiled.memory_analysis()
    cache = kv_cache.cache_bytes(
        model, num_slots=num_slots, cache_length=args.slots, cache_dtype=args.cache
    )
    cache /= machine.size
    peak, hbm = memory.peak_memory_in_bytes / 2**30, HBM[args.topology.split(":")[0]]
    return dict(
        cache=round(cache / 2**30, 3),
        weights=round((memory.argument_size_in_bytes - cache) / 2**30, 3),
        temp=round(memory.temp_size_in_bytes / 2**30, 3),
        peak=round(peak, 3),
        hbm=hbm,
        fits=peak <= hbm,
        read=round(bytes_read(compiled.as_text(), args.layers) / 2**30, 3),
        pass_ms=pass_ms(compiled.as_text(), args.topology),
        copies=copies(compiled.as_text(), model, num_slots, args, machine),
        jax=jax.__version__,
    )


def copies(text: str, model: Any, num_slots: int, args: argparse.Namespace, machine: Any) -> dict:
    """Count copies of an array as large as a device's keys: in the loops, and around them."""
    tp = machine.shape["tp"]
    slots = num_slots * tp // machine.size
    shape = f"{model.num_layers},{slots},{model.num_kv_heads // tp},{args.slots},{model.head_dim}"
    copy = re.compile(rf"= \w+\[{shape}\]\S* (?:copy|transpose)\(")
    entry = text[text.index("\nENTRY ") :].partition("\n}")[0]
    around = len(copy.findall(entry))
    return dict(loops=len(copy.findall(text)) - around, around=around)


def pass_ms(text: str, topology: str) -> float:
    """Return the milliseconds of one iteration of the token loop, as scheduled."""
    cycles = hlo_analysis.Program(text).data_dependent_loops()[-1]
    return round(1e3 * cycles / CLOCK[topology.split(":")[0]], 2)


# ---- Bytes that a pass reads ----
#
# The operands of each operation of the loops, where they are in HBM: the layout of an array in
# VMEM has S(1). Of an operand that a fusion slices, the slice; of one that it updates in place,
# nothing. The second half of an asynchronous operation (copy-done) only repeats the operands of the
# first.

_OP = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?")
_NO_READ = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant")


def bytes_read(text: str, layers: int) -> float:
    """Return the bytes that one iteration of the token loop reads from HBM; `layers` are a loop."""
    bodies: dict[str, dict[str, tuple[str, str, str]]] = {}
    current = None
    for line in text.splitlines():
        if (head := re.match(r"^(?:ENTRY )?%([\w.\-]+) \(", line)) and line.rstrip().endswith("{"):
            current = bodies.setdefault(head[1], {})
        elif current is not None and (op := _OP.match(line)):
            current[op[1]] = op.groups()[1:]
    entry = re.search(r"^ENTRY %([\w.\-]+) ", text, re.M)[1]
    loops = [_named("body", rest) for _, op, rest in bodies[entry].values() if op == "while"]
    return _read_by(bodies, loops[-1], layers)


def _read_by(bodies: dict, name: str, layers: int) -> float:
    body, total = bodies[name], 0.0
    for shape, op, rest in body.values():
        if op == "while":
            total += layers * _read_by(bodies, _named("body", rest), layers)
        elif op == "slice-start":  # its result is (the operand, the slice, ..)
            total += _size("{}[{}]{}".format(*_ARRAY.findall(shape)[1][:2], ""))
        elif op not in _NO_READ and not op.endswith("-done"):
            for index, operand in enumerate(_operands(rest)):
                size = _size(body[operand][0]) if operand in body else 0
                fused = op == "fusion" and size
                total += _read_of(bodies, _named("calls", rest), index, size) if fused else size
    return total


def _read_of(bodies: dict, name: str, index: int, size: float) -> float:
    """Return the bytes that a fused computation reads of its operand `index` of `size` bytes."""
    body, total = bodies[name], 0.0
    own = {
        key
        for key, (_, op, rest) in body.items()
        if op == "parameter" and rest.startswith(f"{index})")
    }
    for key, (shape, op, rest) in body.items():
        used = _operands(rest)
        if not own & set(used):
            continue
        called = _named("calls", rest) if op == "fusion" else ""
        kinds = {inner for _, inner, _ in bodies[called].values()} if called else {op}
        if kinds <= {"parameter", "bitcast"}:
            own.add(key)
        elif called:
            places = [place for place, operand in enumerate(used) if operand in own]
            total += sum(_read_of(bodies, called, place, size) for place in places)
        elif op in ("dynamic-slice", "slice", "gather") and used[0] in own:
            total += _size(shape.replace("S(1)", ""))
        elif not (op in ("scatter", "dynamic-update-slice") and used[0] in own):
            return size
    return min(total, size)


def _size(shape: str) -> float:
    """Return the bytes of the arrays in HBM."""
    total = 0.0
    for dtype, sizes, layout in _ARRAY.findall(shape):
        if dtype in hlo_analysis.WIDTHS and "S(1)" not in layout:
            count = math.prod(map(int, filter(None, sizes.split(","))))
            total += count * hlo_analysis.WIDTHS[dtype] / 8
    return total


def _operands(rest: str) -> list[str]:
    return re.findall(r"%([\w.\-]+)", rest.split("), ")[0])


def _named(kind: str, rest: str) -> str:
    return re.search(rf"{kind}=%([\w.\-]+)", rest)[1]


if __name__ == "__main__":
    main()
