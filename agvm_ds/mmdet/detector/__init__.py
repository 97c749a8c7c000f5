"""The detector as it is trained: its step, its modules, its numbers and its weights."""
