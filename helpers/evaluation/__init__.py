"""Judging an edit: scores, memory, attacks, and the report that puts them together."""
