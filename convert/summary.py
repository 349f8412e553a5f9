"""What a user wants to know about a checkpoint, a plan and a finished run: as text and as JSON."""

from __future__ import annotations

import math
import resource
import shlex
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kconvert.errors import human
from kconvert.model import Model, natural_key
from kconvert.plan import Plan

if TYPE_CHECKING:
    from kconvert.amx import AmxModel
    from kconvert.quality import Gain


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
    for weight in model.weights:
        roles[weight.role, weight.format.label].update(
            tensors=len(weight.tensors),
            parameters=weight.rows * weight.cols,
            bytes=sum(tensor.nbytes for tensor in weight.tensors),
            count=1,
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
        f"{len(checkpoint.files)} shards, {len(checkpoint.tensors):,} tensors",
        *(f"quantisation: {scheme}" for scheme in model.quantization.schemes),
        f"{'role':<20}{'format':<18}{'weights':>10}{'parameters':>20}{'size':>10}",
        *(
            f"{row['role']:<20}{row['format']:<18}{row['count']:>10,}{row['parameters']:>20,}{human(row['bytes']):>10}"
            for row in table
        ),
        *(f"finding: {finding}" for finding in findings),
    ]
    return Summary(facts, tuple(lines))


def find(model: Model) -> list[str]:
    """What is sound but worth knowing."""
    findings = [f"{file} is not part of the checkpoint and will not be copied" for file in model.checkpoint.left_out]
    findings += [f"{tensor.name} describes activations and will be dropped" for tensor in model.dropped]
    names = model.manifest.bind(model.checkpoint.config)
    for plain in model.plain:
        match = names.match(plain.tensor.name)
        if match is not None and match.rule.dtype != plain.tensor.dtype:
            findings.append(f"{plain.tensor.name} is {plain.tensor.dtype}, the published model's is {match.rule.dtype}")
    return findings


def describe_plan(plan: Plan, destination: Path, threads: int | None, memory: int | None) -> Summary:
    """`--dry-run`: output bytes, shards, peak RAM, free disk; errors on a sample of the weights where scales are a choice."""
    from kconvert.engine import Limits
    from kconvert.quality import gains

    limits = Limits.choose(threads, memory)
    folder = destination.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    facts = {
        **plan.as_dict(),
        "peak_memory_bytes": limits.peak(plan),
        "threads": limits.threads,
        "free_disk_bytes": free,
    }
    found = gains(plan)
    facts |= _error_facts(found)
    notes = [
        f"{fate}: {pair}, {count:,} weights"
        for fate in ("lossless", "recovered", "lossy")
        for pair, count in plan.facts.get(fate, {}).items()
    ]
    notes += [f"{label}: {gain} (a sample of the weights)" for label, gain in found.items()]
    notes += plan.facts.get("notes", ())
    notes += [f"dropped: {name}" for name in plan.facts.get("dropped", ())]
    notes += [f"not copied: {name}" for name in plan.facts.get("left_out", ())]
    lines = (
        *(f"{key}: {value}" for key, value in plan.facts.items() if isinstance(value, (str, int))),
        f"output: {human(plan.output_bytes)} in {len(plan.shards)} shards and {len(plan.side_files)} side files",
        f"memory: about {human(limits.peak(plan))} with {limits.threads} threads",
        f"disk: {human(free)} free at {folder}",
        *notes,
    )
    return Summary(facts, lines)


class Outcome(Summary):
    """The closing summary of a run."""

    @classmethod
    def now(
        cls, plan: Plan, destination: Path, seconds: float, inexact: Mapping[str, int], launch: str = ""
    ) -> Outcome:
        from kconvert.quality import gains

        found = gains(plan)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        facts = {
            "output": str(destination),
            "bytes": plan.output_bytes,
            "shards": len(plan.shards),
            "seconds": round(seconds, 3),
            "bytes_per_second": round(plan.output_bytes / seconds),
            "peak_memory_bytes": peak,
            "inexact_groups": dict(inexact),
        }
        facts |= _error_facts(found)
        facts |= {"launch": launch} if launch else {}
        compared = (f"{label}: {gain} (a sample of the weights)" for label, gain in found.items())
        line = (
            f"wrote {human(plan.output_bytes)} in {len(plan.shards)} shards to {destination} in {seconds:.1f} s "
            f"({plan.output_bytes / seconds / 1e9:.2f} GB/s), peak memory {human(peak)}"
        )
        notes = (*plan.facts.get("notes", ()), *([f"launch: {launch}"] if launch else ()))
        return cls(facts, (line, *_exactness(plan, inexact), *compared, *notes))


def _error_facts(found: Mapping[str, Gain]) -> dict[str, Any]:
    """What the scales of each encoding make of a sample of the weights, as JSON."""
    if not found:
        return {}
    frobenius = {
        label: dict(zip(("mse", "amax"), gain.relative_frobenius, strict=True)) for label, gain in found.items()
    }
    return {"sqnr_db": {label: asdict(gain) for label, gain in found.items()}, "relative_frobenius": frobenius}


def launch_command(weights: Path, method: str, numa: int, model: str) -> str:
    """How SGLang with KTransformers serves `model` with the experts in `weights`; the loader checks none of these flags."""
    flags = [
        "--model",
        model,
        "--kt-weight-path",
        str(weights),
        "--kt-method",
        method,
        "--kt-threadpool-count",
        str(numa),
    ]
    return shlex.join(["python", "-m", "sglang.launch_server", *flags])


def summarise_amx(model: AmxModel) -> Summary:
    """`kconvert inspect` of AMX weights: what the loader cannot see, and the command that fits."""
    checkpoint, record = model.checkpoint, model.record
    origin = "@".join(str(record[key]) for key in ("source", "revision") if record.get(key))
    launch = launch_command(checkpoint.root, model.method, model.numa, str(record.get("source") or "MODEL"))
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
        "launch": launch,
    }
    scales = f", scales by {record['scales']}" if "scales" in record else ""
    lines = [
        f"{checkpoint.name}: {model.method} for {model.numa} NUMA nodes{scales}, {human(nbytes)} in "
        f"{len(checkpoint.files):,} files",
        f"experts: {experts:,} in layers {min(model.layers)} to {max(model.layers)}, gate and up "
        f"[{model.intermediate}, {model.hidden}], down [{model.hidden}, {model.intermediate}]",
        f"source: {origin or 'not recorded'}",
        *([f"besides the experts: {len(model.rest):,} tensors"] if model.rest else []),
        f"launch: {launch}",
    ]
    return Summary(facts, tuple(lines))


def _exactness(plan: Plan, inexact: Mapping[str, int]) -> Iterator[str]:
    if inexact:
        yield (
            f"{sum(inexact.values()):,} groups in {len(inexact):,} weights have values that no codes and scale reproduce; they "
            f"were quantised by the convention's rule, first in {min(inexact, key=natural_key)!r}"
        )
    elif plan.facts.get("recovered"):
        yield "every value was reproduced exactly"
