"""Rewards that must not teach addition: the controls of benchmarks/learning.py."""

import random
from typing import Any

from hybridflow.rewards.functions import arithmetic

_coin = random.Random(0)


def chance(prompt: str, response: str, answer: str, **row: Any) -> float:
    """0 or 1 by a coin that knows neither problem nor response."""
    return float(_coin.random() < 0.5)


def inverted(prompt: str, response: str, answer: str, **row: Any) -> float:
    """1 when the response is wrong."""
    return 1.0 - arithmetic(prompt, response, answer, **row)
