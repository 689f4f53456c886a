"""The distribution: one package, light to import, whole without the pipeline's tools."""

import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

import alloy

REPOSITORY = Path(__file__).parents[2]
TWELVE_LINES = """
import alloy, torch
from safetensors.torch import save_file
from torch.nn import Linear, ReLU, Sequential
torch.manual_seed(0)
a = Sequential(Linear(4, 16), ReLU(), Linear(16, 3)).eval()
spec = alloy.find_symmetries(a, {"input": torch.randn(8, 4)})
planted = alloy.random_transforms(spec, torch.Generator().manual_seed(1))
b = alloy.transport(a.state_dict(), spec, planted)
aligning = alloy.align(a.state_dict(), b, spec, space="weight", diagonal=True)
merged = alloy.merge("linear", [a.state_dict(), alloy.transport(b, spec, aligning)])
save_file(merged, "model.safetensors")
"""


def test_importing_the_library_costs_nothing() -> None:
    """`import alloy` loads neither torch nor numpy; every public name is listed."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import alloy"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.split("\n")}
    assert not loaded & {"torch", "numpy", "transformers", "numba", "typer"}
    assert set(alloy.__all__) <= set(dir(alloy))
    assert all(getattr(alloy, name) is not None for name in alloy.__all__)


@pytest.mark.parametrize("command", ["merge", "plan", "mergekit", "average", "adapters"])
def test_help_loads_no_engine(command: str) -> None:
    """What a command prints of itself needs no numpy, which the engine and its kernels load."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "alloy", command, "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.split("\n")}
    assert "typer" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "numba", "yaml"}


def test_a_search_without_optuna_says_what_to_install(monkeypatch) -> None:
    """Optuna is no dependency of the library."""
    from alloy.merging.search import search

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(alloy.AlloyError, match="needs Optuna: pip install optuna"):
        search(lambda _: 0.0, num_models=2, num_trials=1)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy of what the wheel is built from, so that building leaves the checkout alone."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("alloy", "tasks", "flows"):
        shutil.copytree(
            REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


def run(*command: object, cwd: Path) -> str:
    """What a command says, outside this checkout; what it says is the message if it fails."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_wheel_holds_the_library_alone(sources, tmp_path) -> None:
    """No tasks, no flows; the marker of types, the console script, the licence and the version."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    run(*pip, "--wheel-dir", tmp_path, sources, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    info = f"alloy_merge-{alloy.__version__}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"alloy", info}
    assert {"alloy/py.typed", f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= set(names)


def digests(package: Path) -> dict[str, str]:
    """Digests of a package's files, but for compiled ones."""
    paths = [path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {str(p.relative_to(package)): sha256(p.read_bytes()).hexdigest() for p in paths}


@pytest.mark.slow
def test_a_clean_environment_has_the_library_and_passes_its_tests(sources, tmp_path) -> None:
    """`python -m build` gives an sdist and a wheel with the bytes of the checkout. The wheel is
    installed where nothing else is: a dozen lines of Python trace, align, merge and save, and none
    of the pipeline's tools comes along.

    There the tests of all packages of tests/alloy run against the wheel, a sample of them: of each
    file the first of every seven that are not slow. ALLOY_WHEEL_TESTS, arguments of pytest, chooses
    others (CONTRIBUTING.md has those of a release). mergekit and its many dependencies are left
    out, so the tests that compare with it are skipped.
    """
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path]
    run(*build, sources, cwd=tmp_path)
    (sdist,) = tmp_path.glob("alloy_merge-*.tar.gz")
    (wheel,) = tmp_path.glob("alloy_merge-*.whl")
    environment = tmp_path / "venv"
    run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
    python = environment / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet"]

    run(*install, wheel, cwd=tmp_path)
    run(*install, "--no-deps", "--target", tmp_path / "from_sdist", sdist, cwd=tmp_path)
    (package,) = environment.glob("lib/*/site-packages/alloy")
    assert digests(package) == digests(sources / "alloy")
    assert digests(tmp_path / "from_sdist" / "alloy") == digests(sources / "alloy")

    said = run(python, "-W", "error", "-c", TWELVE_LINES + SHOWN, cwd=tmp_path)
    assert float(said.split()[-1]) < 1e-5
    packages = ("prefect", "dvc", "mlflow", "boto3", "tasks", "flows", "optuna")
    code = "import importlib.util as u, sys; print([n for n in sys.argv[1:] if u.find_spec(n)])"
    assert run(python, "-c", code, *packages, cwd=tmp_path) == "[]\n"
    installed = run(python, "-m", "pip", "list", cwd=tmp_path)
    if "typer" not in installed:  # a dependency of other packages at times
        missing = subprocess.run(
            [environment / "bin" / "alloy", "merge"], capture_output=True, text=True
        )
        assert missing.returncode == 1
        assert missing.stderr == "alloy: the command needs Typer: pip install 'alloy-merge[cli]'\n"

    run(*install, f"{wheel}[cli]", *TOOLS_OF_THE_TESTS, cwd=tmp_path)
    checkout = tmp_path / "checkout"
    for name in ("tests", "docs", "benchmarks"):  # all that the tests read, without the library
        shutil.copytree(
            REPOSITORY / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(REPOSITORY / "pyproject.toml", checkout)
    where = run(python, "-c", "import alloy; print(alloy.__file__)", cwd=checkout)
    assert where == f"{package / '__init__.py'}\n"
    chosen = shlex.split(os.environ.get("ALLOY_WHEEL_TESTS", "-m 'not slow' --every 7"))
    tests = ["tests/alloy", "--ignore=tests/alloy/test_package.py"]
    assert " passed" in run(python, "-m", "pytest", "-q", *chosen, *tests, cwd=checkout)


TOOLS_OF_THE_TESTS = ["pytest", "hypothesis", "optuna", "peft"]

SHOWN = """
from safetensors.torch import load_file
loaded = load_file("model.safetensors")
print(max(float((loaded[n] - w).abs().max()) for n, w in a.state_dict().items()))
"""
