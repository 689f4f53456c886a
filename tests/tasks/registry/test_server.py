"""Whatever is sent to a model's server, it answers, or says what is wrong, in bounded memory."""

import http.client
import json
import re
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import ViTConfig, ViTForImageClassification

from tasks.data.scenes.words import ANSWERS
from tasks.registry import flavours, server, tracking
from tests import servers
from tests.tasks.registry.served import claim, large_images, peak, picture, save_model

with warnings.catch_warnings():  # MLflow's own, at its import
    warnings.simplefilter("ignore")
    import mlflow.pyfunc

    from tasks.registry import serving

IMAGE, _ = picture()
SIDE = int(serving.MOST_PIXELS**0.5)
ROW = {"image": IMAGE, "text": "where is cat"}
JSON = "application/json"
ROOT = Path(server.__file__).parents[2]
COLUMNS = {"image": ["a", None], "text": ["b", "c"]}
RECORDS = [{"image": "a", "text": "b"}, {"image": None, "text": "c"}]


@pytest.mark.parametrize(
    "request_",
    [
        {"dataframe_records": RECORDS},
        {"dataframe_records": [RECORDS[0], {"text": "c"}]},
        {"inputs": RECORDS},
        {"inputs": COLUMNS},
        {"instances": RECORDS},
        {"instances": COLUMNS},
        {"dataframe_split": {"columns": ["image", "text"], "data": [["a", "b"], [None, "c"]]}},
        {"dataframe_split": {
            "index": [7, 7], "columns": ["text", "image"], "data": [["b", "a"], ["c", None]],
        }},
    ],
)  # fmt: skip
def test_every_form_holds_the_same_rows(request_: dict) -> None:
    for params in (None, {"output": "scores"}):
        rows, read = server.read(json.dumps({**request_, "params": params}).encode())
        assert rows[["image", "text"]].to_dict("records") == RECORDS
        assert read == params


def test_single_values_are_one_row() -> None:
    rows, _ = server.read(json.dumps({"inputs": ROW}).encode())
    assert rows.to_dict("records") == [ROW]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "a request is JSON"),
        (b"{", "a request is JSON"),
        (b"\xff", "a request is JSON"),
        (b"\x00", "a request is JSON"),
        (b"[" * 10000, "nested too deeply"),
        (b'{"inputs": ' * 10000, "nested too deeply"),
        (b'{"inputs": ' + b"1" * 5000 + b"}", "a request is JSON"),
        (b'{"inputs": [], "inputs": []}', "a name twice"),
        (b'{"inputs": [{"text": "a", "text": "b"}]}', "a name twice"),
        (b"[]", "is an object with one of .*, not list"),
        (b"null", "not NoneType"),
        (b"5", "not int"),
        (b"{}", r"this has \[\]"),
        (b'{"params": {}}', r"this has \[\]"),
        (b'{"inputs": [], "instances": []}', r"has one of .*this has \['inputs', 'instances'\]"),
        (b'{"inputs": [], "signature_name": "a"}', "has one of"),
        (b'{"messages": []}', "has one of"),
        (b'{"dataframe_records": {}}', "dataframe_records is a list of rows, not dict"),
        (b'{"inputs": 5}', "inputs is a list of rows, not int"),
        (b'{"instances": null}', "instances is a list of rows, not NoneType"),
        (b'{"inputs": [[1, 2], [3, 4]]}', "row 0: a row is an object, not list"),
        (b'{"dataframe_records": [{}, null]}', "row 1: a row is an object, not NoneType"),
        (b'{"inputs": {"image": ["a", "b"], "text": ["c"]}}', "lists of one length"),
        (b'{"inputs": {"image": ["a"], "text": "c"}}', "lists of one length"),
        (b'{"dataframe_split": []}', "columns, data and perhaps an index"),
        (b'{"dataframe_split": {"data": []}}', "columns, data and perhaps an index"),
        (b'{"dataframe_split": {"data": [], "columns": [], "x": 1}}', "perhaps an index"),
        (b'{"dataframe_split": {"data": 5, "columns": ["a"]}}', "data is a list of rows, not int"),
        (b'{"dataframe_split": {"data": [], "columns": "ab"}}', "columns are a list of names"),
        (b'{"dataframe_split": {"data": [], "columns": [1]}}', "columns are a list of names"),
        (b'{"dataframe_split": {"data": [], "columns": ["a", "a"]}}', "named twice"),
        (b'{"dataframe_split": {"data": [[1], []], "columns": ["a"]}}', "row 1: a row is a list"),
        (b'{"dataframe_split": {"data": ["a"], "columns": ["a"]}}', "row 0: a row is a list of 1"),
        (json.dumps({"inputs": {str(i): 1 for i in range(17)}}).encode(), "at most 16 columns"),
        (json.dumps({"inputs": [{str(i): 1} for i in range(17)]}).encode(), "at most 16 columns"),
        (b'{"inputs": [' + b"[]," * 2**14 + b"[]]}", "at most 16384 values"),
        (b'{"inputs": [' + b'"",' * 2**14 + b'""]}', "at most 16384 values"),
    ],
)  # fmt: skip
def test_what_is_not_a_request_is_refused(body: bytes, message: str) -> None:
    with pytest.raises(server.RequestError, match=message) as refused:
        server.read(body)
    assert refused.value.status == 400
    assert len(str(refused.value)) < 250


