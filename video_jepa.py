"""Video JEPA: predict the latents of future frames, without reconstructing pixels.

    z_t     = encode(frame_t)                             latent map [C, h, w] of each frame, t = 0..T-1
    s_t^0   = (z_t, 0)                                    state: the latent and a hidden state, which starts at zero
    s_t^k   = predict(s_{t-2}^{k-1}, s_{t-1}^{k-1})       round k of the parallel rollout, for all t > 1 at once
    L       = mean_k |project(s^k) - project(z)|^2        no stop-gradient, no moving average; collapse is prevented by
              + 10 variance + 100 covariance              of the projected latents over clips, frames and positions

The two first states of a clip stay the true ones, so that a prediction of round k lies k frames ahead of the newest true
frame that it draws on. Two heads read detached latents and teach the encoder nothing: one detects in which of 8 x 8
cells the centre of a digit lies, the other decodes pixels. The measure is the average precision (AP) of the detector on
latents predicted k frames ahead, k = 1..7, and their mean (mAP).

    python video_jepa.py                                   # digits of MNIST; preset gpu on CUDA, cpu elsewhere
    python video_jepa.py --data glyphs                     # digits of a font: needs no files
    python video_jepa.py --preset paper --data moving-mnist    # the published recipe (arXiv 2602.03604) and data
"""

import argparse
import dataclasses
import io
import json
import math
import os
import platform
import re
import signal
import sys
import time
import zlib
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # collectives with a gradient
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from tqdm import tqdm

from kernels import use_triton, variance_covariance_loss

SCRIPT = "video_jepa"
FORMAT = f"nanojepa/{SCRIPT}/2"  # of a checkpoint
TERMS = ("prediction", "variance", "covariance", "detection", "decoding")


# ---------------------------------------------------------------------------------------------------- configuration
@dataclass
class Config:
    """Learn to predict the latents of future frames. The defaults are preset paper, the published recipe."""

    preset: Literal["gpu", "paper", "cpu", "smoke"] = "paper"  # set of defaults; any other flag overrides it
    seed: int = 0  # of weights and of the order of clips
    run_dir: str = ""  # folder of this run; empty: runs/video_jepa/<preset>-<date>-<time>
    resume: bool = False  # go on with the run in run_dir; without one, with the newest of the preset
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    compile: bool = True  # torch.compile the loss
    kernels: bool = True  # fused Triton losses on NVIDIA GPUs; off: plain PyTorch
    # data
    data: Literal["mnist", "moving-mnist", "glyphs"] = "mnist"  # moving digits of MNIST; the published file; of a font
    data_dir: str = "data"  # where downloaded data sets lie, in torchvision's layout
    frames: int = 10  # of a training clip; validation clips have 10
    clips_per_epoch: int = 18000  # clips that count as one epoch
    # model
    stride: Literal[1, 2, 4, 8] = 1  # pixels of a frame per position of a latent map, along each axis
    latent_dim: int = 16  # channels of a latent map
    encoder_width: int = 32  # channels of the encoder's first stage
    predictor_width: int = 32  # channels of the U-Net's finest level; they double at each coarser one
    levels: int = 4  # of the U-Net
    downsample: Literal["stride", "pool"] = "stride"  # between levels of the U-Net: strided convolution or max-pooling
    norm: Literal["batch", "layer"] = "batch"  # layer: over the channels of each position
    residual: bool = False  # predict the change from the last state
    hidden_dim: int = 0  # channels of the hidden state that a prediction passes on to the next
    projector_width: int = 64  # hidden and output features of the projector
    # loss
    rounds: int = 4  # of the parallel rollout in training (K)
    prediction_weight: float = 0.8  # mean squared error of the projected predictions
    variance_weight: float = 10.0  # hinge loss on the standard deviation of each projected feature
    covariance_weight: float = 100.0  # squared off-diagonal covariances of the projected features
    centre_positions: bool = False  # subtract each position's mean over clips and frames before these two
    # optimisation
    epochs: float = 50.0  # passes over the training clips
    max_steps: int = 0  # stop after this many steps of the schedule; 0 = off
    batch_size: int = 64  # clips a step, over all processes
    optimizer: Literal["adam", "muon"] = "adam"  # muon: for matrices; vectors by Adam at a tenth of its rate
    lr: float = 1e-3  # peak learning rate
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: linear warm-up over the first twentieth, then to 0
    # evaluation and logging
    validation_clips: int = 2000  # to measure on at the end; 0 = no evaluation
    log_every: int = 50  # steps between log lines
    save_every: float = 60.0  # seconds between checkpoints, which are written at log lines

    def __post_init__(self):
        side = SIZE // self.stride
        if min(self.batch_size, self.rounds, self.levels, self.log_every) < 1:
            raise ValueError("--batch-size, --rounds, --levels and --log-every must be at least 1")
        if self.rounds > self.frames - 2:
            raise ValueError(f"--rounds {self.rounds} needs --frames {self.rounds + 2} or more, got {self.frames}")
        if side % 2 ** (self.levels - 1):
            raise ValueError(f"--levels {self.levels} is too many for latent maps of {side} x {side}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr must be a positive number, got {self.lr}")


