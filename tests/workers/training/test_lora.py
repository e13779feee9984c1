"""An adapter beside frozen weights, in the torch engine. DeepSpeed's ranks: `test_lora_ranks.py`."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from training_samples import GPT2, QWEN2, TokenLoss, ValueLoss, ragged_batch
from transformers import AutoModel, AutoModelForCausalLM

from hybridflow.batch import Batch
from hybridflow.controller.coordinates import Coordinates, Shape
from hybridflow.errors import CheckpointError, ConfigError, HybridFlowError
from hybridflow.loss import LossInputs, Output
from hybridflow.metrics import Metric
from workers.training.factory import build_engine
from workers.training.settings import EngineSettings, LoraSettings
from workers.training.torch_engine import TorchEngine

Folder = Callable[..., Path]
ALONE = Coordinates(0, Shape())
LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
TEMPERATURE = 0.8
RANK: dict[str, Any] = {"rank": 3}


@dataclass(frozen=True)
class ScoreLoss(ValueLoss):
    """Of a reward model's scores."""

    outputs: tuple[Output, ...] = ("scores",)

    def __call__(self, inputs: LossInputs) -> tuple[torch.Tensor, dict[str, Metric]]:
        return (inputs.outputs["scores"] - inputs.columns["returns"]) ** 2, {}


LOSSES = {"causal_lm": TokenLoss(), "critic": ValueLoss(), "reward_model": ScoreLoss()}


def engine(
    folder: Path, kind: str = "causal_lm", trainable: bool = True, lora: dict[str, Any] | None = RANK, **changes: object
) -> TorchEngine:
    adapter = None if lora is None else {**RANK, **lora}
    fields = {"name": "torch", "max_grad_norm": None, "optimizer": {"lr": 1e-2}, "lora": adapter}
    settings = EngineSettings.model_validate(fields | changes)
    return build_engine(folder, settings, ALONE, kind, trainable)  # type: ignore[arg-type, return-value]


def trained(folder: Path, kind: str = "causal_lm", steps: int = 3, **changes: Any) -> TorchEngine:
    built = engine(folder, kind, **changes)
    for _ in range(steps):
        built.train([(ragged_batch(6), LOSSES[kind])])
    return built


@pytest.fixture
def tiny(model_folder: Folder) -> Path:
    return model_folder(num_hidden_layers=1)


def logprobs(built: TorchEngine, batch: Batch, reference: bool = False) -> torch.Tensor:
    forward = built.reference_forward if reference else built.forward
    return forward(batch, ("logprobs",), TEMPERATURE)["logprobs"].flat


@torch.no_grad()
def plain_logprobs(model: Any, batch: Batch) -> torch.Tensor:
    """Row by row, by a Hugging Face model or peft's wrapper around one."""
    rows = []
    for tokens in batch.ragged("tokens").rows():
        logs = torch.log_softmax(model(input_ids=tokens[None]).logits[0].float() / TEMPERATURE, -1)
        rows.append(torch.cat([torch.zeros(1), logs[torch.arange(len(tokens) - 1), tokens[1:]]]))
    return torch.cat(rows)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).detach().abs().max())


