"""Messages in the words of the command line: `--tokenizer union`, not `tokenizer='union'`.

The library names its arguments as Python writes them. A name, an equals sign and a literal stand
for one option each; a list or a mapping stands for an option that is given several times.
"""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import typer

from alloy.errors import AlloyError

_OPTIONS = {
    "allow": "--allow",
    "base": "--base",
    "chat_template": "--chat-template",
    "coefficients": "--coefficients",
    "copy": "--copy",
    "device": "--device",
    "drop": "--drop",
    "dtype": "--dtype",
    "energy": "--energy",
    "generation_config": "--generation-config",
    "keep": "--keep",
    "kept": "--kept",
    "names": "--names",
    "processor": "--processor",
    "rank": "--rank",
    "shard_bytes": "--shard-bytes",
    "slices": "--slices",
    "stack": "--stack",
    "statistics": "--statistics",
    "threads": "--threads",
    "tokenizer": "--tokenizer",
    "truncation": "--truncation",
    "zeros": "--zeros",
}
_VALUE = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|\[[^\]]*\]|\{[^}]*\}|[\w.+-]*[\w]|"""
_ARGUMENT = re.compile(
    rf"(?<![\w.-])(?P<name>{'|'.join(_OPTIONS)})(?:\[(?P<key>'[^']*')\])?=(?P<value>{_VALUE})"
    r"(?P<others>(?: or '\w+')*)"
)
_METHOD_OPTION = re.compile(rf"\boption (?P<name>\w+)(?: of '[^']*')?=(?P<value>{_VALUE})")


def in_options(message: str, keys: Mapping[str, str] | None = None) -> str:
    """A message of the library, its Python arguments written as options.

    Args:
        keys: arguments that the command reads in a file instead, with their keys there.
    """
    message = _METHOD_OPTION.sub(lambda m: f"--set {m['name']}={_plain(m['value'])}", message)
    return _ARGUMENT.sub(lambda match: _option(match, keys or {}), message)


def _option(match: re.Match[str], keys: Mapping[str, str]) -> str:
    if (key := keys.get(match["name"])) is not None:
        value = f": {_literal(match['value'])}" if match["value"] else ""
        return key + value + match["others"].replace("'", "")
    option = _OPTIONS[match["name"]]
    others = match["others"].replace("'", "")
    if not match["value"]:
        return option + others
    value = _literal(match["value"])
    if match["key"]:
        pair = f"{_literal(match['key'])}={value}"
        return f"{option} {shlex.quote(pair)}"
    if isinstance(value, dict):
        pairs = (f"{key}={_listed(row)}" for key, row in value.items())
        return " ".join(f"{option} {shlex.quote(pair)}" for pair in pairs)
    if isinstance(value, list) and match["name"] != "coefficients":
        return " ".join(f"{option} {shlex.quote(str(item))}" for item in value)
    return f"{option} {shlex.quote(_listed(value))}{others}"


def _listed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _plain(text: str) -> str:
    value = _literal(text)
    return value if isinstance(value, str) else text


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


@contextmanager
def refusals(command: str, keys: Mapping[str, str] | None = None) -> Generator[None]:
    """End with one message and a status where the block refuses, fails or is interrupted.

    1 is for what the library refuses and the system cannot do, 2 (Typer's) for what is no command,
    130 for Ctrl-C. Any other exception is a fault of ours and keeps its traceback.
    """
    try:
        yield
    except (AlloyError, OSError) as error:
        typer.echo(f"alloy {command}: {in_options(str(error), keys)}", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        typer.echo(f"alloy {command}: interrupted", err=True)
        raise typer.Exit(130) from error
