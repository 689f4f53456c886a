"""Push a checkpoint to a Hugging Face hub: first what would be sent, then, if told to, that.

`HF_ENDPOINT` and `HF_TOKEN` say which hub and who asks. All files go up in one commit, so a reader
sees the old model or the new.
"""

import os
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from alloy.checkpoint.card import HERE
from alloy.checkpoint.licence import licence_of
from tasks.registry.secrets import without_secrets
from tasks.sources.source import MANIFEST, SourceError, UnreachableError

CARD = "README.md"
CONFIGS = ("config.json", "adapter_config.json")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack", ".h5")
_TARGET = re.compile(r"hf://([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)", re.ASCII)
_FRONT = re.compile(r"\A---\s*\n.*?\n---\s*\n", re.DOTALL)


@dataclass(frozen=True)
class Push:
    """The files of a push and their target; `str` is what a dry run says."""

    folder: Path
    name: str  # of the repository
    files: Mapping[str, int]  # and their bytes
    card: str  # with the licence and the repository's name in its snippet
    licence: str
    private: bool

    def __str__(self) -> str:
        head = re.match(_FRONT, self.card)
        lines = [f"hf://{self.name} ({'private' if self.private else 'public'}), one commit:"]
        lines += [f"  {size:>15,} bytes  {file}" for file, size in self.files.items()]
        total = sum(self.files.values())
        lines += [f"  {total:>15,} bytes  in {len(self.files)} files", "metadata:"]
        lines += [f"  {line}" for line in (head[0] if head else "").strip("-\n ").splitlines()]
        return "\n".join(lines)


def plan(folder: Path, target: str, *, licence: str | None = None, private: bool = True) -> Push:
    """The files that a push would send.

    Args:
        licence: the card's by default; needed where the card states none.

    Raises:
        SourceError: no model there, one that cannot be published so, or no such place.
    """
    match = _TARGET.fullmatch(target)
    if match is None:
        raise SourceError(f"{without_secrets(target)!r} is no place on a hub: hf://ORG/NAME")
    files = _files(folder)
    if not any(name in files for name in CONFIGS):
        raise SourceError(f"{folder} has none of {', '.join(CONFIGS)}: it is no checkpoint")
    if not any(name.endswith(".safetensors") for name in files):
        raise SourceError(f"{folder} has no weights (*.safetensors)")
    if pickles := sorted(name for name in files if name.endswith(PICKLES)):
        raise SourceError(
            f"{folder}: {', '.join(pickles[:4])}: pickles run code where they are loaded; leave "
            "safetensors alone in the folder"
        )
    if CARD not in files:
        raise SourceError(f"{folder} has no {CARD}, the card that says what the model is made of")
    text = (folder / CARD).read_text(encoding="utf-8")
    if without_secrets(text) != text:
        raise SourceError(f"{folder / CARD} holds a secret: take it out before others read it")
    stated = licence_of(folder)
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        raise SourceError(
            f"licence {licence!r}: write a name as the hub has it, such as apache-2.0"
        )
    if stated is None and licence is None:
        raise SourceError(
            f"{folder / CARD} states no licence, for its parents' do not settle it: find out which "
            "terms hold, and give them: --license NAME"
        )
    card = _named(text if licence is None else _licensed(text, licence), match[1])
    sizes = {**files, CARD: len(card.encode())}
    return Push(folder, match[1], sizes, card, licence or str(stated), private)


def _files(folder: Path) -> dict[str, int]:
    """The files of a checkpoint and their bytes; hidden ones and our own manifest stay."""
    if not folder.is_dir():
        raise SourceError(f"{folder} is no folder")
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (
            path.is_dir()
            or name == MANIFEST
            or any(part.startswith(".") for part in Path(name).parts)
        ):
            continue
        if not path.resolve().is_relative_to(folder.resolve()):
            raise SourceError(f"{path} is a link out of its folder: put the file itself there")
        files[name] = path.stat().st_size
    return files


def _licensed(text: str, licence: str) -> str:
    """The card with this licence in its metadata."""
    match = _FRONT.match(text)
    head = match[0] if match else "---\n---\n"
    kept = [line for line in head.splitlines() if not re.match(r"license(_name|_link)?:", line)]
    return (
        "\n".join([kept[0], f"license: {licence}", *kept[1:]])
        + "\n"
        + text[len(match[0]) if match else 0 :]
    )


def _named(text: str, name: str) -> str:
    """The card with the repository's name where its snippet has the folder."""
    return text.replace(f'from_pretrained("{HERE}")', f'from_pretrained("{name}")')


def send(push: Push) -> str:
    """Send what was planned; the address of the commit.

    Raises:
        SourceError: no token, or one that may not write there.
        UnreachableError: nothing answers.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils import disable_progress_bars

    if not os.environ.get("HF_TOKEN"):
        raise SourceError(f"hf://{push.name}: HF_TOKEN is not set: who writes there?")
    disable_progress_bars()
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    api = HfApi(endpoint=endpoint, token=os.environ["HF_TOKEN"])
    operations = [
        CommitOperationAdd(name, push.card.encode() if name == CARD else str(push.folder / name))
        for name in push.files
    ]
    with _errors(push.name, endpoint):
        api.create_repo(push.name, private=push.private, exist_ok=True)
        commit = api.create_commit(
            push.name, operations, commit_message=f"Push {push.folder.name} with alloy"
        )
    return str(commit.commit_url)


@contextmanager
def _errors(name: str, endpoint: str) -> Generator[None]:
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except (errors.OfflineModeIsEnabled, httpx2.TransportError) as error:
        raise UnreachableError(
            f"hf://{name}: no answer from {without_secrets(endpoint)}; check the network and "
            "HF_ENDPOINT"
        ) from error
    except (errors.HfHubHTTPError, ValueError, RuntimeError) as error:  # the last: of an upload
        reason = without_secrets(str(error)).strip().splitlines()
        raise SourceError(
            f"hf://{name}: the hub refuses: {reason[0] if reason else error}"
        ) from error
