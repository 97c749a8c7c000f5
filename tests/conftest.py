"""What must be settled before torch and DeepSpeed are imported: one thread a rank, and the CPU whatever the machine has."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
