"""Print the symmetries of a model, and write them as JSON: `python -m tasks.symmetry PATH_OR_CONFIG`.

PATH_OR_CONFIG is a checkpoint's folder, or a folder or file with a config.json: the weights are not
needed. Example inputs are made from the config. The JSON goes to `<name>.symmetry.json` here, or to
the path given second.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, PreTrainedModel

import alloy
from alloy.errors import SymmetryError
from alloy.symmetry import Space, SymmetrySpec
from tasks.storage import write_file

_PINNED_ROWS = 12


def load(path: Path) -> PreTrainedModel:
    """A model of this configuration without weights. Raises SymmetryError if there is none."""
    folder = path.parent if path.is_file() else path
    file = folder / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise SymmetryError(
            f"{path}: no config.json there; give a checkpoint's folder or its config.json"
        )
    import alloy.modality  # registers the modality transformer

    data = json.loads(file.read_text())
    config = AutoConfig.for_model(data.pop("model_type"), **data)
    names = config.architectures or []
    known = [n for n in names if hasattr(transformers, n) or hasattr(alloy.modality, n)]
    if not known:
        raise SymmetryError(
            f"{file}: architectures is {names}; it must name a class of transformers"
        )
    owner = transformers if hasattr(transformers, known[0]) else alloy.modality
    config.dtype = torch.float32
    with torch.device("meta"):
        return getattr(owner, known[0])(config).eval()


def example_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A batch of two for the inputs that the model's forward requires, from the sizes in its config."""
    import inspect

    accepted = inspect.signature(model.forward).parameters
    configs = [model.config, *_sub_configs(model.config)]

    def size(*names: str, default: int) -> int:
        found = (getattr(c, n, None) for c in configs for n in names)
        return next((int(x[0] if isinstance(x, list | tuple) else x) for x in found if x), default)

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


def where(space: Space) -> str:
    """The first axes of a space, and how many more there are."""
    shown = [str(axis) for axis in space.axes[:3]]
    more = len(space.axes) - len(shown)
    return "\n".join([*shown, *([f"and {more} more"] if more else [])])


def kind(space: Space) -> str:
    if not space.pair_stride:
        return space.kind
    return f"{space.kind}\npairs {space.pair_stride} apart"


def show(spec: SymmetrySpec, console: Console) -> None:
    numbers = {name: str(i) for i, name in enumerate([*spec.spaces, *spec.fixed])}
    table = Table(title=f"{len(spec.spaces)} spaces", show_lines=True)
    for column in ("#", "size", "kind", "after folding norms", "per unit of", "where it lies"):
        table.add_column(column, justify="right" if column in ("#", "size") else "left")
    for space in spec.spaces.values():
        parents = ", ".join(numbers[p] for p in space.depends_on)
        folded = space.folded_kind if space.folded_kind != space.kind else ""
        table.add_row(
            numbers[space.name], str(space.size), kind(space), folded, parents, where(space)
        )
    console.print(table)
    reasons: dict[str, list[str]] = {}
    for pinned in spec.pinned:
        reasons.setdefault(pinned.reason, []).append(f"{pinned.axis} ({pinned.size})")
    if reasons:
        table = Table(title="pinned, and why", show_lines=True)
        table.add_column("why")
        table.add_column("what")
        for reason, axes in reasons.items():
            more = len(axes) - _PINNED_ROWS
            table.add_row(
                reason,
                "\n".join([*axes[:_PINNED_ROWS], *([f"and {more} more"] if more > 0 else [])]),
            )
        console.print(table)
    for space, reason in spec.unfoldable.items():
        console.print(f"space {numbers[space]} cannot be folded: {reason}")
    if spec.unused:
        console.print(
            f"not reached by the example inputs, left as they are: {', '.join(spec.unused)}"
        )
    for operation, module in spec.unknown_operations.items():
        console.print(f"no rule for {operation} (in {module}): what it touches is pinned")


def main(arguments: list[str]) -> None:
    if not 1 <= len(arguments) <= 2:
        raise SystemExit("usage: python -m tasks.symmetry PATH_OR_CONFIG [OUTPUT.json]")
    path = Path(arguments[0])
    folder = path.parent if path.is_file() else path
    output = Path(arguments[1] if len(arguments) == 2 else f"{folder.resolve().name}.symmetry.json")
    try:
        model = load(path)
        spec = alloy.find_symmetries(model, example_inputs(model))
    except SymmetryError as error:
        raise SystemExit(f"error: {error}") from error
    show(spec, Console())
    with write_file(output) as partial:
        partial.write_text(spec.to_json() + "\n")
    print(f"wrote {output}: {len(spec.spaces)} spaces over {len(spec.layout)} weights")


if __name__ == "__main__":
    main(sys.argv[1:])
