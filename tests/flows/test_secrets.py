"""A run with secrets planted wherever one can be set tells none: all that it wrote is searched."""

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from tasks.sources.s3 import s3_client
from tests import servers, tiny_models
from tests.flows.conftest import Workspace, answers, git, wait_until
from tests.servers import free_port

PLANTED = {
    "hub": "hf_PlantedTokenOfTheHub",
    "bucket": servers.SECRET_KEY,
    **{
        name: f"Planted%2FPassword+of+{name}"
        for name in ("mlflow", "prefect", "endpoint", "git", "dvc", "pip", "proxy", "signature")
    },
}
FORMS = {
    form.encode(): name
    for name, secret in PLANTED.items()
    for form in (
        secret,
        unquote(secret),
        base64.b64encode(f"user:{unquote(secret)}".encode()).decode(),  # a Basic header's
    )
}
HOLDERS = {".git/config", ".dvc/config.local"}  # where the test itself has put secrets


def with_user(name: str, address: str) -> str:
    """An address with the user and the password of this name."""
    parts = urlsplit(address)
    return parts._replace(netloc=f"user:{PLANTED[name]}@{parts.netloc}").geturl()


NOBODY = "http://127.0.0.1:9"


def leaks(folder: Path) -> dict[str, list[str]]:
    """Of each file that holds a secret: whose."""
    found = {}
    for path in (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        content = path.read_bytes()
        if names := [name for form, name in FORMS.items() if form in content]:
            found[path.relative_to(folder).as_posix()] = names
    return found


def told(output: str) -> list[str]:
    return [name for form, name in FORMS.items() if form.decode() in output]


@pytest.fixture(scope="module")
def hub() -> Iterator[servers.HubServer]:
    hub = servers.HubServer()
    hub.private, hub.token = {"org/a"}, PLANTED["hub"]
    yield hub
    hub.close()


@pytest.fixture(scope="module")
def mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder of an MLflow server and its address."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", "sqlite:///mlflow.db", "--artifacts-destination", "files"]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-m", "mlflow", *command],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as server,
    ):
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"))
            yield folder, f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, 9)


@pytest.fixture
def planted(
    new_small: Workspace,
    hub: servers.HubServer,
    mlflow: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Workspace]:
    """A recipe that reads a private hub and a bucket, registers and ships, in a secretive place."""
    folder = tmp_path / "alloy"
    shutil.copytree(new_small.folder, folder)
    shutil.rmtree(folder / "tests")  # this file holds the secrets, too
    for seed, name in enumerate("ab"):
        made = tiny_models.model("ConvNextForImageClassification", seed)
        tiny_models.save(made, tmp_path / "given" / name)
    tiny_models.pictures(folder / "photos")
    files = {
        name: {path.name: path.read_bytes() for path in (tmp_path / "given" / name).iterdir()}
        for name in "ab"
    }
    hub.publish("org/a", files["a"])
    (data := tmp_path / "s3").mkdir()
    with servers.s3_server(data) as port:
        keys = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": servers.ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": servers.SECRET_KEY,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        for name, value in keys.items():
            monkeypatch.setenv(name, value)
        client = s3_client()
        client.create_bucket(Bucket="planted")
        for path, content in files["b"].items():
            client.put_object(Bucket="planted", Key=f"given/b/{path}", Body=content)

        recipe = tiny_models.recipe({"images": "photos", "examples": 24}, {0: ["a", "b"]})
        recipe["fetch"]["checkpoints"] = {"a": "hf://org/a", "b": "s3://planted/given/b"}
        recipe["ship"] = {"target": "s3://planted/mine", "model": "merged"}
        (folder / "params/mine.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        with (folder / "params/recipes.yaml").open("a") as recipes:
            recipes.write("  - mine\n")
        git(folder, "add", "--all")
        git(folder, "commit", "--quiet", "--message", "mine")
        git(folder, "remote", "add", "origin", with_user("git", f"{NOBODY}/alloy.git"))
        (folder / ".dvc/config.local").write_text(
            f"[core]\n    remote = planted\n"
            f"['remote \"planted\"']\n    url = {with_user('dvc', f'{NOBODY}/cache')}\n"
        )
        environment = {k: v for k, v in new_small.environment.items() if k != "PREFECT_API_URL"}
        environment |= keys | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": PLANTED["hub"],
            "MLFLOW_TRACKING_URI": with_user("mlflow", mlflow[1]),
            "PREFECT_API_KEY": PLANTED["prefect"],
            "PIP_INDEX_URL": with_user("pip", NOBODY),
            "HTTPS_PROXY": with_user("proxy", NOBODY),
        }
        yield Workspace(folder, environment)


