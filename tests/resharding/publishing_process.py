"""What the other process of test_published.py runs; apart from the tests, so that it imports no more."""

import sys
from multiprocessing.connection import Connection

import torch

from hybridflow.resharding.published import publish


def publisher(pipe: Connection) -> None:
    """Publishes three tensors, two of them views of one memory; then does as it is told."""
    flat = torch.arange(100.0)
    storages = {"flat": flat, "part": flat[60:80], "half": torch.arange(8).to(torch.bfloat16), "none": torch.empty(0)}
    alias = flat[:10].view(2, 5)
    before = flat.untyped_storage().data_ptr()
    publication = publish(3, storages)
    assert flat.untyped_storage().data_ptr() != before
    pipe.send(publication)
    for told in iter(pipe.recv, "end"):
        if told == "step":
            alias.mul_(-1)  # through a view made before publishing
            flat[60] = 7.5
        elif told == "again":
            publication = publish(3, storages)
        elif told == "replace":
            storages["flat"] = storages["part"] = flat = alias = torch.zeros(100)
            alias = torch.full((100,), 5.0)
            publish(3, {"new": alias})
        pipe.send(publication)
    sys.exit(0)
