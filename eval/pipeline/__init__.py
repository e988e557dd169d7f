"""An evaluation, stage by stage.

contamination       What of the items stands in the training records, and every headline again
                    without it.
cost_estimate       What an evaluation will ask before it asks: requests, tokens, judge's calls,
                    price, minutes.
image_scoring       Pictures and captions before a scorer: pictures.jsonl, from embeddings that are
                    kept.
inference           Asks a model every item once and keeps each answer on disk: killed, it goes on
                    where it was.
judging             A workdir's records before the judge: judged.jsonl, a line a record and kind,
                    nothing twice.
option_likelihoods  How likely a model finds the options of a question, and whether it knows when
                    it is wrong.
stages              One evaluation in stages, each a plain function of what is in `Run`; files are
                    what they share.
"""
