"""Imported once by the process from which test ranks are forked."""

import gc
import logging
import os

# What DeepSpeed would import in each rank when it builds its first engine (2-3 s), without inductor's worker processes.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
import torch
import torch._dynamo

import agvm_ds.engine
import agvm_ds.mmdet.testing.test
import agvm_ds.mmdet.train  # noqa: F401

torch.set_num_threads(1)
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
gc.freeze()  # DeepSpeed calls gc.collect: a rank need not look through all that was imported