def values() -> st.SearchStrategy:
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters())
    return st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))


def count(value: object) -> tuple[int, int, int]:
    """Objects and lists, strings (names included), and values of any kind with the names."""
    if isinstance(value, dict):
        pairs = [pair for name_and_value in value.items() for pair in map(count, name_and_value)]
        return _total((1, 0, 1), *pairs)
    if isinstance(value, list):
        return _total((1, 0, 1), *map(count, value))
    return 0, int(isinstance(value, str)), 1


def _total(*counts: tuple[int, int, int]) -> tuple[int, int, int]:
    containers, strings, all_values = (sum(column) for column in zip(*counts, strict=True))
    return containers, strings, all_values


@settings(max_examples=40)
@given(values(), st.booleans())
def test_values_are_counted_without_parsing(drawn: object, is_ascii: bool) -> None:
    text = json.dumps(drawn, ensure_ascii=is_ascii).encode(errors="surrogatepass")
    containers, strings, all_values = count(drawn)
    assert holds(text, 2 * all_values + 1)
    assert not holds(text, containers - 1)
    assert not holds(text, strings - 1)
    quoted = json.dumps([text.decode(errors="replace")]).encode()
    assert holds(quoted, 2), "a string's content counts for nothing"


def holds(text: bytes, limit: int) -> bool:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "MOST_VALUES", limit)
        return server.holds_few_values(text)


def requests() -> st.SearchStrategy[bytes]:
    """Bodies: any JSON, MLflow's forms with anything in them, and text with bytes changed."""
    cells = st.sampled_from([IMAGE, "where is cat", claim(IMAGE, 20000, 20000)]) | values()
    names = st.sampled_from(["image", "text"])
    names = names | names | names | st.text(max_size=3)
    good = st.just(ROW)
    one_other = st.tuples(names, cells).map(lambda cell: {**ROW, cell[0]: cell[1]})
    records = st.lists(good | good | one_other | st.dictionaries(names, cells, max_size=3))
    columns = st.dictionaries(names, st.lists(cells, max_size=3) | cells, max_size=3)
    split = st.fixed_dictionaries(
        {}, optional={
            "columns": st.lists(names, max_size=3) | values(),
            "data": st.lists(st.lists(cells, max_size=3) | values(), max_size=3) | values(),
            "index": values(),
        },
    )  # fmt: skip
    params = st.fixed_dictionaries(
        {}, optional={"output": st.sampled_from(["answers", "embeddings", "scores"]) | values()}
    )
    forms = st.fixed_dictionaries(
        {}, optional={
            "dataframe_records": records | values(), "inputs": records | columns | values(),
            "instances": records | columns, "dataframe_split": split | values(),
            "params": params | values(), "signature_name": values(),
        },
    )  # fmt: skip
    good_forms = st.fixed_dictionaries({"dataframe_records": records}, optional={"params": params})
    bodies = (good_forms | forms | values()).map(lambda value: json.dumps(value).encode())
    changes = st.tuples(bodies, st.integers(0), st.binary(max_size=3)).map(
        lambda drawn: _changed(*drawn)
    )
    return bodies | bodies | changes | st.binary()


