import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_samples import GPT2, TokenLoss, ValueLoss, ragged_batch

from hybridflow.batch import Batch, Ragged
from hybridflow.controller.coordinates import Coordinates, Shape
from hybridflow.errors import CheckpointError, HybridFlowError, NonFiniteError
from hybridflow.loss import LossInputs
from hybridflow.metrics import Metric, merge, values
from workers.training.factory import build_engine
from workers.training.optimizer import learning_rate
from workers.training.settings import EngineSettings
from workers.training.torch_engine import TorchEngine

Folder = Callable[..., Path]
ALONE = Coordinates(0, Shape())


def engine(folder: Path, **changes: object) -> TorchEngine:
    settings = EngineSettings.model_validate({"name": "torch", "max_grad_norm": None, **changes})
    built = build_engine(folder, settings, ALONE, "causal_lm", True)
    assert isinstance(built, TorchEngine)
    return built


def flat_gradient(built: TorchEngine, batch: Batch) -> torch.Tensor:
    built.accumulate([(batch, TokenLoss())])
    return built.flat_grad.clone()


def test_every_split_into_ranks_and_micro_batches_gives_one_gradient(model_folder: Folder) -> None:
    folder, batch = model_folder(GPT2), ragged_batch(12)
    whole = flat_gradient(engine(folder, dtype="float64", tokens_per_micro_batch=10_000), batch)
    for tokens in (1, 30, 60):
        for num_ranks in (1, 2, 5, 16):  # 16 ranks: some have no rows
            built = engine(folder, dtype="float64", tokens_per_micro_batch=tokens)
            shards = [batch.take(list(range(rank, 12, num_ranks))) for rank in range(num_ranks)]
            summed = torch.stack([flat_gradient(built, shard) for shard in shards]).sum(0)
            assert float((summed - whole).abs().max() / whole.abs().max()) < 1e-12, (tokens, num_ranks)


def test_gradient_equals_a_plain_loop_over_tokens(model_folder: Folder) -> None:
    from transformers import AutoModelForCausalLM

    folder, batch = model_folder(GPT2), ragged_batch(4)
    built = engine(folder, dtype="float64", tokens_per_micro_batch=20)
    built.accumulate([(batch, TokenLoss())])
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    total = torch.zeros((), dtype=torch.float64)
    rows = (batch.ragged(name).rows() for name in ("tokens", "response_mask", "advantages"))
    for row, (tokens, mask, advantages) in enumerate(zip(*rows, strict=True)):
        logits = plain(input_ids=tokens[None]).logits[0] / 0.8
        for t in range(1, len(tokens)):
            if mask[t]:
                logs = torch.log_softmax(logits[t - 1], -1)
                loss = -logs[tokens[t]] * advantages[t] + 0.1 * (logs.exp() * logs).sum()
                total = total + batch.tensor("loss_weight")[row] * loss
    total.backward()
    expected = dict(plain.named_parameters())
    for name, gradient in built.gradients().items():
        torch.testing.assert_close(gradient, expected[name.removeprefix("hf.")].grad, rtol=1e-9, atol=1e-12)


def test_junk_at_masked_slots_changes_nothing(model_folder: Folder) -> None:
    batch = ragged_batch(8)
    advantages, mask = batch.ragged("advantages"), batch.ragged("response_mask").flat
    clean = flat_gradient(engine(model_folder()), batch)
    for junk in (float("nan"), float("inf"), 1e30):
        spoilt = Ragged(advantages.flat.masked_fill(~mask, junk), advantages.lengths)
        assert torch.equal(flat_gradient(engine(model_folder()), batch.union({"advantages": spoilt})), clean)


def test_activation_checkpointing_gives_the_same_gradient(model_folder: Folder) -> None:
    batch = ragged_batch(8)
    plain = flat_gradient(engine(model_folder()), batch)
    recomputing = engine(model_folder(), activation_checkpointing=True)
    calls: list[int] = []
    recomputing.scorer.hf.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    again = flat_gradient(recomputing, batch)
    assert len(calls) == 2  # forward, and once more in the backward pass
    torch.testing.assert_close(again, plain, rtol=0, atol=1e-7)


