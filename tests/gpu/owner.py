"""The test's side of `cuda_owner.py`."""

import base64
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from hybridflow.resharding.cuda_ipc import CudaPublication
from tests.rank_processes import ROOT


class Owner:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def published(self, command: str = "publish") -> CudaPublication:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(command, file=self._process.stdin, flush=True)
        found: CudaPublication = pickle.loads(base64.b64decode(self._process.stdout.readline()))
        return found


@contextmanager
def owner(weights: Mapping[str, torch.Tensor], folder: Path) -> Iterator[Owner]:
    """A process that holds these weights on the first GPU."""
    torch.save(dict(weights), folder / "weights.pt")
    command = [sys.executable, str(Path(__file__).parent / "cuda_owner.py"), str(folder / "weights.pt")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            yield Owner(process)
        finally:
            process.kill()
