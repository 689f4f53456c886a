"""Import the tower of another model, run it as a modality transformer, and export it back."""

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from alloy.errors import CheckpointError, nearest
from alloy.modality.configuration import ModalityConfig
from alloy.modality.experts import copy_to_experts, expert_name
from alloy.modality.modeling import ModalityModel
from alloy.modality.resizing import resize_images
from alloy.modality.towers.architecture import (
    Architecture,
    Inputs,
    Layout,
    gather,
    layout_of,
    scatter,
    settings_of,
)
from alloy.modality.towers.sources import Source, read_source, refuse_unknown_type
from alloy.modality.towers.tables import ARCHITECTURES
from alloy.types import Weights

_EMBEDDINGS = {"images": "image_embeddings.", "texts": "text_embeddings.", "states": "blocks."}


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A tower of another model under the modality transformer's names."""

    name: str
    """Type of the model, and which of its parts this is."""
    inputs: Inputs
    config: ModalityConfig
    """Of a modality-agnostic model whose blocks are this tower's."""
    weights: Weights
    """Embeddings (of images or texts), blocks and final norm."""
    kept: Weights
    """All other weights of the model, under its own names."""
    prefix: str
    layout: Layout

    def model(self, *, seed: int = 0, **changes: Any) -> ModalityModel:
        """Build a modality transformer that starts from this tower.

        With a `sharing` other than "all" every modality's experts start as copies of the tower's
        parts, as the experts of arXiv:2304.14933 start from BEiT. Embeddings and heads that the
        tower lacks are fresh; the type embeddings are zero.

        Args:
            seed: of what is fresh.
            changes: settings of the config, such as `sharing`, `num_joint_layers` or
                `relative_text_distance`, and sizes of what the tower lacks. Another `image_size`
                interpolates positions (`alloy.modality.resize_images`).
        """
        config = changed(self.config, **changes)
        weights = resize_images(self.weights, self.config, config.image_size)
        weights = {**weights, "type_embeddings.weight": torch.zeros(2, config.hidden_size)}
        if (table := weights.get("position_bias.table")) is not None:
            weights["position_bias.table"] = _grown(table, self.config, config)
        return build(config, copy_to_experts(weights, config), seed)

    def with_weights(self, weights: Weights, modality: str = "v") -> "Tower":
        """Let another model's blocks, embeddings and norm take the tower's place.

        Args:
            weights: of a modality transformer.
            modality: whose experts they are, where the model has experts.
        """
        taken = {n: _taken(weights, n, old, modality) for n, old in self.weights.items()}
        return replace(self, weights=taken)

    def export(self) -> dict[str, Tensor]:
        """Write the tower back under the other model's names, beside all that was kept.

        Raises:
            CheckpointError: a bias that the other model lacks is not zero.
        """
        return {**self.kept, **self.export_own()}

    def export_own(self) -> dict[str, Tensor]:
        """Write back the tower alone, for models of which several towers are written back."""
        own = scatter(self.layout, self.weights)
        return {f"{self.prefix}{name}": tensor for name, tensor in own.items()}


def import_tower(
    source: PreTrainedModel | str | Path,
    part: str | None = None,
    *,
    without: Sequence[str] = (),
) -> Tower:
    """Import one tower of a transformers model; its outputs stay what they are.

    Args:
        source: a model, or a folder with config.json and safetensors.
        part: which tower, where the model has several: `vision_model`, `text_model`, `encoder`, ...
        without: layers to leave out that the modality transformer does not have, such as
            "cross-attention". What is left is another function: the model's without them.

    Raises:
        CheckpointError: a model that has no importer, a part that it does not have, layers that
            cannot be carried, weights that are missing or unknown.
    """
    read = read_source(source)
    refuse_unknown_type(read.config, ARCHITECTURES)
    parts = ARCHITECTURES[read.config.model_type]
    if part is None and len(parts) == 1:
        (part,) = parts
    if part is None or part not in parts:
        raise CheckpointError(
            f"{read.config.model_type} has no tower {part!r}: {nearest(str(part), parts)}"
        )
    return _carry(parts[part], read, part, without)


def _carry(architecture: Architecture, source: Source, part: str, without: Sequence[str]) -> Tower:
    """Put a tower's weights under the modality transformer's names, by its table entry."""
    config, weights, missing = source
    name = f"{config.model_type} {part}".strip()
    prefix = _prefix(architecture, weights, part)
    lacking = {n.removeprefix(prefix) for n in missing if n.startswith(prefix)}
    if lacking := sorted(_inside(architecture, lacking)):
        raise CheckpointError(
            f"{name}: the file lacks weights {[prefix + n for n in lacking[:3]]} "
            f"({len(lacking)} in all)"
        )
    own = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
    settings: dict[str, Any] = {"num_joint_layers": 0, "num_answers": 0, "num_segment_classes": 0}
    modality_config = ModalityConfig(**settings | settings_of(architecture, config, own))
    sizes = tower_sizes(modality_config, architecture.inputs)
    layout = layout_of(architecture, sizes, own)
    placed = {p.name for place in layout.values() for p in place.parts if p.name is not None}
    _refuse_left_over(architecture, name, own.keys() - placed, prefix, without)
    taken = {prefix + name for name in placed}
    return Tower(
        name=name,
        inputs=architecture.inputs,
        config=modality_config,
        weights=gather(layout, sizes, own),
        kept={n: t for n, t in weights.items() if n not in taken},
        prefix=prefix,
        layout=layout,
    )


