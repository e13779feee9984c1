"""What the composition root makes of a configuration, without starting a rank."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from hybridflow import launch
from hybridflow.config.load import load
from hybridflow.config.model_paths import could_be_hub_id
from hybridflow.config.run_config import RunConfig
from hybridflow.controller.coordinates import Shape
from hybridflow.errors import ConfigError
from hybridflow.tracking.run_folder import RunFolder
from workers.training.modeling import initialise

JUDGE = "+instances.judge={type: reward_model, model: org/judge}"


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every hub id is this tiny model, except those of nobody; gives the list of ids that were fetched."""
    folder, asked = tmp_path / "snapshot", []
    tiny = load(["model=small"])
    tokenizer = launch.load_tokenizer("char")
    initialise({**(tiny.model.config or {}), "num_hidden_layers": 1}, folder, 0, tokenizer)
    tokenizer.save_pretrained(folder)

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        if name.startswith("nobody/"):
            raise FileNotFoundError("not in the cache, and no network")
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    return asked


def prepared(config: RunConfig, tmp_path: Path, *more: str) -> launch.Model:
    return launch.prepare_model(config, RunFolder(tmp_path / "run"), ("actor", "rollout", "reward", *more))


def test_hub_ids_are_fetched_once_and_ranks_get_folders(snapshot: list[str], tmp_path: Path) -> None:
    small = ["data.max_prompt_tokens=32", "rollout.sampling.max_response_tokens=6"]
    config = load(["model=pretrained", "model.path=Org/Model-0.5B", JUDGE, *small])
    model = prepared(config, tmp_path, "judge")
    assert sorted(snapshot) == ["Org/Model-0.5B", "org/judge"]
    assert len(model.tokenizer) == 82
    for name in ("actor", "rollout", "judge"):
        given = launch.worker_arguments(config, name, model)
        assert (Path(given["model_folder"]) / "config.json").is_file(), name
    for name in ("reward", "judge"):
        AutoTokenizer.from_pretrained(launch.worker_arguments(config, name, model)["tokenizer"])


def test_an_instance_that_does_not_run_is_not_fetched(snapshot: list[str], tmp_path: Path) -> None:
    prepared(load(["model=tiny", JUDGE]), tmp_path)
    assert snapshot == []


def test_a_tokenizer_by_hub_id(snapshot: list[str], tmp_path: Path) -> None:
    model = prepared(load(["model=tiny", "model.tokenizer=org/tok"]), tmp_path)
    assert Path(model.tokenizer_name, "tokenizer.json").is_file() and model.vocab_size == 82


def test_a_hub_id_that_cannot_be_fetched_says_the_remedy(snapshot: list[str], tmp_path: Path) -> None:
    config = load(["model=pretrained", "model.path=nobody/model"])
    with pytest.raises(ConfigError, match=r"model.path: found 'nobody/model'.*no network.*hf download nobody/model"):
        prepared(config, tmp_path)
    judged = load(["model=tiny", JUDGE.replace("org/", "nobody/")])
    with pytest.raises(ConfigError, match=r"instances.judge.model: found 'nobody/judge'"):
        prepared(judged, tmp_path, "judge")


def test_a_snapshot_without_weights_is_refused(snapshot: list[str], tmp_path: Path) -> None:
    (tmp_path / "snapshot/model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model.path: .* has no \*.safetensors; "):
        prepared(load(["model=pretrained", "model.path=org/model"]), tmp_path)


def test_what_check_could_not_know_of_a_hub_model_is_told_when_it_is_here(snapshot: list[str], tmp_path: Path) -> None:
    config = load(["model=pretrained", "model.path=org/model", "rollout.sampling.max_response_tokens=500"])
    with pytest.raises(ConfigError, match=r"rollout.sampling.max_response_tokens: .* max_position_embeddings is 64"):
        prepared(config, tmp_path)


