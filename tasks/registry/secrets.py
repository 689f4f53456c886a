"""Secrets in text that somebody will read: passwords, tokens and signatures give way to `***`.

A secret is known by its place (before the `@` of an address, in a query, behind `Authorization`),
by its form (`hf_...`), or because it is the value of an environment variable that holds one.
`hide_secrets` masks what a process logs and the traceback that it dies of; whoever prints, raises
or records a text that others wrote calls `without_secrets`.
"""

import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any
from urllib.parse import unquote

MASK = "***"

_SHORTEST = 8  # characters; a shorter value would also take ordinary words out of a sentence
_SECRET_NAMES = re.compile(
    r"(TOKEN|PASSWORD|PASSWD|SECRET|AUTH_STRING|(API|ACCESS|ACCOUNT|STORAGE)_KEY)$", re.I
)
_ADDRESS_NAMES = re.compile(r"(URI|URL|ENDPOINT|PROXY)(_S3)?$", re.I)

_SCHEME = re.compile(r"^[\w+.-]+://")
_ADDRESS = re.compile(
    r"""(?P<scheme>[A-Za-z][\w+.-]*://)(?P<rest>[^\s'"<>]+)"""
    # user:password@host without a scheme; not `mlflow:NAME@alias`, not DVC's `dvc.yaml:merge@toy`
    r"""|(?<![\w.-])(?!mlflow:|models:|[\w.-]*dvc\.yaml:)[^\s/:@'"(<]+:[^\s/@'"<>]+@(?=[\w.\[-])"""
)
_TOKENS_AS_HOSTS = ("databricks://", "databricks-uc://")
_ELSEWHERE = (
    (re.compile(r"\b(hf_|dapi)\w{8,}"), MASK),
    (re.compile(r"\b(Bearer\s+)[^\s'\",]+"), rf"\1{MASK}"),
    (re.compile(r"(?i)(\bauthorization['\"]?\s*[:=]\s*['\"]?(?:\w+\s+)?)[^\s'\",]+"), rf"\1{MASK}"),
    (
        re.compile(
            r"(?i)(?<![\w.-])(?!(?:pad|bos|eos|unk|cls|sep|mask)_token)"  # a tokenizer's are none
            r"([\w.-]*(?:signature|token|password|passwd|pwd|secret|credential|"
            r"(?:api|account)_?key)=)[^\s&;'\",]+"
        ),
        rf"\1{MASK}",
    ),
)


def without_secrets(text: str) -> str:
    """Mask the passwords, tokens, signatures and queries of every address in a text.

    `hf://name@revision` and `mlflow:models/NAME@alias` name no user and stay as they are.
    """
    for secret in sorted(set(_planted()), key=len, reverse=True):
        text = text.replace(secret, MASK)
    text = _ADDRESS.sub(_masked, text)
    for pattern, mask in _ELSEWHERE:
        text = pattern.sub(mask, text)
    return text


def hide_secrets() -> None:
    """Mask whatever any logger of this process records, and the traceback that it may die of."""
    made = logging.getLogRecordFactory()

    def masked(*arguments: Any, **options: Any) -> logging.LogRecord:
        record = made(*arguments, **options)
        with suppress(TypeError, ValueError, KeyError):  # not formattable: its handler says so
            message = record.getMessage()
            if (hidden := without_secrets(message)) != message:
                record.msg, record.args = hidden, ()
        if record.exc_info and record.exc_info[0]:
            record.exc_text = _traceback(*record.exc_info)  # formatters take it as it is
        return record

    def die(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        sys.stderr.write(f"{_traceback(kind, error, trace)}\n")

    logging.setLogRecordFactory(masked)
    sys.excepthook = die


def _traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> str:
    return without_secrets("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"))


def _masked(match: re.Match[str]) -> str:
    scheme, rest = match["scheme"], match["rest"]
    if scheme is None:
        return f"{MASK}@"
    user, at, place = rest.rpartition("@")
    if at and _is_user(scheme, user):
        # A question mark before the `@` is of the password or begins a query: nothing is safe.
        rest = MASK if "?" in user or "#" in user else f"{MASK}@{place}"
    elif scheme.lower() in _TOKENS_AS_HOSTS:
        rest = re.sub(r"^[^/?#]+", MASK, rest)
    return scheme + re.sub(r"(\?|#(?=.*=)).*", rf"\1{MASK}", rest)


def _is_user(scheme: str, user: str) -> bool:
    """Say if what stands before the last `@` is a user, with a password or without."""
    return ":" in user or "?" in user or ("/" not in user and scheme.lower() != "hf://")


def _planted() -> Iterator[str]:
    """The secrets among the values of the environment, as they are and percent-decoded."""
    for name, value in os.environ.items():
        secret = value if _SECRET_NAMES.search(name) else ""
        if _ADDRESS_NAMES.search(name):
            user, _, _ = _SCHEME.sub("", value).rpartition("@")
            secret = user.partition(":")[2]
        if len(secret) >= _SHORTEST:
            yield from (secret, unquote(secret))
