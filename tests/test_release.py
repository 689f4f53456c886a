"""What a release says of itself agrees: version, changelog, citation, what CI runs."""

import re
from pathlib import Path

import yaml

import alloy

ROOT = Path(__file__).parents[1]


def test_the_version_is_one():
    """The newest entry of the changelog and the citation are of the package's version."""
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == alloy.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == alloy.__version__


def test_github_runs_what_everybody_runs():
    """The workflow installs Python and calls `.ci/run`, within CI's time."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    (python,) = (step["with"] for step in job["steps"] if "python" in step.get("uses", ""))
    assert python["python-version"] == "3.11"


def test_links_of_the_front_pages_lead_somewhere():
    for page in ("CHANGELOG.md", "SECURITY.md", "CONTRIBUTING.md", "CODE_OF_CONDUCT.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
            assert (ROOT / link).exists(), (page, link)
