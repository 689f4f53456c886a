"""The served model: rows of images and texts in, embeddings, retrieval scores or answers out.

MLflow runs this file when it loads a registered model (models from code), so besides
`tasks.registry.tracking` it is the one that imports MLflow. It needs the `alloy` package, which
travels with the model, and nothing of `tasks`.

A row has an `image` (PNG or JPEG, base64), a `text`, or both. The parameter `output` is one of

    answers       answer, confidence: to the row's text, a question about the row's image
    embeddings    image_embedding, text_embedding: unit-length, of what the row has
    scores        scores: cosine similarities of the row's text with the image of every row

Whatever else arrives is a BadRequestError with the row's number. The limits below bound memory:
besides the table that is passed and the model's own pass over BATCH_SIZE rows, predictions take
at most MOST_MEMORY, however many are asked for at once, as one is made at a time. One image is
decoded at a time, at 4 bytes a pixel in each of two modes and 8 more for the coefficients of a
progressive JPEG (256 MiB); MOST_ROWS squared scores take 48 bytes each (48 MiB), embeddings of
2,048 numbers for images and texts as much three times over.

`mlflow models serve` bounds neither the size of a request nor the table that it makes of one
before the model is asked; `tasks.registry.server` does.
"""

import base64
import io
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import mlflow.models
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel
from PIL import Image
from torch import Tensor

from alloy.devices import chosen_device

INPUTS = (("image", "string"), ("text", "string"))
OUTPUTS = (
    ("answer", "string"),
    ("confidence", "double"),
    ("image_embedding", "double[]"),
    ("text_embedding", "double[]"),
    ("scores", "double[]"),
)
OPTIONS = {"output": "answers"}
FORMATS = ("PNG", "JPEG")  # no other decoder sees a request: Pillow's EPS starts Ghostscript
MOST_ROWS = 1024  # of a request
MOST_PIXELS = 2**24  # of an image
LONGEST_SIDE = 2**14  # of an image, in pixels
LONGEST_IMAGE = 2**24  # characters of base64
MOST_SCANS = 100  # of a JPEG; each costs a pass over the image and a few bytes
LONGEST_TEXT = 2**14  # characters
MOST_MEMORY = 2**29  # bytes
BATCH_SIZE = 64

Answer = dict[str, object]


class BadRequestError(MlflowException):
    """A request that cannot be answered; a server replies with status 400."""

    def __init__(self, message: str) -> None:
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)


class Row(NamedTuple):
    """One row of a request; what it lacks is None."""

    number: int  # from 0
    image: str | None
    text: str | None


