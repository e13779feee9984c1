"""A training rank in a process of its own, with its weights on a GPU: publishes them through CUDA's handles.

Run as `python cuda_owner.py <file of a state dict>`. For each line of its input it answers with its publication;
`update` first adds 0.01 to all weights, `offload` gives their memory back and takes it again.
"""

import base64
import pickle
import sys

import torch

from hybridflow.resharding.cuda_ipc import EXPORTS, gpu_of, publish_cuda
from workers.training.offload import Stash


def main() -> None:
    device = torch.device("cuda", 0)
    held = {name: tensor.to(device).flatten() for name, tensor in torch.load(sys.argv[1]).items()}
    for line in sys.stdin:
        if line.strip() == "update":
            for tensor in held.values():
                tensor += 0.01
        elif line.strip() == "offload":
            EXPORTS.forget()
            stash = Stash(device)
            stash.put(held.values())
            stash.take_back()
        print(base64.b64encode(pickle.dumps(publish_cuda(0, held, gpu_of(device)))).decode(), flush=True)


if __name__ == "__main__":
    main()
