"""What a user wants to know about a checkpoint, a plan and a finished run: as text and as JSON."""

from __future__ import annotations

import math
import resource
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from kconvert.checkpoint.side_files import why_left_out
from kconvert.errors import KconvertError, counted, human
from kconvert.formats.base import FATES
from kconvert.formats.nvfp4 import INPUTS, Nvfp4
from kconvert.models.copies import undecoded
from kconvert.models.model import Model, Weight
from kconvert.planning.plan import Plan
from kconvert.report.counts import exactness, inexact_facts, shard_bytes
from kconvert.run.delivery import Delivery
from kconvert.run.disk import existing, free_bytes, survey
from kconvert.run.state.ranks import Rank
from kconvert.serving.contents import contents_of_plan
from kconvert.serving.launch import launch
from kconvert.serving.place import Place, place_of_amx, source_of
from kconvert.serving.table import takers

if TYPE_CHECKING:
    from kconvert.models.amx import AmxModel
    from kconvert.report.quality import Gain

LINE_SPEED = 125_000_000  # bytes a second


@dataclass(frozen=True)
class Summary:
    """Facts for people and programs: `facts` are the JSON, `lines` the text."""

    facts: Mapping[str, Any]
    lines: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return dict(self.facts)

    def as_text(self) -> str:
        return "\n".join(self.lines)


def summarise(model: Model) -> Summary:
    """`kconvert inspect`: family, sizes, formats, roles, findings."""
    checkpoint = model.checkpoint
    roles: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    alike: dict[tuple[str, int, int, int], list[Weight]] = defaultdict(list)
    for weight in model.weights:
        alike[weight.role, weight.rows, weight.cols, id(weight.format)].append(weight)
    for weights in alike.values():
        first, count = weights[0], len(weights)
        roles[first.role, first.format.label].update(
            tensors=count * len(first.tensors),
            parameters=count * first.rows * first.cols,
            bytes=count * sum(tensor.nbytes for tensor in first.tensors),
            count=count,
        )
    for plain in model.plain:
        tensor = plain.tensor
        roles[plain.role, tensor.dtype.lower()].update(
            tensors=1, parameters=math.prod(tensor.shape), bytes=tensor.nbytes, count=1
        )
    table: list[dict[str, Any]] = [{"role": role, "format": label, **counts} for (role, label), counts in roles.items()]
    findings = list(find(model))
    facts = {
        "name": checkpoint.name,
        "manifest": model.manifest.name,
        "parameters": model.parameters,
        "bytes": checkpoint.nbytes,
        "shards": len(checkpoint.files),
        "tensors": len(checkpoint.tensors),
        "schemes": [str(scheme) for scheme in model.quantization.schemes],
        "roles": table,
        "side_files": list(checkpoint.side_files),
        "findings": findings,
    }
    lines = [
        f"{checkpoint.name}: {model.manifest.name}, {model.parameters:,} parameters, {human(checkpoint.nbytes)} in "
        f"{counted(len(checkpoint.files), 'shard')}, {counted(len(checkpoint.tensors), 'tensor')}",
        *(f"quantisation: {scheme}" for scheme in model.quantization.schemes),
        *role_lines(table, "format", "weights", "count"),
        *(f"finding: {finding}" for finding in findings),
    ]
    return Summary(facts, tuple(lines))


def role_lines(table: Sequence[Mapping[str, Any]], format: str, items: str, count: str) -> Iterator[str]:
    """The table of roles; `format` and `items` are what people call the second and the third column, which has `count`."""
    yield f"{'role':<20}{format:<18}{items:>10}{'parameters':>20}{'size':>10}"
    for row in table:
        sizes = f"{row[count]:>10,}{row['parameters']:>20,}{human(row['bytes']):>10}"
        yield f"{row['role']:<20}{row['format']:<18}{sizes}"


def _is_nvfp4(weight: Weight) -> bool:
    return isinstance(weight.format, Nvfp4)


