"""What the pipeline costs around a merge that is nothing: 0.9 MB, merged as it is, two arms.

    python -m benchmarks.rest                     # this checkout's last commit
    python -m benchmarks.rest --commit 83c9e16    # before stages imported less
    python -m benchmarks.rest --gigabytes 12      # and with so much among what fetch reads

A clone of the commit gets three ViTs and a recipe. `first` begins with neither compiled kernels nor
databases; `again` is a changed parameter; `unchanged` and `promote` are what they say. `large` has
DVC hash sparse files once, for a stage that depends on them; `large unchanged` is a run after that.
CPU seconds count every process that was started, Prefect's server included; they are what to
compare on a machine that does other work.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

RECIPE = """\
kind: models
fetch:
  model_type: vit
  checkpoints: {base: given/base, cats: given/cats, dogs: given/dogs}
members: [cats, dogs]
merge:
  result: ties
  arms:
    ties: {method: ties, base: base, options: {density: 0.3}}
    average: {method: linear}
evaluate: {tssd_keep: 0.2}
register: {name: rest, model: merged}
"""


def models(folder: Path) -> None:
    """Three ViTs of 0.9 MB."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=6, num_attention_heads=4,
        image_size=32, patch_size=8,
    )  # fmt: skip
    for seed, name in enumerate(("base", "cats", "dogs")):
        torch.manual_seed(seed)
        ViTForImageClassification(config).save_pretrained(folder / name)


def workspace(folder: Path, commit: str) -> None:
    """A clone of a commit of this checkout with the recipe `rest`."""
    subprocess.run(["git", "clone", "--quiet", str(Path.cwd()), str(folder)], check=True)
    subprocess.run(["git", "checkout", "--quiet", commit], cwd=folder, check=True)
    models(folder / "given")
    (folder / "params/rest.yaml").write_text(RECIPE)
    with (folder / "params/recipes.yaml").open("a") as recipes:
        recipes.write("  - rest\n")


def seconds(folder: Path, *command: str) -> dict[str, float]:
    """Wall and CPU seconds of a module's process and all that it started."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = {**own, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": round(time.monotonic() - begun, 1), "cpu": round(used, 1)}


def measure(commit: str, gigabytes: int) -> dict[str, dict[str, float]]:
    """The seconds of each command, told as they are found, in a clone that is then removed."""
    found: dict[str, dict[str, float]] = {}

    def run(name: str, *command: str) -> None:
        found[name] = seconds(folder, *command)
        print(f"{name}: {found[name]}", flush=True)

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "alloy"
        workspace(folder, commit)
        run("first", "flows.pipeline", "rest")
        params = folder / "params/rest.yaml"
        params.write_text(params.read_text().replace("density: 0.3", "density: 0.4"))
        run("again", "flows.pipeline", "rest")
        run("unchanged", "flows.pipeline", "rest")
        run("promote", "flows.promote", "rest", "--regardless", "benchmark")
        if gigabytes:
            for number in range(gigabytes):
                place = folder / f"released/large/{number}.bin"
                place.parent.mkdir(exist_ok=True)
                with place.open("wb") as file:
                    file.truncate(10**9)
            run("large", "flows.pipeline", "rest", "--to", "fetch")
            run("large unchanged", "flows.pipeline", "rest")
        return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--commit", default="HEAD", help="of this checkout (HEAD)")
    parser.add_argument("--gigabytes", type=int, default=0, help="of files beside a run (0)")
    options = parser.parse_args(arguments)
    found = measure(options.commit, options.gigabytes)
    print(json.dumps({"commit": options.commit, "load": os.getloadavg()[1], **found}, indent=2))


if __name__ == "__main__":
    main()
