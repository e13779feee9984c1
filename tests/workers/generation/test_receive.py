"""Weights by a plan into real engines: vLLM with one and two tensor ranks, a mixture of experts, and Hugging Face's."""

import multiprocessing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hybridflow.errors import WeightSyncError
from hybridflow.resharding.decoder import Decoder, EngineCuts, decoder_specs
from hybridflow.resharding.layout import Storage
from hybridflow.resharding.proofs import verify
from hybridflow.resharding.published import publish
from hybridflow.resharding.shards import build_layout, grid
from hybridflow.resharding.transport import Taken
from tests.workers.generation.conftest import VOCABULARY
from tests.workers.generation.trainer import Trainer, incoming, receive, slices
from workers.generation.base import Request, Sampling

PROBE = list(range(30, 60))
WANTED = [Request(0, 0, [7, 8, 9], 1), Request(1, 1, [40], 2)]
DENSE = {"hf": ("hf_engine", "tied"), "vllm": ("vllm_engine", "tied"), "vllm2": ("cut_engine", "untied")}
EVERY = {**DENSE, "llama": ("llama_engine", "llama"), "mixture2": ("mixture_engine", "mixture")}
NUM_UPDATES = 20


@pytest.fixture
def case(request):
    """An engine, a trainer with its model, and the plan between them; afterwards the engine's first weights again."""
    engine_name, model_name = EVERY[request.param]
    engine, tiny = request.getfixturevalue(engine_name), request.getfixturevalue(model_name)
    trainer = Trainer(tiny.model)
    plan = trainer.plan(engine)
    yield SimpleNamespace(name=request.param, engine=engine, trainer=trainer, plan=plan)
    first = Trainer(tiny.model)
    receive(engine, 0, incoming(first.plan(engine)), first.publications, PROBE)


def everywhere(function):
    return pytest.mark.parametrize("case", EVERY, indirect=True)(function)


def in_dense_engines(function):
    return pytest.mark.parametrize("case", DENSE, indirect=True)(function)


def send(case, version: int, **other):
    parts = other.get("incoming") or incoming(case.plan)
    return receive(case.engine, version, parts, other.get("publications", case.trainer.publications), PROBE)


def prove(case, receipt) -> None:
    expected, logprobs = case.trainer.expected(case.plan), case.trainer.logprobs(PROBE)
    verify(case.plan, expected, logprobs, [receipt], tolerance=1e-5)


@in_dense_engines
def test_a_live_engine_s_layout_is_the_one_from_numbers(case):
    model = Decoder(VOCABULARY, 128, 192, 2, 4, 2, 32, qkv_bias=True)
    tensor = 2 if case.name == "vllm2" else 1
    cuts = EngineCuts(vocabulary_multiple=0 if case.name == "hf" else 64)
    assert slices(case.engine.layout()) == slices(build_layout(decoder_specs(model, cuts), grid(tensor=tensor)))
    assert {parameter.dtype for parameter in case.engine.layout().parameters} == {"float32"}


@everywhere
def test_updates_arrive_exactly(case):
    """Twenty updates in the memory published once: log-probs of the probe and of samples within 1e-5 of the trainer's,
    versions on every token."""
    for version in range(1, NUM_UPDATES + 1):
        case.trainer.update(seed=version)
        receipt = send(case, version)
        prove(case, receipt)
        assert set(receipt.checksums) == set(range(len(case.plan.moves)))
        if case.name != "mixture2":
            assert case.engine.read_back(incoming(case.plan), case.trainer.publications).differences == ()
    for (sample,) in case.engine.generate(WANTED, Sampling(max_response_tokens=12)):
        request = WANTED[sample.index]
        exact = case.trainer.logprobs([*request.prompt, *sample.tokens])[len(request.prompt) - 1 :]
        assert sample.logprobs == pytest.approx(exact, abs=1e-5)
        assert set(sample.versions) == {NUM_UPDATES}


def one_by_one(case):
    """As many parts as storages: the layers of vLLM are filled from several of them."""
    parts = incoming(case.plan)
    for name in dict.fromkeys(filling.storage.name for part in parts for filling in part.fillings):
        some = [tuple(filling for filling in part.fillings if filling.storage.name == name) for part in parts]
        yield Taken(
            tuple(replace(part, fillings=fillings) for part, fillings in zip(parts, some, strict=True)),
            tuple(case.trainer.publications),
        )


