"""The suite's tasks: catalog, items, selection, probes and public benchmarks.

benchmark_import   Implements `data.prepare eval_items`: converts a benchmark to a folder of items.
benchmark_readers  Reads public benchmarks in their own formats into rows of the MedMax schema, with
                   added fields.
catalog            Lists the suite's tasks in one table: their rows, prompts and metrics.
families           Defines the families of tasks: how a question is posed, and what kind of answer
                   it has.
items              Defines items, made from rows of the MedMax release's schema.
own_cards          Reads the cards and the items of a user's own benchmark.
probes             Modifies questions to test whether a model uses the image, the option order and
                   the shots.
selection          Selects items of the embedded sample or of JSONL files by the settings' counts.
shots              Puts examples (shots) before questions, for in-context learning, and modifies
                   them for probes.
"""
