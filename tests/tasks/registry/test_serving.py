"""Whatever is asked of the served model, it answers every row or says which it cannot."""

import base64
import gc
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks.data.scenes.words import ANSWERS
from tests.tasks.registry.served import (
    claim,
    encode,
    forget_peak,
    large_images,
    peak,
    picture,
    save,
    save_model,
)

with warnings.catch_warnings():  # MLflow's own, at its import
    warnings.simplefilter("ignore")
    from mlflow.pyfunc import PythonModelContext

    from tasks.registry import serving
    from tasks.registry.serving import BadRequestError, ServedModel

TEXT = "where is cat"
IMAGE, PIXELS = picture()
SIDE = int(serving.MOST_PIXELS**0.5)
GOOD = {"image": IMAGE, "text": TEXT}
Predict = Callable[..., list[dict[str, object]]]


PNG = base64.b64decode(IMAGE)
JPEG = save(Image.fromarray(PIXELS), "JPEG")


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> PythonModelContext:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    save_model(folder)
    return PythonModelContext({"checkpoint": str(folder)}, {"answers": list(ANSWERS)})


@pytest.fixture(scope="module")
def predict(context: PythonModelContext) -> Predict:
    model = ServedModel()
    model.load_context(context)
    return lambda request, params=None: model.predict(context, request, params)