def _changed(body: bytes, place: int, piece: bytes) -> bytes:
    place %= len(body) + 1
    return body[:place] + piece + body[place + len(piece) :]


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(requests())
def test_a_request_is_read_or_refused(body: bytes) -> None:
    try:
        rows, _ = server.read(body)
    except server.RequestError:
        return
    assert isinstance(rows, pd.DataFrame)
    assert set(map(type, rows.columns)) <= {str}
    assert rows.columns.is_unique


REFUSALS = [
    ({"dataframe_records": [ROW, {**ROW, "image": 5}]}, "row 1: image is to be a string"),
    ({"dataframe_records": [{**ROW, "text": None}]}, "row 0 has no text"),
    ({"dataframe_records": [ROW, ROW, {**ROW, "image": ROW["text"]}]}, "row 2: image is not"),
    ({"inputs": [{**ROW, "image": claim(IMAGE, 20000, 20000)}]}, "row 0: image is too large"),
    ({"inputs": [{**ROW, "text": "\ud800"}]}, "row 0: text is no Unicode text"),
    ({"inputs": [{**ROW, "picture": 5}]}, r"columns ['picture'] are unknown"),
    ({"inputs": []}, "columns of ['image', 'text']; this one has none"),
    ({"inputs": {"image": [], "text": []}}, "columns of ['image', 'text']; this one has none"),
    ({"inputs": [ROW] * 1025}, "1 to 1024 rows; this one has 1025"),
    ({"inputs": [ROW], "params": {"output": "poems"}}, "'poems' is unknown; choose one of"),
    ({"inputs": [ROW], "params": {"outputs": "scores"}}, "parameters ['outputs'] are unknown"),
    ({"inputs": [ROW], "params": ["scores"]}, "params are an object"),
    (b"[" * 10_000, "nested too deeply"),
]  # fmt: skip


def save_served(folder: Path, checkpoint: Path) -> None:
    """The model as `register` keeps it, without a registry."""
    with warnings.catch_warnings():  # that no example of input is given
        warnings.simplefilter("ignore")
        mlflow.pyfunc.save_model(
            str(folder),
            python_model=serving.__file__,
            artifacts={"checkpoint": str(checkpoint)},
            model_config={"answers": list(ANSWERS)},
            pip_requirements=["mlflow"],
            signature=flavours.signature(serving.INPUTS, serving.OUTPUTS, {}),
        )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save_model(folder / "checkpoint")
    save_served(folder / "model", folder / "checkpoint")
    return folder / "model"


@pytest.fixture(scope="module")
def client(served: Path) -> TestClient:
    model = tracking.load(str(served))
    return TestClient(server.make_app(lambda rows, params: model.predict(None, rows, params)))


def post(client: TestClient, body: object, kind: str | None = JSON, **headers: str):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return client.post(
        "/invocations", content=content, headers=({"Content-Type": kind} if kind else {}) | headers
    )


def test_the_request_of_the_documentation_is_answered(client: TestClient) -> None:
    """What docs/operations.md sends with curl."""
    page = (ROOT / "docs/operations.md").read_text()
    (body,) = re.findall(r"^curl .*?-d '(.*?)'$", page, re.DOTALL | re.MULTILINE)
    answer = post(client, body.encode())
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["predictions"]) == 1