def find(model: Model) -> list[str]:
    """What is sound but worth knowing."""
    findings = [f"{file} {why_left_out(file)} and will not be copied" for file in model.checkpoint.left_out]
    left = [*model.dropped, *(tensor for weight in model.weights for tensor in weight.companions)]
    if left:
        beside = (tensor.name for weight in model.weights if _is_nvfp4(weight) for tensor in weight.companions)
        taken = any(name.endswith(tuple(INPUTS.values())) for name in beside)
        but = ", but for one to the other dialect's NVFP4" * taken
        findings.append(
            f"{dropped(tensor.name for tensor in left)} {'says' if len(left) == 1 else 'say'} nothing of a weight and "
            f"{'is' if len(left) == 1 else 'are'} left behind by a conversion{but}"
        )
    findings += model.findings
    findings += [f"{tensor.name} {reason}, which no rule decodes" for tensor, reason in undecoded(model.plain)]
    names = model.manifest.bind(model.checkpoint.config)
    for plain in model.plain:
        match = names.match(plain.tensor.name)
        if match is not None and match.rule.dtype != plain.tensor.dtype:
            findings.append(f"{plain.tensor.name} is {plain.tensor.dtype}, the published model's is {match.rule.dtype}")
    return findings


def dropped(names: Iterable[str]) -> str:
    """How many tensors of which kind: '4 tensors (2 k_scale, 2 v_scale)'."""
    kinds = Counter(name.rpartition(".")[2] for name in names)
    return f"{counted(kinds.total(), 'tensor')} ({', '.join(f'{count:,} {kind}' for kind, count in sorted(kinds.items()))})"


def describe_plan(
    plan: Plan, delivery: Delivery, threads: int | None, memory: int | None, disk_budget: int | None, rank: Rank | None
) -> Summary:
    """`--dry-run`: output bytes, shards, peak RAM, free disk; what comes from the Hub and goes there, of a `rank` its share.

    Where scales are a choice, errors on a sample of the weights, too, if these are on this machine.
    """
    from kconvert.run.engine import Limits

    limits = Limits.choose(threads, memory)
    peak = limits.peak(plan)
    free = free_bytes(delivery.directory)
    traffic = _describe_traffic(plan, delivery, disk_budget, rank)
    facts = {
        **plan.as_dict(),
        "peak_memory_bytes": peak,
        "threads": limits.threads,
        "free_disk_bytes": free,
        **traffic.facts,
    }
    found = _sampled_gains(plan)
    facts |= _error_facts(found)
    notes = [note for fate in FATES for note in _fates(plan, fate)]
    notes += [f"{label}: {gain} (a sample of the weights)" for label, gain in found.items()]
    notes += plan.facts.get("notes", ())
    notes += _dropped(plan)
    notes += [f"finding: {finding}" for finding in plan.facts.get("findings", ())]
    notes += [f"not copied: {name}" for name in plan.facts.get("left_out", ())]
    lines = (
        *(f"{key}: {value}" for key, value in plan.facts.items() if isinstance(value, str)),
        *(f"{key}: {value:,}" for key, value in plan.facts.items() if isinstance(value, int) and key != "read_bytes"),
        *(f"input: {human(plan.facts[key])}" for key in ("read_bytes",) if key in plan.facts),
        f"output: {human(plan.output_bytes)} in {counted(len(plan.shards), 'shard')} and "
        f"{counted(len(plan.side_files), 'side file')}",
        f"memory: about {human(peak)} with {counted(limits.threads, 'thread')}",
        f"disk: {human(free)} free at {existing(delivery.directory)}",
        *traffic.lines,
        *notes,
    )
    return Summary(facts, lines)


