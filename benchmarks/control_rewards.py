"""Rewards that must not teach addition: the controls of benchmarks/learning.py."""

import os
import random
from typing import Any

from hybridflow.rewards.functions import arithmetic

_coin = random.Random(os.environ.get("COIN_SEED"))


def chance(prompt: str, response: str, answer: str, **row: Any) -> float:
    """0 or 1 by a coin that knows neither problem nor response: asked twice, it may answer twice. COIN_SEED is its
    seed."""
    return float(_coin.random() < 0.5)


def inverted(prompt: str, response: str, answer: str, **row: Any) -> float:
    """1 when the response is wrong."""
    return 1.0 - arithmetic(prompt, response, answer, **row)
