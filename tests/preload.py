"""Imported once by the process from which test ranks are forked."""

import logging

import deepspeed  # noqa: F401
import torch

import agvm_ds.engine  # noqa: F401

torch.set_num_threads(1)
logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
