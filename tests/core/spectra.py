"""Matrices of a known spectrum."""

import torch


def spectrum_matrix(p: int, seed: int, decay: float = 0.7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(p, p, generator=generator, dtype=torch.float64))[0]
    return U @ torch.diag(decay ** torch.arange(p, dtype=torch.float64)) @ U.T
