"""Kill runs at random moments, and start everything at once; count what is lost.

    python -m benchmarks.torture --kills 50 --crowds 5 --output benchmarks/results/torture.md

Rows are kept in `.alloy/torture.jsonl`: run again after an interruption, it does what is missing.

The pipeline is the toy of `tests/flows`: DVC, Prefect and the files are real, the stages write two
small files each. After every kill the same command runs again and must end with the bits that an
undisturbed run writes. A crowd is two runs of one recipe, a run of another, DVC by hand and a
promotion, all started within a second.
"""

import argparse
import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.flows.conftest import (
    REPOSITORY,
    Workspace,
    answers,
    free_port,
    make_toy,
    snapshot,
    wait_until,
)

RUN = ("flows.pipeline", "toy")
VICTIMS = ("group", "run", "DVC or stage", "all")
"""What is killed: the run's process group, its process, one of its children, everything at once."""
ROWS_OF_A_CROWD = 7  # five commands, and both recipes afterwards
LONGEST_RUN = 300  # seconds
STAGES_SECONDS = 12  # in which the three stages run, on a machine that has nothing else to do


@contextmanager
def prefect() -> Generator[str]:
    """The address of a Prefect server for all runs."""
    url = f"http://127.0.0.1:{(port := free_port())}/api"
    command = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryDirectory() as home, (Path(home) / "log").open("w") as log:
        environment = {**os.environ, "PREFECT_HOME": home}
        server = subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=log, stderr=log
        )
        try:
            wait_until(lambda: answers(f"{url}/health"))
            yield url
        finally:
            server.kill()
            server.wait()


def change(toy: Workspace, recipe: str, text: str) -> None:
    """Make all stages of a recipe stale."""
    for stage in ("fetch", "merge", "register"):
        toy.control(f"{recipe}/{stage}.text", text)


def expected(recipe: str, text: str) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    return {
        f"{recipe}/{stage}/{file}": content
        for stage in ("fetch", "merge", "register")
        for file, content in (("first", text.encode()), ("second", b"x"))
    }


def faults(toy: Workspace, recipe: str, text: str, output: str) -> list[str]:
    """What is not as it should be after a run that nobody disturbed."""
    written = {
        name: content
        for name, content in snapshot(toy.folder / "out").items()
        if name.startswith(f"{recipe}/")
    }
    journals = list((toy.folder / ".alloy" / "kept").glob("*"))
    return [
        *(["other bits"] if written != expected(recipe, text) else []),
        *(["traceback"] if "Traceback" in output else []),
        *(["files left"] if journals or list(toy.folder.rglob("*.incomplete")) else []),
        *(["processes left"] if toy.processes() else []),
    ]


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=LONGEST_RUN)
    return output


def kill(toy: Workspace, run: subprocess.Popen[str], victim: str, choice: random.Random) -> str:
    """kill -9 what is named, and say what was; a run without children is killed itself."""
    everything = toy.pids()
    children = [pid for pid in everything if pid != run.pid]
    if victim == "DVC or stage" and not children:
        victim = "run"
    if victim == "group":
        os.killpg(run.pid, signal.SIGKILL)
    chosen = {
        "group": [],
        "run": [run.pid],
        "DVC or stage": [choice.choice(children)] if children else [],
        "all": everything,
    }[victim]
    for pid in chosen:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return victim


def kills(toy: Workspace, number: int, choice: random.Random) -> Iterator[tuple[str, str, str]]:
    """For each kill: what was killed, the stage under way, and what was wrong afterwards."""
    begun = time.monotonic()
    change(toy, "toy", "first")
    status, output = toy.run(*RUN)
    assert status == 0, output
    length = time.monotonic() - begun
    for i in range(number):
        change(toy, "toy", text := f"text {i}")
        toy.log()
        victim = choice.choice(VICTIMS)
        run = toy.start(*RUN)
        if i % 4 == 0:  # at any moment; else while stages run
            time.sleep(choice.uniform(0, length))
        else:
            wait_until((toy.folder / "log").exists)
            time.sleep(choice.uniform(0, STAGES_SECONDS))
        log = toy.log()
        under_way = log[-1].partition(" ")[2] if log and log[-1].startswith("start") else "between"
        victim = kill(toy, run, victim, choice)
        first = finish(run)
        if run.returncode == 0:
            under_way = "after the end"
        status, output = toy.run(*RUN)
        wrong = faults(toy, "toy", text, output)
        if status:
            wrong.append(f"exit {status}")
        if victim == "DVC or stage" and run.returncode not in (0, 1):
            wrong.append(f"exit {run.returncode} at the kill")
        if "Traceback" in first:
            wrong.append("traceback at the kill")
        if wrong:
            print(first, output, sep="\n---\n")
        yield victim, under_way, ", ".join(wrong) or "equal bits, nothing left"


