"""What begins with an underscore is its own package's affair."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("alloy", "tasks", "flows")


def private_imports(path: Path) -> list[str]:
    """Private modules and names that a file imports from another package of this repository."""
    package = path.parent.relative_to(REPOSITORY).as_posix().replace("/", ".")
    result = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        if node.module.split(".")[0] not in PACKAGES:
            continue
        inside = f"{node.module}.".startswith(f"{package}.")
        parts = [*node.module.split("."), *(alias.name for alias in node.names)]
        private = [p for p in parts if p.startswith("_") and not p.endswith("__")]
        if private and not inside:
            result.append(f"{path.name}: {node.module} {private}")
    return result


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_private_is_imported_across_packages(package: str) -> None:
    """A package's private modules and names may change without a look at the others."""
    files = sorted((REPOSITORY / package).rglob("*.py"))
    assert files
    assert [found for file in files for found in private_imports(file)] == []
