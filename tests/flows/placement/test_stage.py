"""The flow that workers run refuses what is another thing there than where the pipeline runs."""

import subprocess

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.placement import entries
from flows.placement.stage import stage
from tests.flows.conftest import Workspace


def test_a_worker_refuses_another_commit_and_another_lock(
    toy: Workspace, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sentence each, before the stage runs; what is in the clone stands."""
    monkeypatch.setenv("ALLOY_WORKSPACE", str(toy.folder))
    monkeypatch.chdir(toy.folder)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    reads = entries.inputs("merge@toy").reads
    given = {"address": "merge@toy", "upstream": {}, "data": []}
    with temporary_settings({PREFECT_API_URL: prefect_server}):
        state = stage(**given, at="0" * 40, reads=reads, return_state=True)
        assert state.is_failed()
        assert state.message
        assert "nor where it was cloned from has commit 0000000000: push it" in state.message
        reads["deps"][0]["md5"] = "1" * 32
        state = stage(**given, at=head.strip(), reads=reads, return_state=True)
    assert state.is_failed()
    assert state.message
    assert state.message.startswith(
        "stage merge@toy: control/merge.text is another here than where the flow runs, at the same "
        "commit and lock"
    )
    assert toy.log() == []
    assert toy.text("out/merge/first") == "method"
