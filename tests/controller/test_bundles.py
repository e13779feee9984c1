"""Ranks that take several bundles: where they live, and which GPUs they see. Ray counts GPUs that are not there."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import os, sys
from pathlib import Path
import ray
ray.init(address="local", num_cpus=4, num_gpus=4, include_dashboard=False, log_to_driver=False)
from hybridflow.controller.coordinates import Shape
from hybridflow.controller.dispatch import dispatch
from hybridflow.controller.ray_runtime import RayRuntime
from hybridflow.controller.worker import Worker
from hybridflow.errors import ConfigError

class Seer(Worker):
    @dispatch("ONE_TO_ALL")
    def sees(self) -> str:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES")
        return " ".join(os.environ[name] for name in names)

runtime = RayRuntime(Path(sys.argv[1]))
pool = runtime.pool("all", 4, cpus_per_bundle=0.5, gpus_per_bundle=1, max_groups=2)
actor = runtime.group("actor", Seer, pool, Shape(tensor=2, data=2))
rollout = runtime.group("rollout", Seer, pool, Shape(data=2), bundles_per_rank=2)
runtime.ready([actor, rollout])
for group in (actor, rollout):
    for line in group.sees().result():
        print(group.name, line)
try:
    runtime.group("third", Seer, pool, Shape(data=3), bundles_per_rank=2)
except ConfigError as error:
    print(error)
runtime.shutdown()
ray.shutdown()
"""


def test_a_rank_of_two_bundles_sees_the_devices_of_both(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    lines = ran.stdout.splitlines()
    assert len(lines) == 7, ran.stdout + ran.stderr
    ranks = [line.split() for line in lines[:6]]
    assert [rank[:4] for rank in ranks] == [
        *(["actor", str(k), "4", str(k)] for k in range(4)),
        *(["rollout", str(k), "2", str(k)] for k in range(2)),
    ]
    devices = [rank[4] for rank in ranks]
    assert sorted(devices[:4]) == ["0", "1", "2", "3"]
    assert devices[4:] == [",".join(devices[:2]), ",".join(devices[2:4])], (
        "rank k's engine is where ranks 2k, 2k + 1 are"
    )
    assert lines[6].startswith("third: 3 ranks asked for, but pool 'all' has 4 bundles; one rank of this group takes 2")
