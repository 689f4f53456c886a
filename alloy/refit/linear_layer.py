"""A linear layer or convolution as a matrix, together with the batch norm behind it.

Shape legend: B examples, G groups of a convolution (1 elsewhere), I inputs, O outputs of a group.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearLayer:
    """A linear layer or convolution as a matrix for each group, with the batch norm behind it."""

    def __init__(self, module: Any, norm: Any = None) -> None:
        self.module, self.norm = module, norm
        self.is_convolution = isinstance(module, nn.Conv2d)
        self.groups = module.groups if isinstance(module, nn.Conv2d) else 1
        self.is_transposed = type(module).__name__ == "Conv1D"
        self.dim = 1 if self.is_convolution else -1
        """The dim of the output that its units lie along."""
        self.has_bias = norm is not None or module.bias is not None

    def samples(self, x: Tensor) -> Tensor:
        """The inputs that an output is linear in, [B, ..., G * I]: patches of a convolution."""
        if not isinstance(self.module, nn.Conv2d):
            return x
        conv = self.module
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        patches = F.unfold(padded, conv.kernel_size, dilation=conv.dilation, stride=conv.stride)
        return patches.transpose(1, 2)

    def outputs(self, y: Tensor) -> Tensor:
        """Outputs of the layer, or of its norm: [B, ..., G * O]."""
        return y.flatten(2).transpose(1, 2) if self.is_convolution else y

    def compute(self, x: Tensor) -> Tensor:
        """Run layer and norm on an input."""
        y = self.module(x)
        return y if self.norm is None else self.norm(y)

    def matrix(self) -> tuple[Tensor, Tensor]:
        """W [G, O, I] and b [G, O] of what layer and norm compute, float64."""
        weight = self.module.weight.double()
        weight = weight.T if self.is_transposed else weight.flatten(1)
        weight_GOI = weight.unflatten(0, (self.groups, -1))
        bias = self.module.bias
        bias_O = weight.new_zeros(len(weight)) if bias is None else bias.double()
        if self.norm is not None:
            norm = self.norm
            scale_O = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            bias_O = norm.bias.double() + scale_O * (bias_O - norm.running_mean.double())
            weight_GOI = weight_GOI * scale_O.view(self.groups, -1, 1)
        return weight_GOI, bias_O.view(self.groups, -1)

    def write(self, weight_GOI: Tensor, bias_GO: Tensor) -> None:
        """Make the module compute W x + b; without a bias of its own it leaves b out."""
        weight = self.module.weight
        matrix = weight_GOI.flatten(0, 1)
        weight.copy_(matrix.T if self.is_transposed else matrix.view(weight.shape))
        if self.module.bias is not None:
            self.module.bias.copy_(bias_GO.flatten())

    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """Multiply each output, [G * O], and add to it."""
        weight_GOI, bias_GO = self.matrix()
        scale_GO, shift_GO = scale.view_as(bias_GO), shift.view_as(bias_GO)
        self.write(scale_GO[..., None] * weight_GOI, scale_GO * bias_GO + shift_GO)

    def write_normed(
        self, weight_GOI: Tensor, bias_GO: Tensor, mean_GO: Tensor, variance_GO: Tensor
    ) -> None:
        """Write layer and norm: the norm has these moments of W x, and adds b."""
        self.write(weight_GOI, torch.zeros_like(bias_GO))
        norm = self.norm
        norm.weight.copy_((variance_GO.flatten() + norm.eps).sqrt())
        norm.bias.copy_((bias_GO + mean_GO).flatten())
        norm.running_mean.copy_(mean_GO.flatten())
        norm.running_var.copy_(variance_GO.flatten())


def fittable_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Linear layers, Conv1D and 2-d convolutions that share their weight with no other module."""
    owners = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    return {
        name: layer
        for name, layer in module.named_modules()
        if _is_fittable(layer) and owners[id(layer.weight)] == 1
    }


def _is_fittable(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        plain = type(module)._conv_forward is nn.Conv2d._conv_forward
        return plain and type(module).forward is nn.Conv2d.forward
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    return type(module).__name__ == "Conv1D"


def batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """Batch norms that compute with running statistics, by name."""
    return {
        name: norm
        for name, norm in module.named_modules()
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.track_running_stats
    }
