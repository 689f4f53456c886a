"""Long work says how far it is, short work nothing."""

from tasks.models.shared.jobs import Progress


def test_progress_is_said_after_a_silence_alone(monkeypatch):
    clock, said = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    progress = Progress("pair/0: ours", lambda kind, line: said.append((kind, line)))
    for moment in (5.0, 14.0, 16.0, 20.0, 31.5):
        clock[0] = moment
        progress.count("layers fitted")
    assert said == [
        ("say", "pair/0: ours: 3 layers fitted"),
        ("say", "pair/0: ours: 5 layers fitted"),
    ]