@pytest.mark.parametrize("config", [QWEN2, GPT2], ids=["linear", "transposed linear"])
def test_merged_weights_score_like_the_model_with_its_adapter(model_folder: Folder, config: dict) -> None:
    folder, batch = model_folder(config, **{("n_layer" if config is GPT2 else "num_hidden_layers"): 1}), ragged_batch(7)
    built = trained(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    untrained = plain_logprobs(plain, batch)
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    merged = built.state_dict()
    assert {n: t.shape for n, t in merged.items()} == {n: t.shape for n, t in before.items()}
    changed = {name.split(".")[-2] for name in merged if not torch.equal(merged[name], before[name])}
    assert changed == ({"c_attn", "c_proj", "c_fc"} if config is GPT2 else LINEAR)
    again = built.state_dict()  # the first call wrote to nothing
    assert all(torch.equal(again[name], merged[name]) for name in merged)
    plain.load_state_dict(merged)
    assert difference(plain_logprobs(plain, batch), logprobs(built, batch)) < 1e-5
    assert difference(logprobs(built, batch), untrained) > 1e-2


def test_the_reference_is_the_base_model_before_and_after_training(tiny: Path) -> None:
    batch = ragged_batch(7)
    base = engine(tiny, trainable=False)
    assert base.scorer.adapter is None  # a frozen model has no use for an untrained adapter
    built = engine(tiny)
    assert torch.equal(logprobs(built, batch), logprobs(base, batch))
    assert torch.equal(logprobs(built, batch, reference=True), logprobs(base, batch))
    for _ in range(3):
        built.train([(batch, TokenLoss())])
    assert torch.equal(logprobs(built, batch, reference=True), logprobs(base, batch))
    assert difference(logprobs(built, batch), logprobs(base, batch)) > 1e-2  # and the adapter is on again
    with pytest.raises(HybridFlowError, match="trains all its weights"):
        logprobs(engine(tiny, lora=None), batch, reference=True)


@pytest.mark.parametrize("kind", ["causal_lm", "critic", "reward_model"])
def test_adapter_and_head_alone_train(tiny: Path, kind: str) -> None:
    built = engine(tiny, kind)
    own = {id(p) for group in built.optimizer.param_groups for p in group["params"]}
    names = {name for name, p in built.scorer.named_parameters() if id(p) in own}
    assert len(own) == len(names) == 2 * len(LINEAR) + (0 if kind == "causal_lm" else 2)
    assert all(".lora_A.default." in name or ".lora_B.default." in name or "value_head." in name for name in names)
    before = {name: p.detach().clone() for name, p in built.scorer.named_parameters()}
    if kind != "causal_lm":  # a head of zeros lets no gradient through
        torch.nn.init.normal_(built.scorer.value_head.weight, generator=torch.Generator().manual_seed(0))
    built.accumulate([(ragged_batch(6), LOSSES[kind])])
    assert built.gradients().keys() == names
    for _ in range(2):
        built.train([(ragged_batch(6), LOSSES[kind])])
    changed = {name for name, p in built.scorer.named_parameters() if not torch.equal(p, before[name])}
    assert changed == names


def test_the_gradient_is_that_of_peft_in_a_plain_loop(tiny: Path) -> None:
    batch = ragged_batch(4)
    built = engine(tiny, dtype="float64", tokens_per_micro_batch=20)
    built.train([(batch, TokenLoss())])  # with B = 0, A has no gradient
    built.accumulate([(batch, TokenLoss())])
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    peft_model = get_peft_model(plain, LoraConfig(r=3, lora_alpha=32, target_modules=sorted(LINEAR))).double().eval()
    own = {f"base_model.model.{n.removeprefix('hf.')}": p for n, p in built.scorer.named_parameters() if "lora_" in n}
    expected = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    assert own.keys() == expected.keys()
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(own[name])
    total = torch.zeros((), dtype=torch.float64)
    columns = (batch.ragged(name).rows() for name in ("tokens", "response_mask", "advantages"))
    for row, (tokens, mask, advantages) in enumerate(zip(*columns, strict=True)):
        logits = peft_model(input_ids=tokens[None]).logits[0] / TEMPERATURE
        for t in range(1, len(tokens)):
            if mask[t]:
                logs = torch.log_softmax(logits[t - 1], -1)
                loss = -logs[tokens[t]] * advantages[t] + 0.1 * (logs.exp() * logs).sum()
                total = total + batch.tensor("loss_weight")[row] * loss
    total.backward()
    for name, gradient in built.gradients().items():
        found = expected[f"base_model.model.{name.removeprefix('hf.')}"].grad
        assert float(gradient.abs().max()) > 0
        torch.testing.assert_close(gradient, found, rtol=1e-9, atol=1e-12)


def test_every_split_into_ranks_and_micro_batches_gives_one_gradient(tiny: Path) -> None:
    batch, built = ragged_batch(12), engine(tiny, dtype="float64")
    built.train([(batch, TokenLoss())])

    def gradient(shard: Batch, tokens: int) -> torch.Tensor:
        built.settings = built.settings.model_copy(update={"tokens_per_micro_batch": tokens})
        built.accumulate([(shard, TokenLoss())])
        return built.flat_grad.clone()

    whole = gradient(batch, 10_000)
    for tokens in (1, 30):
        for ranks in (1, 2, 5):
            parts = [gradient(batch.take(list(range(rank, 12, ranks))), tokens) for rank in range(ranks)]
            assert float((torch.stack(parts).sum(0) - whole).abs().max() / whole.abs().max()) < 1e-9


@pytest.mark.parametrize("change", [{"activation_checkpointing": True}, {"logprob_chunk_tokens": 3}], ids=str)
def test_options_do_not_change_what_is_learnt(tiny: Path, change: dict) -> None:
    plain, other = trained(tiny).state_dict(), trained(tiny, **change).state_dict()
    assert max(difference(other[name], plain[name]) for name in plain) < 1e-6


@pytest.mark.parametrize(("dtype", "dropout"), [("float32", 0.0), ("bfloat16", 0.0), ("float32", 0.5)])
def test_resume_is_exact_from_a_checkpoint_without_the_frozen_weights(
    tiny: Path, tmp_path: Path, dtype: str, dropout: float
) -> None:
    changes: dict[str, Any] = {"dtype": dtype, "lora": {"dropout": dropout}}
    through = trained(tiny, "critic", **changes)
    through.save(tmp_path)
    saved = torch.load(tmp_path / "engine.pt")["weights"]
    assert all(".lora_" in name or name.startswith("value_head.") for name in saved)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}  # masters, whatever the model's dtype
    resumed = engine(tiny, "critic", **changes)
    resumed.load(tmp_path)
    for built in (through, resumed):
        built.train([(ragged_batch(6), ValueLoss())])
    expected = through.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in resumed.state_dict().items())
    with pytest.raises(CheckpointError, match="parameters differ"):
        engine(tiny, "critic", lora={"target_modules": ["q_proj"]}).load(tmp_path)


