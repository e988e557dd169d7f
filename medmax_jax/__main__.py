"""Runs one of the programs as a subcommand: `medmax COMMAND [flags]`.

`medmax train --workdir=D` is the same program as `python -m medmax_jax.train --workdir=D`. This
module imports no program before it runs one, so that `medmax --help` starts at once.
"""

import difflib
import runpy
import sys

import medmax_jax

# Command -> (module that is run as a program, description).
COMMANDS = {
    "quickstart": ("medmax_jax.quickstart", "run the complete pipeline on the sample images"),
    "prepare": ("medmax_jax.data.prepare", "convert sources to records; check and describe them"),
    "train": ("medmax_jax.train", "train with LoRA or all weights, sharded and resumable"),
    "train_vqgan": ("medmax_jax.train_vqgan", "train an image tokenizer"),
    "plan": ("medmax_jax.plan", "check memory, speed and cost of a training run in advance"),
    "sweep": ("medmax_jax.sweep", "expand, run, render and collect a grid of training runs"),
    "scaling": ("medmax_jax.scaling", "fit a scaling law to a table of runs"),
    "generate": ("medmax_jax.generate", "generate text, images or both from prompts"),
    "demo": ("medmax_jax.demo", "serve a page on this machine: chat, images, likelihoods"),
    "serve": ("medmax_jax.serve", "serve a model and its adapters as the OpenAI interface"),
    "convert": ("medmax_jax.convert", "convert, inspect and check checkpoints and adapters"),
    "eval": ("medmax_jax.eval.run", "evaluate a model on the benchmark suite"),
    "compare": ("medmax_jax.eval.compare", "compare two evaluations with paired tests"),
    "rescore": ("medmax_jax.eval.rescore", "score published predictions of other programs again"),
    "report": ("medmax_jax.eval.report", "render the report page of an evaluation again"),
    "reproduce": ("medmax_jax.eval.reproduce", "reproduce every number of a paper's tables"),
    "leaderboard": ("medmax_jax.eval.leaderboard", "rank several evaluations in one table"),
    "export": ("medmax_jax.eval.export", "write an evaluation in the form of lmms-eval or the Hub"),
    "suite": ("medmax_jax.eval.suite", "list the tasks of the suite with published scores"),
}


def main() -> int:
    """Run the program that the first argument selects; return the status of a usage message."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-h", "help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"medmax_jax {medmax_jax.__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else "medmax --help lists the commands"
        print(f"error: unknown command {name!r}; {hint}", file=sys.stderr)
        return 2
    del sys.argv[1]
    runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)
    return 0


def _usage() -> str:
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:{width}}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        ["usage: medmax COMMAND [flags]", "", *lines, "", "medmax COMMAND --help lists its flags."]
    )


if __name__ == "__main__":
    sys.exit(main())