def _describe_traffic(plan: Plan, delivery: Delivery, disk_budget: int | None, rank: Rank | None) -> Summary:
    """What a run from the beginning has to do with the Hub or a store; nothing for one that has nothing to do with them."""
    if (plan.source is None or plan.source.directory) and not delivery.leads_on and disk_budget is None:
        return Summary({}, ())
    needs = survey(plan, delivery, {}, disk_budget, rank)
    facts: dict[str, Any] = {}
    lines: list[str] = []
    if needs.fetches:
        download, hours = needs.download_bytes, needs.download_bytes / LINE_SPEED / 3600
        facts.update(download_bytes=download, download_seconds_at_1_gbit=round(download / LINE_SPEED))
        lines.append(f"download: {human(download)}, {hours:.1f} h at 1 Gbit/s ({counted(len(needs.fetches), 'file')})")
    if delivery.push is not None:
        facts.update(push=str(delivery.push))
        lines.append(f"upload: {human(plan.output_bytes)} to {delivery.push}, private if it is new")
    if delivery.store is not None:
        facts.update(store=str(delivery.store))
        lines.append(f"upload: {human(rank.nbytes(plan) if rank else plan.output_bytes)} to {delivery.store}")
    if needs.budget is None and needs.fetches:
        lesser = survey(plan, delivery, {}, free_bytes(delivery.directory), rank).schedule.peak
        facts.update(smallest_disk_budget=lesser)
        lines.append(
            f"disk budget: none, source files stay in the Hub's cache; the smallest possible is {human(lesser)}"
        )
    elif needs.budget is not None:
        facts.update(disk_budget=needs.budget, smallest_disk_budget=needs.schedule.peak)
        lines.append(f"disk budget: {human(needs.budget)}; the smallest possible is {human(needs.schedule.peak)}")
    return Summary(facts, tuple(lines))


class Outcome(Summary):
    """The closing summary of a run."""

    @classmethod
    def now(
        cls,
        plan: Plan,
        delivery: Delivery,
        seconds: float,
        inexact: Mapping[str, int],
        launch: Summary | None = None,
        earlier: int = 0,
        bound: str | None = None,
    ) -> Outcome:
        """Of a run that began when `earlier` bytes of shards were finished already, and waited for what `bound` says; `launch`
        is the command that serves it."""
        found, served = _sampled_gains(plan), _served(plan)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        written = 0 if earlier >= shard_bytes(plan) else plan.output_bytes - earlier
        facts = {
            "output": str(delivery),
            **({"push": str(delivery.push)} if delivery.push else {}),
            "bytes": plan.output_bytes,
            "written_bytes": written,
            "shards": len(plan.shards),
            "seconds": round(seconds, 3),
            "bytes_per_second": round(written / seconds),
            "peak_memory_bytes": peak,
            "bound_by": bound,
            **inexact_facts(plan, inexact),
            "dropped": list(plan.facts.get("dropped", ())),
        }
        facts |= _error_facts(found)
        facts |= {**served.facts, **(launch.facts if launch else {})}
        kept = delivery.push is not None and not delivery.passing  # in the directory, and on the Hub too
        where = f"{delivery} and {delivery.push}" if kept else str(delivery)
        output = f"{human(plan.output_bytes)} in {counted(len(plan.shards), 'shard')}"
        speed = f"in {seconds:.1f} s ({written / seconds / 1e9:.2f} GB/s), peak memory {human(peak)}"
        speed += f", bound by {bound}" if bound else ""
        if not written:
            sent = f"; {delivery.push} has it, too" if kept else ""
            line = f"{delivery} was finished already, {output}; no shard was written again{sent}"
        elif earlier:
            line = f"wrote the {human(written)} that were missing of {output} to {where} {speed}"
        else:
            line = f"wrote {output} to {where} {speed}"
        notes = [line, *_fates(plan, "lossy"), *exactness(plan, inexact, earlier), *_dropped(plan)]
        notes += [f"{label}: {gain} (a sample of the weights)" for label, gain in found.items()]
        notes += [*plan.facts.get("notes", ()), *served.lines, *(launch.lines if launch else ())]
        return cls(facts, tuple(notes))


