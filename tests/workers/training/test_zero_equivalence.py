"""The benchmark as a test: every ZeRO stage, accumulation, optimizer and rank count, and the losses of algorithms."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def test_zero_stages_equal_the_torch_engine() -> None:
    program = ROOT / "benchmarks" / "zero_equivalence.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = re.findall(
        r"^ +([0-3]) +([12]) +([14])  (sgd|adamw) +(token|ppo|gspo|dpo|gkd) +([0-9.e+-]+) +([0-9.e+-]+)",
        done.stdout,
        re.MULTILINE,
    )
    cases = [(r, a, optimizer, "token") for r in ("1", "2") for a in ("1", "4") for optimizer in ("sgd", "adamw")]
    cases += [("2", "4", "sgd", loss) for loss in ("ppo", "gspo", "dpo", "gkd")]
    assert {line[:5] for line in lines} == {(str(stage), *case) for stage in range(4) for case in cases}
    for *_, optimizer, _, gradient, weights in lines:
        assert float(gradient) <= 1e-6
        assert float(weights) <= (1e-6 if optimizer == "sgd" else 1e-5)
    assert float(re.findall(r"^ratio (.*)$", done.stdout, re.MULTILINE)[-1]) <= 1
