import threading

import pytest
import torch

from tests.workers.generation.trainer import deliver
from workers.generation.base import Request, Sampling
from workers.generation.gate import Gate
from workers.generation.seeded_draw import SeededDraw, uniforms


def test_left_padding_does_not_change_a_model_with_learned_positions(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    from workers.generation.hf_engine import HfEngine
    from workers.generation.settings import RolloutSettings

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    model.save_pretrained(tmp_path)
    engine = HfEngine(tmp_path, RolloutSettings(engine="hf"))
    wanted = [Request(0, 0, [5], 1), Request(1, 1, list(range(10, 40)), 2)]
    drawn = {s.index: s for group in engine.generate(wanted, Sampling(max_response_tokens=8)) for s in group}
    for request in wanted:
        tokens = drawn[request.index].tokens
        with torch.no_grad():
            logits_TV = model(torch.tensor([[*request.prompt, *tokens]])).logits[0, len(request.prompt) - 1 : -1]
        exact_T = logits_TV.log_softmax(-1)[torch.arange(8), tokens]
        assert drawn[request.index].logprobs == pytest.approx(exact_T.tolist(), abs=1e-5)


def test_abort_between_two_steps_keeps_the_tokens_drawn_so_far(hf_engine, monkeypatch):
    wanted = [Request(i, i, [7, 8, 9], 60 + i) for i in range(6)]
    sampling = Sampling(max_response_tokens=20)
    whole = {s.index: s for group in hf_engine.generate(wanted, sampling) for s in group}
    leave, steps = Gate.leave, []

    def abort_after_five(gate: Gate) -> None:
        steps.append(None)
        leave(gate)
        if len(steps) == 5:
            gate.abort()

    monkeypatch.setattr(Gate, "leave", abort_after_five)
    for group in hf_engine.generate(wanted, sampling):
        for sample in group:
            expected = whole[sample.index]
            assert sample.tokens == expected.tokens[:5]
            assert sample.truncated == (expected.truncated or len(expected.tokens) > 5)


def test_weights_that_come_between_two_steps_are_stamped_on_later_tokens(hf_engine, tied, monkeypatch):
    leave, steps = Gate.leave, []

    def receive_after_three(gate: Gate) -> None:
        leave(gate)
        steps.append(None)
        if len(steps) == 3:
            sender = threading.Thread(target=deliver, args=(hf_engine, tied.model, 4, [1, 2]))
            sender.start()
            sender.join(timeout=30)

    monkeypatch.setattr(Gate, "leave", receive_after_three)
    (group,) = hf_engine.generate([Request(0, 0, [7, 8, 9], 61)], Sampling(max_response_tokens=6))
    length = len(group[0].tokens)
    assert group[0].versions == [0, 0, 0, 4, 4, 4][:length]
    assert length > 3
    deliver(hf_engine, tied.model, 0, [1, 2])


def test_a_float32_head_under_a_bfloat16_model(tied):
    """The bfloat16 head multiplies in float32, of the weights that came last."""
    from workers.generation.hf_engine import HfEngine
    from workers.generation.settings import RolloutSettings

    engine = HfEngine(tied.folder, RolloutSettings(engine="hf", dtype="bfloat16", float32_head=True))
    other = tied.perturbed(seed=4)
    weights = {name: tensor.bfloat16() for name, tensor in other.weights().items()}
    assert deliver(engine, other.model, 1, [1, 2]).differences() == ()
    hidden = torch.randn(5, 128).bfloat16()
    with torch.no_grad():
        found = engine._model.lm_head(hidden)
    assert found.dtype == torch.float32
    exact = hidden.float() @ weights["lm_head.weight"].float().T
    assert float((found - exact).abs().max()) < 1e-5 < float((found - found.bfloat16()).abs().max())
    (group,) = engine.generate([Request(0, 0, [7, 8, 9], 5)], Sampling(max_response_tokens=8))
    assert group[0].tokens and all(logprob < 0 for logprob in group[0].logprobs)


def test_uniforms_are_uniform_and_independent_of_each_other():
    drawn_BT = uniforms(range(2000), 50)
    assert drawn_BT.min() >= 0
    assert drawn_BT.max() < 1
    counts = torch.histc(drawn_BT, bins=20, min=0, max=1)
    assert ((counts - 5000) ** 2 / 5000).sum() < 43.8  # 99.9 % quantile at 19 degrees of freedom
    assert drawn_BT.unique().numel() == drawn_BT.numel()
    neighbours = torch.corrcoef(torch.stack([drawn_BT[:-1].flatten(), drawn_BT[1:].flatten()]))[0, 1]
    steps = torch.corrcoef(torch.stack([drawn_BT[:, :-1].flatten(), drawn_BT[:, 1:].flatten()]))[0, 1]
    assert max(abs(neighbours), abs(steps)) < 0.015


def test_a_token_of_probability_zero_is_never_drawn():
    scores = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).repeat(3, 1)
    edge_BT = torch.tensor([[0.0], [0.5], [1 - 2.0**-53]], dtype=torch.float64)
    draw = SeededDraw(edge_BT, version=lambda: 0)
    assert draw(torch.zeros(3, 1), scores).argmax(-1).tolist() == [1, 3, 3]
    assert draw.logprobs[0].tolist() == pytest.approx([-0.6931472] * 3)
