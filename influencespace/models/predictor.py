"""A classifier or regressor as a proxy: it returns the labels as they are, so that its outputs are what a loss compares."""

from torch import Tensor, nn


class Predictor(nn.Module):
    """Any module from inputs (n, ...) to predictions (n, K), in evaluation mode, and the labels (n, K) as they are."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module.eval()

    def forward(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.module(inputs), labels
