"""Compile the actual training step, and the decode loop, for a machine that is not available.

Nothing is allocated: state, base and batch are shapes with shardings. If the compiler runs out of
memory, that is an answer too. What each device holds at the peak of the step:

    base, adapters, optimiser, batch     the arguments, by their shards
    activations                          kept for the backward pass, by their exact sizes
    temporaries                          the rest: gathered weights, gradients, a layer's work
    code                                 the program itself
"""

import contextlib
import dataclasses
import functools
import math
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from medmax_jax import sharding
from medmax_jax.config import Run
from medmax_jax.flops import GIB
from medmax_jax.generation import buckets, decode_loop, requests, sampling_params
from medmax_jax.models import chameleon, kv_cache
from medmax_jax.plan import analytic, hlo_analysis
from medmax_jax.plan.topology import CLOCK, PlanError, Topology, devices
from medmax_jax.training import step

FORMAT = 4  # of the answers; incremented whenever what is read from a program changes
_EXHAUSTED = re.compile(r"RESOURCE_EXHAUSTED|[Rr]an out of memory")
_NEEDED = re.compile(
    r"\((\d+(?:\.\d+)?)([MG])\) exceeds available|Used (\d+(?:\.\d+)?)([MG]) of \S+ hbm"
)


@dataclasses.dataclass(frozen=True)
class Program:
    """A program for a machine, not compiled yet."""

    lowered: jax.stages.Lowered
    arguments: dict[str, int]  # bytes of the arguments on one device, by part
    saved: float  # bytes of the activations kept for the backward pass
    facts: dict[str, Any]

    @property
    def text(self) -> str:
        """Return the compiler's input: the same text gives the same answer."""
        return self.lowered.as_text()


def train(run: Run, topology: Topology) -> Program:
    """Return one training step, of all parameters that any stage trains.

    Rate and step count are fixed: they change no program's size.
    """
    run = dataclasses.replace(
        run,
        optim=dataclasses.replace(run.optim, peak_lr=1e-4, schedule="run"),
        train=dataclasses.replace(run.train, steps=1_000),
        stages=(),
    )
    with _on(run, topology) as abstract_model:
        graph, trainable, frozen = step.split_trainable(abstract_model, run.train.trains)
        state = sharding.with_shardings(
            jax.eval_shape(lambda t: step.init_state(t, run), trainable)
        )
        batch = step.abstract_batch(run)
        trained = {"lora": "adapters", "full": "base", "image_head": "image columns"}
        arguments = {"base": 0, "adapters": 0} | {trained[run.train.trains]: _bytes(trainable)}
        arguments["base"] += _bytes(frozen) if run.train.trains != "full" else 0
        arguments |= {"optimiser": _bytes(state.opt_state), "batch": _bytes(batch)}
        train_step = step.make_train_step(graph, run)
        saved = analytic.activation_bytes(run)
        facts = {"compile": step.COMPILER_OPTIONS[run.train.compile]}
        return Program(train_step.lower(state, frozen, batch, _key(run)), arguments, saved, facts)


