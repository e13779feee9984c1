"""What each process of `test_two_devices.py` runs, one a GPU."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from hybridflow.resharding.plan import Plan
from hybridflow.resharding.transfer import Processes, execute

Held = dict[int, dict[str, Tensor]]


def moved(me: int, world: int, folder: str, plan: Plan, processes: Processes, held: Held, bucket_bytes: int) -> None:
    device = torch.device("cuda", me)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", store=dist.FileStore(f"{folder}/store", world), rank=me, world_size=world)
    mine = {rank: to(held[rank], device) for rank, process in processes.source.items() if process == me}
    into = {
        rank: to(plan.destination.allocate(rank), device)
        for rank, process in processes.destination.items()
        if process == me
    }
    execute(plan, processes, mine, into, bucket_bytes=bucket_bytes)
    torch.save({rank: to(named, torch.device("cpu")) for rank, named in into.items()}, Path(folder, f"result{me}"))
    dist.barrier()
    dist.destroy_process_group()


def to(named: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in named.items()}