def rows(*rows: dict) -> pd.DataFrame:
    """The rows as a table of objects, which holds text that pandas' own strings do not."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = pd.Index(names, dtype=object, tupleize_cols=False)
    return pd.DataFrame(
        [[row.get(name) for name in names] for row in rows], columns=columns, dtype=object
    )


@pytest.mark.parametrize(
    "picture",
    [
        Image.fromarray(PIXELS),
        Image.fromarray(PIXELS).convert("L"),
        Image.fromarray(PIXELS).convert("1"),
        Image.fromarray(PIXELS).convert("P"),
        Image.fromarray(PIXELS).convert("RGBA"),
        Image.fromarray(PIXELS).convert("LA"),
        Image.new("I;16", (16, 16), 1000),
        Image.new("RGB", (1, 1)),
        Image.new("RGB", (1, serving.LONGEST_SIDE)),
        Image.new("RGB", (serving.LONGEST_SIDE, 1)),
    ],
    ids=lambda picture: f"{picture.mode}-{picture.width}x{picture.height}",
)
def test_every_png_is_answered_in_every_way(predict: Predict, picture: Image.Image) -> None:
    request = rows({"image": encode(save(picture, "PNG")), "text": TEXT})
    for output in ("answers", "embeddings", "scores"):
        (answer,) = predict(request, {"output": output})
        assert answer
        json.dumps(answer, allow_nan=False)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "YCbCr"])
def test_every_jpeg_is_answered(predict: Predict, mode: str) -> None:
    image = save(Image.fromarray(PIXELS).convert(mode), "JPEG", progressive=mode == "RGB")
    assert predict(rows({"image": encode(image), "text": TEXT}))[0]["answer"] in ANSWERS


def other_formats() -> dict[str, bytes]:
    """The image in every format that Pillow writes, but the two that are taken."""
    Image.init()
    written = {}
    for name in sorted(set(Image.SAVE) - {"PNG", "JPEG", "MPO"}):  # one frame of MPO is a JPEG
        for mode in ("RGB", "L", "1", "P"):
            try:
                written[name] = save(Image.fromarray(PIXELS).convert(mode), name)
                break
            except (OSError, ValueError, KeyError):
                continue
    return written


@pytest.mark.filterwarnings("ignore:.* image format is deprecated:DeprecationWarning")
def test_png_and_jpeg_alone_are_taken(predict: Predict, tmp_path: Path, monkeypatch) -> None:
    """No other decoder sees a request: Ghostscript, which EPS would start, does not run."""
    planted = tmp_path / "gs"
    planted.write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    planted.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    formats = other_formats()
    assert {"EPS", "GIF", "BMP", "TIFF", "WEBP", "PPM"} <= formats.keys()
    for content in formats.values():
        with pytest.raises(BadRequestError, match=r"row 1: image is no PNG or JPEG"):
            predict(rows(GOOD, {"image": encode(content), "text": TEXT}))
    assert not (tmp_path / "ran").exists()


def cell_refusals() -> dict[str, tuple[dict[str, object], str]]:
    """Rows that cannot be answered, each with what is said behind the row's number."""
    images = {
        "not base64": ("no base64!", "image is not base64"),
        "padding": ("abc", "image is not base64"),
        "not ASCII": ("ü", "image is not base64"),
        "lines": (f"{IMAGE[:40]}\n{IMAGE[40:]}", "image is not base64"),
        "data URL": (f"data:image/png;base64,{IMAGE}", "image is not base64"),
        "surrogate": ("\ud800", "image is no Unicode text"),
        "empty": ("", "image is no PNG or JPEG"),
        "noise": (encode(bytes(range(256))), "image is no PNG or JPEG"),
        "signature": (encode(PNG[:8]), "image is no PNG or JPEG"),
        "many scans": (
            encode(JPEG[:-2] + b"\xff\xda" * serving.MOST_SCANS + JPEG[-2:]),
            "image has 101 scans, at most 100 are taken",
        ),
        "half a PNG": (encode(PNG[: len(PNG) // 2]), "image is damaged"),
        "half a JPEG": (encode(JPEG[: len(JPEG) - 40]), "image is damaged"),
        "too many characters": ("A" * (serving.LONGEST_IMAGE + 4), "at most 16777216 are taken"),
        "wide": (claim(IMAGE, serving.LONGEST_SIDE + 1, 1), "16385x1 pixels"),
        "high": (claim(IMAGE, 1, serving.LONGEST_SIDE + 1), "1x16385 pixels"),
        "many pixels": (claim(IMAGE, 4097, 4096), "too large: 4097x4096 pixels"),
        "a bomb": (claim(IMAGE, 12000, 12000), "too large"),
        "a larger bomb": (claim(IMAGE, 20000, 20000), "too large"),
        "the largest bomb": (claim(IMAGE, 2**31 - 1, 2**31 - 1), "too large"),
        "no pixels": (claim(IMAGE, 0, 0), "image is "),
    }
    texts = {
        "many tokens": ("cat " * 20, "text has 21 tokens, the model takes 1 to 9"),
        "many characters": ("a" * (serving.LONGEST_TEXT + 1), "at most 16384 are taken"),
        "surrogate": ("cat \udcff", "text is no Unicode text"),
    }
    others = {
        "int": 5, "float": 0.5, "bool": True, "bytes": b"cat", "list": ["cat"], "dict": {"a": 1},
        "empty list": [], "infinity": float("inf"), "date": pd.Timestamp(0), "huge": 10**400,
    }  # fmt: skip
    refusals = {f"image: {name}": ({**GOOD, "image": v}, m) for name, (v, m) in images.items()}
    refusals |= {f"text: {name}": ({**GOOD, "text": v}, m) for name, (v, m) in texts.items()}
    for key in ("image", "text"):
        refusals |= {
            f"{key}: {name}": ({**GOOD, key: value}, f"{key} is to be a string")
            for name, value in others.items()
        }
    return refusals


@pytest.mark.parametrize("output", ["answers", "embeddings", "scores"])
@pytest.mark.parametrize(("row", "message"), cell_refusals().values(), ids=cell_refusals().keys())
def test_a_row_that_cannot_be_read_is_named(
    predict: Predict, row: dict[str, object], message: str, output: str
) -> None:
    for before in (0, 1, serving.BATCH_SIZE):
        with pytest.raises(BadRequestError, match=rf"row {before}: .*{message}") as refused:
            predict(rows(*[GOOD] * before, row), {"output": output})
        assert refused.value.get_http_status_code() == 400
        assert len(refused.value.message) < 200


@pytest.mark.parametrize("missing", [None, float("nan"), pd.NA, pd.NaT, np.float64("nan")])
def test_a_missing_value_is_a_missing_column(predict: Predict, missing: object) -> None:
    for key, other in (("image", "text"), ("text", "image")):
        request = rows(GOOD, {**GOOD, key: missing})
        for output in ("answers", "scores"):
            with pytest.raises(BadRequestError, match=f"row 1 has no {key}"):
                predict(request, {"output": output})
        assert predict(request, {"output": "embeddings"})[1].keys() == {f"{other}_embedding"}
    with pytest.raises(BadRequestError, match="row 1 has neither image nor text"):
        predict(rows(GOOD, {"image": missing, "text": missing}), {"output": "embeddings"})


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (pd.DataFrame([[1, 2], [3, 4]]), r"columns \['0', '1'\] are unknown"),
        (rows({**GOOD, "picture": IMAGE}), r"columns \['picture'\] are unknown; choose of"),
        (rows({"Image": IMAGE, "Text": TEXT}), "are unknown"),
        (rows({**GOOD, None: 1}), "are unknown"),
        (rows({**GOOD, ("text", "a"): 1}), "are unknown"),
        (rows({**GOOD, "x" * 10**6: 1, "\ud800": 1}), "are unknown"),
        (pd.DataFrame([[TEXT, TEXT]], columns=["text", "text"]), "each once"),
        (pd.DataFrame(), "rows with columns of .* has none"),
        (pd.DataFrame(index=range(3)), "rows with columns of .* has none"),
        (rows({}), "rows with columns of .* has none"),
        (pd.DataFrame(columns=["image", "text"]), "rows with columns of .* has none"),
        (rows(*[GOOD] * (serving.MOST_ROWS + 1)), "1 to 1024 rows; this one has 1025"),
        (rows({"text": TEXT}), "row 0 has no image"),
        (rows({"image": IMAGE}), "row 0 has no text"),
        (None, "not NoneType"),
        ([GOOD], "not list"),
        (GOOD, "not dict"),
        (np.zeros((2, 2)), "not ndarray"),
        (pd.Series([TEXT]), "not Series"),
        (TEXT, "not str"),
    ],
)
def test_what_is_no_table_of_rows_is_refused(predict: Predict, request_, message: str) -> None:
    with pytest.raises(BadRequestError, match=message) as refused:
        predict(request_)
    assert len(refused.value.message) < 200


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"output": "poems"}, r"'poems' is unknown; choose one of \['answers'"),
        ({"output": ["answers"]}, "is unknown"),
        ({"output": None}, "'None' is unknown"),
        ({"output": "x" * 10**6}, "is unknown"),
        ({"outputs": "answers"}, r"parameters \['outputs'\] are unknown"),
        ({"output": "answers", 1: 2}, r"parameters \['1'\] are unknown"),
        ([], "params are an object of .'output'., not list"),
        (0, "not int"),
        ("", "not str"),
    ],
)
def test_unknown_parameters_are_refused(predict: Predict, params, message: str) -> None:
    with pytest.raises(BadRequestError, match=message) as refused:
        predict(rows(GOOD), params)
    assert len(refused.value.message) < 200


