"""Faults that a test's config puts into a run, and the table of what became of them."""
