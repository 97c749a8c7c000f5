"""Imported once by the process from which test ranks are forked."""

import logging
import os

# What DeepSpeed would import in each rank when it builds its first engine (2-3 s), without inductor's worker processes.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import deepspeed  # noqa: E402
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: E402, F401
import torch  # noqa: E402
import torch._dynamo  # noqa: E402, F401

import agvm_ds.engine  # noqa: E402, F401

torch.set_num_threads(1)
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
