"""`LocalRuntime`: the same driver and worker code in one process, one rank a role, without Ray.

Calls run at once in the caller's thread: an ordinary breakpoint works, and futures are done when they are returned.
"""

import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybridflow.batch import Batch
from hybridflow.batch_ref import BatchRef, Block, Want
from hybridflow.controller.coordinates import Coordinates, Shape
from hybridflow.controller.dispatch import Arguments
from hybridflow.controller.failures import RankInfo, RankRaised, raised
from hybridflow.controller.group import RankCall, WorkerGroup, admit
from hybridflow.controller.lanes import InlineLane
from hybridflow.controller.placement import Pool
from hybridflow.controller.worker import Worker, WorkerContext
from hybridflow.errors import ConfigError, RankFailure


class LocalStore:
    """Blocks are the batches themselves. `received_bytes` stays 0: nothing leaves the process."""

    received_bytes = 0

    def put(self, batch: Batch) -> Block:
        return Block(batch, None, batch.num_rows)

    def read(self, wants: Sequence[Want]) -> list[tuple[Batch, np.ndarray]]:
        return [(want.block.handle.select(want.columns), want.rows) for want in wants]


class LocalRanks:
    """One worker in this process. Its exceptions become RankFailure, the original as `__cause__`."""

    def __init__(self, role: str, worker: Worker, log: Path) -> None:
        self.role, self.worker, self._log = role, worker, log

    def call(self, call: RankCall) -> list[Any]:
        args, kwargs = call.per_rank[0]
        try:
            result = getattr(self.worker, call.method)(*args, **kwargs)
            return [self._referenced(result)] if call.keep else []
        except Exception as error:  # whatever a worker raises is named with its rank, as on Ray
            raise self.failure(call.method, error) from error

    def stream(self, method: str, per_rank: Sequence[Arguments], on_item: Callable[[BatchRef], None]) -> None:
        args, kwargs = per_rank[0]
        try:
            for item in getattr(self.worker, method)(*args, **kwargs):
                on_item(self._referenced(item))
        except Exception as error:  # as above
            raise self.failure(method, error) from error

    def _referenced(self, result: Any) -> Any:
        return BatchRef.put(result, self.worker.context.store) if isinstance(result, Batch) else result

    def failure(self, phase: str, error: BaseException) -> RankFailure:
        return rank_failure(self.role, self._log, phase, error)


def rank_failure(role: str, log: Path, phase: str, error: BaseException) -> RankFailure:
    shown = RankRaised(0, type(error).__name__, str(error), "".join(traceback.format_exception(error)))
    return raised(RankInfo(role, 0, "this process", os.getpid(), log), phase, shown)


class LocalRuntime:
    """The interface of RayRuntime with one rank a group."""

    def __init__(self, run_folder: Path) -> None:
        self.run_folder = Path(run_folder).resolve()
        self.run_folder.mkdir(parents=True, exist_ok=True)
        self.store = LocalStore()
        self._groups: list[WorkerGroup] = []
        self._closed = False

    def pool(
        self,
        name: str,
        num_bundles: int = 1,
        cpus_per_bundle: float = 1,
        gpus_per_bundle: float = 0,
        max_groups: int = 1,
        timeout_s: float = 60,
    ) -> Pool:
        """A pool of this process alone; nothing is reserved."""
        if num_bundles != 1:
            raise ConfigError(f"pool {name!r}: runtime=local has one rank a role, found {num_bundles}; use runtime=ray")
        return Pool(name, 1, cpus_per_bundle, gpus_per_bundle, max_groups, InlineLane())

    def group(
        self,
        name: str,
        factory: Callable[[WorkerContext], Worker],
        pool: Pool,
        shape: Shape,
        env: Mapping[str, str] | None = None,
        bundles_per_rank: int = 1,
    ) -> WorkerGroup:
        """Build the worker here and now. `env` is not applied: the process is the caller's."""
        worker_class = admit(name, factory, pool, shape, self._groups, bundles_per_rank)
        log = self.run_folder / "logs" / f"{name}-0.log"
        context = WorkerContext(name, Coordinates(0, shape), self.store, "localhost", 0, "local", self.run_folder)
        try:
            worker = factory(context)
        except Exception as error:  # as above
            raise rank_failure(name, log, "construction", error) from error
        group = WorkerGroup(name, worker_class, shape, LocalRanks(name, worker, log), pool.lane)
        self._groups.append(group)
        return group

    def ready(self, groups: Sequence[WorkerGroup], timeout_s: float | None = None) -> None:
        """Groups are ready when `group` returns."""

    def shutdown(self) -> None:
        """Let the workers close. Harmless when called twice."""
        if self._closed:
            return
        self._closed = True
        for group in self._groups:
            group.shutdown().result()
