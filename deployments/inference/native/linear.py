"""Linear layers of the base model on a CPU, their weights laid out once as oneDNN reads them fastest.

Knows layouts and no adapters. What oneDNN cannot take stays as it is; the model's own start-up check
judges the result.
"""

import torch
from torch import Tensor, nn

ROWS_HINT = 16
"""Rows of the batch that the layout is chosen for; others run on it too."""


class PackedLinear(nn.Module):
    """``x W^T + b`` for an x of any number of rows. The plain weight is not kept."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self._packed = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach(), ROWS_HINT)
        self._bias = None if plain.bias is None else plain.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return y


def pack(model: nn.Module) -> None:
    """Replace every linear that oneDNN takes. A head that shares the embedding's weights gets a copy of them."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and _is_packable(module.weight):
            model.set_submodule(name, PackedLinear(module))


def _is_packable(weight: Tensor) -> bool:
    is_plain = weight.device.type == "cpu" and weight.dtype is torch.float32
    return is_plain and hasattr(torch.ops.mkldnn, "_linear_pointwise")
