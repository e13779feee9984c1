"""Warm starts and single runs for benchmarks/learning.py, each in a process of its own with one thread."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from learning_cases import Case
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybridflow.data.arithmetic import generate
from hybridflow.data.settings import ArithmeticSettings

LOCAL = ["runtime=local", "engine=torch", "rollout=hf", "placement=single"]
DRAW = ["data.arithmetic.seed=1"]  # rates and lengths were chosen while watching the draw of seed 0
WARM, MOST_WARM_STEPS, EVERY = 0.35, 2000, 25
BETWEEN = 40
"""Steps from one validation to the next."""

Points = list[tuple[int, float]]
"""(step, held-out accuracy)."""


def warm_start(folder: Path, seed: int) -> None:
    """Supervised steps until `WARM` of the held-out prompts are right; leaves the model in `folder/model`."""
    from hybridflow.config.load import load
    from hybridflow.launch import opened

    overrides = ["experiment=arithmetic_sft", f"seed={seed}", f"run_folder={folder}", "resume=never", "overwrite=true"]
    config = load([*overrides, *LOCAL, *DRAW], None, "train")
    with opened(config) as session:
        rows = held_out(folder)
        for step in range(MOST_WARM_STEPS):
            session.schedule.step(step)
            if (step + 1) % EVERY == 0:
                session.groups["actor"].export(str(folder / "model")).result()
                session.model.tokenizer.save_pretrained(str(folder / "model"))
                if (found := accuracy(folder / "model", rows)) >= WARM:
                    print(f"seed {seed}: {found:.1%} after {step + 1} supervised steps", flush=True)
                    folder.with_name(f"{folder.name}.done").touch()
                    return
    raise SystemExit(f"seed {seed}: below {WARM:.0%} after {MOST_WARM_STEPS} supervised steps")


def held_out(folder: Path) -> list[dict[str, str]]:
    """The first 500 held-out problems of a run."""
    (file,) = folder.glob("data/*/validation.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()[:500]]


def accuracy(model_folder: Path, rows: list[dict[str, str]]) -> float:
    """Share of greedy answers that are right, by Hugging Face `generate` alone."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    prompts = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        out_BT = model.generate(**prompts, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    answers = tokenizer.batch_decode(out_BT[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(answer.strip() == row["answer"] for answer, row in zip(answers, rows, strict=True)) / len(rows)


def ranking(model_folder: Path, pairs: list[dict[str, str]]) -> float:
    """Share of pairs whose right answer is likelier than the wrong one, by a Hugging Face forward pass alone."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder, padding_side="right")
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    sums = []
    for kind in ("chosen", "rejected"):
        starts_B = torch.tensor([len(tokenizer(pair["prompt"]).input_ids) for pair in pairs])
        texts = [f"{pair['prompt']}{pair[kind]}{tokenizer.eos_token}" for pair in pairs]
        rows = tokenizer(texts, return_tensors="pt", padding=True)
        with torch.no_grad():
            logprobs_BTV = model(**rows).logits[:, :-1].double().log_softmax(-1)
        found_BT = logprobs_BTV.gather(-1, rows["input_ids"][:, 1:, None])[..., 0]
        place_T = torch.arange(1, rows["input_ids"].shape[1])
        counted_BT = (place_T >= starts_B[:, None]) & (place_T < rows["attention_mask"].sum(1)[:, None])
        sums.append((found_BT * counted_BT).sum(1))
    return float((sums[0] > sums[1]).double().mean())


def warmed(folder: Path, seed: int) -> None:
    """`warm_start` in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("learning.py")), "--warm-start", str(seed)]
    subprocess.run([*command, "--folder", str(folder)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def train(folder: Path, *overrides: str, coin_seed: str = "") -> list[dict]:
    """One run through the CLI; its metrics lines."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COIN_SEED": coin_seed}
    command = [sys.executable, "-m", "hybridflow.cli", "train", *overrides, *LOCAL, *DRAW, f"run_folder={folder}"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f"{folder.name}.log", "a", encoding="utf-8") as log:
        done = subprocess.run([*command, "tracking.samples=false"], stdout=log, stderr=log, env=environment)
    if done.returncode:
        raise SystemExit(f"{folder.name} ended with exit status {done.returncode}; see {log.name}")
    return metrics_lines(folder)


def metrics_lines(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def curve(folder: Path, case: Case, seed: int) -> Points:
    """One run from the seed's warm start; what an earlier call finished is read instead of repeated."""
    own, metric = folder / f"{case.name}-{seed}", case.metric
    lines = metrics_lines(own)
    if not any(line["step"] == case.steps and metric in line["metrics"] for line in lines):
        start = folder / f"{case.start}-{seed}" / "model"
        given = [f"model.path={start}", f"seed={seed}", *case.overrides]
        given += [f"instances.teacher.model={folder / f'grpo-{seed}' / 'model'}"] if case.teacher else []
        given += [f"trainer.steps={case.steps}", "trainer.validate_before=true", f"trainer.validate_every={BETWEEN}"]
        given += [f"actor.engine.schedule.total_steps={case.schedule}"] if case.schedule else []
        lines = train(own, *given, "trainer.validation_prompts=500", "resume=never", "overwrite=true")
    return [(line["step"], line["metrics"][metric]) for line in lines if metric in line["metrics"]]


def preference_curve(folder: Path, case: Case, seed: int) -> Points:
    """One offline run: of a policy the `ranking` before and after, of a reward model its own held-out measure."""
    points = curve(folder, case, seed)
    if case.metric != "val/preference_accuracy" or case.name == "reward_model":
        return points
    _, file = generate(ArithmeticSettings(seed=1), folder / f"pairs-{seed}", "pairs")
    pairs = [json.loads(line) for line in file.read_text().splitlines()[:500]]
    models = folder / f"sft-{seed}" / "model", folder / f"{case.name}-{seed}" / "model"
    return [(step, ranking(model, pairs)) for step, model in zip((0, case.steps), models, strict=True)]


def control_curve(folder: Path, case: Case, seed: int) -> Points:
    """One run under a reward that may lie, so the model itself is judged, by `accuracy`: it is trained in parts, each
    continued from the last one's checkpoint, and exported after each."""
    start, own = folder / f"sft-{seed}", folder / f"control-{case.name}-{seed}"
    file = own / "judged.json"
    if file.is_file() and (points := json.loads(file.read_text()))[-1][0] == case.steps:
        return points
    points = [(0, accuracy(start / "model", held_out(start)))]
    for step in range(BETWEEN, case.steps + 1, BETWEEN):
        given = ["resume=never", "overwrite=true"] if step == BETWEEN else ["resume=auto"]
        given += [f"trainer.steps={step}", f"trainer.checkpoint_every={BETWEEN}", "trainer.keep_checkpoints=1"]
        given += [f"actor.engine.schedule.total_steps={case.schedule}", "trainer.validate_before=false"]
        model = f"model.path={start / 'model'}"
        given += [f"seed={seed}", "trainer.validate_every=0"]
        train(own, *case.overrides, model, *given, coin_seed=f"{seed} {step}")
        points.append((step, accuracy(own / "model", held_out(start))))
        file.write_text(json.dumps(points))
    return points
