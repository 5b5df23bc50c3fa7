"""docs/speed.md out of the raw figures, and of what notes.md says of them: no number of the tables is copied by hand.

python -m benchmarks.report
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = _ROOT / "benchmarks" / "results", _ROOT / "docs" / "speed.md"
_NOTES = _ROOT / "benchmarks" / "notes.md"

SHARE_AIM = {"fp32": 0.92, "bf16": 0.8, "autocast": 0.8}
"""least share of the machine's matrix rate in the same float type"""
DIFFUSERS_AIM, DALLE2_AIM, MEMORY_AIM = 1.0, 0.7, 0.8
"""most of diffusers' time (and less), of dalle2-pytorch's time, of diffusers' memory"""

_HEAD = """# Speed

Made by `python -m benchmarks.report` from `benchmarks/results/`; `make bench` measures anew. What is measured, and how, is in
[benchmarks/README.md](../benchmarks/README.md). In short: every side has the same shape (dalle2-pytorch: the same number of
parameters), the same batch and float type; the sides run in turn, bursts of matrix products between them, and medians are
shown. *share* is the network's FLOP/s, counted by the same counter for every side, over that of the matrix products. *memory*
is what the steps need beyond the weights. A sampling step is one evaluation, guided for decoder and prior; what our `prepare`
computes once a request is outside, what a peer's interface computes again at every step is inside. *share for 0.7* is the
share that we would need to take 0.7 of dalle2-pytorch's time: more than 1 says that its network has too few FLOPs for that.
"""


@dataclass(frozen=True)
class Speed:
    """One side of a cell: median milliseconds a step, share of the matrix rate, bytes beyond the weights."""

    milliseconds: float
    share: float
    peak_bytes: int


def speeds(cell: dict[str, Any]) -> dict[str, Speed]:
    """Each side of a measurement by its package."""
    rate = median(cell["matrix_flops_per_second"])
    return {
        package: Speed(
            milliseconds=1000 * median(facts["seconds"]),
            share=facts["flops"] / median(facts["seconds"]) / rate,
            peak_bytes=facts["peak_bytes"],
        )
        for package, facts in cell["sides"].items()
    }


def missed(cell: dict[str, Any]) -> list[str]:
    """The aims that a measurement does not reach."""
    sides = speeds(cell)
    ours, diffusers, dalle2 = sides["unclip"], sides["diffusers"], sides.get("dalle2-pytorch")
    reached = {
        f"share ≥ {SHARE_AIM[cell['precision']]}": ours.share >= SHARE_AIM[cell["precision"]],
        "faster than diffusers": ours.milliseconds < DIFFUSERS_AIM * diffusers.milliseconds,
        f"≤ {DALLE2_AIM} of dalle2-pytorch": dalle2 is None or ours.milliseconds <= DALLE2_AIM * dalle2.milliseconds,
        f"memory ≤ {MEMORY_AIM}": ours.peak_bytes <= MEMORY_AIM * diffusers.peak_bytes,
    }
    return [aim for aim, is_reached in reached.items() if not is_reached]


def line(cell: dict[str, Any]) -> str:
    """A measurement as a row of `table`."""
    sides = speeds(cell)
    ours, diffusers, dalle2 = sides["unclip"], sides["diffusers"], sides.get("dalle2-pytorch")
    pixels = f" x {cell['pixels']} px" if cell["pixels"] else ""
    columns = [
        f"{cell['row']} {cell['step']}",
        f"{cell['batch']}{pixels}",
        cell["precision"] if cell["variant"] == "eager" else f"{cell['precision']}, {cell['variant']}",
        *(f"{ours.milliseconds:.0f}", f"{ours.share:.2f}"),
        *(f"{diffusers.milliseconds:.0f}", f"{diffusers.share:.2f}"),
        f"{ours.milliseconds / diffusers.milliseconds:.2f}",
        f"{ours.peak_bytes / max(1, diffusers.peak_bytes):.2f}",
        *((f"{dalle2.milliseconds:.0f}", f"{dalle2.share:.2f}") if dalle2 else ("", "")),
        f"{ours.milliseconds / dalle2.milliseconds:.2f}" if dalle2 else "",
        f"{ours.share * ours.milliseconds / (DALLE2_AIM * dalle2.milliseconds):.2f}" if dalle2 else "",
        ", ".join(missed(cell)),
    ]
    return f"| {' | '.join(columns)} |"


def table(results: dict[str, Any]) -> str:
    """The measurements of one run as a Markdown table."""
    columns = ["step", "batch", "float type", "unclip ms", "share", "diffusers ms", "share", "time ratio"]
    columns += ["memory ratio", "dalle2-pytorch ms", "share", "time ratio", f"share for {DALLE2_AIM}", "aims missed"]
    rows = [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns), *map(line, results["cells"])]
    return "\n".join(rows)


def page(runs: list[dict[str, Any]]) -> str:
    """The text of docs/speed.md."""
    return "\n".join([_HEAD, *(_section(run) for run in runs), _NOTES.read_text(encoding="utf-8")])


def _section(results: dict[str, Any]) -> str:
    machine, cells = results["machine"], results["cells"]
    versions = sorted({f"{p} {f['version']}" for c in cells for p, f in c["sides"].items()})
    parts = [
        f"## Size `{results['size']}`",
        f"{machine['device']}, {machine['threads']} threads of {machine['cores']} cores; PyTorch {machine['torch']}, "
        f"{', '.join(versions)}; {results['date']}; medians of {results['rounds']} runs. Load average when it began: "
        f"{machine['load_average'][0]:.1f}. Matrix rate: {', '.join(_rates(cells))}.",
        table(results),
    ]
    return "\n\n".join(parts) + "\n"


def _rates(cells: list[dict[str, Any]]) -> Iterator[str]:
    for name, precisions in (("fp32", ["fp32"]), ("bf16", ["bf16", "autocast"])):
        rates = [rate for c in cells if c["precision"] in precisions for rate in c["matrix_flops_per_second"]]
        if rates:
            yield f"{median(rates) / 1e9:.0f} GFLOP/s in {name}"


def newest(folder: Path) -> list[dict[str, Any]]:
    """The latest run of every size, by size."""
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("networks-*.json")]
    latest = {run["size"]: run for run in sorted(runs, key=lambda run: run["date"])}
    return [latest[size] for size in sorted(latest)]


def main() -> None:
    PAGE.write_text(page(newest(RESULTS)), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