def test_a_hub_model_that_cannot_be_cut_so_is_refused_when_it_is_here(snapshot: list[str], tmp_path: Path) -> None:
    sizes = ["placement.pools.all.ranks=3", "placement.pools.all.cpus_per_rank=0.5", "placement.roles.actor.tensor=3"]
    short = ["data.max_prompt_tokens=32", "rollout.sampling.max_response_tokens=6"]
    config = load(["model=pretrained", "model.path=org/model", *sizes, *short])
    with pytest.raises(ConfigError, match=r"placement.roles.actor.tensor: found 3; .* 4 attention heads.*: 1, 2, 4$"):
        prepared(config, tmp_path)
    judged = load(["model=tiny", JUDGE, *sizes, "placement.roles.actor.tensor=1", "+placement.roles.judge={pool: all}",
                   "placement.roles.judge.tensor=3"])  # fmt: skip
    with pytest.raises(ConfigError, match=r"placement.roles.judge.tensor: found 3; .* 4 attention heads.*: 1, 2, 4$"):
        prepared(judged, tmp_path, "judge")


def test_groups_get_the_shapes_of_the_placement(snapshot: list[str], tmp_path: Path) -> None:
    made: dict[str, tuple[object, ...]] = {}

    class Runtime:
        def pool(self, name: str, num_bundles: int, **settings: object) -> tuple[str, int]:
            return name, num_bundles

        def group(self, name: str, factory: object, pool: object, shape: Shape, bundles_per_rank: int) -> None:
            made[name] = (pool, shape, bundles_per_rank)

    given = ["placement.pools.all.ranks=4", "placement.pools.all.cpus_per_rank=0.5", "placement.roles.actor.tensor=2"]
    config = load([*given, "rollout.tensor_parallel_size=2", "placement.roles.reward.ranks=1"])
    model = launch.Model(tmp_path, launch.load_tokenizer("char"), "char", 82, {})
    launch.make_groups(config, Runtime(), ("actor", "rollout", "reward"), model)
    assert made == {
        "actor": (("all", 4), Shape(tensor=2, data=2), 1),
        "rollout": (("all", 4), Shape(data=2), 2),
        "reward": (("all", 4), Shape(), 1),
    }


def test_a_folder_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert could_be_hub_id("runs/model")
    Path("runs/model").mkdir(parents=True)
    assert not could_be_hub_id("runs/model")


@pytest.mark.parametrize("name", ["./m", "/m", "~/m", "a/b/c", "a b", "a/", ""])
def test_no_hub_id(name: str) -> None:
    assert not could_be_hub_id(name)


@pytest.mark.parametrize(
    ("actor", "rollout", "tolerance"),
    [
        ("float32", "float32", 1e-4),
        ("bfloat16", "float32", 0.1),
        ("float32", "bfloat16", 0.1),
        ("float32", "float16", 0.05),
        ("bfloat16", "float16", 0.1),
    ],
)
def test_the_probe_allows_what_the_coarser_side_rounds(actor: str, rollout: str, tolerance: float) -> None:
    config = load([f"actor.engine.dtype={actor}", f"rollout.dtype={rollout}"])
    assert launch.probe_tolerance(config) == tolerance


def test_cores_and_devices() -> None:
    names = ("actor", "critic", "reference", "rollout", "reward")
    assert launch.cores_and_devices(load(["placement=split"]), names) == pytest.approx((2.0, 2.0))
    assert launch.cores_and_devices(load(["placement=colocated"]), names) == (2.0, 2.0)
    gpus = ["placement=split", "placement.pools.policy.gpus_per_rank=1", "placement.pools.generation.gpus_per_rank=0.5"]
    assert launch.cores_and_devices(load(gpus), names) == pytest.approx((2.0, 3.0))
    assert launch.cores_and_devices(load(["placement=split"]), ("actor",)) == pytest.approx((0.8, 0.8))


def test_constant_aggregation_divides_offline_rows_by_their_own_limit() -> None:
    given = ["rollout.sampling.max_response_tokens=6", "data.max_row_tokens=48"]
    context = launch.algorithm_context(load(["algorithm=sft", *given]), online=False)
    assert context.max_response_tokens == 48
    assert launch.algorithm_context(load(["algorithm=grpo", *given]), online=True).max_response_tokens == 6


def test_the_runtime_gets_the_address_of_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[object, ...]] = []
    monkeypatch.setattr(launch, "RayRuntime", lambda *arguments: made.append(arguments))
    launch.make_runtime(load(["ray.address=head:6379"]), tmp_path)
    launch.make_runtime(load(["ray.num_cpus=7"]), tmp_path)
    assert [arguments[:3] for arguments in made] == [(tmp_path, "head:6379", None), (tmp_path, "local", 7)]