def cells() -> st.SearchStrategy:
    """Values of a row as JSON has them, many of them nearly right."""

    def edit(content: bytes) -> st.SearchStrategy[str]:
        places = st.lists(
            st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=4
        )
        return st.tuples(st.integers(0, len(content)), places).map(
            lambda drawn: encode(_edited(content, *drawn))
        )

    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters())
    words = st.lists(st.sampled_from(TEXT.split()), max_size=12).map(" ".join)
    nested = st.recursive(leaves, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
    sizes = st.integers(0, 2**31 - 1)
    claims = st.tuples(sizes, sizes).map(lambda size: claim(IMAGE, *size))
    images = [edit(PNG), edit(JPEG), st.binary().map(encode), claims]
    return st.one_of(st.just(IMAGE), st.just(TEXT), words, nested, *images)


def _edited(content: bytes, length: int, places: list[tuple[int, int]]) -> bytes:
    """The first `length` bytes (all for 0) with others at some places."""
    edited = bytearray(content)
    for place, byte in places:
        edited[place] = byte
    return bytes(edited[: length or None])


@pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_nothing_but_answers_and_refusals_comes_out(predict: Predict, examples: int) -> None:
    """Rows such as JSON can hold, damaged images among them: each answered, or 400."""
    names = st.sampled_from(["image", "text"])
    good = st.just(GOOD)
    one_other = st.tuples(names, cells()).map(lambda cell: {**GOOD, cell[0]: cell[1]})
    others = st.fixed_dictionaries({}, optional={"image": cells(), "text": cells()})
    strange = st.dictionaries(names | st.text(max_size=4) | st.integers(), cells())
    tables = st.lists(good | one_other, max_size=4) | st.lists(good | others | strange, max_size=4)
    known = st.sampled_from([{}, {"output": "embeddings"}, {"output": "scores"}, None])
    params = known | known | st.dictionaries(st.just("output") | st.text(), cells(), max_size=2)
    outcomes = {"200": 0, "400": 0}

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(tables, params)
    def ask(table: list[dict], params: dict | None) -> None:
        try:
            answers = predict(rows(*table), params)
        except BadRequestError as refusal:
            outcomes[str(refusal.get_http_status_code())] += 1
            return
        outcomes["200"] += 1
        assert len(answers) == len(table)
        assert all(answers)
        json.dumps(answers, allow_nan=False)

    ask()
    assert min(outcomes.values()) > examples // 50


def largest_requests() -> list[tuple[pd.DataFrame, str]]:
    """Those that take most: the largest images of each kind, and the most rows."""
    return [
        (rows(*({"image": image, "text": TEXT} for image in large_images(SIDE))), "answers"),
        (rows(*[GOOD] * serving.MOST_ROWS), "embeddings"),
        (rows(*[GOOD] * serving.MOST_ROWS), "scores"),
        (rows(*[{**GOOD, "text": "a" * serving.LONGEST_TEXT}] * serving.MOST_ROWS), "answers"),
    ]


def measure(context: PythonModelContext) -> int:
    """Bytes by which the largest requests, four at a time, raise a process's peak."""
    model = ServedModel()
    model.load_context(context)
    requests = largest_requests()
    model.predict(None, rows(*[GOOD] * serving.BATCH_SIZE))
    gc.collect()
    before = psutil.Process().memory_info().rss
    forget_peak()

    def ask(asked: tuple[pd.DataFrame, str]) -> None:
        with suppress(BadRequestError):
            model.predict(None, asked[0], {"output": asked[1]})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, [request for request in requests for _ in range(2)]))
    return peak(os.getpid()) - before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak where Linux has it")
def test_predictions_stay_within_the_memory_that_is_stated(context: PythonModelContext) -> None:
    """In a process of their own, the worst of them at once."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        taken = process.submit(measure, context).result()
    assert 2**26 < taken < serving.MOST_MEMORY
