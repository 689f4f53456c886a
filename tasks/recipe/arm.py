"""An arm of a recipe of kind "models": one way of merging its members."""

from typing import Any, Literal

from pydantic import Field, model_validator

from tasks.recipe.benchmarks import ArmSearch
from tasks.recipe.section import Section
from tasks.recipe.trunk import TrunkSettings

Row = list[float | list[float] | dict[str, float]]
"""One coefficient a member; `{from: a, to: b}` or `[a, b, ...]` is one that changes with depth."""


class ModelsLeastSquares(Section):
    """Every layer fitted anew to the parents' layers (`alloy.refit.repair.fit_layers`)."""

    # Parents count alike; by how sure they are of their own classes; or of any class
    targets: Literal["mean", "confidence", "blind_confidence"] = "mean"
    inputs: Literal["merged", "parents"] = "merged"  # that a layer is fitted on
    residual: bool = (
        False  # a layer that writes into a stream follows the stream, not its own output
    )
    ridge: float = Field(default=1e-2, gt=0)  # of the inputs' mean variance

    @model_validator(mode="after")
    def _streams_are_the_merged_models_own(self) -> "ModelsLeastSquares":
        if self.residual and self.inputs != "merged":
            raise ValueError("residual: the stream is the merged model's own: take inputs: merged")
        return self


class ModelsRepair(Section):
    """The repairs after alignment; each switch is off by default."""

    permuted_least_squares: ModelsLeastSquares | None = (
        None  # {} has the defaults; without one: off
    )
    batch_norm: bool = False  # means and variances estimated anew
    repair: bool = False  # variances of units brought to the parents' (REPAIR)
    temperature: bool = False  # one factor on the logits


class ModelsArm(Section):
    """One way of merging, for every set that its alignment is made for."""

    alignment: str | None = None  # without one the members are merged as they are, streamed
    # The alignment for sets that the first is not made for; of several, the first that is
    elsewhere: str | list[str] | None = None
    method: str  # a key of alloy's MERGE_METHODS
    base: str | None = None  # the checkpoint that task vectors start from
    coefficients: Row | dict[str, Row] | None = None  # the method's own without
    options: dict[str, Any] = Field(default={})  # checked against the method's own
    statistics: dict[str, str] | None = None  # by member a file of alloy's save_statistics
    tokenizer: Literal["same", "base", "union"] = "same"  # where vocabularies differ
    chat_template: str | None = None  # the member whose template is taken where they differ
    processor: str | None = None  # the member whose processor is taken; the first's without
    generation_config: str | None = None  # the member whose settings these are; the first's without
    slices: list[dict[str, tuple[int, int]]] = Field(default=[])  # the result's layers, by source
    stack: str | None = None  # what their names begin with, where a model has several stacks
    allow: list[str] = Field(default=[])  # glob patterns of config keys that may differ
    drop: list[str] = Field(default=[])  # glob patterns of tensors that are left out
    repair: ModelsRepair = ModelsRepair()
    trunk: TrunkSettings | None = None  # where members are parts that become one trunk
    search: ArmSearch | None = None  # of options and coefficients, before the merge

    @property
    def streamed(self) -> list[str]:
        """The settings given that are only of arms whose members are merged as they are."""
        fields = type(self).model_fields
        return [
            name
            for name in (
                "statistics", "tokenizer", "chat_template", "processor", "generation_config",
                "slices", "stack", "allow", "drop",
            )
            if getattr(self, name) != fields[name].get_default(call_default_factory=True)
        ]  # fmt: skip

    @property
    def one_row(self) -> list[float] | None:
        """The coefficients, one a member, where all tensors have the same."""
        row = self.coefficients if isinstance(self.coefficients, list) else []
        numbers = [c for c in row if isinstance(c, float)]
        return numbers if numbers and len(numbers) == len(row) else None

    @property
    def alignments(self) -> list[str]:
        """The alignments that the arm may have, the first choice first."""
        others = [self.elsewhere] if isinstance(self.elsewhere, str) else self.elsewhere or []
        return [name for name in (self.alignment, *others) if name is not None]

    @property
    def aligned_by(self) -> str:
        """The alignment of an arm whose members are aligned."""
        assert self.alignment is not None
        return self.alignment

    @model_validator(mode="after")
    def _slices_are_ranges(self) -> "ModelsArm":
        """Refuse what is no range of layers; the plan knows how many layers each source has."""
        for i, one in enumerate(self.slices):
            for source, (start, stop) in one.items():
                if not 0 <= start < stop:
                    raise ValueError(
                        f"slices[{i}][{source!r}]: {[start, stop]}: give the first layer and the "
                        "one after the last, [0, 8]"
                    )
            lengths = {source: stop - start for source, (start, stop) in one.items()}
            if len({*lengths.values()}) != 1:
                raise ValueError(
                    f"slices[{i}]: give as many layers of every source, not {lengths or 'none'}"
                )
        if self.stack is not None and not self.slices:
            raise ValueError("stack says which layers slices are taken of: give slices, too")
        return self

    @model_validator(mode="after")
    def _repairs_take_the_coefficients(self) -> "ModelsArm":
        fit = self.repair.permuted_least_squares
        if self.coefficients is not None and fit is not None and fit.targets != "mean":
            raise ValueError(
                f"targets: {fit.targets} weighs the parents by example; coefficients weigh "
                "them too: drop one"
            )
        varied = self.coefficients is not None and self.one_row is None
        if varied and (fit is not None or self.repair.repair):
            raise ValueError(
                "permuted_least_squares and repair take one coefficient a member, not patterns "
                "or gradients"
            )
        return self
