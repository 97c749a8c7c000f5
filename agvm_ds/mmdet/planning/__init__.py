"""From GPUs and a batch to a run: what ``launch/plan.py`` settles."""
