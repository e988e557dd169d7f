"""Intervals, paired tests and calibration.

calibration   Does a model know when it is wrong? From its likelihoods of a question's options.
intervals     Intervals over groups: questions about one patient or volume are one cluster.
paired_tests  Do two models differ? Tests of paired scores, over groups, and over a suite of them.
"""
