"""What `hybridflow check` says of layouts: bytes of every role in every phase, and of the way from actor to engines."""

from dataclasses import dataclass

from hybridflow.config.memory import Held, actor_adapter, generation_cuts, held
from hybridflow.config.model_numbers import DECODERS, decoder_of, role_facts
from hybridflow.config.run_config import RunConfig
from hybridflow.resharding.decoder import Decoder, EngineCuts, adapter_specs, decoder_specs
from hybridflow.resharding.layout import Layout, dtype_of
from hybridflow.resharding.plan import make_plan
from hybridflow.resharding.shards import Spec, Zero, build_layout, grid

PHASES = ("training", "transition", "generation")
COLUMNS = ("weights", "gradients", "optimizer", "cache")


@dataclass(frozen=True)
class Reshard:
    """Bytes from the actor's ranks to the workers of all rollout engines. gather: what moves where every rank of the
    actor gathers the whole model and every worker is handed it. later: at every sync but the first, where the actor
    trains an adapter and the other weights stay in place; it has no gather of its own."""

    sent: dict[int, int]
    received: dict[int, int]
    total: int
    gather: int
    later: "Reshard | None" = None


def layout_table(config: RunConfig, roles: tuple[str, ...], product: str) -> str:
    """A table of bytes a rank, and a line on the resharding; a line that says why where the sizes are not known."""
    rows = [(role, shape_text(config, role), found) for role in roles if (found := held(config, role, product))]
    known = {role for role, _, _ in rows}
    unknown = [role for role in roles if config.role_type(role) != "reward" and role not in known]
    lines = []
    if rows:
        head = ("bytes a rank", "p-t-d", *COLUMNS, *(f"in {phase}" for phase in PHASES))
        lines = _aligned([head, *(_row(*row) for row in rows), *_pools(config, {row[0]: row[2] for row in rows})])
        lines.append("Activations, logits and reduce buckets come on top.")
        if any(found.sleeps for _, _, found in rows):
            lines.append("Engines are counted as asleep in training (schedule.sleep).")
    if "actor" in roles and "rollout" in roles and (moves := reshard(config)) is not None:
        lines += _reshard_lines(moves)
    for role in unknown:
        lines.append(_unknown(config, role))
    return "\n".join(lines)


def shape_text(config: RunConfig, role: str) -> str:
    if config.role_type(role) == "rollout":
        return f"t_g {config.bundles_per_rank(role)} x {config.ranks(role)}"
    shape = config.shape(role)
    return f"{shape.pipeline}-{shape.tensor}-{shape.data}"


def reshard(config: RunConfig) -> Reshard | None:
    """The plan of fewest bytes between the two layouts, made from numbers; None where the sizes are not known."""
    source, destination = source_layout(config), destination_layout(config)
    if source is None or destination is None:
        return None
    plan = make_plan(source, destination)
    model = source.num_bytes
    gathered = len(source.ranks) * model - sum(_piece_bytes(source))
    gather, later = gathered + len(destination.ranks) * model, None
    if actor_adapter(config) is not None:
        names = [name for name in source.index_of if ".lora_" in name]
        part = make_plan(source.only(names), destination.only(names))
        later = Reshard(part.bytes_sent, part.bytes_received, part.total_bytes, 0)
    return Reshard(plan.bytes_sent, plan.bytes_received, plan.total_bytes, gather, later)


def source_layout(config: RunConfig) -> Layout | None:
    """The actor's weights: whole on every data rank up to ZeRO 2, where only optimizer states are shared out."""
    engine, shape = config.actor.engine, config.shape("actor")
    decoder = decoder_of(role_facts(config, "actor"), getattr(engine, "dtype", "float32"))
    if decoder is None:
        return None
    shards = getattr(engine, "name", "torch") == "deepspeed" and getattr(engine, "zero_stage", 0) == 3
    mesh = grid(shape.pipeline, shape.tensor, shape.data)
    return build_layout(_specs(config, decoder, EngineCuts()), mesh, Zero(3 if shards else 0))


def destination_layout(config: RunConfig) -> Layout | None:
    """Of all replicas; worker i of replica k is rank k t_g + i."""
    decoder = decoder_of(role_facts(config, "rollout"), getattr(config.rollout, "dtype", "float32"))
    if decoder is None:
        return None
    mesh = grid(tensor=config.bundles_per_rank("rollout"), data=config.ranks("rollout"))
    return build_layout(_specs(config, decoder, generation_cuts(config)), mesh)


def _specs(config: RunConfig, decoder: Decoder, cuts: EngineCuts) -> list[Spec]:
    lora = actor_adapter(config)
    adapter = [] if lora is None else adapter_specs(decoder, lora.rank, lora.target_modules, cuts)
    return decoder_specs(decoder, cuts) + adapter


def _piece_bytes(layout: Layout) -> list[int]:
    """Of what each rank holds, padding left out."""
    pairs = zip(layout.pieces.parameter.tolist(), layout.pieces.volume.tolist(), strict=True)
    return [dtype_of(layout.parameters[parameter].dtype).itemsize * volume for parameter, volume in pairs]


def _row(role: str, shape: str, found: Held) -> tuple[str, ...]:
    parts = (getattr(found, column) for column in COLUMNS)
    return (role, shape, *map(size_text, parts), *(size_text(found.phases[phase]) for phase in PHASES))


def _pools(config: RunConfig, found: dict[str, Held]) -> list[tuple[str, ...]]:
    """What the roles of one pool hold together on the bundle that has most of them."""
    rows = []
    for name in dict.fromkeys(place.pool for role in found if (place := config.place(role)) is not None):
        here = [role for role in found if (place := config.place(role)) is not None and place.pool == name]
        if len(here) > 1:
            sums = (sum(found[role].phases[phase] for role in here) for phase in PHASES)
            rows.append((f"pool {name}, sum", "", *("" for _ in COLUMNS), *map(size_text, sums)))
    return rows


def _reshard_lines(moves: Reshard) -> list[str]:
    def span(found: dict[int, int]) -> str:
        low, high = min(found.values()), max(found.values())
        return size_text(high) if low == high else f"{size_text(low)} to {size_text(high)}"

    def parts(found: Reshard) -> str:
        return (
            f"{size_text(found.total)}: each of {len(found.sent)} ranks sends {span(found.sent)}, each of "
            f"{len(found.received)} workers receives {span(found.received)};"
        )

    times = f", {moves.gather / moves.total:.2f} times as much" if moves.total else ""
    later = [] if moves.later is None else [f"then, at each sync, its adapter alone, {parts(moves.later)}"]
    once = "" if moves.later is None else "once "
    return [
        f"resharding actor -> rollout moves {once}{parts(moves)}",
        *later,
        f"gathering everything would move {size_text(moves.gather)}{times}",
    ]


def _unknown(config: RunConfig, role: str) -> str:
    kind = role_facts(config, role).get("model_type")
    why = f"the table knows model types {', '.join(DECODERS)}, not {kind}" if kind else "its config is fetched at start"
    return f"{role}: bytes not known: {why}"


def size_text(count: int) -> str:
    """Three digits of decimal units: 12.3 MB."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
