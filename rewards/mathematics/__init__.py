"""Answers read and compared: notation -> reader (formulas) -> readings -> equality (values, else symbolic)."""