def test_rows_are_answered(client: TestClient) -> None:
    for body in ({"inputs": [ROW, ROW]}, {"inputs": [ROW, ROW], "params": {}}):
        answer = post(client, body)
        assert answer.status_code == 200
        assert [row["answer"] in ANSWERS for row in answer.json()["predictions"]] == [True, True]
    scores = post(client, {"inputs": [ROW] * 3, "params": {"output": "scores"}}).json()
    assert [len(row["scores"]) for row in scores["predictions"]] == [3, 3, 3]
    assert client.get("/ping").status_code == client.get("/health").status_code == 200


@pytest.mark.parametrize(("body", "message"), REFUSALS)
def test_what_cannot_be_answered_is_told(client: TestClient, body: object, message: str) -> None:
    answer = post(client, body)
    assert answer.status_code == 400
    assert message in answer.json()["message"]
    assert answer.json()["error_code"] == "INVALID_PARAMETER_VALUE"


@pytest.mark.parametrize(
    "kind", [None, "", "text/csv", "application/vnd.apache.parquet", f"{JSON};charset=latin-1"]
)
def test_json_alone_is_taken(client: TestClient, kind: str | None) -> None:
    answer = post(client, {"inputs": [ROW]}, kind)
    assert answer.status_code == 415
    assert "the content type is application/json" in answer.json()["message"]
    assert post(client, {"inputs": [ROW]}, f"{JSON}; charset=UTF-8").status_code == 200


def test_a_body_is_not_read_beyond_its_limit(client: TestClient, monkeypatch) -> None:
    monkeypatch.setattr(server, "MOST_BYTES", 1000)
    assert post(client, b" " * 1001).status_code == 413

    def pieces() -> Iterator[bytes]:
        for _ in range(11):
            yield b" " * 100

    answer = client.post("/invocations", content=pieces(), headers={"Content-Type": JSON})
    assert answer.status_code == 413
    assert answer.json()["message"] == "a request has at most 1000 bytes"
    assert post(client, b" " * 1000).status_code == 400


