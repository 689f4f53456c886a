"""Muon for the matrices of the blocks, AdamW for the rest, as one optimizer.

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest matrix with singular values
near 1, by Newton-Schulz steps; scaled by 0.2 sqrt(max(rows, columns)) its entries are as large as
AdamW's updates (arXiv:2502.16982), so both share one learning rate. torch's own Muon computes in
bfloat16, which is slow on a CPU, and takes one matrix at a time.

Shapes: N matrices alike, R rows, C columns.
"""

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from alloy.modality import FRESH_HEADS

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # a quintic: singular values are about 1 in 5 steps
_ZERO_NORM = 1e-7  # added to a norm, so that a momentum of zeros stays zero
_FUSED_QKV = 3  # rows of a fused projection are three matrices


def parameter_groups(model: nn.Module, weight_decay: float, *, muon: bool = True) -> list[dict]:
    """Group parameters: "blocks" (matrices, by Muon), "fresh heads" (not pre-trained), "rest".

    Without `muon` no group is by Muon. Matrices of linear layers decay, in every model alike;
    norms, biases, embeddings and gains never.
    """
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        decays = id(parameter) in linear
        fresh = "fresh heads" if name.startswith(FRESH_HEADS) else "rest"
        group = "blocks" if muon and decays and name.startswith("blocks.") else fresh
        groups[group, decays].append(parameter)
    return [
        {"name": name, "params": parameters, "weight_decay": weight_decay if decays else 0.0}
        for (name, decays), parameters in groups.items()
    ]


@torch.no_grad()
def orthogonalize(matrices_NRC: Tensor, num_steps: int = 5) -> Tensor:
    """Matrices with the same singular vectors and singular values between about 0.7 and 1.2."""
    if matrices_NRC.shape[1] > matrices_NRC.shape[2]:
        return orthogonalize(matrices_NRC.transpose(1, 2), num_steps).transpose(1, 2)
    a, b, c = NEWTON_SCHULZ
    x = matrices_NRC / (matrices_NRC.norm(dim=(1, 2), keepdim=True) + _ZERO_NORM)
    for _ in range(num_steps):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class MuonAdamW(torch.optim.Optimizer):
    """Muon with Nesterov momentum for the group "blocks", AdamW for the others; decoupled decay.

    A fused qkv projection counts as three matrices.
    """

    def __init__(
        self,
        groups: list[dict],
        *,
        lr: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-8,
    ):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            updates = _muon if group["name"] == "blocks" else _adam
            for parameter, update in updates(parameters, self.state, group):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(update, alpha=group["lr"])


Updates = Iterator[tuple[nn.Parameter, Tensor]]


def _adam(parameters: list[nn.Parameter], states: dict, group: dict) -> Updates:
    beta1, beta2 = group["betas"]
    for parameter in parameters:
        state, grad = states[parameter], _grad(parameter)
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        step = state["step"].item()
        scale = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        yield parameter, state["exp_avg"] / (1 - beta1**step) / scale


def _muon(parameters: list[nn.Parameter], states: dict, group: dict) -> Updates:
    alike: dict[tuple[int, ...], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
    for parameter in parameters:
        matrices = _matrices(parameter, states[parameter], group["momentum"])
        alike[matrices.shape[1:]].append((parameter, matrices))
    for (rows, columns), members in alike.items():
        updates = orthogonalize(torch.cat([matrices for _, matrices in members]))
        updates *= 0.2 * max(rows, columns) ** 0.5
        parts = updates.split([len(matrices) for _, matrices in members])
        for (parameter, _), part in zip(members, parts, strict=True):
            yield parameter, part.reshape(parameter.shape)


def _matrices(parameter: nn.Parameter, state: dict, momentum: float) -> Tensor:
    """The matrices [N, R, C] to orthogonalize for a parameter, its momentum moved on."""
    grad = _grad(parameter)
    if not state:
        state["momentum"] = torch.zeros_like(parameter)
    state["momentum"].lerp_(grad, 1 - momentum)
    rows, columns = parameter.shape
    num = _FUSED_QKV if rows == _FUSED_QKV * columns else 1
    return grad.lerp(state["momentum"], momentum).view(num, rows // num, columns)


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None  # `step` leaves the others out
    return parameter.grad