PRESETS: dict[str, dict] = {
    "gpu": dict(  # what won on a CPU, larger; not tuned on a GPU yet
        stride=8,
        predictor_width=128,
        levels=2,
        downsample="pool",
        norm="layer",
        residual=True,
        hidden_dim=64,
        rounds=6,
        prediction_weight=1.0,
        centre_positions=True,
        epochs=20,
        optimizer="muon",
        lr=0.02,
        schedule="cosine",
    ),
    "paper": {},  # the defaults of Config
    "cpu": dict(  # a quarter of an hour on two cores
        frames=8,
        stride=8,
        encoder_width=16,
        predictor_width=64,
        levels=2,
        downsample="pool",
        norm="layer",
        residual=True,
        hidden_dim=32,
        rounds=6,
        prediction_weight=1.0,
        centre_positions=True,
        epochs=1.5,
        batch_size=16,
        optimizer="muon",
        lr=0.02,
        schedule="cosine",
        compile=False,
    ),
    "smoke": dict(  # a few seconds, to see that everything works
        data="glyphs",
        clips_per_epoch=1600,
        stride=4,
        encoder_width=16,
        predictor_width=16,
        levels=2,
        norm="layer",
        residual=True,
        hidden_dim=8,
        projector_width=16,
        prediction_weight=1.0,
        centre_positions=True,
        epochs=1,
        batch_size=8,
        optimizer="muon",
        lr=0.02,
        schedule="cosine",
        validation_clips=200,
        compile=False,
    ),
}
MAY_CHANGE_ON_RESUME = {"run_dir", "resume", "device", "compile", "kernels", "data_dir", "max_steps"}
MAY_CHANGE_ON_RESUME |= {"validation_clips", "log_every", "save_every"}


def preset(name: str, **overrides) -> Config:
    """The configuration of a preset, with some fields replaced: `preset("cpu", seed=1)`."""
    return Config(**{"preset": name, **PRESETS[name], **overrides})


class UserError(ValueError):
    """A mistake in settings, data or files that the user can mend: shown as one line, without a traceback."""


# ------------------------------------------------------------------------------------------------------------- data
SIZE, DIGIT = 64, 28  # side of a frame and of a digit, px
CELLS = 8  # cells of the detection map along each axis


class Clips(NamedTuple):
    frames: Tensor  # [B, T, 64, 64] uint8
    labels: Tensor  # [B, T, 8, 8] bool: the centre of a digit lies in the cell


def seeded(generator: torch.Generator, *key) -> torch.Generator:
    """The generator, seeded by a key such as ("clips", seed, step); hashed: on a CPU only 32 bits of a seed count."""
    return generator.manual_seed(zlib.crc32(repr(key).encode()))


def paths(n: int, frames: int, g: torch.Generator) -> Tensor:
    u = torch.rand(n, 3, generator=g, device=g.device)
    room, angle = SIZE - DIGIT, 2 * math.pi * u[:, 2]
    velocity = 3.6 * torch.stack((angle.cos(), angle.sin()), 1)
    unfolded = room * u[:, None, :2] + velocity[:, None] * torch.arange(frames, device=g.device)[:, None]
    phase = unfolded % (2 * room)
    return torch.minimum(phase, 2 * room - phase)


def occupancy(centres: Tensor) -> Tensor:
    cell = (centres / (SIZE / CELLS)).floor().long()
    index = torch.arange(CELLS, device=centres.device)
    x, y = (cell[..., axis, None] == index for axis in (0, 1))  # [..., K, 8]
    return (y[..., :, None] & x[..., None, :]).any(-3)


def move_digits(digits: Tensor, n: int, frames: int, g: torch.Generator) -> Clips:
    corner = paths(2 * n, frames, g).view(n, 2, frames, 2).transpose(1, 2)  # [n, T, 2, 2]
    pick = torch.randint(0, len(digits), (n, 2), generator=g, device=g.device)
    at = corner.round().long()
    place = torch.arange(DIGIT, device=g.device)
    index = (at[..., 1, None] + place)[..., None] * SIZE + (at[..., 0, None] + place)[..., None, :]  # [n, T, 2, 28, 28]
    layers = torch.zeros(n, frames, 2, SIZE * SIZE, dtype=torch.uint8, device=g.device)
    layers.scatter_(3, index.flatten(3), digits[pick].flatten(2)[:, None].expand(-1, frames, -1, -1))
    return Clips(layers.amax(2).view(n, frames, SIZE, SIZE), occupancy(at + DIGIT / 2))


def mnist(root: str) -> tuple[Tensor, Tensor]:
    """Digits [N, 28, 28] uint8 to train and to validate on: MNIST's two sets, which share no digit."""
    from torchvision.datasets import MNIST

    try:
        train, validation = (MNIST(root, train=part, download=True).data for part in (True, False))
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError) as error:
        what = f"MNIST is missing or damaged in {root} and could not be downloaded ({error})"
        raise UserError(f"{what}; put its files into {root}/MNIST/raw") from None
    return train, validation