def run(workspace: Workspace, *command: str, **environment: str) -> tuple[int, str]:
    """Run a module with some of the environment changed; none of its output holds a secret."""
    changed = Workspace(workspace.folder, workspace.environment | environment)
    status, output = changed.run(*command)
    assert told(output) == [], output
    return status, output


@pytest.mark.slow
def test_a_run_with_planted_secrets_writes_none(
    planted: Workspace,
    mlflow: tuple[Path, str],
    prefect_server: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Neither a run to which everything answers, nor those to which nothing does.

    Searched: what is printed, the workspace (reports, cards, manifests, lock files, DVC's cache,
    `.alloy/`, Prefect's database), MLflow's database and artifacts, the bucket, and the database
    of a Prefect server elsewhere.
    """
    pipeline = ("flows.pipeline", "mine")
    status, output = run(planted, *pipeline)
    assert status == 0, output
    status, output = run(planted, "tasks.ship", "mine")
    assert status == 0, output

    nowhere = {
        "HF_ENDPOINT": with_user("endpoint", f"{NOBODY}/hub?token={PLANTED['signature']}"),
        "AWS_ENDPOINT_URL": with_user("endpoint", NOBODY),
    }
    status, output = run(planted, *pipeline, "--only", "fetch", "--refresh", **nowhere)
    assert status == 1, output
    assert "no answer from http://***@127.0.0.1:9" in output

    (planted.folder / "models/mine/registered.json").unlink()
    silent = with_user("mlflow", "postgresql://127.0.0.1:9/db")
    elsewhere = with_user("prefect", prefect_server)
    status, output = run(
        planted,
        *pipeline,
        "--only",
        "register",
        MLFLOW_TRACKING_URI=silent,
        PREFECT_API_URL=elsewhere,
    )
    assert status == 1, output
    assert "MLflow at postgresql://***@127.0.0.1:9/db: nothing answers" in output
    nowhere = {"PREFECT_API_URL": with_user("prefect", f"{NOBODY}/api")}
    status, output = run(planted, *pipeline, **nowhere)
    assert status == 2, output
    assert "Prefect at http://***@127.0.0.1:9/api: nothing answers" in output

    params = planted.folder / "params/mine.yaml"
    good = params.read_text()
    params.write_text(good.replace("s3://planted/given/b", "s3://absent/b"))
    status, output = run(planted, "tasks.fetch", "mine")
    assert status == 1, output
    assert "NoSuchBucket" in output
    signed = f"https://host/b?X-Amz-Signature={PLANTED['signature']}"
    params.write_text(good.replace("s3://planted/given/b", signed))
    for command in (pipeline, ("dvc", "repro", "fetch@mine")):
        status, output = run(planted, *command)
        assert status != 0, output
        assert "'https://host/b?***' holds a secret" in output
    params.write_text(good)

    assert leaks(planted.folder).keys() == HOLDERS
    assert leaks(mlflow[0]) == {}
    assert leaks(planted.folder.parent / "s3" / "data") == {}
    [home] = tmp_path_factory.getbasetemp().glob("prefect*[0-9]")
    assert leaks(home) == {}
    databases = b"".join(path.read_bytes() for path in home.glob("prefect.db*"))
    assert b"MLflow at postgresql://***@127.0.0.1:9/db" in databases