def decode(run: Run, topology: Topology, *, mode: str, rows: int, prompt: int) -> Program:
    """Return the loop that answers `rows` prompts of `prompt` tokens.

    Every KV-cache slot and every position in it is in use. `mode`: text, image or mixed, as in
    generate; an answer has at most sample.max_gen_len tokens.
    """
    streams = {"text": 1, "image": 2, "mixed": 3}[mode]
    codes, context = run.vq.codes_per_image, run.model.context_length
    try:
        requests.check_fits_context(
            prompt, mode=mode, codes=codes, context=context, where="the prompt"
        )
        settings = sampling_params.resolve(run.sample, run.vocab, mode=mode, codes=codes)
    except requests.GenerateError as error:
        raise PlanError(f"--decode={mode}: {error}") from error
    cache_length = buckets.cache_length_for(
        prompt, run.sample, mode=mode, codes=codes, context=context
    )
    shards = run.mesh.data * run.mesh.fsdp
    num_slots = -(-rows * streams // shards) * shards
    init_cache = functools.partial(
        kv_cache.init_cache,
        run.model,
        num_slots=num_slots,
        cache_length=cache_length,
        cache_dtype="model",
    )
    draws = {"text": "text", "image": "codes", "mixed": "both"}[mode]
    with _on(run, topology) as abstract_model:
        cache = _gib(_bytes(sharding.with_shardings(jax.eval_shape(init_cache))))
        lowered = decode_loop.lower_decode(
            abstract_model,
            settings.config,
            batch_size=rows,
            num_slots=num_slots,
            cache_length=cache_length,
            cache_dtype="model",
            draws=draws,
        )
    facts = {"mode": mode, "rows": rows, "streams": streams, "slots": cache_length}
    return Program(lowered, {"base": _bytes(abstract_model)}, 0.0, facts | {"cache_gib": cache})


def compile_(program: Program, topology: Topology) -> dict[str, Any]:
    """Return the compiler's answer, as JSON."""
    begin, argument_parts = time.monotonic(), program.arguments
    result = program.facts | {"how": "compiled", "hbm_gib": _gib(topology.usable)}
    try:
        with _no_compile_cache():
            compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not _EXHAUSTED.search(str(error)):
            raise
        needed = _needed(str(error))
        parts = {name: _gib(size) for name, size in argument_parts.items()}
        return result | {
            "fits": False, "peak_hbm_gib": needed, "parts": parts, "collectives": None,
            "error": str(error).splitlines()[0], "compile_s": round(time.monotonic() - begin, 1),
        }  # fmt: skip
    memory = compiled.memory_analysis()
    arguments, code = memory.argument_size_in_bytes, memory.generated_code_size_in_bytes
    peak = memory.peak_memory_in_bytes
    parts = argument_parts | {
        "padding": max(
            0, arguments - sum(argument_parts.values())
        ),  # padding of arguments to tiles
        "activations": program.saved,
        "temporaries": peak - arguments - program.saved,
        "code": code,
    }
    return result | {
        "fits": peak + code <= topology.usable,
        "peak_hbm_gib": _gib(peak + code),
        # As if placed one after another instead of as the compiler placed them: an upper bound.
        "unshared_gib": _gib(arguments + memory.temp_size_in_bytes + code),
        "parts": {name: _gib(size) for name, size in parts.items()},
        "compile_s": round(time.monotonic() - begin, 1),
    } | _read(compiled, topology)  # fmt: skip


@contextlib.contextmanager
def _no_compile_cache() -> Iterator[None]:
    """Keep JAX's own cache from programs for other machines: it can write but not read them."""
    before = jax.config.jax_enable_compilation_cache
    compilation_cache.reset_cache()  # JAX decides once, at the first compilation
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


@contextlib.contextmanager
def _on(run: Run, topology: Topology) -> Iterator[chameleon.Chameleon]:
    """Yield the abstract model on the machine's mesh; raise PlanError if settings do not fit it."""
    chips = devices(topology)
    with contextlib.ExitStack() as stack:
        try:
            mesh = sharding.make_mesh(run.mesh, chips)
            step.check(run, mesh)
            stack.enter_context(jax.set_mesh(mesh))
            abstract_model = chameleon.abstract_model(run.model, run.vocab, run.lora)
        except ValueError as error:
            raise PlanError(str(error)) from error
        yield abstract_model  # everything below is abstract: operations would run on absent chips


def _read(compiled: jax.stages.Compiled, topology: Topology) -> dict[str, Any]:
    """Return the content of the program's text; some libtpu versions cannot print all programs."""
    clock = CLOCK[topology.chip.name]
    try:
        program = hlo_analysis.Program(compiled.as_text())
    except jax.errors.JaxRuntimeError as error:
        return {
            "collectives": None,
            "error": f"the program text is unavailable: {str(error).splitlines()[0]}",
        }
    return {
        "collectives": hlo_analysis.summary(program.collectives()),
        "scheduled_s": round(program.cycles() / clock, 4),
        "open_loops_s": [
            round(loop_cycles / clock, 8) for loop_cycles in program.data_dependent_loops()
        ],
    }


def _key(run: Run) -> jax.ShapeDtypeStruct:
    return sharding.with_shardings(
        jax.eval_shape(lambda: jax.random.key(0, impl=run.train.prng_impl))
    )


def _bytes(tree: Any) -> int:
    """Return the bytes of one device's shards."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _gib(size: int | float) -> float:
    return round(float(size) / GIB, 3)


def _needed(message: str) -> float | None:
    """Return GiB of "... (17.00G) exceeds available HBM" or "Used 17.00G of 15.75G hbm".

    None: the message is about another memory.
    """
    match = _NEEDED.search(message)
    if match is None:
        return None
    size, unit = [part for part in match.groups() if part]
    return round(float(size) / (1024 if unit == "M" else 1), 3)
