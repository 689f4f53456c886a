"""The served model: rows of images and texts in, embeddings, retrieval scores or answers out.

MLflow runs this file when it loads a registered model (models from code), so besides
`tasks.registry.tracking` it is the one that imports MLflow. It needs the `alloy` package, which
travels with the model, and nothing of `tasks`.

A row has an `image` (PNG or JPEG, base64), a `text`, or both. The parameter `output` is one of

    answers       answer, confidence: to the row's text, a question about the row's image
    embeddings    image_embedding, text_embedding: unit-length, of what the row has
    scores        scores: cosine similarities of the row's text with the image of every row
"""

import base64
import binascii
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import mlflow.models
import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from alloy.devices import chosen_device
from alloy.modality import ModalityConfig, ModalityModel

INPUTS = (("image", "string"), ("text", "string"))
OUTPUTS = (
    ("answer", "string"),
    ("confidence", "double"),
    ("image_embedding", "double[]"),
    ("text_embedding", "double[]"),
    ("scores", "double[]"),
)
OPTIONS = {"output": "answers"}
MOST_PIXELS = 64_000_000  # of an image that somebody sends
BATCH_SIZE = 64

Row = Mapping[str, str]
Answer = dict[str, object]


class BadRequestError(MlflowException):
    """A request that cannot be answered; a server replies with status 400."""

    def __init__(self, message: str) -> None:
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)


class ServedModel(PythonModel):
    """A modality transformer behind MLflow's `predict`."""

    def load_context(self, context) -> None:
        from transformers import AutoConfig, AutoTokenizer

        folder = Path(context.artifacts["checkpoint"])
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
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
        output = (params or {}).get("output", OPTIONS["output"])
        if not self.answers_rows:
            raise BadRequestError(
                f"only modality transformers answer; this {self.architecture} is kept to be "
                "loaded: mlflow.artifacts.download_artifacts, then from_pretrained on artifacts/"
            )
        if output not in _ANSWER:
            raise BadRequestError(f"output {output!r} is unknown; choose one of {sorted(_ANSWER)}")
        rows = [
            {key: value for key, value in row.items() if isinstance(value, str)}
            for row in model_input.to_dict("records")
        ]
        return _ANSWER[output](self, rows)

    @torch.no_grad()
    def answer(self, rows: Sequence[Row]) -> list[Answer]:
        """The likeliest answer to each row's question about its image, and its probability."""
        _refuse_missing(rows, "answers", ("image", "text"))
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
        for number, row in enumerate(rows):
            if not row:
                raise BadRequestError(f"row {number} has neither image nor text")
        embeddings: list[Answer] = [{} for _ in rows]
        for key, encode in (("image", self._embed_images), ("text", self._embed_texts)):
            having = [number for number, row in enumerate(rows) if key in row]
            for start in range(0, len(having), BATCH_SIZE):
                chosen = having[start : start + BATCH_SIZE]
                vectors = encode([rows[number] for number in chosen])
                for number, vector in zip(chosen, vectors.tolist(), strict=True):
                    embeddings[number][f"{key}_embedding"] = vector
        return embeddings

    def score(self, rows: Sequence[Row]) -> list[Answer]:
        """The similarity of each row's text to the image of every row."""
        _refuse_missing(rows, "scores", ("image", "text"))
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
        images = np.stack([_decode(row["image"], side) for row in rows])
        return torch.from_numpy(images).permute(0, 3, 1, 2).to(self.model.device)

    def _tokens(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        longest = self.model.config.max_position_embeddings
        if self.tokenizer is None:
            raise BadRequestError(
                "this model was registered without a tokenizer: it takes no texts"
            )
        encoded = self.tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        num_tokens = encoded["input_ids"].shape[1]
        if num_tokens > longest:
            raise BadRequestError(f"a text has {num_tokens} tokens, the model takes {longest}")
        device = self.model.device
        return encoded["input_ids"].to(device), encoded["attention_mask"].to(device)


_ANSWER: Mapping[str, Callable[[ServedModel, Sequence[Row]], list[Answer]]] = {
    "answers": ServedModel.answer,
    "embeddings": ServedModel.embed,
    "scores": ServedModel.score,
}


def _refuse_missing(rows: Sequence[Row], output: str, keys: Sequence[str]) -> None:
    for number, row in enumerate(rows):
        if missing := [key for key in keys if key not in row]:
            raise BadRequestError(
                f"{output} need an image and a text; row {number} has no {missing[0]}"
            )


def _decode(image: str, side: int) -> np.ndarray:
    """Pixels `[side, side, 3]`, uint8, of a base64 image; another size is scaled."""
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(image, validate=True)))
        if picture.width * picture.height > MOST_PIXELS:
            raise BadRequestError(
                f"an image of {picture.width}x{picture.height} pixels is too large"
            )
        rgb = picture.convert("RGB")
    except (binascii.Error, UnidentifiedImageError, OSError) as error:
        raise BadRequestError(f"an image is no PNG or JPEG in base64: {error}") from error
    if rgb.size != (side, side):
        rgb = rgb.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(rgb, dtype=np.uint8)


mlflow.models.set_model(ServedModel())
