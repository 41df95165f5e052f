"""Measuring a model on sets of problems: what `rlflow eval` does."""