def test_bfloat16_weights_have_float32_masters_of_the_adapter(tiny: Path) -> None:
    built = engine(tiny, dtype="bfloat16", optimizer={"lr": 1e-5})
    [layer] = [layer for name, layer in built.scorer.adapter.layers.items() if name.endswith("q_proj")]
    assert {p.dtype for p in built.scorer.hf.parameters()} == {torch.bfloat16}
    assert {master.dtype for master in built.masters.values()} == {built.flat_grad.dtype} == {torch.float32}
    start = layer.lora_A["default"].weight.detach().clone()
    for _ in range(40):  # each step is lost in bfloat16 where A is above 0.005; forty are not
        built.train([(ragged_batch(6), TokenLoss())])
    large = start.abs() > 0.05
    assert difference(layer.lora_A["default"].weight[large], start[large]) > 0


@pytest.mark.parametrize("config", [QWEN2, GPT2], ids=["linear", "transposed linear"])
def test_export_is_a_merged_model_and_an_adapter_that_peft_loads(
    model_folder: Folder, tmp_path: Path, config: dict
) -> None:
    folder, batch = model_folder(config, **{("n_layer" if config is GPT2 else "num_hidden_layers"): 1}), ragged_batch(7)
    built = trained(folder)
    built.export(tmp_path)
    expected = logprobs(built, batch)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert difference(plain_logprobs(merged, batch), expected) < 1e-5
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert difference(plain_logprobs(adapted, batch), expected) < 1e-5
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_a_critic_exports_its_head_with_model_and_adapter(tiny: Path, tmp_path: Path) -> None:
    built, batch = trained(tiny, "critic"), ragged_batch(7)
    built.export(tmp_path)
    expected = built.forward(batch, ("values",), 1.0)["values"].flat
    assert float(expected.abs().max()) > 1e-3
    for folder, lora in ((tmp_path, None), (tiny, {"init_from": str(tmp_path / "adapter")})):
        again = engine(folder, "critic", trainable=False, lora=lora)
        assert difference(again.forward(batch, ("values",), 1.0)["values"].flat, expected) < 1e-5
    adapted = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny), str(tmp_path / "adapter")).eval()
    tokens = batch.ragged("tokens").rows()[0][None]
    with torch.no_grad():
        hidden = adapted(input_ids=tokens).last_hidden_state
        assert difference(hidden, built.scorer.backbone(input_ids=tokens).last_hidden_state) < 1e-5


def test_training_goes_on_from_an_adapter_whose_policy_is_the_reference(tiny: Path, tmp_path: Path) -> None:
    first, batch = trained(tiny), ragged_batch(7)
    first.export(tmp_path)
    began_as = logprobs(first, batch)
    second = engine(tiny, lora={"init_from": str(tmp_path / "adapter")})
    for found in (logprobs(second, batch), logprobs(second, batch, reference=True)):
        assert torch.equal(found, began_as)
    names = set(second.masters)
    assert names == set(first.masters)
    for built in (first, second):  # the frozen copy takes no part in training
        built.optimizer = torch.optim.SGD(built.masters.values(), lr=0.1)
        built.train([(batch, TokenLoss())])
    assert torch.equal(logprobs(second, batch), logprobs(first, batch))
    assert torch.equal(logprobs(second, batch, reference=True), began_as)
    assert second.state_dict().keys() == first.state_dict().keys()
    second.export(tmp_path / "second")
    assert (
        load_file(tmp_path / "second/adapter/adapter_model.safetensors").keys()
        == load_file(tmp_path / "adapter/adapter_model.safetensors").keys()
    )


