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
ENCODERS = {
    "minilm_cosine": "MiniLM, cosine %",
    "minilm_neighbours": "same neighbour %",
    "sre_cosine": "SRE, cosine %",
    "sre_neighbours": "same neighbour %",
    "cpu_seconds": "CPU s",
}


def write() -> None:
    lines = ["# Real towers", "", "Commands: `benchmarks/towers/study.yaml`.", "", *_slack()]
    for layers in dict.fromkeys(p.stem.split("_")[1] for p in sorted(RESULTS.glob("whisper_*"))):
        draws = [found["arms"] for found in _read(f"whisper_{layers}_*.json")]
        lines += ["", f"## Whisper tiny.en, pairs of blocks: {layers}, draws: {len(draws)}", ""]
        lines += _grid(_by_arm(draws))
    if found := _read("distilled_*.json"):
        draws = [{f"{n}, {k}": v for n, of in one.items() for k, v in of.items()} for one in found]
        lines += ["", f"## The same after steps of distillation, draws: {len(draws)}", ""]
        lines += _grid(_by_arm(draws))
    if draws := _read("neighbours_*.json"):
        lines += ["", f"## Layers 1 and 2 of the encoder as one, draws: {len(draws)}", ""]
        lines += _grid(_by_arm(draws))
    if draws := [found["arms"] for found in _read("fine_tunes_*.json")]:
        lines += ["", f"## Two fine-tunes of MiniLM, draws: {len(draws)}", ""]
        lines += _grid(_by_arm(draws), ENCODERS)
    (RESULTS.parent / "towers.md").write_text("\n".join(lines) + "\n")


def _read(pattern: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))]


def _by_arm(draws: list[dict]) -> dict[str, list[dict]]:
    names = dict.fromkeys(name for draw in draws for name in draw)
    return {name: [draw[name] for draw in draws if name in draw] for name in names}


def _grid(rows: dict[str, list[dict]], metrics: dict[str, str] = METRICS) -> list[str]:
    table = [f"| | {' | '.join(metrics.values())} |", f"|---|{'---:|' * len(metrics)}"]
    for name, draws in rows.items():
        cells = [_cell([draw[m] for draw in draws if m in draw]) for m in metrics]
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
