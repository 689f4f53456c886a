"""Passes of models through the parts of a trunk, each part apart, and the answers behind them.

The models of a trunk run as one module, a `Family`. What a part computes depends on its own inputs
alone: which of a batch's tensors reach it is tried out, so that padding is known, and while one
member is fitted the blocks of the others answer what they answered before any merge.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alloy.devices import beside
from alloy.errors import MergeError
from alloy.refit.resuming import answering, copied
from alloy.statistics.points import first_tensor
from alloy.trunk.members import Part
from alloy.types import Batch

Answers = Callable[[Any, Batch], Sequence[Tensor]]
"""What a model answers to a batch: tensors [..., C] that merging shall keep."""
MASK = "attention_mask"


class Family(nn.Module):
    """Models by checkpoint, under one roof, so that they may share parameters."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleDict(dict(models))

    @staticmethod
    def place(part: Part, module: str) -> str:
        """The name here of a module of a part's model."""
        return f"models.{part.checkpoint}.{module}"

    def run(self, checkpoint: str, batch: Batch) -> Any:
        """Run one model, without a cache of what it has decoded."""
        model: Any = self.models[checkpoint]
        return model(**beside(model, batch))


def answers_of(output: Any, batch: Batch) -> list[Tensor]:
    """Answers of the heads of a model of transformers.

    Embeddings where it has some (contrastive models), else logits without their mean, which softmax
    does not see, else hidden states. Padding does not answer.
    """
    named = dict(output.items()) if hasattr(output, "items") else {"output": output}
    floats = {
        n: t for n, t in named.items() if isinstance(t, Tensor) and t.is_floating_point() and t.ndim
    }
    for fits in (
        lambda n: n.endswith(("_embeds", "_embeddings")),
        lambda n: "logits" in n or n.endswith("score"),
        lambda n: n.endswith(("last_hidden_state", "output")),
        lambda n: True,
    ):
        found = {n: t for n, t in floats.items() if fits(n) and t.ndim > 1}
        if found:
            return [_kept(n, t, batch) for n, t in found.items()]
    raise MergeError(f"no answers among the outputs {sorted(named)}: give `answers`, a function")


def _kept(name: str, answer: Tensor, batch: Batch) -> Tensor:
    if "logits" in name or name.endswith("score"):
        answer = answer - answer.mean(-1, keepdim=True)
    for key in (f"decoder_{MASK}", MASK):
        mask = batch.get(key)
        if mask is not None and answer.ndim == 3 and mask.shape == answer.shape[:2]:
            return answer[mask.bool()]
    return answer


def refuse_no_rows(checkpoint: str, batches: Sequence[Batch]) -> None:
    """Raise MergeError for the first batch of a checkpoint that has a tensor without rows."""
    for i, batch in enumerate(batches):
        for name, tensor in batch.items():
            if isinstance(tensor, Tensor) and tensor.ndim and not len(tensor):
                raise MergeError(
                    f"batch {i} of checkpoint {checkpoint!r}: {name} has no rows (shape "
                    f"{list(tensor.shape)}): give batches of at least one row"
                )


@torch.no_grad()
def masks_of(model: Any, parts: Sequence[Part], batch: Batch) -> dict[str, tuple[str, ...]]:
    """The names of a batch's masks that are of the tokens each part reads.

    A mask counts for a part if a tensor of its shape reaches the part's first block.

    Raises:
        MergeError: a batch with masks that reaches no block of a part.
    """
    batch = beside(model, {n: t[:2] if isinstance(t, Tensor) else t for n, t in batch.items()})
    before = _entering(model, parts, batch)
    masks = {name for name in batch if name.endswith(MASK)}
    missed = [part.name for part in parts if part.name not in before]
    if masks and missed:
        raise MergeError(
            f"a batch of {', '.join(sorted(batch))} reaches no block of {', '.join(missed)}: "
            "give batches with the inputs of every part"
        )
    reaching: dict[str, set[str]] = {part.name: set() for part in parts}
    for name, tensor in batch.items():
        if not isinstance(tensor, Tensor) or tensor.dtype == torch.bool or name.endswith(MASK):
            continue
        if tensor.ndim < 2:
            continue
        changed = (
            tensor + torch.randn(tensor.shape).to(tensor)
            if tensor.is_floating_point()
            else (tensor.flip(-1))
        )
        for part, x in _entering(model, parts, {**batch, name: changed}).items():
            if x.shape != before[part].shape or not torch.equal(x, before[part]):
                reaching[part].add(name)
    return {
        part.name: tuple(
            sorted(
                mask
                for mask in masks
                if batch[mask].shape == before[part.name].shape[:2]
                and any(batch[n].shape[:2] == batch[mask].shape for n in reaching[part.name])
            )
        )
        for part in parts
    }


def _entering(model: Any, parts: Sequence[Part], batch: Batch) -> dict[str, Tensor]:
    """The input of each part's first block."""
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(part.blocks[0]).register_forward_pre_hook(
            lambda _, args, kwargs, name=part.name: seen.__setitem__(
                name, first_tensor(args, kwargs).clone()
            ),
            with_kwargs=True,
        )
        for part in parts
    ]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class Apart:
    """Runs one member's part while the other parts of its model answer what they used to."""

    def __init__(
        self,
        parents: Family,
        part: Part,
        others: Iterable[Part],
        batches: Sequence[Batch],
    ) -> None:
        self.part, self.others = part, [o for o in others if o.checkpoint == part.checkpoint]
        self.answers = {id(batch): self._answers(parents, batch) for batch in batches}

    @torch.no_grad()
    def _answers(self, parents: Family, batch: Batch) -> dict[str, Any]:
        """The output of each other part's last block."""
        found: dict[str, Any] = {}
        with ExitStack() as stack:
            for other in self.others:
                block: Any = parents.get_submodule(Family.place(other, other.blocks[-1]))
                stack.enter_context(_recording(block, found, other.name))
            if self.others:
                parents.run(self.part.checkpoint, batch)
        return found

    def __call__(self, family: Any, batch: Batch) -> Any:
        answers = self.answers[id(batch)]
        with ExitStack() as stack:
            for other in self.others:
                *front, last = (family.get_submodule(Family.place(other, b)) for b in other.blocks)
                for block in front:
                    stack.enter_context(answering(block, _passing(answers[other.name])))
                stack.enter_context(
                    answering(last, lambda *_, y=answers[other.name], **__: copied(y))
                )
            return family.run(self.part.checkpoint, batch)


def _passing(like: Any) -> Callable[..., Any]:
    """A forward that gives its input back, packed as the block packs its output."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = first_tensor(args, kwargs)
        return x if isinstance(like, Tensor) else (x, *like[1:])

    return forward


@contextmanager
def _recording(module: Any, found: dict[str, Any], name: str) -> Generator[None]:
    """Keep what a module computes, before its hooks."""
    compute = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = compute(*args, **kwargs)
        found[name] = copied(output)
        return output

    with answering(module, forward):
        yield
