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
from step_aot import the_mesh

from medmax_jax import config
from medmax_jax.configs import base
from medmax_jax.generation import decode_loop
from medmax_jax.generation.sampling_params import DecodeConfig
from medmax_jax.models import chameleon, kv_cache

HBM = {"v5e": 15.75, "v6e": 31.25, "v5p": 95.74}  # GiB that a program may use
STREAMS = {"text": 1, "image": 3, "mixed": 3}


def main() -> None:
    """Parse the flags, compile, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--mesh", default="1,1,4", help="data,fsdp,tp")
    parser.add_argument("--mode", choices=STREAMS, default="text")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--slots", type=int, default=2_048)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--cache", choices=kv_cache.CACHE_DTYPES, default="model")
    parser.add_argument("--quant", choices=["none", "int8"], default="none")
    parser.add_argument("--hlo", default="", help="file for the compiled program")
    given = parser.parse_args()
    begin = time.monotonic()
    found = vars(given) | measure(given)
    print(json.dumps(found | dict(compile_s=round(time.monotonic() - begin, 1))))


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Return the compiler's report on the loop."""
    settings = base.get_config()
    settings.model.update(num_layers=given.layers, quant=given.quant)
    model = config.build(config.Model, settings.model)
    vocab = config.build(config.Vocab, settings.vocab)
    machine = the_mesh(given.topology, given.mesh)
    blocks = machine.shape["data"] * machine.shape["fsdp"]
    lanes = STREAMS[given.mode] * given.rows
    plan = DecodeConfig(
        mode=given.mode, chunk=16, codes=1_024, context=model.context_length, vocab=vocab,
        text_greedy=True, image_greedy=False, stop_at_boi=False, per_segment=False, blocks=blocks,
        depth=-(-lanes // blocks),
    )  # fmt: skip
    draws = {"text": "text", "image": "codes", "mixed": "both"}[given.mode]
    with jax.set_mesh(machine):
        like = chameleon.abstract_model(model, vocab, chameleon.NO_LORA)
        fixed = dict(rows=given.rows, slots=given.slots, kind=given.cache, draws=draws)
        compiled = decode_loop.lower_decode(like, plan, **fixed).compile()
    if given.hlo:
        with open(given.hlo, "w") as file:
            file.write(compiled.as_text())
    memory = compiled.memory_analysis()
    whole = kv_cache.cache_bytes(
        model, lanes=blocks * plan.depth, slots=given.slots, kind=given.cache
    )
    cache = whole / machine.size
    peak, room = memory.peak_memory_in_bytes / 2**30, HBM[given.topology.split(":")[0]]
    return dict(
        cache=round(cache / 2**30, 3),
        weights=round((memory.argument_size_in_bytes - cache) / 2**30, 3),
        temp=round(memory.temp_size_in_bytes / 2**30, 3),
        peak=round(peak, 3),
        hbm=room,
        fits=peak <= room,
        copies=copies(compiled.as_text(), model, blocks * plan.depth, given, machine),
        jax=jax.__version__,
    )


def copies(text: str, model: Any, lanes: int, given: argparse.Namespace, machine: Any) -> dict:
    """Count copies of an array as large as a device's keys: in the loops, and around them."""
    tp = machine.shape["tp"]
    rows = lanes * tp // machine.size
    shape = f"{model.num_layers},{rows},{model.num_kv_heads // tp},{given.slots},{model.head_dim}"
    copy = re.compile(rf"= \w+\[{shape}\]\S* (?:copy|transpose)\(")
    entry = text[text.index("\nENTRY ") :].partition("\n}")[0]
    around = len(copy.findall(entry))
    return dict(loops=len(copy.findall(text)) - around, around=around)


if __name__ == "__main__":
    main()
