"""A process that publishes memory as a GPU's owner does, through handles that a CPU has: descriptors in /proc.

Prints its publication, then for every line of its input publishes once more; at `write` it first adds 1 to all.
"""

import base64
import itertools
import os
import pickle
import sys

import torch

from hybridflow.resharding.cuda_ipc import Exported, Exports, publish_cuda

GPU = "GPU-of-this-test"


def share(memory: torch.UntypedStorage) -> Exported:
    fd, num_bytes = memory._share_fd_cpu_()
    return (f"/proc/{os.getpid()}/fd/{fd}", num_bytes)


def main() -> None:
    exports, flat = Exports(share), torch.arange(12, dtype=torch.float32)
    storages = {"a": flat[:6], "tied": flat[:6], "b": flat[6:], "c": torch.ones(3, dtype=torch.int64)}
    for line in itertools.chain([""], sys.stdin):
        if line.strip() == "write":
            flat += 1
        published = publish_cuda(1, storages, GPU, exports)
        print(base64.b64encode(pickle.dumps(published)).decode(), flush=True)


if __name__ == "__main__":
    main()
