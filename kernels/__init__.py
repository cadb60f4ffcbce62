"""Shared building blocks of the three scripts: anti-collapse losses and planning rollouts.

Each file holds the formula, a PyTorch function (the path on CPU and MPS, and in float64) and Triton kernels behind a
registered op (the path on NVIDIA GPUs). `use_triton` overrides the choice; `python -m kernels.bench` times both.
"""

from kernels.dispatch import use_triton
from kernels.rollout import gru_rollout_cost
from kernels.sigreg import sigreg_loss
from kernels.variance_covariance import variance_covariance_loss

__all__ = ["gru_rollout_cost", "sigreg_loss", "use_triton", "variance_covariance_loss"]