def test_a_model_that_is_not_served_refuses_whatever_comes(tmp_path: Path) -> None:
    """Results of kind models, such as multitask's classifiers, are kept to be loaded."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(**sizes, intermediate_size=16, image_size=8, patch_size=4, num_channels=1)
    ViTForImageClassification(config).save_pretrained(tmp_path / "checkpoint")
    save_served(tmp_path / "model", tmp_path / "checkpoint")
    model = tracking.load(str(tmp_path / "model"))
    client = TestClient(server.make_app(lambda rows, params: model.predict(None, rows, params)))
    for body, _ in [({"inputs": [ROW]}, ""), *REFUSALS]:
        answer = post(client, body)
        assert answer.status_code == 400
        if isinstance(body, dict):
            assert "ViTForImageClassification is kept to be loaded" in answer.json()["message"]


def test_what_cannot_be_served_ends_with_a_sentence(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    for model, message in [
        ("models:/toy@champion", "nothing answers"),
        (str(tmp_path / "nowhere"), "nowhere"),
    ]:
        assert server.main([model]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error


@contextmanager
def running(model: Path, log: Path) -> Iterator[tuple[int, psutil.Process]]:
    """The server in a process of its own; yields its port and process."""
    port = servers.free_port()
    command = [sys.executable, "-m", "tasks.registry.server", str(model), "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT)
    try:
        servers.wait_for_port(port, process, seconds=300)
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(30)


def ask(port: int, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=300)) as connection:
        connection.request("POST", "/invocations", body, headers or {"Content-Type": JSON})
        answer = connection.getresponse()
        return answer.status, answer.read()


@pytest.mark.slow
def test_a_fuzzed_server_answers_or_refuses(served: Path, tmp_path: Path) -> None:
    """A thousand requests: rows answered, or a refusal in JSON; no error in the log."""
    statuses: dict[int, int] = {}
    kinds = st.sampled_from([JSON] * 8 + ["text/csv", "application/vnd.apache.parquet", "a;b=c"])

    with running(served, tmp_path / "log") as (port, process):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)

        @settings(max_examples=1000, suppress_health_check=list(HealthCheck))
        @given(requests(), kinds)
        def send(body: bytes, kind: str) -> None:
            connection.request("POST", "/invocations", body, {"Content-Type": kind})
            answer = connection.getresponse()
            content = json.loads(answer.read())
            statuses[answer.status] = statuses.get(answer.status, 0) + 1
            assert answer.status in (200, 400, 415)
            assert ("predictions" if answer.status == 200 else "message") in content
            assert (answer.status == 415) == (kind != JSON)

        send()
        connection.close()
        assert process.is_running()
    assert min(statuses[status] for status in (200, 400, 415)) > 20
    assert (tmp_path / "log").read_text().count("Traceback") == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak where Linux has it")
def test_a_server_stays_within_the_memory_that_is_stated(served: Path, tmp_path: Path) -> None:
    """The bodies that claim most, many at once, beside clients that send without end."""
    wide = json.dumps({str(i): 0 for i in range(5000)})
    bodies = [
        b"[" * server.MOST_BYTES,
        b'{"inputs": [' + b"[]," * (server.MOST_BYTES // 3 - 10) + b"[]]}",
        b'{"inputs": ["' + "\U0001f600".encode() * (server.MOST_BYTES // 4 - 10) + b'"]}',
        b'{"inputs": ["' + rb"\ud83d\ude00" * (server.MOST_BYTES // 12 - 10) + b'"]}',
        b'{"inputs": ["' + rb"\nab" * (server.MOST_BYTES // 4 - 10) + b'"]}',
        b'"' * server.MOST_BYTES,
        b'{"inputs": ' + b"1" * (server.MOST_BYTES - 20) + b"}",
        json.dumps({"dataframe_split": {
            "data": 5, "index": list(range(8000)), "columns": [str(i) for i in range(4000)],
        }}).encode(),
        json.dumps({"inputs": [{str(i): 0} for i in range(5000)]}).encode(),
        f'{{"inputs": [{wide}]}}'.encode(),
        json.dumps({"inputs": [ROW] * 1024, "params": {"output": "scores"}}).encode(),
        json.dumps({"inputs": [ROW] * 1024, "params": {"output": "embeddings"}}).encode(),
        json.dumps({"inputs": [{**ROW, "image": image} for image in large_images(SIDE)]}).encode(),
        b" " * (server.MOST_BYTES + 1),
    ]  # fmt: skip
    with running(served, tmp_path / "log") as (port, process):
        for _ in range(2):
            ask(port, json.dumps({"inputs": [ROW] * 64}).encode())
        before = process.memory_info().rss
        with ThreadPoolExecutor(8) as pool:
            statuses = [status for status, _ in pool.map(lambda body: ask(port, body), bodies * 2)]
        assert statuses == [*[400] * 10, *[200] * 3, 413] * 2
        with closing(socket.create_connection(("127.0.0.1", port))) as endless:
            endless.sendall(b"POST /invocations HTTP/1.1\r\nHost: a\r\nContent-Type: ")
            endless.sendall(JSON.encode() + b"\r\nTransfer-Encoding: chunked\r\n\r\n")
            with suppress(ConnectionError):
                for _ in range(256):
                    endless.sendall(b"100000\r\n" + b" " * 2**20 + b"\r\n")
        assert ask(port, json.dumps({"inputs": [ROW]}).encode())[0] == 200
        taken = peak(process.pid) - before
    assert 2**27 < taken < server.MOST_MEMORY
