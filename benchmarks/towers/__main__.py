"""Commands of the study; study.yaml beside this file says what each reads and writes.

python -m benchmarks.towers fetch
python -m benchmarks.towers slack
python -m benchmarks.towers whisper all 0     # pairs of blocks that are one, draw of calibration
python -m benchmarks.towers distil all 0
python -m benchmarks.towers neighbours 0
python -m benchmarks.towers fine_tunes 0      # draw of sentences
python -m benchmarks.towers scale average regmean sequential
python -m benchmarks.towers table
"""

import sys
from collections.abc import Callable

from benchmarks.towers import study, table

COMMANDS: dict[str, Callable[..., None]] = {
    "fetch": study.fetch,
    "slack": study.slack,
    "whisper": study.whisper_trunks,
    "distil": study.distilled,
    "neighbours": study.neighbours,
    "fine_tunes": study.fine_tunes,
    "scale": study.scale,
    "table": table.write,
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](*sys.argv[2:])
