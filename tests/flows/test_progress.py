"""The progress of a pipeline: its place, and the time left as the last run took it."""

import pytest

from flows.progress import Progress, duration

STAGES = ["fetch@toy", "merge@toy", "evaluate@toy"]


def run(progress: Progress, clock: list[float], seconds: dict[str, float]) -> list[str]:
    """Run these stages, each for so many seconds; the lines that are said."""
    lines = []
    for stage, took in seconds.items():
        lines.append(progress.begin(stage))
        clock[0] += took
        progress.end(stage)
    return lines


def test_the_last_run_says_how_long_is_left(tmp_path) -> None:
    """Nothing is promised in a first run; a stage that never ran makes it a lower bound."""
    clock, file = [0.0], tmp_path / "state" / "seconds.json"
    progress = Progress(STAGES, file, lambda: clock[0])
    assert run(progress, clock, {"fetch@toy": 2.0, "merge@toy": 130.0}) == [
        "stage 1 of 3: fetch@toy",
        "stage 2 of 3: merge@toy",
    ]
    again = Progress(STAGES, file, lambda: clock[0])
    assert run(again, clock, {"merge@toy": 70.0, "evaluate@toy": 5.0}) == [
        "stage 2 of 3: merge@toy, at least 2 min 10 s left, going by the last run",
        "stage 3 of 3: evaluate@toy",
    ]
    third = Progress(STAGES, file, lambda: clock[0])
    assert third.begin("fetch@toy").endswith("about 1 min 17 s left, going by the last run")


@pytest.mark.parametrize("content", ["", "[1]", '{"fetch@toy": "soon"}'])
def test_a_damaged_file_is_begun_anew(tmp_path, content) -> None:
    (tmp_path / "seconds.json").write_text(content)
    progress = Progress(STAGES, tmp_path / "seconds.json", lambda: 0.0)
    assert progress.begin("fetch@toy") == "stage 1 of 3: fetch@toy"
    progress.end("fetch@toy")


def test_durations_have_two_units_at_most() -> None:
    assert [duration(s) for s in (0.4, 59, 61, 7500)] == ["0 s", "59 s", "1 min 1 s", "2 h 5 min"]
