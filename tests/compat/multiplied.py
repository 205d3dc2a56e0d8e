"""What ``MaskedLinear`` means, in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultipliedLinear(nn.Linear):
    """Whatever stands in ``weight``, the product uses it masked."""

    keep: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, torch.where(self.keep, self.weight, 0.0), self.bias)
