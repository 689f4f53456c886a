"""`alloy symmetry`: the symmetries of a model, as a table and as JSON.

The weights are not needed: a configuration gives the architecture and the example inputs.
"""

import inspect
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alloy.cli.wording import refusals
from alloy.errors import SymmetryError, nearest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

EXAMPLE = """**Example**: spaces of a checkpoint, or of a config.json alone

    alloy symmetry models/bert --output bert.symmetry.json"""


def symmetry(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="PATH_OR_CONFIG",
            help="A checkpoint's folder, or a folder or file with a config.json.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Also write the spec as JSON, for alloy.SymmetrySpec."),
    ] = None,
) -> None:
    """Show which units may be reordered, flipped or turned without changing the function."""
    import alloy

    with refusals("symmetry"):
        architecture = load(model)
        spec = alloy.find_symmetries(architecture, example_inputs(architecture))
        typer.echo(spec)
        if output is not None:
            _write_whole(output, spec.to_json() + "\n")
            typer.echo(f"wrote {output}: {len(spec.spaces)} spaces over {len(spec.layout)} weights")


def load(path: Path) -> "PreTrainedModel":
    """A model of this configuration without weights. Raises SymmetryError if there is none."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise SymmetryError(
            f"{path}: no config.json there; give a checkpoint's folder or its config.json"
        )
    import torch
    import transformers
    from transformers import AutoConfig

    import alloy.modality  # registers the modality transformer

    data = _config(file)
    kind = data.pop("model_type", None)
    if not isinstance(kind, str) or kind not in transformers.CONFIG_MAPPING:
        known = transformers.CONFIG_MAPPING.keys()
        hint = nearest(kind, known).partition("choose one of")[0] if isinstance(kind, str) else ""
        raise SymmetryError(
            f"{file}: model_type is {kind!r}, which transformers {transformers.__version__} does "
            f"not know; {hint or 'give a configuration of transformers'}"
        )
    config = AutoConfig.for_model(kind, **data)
    names = config.architectures or []
    classes = [
        getattr(owner, name)
        for name in names
        for owner in (transformers, alloy.modality)
        if hasattr(owner, name)
    ]
    if not classes:
        raise SymmetryError(
            f"{file}: architectures is {names}; it must name a class of transformers"
        )
    config.dtype = torch.float32
    with torch.device("meta"):
        return classes[0](config).eval()


def _config(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_bytes())
    except ValueError as error:
        raise SymmetryError(f"{file}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise SymmetryError(f"{file}: a configuration is a JSON object, this is {data!r:.40}")
    return data


def example_inputs(model: "PreTrainedModel") -> "dict[str, torch.Tensor]":
    """A batch of two for the inputs that the model requires, from the sizes in its config."""
    import torch

    accepted = inspect.signature(model.forward).parameters
    configs = [model.config, *_sub_configs(model.config)]

    def size(*names: str, default: int) -> int:
        values = (getattr(c, n, None) for c in configs for n in names)
        return next((int(x[0] if isinstance(x, list | tuple) else x) for x in values if x), default)

    generator = torch.Generator().manual_seed(0)
    length = min(16, size("max_position_embeddings", "n_positions", default=16))
    words = size("vocab_size", default=32)
    ids = torch.randint(min(3, words - 1), words, (2, length), generator=generator)
    side = size("image_size", default=224)
    image = torch.rand(2, size("num_channels", default=3), side, side, generator=generator)
    frames = 2 * size("max_source_positions", default=512)
    sound = torch.randn(2, size("num_mel_bins", default=80), frames, generator=generator)
    made: dict[str, Any] = {
        "input_ids": ids,
        "pixel_values": image,
        "input_features": sound,
        "input_values": torch.randn(2, 16000, generator=generator),
        "decoder_input_ids": ids,
    }
    main = model.main_input_name
    wanted = [name for name in made if name in accepted]
    if main not in ("input_values", "input_features"):
        wanted = [n for n in wanted if n not in ("input_values", "input_features")]
    if not getattr(model.config, "is_encoder_decoder", False):
        wanted = [n for n in wanted if n != "decoder_input_ids"]
    return {name: made[name] for name in wanted}


def _sub_configs(config: Any) -> list[Any]:
    return [c for name in getattr(config, "sub_configs", {}) if (c := getattr(config, name, None))]


def _write_whole(path: Path, text: str) -> None:
    """Write a file that is whole or absent."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.incomplete")
    try:
        partial.write_text(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
