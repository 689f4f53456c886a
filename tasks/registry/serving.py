"""The served model: rows of images and texts in; embeddings, scores, classes, texts or answers out.

MLflow runs this file when it loads a registered model (models from code), so besides
`tasks.registry.tracking` it is the one that imports MLflow. It needs the `alloy` package, which
travels with the model, and nothing of `tasks`.

A row has an `image` (PNG or JPEG, base64), a `text`, or both. What comes out depends on the family
of the model (`tasks.registry.families`):

    modality      by the parameter `output`: answers, embeddings or scores
    towers        (CLIP, SigLIP) by `output`: embeddings or scores
    generation    text: the likeliest continuation, of at most `max_new_tokens` tokens
    replies       (LLaVA) text: the likeliest reply to the row's text about its image, if it has one
    words         (BERT) text with its masks filled in; words, chances: the likeliest of each mask
    classes       label, score: of the row's text, or of its image
    embeddings    embedding: of the row's text, or of its image

    answers       answer, confidence: to the row's text, a question about the row's image
    embeddings    image_embedding, text_embedding: unit-length, of what the row has
    scores        scores: cosine similarities of the row's text with the image of every row

Whatever else arrives is a BadRequestError with the row's number. The limits below bound memory:
besides the table that is passed and the model's own pass over BATCH_SIZE rows, which of other
families has their pictures, predictions take at most MOST_MEMORY, one at a time. One image is
decoded at a time, at 4 bytes a pixel in each of two modes and 8 more for the coefficients of a
progressive JPEG (256 MiB); MOST_ROWS squared scores take 48 bytes each (48 MiB), embeddings of
2,048 numbers for images and texts as much three times over.

`mlflow models serve` bounds neither the size of a request nor the table that it makes of one
before the model is asked; `tasks.registry.server` does.
"""

import base64
import io
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

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
from alloy.processors import joint_processor

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
MOST_TOKENS = 2**15  # of a text, where the model sets no limit
MOST_NEW_TOKENS = 1024  # of a generated text
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
    """A model behind MLflow's `predict`: a modality transformer, or one of another family."""

    def load_context(self, context) -> None:
        from transformers import AutoConfig, AutoTokenizer

        from alloy.modality import ModalityConfig, ModalityModel

        folder = Path(context.artifacts["checkpoint"])
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        self.worker = ThreadPoolExecutor(1)
        self.architecture = (config.architectures or [config.model_type])[0]
        self.is_modality = isinstance(config, ModalityConfig)
        if not self.is_modality:
            family = context.model_config.get("family")
            self.other: Any = OTHERS[family](folder, self.architecture) if family else None
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
        # One thread for all: malloc keeps what each thread freed for that thread.
        if self.is_modality:
            output, rows = _read_output(params, _ANSWER, OPTIONS), _read_rows(model_input)
            return self.worker.submit(_ANSWER[output], self, rows).result()
        if self.other is None:
            raise BadRequestError(
                f"this {self.architecture} is kept to be loaded, with mlflow.transformers, or "
                "from_pretrained on its artifacts/: no answer to rows is known for it"
            )
        settings, rows = self.other.read(params), _read_rows(model_input)
        return self.worker.submit(self.other.predict, rows, **settings).result()

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
        _refuse_empty(rows)
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
        return _scores(self.embed(rows))

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
            _refuse_length(row, num_tokens, longest)
        device = self.model.device
        return encoded["input_ids"].to(device), encoded["attention_mask"].to(device)


_ANSWER: Mapping[str, Callable[[ServedModel, Sequence[Row]], list[Answer]]] = {
    "answers": ServedModel.answer,
    "embeddings": ServedModel.embed,
    "scores": ServedModel.score,
}


