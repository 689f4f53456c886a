"""VLMo and vl-merging written down from their papers and names: functions of a state dict.

Shapes: B batch, S tokens, D hidden, H heads. The sizes are those of `state_dict`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

HIDDEN, HEADS, LAYERS, SIDE, PATCH, WORDS, TEXT, DISTANCE = 12, 3, 3, 3, 4, 30, 7, 9
IMAGE_ROWS = (2 * SIDE - 1) ** 2 + 3


def state_dict(kind: str, joint: int = 1, relative: bool = True) -> dict[str, Tensor]:
    """Random weights of a tiny model, under the names of its repository."""
    generator = torch.Generator().manual_seed(0)
    D = HIDDEN
    shapes: dict[str, tuple[int, ...]] = {
        "text_embeddings.word_embeddings.weight": (WORDS, D),
        "text_embeddings.position_embeddings.weight": (TEXT, D),
        "text_embeddings.token_type_embeddings.weight": (2, D),
        "text_embeddings.LayerNorm.weight": (D,),
        "text_embeddings.LayerNorm.bias": (D,),
        "token_type_embeddings.weight": (2, D),
        "transformer.cls_token": (1, 1, D),
        "transformer.mask_token": (1, 1, D),
        "transformer.patch_embed.proj.weight": (D, 3, PATCH, PATCH),
        "transformer.patch_embed.proj.bias": (D,),
        "transformer.norm.weight": (D,),
        "transformer.norm.bias": (D,),
        "pooler.dense.weight": (D, D),
        "pooler.dense.bias": (D,),
        "itm_score.fc.weight": (2, D),
        "itm_score.fc.bias": (2,),
        "mlm_score.bias": (WORDS,),
        "mlm_score.transform.dense.weight": (D, D),
        "mlm_score.transform.dense.bias": (D,),
        "mlm_score.transform.LayerNorm.weight": (D,),
        "mlm_score.transform.LayerNorm.bias": (D,),
        "mlm_score.decoder.weight": (WORDS, D),
        "logit_scale": (),
        "logit_vl_scale": (),
        "vqa_classifier.0.weight": (2 * D, D),
        "vqa_classifier.0.bias": (2 * D,),
        "vqa_classifier.1.weight": (2 * D,),
        "vqa_classifier.1.bias": (2 * D,),
        "vqa_classifier.3.weight": (5, 2 * D),
        "vqa_classifier.3.bias": (5,),
    }
    contrast = "itc" if kind == "vlmo" else "ifm"
    for head in ("text", "image", "vl_text", "vl_image"):
        shapes[f"{contrast}_{head}_proj.fc.weight"] = (D, D)
    if relative:
        rows = IMAGE_ROWS + 2 * DISTANCE + 2
        shapes["relative_position_bias_table"] = (rows, HEADS * LAYERS)
    else:
        shapes["transformer.pos_embed"] = (1, 1 + SIDE**2, D)
    for i in range(LAYERS):
        shapes |= _block(kind, i, i >= LAYERS - joint)
    weights = {
        name: 0.4 * torch.randn(shape, generator=generator).double()
        for name, shape in shapes.items()
    }
    weights["text_embeddings.position_ids"] = torch.arange(TEXT)[None]
    if relative:
        weights["relative_position_index"] = image_rows()
        weights["text_relative_position_index"] = text_rows()
    return weights


def _block(kind: str, i: int, joint: bool) -> dict[str, tuple[int, ...]]:
    D, block, shapes = HIDDEN, f"transformer.blocks.{i}", {}
    modalities = ("v", "l", "vl") if joint else ("v", "l")
    for part in ("norm1", "attn", "norm2", "mlp"):
        names = [part]
        if kind == "vl-merging":
            names = [f"{part}.{m}" for m in modalities]
        if kind == "vlmo" and part in ("norm2", "mlp"):
            names = [f"{part}_{VLMO[m]}" for m in modalities]
        for name in names:
            here = f"{block}.{name}"
            if part == "attn":
                shapes |= {
                    f"{here}.qkv.weight": (3 * D, D),
                    f"{here}.q_bias": (D,),
                    f"{here}.v_bias": (D,),
                    f"{here}.proj.weight": (D, D),
                    f"{here}.proj.bias": (D,),
                }
            elif part == "mlp":
                shapes |= {
                    f"{here}.fc1.weight": (4 * D, D),
                    f"{here}.fc1.bias": (4 * D,),
                    f"{here}.fc2.weight": (D, 4 * D),
                    f"{here}.fc2.bias": (D,),
                }
            else:
                shapes |= {f"{here}.weight": (D,), f"{here}.bias": (D,)}
    return shapes | {f"{block}.gamma_1": (D,), f"{block}.gamma_2": (D,)}


VLMO = {"v": "imag", "l": "text", "vl": "vl"}


class Reference:
    """The forward passes of a state dict."""

    def __init__(
        self, kind: str, weights: dict[str, Tensor], joint: int, together: bool | None = None
    ):
        self.kind, self.weights, self.first_joint = kind, weights, LAYERS - joint
        self.together = kind == "vlmo" if together is None else together

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def named(self, i: int, part: str, modality: str) -> str:
        block = f"transformer.blocks.{i}.{part}"
        if self.kind == "vl-merging":
            return f"{block}.{modality}"
        if self.kind == "vlmo" and part in ("norm2", "mlp"):
            return f"{block}_{VLMO[modality]}"
        return block

    def attention(self, x: Tensor, i: int, modality: str, mask: Tensor, rows: Tensor) -> Tensor:
        B, S, D = x.shape
        name = self.named(i, "attn", modality)
        q_bias, v_bias = self.weights[f"{name}.q_bias"], self.weights[f"{name}.v_bias"]
        bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        qkv = F.linear(x, self.weights[f"{name}.qkv.weight"], bias)
        q, k, v = qkv.reshape(B, S, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = q * (D // HEADS) ** -0.5 @ k.mT
        if "relative_position_bias_table" in self.weights:
            table = self.weights["relative_position_bias_table"]
            scores = scores + table[rows].permute(2, 0, 1).chunk(LAYERS)[i]
        scores = scores.masked_fill(~mask.bool()[:, None, None], float("-inf"))
        context = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, S, D)
        return self.linear(context, f"{name}.proj")

    def attend(self, x: Tensor, i: int, modality: str, mask: Tensor, rows: Tensor) -> Tensor:
        update = self.norm(x, self.named(i, "norm1", modality))
        update = self.attention(update, i, modality, mask, rows)
        return x + self.weights[f"transformer.blocks.{i}.gamma_1"] * update

    def feed_forward(self, x: Tensor, i: int, modality: str) -> Tensor:
        name = self.named(i, "mlp", modality)
        update = self.norm(x, self.named(i, "norm2", modality))
        update = self.linear(F.gelu(self.linear(update, f"{name}.fc1")), f"{name}.fc2")
        return x + self.weights[f"transformer.blocks.{i}.gamma_2"] * update

    def images(self, pixels: Tensor) -> Tensor:
        proj = self.weights["transformer.patch_embed.proj.weight"]
        x = F.conv2d(pixels, proj, self.weights["transformer.patch_embed.proj.bias"], stride=PATCH)
        x = x.flatten(2).mT
        x = torch.cat([self.weights["transformer.cls_token"].expand(len(x), 1, -1), x], 1)
        x = x + self.weights.get("transformer.pos_embed", 0)
        return x + self.weights["token_type_embeddings.weight"][1]

    def texts(self, ids: Tensor) -> Tensor:
        x = self.weights["text_embeddings.word_embeddings.weight"][ids]
        x = x + self.weights["text_embeddings.token_type_embeddings.weight"][0]
        if "relative_position_bias_table" not in self.weights:
            x = x + self.weights["text_embeddings.position_embeddings.weight"][: ids.shape[1]]
        x = self.norm(x, "text_embeddings.LayerNorm", 1e-12)
        return x + self.weights["token_type_embeddings.weight"][0]

    def image_states(self, pixels: Tensor) -> Tensor:
        x = self.images(pixels)
        mask = torch.ones(x.shape[:2])
        for i in range(LAYERS):
            x = self.feed_forward(self.attend(x, i, "v", mask, image_rows()), i, "v")
        return self.norm(x, "transformer.norm")

    def text_states(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.texts(ids)
        for i in range(LAYERS):
            x = self.feed_forward(self.attend(x, i, "l", mask, text_rows()), i, "l")
        return self.norm(x, "transformer.norm")

    def joint_states(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        x = torch.cat([self.texts(ids), self.images(pixels)], 1)
        mask = torch.cat([mask, torch.ones(len(mask), 1 + SIDE**2)], 1)
        rows = all_rows()
        for i in range(self.first_joint):
            if self.together:  # attention sees both, its parts are shared
                x = self.attend(x, i, "v", mask, rows)
            else:
                x = torch.cat(
                    [
                        self.attend(x[:, :TEXT], i, "l", mask[:, :TEXT], text_rows()),
                        self.attend(x[:, TEXT:], i, "v", mask[:, TEXT:], image_rows()),
                    ],
                    1,
                )
            text, image = x[:, :TEXT], x[:, TEXT:]
            x = torch.cat([self.feed_forward(text, i, "l"), self.feed_forward(image, i, "v")], 1)
        for i in range(self.first_joint, LAYERS):
            x = self.feed_forward(self.attend(x, i, "vl", mask, rows), i, "vl")
        return self.norm(x, "transformer.norm")

    def pool(self, states: Tensor) -> Tensor:
        return torch.tanh(self.linear(states[:, 0], "pooler.dense"))

    def answers(self, states: Tensor) -> Tensor:
        x = self.linear(self.pool(states), "vqa_classifier.0")
        return self.linear(F.gelu(self.norm(x, "vqa_classifier.1", 1e-5)), "vqa_classifier.3")

    def masked_words(self, states: Tensor) -> Tensor:
        x = F.gelu(self.linear(states, "mlm_score.transform.dense"))
        x = self.norm(x, "mlm_score.transform.LayerNorm", 1e-12)
        return self.linear(x, "mlm_score.decoder") + self.weights["mlm_score.bias"]


def image_rows() -> Tensor:
    """Row of the table for every two image tokens, as VLMo counts them."""
    rows = torch.zeros(1 + SIDE**2, 1 + SIDE**2, dtype=torch.long)
    for i in range(SIDE**2):
        for j in range(SIDE**2):
            down, right = i // SIDE - j // SIDE, i % SIDE - j % SIDE
            rows[1 + i, 1 + j] = (down + SIDE - 1) * (2 * SIDE - 1) + right + SIDE - 1
    rows[0], rows[:, 0], rows[0, 0] = IMAGE_ROWS - 3, IMAGE_ROWS - 2, IMAGE_ROWS - 1
    return rows


def text_rows() -> Tensor:
    rows = torch.zeros(TEXT, TEXT, dtype=torch.long)
    last = IMAGE_ROWS + 2 * DISTANCE + 2
    for i in range(TEXT - 1):
        for j in range(TEXT - 1):
            rows[1 + i, 1 + j] = j - i + DISTANCE - 2 + IMAGE_ROWS + 2
    rows[0], rows[:, 0], rows[0, 0] = last - 3, last - 2, last - 1
    return rows


def all_rows() -> Tensor:
    to_image = torch.full((TEXT, 1 + SIDE**2), IMAGE_ROWS)
    to_text = torch.full((1 + SIDE**2, TEXT), IMAGE_ROWS + 1)
    return torch.cat([torch.cat([text_rows(), to_image], 1), torch.cat([to_text, image_rows()], 1)])
