"""What every generation engine must do: the same tests for vLLM and for Hugging Face generate."""

from dataclasses import replace

import pytest
import torch

from hybridflow.errors import HybridFlowError, WeightSyncError
from tests.workers.generation.trainer import deliver
from workers.generation.base import Request, Sample, Sampling

PROMPTS = [[7, 8, 9], [10, 11, 12, 13, 14, 15], [20], [30, 31, 7, 8], [40, 41]]
PROBE = list(range(10, 40))
FREE = Sampling(max_response_tokens=12)


def requests(num_groups: int = 5, samples: int = 3, seed: int = 100) -> list[Request]:
    return [
        Request(g * samples + s, g, PROMPTS[g % len(PROMPTS)], seed + g * samples + s)
        for g in range(num_groups)
        for s in range(samples)
    ]


def draw(engine, wanted, sampling=FREE) -> dict[int, Sample]:
    return {sample.index: sample for group in engine.generate(wanted, sampling) for sample in group}


def open_ended(engine, count: int) -> list[tuple[Request, Sample]]:
    """Requests that end at the limit, not at one of the model's own end ids, and what they give."""
    wanted = [Request(i, i, PROMPTS[1], 500 + i) for i in range(16)]
    drawn = draw(engine, wanted, Sampling(max_response_tokens=8))
    found = [(r, drawn[r.index]) for r in wanted if drawn[r.index].truncated]
    assert len(found) >= count
    return found[:count]


@pytest.fixture(autouse=True)
def original_weights(engine, tied):
    yield
    deliver(engine, tied.model, 0, PROBE)


def test_groups_come_whole_and_in_request_order(engine):
    wanted = requests()
    groups = list(engine.generate(wanted, FREE))
    assert sorted(sample.index for group in groups for sample in group) == list(range(15))
    assert all([s.index for s in g] == list(range(g[0].index, g[0].index + 3)) for g in groups)


def test_a_seed_gives_the_same_sample_in_any_order_and_company(engine):
    wanted = requests()
    together, backwards = draw(engine, wanted), draw(engine, wanted[::-1])
    alone = draw(engine, [wanted[4]])
    assert {i: s.tokens for i, s in together.items()} == {i: s.tokens for i, s in backwards.items()}
    assert alone[4].tokens == together[4].tokens
    assert alone[4].logprobs == pytest.approx(together[4].logprobs, abs=1e-5)


def test_samples_of_one_prompt_differ(engine):
    drawn = draw(engine, requests(num_groups=1, samples=8))
    assert len({tuple(sample.tokens) for sample in drawn.values()}) == 8


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_distribution_sampled_from(engine, tied, temperature):
    wanted = requests()
    drawn = draw(engine, wanted, Sampling(max_response_tokens=12, temperature=temperature))
    for request in wanted:
        sample = drawn[request.index]
        expected_TV = tied.logprobs(request.prompt, sample.tokens, temperature)
        expected_T = expected_TV[torch.arange(len(sample.tokens)), sample.tokens]
        assert (torch.tensor(sample.logprobs, dtype=torch.float64) - expected_T).abs().max() < 1e-5


def test_top_k_and_top_p_renormalise_what_they_keep(engine, tied):
    wanted = requests()
    drawn = draw(engine, wanted, Sampling(max_response_tokens=6, temperature=0.8, top_k=20, top_p=0.7))
    for request in wanted:
        sample = drawn[request.index]
        for row_V, token, logprob in zip(
            tied.logprobs(request.prompt, sample.tokens, 0.8), sample.tokens, sample.logprobs, strict=True
        ):
            kept = row_V.topk(20)
            share = kept.values.softmax(0)
            inside = share.cumsum(0) - share < 0.7  # the smallest set that reaches 0.7
            nucleus = dict(zip(kept.indices[inside].tolist(), kept.values[inside].log_softmax(0).tolist(), strict=True))
            assert logprob == pytest.approx(nucleus[token], abs=1e-4)


def test_temperature_zero_takes_the_likeliest_token(engine, tied):
    drawn = draw(engine, requests(samples=1), Sampling(max_response_tokens=5, temperature=0.0))
    for request in requests(samples=1):
        tokens = drawn[request.index].tokens
        assert tokens == tied.logprobs(request.prompt, tokens).argmax(-1).tolist()


def test_a_greedy_request_takes_the_likeliest_token_beside_others(engine, tied):
    """Its log-probs are those at temperature 1, of the whole distribution; its neighbours draw what they draw alone."""
    sampling = Sampling(max_response_tokens=6, temperature=0.7, top_k=3)
    wanted = requests()
    mixed = [replace(request, greedy=request.index % 3 == 1) for request in wanted]
    drawn, plain = draw(engine, mixed, sampling), draw(engine, wanted, sampling)
    differing = 0
    for request in mixed:
        sample = drawn[request.index]
        if not request.greedy:
            assert sample.tokens == plain[request.index].tokens
            assert sample.logprobs == pytest.approx(plain[request.index].logprobs, abs=1e-5)
            continue
        exact_TV = tied.logprobs(request.prompt, sample.tokens)
        assert sample.tokens == exact_TV.argmax(-1).tolist()
        exact_T = exact_TV[torch.arange(len(sample.tokens)), sample.tokens]
        assert sample.logprobs == pytest.approx(exact_T.tolist(), abs=1e-5)
        differing += sample.tokens != plain[request.index].tokens
    assert differing > 0
    alone = draw(engine, [replace(wanted[4], greedy=True)], sampling)
    assert alone[4].tokens == drawn[4].tokens


