"""`halo bench --report`: what was measured beside what the roofline expects, to paste into an issue.

The expectation of a GPU is engine/roofline.py's, kernel by kernel; of the CPU it is the bytes that a token
reads by the bandwidth that was measured, and there is none of its prefill. Nothing is measured here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from engine.roofline import CHIPS, Chip, Shape, Step, decode_step, prefill_steps

GPU_BACKENDS: Final = ("hip", "cuda", "sim")


def is_gpu(facts: dict[str, Any]) -> bool:
    """Whether these are facts of a GPU's library."""
    return facts.get("backend") in GPU_BACKENDS


def chip_of(facts: dict[str, Any], bandwidth: float | None = None) -> Chip:
    """The chip that the facts name; `bandwidth` in bytes a second wins over what is known of it."""
    name = str(facts.get("arch", ""))
    known = CHIPS.get(name, Chip(name, 0.0))
    return Chip(name, bandwidth, known.launch, known.operations) if bandwidth else known


def shape_of(model: Path, facts: dict[str, Any]) -> Shape:
    """The prepared file's model as the GPU of these facts has it."""
    from engine.formats.prepared import read_directory

    config, entries = read_directory(model)
    rows = "embedding" if config.tie_embeddings else "head"
    size = next(entry.size for entry in entries if entry.name == rows)
    packing = facts.get("packing", "base_three")
    return Shape(config, packing, str(facts.get("kv", "int8")), size // config.vocab_size)


def expect_gpu(line: dict[str, Any], shape: Shape, chip: Chip, tokens: int) -> dict[str, Any] | None:
    """Of one line of the table: the rate to expect, and what it is made of; None where nothing is known."""
    if not chip.bandwidth or line["batch"] > 16:
        return None
    step = step_of(line, shape, tokens)
    return {
        "tokens_per_second": step.rate(chip),
        "seconds": step.seconds(chip),
        "launch_seconds": step.launches * chip.launch,
        "launches": step.launches,
        "bytes": round(step.bytes),
    }


def step_of(line: dict[str, Any], shape: Shape, tokens: int) -> Step:
    """The pass over the layers that a line's rate is of, at the middle of the contexts it went through."""
    if line["kind"] == "prefill":
        return prefill_steps(shape, line["context"])
    return decode_step(shape, line["context"] + tokens / 2, line["batch"])


def expect_cpu(line: dict[str, Any], bandwidth: float) -> dict[str, Any] | None:
    """Of one line: the bytes of its step by the bandwidth; None for prefill, which is not bound by it."""
    if line["kind"] == "prefill" or not bandwidth:
        return None
    size = line["bytes_a_token"] * line["batch"]
    seconds = size / bandwidth
    return {
        "tokens_per_second": line["batch"] / seconds,
        "seconds": seconds,
        "launch_seconds": 0.0,
        "launches": 0,
        "bytes": size,
    }


def kernel_rows(step: Step, chip: Chip) -> list[str]:
    """A table of what a step is expected to be made of."""
    whole = step.seconds(chip)
    rows = ["| kernel | launches | MB each | ms | share |", "|---|---|---|---|---|"]
    for kernel in step.kernels:
        spent = kernel.seconds(chip)
        rows.append(
            f"| {kernel.name} | {kernel.launches} | {kernel.bytes / 1e6:.3f} | {1e3 * spent:.3f} "
            f"| {spent / whole:.0%} |"
        )
    return rows


def issue_text(result: dict[str, Any]) -> list[str]:
    """The report as lines of Markdown."""
    return [*_head(result), "", *_lines(result), *_kernels(result)]


def _head(result: dict[str, Any]) -> list[str]:
    engine, machine, model = result["engine"], result["machine"], result["model"]
    device = " ".join(str(engine[key]) for key in ("device", "arch") if engine.get(key)) or machine["cpu"]
    reason = f" ({engine['backend_reason']})" if engine.get("backend_reason") else ""
    ways = [f"{key} {engine[key]}" for key in ("isa", "packing", "kv") if engine.get(key)]
    roof = result["roofline"]
    bandwidth = f"{roof['bandwidth'] / 1e9:.1f} GB/s ({roof['source']})" if roof["bandwidth"] else "not known"
    lines = [
        f"- backend {engine.get('backend', '?')}{reason}: {device}; {', '.join(ways)}",
        f"- {machine['cpu']}, {machine['cpus']} CPUs, Linux {machine['kernel']}, "
        f"load {machine.get('one_minute', 0):.1f}",
        f"- model {model['name']}: {model['bytes_a_token']['total'] / 1e6:.0f} MB of weights a token, "
        f"{result['kv_bytes_a_position'] / 1e3:.1f} kB of KV a position",
        f"- expected from: bandwidth {bandwidth}, {roof['launch'] * 1e6:.2f} us a launch"
        + (f", {roof['operations'] / 1e12:.1f}e12 int8 operations a second" if roof["operations"] else ""),
    ]
    return [*lines, *(f"- warning: {warning}" for warning in result["warnings"])]


def _lines(result: dict[str, Any]) -> list[str]:
    titles = (
        "measurement",
        "measured, tokens/s",
        "ms a step",
        "expected, tokens/s",
        "ms a step",
        "of which launches",
        "measured / expected",
        "MB a step",
        "launches",
    )
    rows = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for line in result["lines"]:
        rate, wanted = line["halo"]["median"], line.get("expected")
        tokens = line["context"] if line["kind"] == "prefill" else line["batch"]
        cells = [measurement_name(line), f"{rate:.1f}", f"{1e3 * tokens / rate:.3f}"]
        if wanted:
            cells += [f"{wanted['tokens_per_second']:.1f}", f"{1e3 * wanted['seconds']:.3f}"]
            cells += [f"{1e3 * wanted['launch_seconds']:.3f}", f"{rate / wanted['tokens_per_second']:.0%}"]
            cells += [f"{wanted['bytes'] / 1e6:.0f}", str(wanted["launches"] or "")]
        else:
            cells += [""] * (len(titles) - len(cells))
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def measurement_name(line: dict[str, Any]) -> str:
    """What was measured, in the words of the tables."""
    if line["kind"] == "prefill":
        return f"prefill {line['context']}"
    batch = f", {line['batch']} sequences" if line["batch"] > 1 else ""
    return f"decode at {line['context']}{batch}"


def _kernels(result: dict[str, Any]) -> list[str]:
    table = result.get("kernels")
    return ["", f"Expected of each kernel ({table['of']}):", "", *table["rows"]] if table else []


def add_expectations(
    result: dict[str, Any], model: Path, bandwidth: float | None, bandwidths: dict[int, float]
) -> None:
    """Put `roofline`, each line's `expected` and (of a GPU) `kernels` into a result of engine/bench.py."""
    facts, tokens = result["engine"], result["settings"]["tokens"]
    if not is_gpu(facts):
        limit = max(bandwidths.values(), default=0.0)
        source = "stated" if bandwidth else "measured"
        result["roofline"] = {"bandwidth": limit, "source": source, "launch": 0.0, "operations": 0.0}
        for line in result["lines"]:
            line["expected"] = expect_cpu(line, bandwidths.get(line["threads"], 0.0))
        return
    chip, shape = chip_of(facts, bandwidth), shape_of(model, facts)
    result["roofline"] = {
        "bandwidth": chip.bandwidth,
        "source": "as others measured" if chip == CHIPS.get(chip.name) else "stated",
        "launch": chip.launch,
        "operations": chip.operations,
    }
    for line in result["lines"]:
        line["expected"] = expect_gpu(line, shape, chip, tokens)
    decodes = [line for line in result["lines"] if line["kind"] == "decode" and line["expected"]]
    if decodes:
        rows = kernel_rows(step_of(decodes[0], shape, tokens), chip)
        result["kernels"] = {"of": measurement_name(decodes[0]), "rows": rows}
