"""A stage for tests of the flows: python toy_stage.py NAME. Writes `out/NAME` whole or not at all.

`control/NAME.seconds` makes it slow, and `control/NAME.held` makes it wait while that file stands;
`control/NAME.failures` makes it fail so often with the exit status in `control/NAME.status`;
`control/NAME.refuses` is a text in the recipe with which it fails, `control/NAME.text` what it
writes (its DVC parameter, so to say). `log` remembers every start and every end.
"""

import sys
import time
from pathlib import Path

from tasks.locks import hold_workspace
from tasks.storage import write_folder

name = sys.argv[1]
control = Path("control")


def remember(event: str) -> None:
    with Path("log").open("a") as file:
        file.write(f"{event} {name}\n")


def setting(kind: str, default: str) -> str:
    path = control / f"{name}.{kind}"
    return path.read_text() if path.exists() else default


with hold_workspace(name):
    remember("start")
    sys.stdout.write(f"{name} speaks\n")
    failures = int(setting("failures", "0"))
    if failures:
        (control / f"{name}.failures").write_text(str(failures - 1))
        sys.stderr.write(f"{name}: the toy broke\n")
        sys.exit(int(setting("status", "1")))
    refused = setting("refuses", "")
    if refused and refused in Path("params/toy.yaml").read_text():
        sys.exit(f"{name}: refuses {refused}")
    try:
        with write_folder(Path("out") / name) as folder:
            (folder / "first").write_text(setting("text", "text"))
            time.sleep(float(setting("seconds", "0")))
            while (control / f"{name}.held").exists():
                time.sleep(0.05)
            (folder / "second").write_text("x" * int(setting("bytes", "1")))
    except OSError as error:
        sys.exit(f"{name}: {error}")
    remember("end")