@everywhere
def test_weights_come_in_many_parts(case):
    case.trainer.update(seed=7)
    receipt = case.engine.receive(1, incoming(case.plan), one_by_one(case), PROBE)
    prove(case, receipt)
    assert set(receipt.checksums) == set(range(len(case.plan.moves)))
    assert case.engine.read_back(incoming(case.plan), case.trainer.publications).differences == ()


@everywhere
def test_parts_that_end_half_way_leave_nothing_behind_for_the_next_receive(case):
    """In the middle of layer 1's q, k and v."""
    case.trainer.update(seed=6)

    def some():
        for taken in one_by_one(case):
            if taken.incoming[0].fillings[0].storage.name == "model.layers.1.self_attn.v_proj.weight":
                raise WeightSyncError("a bucket is lost")
            yield taken

    with pytest.raises(WeightSyncError, match="a bucket is lost"):
        case.engine.receive(1, incoming(case.plan), some(), PROBE)
    refuses_until_a_good_receive(case)


@in_dense_engines
def test_read_back_names_parameter_rank_and_slice(case):
    """Of values planted in the published memory: the last rank of two holds the second half of the rows or columns."""
    case.trainer.update(seed=8)
    send(case, 1)
    parts, publications = incoming(case.plan), case.trainer.publications
    assert case.engine.read_back(parts, publications).differences == ()
    low_half, high_half = case.trainer.storages  # rows 0 to 63 and 64 to 127 of what has 128
    low_half["model.layers.0.self_attn.o_proj.weight"][5, 100] += 1e-5
    high_half["model.layers.1.mlp.up_proj.weight"][:2, 7] += 1e-5  # rows 96 and 97
    high_half["model.embed_tokens.weight"][-1, 3] += 1e-5  # row 81
    high_half["model.layers.1.self_attn.k_proj.bias"][-1] = float("nan")  # 63
    found = {(d.parameter, d.rank, d.low, d.high) for d in case.engine.read_back(parts, publications).differences}
    last = 1 if case.name == "vllm2" else 0
    assert found == {
        ("model.layers.0.self_attn.o_proj.weight", last, (5, 100, 0), (6, 101, 1)),
        ("model.layers.1.mlp.up_proj.weight", last, (96, 7, 0), (98, 8, 1)),
        ("model.embed_tokens.weight", last, (81, 3, 0), (82, 4, 1)),
        ("model.layers.1.self_attn.k_proj.bias", last, (63, 0, 0), (64, 1, 1)),
    }


@pytest.mark.parametrize("case", ["mixture2"], indirect=True)
def test_read_back_says_what_it_cannot_read(case):
    send(case, 1)
    parts = incoming(case.plan)
    read = case.engine.read_back(parts, case.trainer.publications)
    assert read.differences == () and all("experts" in name for name in read.unread)
    assert "model.layers.0.mlp.experts.gate_up_proj" in read.unread
    case.trainer.storages[0]["model.layers.0.mlp.gate.weight"][1, 5] += 1e-5
    (found, twin) = case.engine.read_back(parts, case.trainer.publications).differences
    assert str(found).startswith("model.layers.0.mlp.gate.weight, tensor rank 0, [1, 5, 0] to [2, 6, 1]: off by up to")
    assert twin.rank == 1


def refuses_until_a_good_receive(case) -> None:
    with pytest.raises(WeightSyncError, match="half-way"):
        next(case.engine.generate(WANTED, Sampling(max_response_tokens=2)))
    prove(case, send(case, 9))
    assert len(list(case.engine.generate(WANTED, Sampling(max_response_tokens=2)))) == len(WANTED)
    if case.name != "mixture2":
        assert case.engine.read_back(incoming(case.plan), case.trainer.publications).differences == ()


@everywhere
def test_a_changed_byte_fails_its_own_slice(case):
    case.trainer.update(seed=5)
    expected = case.trainer.expected(case.plan)
    case.trainer.storages[1]["model.layers.1.self_attn.v_proj.weight"].view(torch.uint8)[3, 17] ^= 1
    receipt = send(case, 1)
    with pytest.raises(WeightSyncError, match=r"1 slices other than sent: model\.layers\.1\.self_attn\.v_proj\.weight"):
        verify(case.plan, expected, receipt.probe_logprobs, [receipt], tolerance=1e-5)