def test_compiled_layers_give_the_same_gradient(model_folder: Folder) -> None:
    batch, folder = ragged_batch(8), model_folder(num_hidden_layers=1)
    plain = flat_gradient(engine(folder, tokens_per_micro_batch=60), batch)
    compiled = flat_gradient(engine(folder, tokens_per_micro_batch=60, compile=True), batch)
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", ["advantages", "loss_weight"])
def test_a_step_that_is_not_finite_is_refused_and_the_next_one_is_as_if_it_never_was(
    model_folder: Folder, bad: str
) -> None:
    batch = ragged_batch(6)
    column = batch[bad]
    flat = column.flat if isinstance(column, Ragged) else column
    assert isinstance(flat, torch.Tensor)
    poison = flat.clone().fill_(float("inf"))
    spoilt = batch.union({bad: Ragged(poison, column.lengths) if isinstance(column, Ragged) else poison})
    tried, untouched = engine(model_folder()), engine(model_folder())
    tried.train([(batch, TokenLoss())])
    untouched.train([(batch, TokenLoss())])
    with pytest.raises(NonFiniteError, match="optimizer step 1"):
        tried.train([(spoilt, TokenLoss())])
    for built in (tried, untouched):
        built.train([(batch, TokenLoss())])
    assert all(torch.equal(tensor, untouched.state_dict()[name]) for name, tensor in tried.state_dict().items())


class InfiniteConstant(TokenLoss):
    """An infinite loss whose gradient is finite."""

    def __call__(self, inputs: LossInputs) -> tuple[torch.Tensor, dict[str, Metric]]:
        loss_BT, metrics = super().__call__(inputs)
        return loss_BT + torch.full_like(loss_BT, float("inf")), metrics


def test_an_infinite_loss_with_a_finite_gradient_is_refused(model_folder: Folder) -> None:
    with pytest.raises(NonFiniteError, match="not finite"):
        engine(model_folder()).train([(ragged_batch(4), InfiniteConstant())])


def test_metrics_are_loss_norm_rate_and_the_losses_own(model_folder: Folder) -> None:
    batch = ragged_batch(6)
    built = engine(model_folder(), tokens_per_micro_batch=20, max_grad_norm=0.1, optimizer={"lr": 0.25})
    found = values(built.train([(batch, TokenLoss())]))
    assert found.keys() == {"loss", "grad_norm", "lr", "entropy"}
    assert found["lr"] == 0.25
    assert found["grad_norm"] > 0.1  # before clipping
    assert found["entropy"] == pytest.approx(math.log(37), abs=0.1)
    halves = [engine(model_folder()).accumulate([(batch.slice(*piece), TokenLoss())]) for piece in ((0, 3), (3, 6))]
    assert sum(total for total, _ in halves) == pytest.approx(found["loss"], abs=1e-6)
    assert merge(found for _, parts in halves for found in parts)["entropy"].value == pytest.approx(found["entropy"])


def test_two_losses_share_one_step(model_folder: Folder) -> None:
    batch, built = ragged_batch(6), engine(model_folder())
    one, two = flat_gradient(built, batch.slice(0, 2)), flat_gradient(built, batch.slice(2, 6))
    built.accumulate([(batch.slice(0, 2), TokenLoss()), (batch.slice(2, 6), TokenLoss())])
    torch.testing.assert_close(built.flat_grad, one + two, rtol=0, atol=1e-7)


def test_learning_rate_follows_its_closed_form(model_folder: Folder) -> None:
    schedule = {"warmup_steps": 2, "total_steps": 6, "min_ratio": 0.1}
    expected = {
        "constant": [0.5, 1, 1, 1, 1, 1, 1, 1],
        "linear": [0.5, 1, 1, 0.775, 0.55, 0.325, 0.1, 0.1],
        "cosine": [0.5, 1, 1, 0.8681980515339464, 0.55, 0.2318019484660536, 0.1, 0.1],
    }
    for kind, factors in expected.items():
        built = engine(model_folder(), optimizer={"lr": 2e-3}, schedule={"kind": kind, **schedule})
        rates = [built.train([(ragged_batch(2), TokenLoss())])["lr"].value for _ in factors[:3]]
        rates += [learning_rate(built.settings, step) for step in range(3, 8)]
        assert rates == pytest.approx([2e-3 * factor for factor in factors], rel=1e-9), kind
        assert built.optimizer.param_groups[0]["lr"] == rates[2]


