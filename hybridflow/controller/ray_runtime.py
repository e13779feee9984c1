"""`RayRuntime`: pools and groups on a Ray cluster."""

import os
import secrets
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hybridflow.batch_ref import Store
from hybridflow.controller.coordinates import Shape
from hybridflow.controller.failures import FailureSwitch, kernel_oom_kills
from hybridflow.controller.group import WorkerGroup, admit
from hybridflow.controller.host import Host
from hybridflow.controller.lanes import ThreadLane
from hybridflow.controller.placement import Pool, check_supply, order_by_node
from hybridflow.controller.processes import Descendants, keep_exit_statuses
from hybridflow.controller.ray_rank import actor_name, pickled
from hybridflow.controller.ray_ranks import RayRanks
from hybridflow.controller.ray_store import NAMESPACE, RayStore
from hybridflow.controller.settings import CALL_TIMEOUT_S
from hybridflow.controller.worker import Worker, WorkerContext
from hybridflow.errors import ConfigError, HybridFlowError

RUN_MARK = "HYBRIDFLOW_RUN"
_reserved: dict[Any, tuple[list[str], dict[str, float]]] = {}


def start_ray(address: str = "local", num_cpus: int | None = None) -> bool:
    """Connect this process to Ray unless it is; True when it was not. `local` starts a private cluster; `auto` and
    `host:port` join one (ConfigError when it cannot be reached).

    Ray 2.60 asks for a token on every connection of a new cluster. A private cluster gets a fresh one in the
    environment of its own processes, instead of the one that Ray would write into the home folder. RAY_AUTH_MODE is
    left to `ray.init`, which refreshes the configuration that `import ray` has read already.
    """
    if ray.is_initialized():
        return False
    if address == "local":
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Ray's node daemon then kills what a dead rank leaves behind (an engine's processes).
        os.environ.setdefault("RAY_kill_child_processes_on_worker_exit_with_raylet_subreaper", "true")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray runs its workers at niceness 15: anything else on the machine would starve the ranks.
        os.environ.setdefault("RAY_worker_niceness", "0")
    else:
        _refuse_unreachable(address)
    try:
        ray.init(
            address=address,
            num_cpus=num_cpus if address == "local" else None,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level="ERROR",
            namespace=NAMESPACE,
        )
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise _unreachable(address, error) from error
    keep_exit_statuses()
    return True


def _refuse_unreachable(address: str) -> None:
    """Ray itself tries for two minutes, and then ends the process."""
    given = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    host, _, port = given.rpartition(":")
    if not port.isdigit():
        return  # `auto` without RAY_ADDRESS: Ray looks on this machine and answers at once
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise _unreachable(given, error) from error


def _unreachable(address: str, error: Exception) -> ConfigError:
    remedy = "`ray start --head` prints it; a cluster with tokens needs RAY_AUTH_MODE=token and its RAY_AUTH_TOKEN here"
    return ConfigError(f"ray.address: found {address!r}; no Ray cluster could be joined there ({error}): {remedy}")


