"""The study's parts, each of which writes one file of results."""

import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from alloy.trunk import Member, TrunkPlan, merge_trunk, plan_trunk
from alloy.trunk.merging import Work
from benchmarks.towers import minilm, sources, whisper

HERE = Path(__file__).parent
DATA = Path("data/towers_study")
RESULTS = Path("benchmarks/results/towers")
PARAMS: dict[str, Any] = yaml.safe_load((HERE / "params.yaml").read_text())
PARTS = {"encoder": "model.encoder.layers", "decoder": "model.decoder.layers"}


def fetch() -> None:
    sources.fetch(DATA)


def write(name: str, values: Any) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n")


def read(name: str) -> Any:
    """What a part has written so far."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _plan(model: Any, batch: dict[str, Any], layers: str) -> TrunkPlan:
    chosen = None if layers == "all" else [int(i) for i in layers]
    members = {name: Member(part=part, layers=chosen) for name, part in PARTS.items()}
    examples = {name: tensor[:2] for name, tensor in batch.items()}
    return plan_trunk(model, members, examples, turn=True)


def slack() -> None:
    """Dims that hold 90, 99 and 99.9 % of what layers of both towers read from their streams."""
    model = sources.whisper(DATA)
    batches = whisper.batches(model, DATA, PARAMS["slack"], 0)
    plan, rows = _plan(model, batches[0], "all"), []
    work = Work(plan, {"model": [*batches]}, weigh=False)
    family = work.family({"model": work.canonical("model", fold=True)})
    for member, grams in work.grams(family).items():
        for name, gram in grams.items():
            width = len(gram.sum_DD) - 1
            if width > 384 or name.endswith(("k_proj.weight", "v_proj.weight")):
                continue  # neurons; and what queries read as well
            energies = torch.linalg.eigvalsh(gram.sum_DD[:-1, :-1]).flip(0).clamp(min=0)
            share = energies.cumsum(0) / energies.sum()
            dims = [int((share < part).sum()) + 1 for part in (0.9, 0.99, 0.999)]
            rows.append({"member": member, "layer": name, "width": width, "dims": dims})
    write("slack", rows)


def _arms(plan: TrunkPlan, batches: list, settings: dict[str, Any]) -> Any:
    for name, options in settings.items():
        start = time.process_time()
        trunk = merge_trunk(plan, batches, **options)
        yield name, trunk, time.process_time() - start


def whisper_trunks(layers: str, draw: str) -> None:
    """Arms of PARAMS on Whisper's two towers, for some of the pairs of blocks and one draw."""
    torch.manual_seed(0)
    model = sources.whisper(DATA)
    batches = whisper.batches(model, DATA, PARAMS["calibration"], int(draw))
    held_out = whisper.held_out(model, DATA, PARAMS["held_out"])
    plan = _plan(model, batches[0], layers)
    result: dict[str, Any] = {"parameters": plan.num_parameters, "arms": {}}
    for name, trunk, seconds in _arms(plan, batches, PARAMS["arms"]):
        scores = whisper.measure(trunk.model, held_out, DATA)
        found = {**scores, "cpu_seconds": round(seconds)}
        if trunk.gauge is not None:
            found["error"] = [trunk.gauge.error_before, trunk.gauge.error_after]
        result["arms"][name] = found
        print(layers, draw, name, found, flush=True)
        write(f"whisper_{layers}_{draw}", result)


def distilled(layers: str, draw: str) -> None:
    """The arms of PARAMS["distilled"], trained against the parent without labels.

    What the file of results has is not made again.
    """
    from alloy.trunk.distill import distil

    torch.manual_seed(0)
    model = sources.whisper(DATA)
    batches = whisper.batches(model, DATA, PARAMS["calibration"], int(draw))
    held_out = whisper.held_out(model, DATA, PARAMS["held_out"])
    training = whisper.batches(
        model, DATA, PARAMS["training"], int(draw) + 500, size=PARAMS["batch_size"]
    )
    parent, plan = whisper.remembering(model), _plan(model, batches[0], layers)
    name = f"distilled_{layers}_{draw}"
    result, merged = read(name), {}
    for steps, arms in PARAMS["distilled"][int(draw)].items():
        for arm in (arm for arm in arms if str(steps) not in result.get(arm, {})):
            if arm not in merged:
                ((_, trunk, _),) = _arms(plan, batches, {arm: PARAMS["arms"][arm]})
                merged[arm] = trunk.model
            start = time.process_time()
            student = distil(merged[arm], parent, training, steps=steps, progress=_tell)
            seconds = round(time.process_time() - start)
            scores = whisper.measure(student, held_out, DATA)
            result.setdefault(arm, {})[str(steps)] = {**scores, "cpu_seconds": seconds}
            print(layers, draw, arm, steps, result[arm][str(steps)], flush=True)
            write(name, result)


def _tell(step: int, loss: float) -> None:
    if step % 50 == 0:
        seconds = round(time.process_time())
        print(f"step {step}: loss {loss:.3f}, {seconds} CPU s so far", flush=True)


def neighbours(draw: str) -> None:
    """Two neighbouring layers of Whisper's encoder as one, for one draw.

    What the file of results has is not made again.
    """
    torch.manual_seed(0)
    model = sources.whisper(DATA)
    batches = whisper.batches(model, DATA, PARAMS["calibration"], int(draw))
    held_out = whisper.held_out(model, DATA, PARAMS["held_out"])
    examples = {name: tensor[:2] for name, tensor in batches[0].items()}
    members = {"first": f"{PARTS['encoder']}.1", "second": f"{PARTS['encoder']}.2"}
    plan, result = plan_trunk(model, members, examples), read(f"neighbours_{draw}")
    arms = {n: PARAMS["arms"][n] for n in PARAMS["neighbours"] if n not in result}
    for name, trunk, seconds in _arms(plan, batches, arms):
        scores = whisper.measure(trunk.model, held_out, DATA)
        result[name] = {**scores, "cpu_seconds": round(seconds)}
        print("neighbours", draw, name, result[name], flush=True)
        write(f"neighbours_{draw}", result)


def fine_tunes(draw: str) -> None:
    """Two fine-tunes of MiniLM, for one draw of sentences.

    What the file of results has is not made again.
    """
    torch.manual_seed(0)
    pair = minilm.Pair(DATA)
    fitted, held_out = pair.draw(int(draw))
    examples = {name: tensor[:2] for name, tensor in fitted[0].items()}
    members = {name: Member(part=minilm.PART, checkpoint=name) for name in pair.models}
    plan = plan_trunk(pair.models, members, examples)
    fresh = {"parameters": plan.num_parameters, "arms": {}}
    result: dict[str, Any] = read(f"fine_tunes_{draw}") or fresh
    arms = {n: of for n, of in PARAMS["fine_tunes"].items() if n not in result["arms"]}
    for name, trunk, seconds in _arms(plan, fitted, arms):
        scores = pair.measure(dict(trunk.models), held_out)
        found = {**scores, "cpu_seconds": round(seconds)}
        if trunk.gauge is not None:
            found["error"] = [trunk.gauge.error_before, trunk.gauge.error_after]
        result["arms"][name] = found
        print("fine-tunes", draw, name, found, flush=True)
        write(f"fine_tunes_{draw}", result)


def scale(*methods: str) -> None:
    """Two towers of 12 layers at width 768, with random weights."""
    from benchmarks.towers.scale import measure

    write("scale", measure(*methods))
