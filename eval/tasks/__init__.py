"""The suite's tasks: catalog, items, selection, probes and public benchmarks.

benchmark_import   The command line of benchmark_readers.py: `data.prepare eval_items`, a benchmark
                   to a folder of items.
benchmark_readers  Public benchmarks in their own formats to rows of the released schema, with what
                   that lacks.
catalog            The suite as one table: what each task is, where its rows come from, how it is
                   asked and scored.
items              What the suite asks: families of tasks, and items made from rows of the released
                   schema.
probes             Questions asked in another way, to see whether a model looks, and whether the
                   order matters.
selection          What is asked: items of the embedded sample or of JSONL files, chosen by the
                   settings' counts.
"""
