"""Serve a registered model over HTTP within a stated amount of memory.

    python -m tasks.registry.server models:/alloy-modality@champion --port 5001

Requests and answers are MLflow's, in JSON (`POST /invocations`):

    {"dataframe_records": [{"image": "iVBORw0K...", "text": "where is cat"}],
     "params": {"output": "embeddings"}}

Rows may also come as `inputs` or `instances`, which hold such records or columns, and as
`dataframe_split`. What cannot be answered gets status 400 and a message that names the row; 413 is
for a body that is too large, 415 for another content type, 408 for one that does not arrive.

`mlflow models serve` takes a body of any size and makes a table of whatever it holds before it
asks the model: 400 kB can claim 80 GB. Here, besides the loaded model and its pass over one batch,
everything together takes at most MOST_MEMORY: bodies of MOST_BYTES as they arrive, MOST_REQUESTS at
once, are 128 MiB, twice while their buffers grow; one at a time is parsed, into text of up to 4
bytes a character (256 MiB with the strings in it; MOST_VALUES bound the rest), and answered
(`tasks.registry.serving.MOST_MEMORY`).
"""

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tasks.registry import tracking
from tasks.registry.secrets import without_secrets

if TYPE_CHECKING:
    from fastapi import FastAPI
    from pandas import DataFrame

HOST = "127.0.0.1"
MOST_BYTES = 2**25  # of a request's body
MOST_VALUES = 2**14  # of a request: its commas and brackets
MOST_COLUMNS = 16
MOST_REQUESTS = 4  # at once; others wait before their bodies are read
MOST_CONNECTIONS = 256
ARRIVAL_SECONDS = 60  # of a body
MOST_MEMORY = 5 * 2**28  # bytes
ERROR_CODE = "INVALID_PARAMETER_VALUE"  # MLflow's
FORMS = ("dataframe_records", "dataframe_split", "inputs", "instances")

Predict = Callable[["DataFrame", object], list[dict[str, object]]]


class RequestError(ValueError):
    """A request that cannot be answered; the status says of which kind it is."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def read(body: bytes | bytearray) -> tuple["DataFrame", object]:
    """The rows and params of a request; RequestError for what is not MLflow's JSON."""
    import pandas as pd

    if not holds_few_values(body):
        raise RequestError(f"a request holds at most {MOST_VALUES} values")
    try:
        request = json.loads(body.decode(), object_pairs_hook=_object)
    except RecursionError as error:
        raise RequestError("a request is JSON; this one is nested too deeply") from error
    except ValueError as error:
        raise RequestError(f"a request is JSON; {error}") from error
    if not isinstance(request, dict):
        raise RequestError(f"a request is an object with one of {FORMS}, not {_type(request)}")
    params = request.pop("params", None)
    if len(request) != 1 or not request.keys() <= set(FORMS):
        names = _names(request)
        raise RequestError(f"a request has one of {FORMS} and may have params; this has {names}")
    ((form, content),) = request.items()
    rows = _split(content) if form == "dataframe_split" else _records(form, content)
    names = list(dict.fromkeys(name for row in rows for name in row))
    if len(names) > MOST_COLUMNS:
        raise RequestError(f"rows have at most {MOST_COLUMNS} columns; these have {_names(names)}")
    cells = [[row.get(name) for name in names] for row in rows]
    # Columns of objects: pandas' own strings cannot hold all that JSON can.
    return pd.DataFrame(cells, columns=pd.Index(names, dtype=object), dtype=object), params


def holds_few_values(body: bytes | bytearray) -> bool:
    """Return True if JSON text has at most MOST_VALUES commas, brackets and strings, unparsed.

    The empty list of a million is 2 bytes of text and 64 of memory.
    """
    pieces = body.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"', 2 * MOST_VALUES)
    marks = sum(piece.count(mark) for piece in pieces[::2] for mark in (b",", b"[", b"{"))
    return len(pieces) <= 2 * MOST_VALUES and marks <= MOST_VALUES


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    read = dict(pairs)
    if len(read) != len(pairs):
        raise ValueError("an object has a name twice")
    return read


def _records(form: str, content: object) -> list[dict[str, object]]:
    if isinstance(content, dict) and form != "dataframe_records":
        return _columns(content)
    if not isinstance(content, list):
        raise RequestError(f"{form} is a list of rows, not {_type(content)}")
    for number, row in enumerate(content):
        if not isinstance(row, dict):
            raise RequestError(f"row {number}: a row is an object, not {_type(row)}")
    return content