def glyphs(n: int = 2000) -> tuple[Tensor, Tensor]:
    """Digits of Pillow's own font, each warped in its own way: n to train and n / 4 to validate on. Always the same."""
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng(0)
    font = ImageFont.load_default(24)
    drawn = []
    for k in range(n + n // 4):
        picture = Image.new("L", (DIGIT, DIGIT))
        middle = (DIGIT / 2, DIGIT / 2)
        stroke = int(rng.integers(0, 2))
        ImageDraw.Draw(picture).text(middle, str(k % 10), 255, font, anchor="mm", stroke_width=stroke)
        angle, scale, shear = rng.uniform(-0.3, 0.3), rng.uniform(0.9, 1.2), rng.uniform(-0.2, 0.2)
        warp = scale * np.array([[np.cos(angle), -np.sin(angle) + shear], [np.sin(angle), np.cos(angle)]])
        shift = DIGIT / 2 - warp @ np.full(2, DIGIT / 2)
        affine = (*warp[0], shift[0], *warp[1], shift[1])
        drawn.append(np.array(picture.transform((DIGIT, DIGIT), Image.AFFINE, affine, Image.BILINEAR)))
    digits = torch.from_numpy(np.stack(drawn))
    return digits[:n], digits[n:]


class Data:
    """Training batches as a pure function of (seed, step), so that there is nothing to save."""

    def __init__(self, cfg: Config, device: torch.device, rank: int = 0, world: int = 1):
        self.cfg, self.generator, self.rank, self.world = cfg, torch.Generator(device), rank, world
        self.train, self.validation = glyphs() if cfg.data == "glyphs" else mnist(cfg.data_dir)

    def batch(self, step: int) -> Clips:
        n = self.cfg.batch_size // self.world
        g = seeded(self.generator, "clips", self.cfg.seed, step)
        clips = move_digits(self.train, self.cfg.batch_size, self.cfg.frames, g)
        return Clips(*(x[self.rank * n : (self.rank + 1) * n] for x in clips))

    def unseen(self, n: int) -> Clips:
        return move_digits(self.validation, n, 10, seeded(self.generator, "test"))


# ------------------------------------------------------------------------------------------------------------ model
class LayerNorm(nn.LayerNorm):
    """Over the channels of each position of [N, C, H, W]. It treats a predicted latent exactly as a true one, which
    batch norm does not: its statistics are those of one kind or of the other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1).to(x.dtype)


def norm_layer(kind: str, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else LayerNorm(channels)


def conv3x3(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, norm: str, stride: int = 1):
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride, bias=False)
        self.norm1 = norm_layer(norm, outputs)
        self.conv2 = conv3x3(outputs, outputs, bias=False)
        self.norm2 = norm_layer(norm, outputs)
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            conv1x1 = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv1x1, norm_layer(norm, outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class UNet(nn.Module):
    """Residual U-Net [N, inputs, h, w] -> [N, outputs, h, w]; channels double at each coarser level."""

    def __init__(self, inputs: int, outputs: int, width: int, levels: int, norm: str, downsample: str):
        super().__init__()
        widths = [width * 2**level for level in range(levels)]
        stride = 2 if downsample == "stride" else 1
        self.pool = downsample == "pool"
        self.stem = nn.Sequential(conv3x3(inputs, width, bias=False), norm_layer(norm, width), nn.ReLU())
        self.down = nn.ModuleList([ResidualBlock(width, width, norm)])
        for fine, coarse in zip(widths, widths[1:]):
            self.down.append(ResidualBlock(fine, coarse, norm, stride))
        self.up = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, 2) for fine, coarse in zip(widths, widths[1:]))
        self.merge = nn.ModuleList(ResidualBlock(2 * fine, fine, norm) for fine in widths[:-1])
        self.out = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        maps = []  # one a level, finest first
        for level, block in enumerate(self.down):
            if level > 0 and self.pool:
                x = F.max_pool2d(x, 2)
            x = block(x)
            maps.append(x)
        for level in reversed(range(len(self.up))):
            x = torch.cat((self.up[level](x), maps[level]), 1)
            x = self.merge[level](x)
        return self.out(x)


class Model(nn.Module):
    """Encoder, predictor and projector, trained together, and two heads that read detached latents.

    Letters in shapes: B clips, T frames, C = latent_dim, S = C + hidden_dim, h x w positions, P = projector_width.
    Another encoder: any module [N, 1, 64, 64] -> [N, C, 64 / stride, 64 / stride]. Another predictor: [N, 2 S, h, w] ->
    [N, S, h, w]."""

    def __init__(self, cfg: Config):
        super().__init__()
        C, S, W, P = cfg.latent_dim, cfg.latent_dim + cfg.hidden_dim, cfg.encoder_width, cfg.projector_width
        stem_stride = 2 if cfg.stride >= 2 else 1
        strides = (1, 2 if cfg.stride >= 4 else 1, 2 if cfg.stride == 8 else 1)
        self.hidden_dim, self.residual = cfg.hidden_dim, cfg.residual
        self.batch_norm = cfg.norm == "batch"
        self.encoder = nn.Sequential(
            conv3x3(1, W, stem_stride, bias=False),
            norm_layer(cfg.norm, W),
            nn.ReLU(),
            ResidualBlock(W, W, cfg.norm, strides[0]),
            ResidualBlock(W, 2 * W, cfg.norm, strides[1]),
            ResidualBlock(2 * W, C, cfg.norm, strides[2]),
        )
        self.predictor = UNet(2 * S, S, cfg.predictor_width, cfg.levels, cfg.norm, cfg.downsample)
        if self.batch_norm:
            self.projector = nn.Sequential(nn.Linear(C, P), nn.BatchNorm1d(P), nn.ReLU(), nn.Linear(P, P, bias=False))
        else:
            self.projector = nn.Sequential(nn.Linear(C, P), nn.ReLU(), nn.Linear(P, P))
        self.detector = nn.Sequential(nn.AdaptiveAvgPool2d(CELLS), conv3x3(C, 32), nn.ReLU(), conv3x3(32, 1))
        s = cfg.stride
        self.decoder = nn.Sequential(conv3x3(C, 32), nn.ReLU(), conv3x3(32, s * s), nn.PixelShuffle(s))
        self.to(memory_format=torch.channels_last)

    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B, T, 64, 64] in [0, 1] -> latents [B, T, C, h, w]."""
        images = frames.flatten(0, 1)[:, None].contiguous(memory_format=torch.channels_last)
        return self.encoder(images).unflatten(0, frames.shape[:2])

    def predict(self, before: Tensor, last: Tensor) -> Tensor:
        """Two successive states [B, n, S, h, w] each -> the next one [B, n, S, h, w]."""
        pairs = torch.cat((before, last), 2).flatten(0, 1)
        change = self.predictor(pairs).unflatten(0, before.shape[:2])
        return (last + change if self.residual else change).to(last.dtype)

    def initial_state(self, z: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] -> states [B, T, S, h, w] with a hidden state of zero."""
        return F.pad(z, (0, 0, 0, 0, 0, self.hidden_dim))

    def parallel_rollout(self, z: Tensor, rounds: int) -> list[Tensor]:
        """Latents of clips [B, T, C, h, w] -> for each round k = 1..rounds the predictions [B, T - 2, C, h, w] of frames
        2..T-1. In round k the frames from k + 1 on (from 0) are predicted k frames ahead."""
        B, T, C, h, w = z.shape
        state = self.initial_state(z)
        predictions = []
        for k in range(rounds):
            settled = 0 if self.batch_norm and self.training else k
            y = self.predict(state[:, settled:-2], state[:, settled + 1 : -1])
            state = torch.cat((state[:, : settled + 2], y), 1)
            predictions.append(state[:, 2:, :C])
        return predictions

    def autoregressive_rollout(self, z: Tensor, steps: int) -> Tensor:
        """Latents [B, T, C, h, w], T > 1 -> of the `steps` frames after the last two [B, steps, C, h, w]."""
        state = self.initial_state(z[:, -2:])
        for _ in range(steps):
            y = self.predict(state[:, -2:-1], state[:, -1:])
            state = torch.cat((state, y), 1)
        return state[:, 2:, : z.shape[2]]

    def project(self, z: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] -> projections [B, T, h, w, P]."""
        z = z.movedim(2, -1)
        return self.projector(z.flatten(0, -2)).unflatten(0, z.shape[:-1])

    def detect(self, z: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] -> logits that a digit's centre lies in each of 8 x 8 cells [B, T, 8, 8]."""
        return self.detector(z.flatten(0, 1))[:, 0].unflatten(0, z.shape[:2])

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] -> logits of frames [B, T, 64, 64]."""
        return self.decoder(z.flatten(0, 1))[:, 0].unflatten(0, z.shape[:2])


# --------------------------------------------------------------------------------------------------------- the loss
def gather(x: Tensor) -> Tensor:
    """Rows [N, ...] of all processes, with gradients to all of them."""
    if not dist.is_initialized():
        return x
    return torch.cat(dist.nn.functional.all_gather(x))


def losses(model: Model, cfg: Config, clips: Clips, amp: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> the loss (a scalar), its terms in the order of TERMS (detached) and latents [B, T, C, h, w] (detached)."""
    x = clips.frames.to(next(model.parameters()).dtype) / 255
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp):
        z = model.encode(x)
        target = model.project(z).float()
        predictions = [model.project(y).float() for y in model.parallel_rollout(z, cfg.rounds)]
        logits = model.detect(z.detach()).float()
        decoded = model.decode(z.detach()[:, ::8]).float()
    later = target[:, 2:]
    prediction = torch.stack([F.mse_loss(y, later) for y in predictions]).mean()
    rows = gather(target.flatten(0, 1))  # [B T, h, w, P]
    if cfg.centre_positions:
        rows = rows - rows.mean(0)
    variance, covariance = variance_covariance_loss(rows.flatten(0, -2))
    detection = F.binary_cross_entropy_with_logits(logits, clips.labels.to(logits.dtype))
    decoding = F.binary_cross_entropy_with_logits(decoded, x[:, ::8])
    loss = cfg.prediction_weight * prediction + cfg.variance_weight * variance + cfg.covariance_weight * covariance
    loss = loss + detection + decoding  # the heads read detached latents
    return loss, torch.stack((prediction, variance, covariance, detection, decoding)).detach(), z.detach()


