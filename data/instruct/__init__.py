"""Turn captions into interleaved instructions with a language model.

captions  Read captioned images and their scores: the JSONL files that the curation starts from.
cli       Define the command `python -m data.prepare instruct`: its flags, cost estimate and cost
          report.
curation  Curate interleaved instructions from captioned images, in the published stages.
replies   Build the prompt for each caption and validate the replies: two prompts and their rules.
"""