def test_frequencies_are_those_of_the_model(engine, tied):
    """1,600 first tokens against the exact distribution: chi-square over the ten likeliest and the rest."""
    wanted = [Request(i, i, PROMPTS[2], 9000 + i) for i in range(1600)]
    sampling = Sampling(max_response_tokens=1, temperature=0.5)
    first = torch.tensor([s.tokens[0] for s in draw(engine, wanted, sampling).values()])
    probabilities_V = tied.logprobs(PROMPTS[2], [0], 0.5)[0].exp()
    top = probabilities_V.topk(10)
    expected = torch.cat([top.values, 1 - top.values.sum(0, keepdim=True)]) * len(first)
    counts = torch.tensor([int((first == token).sum()) for token in top.indices])
    observed = torch.cat([counts, (len(first) - counts.sum())[None]])
    assert ((observed - expected) ** 2 / expected).sum() < 29.6  # 99.9 % quantile at 10 degrees of freedom


def test_a_response_ends_with_its_stop_id(engine):
    for request, free in open_ended(engine, 3):
        unused = next(token for token in range(50, 82) if token not in free.tokens)
        cases = [(unused,), (free.tokens[0],), (free.tokens[-1],), (unused, free.tokens[3])]
        for stops in cases:
            length = next((t + 1 for t, token in enumerate(free.tokens) if token in stops), len(free.tokens))
            (sample,) = draw(engine, [request], Sampling(max_response_tokens=8, stop_ids=stops)).values()
            assert sample.tokens == free.tokens[:length]
            assert len(sample.logprobs) == len(sample.versions) == length
            assert sample.truncated == (free.tokens[length - 1] not in stops)


def test_the_model_own_end_ids_end_a_response_too(engine):
    drawn = draw(engine, [Request(i, i, PROMPTS[0], i) for i in range(96)], Sampling(max_response_tokens=40))
    ended = [sample for sample in drawn.values() if not sample.truncated]
    assert {sample.tokens[-1] for sample in ended} == {1, 5}
    assert all(not {1, 5} & set(sample.tokens[:-1]) for sample in drawn.values())


def test_new_weights_are_used_and_proven(engine, tied):
    other = tied.perturbed(seed=1)
    wanted = requests()
    before = draw(engine, wanted)
    got = deliver(engine, other.model, 7, PROBE)
    expected_TV = other.logprobs(PROBE[:1], PROBE[1:])
    expected_T = expected_TV[torch.arange(len(PROBE) - 1), PROBE[1:]].tolist()
    got.prove(expected_T)
    assert got.differences() == ()
    after = draw(engine, wanted)
    assert all(set(sample.versions) == {7} for sample in after.values())
    assert any(after[i].tokens != before[i].tokens for i in after)
    sample = after[0]
    exact_T = other.logprobs(PROMPTS[0], sample.tokens)[torch.arange(len(sample.tokens)), sample.tokens]
    assert sample.logprobs == pytest.approx(exact_T.tolist(), abs=1e-5)


def test_old_probe_logprobs_do_not_pass_for_new_weights(engine, tied):
    other = tied.perturbed(seed=2)
    got = deliver(engine, other.model, 1, PROBE)
    stale_T = tied.logprobs(PROBE[:1], PROBE[1:])[torch.arange(len(PROBE) - 1), PROBE[1:]].tolist()
    with pytest.raises(WeightSyncError, match="probe token"):
        got.prove(stale_T)


def test_requests_that_do_not_fit_are_refused(engine):
    with pytest.raises(HybridFlowError, match=r"request 4 has 250 prompt tokens.*exceeds the engine's 256"):
        list(engine.generate([Request(4, 0, [7] * 250, 0)], Sampling(max_response_tokens=7)))
    with pytest.raises(HybridFlowError, match="request 2 has an empty prompt"):
        list(engine.generate([Request(2, 0, [], 0)], FREE))


def test_abort_ends_what_is_left(engine):
    """More groups than one batch of the Hugging Face engine: when the first group is there, others are not finished."""
    wanted = [Request(i, i, PROMPTS[i % 5], 70 + i) for i in range(96)]
    stream = engine.generate(wanted, Sampling(max_response_tokens=60))
    samples = list(next(stream))
    engine.abort()
    samples += [sample for group in stream for sample in group]
    whole = draw(engine, wanted, Sampling(max_response_tokens=60))
    assert sorted(sample.index for sample in samples) == list(range(96))
    cut = [s for s in samples if len(s.tokens) < len(whole[s.index].tokens)]
    assert cut
    assert all(sample.truncated for sample in cut)
    for sample in samples:
        length = len(sample.tokens)
        assert sample.tokens == whole[sample.index].tokens[:length]
        assert len(sample.logprobs) == len(sample.versions) == length
