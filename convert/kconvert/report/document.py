"""What `verify` and `inspect` found, as plain data: the JSON report, and all that the HTML page shows.

The schemas are verify.schema.json and inspect.schema.json beside this file.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from kconvert.models.model import Model, format_counts
from kconvert.proof.inventory import Inventory
from kconvert.proof.logits import LogitsReport
from kconvert.proof.parity.codes import QUARTERS
from kconvert.proof.parity.compare import Comparison
from kconvert.proof.parity.metrics import Errors, Spread
from kconvert.proof.verify import Excerpt, Report
from kconvert.report.summary import summarise
from kconvert.run.state.heads import provenance
from kconvert.version import __version__


def verify_document(
    report: Report, command: str, logits: LogitsReport | None = None, details: bool = True
) -> dict[str, Any]:
    """The report of `kconvert verify`; without `details` no list that grows with the number of weights."""
    comparisons = report.comparisons
    by_role = _grouped(comparisons, lambda c: (c.role, c.output_format))
    by_layer = _grouped(comparisons, lambda c: (c.layer, c.role))
    formats = {c.output_format: c for c in comparisons if c.judged_by == "limits"}
    return {
        "schema": "kconvert-verify-1",
        "kconvert": __version__,
        "command": command,
        "verdict": "failed" if report.faults else "passed",
        "reference": report.reference,
        "standard": "exact" if report.standard.exact else "limits",
        "limits": {label: asdict(report.standard.limits_for(label)) for label in sorted(formats)},
        "source": _side(report.source),
        "output": _side(report.output),
        "weights": report.weights,
        "tensors": report.tensors,
        "skipped": report.skipped,
        "side_files": report.side_files,
        "dropped": list(report.dropped),
        "faults": list(report.faults),
        "notes": list(report.notes),
        "totals": metrics([c.errors for c in comparisons]),
        "roles": [
            {"role": role, "format": label, **_summed(group), **_distributions(report.spreads[role, label])}
            for (role, label), group in by_role.items()
        ],
        "layers": [{"layer": layer, "role": role, **_summed(group)} for (layer, role), group in by_layer.items()],
        "worst": [_excerpt(excerpt) for excerpt in report.worst],
        "logits": asdict(logits) if logits else None,
        **(_details(comparisons) if details else {}),
    }


def _details(comparisons: Iterable[Comparison]) -> dict[str, Any]:
    by_expert = _grouped((c for c in comparisons if c.expert is not None), lambda c: (c.layer, c.expert))
    return {
        "experts": [{"layer": layer, "expert": n, **_summed(group)} for (layer, n), group in by_expert.items()],
        "results": [_result(comparison) for comparison in comparisons],
    }


def inspect_document(model: Model, inventory: Inventory, command: str) -> dict[str, Any]:
    """The report of `kconvert inspect`."""
    sizes: Counter[tuple[str, int | None, str]] = Counter()
    for weight in model.weights:
        sizes[weight.role, weight.layer, weight.format.label] += sum(tensor.nbytes for tensor in weight.tensors)
    for plain in model.plain:
        sizes[plain.role, plain.layer, plain.tensor.dtype.lower()] += plain.tensor.nbytes
    return {
        "schema": "kconvert-inspect-1",
        "kconvert": __version__,
        "command": command,
        "source": _side(model),
        "summary": summarise(model).as_dict(),
        "sizes": [
            {"role": role, "layer": layer, "format": label, "bytes": nbytes}
            for (role, layer, label), nbytes in sizes.items()
        ],
        "grids": [
            {
                "role": role,
                "format": label,
                "weights": sample.weights,
                "groups": asdict(sample.extremes),
                "convention": sample.convention,
                **_distributions(sample.spread),
            }
            for (role, label), sample in inventory.items()
        ],
    }


def metrics(errors: Iterable[Errors]) -> dict[str, Any]:
    """The metrics of all these together; an SQNR of null is that of no error at all."""
    total = sum(errors, Errors())
    return {
        "elements": total.elements,
        "different": total.different,
        "nonfinite": total.nonfinite,
        "max_abs": total.max_abs,
        "max_relative": total.max_relative,
        "sqnr": total.sqnr,
        "cosine": total.cosine,
        "frobenius": total.frobenius,
    }


def _grouped(
    comparisons: Iterable[Comparison], key: Callable[[Comparison], tuple[Any, Any]]
) -> dict[tuple[Any, Any], list[Comparison]]:
    groups = defaultdict(list)
    for comparison in comparisons:
        groups[key(comparison)].append(comparison)
    return groups


def _summed(group: list[Comparison]) -> dict[str, Any]:
    facts = {
        "weights": len(group),
        "equal": sum(c.equal for c in group),
        "faults": sum(c.fault is not None for c in group),
    }
    return {**facts, **metrics(c.errors for c in group)}


def _result(comparison: Comparison) -> dict[str, Any]:
    keys = (
        "name",
        "role",
        "layer",
        "expert",
        "rows",
        "cols",
        "source_format",
        "output_format",
        "judged_by",
        "equal",
        "fault",
    )
    use = comparison.use
    return {
        **{key: getattr(comparison, key) for key in keys},
        **metrics([comparison.errors]),
        "worst": asdict(comparison.errors.worst) if comparison.errors.worst else None,
        **{key: getattr(use, key, None) for key in ("saturated", "unused", "zero_groups", "outlier_groups")},
    }


def _distributions(spread: Spread) -> dict[str, Any]:
    """Lists of [value, count]: rows by dB, codes by value, scales by their lower bound."""
    scales = [[2.0 ** (quarter / QUARTERS), count] for quarter, count in sorted(spread.scales.items())]
    return {
        "rows_by_sqnr": [list(pair) for pair in sorted(spread.rows.items())],
        "codes": [list(pair) for pair in sorted(spread.codes.items())],
        "scales": scales,
    }


def _excerpt(excerpt: Excerpt) -> dict[str, Any]:
    return {
        "name": excerpt.weight,
        **asdict(excerpt.at),
        "first_col": excerpt.first,
        "source_values": list(excerpt.expected),
        "output_values": list(excerpt.found),
    }


def _side(model: Model) -> dict[str, Any]:
    checkpoint = model.checkpoint
    name, _, revision = checkpoint.name.partition("@")
    return {
        "name": name,
        "revision": revision or None,
        "manifest": model.manifest.name,
        "bytes": checkpoint.nbytes,
        "shards": len(checkpoint.files),
        "parameters": model.parameters,
        "formats": dict(format_counts(model.weights)),
        "quantization": [str(scheme) for scheme in model.quantization.schemes],
        "written_by": provenance(checkpoint.root) or None,
    }
