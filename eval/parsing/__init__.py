"""Parsing of options, and of yes and no, from answers.

answer_context  Prepares an answer for parsing, and finds what denies or hedges a phrase of it.
answer_parser   Parses which option, or which of yes and no, an answer states; None where it states
                none.
option_words    Finds the options of a question by their words in an answer.
yes_no_parser   Parses which of yes and no an answer states; None where it states neither, or both.
"""
