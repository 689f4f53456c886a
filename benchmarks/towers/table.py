"""Tables of the study, as Markdown."""

import json
from statistics import fmean, stdev

from benchmarks.towers.study import RESULTS

METRICS = {
    "cross_entropy": "cross-entropy",
    "agreement": "agreement %",
    "word_error_rate": "word errors %",
    "same_transcripts": "same transcripts %",
    "cpu_seconds": "CPU s",
}


def write() -> None:
    lines = ["# Real towers", "", "Commands: `benchmarks/towers/dvc.yaml`.", "", *_slack()]
    draws: dict[str, list[dict]] = {}
    for path in sorted(RESULTS.glob("whisper_*.json")):
        _, layers, _ = path.stem.split("_")
        draws.setdefault(layers, []).append(json.loads(path.read_text())["arms"])
    for layers, results in draws.items():
        lines += ["", f"## Whisper tiny.en, pairs of blocks: {layers}, draws: {len(results)}", ""]
        lines += _grid({name: [r[name] for r in results if name in r] for name in results[0]})
    for path in sorted(RESULTS.glob("distilled_*.json")):
        lines += ["", f"## {path.stem}: steps of distillation", ""]
        rows = json.loads(path.read_text())
        lines += _grid({f"{n}, {k}": [v] for n, of in rows.items() for k, v in of.items()})
    if (path := RESULTS / "neighbours.json").is_file():
        lines += ["", "## Layers 1 and 2 of the encoder as one", ""]
        lines += _grid({name: [v] for name, v in json.loads(path.read_text()).items()})
    (RESULTS.parent / "towers.md").write_text("\n".join(lines) + "\n")


def _grid(rows: dict[str, list[dict]]) -> list[str]:
    table = [f"| | {' | '.join(METRICS.values())} |", f"|---|{'---:|' * len(METRICS)}"]
    for name, draws in rows.items():
        cells = [_cell([draw[m] for draw in draws if m in draw]) for m in METRICS]
        table.append(f"| {name} | {' | '.join(cells)} |")
    return table


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    return f"{fmean(values):.4g}" + (f" ± {stdev(values):.2g}" if len(values) > 1 else "")


def _slack() -> list[str]:
    path = RESULTS / "slack.json"
    if not path.is_file():
        return []
    lines = ["## Dims that hold 90, 99 and 99.9 % of what a layer reads, over the width", ""]
    lines += ["| layer | encoder | decoder | both, 90 % | both, 99 % |", "|---|---|---|---:|---:|"]
    rows = json.loads(path.read_text())
    found = {(r["member"], r["layer"]): r for r in rows}
    for layer in dict.fromkeys(r["layer"] for r in rows):
        own = [found[member, layer] for member in ("encoder", "decoder")]
        shares = [[d / r["width"] for d in r["dims"]] for r in own]
        cells = [" ".join(f"{share:.2f}" for share in of) for of in shares]
        cells += [f"{sum(of[i] for of in shares):.2f}" for i in (0, 1)]
        lines.append(f"| {layer.removesuffix('.weight')} | {' | '.join(cells)} |")
    return lines