class ServedModel(PythonModel):
    """A modality transformer behind MLflow's `predict`."""

    def load_context(self, context) -> None:
        # Slow to import, and registering a model of another kind needs neither.
        from transformers import AutoConfig, AutoTokenizer

        from alloy.modality import ModalityConfig, ModalityModel

        folder = Path(context.artifacts["checkpoint"])
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        self.worker = ThreadPoolExecutor(1)
        self.architecture = (config.architectures or [config.model_type])[0]
        self.answers_rows = isinstance(config, ModalityConfig)
        if not self.answers_rows:
            return
        self.model = ModalityModel.from_pretrained(folder, local_files_only=True).eval()
        has_words = (folder / "tokenizer.json").is_file()
        self.tokenizer = (
            AutoTokenizer.from_pretrained(folder, local_files_only=True) if has_words else None
        )
        self.answers: Sequence[str] = context.model_config["answers"]
        self.model.to(chosen_device())

    def predict(self, context, model_input: pd.DataFrame, params=None):
        """One answer a row; BadRequestError says which row cannot be answered and why."""
        if not self.answers_rows:
            raise BadRequestError(
                f"only modality transformers answer; this {self.architecture} is kept to be "
                "loaded: mlflow.artifacts.download_artifacts, then from_pretrained on artifacts/"
            )
        output, rows = _read_output(params), _read_rows(model_input)
        # One thread for all: malloc keeps what each thread freed for that thread.
        return self.worker.submit(_ANSWER[output], self, rows).result()

    @torch.no_grad()
    def answer(self, rows: Sequence[Row]) -> list[Answer]:
        """The likeliest answer to each row's question about its image, and its probability."""
        _refuse_missing(rows, "answers")
        if not self.answers:
            raise BadRequestError("this model has no answers; ask for embeddings or scores")
        answers: list[Answer] = []
        for start in range(0, len(rows), BATCH_SIZE):
            batch = rows[start : start + BATCH_SIZE]
            states = self.model.encode_joint(self._pixels(batch), *self._tokens(batch))
            chances = self.model.answer_logits(states).float().softmax(-1).cpu()
            answers += [
                {"answer": self.answers[int(chance.argmax())], "confidence": float(chance.max())}
                for chance in chances
            ]
        return answers

    @torch.no_grad()
    def embed(self, rows: Sequence[Row]) -> list[Answer]:
        """The unit-length embeddings of what each row has."""
        for row in rows:
            if row.image is None and row.text is None:
                raise BadRequestError(f"row {row.number} has neither image nor text")
        embeddings: list[Answer] = [{} for _ in rows]
        for key, encode in (("image", self._embed_images), ("text", self._embed_texts)):
            having = [row for row in rows if getattr(row, key) is not None]
            for start in range(0, len(having), BATCH_SIZE):
                batch = having[start : start + BATCH_SIZE]
                for row, vector in zip(batch, encode(batch).tolist(), strict=True):
                    embeddings[row.number][f"{key}_embedding"] = vector
        return embeddings

    def score(self, rows: Sequence[Row]) -> list[Answer]:
        """The similarity of each row's text to the image of every row."""
        _refuse_missing(rows, "scores")
        embedded = self.embed(rows)
        images = np.array([row["image_embedding"] for row in embedded])
        texts = np.array([row["text_embedding"] for row in embedded])
        return [{"scores": scores} for scores in (texts @ images.T).tolist()]

    def _embed_images(self, rows: Sequence[Row]) -> Tensor:
        return self.model.encode_image(self._pixels(rows)).double().cpu()

    def _embed_texts(self, rows: Sequence[Row]) -> Tensor:
        return self.model.encode_text(*self._tokens(rows)).double().cpu()

    def _pixels(self, rows: Sequence[Row]) -> Tensor:
        side = self.model.config.image_size
        images = np.stack([_decode(row, side) for row in rows])
        return torch.from_numpy(images).permute(0, 3, 1, 2).to(self.model.device)

    def _tokens(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        longest = self.model.config.max_position_embeddings
        if self.tokenizer is None:
            raise BadRequestError(
                "this model was registered without a tokenizer: it takes no texts"
            )
        encoded = self.tokenizer([row.text for row in rows], padding=True, return_tensors="pt")
        for row, num_tokens in zip(rows, encoded["attention_mask"].sum(1).tolist(), strict=True):
            if not 0 < num_tokens <= longest:
                raise BadRequestError(
                    f"row {row.number}: text has {num_tokens} tokens, "
                    f"the model takes 1 to {longest}"
                )
        device = self.model.device
        return encoded["input_ids"].to(device), encoded["attention_mask"].to(device)


_ANSWER: Mapping[str, Callable[[ServedModel, Sequence[Row]], list[Answer]]] = {
    "answers": ServedModel.answer,
    "embeddings": ServedModel.embed,
    "scores": ServedModel.score,
}


def _read_output(params: Mapping[str, object] | None) -> str:
    if not isinstance(params, Mapping | None):
        raise BadRequestError(f"params are an object of {list(OPTIONS)}, not {_type(params)}")
    given = dict(params or {})
    output = given.pop("output", OPTIONS["output"])
    if given:
        raise BadRequestError(f"parameters {_names(given)} are unknown; choose of {list(OPTIONS)}")
    if not isinstance(output, str) or output not in _ANSWER:
        raise BadRequestError(
            f"output {str(output)[:40]!r} is unknown; choose one of {sorted(_ANSWER)}"
        )
    return output


def _read_rows(frame: object) -> list[Row]:
    """The rows of a request; BadRequestError for any that no model could answer.

    A missing value is None, as in a row without that column; NaN is how pandas writes it.
    """
    columns = [name for name, _ in INPUTS]
    if not isinstance(frame, pd.DataFrame):
        raise BadRequestError(f"a request is a table with columns of {columns}, not {_type(frame)}")
    if not len(frame.columns) or not len(frame):
        raise BadRequestError(f"a request has rows with columns of {columns}; this one has none")
    if len(frame) > MOST_ROWS:
        raise BadRequestError(f"a request has 1 to {MOST_ROWS} rows; this one has {len(frame)}")
    if unknown := [name for name in frame.columns if name not in columns]:
        raise BadRequestError(f"columns {_names(unknown)} are unknown; choose of {columns}")
    if not frame.columns.is_unique:
        raise BadRequestError(
            f"a request has columns of {columns}, each once; this one has {_names(frame.columns)}"
        )
    return [
        Row(number, _read(row, number, "image"), _read(row, number, "text"))
        for number, row in enumerate(frame.to_dict("records"))
    ]


def _read(row: Mapping, number: int, key: str) -> str | None:
    value = row.get(key)
    if pd.api.types.is_scalar(value) and pd.isna(value):
        return None
    if not isinstance(value, str):
        raise BadRequestError(f"row {number}: {key} is to be a string, not of type {_type(value)}")
    longest = {"image": LONGEST_IMAGE, "text": LONGEST_TEXT}[key]
    if len(value) > longest:
        raise BadRequestError(
            f"row {number}: {key} has {len(value)} characters, at most {longest} are taken"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRequestError(f"row {number}: {key} is no Unicode text: {error}") from error
    return value


def _type(value: object) -> str:
    return type(value).__name__


def _names(names: Iterable[object]) -> list[str]:
    """The first few of somebody's names, shortened."""
    return [str(name)[:40] for name in itertools.islice(names, 3)]


def _refuse_missing(rows: Sequence[Row], output: str) -> None:
    for row in rows:
        for key in ("image", "text"):
            if getattr(row, key) is None:
                raise BadRequestError(
                    f"{output} need an image and a text; row {row.number} has no {key}"
                )


def _decode(row: Row, side: int) -> np.ndarray:
    """Pixels `[side, side, 3]`, uint8, of a row's image; another size is scaled."""
    try:
        content = base64.b64decode(row.image or "", validate=True)
    except ValueError as error:
        raise BadRequestError(f"row {row.number}: image is not base64: {error}") from error
    # Decoders raise whatever broken bytes make them meet: OSError, SyntaxError, struct.error, ...
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadRequestError(f"row {row.number}: image is too large: {error}") from error
    except Exception as error:
        raise BadRequestError(f"row {row.number}: image is no PNG or JPEG") from error
    width, height = picture.size
    if max(width, height) > LONGEST_SIDE or width * height > MOST_PIXELS:
        raise BadRequestError(
            f"row {row.number}: image is too large: {width}x{height} pixels; at most "
            f"{MOST_PIXELS} pixels and sides of {LONGEST_SIDE} are taken"
        )
    scans = content.count(b"\xff\xda")  # within data the first byte is never followed by this one
    if picture.format != "PNG" and scans > MOST_SCANS:
        raise BadRequestError(
            f"row {row.number}: image has {scans} scans, at most {MOST_SCANS} are taken"
        )
    try:
        rgb = picture.convert("RGB")
    except Exception as error:
        raise BadRequestError(f"row {row.number}: image is damaged: {error}") from error
    if rgb.size != (side, side):
        rgb = rgb.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(rgb, dtype=np.uint8)


mlflow.models.set_model(ServedModel())
