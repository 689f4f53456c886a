"""Merging straight from a bucket, by ranges, against downloading it, and against both in turn.

    python -m benchmarks.ranges            about 3 minutes on two cores, 2 GB of disk
    python -m benchmarks.ranges --quick    checkpoints of 34 MB instead of 250 MB, one round

Three checkpoints lie in a SeaweedFS bucket on this machine, behind a link of 100 MB/s, as a machine
in a cloud has it, and without one, where server, link and merge share the cores. Every round runs
everything in turn, in processes that have merged before; ratios compare neighbours in time. `ranges
alone` brings every byte into memory and drops it: the least that any reader of the bucket takes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.cold import USUAL
from benchmarks.merge import BASE, MODELS, QUICK, Bench, Size, inputs, machine
from tests import servers

RESULTS = Path("benchmarks/results/ranges.md")
LINK_BYTES = 100e6
"""A second, through the limited link."""
BUCKET = "models"
PARTS = ("ranges alone", "download", "download, then linear", "linear by ranges")
TIES = ("download, then ties", "ties by ranges")
Measured = dict[str, list[tuple[float, float]]]


def link(target: int, bytes_a_second: float) -> None:
    """Pass bytes to a port on this machine, at most so many a second in all; print the own port."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    lock, due = threading.Lock(), [time.monotonic()]

    def pump(source: socket.socket, sink: socket.socket, limited: bool) -> None:
        try:
            while piece := source.recv(1 << 18):
                if limited:
                    with lock:
                        due[0] = max(due[0], time.monotonic()) + len(piece) / bytes_a_second
                    time.sleep(max(0.0, due[0] - time.monotonic()))
                sink.sendall(piece)
        except OSError:
            pass
        for end in (source, sink):
            end.close()

    while True:
        client, _ = listener.accept()
        server = socket.create_connection(("127.0.0.1", target))
        threading.Thread(target=pump, args=(client, server, False), daemon=True).start()
        threading.Thread(target=pump, args=(server, client, True), daemon=True).start()


def upload(folder: Path) -> None:
    """Put the checkpoints into the bucket, and remove them here."""
    from tasks.sources.s3 import s3_client

    client = s3_client()
    client.create_bucket(Bucket=BUCKET)
    for model in (BASE, *MODELS):
        for path in sorted((folder / model).iterdir()):
            client.upload_file(str(path), BUCKET, f"{model}/{path.name}")
        shutil.rmtree(folder / model)


def measure(folder: Path, endpoint: str, rounds: int) -> Measured:
    """Run every part so many times in turn, in this process."""
    import alloy
    from tasks.sources import fetch, transfer
    from tasks.sources.resolve import files_to_bring, resolve
    from tasks.sources.streamed import streamed

    os.environ["AWS_ENDPOINT_URL"] = endpoint
    out, copies = folder / "out", folder / "copies"
    sources = {name: f"s3://{BUCKET}/{name}" for name in MODELS}
    ties = {"base": f"s3://{BUCKET}/{BASE}", **sources}

    def ranges_alone() -> None:
        files = [file for source in sources.values() for file in files_to_bring(resolve(source))]
        step = transfer.RANGE_BYTES
        spans = [(f, i, min(i + step, f.size)) for f in files for i in range(0, f.size, step)]
        with ThreadPoolExecutor(transfer.CONNECTIONS) as pool:
            list(pool.map(lambda span: sum(map(len, transfer.persist(*span))), spans))

    def download(named: dict[str, str] = sources) -> dict[str, Path]:
        return {name: fetch.bring(source, copies / name) for name, source in named.items()}

    def merge(method: str, places: dict[str, Path]) -> None:
        given = dict(places)
        base = given.pop("base", None)
        alloy.merge_checkpoints(method, given, out, base=base)

    def by_ranges(method: str, named: dict[str, str]) -> None:
        merge(method, {name: streamed(source) for name, source in named.items()})

    parts: dict[str, Callable[[], object]] = {
        "ranges alone": ranges_alone,
        "download": download,
        "download, then linear": lambda: merge("linear", download()),
        "linear by ranges": lambda: by_ranges("linear", sources),
        "download, then ties": lambda: merge("ties", download(ties)),
        "ties by ranges": lambda: by_ranges("ties", ties),
    }
    measured: Measured = {name: [] for name in parts}
    for number in range(rounds + 1):  # the first one compiles, and is not counted
        for name, part in parts.items():
            for rest in (out, copies, Path(os.environ["ALLOY_CACHE"])):
                shutil.rmtree(rest, ignore_errors=True)
            os.sync()
            wall, cpu = time.perf_counter(), time.process_time()
            part()
            spent = time.perf_counter() - wall, time.process_time() - cpu
            if number:
                measured[name].append(spent)
                print(f"{name}: {spent[0]:.2f} s", file=sys.stderr)
    return measured


def table(measured: Measured) -> list[str]:
    """Medians, and the ratio to the download of the same round."""
    lines = [
        "| | wall s | CPU s of the reader | / download | / ranges alone |",
        "|---|---|---|---|---|",
    ]
    for name, runs in measured.items():
        wall, cpu = (statistics.median(column) for column in zip(*runs, strict=True))
        ratios = [
            statistics.median(a[0] / b[0] for a, b in zip(runs, measured[other], strict=True))
            for other in ("download", "ranges alone")
        ]
        lines.append(f"| {name} | {wall:.2f} | {cpu:.2f} | {ratios[0]:.2f}x | {ratios[1]:.2f}x |")
    return lines


def report(size: Size, by_link: dict[str, Measured]) -> str:
    """The page of results."""
    lines = [
        "# Merging straight from a bucket, against downloading it first",
        "",
        f"`python -m benchmarks.ranges`, {time.strftime('%Y-%m-%d')}. {machine()}",
        "",
        f"Three checkpoints of {size.num_parameters / 1e6:.0f} M bfloat16 parameters in 5 shards "
        "(and their base, for TIES) in a SeaweedFS bucket on this machine; medians, ratios within "
        "a round. A download is verified (SHA-256, MD5) and put on the disk; a merge by ranges "
        "hashes and writes its result alone.",
    ]
    for name, measured in by_link.items():
        lines += ["", f"## {name}", "", *table(measured)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.ranges")
    parser.add_argument("--quick", action="store_true", help="smaller checkpoints, one round")
    parser.add_argument("--link", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.link:
        link(arguments.link, LINK_BYTES)
    size = QUICK if arguments.quick else USUAL
    by_link = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= {
            "AWS_ACCESS_KEY_ID": servers.ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": servers.SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
            "ALLOY_CACHE": str(folder / "cache"),
        }
        (folder / "s3").mkdir()
        with servers.s3_server(folder / "s3") as port:
            os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
            inputs(Bench(folder), size)
            upload(folder)
            command = [sys.executable, "-m", "benchmarks.ranges", "--link", str(port)]
            limiter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert limiter.stdout is not None
            limited = int(limiter.stdout.readline())
            rounds = 1 if arguments.quick else 2
            try:
                for title, at in (
                    (f"Over a link of {LINK_BYTES / 1e6:.0f} MB/s", limited),
                    ("Over loopback", port),
                ):
                    by_link[title] = measure(folder, f"http://127.0.0.1:{at}", rounds)
            finally:
                limiter.kill()
                limiter.wait()
    page = report(size, by_link)
    print(page)
    if not arguments.quick:
        RESULTS.write_text(page)


if __name__ == "__main__":
    main()
