"""The actor: the policy under training, and the source of the engines' weights."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hybridflow.batch import Batch, Ragged
from hybridflow.batch_ref import BatchRef
from hybridflow.controller.dispatch import dispatch
from hybridflow.resharding.cuda_ipc import gpu_of
from hybridflow.resharding.incoming import Checksums, Outgoing, expected_checksums
from hybridflow.resharding.transport import Offer, RankLayout, Transport
from workers.model_worker import LanguageModelWorker


class ActorWorker(LanguageModelWorker):
    _outgoing: Outgoing
    _transport: Transport
    _offered: Mapping[str, Tensor]

    @dispatch("3D_PROTO", needs=("tokens",))
    def reference_logprobs(self, batch: BatchRef, temperature: float, column: str) -> Batch:
        """`logprobs` of the policy before training, where the actor trains an adapter beside its weights."""
        rows = self.fetch(batch, ("tokens",))
        return Batch({column: self.engine.reference_forward(rows, ("logprobs",), temperature)["logprobs"]})

    @dispatch("ONE_TO_ALL")
    def layout(self) -> RankLayout:
        """What this rank holds of the policy, and where."""
        device = next(iter(self.engine.storages().values())).device
        gpus = (gpu_of(device),) if device.type == "cuda" else ()
        return RankLayout.here(self.engine.layout(), device.type, gpus, fixed=self.engine.fixed())

    @dispatch("ALL_TO_ALL")
    def take_route(self, outgoing: Outgoing, transport: Transport) -> None:
        """What leaves this rank at every sync from now on, and how."""
        self._outgoing, self._transport = outgoing, transport
        transport.prepare(outgoing, self.engine.storages())

    @dispatch("ONE_TO_ALL")
    def offer(self) -> Offer:
        """Make what leaves this rank readable for the engines."""
        self._offered = self.engine.storages()
        return self._transport.offer(self._outgoing, self._offered, self.context.store)

    @dispatch("ONE_TO_ALL")
    def prove(self, probe: list[int]) -> tuple[Checksums, list[float]]:
        """What an engine must answer: the checksums of what `offer` made readable, and the log-probs of `probe[1:]`,
        for which every rank runs the model."""
        probe_row = Batch({"tokens": Ragged.from_rows([probe], dtype=torch.int64)})
        logprobs = self.engine.forward(probe_row, ("logprobs",), 1.0)["logprobs"].flat[1:].tolist()
        return expected_checksums(self._outgoing, self._offered), logprobs
