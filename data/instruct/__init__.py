"""Captions to interleaved instructions by a language model.

captions  Captioned pictures and their scores, as JSONL that the curation starts from.
cli       The command `python -m data.prepare instruct`: its flags, what it costs before and after.
curation  The curation of interleaved instructions from captioned pictures, in the published stages.
replies   What is asked for each caption, and which replies are taken: the two prompts and their
          rules.
"""
