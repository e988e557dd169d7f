"""Intervals, paired tests and calibration.

calibration   Measures calibration from a model's likelihoods of a question's options.
intervals     Computes intervals over groups: questions about one patient or volume are one cluster.
paired_tests  Tests whether two models differ: paired scores, over groups and over a suite.
"""
