"""The family of a result: what it takes and gives when it is served, and its task in transformers.

Known from the class that its config names and the processors beside it; no weights are read.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers.models.auto import modeling_auto

from alloy.errors import CheckpointError
from alloy.processors import reads_films, without_films
from tasks.evaluation.loading import (
    class_name,
    image_processor,
    joint_processor,
    load_config,
    load_tokenizer,
)

Columns = Sequence[tuple[str, str]]
TEXT, IMAGE = ("text", "string"), ("image", "string")
SENTENCE_MODULES = ("Transformer", "Pooling", "Normalize")  # that are served as they are


@dataclass(frozen=True)
class Family:
    """The way a model is served and loaded."""

    name: str | None  # of `tasks.registry.serving`; None: it is kept to be loaded
    task: str  # of transformers.pipeline
    pipeline: str  # the class of that
    inputs: Columns = ()
    outputs: Columns = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    components: Mapping[str, str] = field(default_factory=dict)  # its processors' classes by kind
    packages: Sequence[str] = ()  # that its processors need besides those of every served model


GENERATION = ("generation", "text-generation", "TextGenerationPipeline")
TABLE: Sequence[tuple[str, str, tuple[str | None, str, str]]] = (
    # a mapping of transformers, what the model reads, its family, task and pipeline
    ("CAUSAL_LM", "tokenizer", GENERATION),
    (
        "SEQUENCE_CLASSIFICATION",
        "tokenizer",
        ("classes", "text-classification", "TextClassificationPipeline"),
    ),
    (
        "IMAGE_CLASSIFICATION",
        "image_processor",
        ("classes", "image-classification", "ImageClassificationPipeline"),
    ),
    (
        "ZERO_SHOT_IMAGE_CLASSIFICATION",
        "tokenizer image_processor",
        ("towers", "zero-shot-image-classification", "ZeroShotImageClassificationPipeline"),
    ),
    ("MASKED_LM", "tokenizer", ("words", "fill-mask", "FillMaskPipeline")),
    (
        "IMAGE_TEXT_TO_TEXT",
        "tokenizer image_processor",
        ("replies", "image-text-to-text", "ImageTextToTextPipeline"),
    ),
)

COLUMNS: Mapping[tuple[str | None, str], tuple[Columns, Columns, Mapping[str, Any]]] = {
    ("generation", "text"): ([TEXT], [TEXT], {"max_new_tokens": 64}),
    ("words", "text"): (
        [TEXT],
        [("text", "string"), ("words", "string[]"), ("chances", "double[]")],
        {},
    ),
    ("replies", "text image"): ([IMAGE, TEXT], [TEXT], {"max_new_tokens": 64}),
    ("classes", "text"): ([TEXT], [("label", "string"), ("score", "double")], {}),
    ("classes", "image"): ([IMAGE], [("label", "string"), ("score", "double")], {}),
    ("embeddings", "text"): ([TEXT], [("embedding", "double[]")], {}),
    ("embeddings", "image"): ([IMAGE], [("embedding", "double[]")], {}),
    ("towers", "text image"): (
        [IMAGE, TEXT],
        [
            ("image_embedding", "double[]"),
            ("text_embedding", "double[]"),
            ("scores", "double[]"),
        ],
        {"output": "scores"},
    ),
}


def family_of(folder: Path) -> Family | None:
    """The family of a checkpoint of transformers; None where no task of transformers is its.

    Raises:
        CheckpointError: a config that names no class of transformers, or a broken processor.
    """
    name = class_name(folder)
    readers = {"tokenizer": load_tokenizer(folder), "image_processor": image_processor(folder)}
    components = {kind: type(each).__name__ for kind, each in readers.items() if each is not None}
    for mapping, needed, found in TABLE:
        if name in _classes(mapping) and {*needed.split()} <= {*components}:
            own = {n: components[n] for n in needed.split()}
            served, *task = found
            if served == "words" and readers["tokenizer"].mask_token is None:
                served = None
            if served == "replies":
                return _of_replies(folder, served, *task, components=own)
            return _family(served, *task, components=own)
    return _encoder(folder, name, components)


def _of_replies(
    folder: Path, served: str | None, *task: str, components: Mapping[str, str]
) -> Family:
    """The family of what reads texts and images together."""
    try:
        joint = joint_processor(folder)
    except CheckpointError as error:
        if without_films(folder) is None:
            print(f"registered to be loaded, not served: {error}")
            return _family(None, *task, components=components)
        print(
            "served for texts and images: install torchvision to load it with its whole processor"
        )
        return _family(served, *task, components=components)
    own = {**components, "processor": type(joint).__name__}
    packages = ("torchvision",) if reads_films(joint) else ()
    return replace(_family(served, *task, components=own), packages=packages)


def _encoder(folder: Path, name: str, components: Mapping[str, str]) -> Family | None:
    """A model without a head; one of sentence-transformers whose modules are all known."""
    if name not in _classes("") or load_config(folder).is_encoder_decoder or not components:
        return None
    kind = "tokenizer" if "tokenizer" in components else "image_processor"
    own = {kind: components[kind]}
    if kind == "image_processor":
        pipeline = ("image-feature-extraction", "ImageFeatureExtractionPipeline")
        return _family("embeddings", *pipeline, components=own)
    modules = folder / "modules.json"
    known = not modules.is_file() or _known(modules.read_text())
    pipeline = ("feature-extraction", "FeatureExtractionPipeline")
    return _family("embeddings" if known else None, *pipeline, components=own)


def _known(modules: str) -> bool:
    kinds = [str(module["type"]).rpartition(".")[2] for module in json.loads(modules)]
    return {*kinds} <= {*SENTENCE_MODULES}


def _family(name: str | None, task: str, pipeline: str, components: Mapping[str, str]) -> Family:
    kinds = {"tokenizer": "text", "image_processor": "image"}
    reads = " ".join(kinds[kind] for kind in components if kind in kinds)
    inputs, outputs, options = COLUMNS.get((name, reads), ((), (), {}))
    return Family(name, task, pipeline, inputs, outputs, options, components)


def _classes(mapping: str) -> set[str]:
    names = getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES", None)
    if names is None:
        names = modeling_auto.MODEL_MAPPING_NAMES
    return {n for value in names.values() for n in ([value] if isinstance(value, str) else value)}


def example_of(family: Family, folder: Path) -> dict[str, str] | None:
    """One row of input; None for a model that is not served."""
    masks = f" {load_tokenizer(folder).mask_token}" if family.name == "words" else ""
    rows = {"text": f"hello{masks}", "image": grey(_side(load_config(folder)))}
    return {name: rows[name] for name, _ in family.inputs} or None


def _side(config: Any) -> int:
    side = getattr(getattr(config, "vision_config", config), "image_size", None)
    return side if isinstance(side, int) else 32


def grey(side: int) -> str:
    """A grey square as base64 PNG."""
    from PIL import Image

    content = io.BytesIO()
    Image.new("RGB", (side, side), (128, 128, 128)).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()
