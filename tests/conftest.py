"""Settings for all tests: one thread (the tests run side by side), nothing from a hub."""

import os

import hypothesis
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# The same examples everywhere; the machine's load is no business of theirs.
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None)
hypothesis.settings.load_profile("tests")