def _columns(content: Mapping[str, Any]) -> list[dict[str, object]]:
    """Rows of columns; columns of single values are one row."""
    lengths = {len(column) if isinstance(column, list) else None for column in content.values()}
    if len(lengths) > 1:
        raise RequestError("columns are lists of one length, or single values")
    if lengths == {None}:
        return [dict(content)]
    return [dict(zip(content, row, strict=True)) for row in zip(*content.values(), strict=True)]


def _split(content: object) -> list[dict[str, object]]:
    if not isinstance(content, dict) or not {"columns", "data"} <= content.keys() <= {
        "columns", "data", "index",
    }:  # fmt: skip
        raise RequestError("dataframe_split is an object with columns, data and perhaps an index")
    columns, data = content["columns"], content["data"]
    if not isinstance(columns, list) or not all(isinstance(name, str) for name in columns):
        raise RequestError("dataframe_split: columns are a list of names")
    if len(set(columns)) < len(columns):
        raise RequestError("dataframe_split: columns are named twice")
    if not isinstance(data, list):
        raise RequestError(f"dataframe_split: data is a list of rows, not {_type(data)}")
    for number, row in enumerate(data):
        if not isinstance(row, list) or len(row) != len(columns):
            raise RequestError(f"row {number}: a row is a list of {len(columns)} values")
    return [dict(zip(columns, row, strict=True)) for row in data]


def _type(value: object) -> str:
    return type(value).__name__


def _names(names: Sequence[str] | Mapping[str, object]) -> list[str]:
    """The first few of somebody's names, shortened."""
    return [name[:40] for name in list(names)[:3]]


def make_app(predict: Predict) -> "FastAPI":
    """The server of a model's `predict`, which takes a table of rows and params."""
    from fastapi import FastAPI, Request, Response

    app = FastAPI(openapi_url=None)
    arriving, answering = asyncio.Semaphore(MOST_REQUESTS), asyncio.Lock()

    @app.get("/ping")
    @app.get("/health")
    def ping() -> Response:
        return Response("\n", media_type="application/json")

    @app.post("/invocations")
    async def invocations(request: Request) -> Response:
        async with arriving:
            status, answer = 200, ""
            try:
                body = await _receive(request)
                async with answering:
                    answer = await asyncio.to_thread(_answer, predict, body)
            except RequestError as error:
                status = error.status
                answer = json.dumps({"error_code": ERROR_CODE, "message": str(error)})
            return Response(answer, status, media_type="application/json")

    return app


async def _receive(request) -> bytearray:
    from starlette.requests import ClientDisconnect

    kind = request.headers.get("content-type", "").lower().replace(" ", "")
    if kind not in ("application/json", "application/json;charset=utf-8"):
        raise RequestError(f"the content type is application/json, not {kind[:40]!r}", 415)
    length = request.headers.get("content-length", "0")
    body = bytearray()
    try:
        async with asyncio.timeout(ARRIVAL_SECONDS):
            if int(length) <= MOST_BYTES:
                async for piece in request.stream():
                    body += piece
                    if len(body) > MOST_BYTES:
                        break
                else:
                    return body
    except TimeoutError as error:
        raise RequestError(f"the body did not arrive in {ARRIVAL_SECONDS} s", 408) from error
    except ClientDisconnect as error:
        raise RequestError("the client went away") from error
    raise RequestError(f"a request has at most {MOST_BYTES} bytes", 413)


def _answer(predict: Predict, body: bytearray) -> str:
    from mlflow.exceptions import MlflowException

    rows, params = read(body)
    try:
        return json.dumps({"predictions": predict(rows, params)})
    except MlflowException as error:
        raise RequestError(error.message, error.get_http_status_code()) from error


def main(arguments: Sequence[str] | None = None) -> int:
    import uvicorn

    options = _parser().parse_args(arguments)
    try:
        model = tracking.load(options.model)
    except (tracking.TrackingError, OSError) as error:
        print(without_secrets(str(error)), file=sys.stderr)
        return 2
    app = make_app(lambda rows, params: model.predict(None, rows, params))
    print(
        f"http://{options.host}:{options.port}/invocations answers requests; Ctrl-C ends it",
        flush=True,
    )
    # h11 bounds the headers of a request.
    uvicorn.run(
        app, host=options.host, port=options.port, http="h11", ws="none", log_level="warning",
        limit_concurrency=MOST_CONNECTIONS,
    )  # fmt: skip
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tasks.registry.server", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("model", help="models:/NAME@ALIAS, models:/NAME/VERSION or a folder")
    parser.add_argument("--host", default=HOST, help=f"address to listen on ({HOST})")
    parser.add_argument("--port", type=int, default=5001, help="(5001)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
