"""A proxy that is not linear: a Space does not need heads."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from influencespace.models.space import Inputs


class Towers(nn.Module):
    """Images (n, 3) and texts (n, 5) to unit embeddings (n, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.text = nn.Linear(5, 2)

    def forward(self, images: Tensor, texts: Tensor) -> Inputs:
        return F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)


def towers() -> nn.Module:
    torch.manual_seed(0)
    return Towers().double()
