"""What distillation needs beside the divergences (`functional.distillation`): a loss over the whole vocabulary, and the
advantages of sampled tokens."""

from dataclasses import dataclass

from torch import Tensor

from algorithms.functional import distillation
from algorithms.losses import mean_over
from hybridflow.batch import Batch, Ragged
from hybridflow.columns import ColumnSpec, register
from hybridflow.loss import Atom, LossInputs, Output
from hybridflow.metrics import Metrics

TEACHER_LOGPROBS = "teacher_logprobs"
TEACHER_VOCABULARY = "teacher_vocab_logprobs"

for _row in (
    (TEACHER_LOGPROBS, "float32", "teacher.logprobs", "log-prob under the teacher"),
    (TEACHER_VOCABULARY, "float32", "teacher.vocab_logprobs", "a vector: the teacher's log-probs of every token"),
    (f"{TEACHER_VOCABULARY}_ids", "int32", "teacher.vocab_logprobs", "a vector: the tokens that the teacher lists"),
):
    register(ColumnSpec(_row[0], "token", *_row[1:]))


@dataclass(frozen=True)
class TeacherAdvantages:
    """Runs where the rows are: writes `advantages`. student: the column of log-probs under the policy that sampled."""

    student: str

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.student, TEACHER_LOGPROBS, "response_mask")

    def __call__(self, batch: Batch) -> Batch:
        padded = (batch.ragged(name).padded() for name in self.columns)
        values_BT = distillation.sampled_reverse_kl_advantages(*padded)
        return Batch({"advantages": Ragged.from_padded(values_BT, batch.ragged("response_mask").lengths)})


@dataclass(frozen=True)
class DivergenceLoss:
    """Generalised JSD of student and teacher. listed: the teacher names its likeliest tokens, in a column beside their
    log-probs, and all others count as one."""

    temperature: float
    beta: float
    listed: bool
    outputs: tuple[Output, ...] = ("vocab_logprobs",)
    atom: Atom = "row"

    @property
    def columns(self) -> tuple[str, ...]:
        return (TEACHER_VOCABULARY, f"{TEACHER_VOCABULARY}_ids") if self.listed else (TEACHER_VOCABULARY,)

    def __call__(self, inputs: LossInputs) -> tuple[Tensor, Metrics]:
        student_BTV = inputs.outputs["vocab_logprobs"]
        teacher_BTV = inputs.columns[TEACHER_VOCABULARY].to(student_BTV.dtype)
        if self.listed:
            student_BTV = distillation.listed_and_others(student_BTV, inputs.columns[f"{TEACHER_VOCABULARY}_ids"])
        else:
            student_BTV, teacher_BTV = distillation.over_common_tokens(student_BTV, teacher_BTV)
        loss_BT = distillation.generalised_jsd(student_BTV, teacher_BTV, inputs.mask_BT, self.beta)
        return loss_BT, {"distillation/divergence": mean_over(loss_BT, inputs.mask_BT)}
