"""Variance and covariance regularisation (VICReg, Bardes et al. 2022, arXiv 2105.04906, eqs. 1-4).

    v = mean_d relu(margin - sqrt(Var(z_d) + eps))            every feature keeps a standard deviation of `margin`
    c = sum_{i != j} Cov(z)_ij^2 / (D (D - 1))                features are decorrelated

Cost: 2 N D min(N, D) FLOPs. With Z the centred [N, D] matrix, ||Z'Z||_F = ||ZZ'||_F, so for N < D the sum of all squared
covariances comes from the N x N Gram matrix and the D x D covariance matrix is never made.
"""
import torch
from torch import Tensor
from torch.nn.functional import relu


def variance_covariance_loss(z: Tensor, margin: float = 1.0, eps: float = 1e-4) -> tuple[Tensor, Tensor]:
    """z [N, D] -> (variance loss, covariance loss), both 0-d, in float32 (float64 for float64 input).

    Unbiased variance and covariance. Raises ValueError unless z is a matrix with N >= 2 and D >= 2.
    NaN in z gives NaN in both losses.
    """
    if z.ndim != 2 or z.shape[0] < 2 or z.shape[1] < 2:
        raise ValueError(f"variance_covariance_loss needs z of shape [N >= 2, D >= 2], got {tuple(z.shape)}")
    N, D = z.shape
    with torch.autocast(z.device.type, enabled=False):  # statistics in full precision, whatever the networks use
        z = z if z.dtype == torch.float64 else z.float()
        z = z - z.mean(0)
        variance = z.square().sum(0) / (N - 1)  # [D]
        product = z @ z.T if N < D else z.T @ z  # the smaller of the two, same Frobenius norm
        off_diagonal = product.square().sum() / (N - 1) ** 2 - variance.square().sum()
        return relu(margin - torch.sqrt(variance + eps)).mean(), off_diagonal / (D * (D - 1))
