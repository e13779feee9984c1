"""When engines sleep, what trained roles offload, what `check` counts, and what is refused."""

import pytest
from refusals import problems

from hybridflow.config.load import load
from hybridflow.config.memory import Held
from hybridflow.config.phases import engines_sleep, offloaded

ROLES = ("actor", "critic", "reward", "rollout")
BOTH = ("gradients", "optimizer")
GPUS = "placement.pools.all.gpus_per_rank=1"
pytestmark = pytest.mark.usefixtures("four_cores")


@pytest.mark.parametrize(
    ("overrides", "sleep", "offload"),
    [
        ([], False, {}),
        ([GPUS], True, {"actor": BOTH, "critic": BOTH}),
        (["schedule.sleep=always"], True, {}),
        ([GPUS, "schedule.sleep=never", "schedule.offload={}"], False, {}),
        (["schedule.offload={critic: [optimizer], actor: []}"], False, {"critic": ("optimizer",)}),
        ([GPUS, "schedule.offload={actor: [weights]}"], True, {"actor": ("weights",)}),
        # Pools of their own: nothing is in anybody's way.
        (["placement=split", *(f"placement.pools.{p}.gpus_per_rank=1" for p in ("policy", "generation"))], False, {}),
    ],
)
def test_what_gives_memory_back(overrides: list[str], sleep: bool, offload: dict[str, tuple[str, ...]]) -> None:
    config = load(["algorithm=ppo", *overrides])
    assert engines_sleep(config) == sleep
    assert offloaded(config, ROLES) == offload


def test_what_cannot_be_is_refused() -> None:
    assert problems("schedule.offload={critic: [optimizer], actor: [weights]}") == [
        "schedule.offload.critic: found 'critic'; allowed: actor",
        "schedule.offload.actor: found 'weights'; engines read a CPU role's weights in its memory, where they must "
        "stay: allowed gradients, optimizer",
    ]
    assert "schedule.offload.actor.0: " in problems("schedule.offload={actor: [momentum]}")[0]
    offline = ["experiment=arithmetic_sft", "schedule.sleep=always", "schedule.offload={actor: [optimizer]}"]
    assert problems(*offline) == [
        "schedule.sleep: found 'always'; sft is offline, no engine generates: remove it",
        "schedule.offload: found {'actor': ['optimizer']}; sft is offline, no engine generates: remove it",
    ]


def test_the_bytes_of_each_phase_by_hand() -> None:
    trained = Held(weights=10, gradients=100, optimizer=1000, keeps_gradients=True)
    assert trained.phases == {"training": 1110, "transition": 1110, "generation": 1110}
    away = Held(10, 100, 1000, keeps_gradients=True, offloads=BOTH)
    assert away.phases == {"training": 1110, "transition": 10, "generation": 10}
    gone = Held(10, 100, 1000, keeps_gradients=True, offloads=(*BOTH, "weights"))
    assert gone.phases == {"training": 1110, "transition": 10, "generation": 0}
    engine = Held(weights=10, cache=5000, in_flight=3, sleeps=True)
    assert engine.phases == {"training": 0, "transition": 13, "generation": 5010}
