"""Shared building blocks of the three scripts: anti-collapse losses, planning rollouts, and what makes them fast.

The file of a loss or rollout holds the formula, a PyTorch function (the path on CPU and MPS, and in float64) and Triton
kernels behind a registered op (the path on NVIDIA GPUs). `use_triton` overrides the choice; `python -m kernels.bench`
times both. Beside them `Muon`, an optimiser, and `CudaGraphs`, which launches many operations as one.
"""

from kernels.dispatch import use_triton
from kernels.graphs import CudaGraphs
from kernels.muon import Muon
from kernels.rollout import gru_rollout_cost
from kernels.sigreg import sigreg_loss
from kernels.variance_covariance import variance_covariance_loss

__all__ = ["CudaGraphs", "Muon", "gru_rollout_cost", "sigreg_loss", "use_triton", "variance_covariance_loss"]