def test_dropout_acts_in_training_alone_and_is_a_function_of_the_step(tiny: Path, tmp_path: Path) -> None:
    batch = ragged_batch(6)
    dropping, plain = trained(tiny, lora={"dropout": 0.5}), trained(tiny)
    assert difference(logprobs(dropping, batch), logprobs(plain, batch)) > 1e-3
    assert torch.equal(logprobs(dropping, batch), logprobs(dropping, batch))
    torch.rand(7)
    again = trained(tiny, lora={"dropout": 0.5})
    assert torch.equal(logprobs(again, batch), logprobs(dropping, batch))
    dropping.export(tmp_path)
    untrained = engine(tiny, lora={"dropout": 0.5, "init_from": str(tmp_path / "adapter")})
    assert torch.equal(logprobs(untrained, batch), logprobs(dropping, batch))
    total, _ = dropping.accumulate([(batch, TokenLoss())])
    dropping.steps += 1
    other, _ = dropping.accumulate([(batch, TokenLoss())])
    assert math.isfinite(total) and total != other


def test_modules_that_are_not_there_are_refused_with_those_that_are(tiny: Path) -> None:
    with pytest.raises(ConfigError, match=r"found 'q_prj'.*down_proj, gate_proj, .*did you mean 'q_proj'"):
        engine(tiny, lora={"target_modules": ["v_proj", "q_prj"]})
    for head in ("lm_head", "embed_tokens", "norm"):
        with pytest.raises(ConfigError, match=f"found '{head}', which no linear layer of Qwen2ForCausalLM is called"):
            engine(tiny, lora={"target_modules": [head]})
    one = engine(tiny, lora={"target_modules": ["layers.0.self_attn.q_proj", "up_proj"]})
    assert {name.rpartition(".")[2] for name in one.scorer.adapter.layers} == {"q_proj", "up_proj"}


@pytest.mark.parametrize(
    "bad",
    [
        {"rank": 0},
        {"rank": 4, "alpha": 0},
        {"rank": 4, "target_modules": []},
        {"rank": 4, "target_modules": "q_proj"},
        {},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError):
        LoraSettings.model_validate(bad)


def test_an_adapter_that_does_not_fit_is_refused(tiny: Path, tmp_path: Path) -> None:
    trained(tiny, steps=1).export(tmp_path)
    adapter = str(tmp_path / "adapter")
    wrong = LoraSettings(rank=4, alpha=8, init_from=adapter).problems()
    assert [line.partition(":")[0] for line in wrong] == ["rank", "alpha"] and "has 3: set that" in wrong[0]
    assert EngineSettings(lora=LoraSettings(rank=3, init_from=adapter)).problems() == []
    [missing] = EngineSettings(lora=LoraSettings(rank=3, init_from=str(tmp_path))).problems()
    assert missing.startswith("lora.init_from: found") and "no adapter_config.json there" in missing
    for kind, modules in (("causal_lm", ["q_proj"]), ("critic", "all-linear")):
        with pytest.raises(ConfigError, match=r"lora.init_from: the adapter in .* is on \['down_proj', "):
            engine(tiny, kind, lora={"init_from": adapter, "target_modules": modules})
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": True}))
    with pytest.raises(ConfigError, match="use_dora=True; allowed: plain LoRA"):
        engine(tiny, lora={"init_from": adapter})


def test_the_adapter_is_beside_the_frozen_weights_in_the_layout_and_nothing_is_copied(tiny: Path) -> None:
    built = trained(tiny)
    plain = set(AutoModelForCausalLM.from_pretrained(tiny).state_dict())
    layout, storages = built.layout(), built.storages()
    names = {parameter.name for parameter in layout.parameters}
    assert names - plain == {
        name.removeprefix("base_model.model.") for name in built.scorer.adapter_weights()
    } and plain <= names  # fmt: skip
    assert built.fixed() == plain
    held = {tensor.untyped_storage().data_ptr() for tensor in built.scorer.state_dict(keep_vars=True).values()}
    held |= {tensor.untyped_storage().data_ptr() for tensor in built.scorer.parameters()}
    assert {tensor.untyped_storage().data_ptr() for tensor in storages.values()} <= held
    assert engine(tiny, lora=None).fixed() == frozenset()
    frozen = engine(tiny, lora=None)
    frozen.scorer.hf.get_input_embeddings().requires_grad_(False)  # tied: both names stand still
    assert frozen.fixed() == {"model.embed_tokens.weight", "lm_head.weight"}
