"""Shared building blocks of the three scripts: anti-collapse losses and planning rollouts.

Every function is plain PyTorch, differentiable where a loss needs it, and runs on any device and floating dtype.
"""
from kernels.rollout import gru_rollout_cost
from kernels.sigreg import sigreg_loss
from kernels.variance_covariance import variance_covariance_loss

__all__ = ["gru_rollout_cost", "sigreg_loss", "variance_covariance_loss"]