class Transformer:
    """A model of transformers with what it reads pictures and texts by."""

    OPTIONS: Mapping[str, Any] = {}

    def __init__(self, folder: Path, architecture: str) -> None:
        import transformers

        self.device = chosen_device()
        given = {"pretrained_model_name_or_path": folder, "local_files_only": True}
        if "alloy_trunk" in json.loads((folder / "config.json").read_text()):
            model = import_module("alloy.modality.sharing").load_shared(folder)
        else:
            model = getattr(transformers, architecture).from_pretrained(**given, dtype="auto")
        model.eval()
        # Few operations of a CPU know float16.
        is_half = self.device.type == "cpu" and model.dtype == torch.float16
        self.model: Any = (model.float() if is_half else model).to(self.device)
        self.tokenizer: Any = None
        self.processor: Any = None
        if (folder / "tokenizer_config.json").is_file():
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(**given)
        if (folder / "preprocessor_config.json").is_file():
            self.processor = transformers.AutoImageProcessor.from_pretrained(**given)

    def read(self, params: object) -> dict[str, Any]:
        """The settings of a request."""
        _read_params(params, self.OPTIONS)
        return {}

    def tokens(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The tokens of texts, padded; BadRequestError for one that is too long."""
        padded: Any = self.tokenizer.pad_token is not None
        text = getattr(self.model.config, "text_config", None) or self.model.config
        most = getattr(text, "max_position_embeddings", None) or MOST_TOKENS
        longest = min(most, self.tokenizer.model_max_length)
        if "siglip" in self.model.config.model_type:
            padded = "max_length"  # of texts that are padded to less it has seen none
        limit = {"max_length": longest} if padded == "max_length" else {}
        encoded = self.tokenizer(
            [row.text for row in rows], padding=padded, return_tensors="pt", **limit
        )
        counts = encoded.get("attention_mask", torch.ones_like(encoded["input_ids"])).sum(1)
        for row, num_tokens in zip(rows, counts.tolist(), strict=True):
            _refuse_length(row, num_tokens, longest)
        return {name: tensor.to(self.device) for name, tensor in encoded.items()}

    def pixels(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The pictures as the model's own processor makes them."""
        one_channel = getattr(self.model.config, "num_channels", 3) == 1
        made = [  # one after another: a picture is as large as it comes
            self.processor(_picture(row).convert("L" if one_channel else "RGB"))["pixel_values"]
            for row in rows
        ]
        pixels = torch.from_numpy(np.concatenate([np.asarray(each) for each in made]))
        return {"pixel_values": pixels.to(self.device, self.model.dtype)}

    def batches(
        self, rows: Sequence[Row], key: str, size: int = BATCH_SIZE
    ) -> Iterable[tuple[Sequence[Row], dict[str, Tensor]]]:
        """The rows with their inputs, all of which have an image, or a text."""
        for row in rows:
            if getattr(row, key) is None:
                raise BadRequestError(f"row {row.number} has no {key}")
        if key == "text" and self.tokenizer.pad_token is None:
            size = 1
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            yield batch, (self.tokens if key == "text" else self.pixels)(batch)


class Generation(Transformer):
    """The likeliest continuation of each row's text, row by row: padding changes no answer."""

    OPTIONS: Mapping[str, Any] = {"max_new_tokens": 64}

    def read(self, params: object) -> dict[str, Any]:
        num = _read_params(params, self.OPTIONS)["max_new_tokens"]
        if not isinstance(num, int) or isinstance(num, bool) or not 0 < num <= MOST_NEW_TOKENS:
            raise BadRequestError(
                f"max_new_tokens is a number from 1 to {MOST_NEW_TOKENS}, not {str(num)[:40]}"
            )
        return {"max_new_tokens": num}

    @torch.no_grad()
    def predict(self, rows: Sequence[Row], **settings: Any) -> list[Answer]:
        answers: list[Answer] = []
        for _, inputs in self.batches(rows, "text", size=1):
            inputs.pop("token_type_ids", None)
            ids = self.model.generate(**inputs, do_sample=False, **settings)
            new = ids[0, inputs["input_ids"].shape[1] :]
            answers.append({"text": self.tokenizer.decode(new, skip_special_tokens=True)})
        return answers


class Replies(Generation):
    """The likeliest reply to each row's text, and its image where it has one, row by row."""

    def __init__(self, folder: Path, architecture: str) -> None:
        super().__init__(folder, architecture)
        self.joint = joint_processor(folder)
        self.token = str(getattr(self.joint, "image_token", "<image>"))

    def batches(
        self, rows: Sequence[Row], key: str, size: int = BATCH_SIZE
    ) -> Iterable[tuple[Sequence[Row], dict[str, Tensor]]]:
        for row in rows:
            if row.text is None:
                raise BadRequestError(f"row {row.number} has no text")
            if self.token in row.text:
                raise BadRequestError(
                    f"row {row.number}: text has {self.token!r}, which stands for the image"
                )
            images = None if row.image is None else [_picture(row)]
            encoded = self.joint(
                text=[self._prompt(row.text, row.image)], images=images, return_tensors="pt"
            )
            text = self.model.config.get_text_config()
            longest = getattr(text, "max_position_embeddings", None) or MOST_TOKENS
            _refuse_length(row, encoded["input_ids"].shape[1], longest)
            yield [row], dict(encoded.to(self.device, self.model.dtype))

    def _prompt(self, text: str, image: str | None) -> str:
        """As the chat template has it; without one, the image and then the text."""
        if not self.joint.chat_template:
            return text if image is None else f"{self.token}\n{text}"
        seen = [] if image is None else [{"type": "image"}]
        turn = {"role": "user", "content": [*seen, {"type": "text", "text": text}]}
        return self.joint.apply_chat_template([turn], add_generation_prompt=True)


class Words(Transformer):
    """The likeliest word for each mask in each row's text, and its probability."""

    @torch.no_grad()
    def predict(self, rows: Sequence[Row], **settings: Any) -> list[Answer]:
        answers: list[Answer] = []
        mask = self.tokenizer.mask_token
        for batch, inputs in self.batches(rows, "text"):
            ids = inputs["input_ids"]
            hidden = ids == self.tokenizer.mask_token_id
            for row, num in zip(batch, hidden.sum(1).tolist(), strict=True):
                if not num:
                    raise BadRequestError(f"row {row.number}: text has no {mask}")
            chances, words = self.model(**inputs).logits.float().softmax(-1).max(-1)
            filled = torch.where(hidden, words, ids).cpu()
            for i, where in enumerate(hidden.cpu()):
                answers.append(
                    {
                        "text": self.tokenizer.decode(filled[i], skip_special_tokens=True),
                        "words": [self.tokenizer.decode([w]) for w in filled[i][where].tolist()],
                        "chances": chances[i].cpu()[where].tolist(),
                    }
                )
        return answers


class Classes(Transformer):
    """The likeliest class of each row's text or image, and its probability."""

    @torch.no_grad()
    def predict(self, rows: Sequence[Row], **settings: Any) -> list[Answer]:
        answers: list[Answer] = []
        key = "image" if self.processor is not None else "text"
        for _, inputs in self.batches(rows, key):
            chances = self.model(**inputs).logits.float().softmax(-1).cpu()
            names = self.model.config.id2label
            answers += [
                {"label": str(names[int(c.argmax())]), "score": float(c.max())} for c in chances
            ]
        return answers


class Embeddings(Transformer):
    """The embedding of each row's text or image: pooled as the checkpoint says, or the mean."""

    def __init__(self, folder: Path, architecture: str) -> None:
        super().__init__(folder, architecture)
        pooling = folder / "1_Pooling" / "config.json"
        settings = json.loads(pooling.read_text()) if pooling.is_file() else {}
        self.takes_first = bool(settings.get("pooling_mode_cls_token"))
        modules = folder / "modules.json"
        self.normalizes = modules.is_file() and "Normalize" in modules.read_text()

    @torch.no_grad()
    def predict(self, rows: Sequence[Row], **settings: Any) -> list[Answer]:
        answers: list[Answer] = []
        key = "image" if self.tokenizer is None else "text"
        for _, inputs in self.batches(rows, key):
            states = self.model(**inputs).last_hidden_state.float()
            states = states.flatten(2).mT if states.dim() == 4 else states  # maps [N, C, H, W]
            mask = inputs.get("attention_mask", torch.ones(states.shape[:2])).to(states)
            pooled = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            pooled = states[:, 0] if self.takes_first else pooled
            pooled = torch.nn.functional.normalize(pooled) if self.normalizes else pooled
            answers += [{"embedding": vector} for vector in pooled.cpu().tolist()]
        return answers


class Towers(Transformer):
    """Embeddings of images and texts in one space, or the similarities of texts with images."""

    OPTIONS: Mapping[str, Any] = {"output": "scores"}

    def read(self, params: object) -> dict[str, Any]:
        return {"output": _read_output(params, ("embeddings", "scores"), self.OPTIONS)}

    def predict(self, rows: Sequence[Row], **settings: Any) -> list[Answer]:
        if settings["output"] == "embeddings":
            return self.embed(rows)
        _refuse_missing(rows, "scores")
        return _scores(self.embed(rows))

    @torch.no_grad()
    def embed(self, rows: Sequence[Row]) -> list[Answer]:
        _refuse_empty(rows)
        answers: list[Answer] = [{} for _ in rows]
        for key in ("image", "text"):
            having = [row for row in rows if getattr(row, key) is not None]
            for batch, inputs in self.batches(having, key):
                features = getattr(self.model, f"get_{key}_features")(**inputs)
                tensor = features if isinstance(features, Tensor) else features.pooler_output
                unit = torch.nn.functional.normalize(tensor.double(), dim=1).cpu()
                for row, vector in zip(batch, unit.tolist(), strict=True):
                    answers[row.number][f"{key}_embedding"] = vector
        return answers


OTHERS: Mapping[str, type[Transformer]] = {
    "generation": Generation, "replies": Replies, "words": Words,
    "classes": Classes, "embeddings": Embeddings, "towers": Towers,
}  # fmt: skip


def _read_params(params: object, options: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(params, Mapping | None):
        raise BadRequestError(f"params are an object of {list(options)}, not {_type(params)}")
    if unknown := [name for name in params or () if name not in options]:
        raise BadRequestError(
            f"parameters {_names(unknown)} are unknown; choose of {list(options)}"
        )
    return {**options, **(params or {})}


def _read_output(params: object, outputs: Iterable[str], options: Mapping[str, Any]) -> str:
    output = _read_params(params, options)["output"]
    if not isinstance(output, str) or output not in outputs:
        raise BadRequestError(
            f"output {str(output)[:40]!r} is unknown; choose one of {sorted(outputs)}"
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


def _refuse_length(row: Row, num_tokens: int, longest: int) -> None:
    if not 0 < num_tokens <= longest:
        raise BadRequestError(
            f"row {row.number}: text has {num_tokens} tokens, the model takes 1 to {longest}"
        )


def _refuse_empty(rows: Sequence[Row]) -> None:
    for row in rows:
        if row.image is None and row.text is None:
            raise BadRequestError(f"row {row.number} has neither image nor text")


def _scores(embedded: Sequence[Answer]) -> list[Answer]:
    """The similarities of each row's text with the image of every row."""
    images = np.array([row["image_embedding"] for row in embedded])
    texts = np.array([row["text_embedding"] for row in embedded])
    return [{"scores": scores} for scores in (texts @ images.T).tolist()]


def _decode(row: Row, side: int) -> np.ndarray:
    """Pixels `[side, side, 3]`, uint8, of a row's image; another size is scaled."""
    rgb = _picture(row)
    if rgb.size != (side, side):
        rgb = rgb.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(rgb, dtype=np.uint8)


def _picture(row: Row) -> Image.Image:
    """A row's image, RGB."""
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
        return picture.convert("RGB")
    except Exception as error:
        raise BadRequestError(f"row {row.number}: image is damaged: {error}") from error


mlflow.models.set_model(ServedModel())
