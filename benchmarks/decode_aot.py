"""Compiles the 7B decode loop for TPUs on a machine without one: memory use and copies.

    python benchmarks/decode_aot.py --topology=v5e:2x2 --mesh=1,1,4 --rows=8 --slots=2048

Printed as JSON, GiB per device:
    weights, cache   the arguments
    temp             temporaries
    peak, hbm        the peak memory of the program, and the memory of the chip
    fits             peak <= hbm
    copies           of all keys or values: in the program's loops, that is for each token,
                     and around them, that is for each chunk of 16 tokens
"""

import argparse
import json
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


if __name__ == "__main__":
    main()