class RayRuntime:
    """Pools and groups of one run. Made in a process that has Ray already, it shares that cluster and leaves it up.

    call_timeout_s: a rank that takes longer for its construction or one call counts as hung.
    """

    def __init__(
        self,
        run_folder: Path,
        address: str = "local",
        num_cpus: int | None = None,
        call_timeout_s: float = CALL_TIMEOUT_S,
    ) -> None:
        self.run_folder = Path(run_folder).resolve()
        self.run_folder.mkdir(parents=True, exist_ok=True)
        self.call_timeout_s = call_timeout_s
        self.id = uuid.uuid4().hex[:12]
        self.failure = FailureSwitch()
        self._owns_ray = start_ray(address, num_cpus)
        self._descendants = Descendants(f"{RUN_MARK}={self.id}")
        self._oom_kills = kernel_oom_kills()
        self._pools: list[Pool] = []
        self._groups: list[WorkerGroup] = []
        self._closed = False

    @property
    def store(self) -> Store:
        """Where the driver puts rows that ranks will read."""
        return RayStore(ray.get_runtime_context().get_node_id(), actor=None)

    def pool(
        self,
        name: str,
        num_bundles: int,
        cpus_per_bundle: float = 1,
        gpus_per_bundle: float = 0,
        max_groups: int = 1,
        timeout_s: float = 60,
    ) -> Pool:
        """Reserve bundles. ConfigError at once, with demand and supply, when they do not fit."""
        bundle = {"CPU": float(cpus_per_bundle), "GPU": float(gpus_per_bundle)}
        bundle = {kind: amount for kind, amount in bundle.items() if amount}
        check_supply(name, num_bundles, bundle, free_resources())
        placement = placement_group([bundle] * num_bundles, strategy="PACK")
        if not placement.wait(timeout_s):
            remove_placement_group(placement)
            raise ConfigError(
                f"pool {name!r}: {num_bundles} x {bundle} not granted in {timeout_s:g} s; is the cluster busy?"
            )
        by_bundle = placement_group_table(placement)["bundles_to_node_id"]
        nodes = [by_bundle[k] for k in range(num_bundles)]
        _reserved[placement.id] = (nodes, bundle)
        order = order_by_node(nodes)
        lane = ThreadLane(name)
        pool = Pool(name, num_bundles, cpus_per_bundle, gpus_per_bundle, max_groups, lane, placement, order, nodes)
        self._pools.append(pool)
        return pool

    def group(
        self,
        name: str,
        factory: Callable[[WorkerContext], Worker],
        pool: Pool,
        shape: Shape,
        env: Mapping[str, str] | None = None,
        bundles_per_rank: int = 1,
    ) -> WorkerGroup:
        """Start the ranks and their construction; returns at once. `ready` waits for it and raises what went wrong.

        bundles_per_rank: a rank that starts processes of its own takes several neighbouring bundles of one node.
        """
        worker_class = admit(name, factory, pool, shape, self._groups, bundles_per_rank)
        prefix = f"{self.id}/{name}"
        logs = [self.run_folder / "logs" / f"{name}-{rank}.log" for rank in range(shape.num_ranks)]
        bundles = [pool.bundles_of(rank, bundles_per_rank) for rank in range(shape.num_ranks)]
        hosts = [
            self._host(name, pool, prefix, rank, bundles, str(logs[rank]), dict(env or {}))
            for rank in range(shape.num_ranks)
        ]
        master = hosts[0].address.remote()
        envelope = pickled(factory)
        built = [host.build.remote(envelope, shape, master, str(self.run_folder), prefix) for host in hosts]
        ranks = RayRanks(
            name, hosts, built, logs, self.failure, self._oom_kills, self._descendants, self.call_timeout_s
        )
        group = WorkerGroup(name, worker_class, shape, ranks, pool.lane)
        self._groups.append(group)
        return group

    def _host(
        self, name: str, pool: Pool, prefix: str, rank: int, bundles: Sequence[list[int]], log: str, env: dict[str, str]
    ) -> Any:
        """bundles: of every rank of the group; a rank's process lives in the first of its own."""
        bundle = bundles[rank][0]
        local_rank = sum(pool.nodes[earlier[0]] == pool.nodes[bundle] for earlier in bundles[:rank])
        env = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(bundles)),
            "LOCAL_RANK": str(local_rank),
            "OMP_NUM_THREADS": "1",
            RUN_MARK: self.id,
            **_visible_devices(pool, bundles[rank]),
            **env,
        }
        options = Host.options(  # type: ignore[attr-defined]
            name=actor_name(prefix, rank), namespace=NAMESPACE, **_inside(pool, bundle)
        )
        return options.remote(name, rank, log, env)

    def ready(self, groups: Sequence[WorkerGroup], timeout_s: float | None = None) -> None:
        """Wait until the ranks of all groups are built (they are built at the same time); None: `call_timeout_s`."""
        since = time.monotonic()
        for group in groups:
            ray_ranks(group).wait_built(since, timeout_s or self.call_timeout_s)

    def shutdown(self) -> None:
        """End all ranks and what they started, give the pools back. Harmless when called twice."""
        if self._closed:
            return
        self._closed = True
        for group in self._groups:
            ray_ranks(group).close()
        self._descendants.end_all()
        for pool in self._pools:
            _reserved.pop(pool.placement.id, None)
            remove_placement_group(pool.placement)
            pool.lane.close() if isinstance(pool.lane, ThreadLane) else None
        if self._owns_ray:
            ray.shutdown()


def _visible_devices(pool: Pool, bundles: Sequence[int]) -> dict[str, str]:
    """The GPUs of all of a rank's bundles: Ray shows an actor those of its own bundle alone. Nothing for one bundle."""
    if len(bundles) == 1 or not pool.gpus_per_bundle:
        return {}
    asked = [_bundle_devices.options(**_inside(pool, bundle)).remote() for bundle in bundles]
    return {"CUDA_VISIBLE_DEVICES": ",".join(device for found in ray.get(asked) for device in found)}


def _inside(pool: Pool, bundle: int) -> dict[str, Any]:
    """Options of an actor or task that takes its share of this bundle."""
    strategy = PlacementGroupSchedulingStrategy(
        pool.placement, placement_group_bundle_index=bundle, placement_group_capture_child_tasks=False
    )
    return {"scheduling_strategy": strategy, **pool.rank_resources}


@ray.remote
def _bundle_devices() -> list[str]:
    return [str(device) for device in ray.get_gpu_ids()]


def ray_ranks(group: WorkerGroup) -> RayRanks:
    if not isinstance(group.ranks, RayRanks):
        raise HybridFlowError(f"{group}: made by another runtime")
    return group.ranks


def free_resources() -> dict[str, dict[str, float]]:
    """Per living node what its total leaves after this process's pools (Ray's own count of free resources lags)."""
    nodes = {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}
    for bundle_nodes, bundle in _reserved.values():
        for node in bundle_nodes:
            for kind, amount in bundle.items():
                if node in nodes:
                    nodes[node][kind] = nodes[node].get(kind, 0) - amount
    return nodes