def crowds(toy: Workspace, number: int) -> Iterator[tuple[str, str]]:
    """For each command of each crowd: what it was, and how it ended."""
    commands = {
        "run": RUN,
        "second run": RUN,
        "other recipe": ("flows.pipeline", "twin"),
        "dvc repro by hand": ("dvc", "repro", "merge@toy"),
        "promotion": ("flows.promote", "toy"),
    }
    for i in range(number):
        for recipe in ("toy", "twin"):
            change(toy, recipe, f"crowd {i}")
        started = {}
        for name, command in commands.items():
            started[name] = toy.start(*command)
            time.sleep(0.25)
        for name, process in started.items():
            output = finish(process)
            ending = f"exit {process.returncode}"
            if "is busy, it is being blocked by" in output:
                ending += ", DVC said that another process works there"
            elif "has no registered model" in output:
                ending += ", said that no model is registered"
            if "Traceback" in output:
                ending += ", traceback"
                print(output)
            yield name, ending
        for recipe in ("toy", "twin"):
            status, output = toy.run("flows.pipeline", recipe)
            wrong = faults(toy, recipe, f"crowd {i}", output)
            yield f"{recipe} afterwards", ", ".join(wrong) or f"exit {status}, right bits"


def table(rows: collections.Counter[tuple[str, ...]], titles: list[str]) -> str:
    lines = [
        f"| {' | '.join([*titles, 'times'])} |",
        f"|{'---|' * len(titles)}---:|",
        *(f"| {' | '.join([*row, str(times)])} |" for row, times in sorted(rows.items())),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--crowds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60, help="begin nothing new after that")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/torture.md"))
    parser.add_argument("--kept", type=Path, default=Path(".alloy/torture.jsonl"))
    asked = parser.parse_args()
    deadline = time.monotonic() + 60 * asked.minutes
    lines = asked.kept.read_text().splitlines() if asked.kept.exists() else []
    kept = [json.loads(line) for line in lines]
    crowded = collections.Counter(tuple(row) for row in kept if len(row) == 2)
    killed = collections.Counter(tuple(row) for row in kept if len(row) == 3)
    done = killed.total(), crowded.total() // ROWS_OF_A_CROWD
    choice = random.Random(asked.seed + done[0])
    asked.kept.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        prefect() as url,
        asked.kept.open("a", buffering=1) as record,
    ):
        toy = make_toy(Path(folder).resolve() / "toy", url, ["toy", "twin"])
        own_folders(toy)
        for counter, rows in (
            (crowded, crowds(toy, asked.crowds - done[1])),
            (killed, kills(toy, asked.kills - done[0], choice)),
        ):
            for row in rows:
                counter[row] += 1
                print(*row, sep=" | ", flush=True)
                record.write(f"{json.dumps(row)}\n")
                if time.monotonic() > deadline:
                    break
    command = "python -m benchmarks.torture"
    asked.output.write_text(
        f"# Kills and crowds\n\nWritten by `{command}` (seed {asked.seed}), whose docstring says "
        "what is done.\n\n"
        f"## {killed.total()} kills -9 at random moments, and the run after each\n\n"
        f"{table(killed, ['killed', 'under way', 'the next run'])}\n\n"
        f"## {crowded.total() // ROWS_OF_A_CROWD} crowds\n\n"
        f"{table(crowded, ['command', 'ending'])}\n"
    )


def own_folders(toy: Workspace) -> None:
    """Let each recipe of the toy write, and be controlled, in a folder of its own."""
    graph = toy.text("dvc.yaml")
    for before, after in (
        ("toy_stage.py ", "toy_stage.py ${item}/"),
        ("out/", "out/${item}/"),
        ("control/", "control/${item}/"),
    ):
        graph = graph.replace(before, after)
    # Here every stage's text comes from its own file.
    register = "cmd: python toy_stage.py ${item}/register\n      deps:\n"
    assert register in graph
    graph = graph.replace(register, f"{register}        - control/${{item}}/register.text\n")
    (toy.folder / "dvc.yaml").write_text(graph)
    twin = toy.folder / "params" / "twin.yaml"  # a registered model's name is one recipe's
    twin.write_text(twin.read_text().replace("name: alloy-modality", "name: alloy-twin"))
    gates = (REPOSITORY / "params" / "promote.yaml").read_text().partition("  multitask:")[0]
    promote = toy.folder / "params" / "promote.yaml"
    promote.write_text(gates.replace("  modality:", "  toy:"))
    for recipe in ("toy", "twin"):
        (toy.folder / "control" / recipe).mkdir()
        for stage in ("fetch", "merge", "register"):
            toy.control(f"{recipe}/{stage}.seconds", 2)


if __name__ == "__main__":
    main()
