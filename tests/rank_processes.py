"""Ranks of a group as processes of their own: gloo groups, and DeepSpeed with them, are global to a process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(program: Path, num_ranks: int, folder: Path, *arguments: object, timeout_s: float = 400) -> None:
    """`program <rank> <arguments> <port> <folder>` for each rank, side by side; fails with the ends of their logs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{program.parent}{os.pathsep}{ROOT}"}
    given, port = [str(argument) for argument in arguments], str(free_port())
    logs = [folder / "-".join(["log", *given, str(rank)]) for rank in range(num_ranks)]
    processes = []
    for rank, log in enumerate(logs):
        command = [sys.executable, str(program), str(rank), *given, port, str(folder)]
        with log.open("w") as out:
            processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
    try:
        codes = [process.wait(timeout=timeout_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * num_ranks, "\n".join(log.read_text()[-3000:] for log in logs)