@torch.no_grad()
def collapse_meter(z: Tensor) -> dict[str, float]:
    """How spread latents [B, T, C, h, w] are, less the mean of each position: a fixed code of positions is no spread.

    Effective rank: RankMe, exp of the entropy of the normalised singular values (Garrido et al. 2023, arXiv 2210.02885).
    Smallest and mean standard deviation of a feature; mean |off-diagonal correlation|."""
    z = z.double() - z.double().mean((0, 1))
    z = z.movedim(2, -1).flatten(0, -2)  # [N, C]
    z = z - z.mean(0)
    covariance = z.T @ z / (len(z) - 1)
    singular = torch.linalg.eigvalsh(covariance).clamp(min=0).sqrt()
    p = singular / singular.sum().clamp(min=1e-12)
    std = covariance.diagonal().sqrt()
    correlation = covariance / (std[:, None] * std).clamp(min=1e-12)
    off_diagonal = correlation.abs().sum() - correlation.diagonal().abs().sum()
    return dict(
        effective_rank=torch.exp(-(p * torch.log(p.clamp(min=1e-12))).sum()).item(),
        std_min=std.min().item(),
        std_mean=std.mean().item(),
        correlation=(off_diagonal / (len(std) * (len(std) - 1))).item(),
    )


# ----------------------------------------------------------------------------------------------------- optimisation
def learning_rate(cfg: Config, step: int, steps: int) -> float:
    """Constant, or linear warm-up over the first twentieth of a schedule of `steps`, then cosine to zero."""
    warmup = max(1, steps // 20)
    if cfg.schedule == "constant":
        return cfg.lr
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Muon(torch.optim.Optimizer):
    """Nesterov momentum whose steps on matrices are orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    torch.optim.Muon takes 2-D parameters only; here a convolution's weight counts as a matrix [first axis, the rest].
    Vectors are updated by Adam at a tenth of the rate."""

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.01):
        params = list(params)
        matrices = dict(params=[p for p in params if p.ndim > 1])
        vectors = dict(params=[p for p in params if p.ndim <= 1], steps=0)
        super().__init__([matrices, vectors], dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    def buffers(self, params: list[Tensor], name: str) -> list[Tensor]:
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in params]

    @torch.no_grad()
    def step(self) -> None:
        matrices, vectors = self.param_groups
        params = [p for p in matrices["params"] if p.grad is not None]
        grads = [p.grad for p in params]
        momentum = self.buffers(params, "momentum")
        torch._foreach_mul_(momentum, matrices["momentum"])
        torch._foreach_add_(momentum, grads)
        steps = orthogonalise(torch._foreach_add(grads, momentum, alpha=matrices["momentum"]))
        torch._foreach_mul_(params, 1 - matrices["lr"] * matrices["weight_decay"])
        torch._foreach_add_(params, steps, alpha=-matrices["lr"])

        params = [p for p in vectors["params"] if p.grad is not None]
        grads = [p.grad for p in params]
        vectors["steps"] += 1
        t = vectors["steps"]
        mean, square = self.buffers(params, "mean"), self.buffers(params, "square")
        torch._foreach_lerp_(mean, grads, 1 - 0.9)
        torch._foreach_mul_(square, 0.98)
        torch._foreach_addcmul_(square, grads, grads, 1 - 0.98)
        size = torch._foreach_add(torch._foreach_sqrt(square), 1e-8)
        rate = 0.1 * vectors["lr"]
        torch._foreach_addcdiv_(params, mean, size, -rate * math.sqrt(1 - 0.98**t) / (1 - 0.9**t))


