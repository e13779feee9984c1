"""The arithmetic of one step, as `hybridflow check` prints it."""

from hybridflow.algorithm import Algorithm
from hybridflow.config.cross_checks import model_roles
from hybridflow.config.layout_table import layout_table
from hybridflow.config.locate import import_name
from hybridflow.config.response_lengths import longest_responses
from hybridflow.config.run_config import RunConfig


def report(config: RunConfig) -> str:
    """Prompts, samples, optimizer steps, sequences a rank, micro-batches and tokens of a step, and who runs where; then
    the bytes of every role in every phase."""
    algorithm: type[Algorithm] = import_name(config.algorithm.target)
    needed = algorithm.required_roles(config.algorithm.config)
    roles = config.with_ranks(needed)
    rows = [
        *_run_rows(config, algorithm),
        *_step_rows(config, algorithm),
        *(row for role in model_roles(config, roles) for row in _engine_rows(config, algorithm, role)),
        *(row for role in model_roles(config, roles) for row in _decay_rows(config, algorithm, role)),
        *_placement_rows(config, roles),
        *((role, "the actor's weights, its adapter off: no ranks of its own") for role in needed if role not in roles),
    ]
    width = max(len(name) for name, _ in rows)
    listed = "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
    table = layout_table(config, roles, algorithm.product)
    return f"{listed}\n\n{table}" if table else listed


def longest_row(config: RunConfig, online: bool) -> int:
    """The most tokens that a row of prompt and response can have."""
    if not online:
        return config.data.max_row_tokens
    response = longest_responses(config).get("rollout.sampling.max_response_tokens", 0)
    return config.data.max_prompt_tokens + response


def _run_rows(config: RunConfig, algorithm: type[Algorithm]) -> list[tuple[str, str]]:
    model = config.model.path or f"random {(config.model.config or {}).get('model_type')}"
    generated = config.data.arithmetic
    data = f"{generated.num_train} generated problems" if generated else str(config.data.origin("train"))
    return [
        ("algorithm", f"{config.algorithm.name} ({config.algorithm.target})"),
        ("model", f"{model}, tokenizer {config.model.tokenizer or 'of the model'}"),
        ("data", data),
        ("run folder", str(config.run_folder)),
        ("steps", f"{config.trainer.steps}"),
    ]


def _step_rows(config: RunConfig, algorithm: type[Algorithm]) -> list[tuple[str, str]]:
    settings, prompts = config.algorithm.config, config.trainer.prompts_per_step
    per_prompt = algorithm.samples_per_prompt(settings)
    samples = prompts * per_prompt
    longest = longest_row(config, algorithm.online)
    rows = [("prompts a step" if algorithm.online else "rows a step", f"{prompts}")]
    if algorithm.online:
        rows.append(("samples a step", f"{prompts} prompts x {per_prompt} = {samples}"))
    elif per_prompt > 1:
        rows = [("rows a step", f"{prompts} {algorithm.rows} x {per_prompt} = {samples}")]
    rows.append(("tokens a step", f"at most {samples} x {longest} = {samples * longest}"))
    per_update, epochs = algorithm.sequences_per_update(settings, prompts), _epochs(config)
    updates = _updates(config, algorithm)
    rows.append(("optimizer steps a step", f"{updates}, each of at most {per_update} sequences ({epochs} epochs)"))
    rows.append(("optimizer steps in all", f"{config.trainer.steps} x {updates} = {config.trainer.steps * updates}"))
    return rows


def _epochs(config: RunConfig) -> int:
    return int(getattr(config.algorithm.config, "epochs", 1))


def _updates(config: RunConfig, algorithm: type[Algorithm]) -> int:
    """Optimizer steps of one step of the trainer."""
    settings, prompts = config.algorithm.config, config.trainer.prompts_per_step
    rows = algorithm.trained_rows(settings, prompts)
    return -(-rows // algorithm.sequences_per_update(settings, prompts)) * _epochs(config)


def _decay_rows(config: RunConfig, algorithm: type[Algorithm], role: str) -> list[tuple[str, str]]:
    """Where a learning rate decays, its horizon beside the run's."""
    instance = config.instance(role)
    trained = instance is not None and (instance.type in ("actor", "critic") or role == algorithm.product)
    schedule = getattr(instance.engine, "schedule", None) if instance is not None and trained else None
    horizon = getattr(schedule, "total_steps", None)
    if schedule is None or horizon is None or schedule.kind == "constant":
        return []
    whole = config.trainer.steps * _updates(config, algorithm)
    text = f"{schedule.kind} decay over {horizon} optimizer steps; the run takes {whole}"
    if horizon < whole:
        text += f": the last {whole - horizon} run at {schedule.min_ratio:g} x lr"
    elif horizon > whole:
        text += ": the decay is not finished then"
    return [(f"{role}, learning rate", text)]


def _engine_rows(config: RunConfig, algorithm: type[Algorithm], role: str) -> list[tuple[str, str]]:
    instance = config.instance(role)
    if instance is None or config.place(role) is None:
        return []
    data = config.shape(role).data
    budget = getattr(instance.engine, "tokens_per_micro_batch", None)
    samples = config.trainer.prompts_per_step * algorithm.samples_per_prompt(config.algorithm.config)
    per_update = algorithm.sequences_per_update(config.algorithm.config, config.trainer.prompts_per_step)
    frozen = instance.type in ("reference", "reward_model") and role != algorithm.product
    rows = samples if frozen else per_update
    sequences = -(-rows // data)
    over = f"{data} ranks" if data == config.ranks(role) else f"{data} of data among {config.ranks(role)} ranks"
    text = f"{sequences} sequences a rank ({over})"
    if rows < data:
        text += f", {data - rows} of them idle"
    if budget is not None:
        longest = longest_row(config, algorithm.online)
        rows_each = max(1, budget // longest)
        count = -(-sequences // rows_each)
        text += f", at most {count} micro-batches of {rows_each} rows x {longest} tokens (budget {budget})"
        if longest > budget:
            text += "; the longest rows are over the budget and run alone"
    what = "a forward pass" if frozen else "an optimizer step"
    return [(f"{role}, {what}", text)]


def _placement_rows(config: RunConfig, roles: tuple[str, ...]) -> list[tuple[str, str]]:
    rows = []
    for name, pool in config.used_pools(roles).items():
        here = [role for role in roles if (place := config.place(role)) is not None and place.pool == name]
        demand = f"{pool.ranks} ranks x {pool.cpus_per_rank:g} CPUs"
        gpus = f" and {pool.gpus_per_rank:g} GPUs" if pool.gpus_per_rank else ""
        rows.append((f"pool {name}", f"{demand}{gpus}: {', '.join(here)}"))
    return rows