def test_a_decay_without_a_horizon_is_refused() -> None:
    with pytest.raises(ValueError, match="must be above warmup_steps=5; found total_steps=5"):
        EngineSettings.model_validate({"schedule": {"kind": "cosine", "warmup_steps": 5, "total_steps": 5}})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_is_exact(model_folder: Folder, tmp_path: Path, dtype: str) -> None:
    changes = {"dtype": dtype, "optimizer": {"lr": 1e-2}, "schedule": {"kind": "linear", "total_steps": 9}}
    through, batch = engine(model_folder(), **changes), ragged_batch(5)
    through.train([(batch, TokenLoss())])
    through.save(tmp_path)
    expected_draw = torch.rand(3)
    resumed = engine(model_folder(), **changes)
    resumed.load(tmp_path)
    assert torch.equal(torch.rand(3), expected_draw)
    for built in (through, resumed):
        last = built.train([(batch, TokenLoss())])
    assert last["lr"].value == pytest.approx(1e-2 * 8 / 9)
    assert all(torch.equal(tensor, through.state_dict()[name]) for name, tensor in resumed.state_dict().items())
    with pytest.raises(CheckpointError, match=r"no engine\.pt"):
        resumed.load(tmp_path / "nowhere")


def test_bfloat16_has_float32_masters_that_keep_tiny_updates(model_folder: Folder) -> None:
    built = engine(model_folder(), dtype="bfloat16", optimizer={"lr": 2e-4}, tokens_per_micro_batch=20)
    before = {name: tensor.clone() for name, tensor in built.state_dict().items()}
    name = "model.norm.weight"  # starts at 1, where bfloat16 cannot hold 1 + 2e-4
    assert before[name].dtype == torch.bfloat16
    assert built.flat_grad.dtype == torch.float32
    batch = ragged_batch(6)
    built.train([(batch, TokenLoss())])
    assert torch.equal(built.state_dict()[name], before[name])
    for _ in range(39):
        built.train([(batch, TokenLoss())])
    assert float((built.state_dict()[name].float() - 1).abs().max()) >= 2**-8


def test_bfloat16_gradients_are_summed_in_float32(model_folder: Folder) -> None:
    batch = ragged_batch(32)
    whole = flat_gradient(engine(model_folder(), dtype="float32"), batch)
    split = flat_gradient(engine(model_folder(), dtype="bfloat16", tokens_per_micro_batch=1), batch)
    assert float((split - whole).norm() / whole.norm()) < 0.02


def test_a_frozen_model_scores_like_the_trainable_one_and_holds_no_optimizer(model_folder: Folder) -> None:
    batch, settings = ragged_batch(5), EngineSettings(name="deepspeed")
    frozen = build_engine(model_folder(), settings, Coordinates(1, Shape(data=2)), "causal_lm", False)
    assert isinstance(frozen, TorchEngine)
    assert not hasattr(frozen, "optimizer")
    expected = engine(model_folder()).forward(batch, ("logprobs",), 1.0)["logprobs"]
    assert torch.equal(frozen.forward(batch, ("logprobs",), 1.0)["logprobs"].flat, expected.flat)


def test_what_cannot_work_is_refused(model_folder: Folder) -> None:
    with pytest.raises(HybridFlowError, match="engine=torch: found tensor=2; every rank of it holds whole weights"):
        build_engine(model_folder(), EngineSettings(name="torch"), Coordinates(0, Shape(tensor=2)), "causal_lm", True)
    with pytest.raises(HybridFlowError, match="Policy gives logprobs, entropies"):
        engine(model_folder()).train([(ragged_batch(2), ValueLoss())])
    with pytest.raises(ValueError, match="use zero_stage=1, 2 or 3"):
        EngineSettings(name="deepspeed", dtype="bfloat16", zero_stage=0)
