"""`WorkerGroup`: one object, N ranks."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from hybridflow.batch_ref import BatchRef
from hybridflow.controller import protocols
from hybridflow.controller.coordinates import Shape
from hybridflow.controller.dispatch import Arguments, Distribution, MethodSpec, protocol_named, spec_of
from hybridflow.controller.futures import Future, Stream, inputs, resolved
from hybridflow.controller.lanes import InlineLane, Lane, submit_joint
from hybridflow.controller.placement import Pool
from hybridflow.controller.worker import Worker
from hybridflow.controller.worker_class import worker_class_of
from hybridflow.errors import ConfigError, HybridFlowError


@dataclass(frozen=True)
class RankCall:
    """A method on all ranks at once. `keep`: the ranks whose results are wanted. `partner_failed`: the error of a joint
    call's other side, after which this side may wait for ever."""

    method: str
    per_rank: Sequence[Arguments]
    keep: Sequence[int]
    control: bool
    partner_failed: Callable[[], BaseException | None]


class Ranks(Protocol):
    """How a group's processes are reached. Blocking; raises RankFailure."""

    def call(self, call: RankCall) -> list[Any]:
        """The results of the ranks in `call.keep`, in that order."""
        ...

    def stream(self, method: str, per_rank: Sequence[Arguments], on_item: Callable[[BatchRef], None]) -> None:
        """`on_item` for each batch that any rank yields, as it comes."""
        ...


@dataclass(frozen=True)
class BoundCall:
    """A call that is not made yet: `group.bind("method", ...)`, for `joint`."""

    group: "WorkerGroup"
    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    spec: MethodSpec = field(compare=False)

    @property
    def label(self) -> str:
        return f"{self.group.name}.{self.method}"

    def check(self, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """Each batch has the columns that the method reads of it."""
        batches = protocols.batches_in(tuple(args), kwargs)
        if batches:
            for batch, names in zip(batches, self.spec.needed_columns(tuple(args), kwargs), strict=False):
                batch.require(names, where=self.label)

    def run(self, future: Future[Any], partner_failed: Callable[[], BaseException | None] = lambda: None) -> None:
        """Wait for inputs, distribute, call, collect; the outcome goes into `future`, whatever it is."""
        try:
            args, kwargs = resolved(self.args, self.kwargs)
            if inputs(self.args, self.kwargs):
                self.check(args, kwargs)
            if isinstance(future, Stream):
                self._stream(args, kwargs, future)
            else:
                future.set(self._call(args, kwargs, partner_failed))
        except BaseException as error:  # noqa: BLE001  (it reaches whoever asks for the result)
            future.fail(error)

    def _distribute(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Distribution:
        sent = protocol_named(self.spec.protocol).distribute(args, kwargs, self.group.shape)
        if len(sent.per_rank) != self.group.shape.num_ranks:
            raise HybridFlowError(
                f"{self.label}: protocol {self.spec.protocol} made arguments for {len(sent.per_rank)} ranks; "
                f"the group has {self.group.shape.num_ranks}"
            )
        return sent

    def _call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], partner_failed: Callable[[], BaseException | None]
    ) -> Any:
        protocol, shape = protocol_named(self.spec.protocol), self.group.shape
        sent = self._distribute(args, kwargs)
        keep = protocol.collecting_ranks(shape)
        results = self.group.ranks.call(RankCall(self.method, sent.per_rank, keep, self.spec.control, partner_failed))
        try:
            return protocol.collect(results, shape, sent)
        except HybridFlowError as error:
            raise HybridFlowError(f"{self.label}: {error}") from error

    def _stream(self, args: tuple[Any, ...], kwargs: dict[str, Any], stream: Stream) -> None:
        def numbered(value: Any) -> Any:
            return value.with_scalars(index=np.arange(value.num_rows)) if isinstance(value, BatchRef) else value

        sent = self._distribute(tuple(numbered(v) for v in args), {n: numbered(v) for n, v in kwargs.items()})
        self.group.ranks.stream(self.method, sent.per_rank, stream.push)
        stream.finish()


