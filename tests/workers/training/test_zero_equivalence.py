"""The benchmark as a test: every ZeRO stage, accumulation, optimizer and shape, and the losses of algorithms."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DATA_ONLY = [(r, a, optimizer, "token") for r in ("1x1", "1x2") for a in ("1", "4") for optimizer in ("sgd", "adamw")]
DATA_ONLY += [("1x2", "4", "sgd", loss) for loss in ("ppo", "gspo", "dpo", "gkd")]
WITH_TENSOR = [(shape, "4", "sgd", loss) for shape in ("2x1", "2x2") for loss in ("token", "ppo")]
WITH_TENSOR += [("2x2", "1", "adamw", "token")]


@pytest.mark.parametrize("cases", [DATA_ONLY, WITH_TENSOR], ids=["data", "tensor"])
def test_zero_stages_equal_the_torch_engine(cases: list[tuple[str, str, str, str]]) -> None:
    program = ROOT / "benchmarks" / "zero_equivalence.py"
    command = [sys.executable, str(program), "--shapes", *sorted({case[0] for case in cases})]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = re.findall(
        r"^ +([0-3]) +([12]x[12]) +([14])  (sgd|adamw) +(token|ppo|gspo|dpo|gkd) "
        r"+([0-9.e+-]+) +([0-9.e+-]+) +([0-9.e+-]+) +([0-9.e+-]+)",
        done.stdout,
        re.MULTILINE,
    )
    assert {line[:5] for line in lines} == {(str(stage), *case) for stage in range(4) for case in cases}
    for *_, optimizer, _, gradient, weights, norm, logprobs in lines:
        assert float(gradient) <= 1e-6
        assert float(norm) <= 1e-6
        assert float(logprobs) <= 5e-6
        assert float(weights) <= (1e-6 if optimizer == "sgd" else 1e-5)
    assert float(re.findall(r"^ratio (.*)$", done.stdout, re.MULTILINE)[-1]) <= 1
