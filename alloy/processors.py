"""The joint processor of a checkpoint: what its model reads texts and images by together."""

from __future__ import annotations

import json
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

_CONFIGS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def joint_processor(folder: Path) -> Any:
    """Load the processor; where torchvision is missing, one that reads texts and images alone.

    Raises:
        ImportError, ValueError, OSError: as transformers does.
    """
    import transformers

    try:
        return transformers.AutoProcessor.from_pretrained(folder, local_files_only=True)
    except ImportError:
        found = without_films(folder)
        if found is None:
            raise
        return found


def without_films(folder: Path) -> Any:
    """The processor without its part for films, which transformers reads by torchvision.

    None where torchvision is there, or where the processor reads no films.
    """
    kind = None if find_spec("torchvision") is not None else _class_of(folder)
    return None if kind is None else _without_films(kind, folder)


def reads_films(processor: Any) -> bool:
    return getattr(processor, "video_processor", None) is not None


def _class_of(folder: Path) -> Any:
    """The class that the configs name, if it is one that reads films."""
    import transformers

    named = (_read(folder / name).get("processor_class") for name in _CONFIGS)
    kind = getattr(transformers, next(filter(None, named), ""), None)
    films = kind is not None and "video_processor" in signature(kind.__init__).parameters
    return kind if films else None


def _without_films(kind: Any, folder: Path) -> Any:
    """A processor of this class that has no part for films."""
    import transformers

    class WithoutFilms(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
            if argument_name == "video_processor" and argument is None:
                return type(None)
            return super().check_argument_for_proper_class(argument_name, argument)

    WithoutFilms.__name__ = kind.__name__
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    template = _read(folder / "chat_template.json").get("chat_template", tokenizer.chat_template)
    parts = {
        "image_processor": transformers.AutoImageProcessor.from_pretrained(
            folder, local_files_only=True
        ),
        "tokenizer": tokenizer,
        "video_processor": None,
        "chat_template": template,
    }
    own = _read(folder / "processor_config.json")
    settings = {k: own[k] for k in signature(kind.__init__).parameters if k in own.keys() - parts}
    return WithoutFilms(**parts, **settings)


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.is_file() else {}