@in_dense_engines
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.k_proj.weight"])
def test_a_missing_parameter_is_named(case, name):
    parts = incoming(case.plan)
    left = tuple(filling for filling in parts[-1].fillings if filling.storage.name != name)
    with pytest.raises(WeightSyncError, match=f"{name}: needs"):
        send(case, 1, incoming=[*parts[:-1], replace(parts[-1], fillings=left)])
    refuses_until_a_good_receive(case)


@in_dense_engines
def test_a_plan_for_other_slices_is_refused(case):
    parts = incoming(case.plan)
    first = parts[-1].fillings[0]
    storage = Storage(first.storage.rank, first.storage.name, 7, "bfloat16")
    odd = replace(parts[-1], fillings=(replace(first, storage=storage), *parts[-1].fillings[1:]))
    with pytest.raises(WeightSyncError, match=r"embed_tokens\.weight: gets .* elements of bfloat16"):
        send(case, 1, incoming=[*parts[:-1], odd])
    with pytest.raises(WeightSyncError, match="parts of a plan for an engine of"):
        send(case, 1, incoming=[*parts, parts[0]])
    refuses_until_a_good_receive(case)


@in_dense_engines
def test_memory_of_another_node_is_refused_with_the_other_transport(case):
    far = replace(case.trainer.publications[1], node="elsewhere/0/0")
    with pytest.raises(WeightSyncError, match=r"source rank 1 .*published on node elsewhere.*object store"):
        send(case, 1, publications=[case.trainer.publications[0], far])
    refuses_until_a_good_receive(case)


def _publish_and_wait(connection, storages) -> None:
    connection.send(publish(1, storages))
    connection.recv()


@in_dense_engines
def test_a_publisher_that_died_is_named(case):
    here, there = multiprocessing.get_context("fork").Pipe()
    copies = {name: tensor.clone() for name, tensor in case.trainer.storages[1].items()}
    process = multiprocessing.get_context("fork").Process(target=_publish_and_wait, args=(there, copies))
    process.start()
    publication = here.recv()
    here.send(None)
    process.join()
    with pytest.raises(WeightSyncError, match=rf"source rank 1 \(process {process.pid}\).* is gone"):
        send(case, 1, publications=[case.trainer.publications[0], publication])
    refuses_until_a_good_receive(case)


@everywhere
def test_a_source_that_ends_half_way_leaves_nothing_behind_for_the_next_receive(case):
    """One storage fewer than the plan reads: layers before it are written, its own has half of what it waits for. What
    vLLM had collected of that layer must not count in the next transfer."""
    name = "model.layers.1.self_attn.v_proj.weight"
    case.trainer.update(seed=6)
    storages = {key: tensor for key, tensor in case.trainer.storages[0].items() if key != name}
    short = [publish(0, storages), case.trainer.publications[1]]
    with pytest.raises(WeightSyncError, match=r"source rank 0 published no 'model\.layers\.1\.self_attn\.v_proj"):
        send(case, 1, publications=short)
    refuses_until_a_good_receive(case)


@pytest.mark.parametrize("case", ["hf"], indirect=True)
def test_a_tied_head_that_differs_from_its_embedding_is_refused(case):
    case.trainer.storages[0]["lm_head.weight"] += 1
    with pytest.raises(WeightSyncError, match=r"tied lm_head\.weight must equal"):
        send(case, 1)
    case.trainer.write()
    refuses_until_a_good_receive(case)


@pytest.mark.parametrize("case", ["hf", "vllm"], indirect=True)
def test_an_engine_that_failed_half_way_does_not_go_on_with_held_requests(case):
    case.engine.pause()
    with pytest.raises(WeightSyncError, match="elsewhere"):
        send(case, 1, publications=[replace(one, node="elsewhere") for one in case.trainer.publications])
    with pytest.raises(WeightSyncError, match="half-way"):
        case.engine.resume()
    send(case, 2)
    case.engine.resume()
    assert len(list(case.engine.generate(WANTED, Sampling(max_response_tokens=2)))) == len(WANTED)