class WorkerGroup:
    """`group.method(...)` calls the method on every rank by its protocol and returns a Future (or a Stream).

    Arguments may be futures. Calls run in the order of the group's lane (shared by all groups of a pool); control
    calls run at once.
    """

    def __init__(self, name: str, worker_class: type, shape: Shape, ranks: Ranks, lane: Lane) -> None:
        self.name = name
        self.worker_class = worker_class
        self.shape = shape
        self.ranks = ranks
        self.lane = lane

    def bind(self, method: str, *args: Any, **kwargs: Any) -> BoundCall:
        """The call, checked as far as it can be, but not made."""
        spec = spec_of(self.worker_class, method, where=self.name)
        call = BoundCall(self, method, args, kwargs, spec)
        if not inputs(args, kwargs):
            call.check(args, kwargs)
        return call

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):
            raise AttributeError(method)
        spec_of(self.worker_class, method, where=self.name)
        return partial(self._submit, method)

    def _submit(self, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        call = self.bind(method, *args, **kwargs)
        future: Future[Any] = Stream(call.label) if call.spec.stream else Future(call.label)
        if call.spec.control:
            run_now(partial(call.run, future), self.lane)
        else:
            self.lane.submit(partial(call.run, future))
        return future

    def __repr__(self) -> str:
        return f"WorkerGroup({self.name}: {self.worker_class.__name__} on {self.shape.num_ranks} ranks)"


def admit(
    name: str,
    factory: Callable[..., Any],
    pool: Pool,
    shape: Shape,
    groups: Sequence[WorkerGroup],
    bundles_per_rank: int = 1,
) -> type[Worker]:
    """Take a new group into a pool, or say why not. Returns the class whose methods it offers."""
    worker_class = worker_class_of(factory, name)
    if name in (group.name for group in groups):
        raise ConfigError(f"group {name!r} exists already in this run")
    pool.admit(name, shape.num_ranks, bundles_per_rank)
    return worker_class


def run_now(work: Callable[[], None], lane: Lane) -> None:
    """Beside the lane: in a thread of its own, or at once where the lane is the caller's thread."""
    if isinstance(lane, InlineLane):
        work()
    else:
        threading.Thread(target=work, daemon=True).start()


def joint(*calls: BoundCall) -> Future[tuple[Any, ...]]:
    """Calls on several groups that run at the same time (`joint(actor.bind("send", plan), rollout.bind("receive",
    plan))`), one entry in the lane of each. The result is the tuple of theirs; the first error is raised."""
    whole: Future[tuple[Any, ...]] = Future(" + ".join(call.label for call in calls))
    for call in calls:
        if call.spec.control or call.spec.stream:
            raise ConfigError(f"joint: {call.label} is a control or stream method; joint takes ordinary calls")
    parts: list[Future[Any]] = [Future(call.label) for call in calls]
    inner = [future for call in calls for future in inputs(call.args, call.kwargs)]
    lock, left, errors = threading.Lock(), [len(calls)], list[BaseException]()

    def side(call: BoundCall, part: Future[Any]) -> None:
        # A side whose partner's inputs failed would wait for it for ever: all inputs must be there before any starts.
        try:
            for future in inner:
                future.result()
            call.run(part, lambda: errors[0] if errors else None)
            part.result()
        except BaseException as error:  # noqa: BLE001  (it reaches whoever asks for the result)
            errors.append(error)
        with lock:
            left[0] -= 1
            last = left[0] == 0
        if last and errors:
            whole.fail(errors[0])
        elif last:
            whole.set(tuple(p.result() for p in parts))

    submit_joint([(call.group.lane, partial(side, call, part)) for call, part in zip(calls, parts, strict=True)])
    return whole