def orthogonalise(matrices: list[Tensor]) -> list[Tensor]:
    """Nearly the closest semi-orthogonal matrix to each [n, ...], seen as [n, m], times sqrt(max(1, n / m)): five
    Newton-Schulz iterations. Matrices of one shape are stacked and done together."""
    a, b, c = 3.4445, -4.7750, 2.0315
    indices: dict[tuple, list[int]] = {}  # of the matrices of one shape
    for i, matrix in enumerate(matrices):
        indices.setdefault((len(matrix), matrix[0].numel()), []).append(i)
    result = list(matrices)
    for (n, m), group in indices.items():
        x = torch.stack([matrices[i].reshape(n, m) for i in group])
        x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()  # the iteration forgives rounding
        x = x.mT if n > m else x
        for _ in range(5):
            y = x @ x.mT
            x = a * x + (b * y + c * y @ y) @ x
        x = (x.mT if n > m else x) * max(1, n / m) ** 0.5
        for i, step in zip(group, x):
            result[i] = step.to(matrices[i].dtype).view_as(matrices[i])
    return result


def make_optimizer(model: Model, cfg: Config) -> torch.optim.Optimizer:
    if cfg.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), cfg.lr, fused=True)
    return Muon(model.parameters(), cfg.lr)


def average_gradients(model: Model) -> None:
    """Over all processes, in one message."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for g, mean in zip(grads, (flat / dist.get_world_size()).split([g.numel() for g in grads])):
        g.copy_(mean.view_as(g))


# ------------------------------------------------------------------------------------------------------- evaluation
HORIZONS = 7  # frames ahead, the most that are measured


def average_precision(scores: list[Tensor], labels: list[Tensor]) -> float:
    """Of each batch on its own, then averaged over batches, as published."""
    from sklearn.metrics import average_precision_score

    of_batches = [average_precision_score(y.flatten(), s.flatten()) for s, y in zip(scores, labels)]
    return round(float(np.mean(of_batches)), 4)


@torch.no_grad()
def evaluate(model: Model, clips: Clips, batch_size: int = 64) -> dict:
    """Average precision of the detector k = 1..7 frames ahead, over all frames that can be predicted so far ahead.

    ap_parallel (the published measure): on round k of the parallel rollout. ap_autoregressive: on rollouts from two true
    frames alone. Baselines: ap_last_frame, the last true latent instead of a prediction; ap_true_frames, the true latent
    of the predicted frame."""
    names = ("ap_parallel", "ap_autoregressive", "ap_last_frame", "ap_true_frames")
    scores = {name: [[] for _ in range(HORIZONS)] for name in names}
    labels = [[] for _ in range(HORIZONS)]
    T = clips.frames.shape[1]
    for start in range(0, len(clips.frames), batch_size):
        batch = Clips(*(x[start : start + batch_size] for x in clips))
        z = model.encode(batch.frames.float() / 255)  # [B, T, C, h, w]
        B = len(z)
        true = model.detect(z)
        parallel = model.parallel_rollout(z, HORIZONS)
        pairs = torch.stack((z[:, :-1], z[:, 1:]), 2).flatten(0, 1)  # [B (T - 1), 2, C, h, w]
        ahead = model.autoregressive_rollout(pairs, HORIZONS)
        autoregressive = model.detect(ahead).unflatten(0, (B, T - 1))  # [B, T - 1, HORIZONS, 8, 8]
        for k in range(1, HORIZONS + 1):
            # frames k + 1 .. T - 1 can be predicted k ahead from two true frames
            found = {
                "ap_parallel": model.detect(parallel[k - 1][:, k - 1 :]),
                "ap_autoregressive": autoregressive[:, : T - 1 - k, k - 1],
                "ap_last_frame": true[:, 1 : T - k],
                "ap_true_frames": true[:, k + 1 :],
            }
            for name, logits in found.items():
                scores[name][k - 1].append(logits.cpu())
            labels[k - 1].append(batch.labels[:, k + 1 :].cpu())
    result = {name: [average_precision(*of_k) for of_k in zip(scores[name], labels)] for name in names}
    for name in ("parallel", "autoregressive"):
        result[f"map_{name}"] = round(sum(result[f"ap_{name}"]) / HORIZONS, 4)
    return result


@torch.no_grad()
def make_examples(model: Model, clips: Clips) -> dict[str, np.ndarray]:
    """What figures need: true frames and labels of some clips, and what the heads read from a rollout of two frames."""
    z = model.encode(clips.frames.float() / 255)
    y = torch.cat((z[:, :2], model.autoregressive_rollout(z[:, :2], z.shape[1] - 2)), 1)
    decoded = (255 * torch.sigmoid(model.decode(y))).to(torch.uint8)
    arrays = dict(frames=clips.frames, labels=clips.labels, decoded=decoded, detected=torch.sigmoid(model.detect(y)))
    return {name: array.cpu().numpy() for name, array in arrays.items()}


# ------------------------------------------------------------------------------------------ run folder, checkpoints
stop_signals: list[int] = []  # received so far


def request_stop(number: int, _) -> None:
    """The training loop ends after the step in progress; a second signal ends the process at once."""
    stop_signals.append(number)
    signal.signal(number, signal.SIG_DFL)


def stop_requested(device: torch.device) -> bool:
    """Whether any of the processes was asked to stop."""
    flag = torch.tensor(float(len(stop_signals)), device=device)
    if dist.is_initialized():
        dist.all_reduce(flag)
    return flag.item() > 0


def new_run_dir(cfg: Config) -> Path:
    path = Path(cfg.run_dir or f"runs/{SCRIPT}/{cfg.preset}-{datetime.now():%Y%m%d-%H%M%S}")
    try:
        path.mkdir(parents=True)  # fails if it exists: two runs never share a folder
    except FileExistsError:
        raise UserError(f"{path} exists: choose another --run-dir, or go on with its run by --resume") from None
    return path


def last_run_dir(name: str) -> Path:
    """The newest run folder of a preset."""
    runs = sorted(Path("runs", SCRIPT).glob(f"{name}-*/config.json"), key=os.path.getmtime)
    if not runs:
        raise UserError(f"--resume: there is no run of preset {name} in runs/{SCRIPT}; name one by --run-dir")
    return runs[-1].parent


def saved_config(run_dir: Path) -> Config:
    """The configuration of an existing run."""
    try:
        return Config(**json.loads((run_dir / "config.json").read_text())["config"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"--resume: {run_dir} holds no run of this script ({error})") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Under a temporary name, flushed to the disk, then renamed: a crash at any moment leaves the old file or the new."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(path: Path, cfg: Config, model: Model, optimizer, step: int, seconds: float) -> None:
    """Batches and learning rate are functions of (seed, step), so this is all that an exact resume needs."""
    if not all(p.isfinite().all() for p in model.parameters()):
        raise UserError(f"NaN or Inf in the weights after step {step}; the last checkpoint is kept; try a smaller --lr")
    state = dict(format=FORMAT, config=dataclasses.asdict(cfg), step=step, seconds=seconds)
    state |= dict(model=model.state_dict(), optimizer=optimizer.state_dict(), rng=torch.get_rng_state())
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomically(path, buffer.getvalue())


def read_checkpoint(path: Path) -> dict:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # executes no pickle
        known = state["format"] == FORMAT
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except Exception as error:  # torch.load raises half a dozen kinds
        raise UserError(f"{path} is damaged or not a checkpoint ({type(error).__name__})") from None
    if not known:
        raise UserError(f"{path} is a checkpoint of another script or version: {state['format']}, not {FORMAT}")
    return state


def load(path: str | Path, device: str = "cpu") -> Model:
    """The model of a run folder or checkpoint file, in eval mode.

        model = load("runs/video_jepa/cpu-...")
        z = model.encode(frames)                    # [B, T, 64, 64] in [0, 1] -> [B, T, C, h, w]
        future = model.autoregressive_rollout(z, 5)

    Raises UserError if the file is missing, damaged or of another script."""
    path = Path(path)
    state = read_checkpoint(path / "checkpoint.pt" if path.is_dir() else path)
    model = Model(Config(**state["config"]))
    model.load_state_dict(state["model"])
    return model.to(device).eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------------- training
def start_device(cfg: Config) -> torch.device:
    """The device to compute on; under torchrun also joins the process group."""
    found = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    kind = cfg.device if cfg.device != "auto" else next(kind for kind in found if found[kind])
    if not found[kind]:
        raise UserError(f"--device {kind}: PyTorch finds no such device here")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    if cfg.batch_size % world:
        raise UserError(f"--batch-size {cfg.batch_size} does not divide over {world} processes")
    if world > 1 and cfg.norm == "batch" and kind != "cuda":
        raise UserError("batch norm over several processes needs GPUs; use --norm layer or one process")
    use_triton(None if cfg.kernels else False)
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.benchmark = True
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return f"{name.group(1) if name else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def bf16_supported(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def warm_up(compute_loss, cfg: Config, model: Model, clips: Clips, amp: bool) -> float:
    """A forward and backward pass that leaves no trace, so that compilation is in no timing. Returns its seconds."""
    begin = time.perf_counter()
    state = {name: value.clone() for name, value in model.state_dict().items()}  # batch norm counts what it sees
    try:
        compute_loss(model, cfg, clips, amp)[0].backward()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if cfg.compile:
            raise UserError(f"torch.compile failed, try --no-compile ({str(error).splitlines()[0][:100]})") from error
        raise
    model.load_state_dict(state)
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - begin


def collapse_warning(meter: dict[str, float], features: int) -> str:
    if meter["std_mean"] < 0.05 or meter["effective_rank"] < max(1.5, 0.1 * features):
        return "  latents collapse: raise --variance-weight"
    if meter["correlation"] > 0.7:
        return "  latents collapse, features repeat each other: raise --covariance-weight"
    return ""


def train(cfg: Config) -> dict:
    """Train and evaluate; returns the summary, which is also in summary.json of the run folder.

    Raises UserError for mistakes in settings, data and files, and when the loss is no longer finite."""
    device = start_device(cfg)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    first = rank == 0  # the process that logs, saves and evaluates
    data = Data(cfg, device, rank, world)
    torch.manual_seed(cfg.seed)
    model = Model(cfg).to(device)
    if world > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = make_optimizer(model, cfg)
    steps = max(1, round(cfg.epochs * cfg.clips_per_epoch / cfg.batch_size))  # of the whole schedule
    end = min(steps, cfg.max_steps or steps)
    amp = bf16_supported(device)

    # the run folder: a new one, or that of the run to resume
    start, seconds, metrics = 0, 0.0, ""
    if cfg.resume:
        run_dir = Path(cfg.run_dir) if cfg.run_dir else last_run_dir(cfg.preset)
        state = read_checkpoint(run_dir / "checkpoint.pt")
        for name, value in state["config"].items():
            if name not in MAY_CHANGE_ON_RESUME and value != getattr(cfg, name):
                raise UserError(f"--resume: the run has {name} {value}, not {getattr(cfg, name)}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        start, seconds = state["step"], state["seconds"]
        lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
        metrics = "".join(line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= start)
    elif first:
        run_dir = new_run_dir(cfg)
    if first:
        config = dict(config=dataclasses.asdict(cfg), device=device_name(device), torch=torch.__version__)
        write_atomically(run_dir / "config.json", json.dumps(config, indent=1).encode())
        write_atomically(run_dir / "metrics.jsonl", metrics.encode())
        parameters = sum(p.numel() for part in (model.encoder, model.predictor) for p in part.parameters())
        print(f"{cfg.preset} | {device_name(device)} | encoder and predictor {parameters:,} parameters | {run_dir}")

    torch.compiler.reset()  # many trainings in one process would reach the limit of recompilations
    compute_loss = torch.compile(losses, fullgraph=world == 1, dynamic=False) if cfg.compile else losses
    warm_up_seconds = warm_up(compute_loss, cfg, model, data.batch(start), amp)
    log_step, log_time = start, time.perf_counter()
    save_time = time.perf_counter()
    for step in range(start, end):
        loss, terms, latents = compute_loss(model, cfg, data.batch(step), amp)
        loss.backward()
        if world > 1:
            average_gradients(model)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(cfg, step, steps)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        done, last = step + 1, step + 1 == end
        stop = bool(stop_signals) if world == 1 else done % cfg.log_every == 0 and stop_requested(device)
        if done % cfg.log_every and not last and not stop:
            continue
        if world > 1:
            dist.all_reduce(terms)
        values = dict(loss=loss.item()) | dict(zip(TERMS, (terms / world).tolist()))  # waits for the device
        seconds += time.perf_counter() - log_time
        if not all(map(math.isfinite, values.values())):
            broken = ", ".join(name for name, value in values.items() if not math.isfinite(value))
            raise UserError(f"NaN or Inf at step {done} in {broken}; the last checkpoint is kept; try a smaller --lr")
        if first:
            milliseconds = 1e3 * (time.perf_counter() - log_time) / (done - log_step)
            meter = collapse_meter(latents)
            record = dict(step=done, lr=learning_rate(cfg, step, steps), milliseconds=milliseconds, **values, **meter)
            with open(run_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps(record) + "\n")
            parts = " ".join(f"{name} {values[name]:.3f}" for name in TERMS)
            print(
                f"step {done:05d}/{steps} | loss {values['loss']:.4f} | {parts} | {milliseconds:.0f} ms"
                f" | rank {meter['effective_rank']:.1f}/{latents.shape[2]}"
                f" | {(end - done) * milliseconds / 6e4:.1f} min left{collapse_warning(meter, latents.shape[2])}",
                flush=True,
            )
            if last or stop or time.perf_counter() - save_time > cfg.save_every:
                save_checkpoint(run_dir / "checkpoint.pt", cfg, model, optimizer, done, seconds)
                save_time = time.perf_counter()
        if stop and not last:
            if first:
                print(f"stopped at step {done}, checkpoint saved; go on with --resume --run-dir {run_dir}")
            sys.exit(128 + (stop_signals or [signal.SIGTERM])[0])
        log_step, log_time = done, time.perf_counter()

    if not first:
        return {}
    summary = dict(preset=cfg.preset, seed=cfg.seed, data=cfg.data, steps=end, parameters=parameters)
    summary |= dict(device=device_name(device), torch=torch.__version__)
    summary |= dict(train_seconds=round(seconds, 1), warm_up_seconds=round(warm_up_seconds, 1))
    if cfg.validation_clips:
        begin = time.perf_counter()
        clips = data.unseen(cfg.validation_clips)
        summary |= evaluate(model.eval(), clips) | collapse_meter(model.encode(clips.frames[:8].float() / 255))
        np.savez_compressed(run_dir / "examples.npz", **make_examples(model, Clips(*(x[:6] for x in clips))))
        summary["evaluation_seconds"] = round(time.perf_counter() - begin, 1)
    write_atomically(run_dir / "summary.json", json.dumps(summary, indent=1).encode())
    print(json.dumps(summary))
    return summary


# ----------------------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str]) -> Config:
    """Defaults from --preset, or on --resume from the run itself; then any field of Config as a flag."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--run-dir", "--run_dir", default="")
    args, _ = parser.parse_known_args(argv)
    default = preset(args.preset)
    if args.resume:
        run_dir = Path(args.run_dir) if args.run_dir else last_run_dir(args.preset)
        default = dataclasses.replace(saved_config(run_dir), run_dir=str(run_dir), resume=False)
    return tyro.cli(Config, args=argv, default=default)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request_stop)
    try:
        train(parse_args(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: out of memory; choose a smaller --batch-size")
    except OSError as error:  # a full disk, a folder without permission
        sys.exit(f"error: {error}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