def _served(plan: Plan) -> Summary:
    """The engines that take what the plan writes, and how; nothing of a part that is no model."""
    try:
        found = [*takers(contents_of_plan(plan))]
    except KconvertError:
        return Summary({}, ())
    named = ", ".join(f"{engine.title} ({cell.by}{', beside its source' * cell.source})" for engine, cell in found)
    facts = {"engines": {engine.name: cell.by for engine, cell in found}}
    return Summary(facts, (f"engines: {named or 'none is known to take this'}",))


def _fates(plan: Plan, fate: str) -> Iterator[str]:
    for pair, count in plan.facts.get(fate, {}).items():
        yield f"{fate}: {pair}, {counted(count, 'weight')}"


def _dropped(plan: Plan) -> Iterator[str]:
    if names := plan.facts.get("dropped"):
        yield f"dropped: {dropped(names)}"


def _sampled_gains(plan: Plan) -> dict[str, Gain]:
    """Of a plan whose weights need not be fetched for it."""
    from kconvert.report.quality import gains

    return gains(plan) if plan.source is None or plan.source.directory is not None else {}


def _error_facts(found: Mapping[str, Gain]) -> dict[str, Any]:
    """What the scales of each encoding make of a sample of the weights, as JSON."""
    if not found:
        return {}
    frobenius = {
        label: dict(zip(("mse", "amax"), gain.relative_frobenius, strict=True)) for label, gain in found.items()
    }
    return {"sqnr_db": {label: asdict(gain) for label, gain in found.items()}, "relative_frobenius": frobenius}


def summarise_amx(model: AmxModel) -> Summary:
    """`kconvert inspect` of AMX weights: what the loader cannot see, and the command that fits."""
    checkpoint, record = model.checkpoint, model.record
    origin = "@".join(str(record[key]) for key in ("source", "revision") if record.get(key))
    launch = launch_amx(place_of_amx(model))
    nbytes = sum(tensor.nbytes for weight in model.weights for tensor in weight.tensors)
    experts = sum(model.layers.values())
    facts = {
        "name": checkpoint.name,
        "method": model.method,
        "numa": model.numa,
        "scales": record.get("scales"),
        "hidden_size": model.hidden,
        "moe_intermediate_size": model.intermediate,
        "layers": {str(layer): count for layer, count in model.layers.items()},
        "format": model.form,
        "bytes": checkpoint.nbytes,
        "files": len(checkpoint.files),
        "rest": len(model.rest),
        "source": origin or None,
        "written_by": f"kconvert {record['kconvert']}" if "kconvert" in record else None,
        **launch.facts,
    }
    scales = f", scales by {record['scales']}" if "scales" in record else ""
    lines = [
        f"{checkpoint.name}: {model.method} for {counted(model.numa, 'NUMA node')}{scales}, {human(nbytes)} in "
        f"{counted(len(checkpoint.files), 'file')}",
        f"experts: {experts:,} in {_layers(model)}, gate and up "
        f"[{model.intermediate}, {model.hidden}], down [{model.hidden}, {model.intermediate}]",
        f"source: {origin or 'not recorded'}",
        *([f"besides the experts: {counted(len(model.rest), 'tensor')}"] if model.rest else []),
        *launch.lines,
    ]
    return Summary(facts, tuple(lines))


def _layers(model: AmxModel) -> str:
    first, last = min(model.layers), max(model.layers)
    return f"layer {first}" if first == last else f"layers {first} to {last}"


def launch_amx(place: Place, source: str | None = None) -> Summary:
    """The command that serves AMX weights beside the checkpoint that they were made from, if need be with a path to fill in."""
    try:
        model = source_of(place, source)
        notes: tuple[str, ...] = ()
    except KconvertError:
        model = replace(place, address=f"/path/to/{place.made_from or 'SOURCE'}", root=None)
        notes = (f"put the place of the checkpoint that it was made from for {model.address}",)
    try:
        line = launch(place, "ktransformers", source=model).line
    except KconvertError as error:
        return Summary({"no_launch": str(error)}, (f"no launch: {error}",))
    return Summary({"launch": line}, (*notes, f"launch: {line}"))