def tower_sizes(config: ModalityConfig, inputs: Inputs) -> dict[str, Tensor]:
    """Tensors of a modality-agnostic model that belong to a tower, without memory."""
    with torch.device("meta"):
        state = ModalityModel(config).state_dict()
    owned = ("blocks.", "norm.", "position_bias.", _EMBEDDINGS[inputs])
    return {name: tensor for name, tensor in state.items() if name.startswith(owned)}


def changed(config: ModalityConfig, **changes: Any) -> ModalityConfig:
    """Copy a config with other settings, checked again.

    Raises:
        CheckpointError: a setting that does not exist.
    """
    settings = copy.deepcopy(config).to_dict()
    if unknown := sorted(changes.keys() - settings.keys()):
        raise CheckpointError(
            f"{unknown[0]!r} is no setting of ModalityConfig: {nearest(unknown[0], settings)}"
        )
    return ModalityConfig(**settings | changes)


def build(config: ModalityConfig, weights: Weights, seed: int) -> ModalityModel:
    """Build a model of these weights in their type; what they lack is fresh.

    Raises:
        CheckpointError: weights for which the model has no place.
    """
    with torch.device("meta"):
        model = ModalityModel(config)
    places = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name, tensor in weights.items():
        if (place := places.get(name)) != tensor.shape:
            there = "no place" if place is None else f"a place of {list(place)}"
            raise CheckpointError(
                f"the model has {there} for {name} {list(tensor.shape)}; leave the settings that "
                f"make the tower as they are"
            )
    dtype = next(t.dtype for name, t in weights.items() if name.startswith("blocks."))
    given = {name: tensor.to(dtype, copy=True) for name, tensor in weights.items()}
    fresh = {
        name: torch.empty(shape, dtype=dtype)
        for name, shape in places.items()
        if name not in weights
    }
    model.load_state_dict({**given, **fresh}, assign=True)
    for name, parameter in model.named_parameters():
        vars(parameter)["_is_hf_initialized"] = name in given  # what is drawn leaves these alone
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model.apply(model._init_weights)
    return model.eval()


def _taken(weights: Weights, name: str, old: Tensor, modality: str) -> Tensor:
    """Find a tower's weight in a model: one modality's, or shared; folded gains are 1."""
    if name in weights:
        return weights[name]
    if name.startswith("norm."):
        return weights[name.replace("norm.", f"norm.{modality}.")]
    if ".scale" in name:
        return torch.ones_like(old)
    return weights[expert_name(name, modality)]


def _prefix(architecture: Architecture, weights: Weights, part: str) -> str:
    """Find the name below which the tower stands, by its first block's first norm."""
    norm = architecture.names["blocks.{i}.norm1"]
    anchor = f"{norm}.weight".replace("{i}", "0")
    prefixes = [name.removesuffix(anchor) for name in weights if name.endswith(anchor)]
    if len(prefixes) > 1:
        prefixes = [p for p in prefixes if part and f".{p}".endswith(f".{part}.")]
    if len(prefixes) != 1 or (prefixes[0] and not prefixes[0].endswith(".")):
        raise CheckpointError(
            f"the tower {part!r} stands in no one place: {anchor!r} occurs below {prefixes}"
        )
    return prefixes[0]


def _refuse_left_over(
    architecture: Architecture, name: str, rest: set[str], prefix: str, without: Sequence[str]
) -> None:
    """Refuse weights of the tower that would be forgotten in silence."""
    if unknown := sorted(set(without) - architecture.left_out.keys()):
        raise CheckpointError(
            f"{name} has no {unknown[0]!r} that may be left out: "
            f"{nearest(unknown[0], architecture.left_out)}"
        )
    for layers, pattern in architecture.left_out.items():
        there = {n for n in rest if re.fullmatch(pattern, n)}
        if there and layers not in without:
            raise CheckpointError(
                f"{name} has {layers}, which the modality transformer does not have: "
                f"{prefix}{min(there)}; `without=[{layers!r}]` leaves it out"
            )
        rest = rest - there
    if other := sorted(_inside(architecture, rest)):
        raise CheckpointError(
            f"{name} has weights that no layer of the modality transformer takes: "
            f"{[prefix + n for n in other[:3]]} ({len(other)} in all)"
        )


def _inside(architecture: Architecture, names: Iterable[str]) -> set[str]:
    """Names, below the tower's prefix, of weights that do not stay outside."""
    outside = re.compile("|".join(architecture.outside) or r"(?!)")
    return {name for name in names if not outside.fullmatch(name)}


def _grown(table: Tensor, old: ModalityConfig, new: ModalityConfig) -> Tensor:
    """Give a table of relative positions each block's columns and the rows of texts, zero."""
    if (old.relative_position_bias, new.relative_position_bias) == ("shared", "layer"):
        table = table.repeat(1, new.num_hidden_layers)
    rows = 2 * new.relative_text_distance + 2 if new.relative_text_distance else 0
    if old.relative_text_distance == 0 and rows:
        table = F.pad(table, (0, 0, 0, rows))
    return table
