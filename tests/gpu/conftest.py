"""GPU tests are collected only where a GPU is."""

import sys
from pathlib import Path

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]

for folder in ("workers/training", "gpu"):  # programs of ranks, and their samples
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))
