"""Video JEPA: see several frames ahead, in latent space.

    z_t = encode(frame_t)                            a latent map [C, h, w] of each frame, t = 0..T-1
    s_t^0 = (z_t, 0)                                 a state: the latent, and what is handed on (--hidden-dim)
    s_t^k = predict(s_{t-2}^{k-1}, s_{t-1}^{k-1})    round k, for all t > 1 at once; s_0 and s_1 stay true
    y_t^k = the latent part of s_t^k
    loss = mean_k |project(y^k) - p|^2               p = project(z); no stop-gradient; collapse is prevented by
         + 10 variance(p) + 100 covariance(p)        of projected latents, over batch, time and place (kernels/)

where |.|^2 is a mean over clips, frames, places and features.

Two heads read detached latents: one says in which of 8 x 8 cells a digit's centre lies, one paints the frame. How well
the first does on latents predicted t + 1 steps ahead is the measure: average precision AP_t, t = 0..6; their mean, mAP.

    python video_jepa.py                                   # digits of MNIST, preset gpu on CUDA, cpu elsewhere
    python video_jepa.py --data glyphs                     # digits of a font: no files needed
    python video_jepa.py --preset paper --data moving-mnist    # the published recipe (arXiv 2602.03604) and file

Preset cpu: mAP .68 in rounds, .64 from two true frames alone, after nine minutes on 2 cores (MNIST, 10k digits; 3
seeds in results/); published, in rounds: .607 after 50 epochs on a GPU. It and preset gpu differ from the paper in
latents of 8 x 8 places, a wider U-Net of two levels with max-pooling, LayerNorm, residual prediction, what is handed
on, six rounds, centred places, Muon, a cosine schedule and fewer epochs; preset cpu also in short clips and small
batches.
From "checkpoint and logging" on the file is nearly the same as the other scripts.
"""
import argparse
import contextlib
import dataclasses
import datetime
import functools
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.distributed.nn.functional import all_reduce  # with a gradient; imported later it keeps the group's threads
from tqdm import tqdm

from kernels import use_triton, variance_covariance_loss

SCRIPT = "video_jepa"
TERMS = ("prediction", "variance", "covariance", "detection", "decoding")
METER = ("std_min", "std_mean", "correlation")
PUBLISHED = {"map_rounds": "0.607", "ap_rounds": "0.76 .. 0.40"}  # arXiv 2602.03604, K = 4


# ---------------------------------------------------------------------------------------------------- configuration
@dataclass
class Config:
    """Learn to predict the latents of coming frames."""

    # Here stand the published values: preset paper. Only its data is --data moving-mnist.

    preset: Literal["gpu", "paper", "cpu", "smoke"] = "paper"  # set of defaults; any flag given beside it wins
    seed: int = 0  # of weights and clips
    run_dir: str = ""  # folder of this run; empty: the first free runs/video_jepa/<preset>-<n>
    resume: bool = False  # go on from the checkpoint in the run folder
    overwrite: bool = False  # empty a run folder that exists
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    compile: bool = True  # torch.compile the loss, forward and backward
    kernels: bool = True  # fused Triton losses on NVIDIA GPUs; off: plain PyTorch
    # data
    data: Literal["mnist", "moving-mnist", "glyphs"] = "mnist"  # MNIST moved here; the published file; a font
    data_dir: str = "data"  # where downloaded sets lie, in torchvision's layout
    frames: int = 10  # of a training clip; validation clips have 10
    clips_per_epoch: int = 18000  # clips that count as one epoch; the published file has 9,000 sequences of two clips
    # model
    stride: Literal[1, 2, 4, 8] = 1  # pixels of a frame per place of a latent, along each side
    latent_dim: int = 16  # features of a latent at each place
    encoder_width: int = 32  # channels of the encoder's first stage
    predictor_width: int = 32  # channels of the U-Net's finest level; they double at each coarser one
    levels: int = 4  # of the U-Net
    down: Literal["stride", "pool"] = "stride"  # how the U-Net gets coarser: convolutions of stride 2, or max-pooling
    norm: Literal["batch", "layer"] = "batch"  # layer: over the channels of each place
    residual: bool = False  # predict what is added to the last latent
    hidden_dim: int = 0  # features at each place that a prediction hands on to the next, beside its latent
    projector_width: int = 64  # hidden and output features of the projector
    # loss
    rollout: int = 4  # rounds of prediction in training (K)
    context: Literal["rounds", "pairs"] = "rounds"  # rounds: equations on top; pairs: open-loop from every two frames
    prediction_weight: float = 0.8  # squared error of the predictions; published: 1, of 10 frames, two of them true
    variance_weight: float = 10.0  # hinge on each feature's standard deviation
    covariance_weight: float = 100.0  # squared off-diagonal covariances
    centre_places: bool = False  # take out each place's mean over clips and frames before both
    # optimisation
    epochs: float = 50.0  # of clips_per_epoch clips
    max_steps: int = 0  # stop after this many steps of the schedule; 0 = off
    batch_size: int = 64  # clips a step, over all processes
    optimizer: Literal["adam", "muon"] = "adam"  # muon: matrices; vectors by Adam at a tenth of its rate
    lr: float = 1e-3  # peak learning rate
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: warm-up over the first twentieth, then down to 0
    # evaluation and logging
    evaluate: bool = True  # measure AP and draw figures at the end
    validation_clips: int = 2000  # clips to measure on, of digits (moving-mnist: sequences) not trained on
    log_every: int = 50  # steps between log lines
    checkpoint_every: int = 500  # steps between checkpoints


PRESETS: dict[str, dict] = {
    "gpu": dict(  # what won on a CPU, larger; not tuned on a GPU yet
        stride=8, predictor_width=128, levels=2, down="pool", norm="layer", residual=True, hidden_dim=64, rollout=6,
        prediction_weight=1.0, centre_places=True, optimizer="muon", lr=0.02, schedule="cosine", epochs=20,
    ),
    "paper": {},  # the defaults above
    "cpu": dict(
        stride=8, encoder_width=16, predictor_width=64, levels=2, down="pool", norm="layer", residual=True,
        hidden_dim=32, frames=8, rollout=6, prediction_weight=1.0, centre_places=True, optimizer="muon", lr=0.02,
        schedule="cosine", epochs=1.5, batch_size=16, compile=False,
    ),
    "smoke": dict(
        data="glyphs", stride=4, encoder_width=16, predictor_width=16, levels=2, norm="layer", residual=True,
        hidden_dim=8, prediction_weight=1.0, centre_places=True, projector_width=16, epochs=1, clips_per_epoch=1600,
        batch_size=8, optimizer="muon", lr=0.02, schedule="cosine", validation_clips=200, checkpoint_every=40,
        compile=False,
    ),
}  # fmt: skip
MAY_CHANGE_ON_RESUME = {
    "run_dir", "resume", "overwrite", "device", "compile", "kernels", "data_dir", "max_steps", "evaluate",
    "validation_clips", "log_every", "checkpoint_every",
}  # fmt: skip


class UserError(Exception):
    """What a person can mend: printed as one line, without a traceback."""


def preset(name: str, **overrides) -> Config:
    """The configuration of a preset, with fields replaced: `preset("cpu", seed=1)`."""
    if name not in PRESETS:
        raise UserError(f"--preset {name} is none of {', '.join(PRESETS)}")
    return Config(**{"preset": name, **PRESETS[name], **overrides})


# ------------------------------------------------------------------------------------------------------------- data
SIZE, DIGIT, SPEED = 64, 28, 3.6  # side of a frame and of a digit, px; px a frame
CELLS, FRAMES = 8, 10  # along each side of the detection map; of a validation clip


class Clips(NamedTuple):
    frames: Tensor  # [B, T, 64, 64] uint8
    occupied: Tensor  # [B, T, 8, 8] bool: a digit's centre lies in the cell
    centres: Tensor  # [B, T, 2, 2] px (x, y) of the two digits as drawn, at whole px; in moving_mnist's way; or NaN


def seeded(generator: torch.Generator, *key) -> torch.Generator:
    """The generator, seeded by a key such as ("clips", seed, step); hashed: on a CPU only 32 bits of a seed count."""
    return generator.manual_seed(zlib.crc32(repr(key).encode()))


def paths(n: int, frames: int, g: torch.Generator) -> Tensor:
    """Upper left corners [n, frames, 2] (x, y) of digits, in px: straight lines at 3.6 px a frame, elastic bounces.

    Srivastava et al. 2015 (arXiv 1502.04681). A bounce folds the line back: a path is a triangle wave of time. (The
    published generator lets a digit rest at the border for the frame in which it hits.)"""
    u = torch.rand(n, 3, generator=g, device=g.device)
    room, angle = SIZE - DIGIT, 2 * math.pi * u[:, 2]
    velocity = SPEED * torch.stack((angle.cos(), angle.sin()), 1)
    unfolded = room * u[:, None, :2] + velocity[:, None] * torch.arange(frames, device=g.device)[:, None]
    return fold(unfolded, room)


def fold(x: Tensor, room: float) -> Tensor:
    """Where a straight line that has come to x is, with mirrors at 0 and at `room`."""
    phase = x % (2 * room)
    return torch.minimum(phase, 2 * room - phase)


def occupancy(centres: Tensor) -> Tensor:
    """Centres [..., K, 2] in px, NaN = none -> which of 8 x 8 cells (rows are y) hold one [..., 8, 8]."""
    cell = (centres / (SIZE / CELLS)).nan_to_num(-1).floor().long()
    index = torch.arange(CELLS, device=centres.device)
    x, y = (cell[..., axis, None] == index for axis in (0, 1))  # [..., K, 8]
    return (y[..., :, None] & x[..., None, :]).any(-3)


def move_digits(digits: Tensor, n: int, frames: int, g: torch.Generator) -> Clips:
    """n clips of two of the digits [D, 28, 28] uint8 each, brighter over darker, on black."""
    corner = paths(2 * n, frames, g).view(n, 2, frames, 2).transpose(1, 2)  # [n, T, 2, 2]
    pick = torch.randint(0, len(digits), (n, 2), generator=g, device=g.device)
    at = corner.round().long()
    place = torch.arange(DIGIT, device=g.device)
    index = (at[..., 1, None] + place)[..., None] * SIZE + (at[..., 0, None] + place)[..., None, :]  # [n, T, 2, 28, 28]
    layers = torch.zeros(n, frames, 2, SIZE * SIZE, dtype=torch.uint8, device=g.device)
    layers.scatter_(3, index.flatten(3), digits[pick].flatten(2)[:, None].expand(-1, frames, -1, -1))
    centres = at + DIGIT / 2
    return Clips(layers.amax(2).view(n, frames, SIZE, SIZE), occupancy(centres), centres)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def mnist(root: str) -> tuple[Tensor, Tensor]:
    """Digits [N, 28, 28] uint8 to train and to validate on: MNIST's two sets, which share no digit."""
    from torchvision.datasets import MNIST

    try:
        return tuple(MNIST(root, train=part, download=True).data for part in (True, False))
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError) as error:
        what = f"MNIST is missing or damaged in {root} and could not be downloaded ({one_line(error)})"
        raise UserError(f"{what}; put its files into {root}/MNIST/raw") from None


def glyphs(n: int = 2000) -> tuple[Tensor, Tensor]:
    """Digits of Pillow's own font, each warped in its own way: n to train and n / 4 to validate on. Always the same."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    rng, font, drawn = np.random.default_rng(0), ImageFont.load_default(24), []
    for k in range(n + n // 4):
        picture, middle, stroke = Image.new("L", (DIGIT, DIGIT)), (DIGIT / 2, DIGIT / 2), int(rng.integers(0, 2))
        ImageDraw.Draw(picture).text(middle, str(k % 10), 255, font, anchor="mm", stroke_width=stroke)
        angle, scale, shear = rng.uniform(-0.3, 0.3), rng.uniform(0.9, 1.2), rng.uniform(-0.2, 0.2)
        warp = scale * np.array([[np.cos(angle), -np.sin(angle) + shear], [np.sin(angle), np.cos(angle)]])
        shift = DIGIT / 2 - warp @ np.full(2, DIGIT / 2)
        affine = (*warp[0], shift[0], *warp[1], shift[1])
        picture = picture.transform((DIGIT, DIGIT), Image.AFFINE, affine, Image.BILINEAR)
        drawn.append(torch.from_numpy(np.array(picture)))
    digits = torch.stack(drawn)
    return digits[:n], digits[n:]


def moving_mnist(root: str) -> tuple[Clips, Clips]:
    """The published file: of its sequences of 20 frames nine tenths are for training, each cut into two clips of 10.

    Centres are those of mass of the two largest connected components (of pixels over 32) of a frame: touching digits
    count as one. (The published code takes the middle of their boxes, and a random tenth for validation.)"""
    import numpy as np
    from scipy import ndimage
    from torchvision.datasets import MovingMNIST

    try:
        data = MovingMNIST(root, split=None, download=True).data[:, :, 0]  # [N, 20, 64, 64] uint8
    except (OSError, RuntimeError, ValueError, AssertionError, EOFError) as error:
        what = f"{root}/MovingMNIST/mnist_test_seq.npy is missing or damaged"
        raise UserError(f"{what} and could not be downloaded ({one_line(error)}); put it there") from None
    clips = data.reshape(-1, FRAMES, SIZE, SIZE)
    cache, key = Path(root) / "MovingMNIST/centres.pt", [len(clips), int(clips[::97].long().sum())]
    try:
        kept = torch.load(cache, weights_only=True)
        centres = kept["centres"] if kept["key"] == key else None
    except Exception:  # absent, damaged or foreign: made anew
        centres = None
    if centres is None:
        centres = torch.full((len(clips) * FRAMES, 2, 2), torch.nan)
        for n, frame in enumerate(progress(clips.flatten(0, 1).numpy(), "finding digits")):
            stop_if_asked()
            components, found = ndimage.label(frame > 32, structure=[[1] * 3] * 3)
            size = np.bincount(components.ravel())[1:]
            largest = [k + 1 for k in size.argsort()[::-1][:2]]
            for d, (y, x) in enumerate(ndimage.center_of_mass(frame, components, largest) if found else []):
                centres[n, d] = torch.tensor([x + 0.5, y + 0.5])
        centres, buffer = centres.view(-1, FRAMES, 2, 2), io.BytesIO()
        torch.save(dict(key=key, centres=centres), buffer)
        with contextlib.suppress(OSError):  # a read-only disk: found again next time
            write_atomically(cache, buffer.getvalue())
    whole, train = Clips(clips, occupancy(centres), centres), 2 * (len(data) * 9 // 10)
    return tuple(Clips(*(x[part] for x in whole)) for part in (slice(train), slice(train, None)))


class ClipStream:
    """Training batches as a pure function of (seed, step): nothing to save, and a resumed run sees the same clips.

    A new data set: a function of cfg.data_dir that returns Clips to train and to validate on, as moving_mnist does, and
    its name here and in Config. Frames are grey, of 64 x 64 px; where nothing is known of places, occupied is False and
    centres are NaN, and mAP says nothing."""

    def __init__(self, cfg: Config, device: torch.device, rank: int = 0, world: int = 1):
        first = not dist.is_initialized() or rank == 0
        if not first:
            dist.barrier()  # the first process downloads for all
        self.cfg, self.generator, self.rank, self.world = cfg, torch.Generator(device), rank, world
        sources = {"mnist": mnist, "moving-mnist": moving_mnist, "glyphs": lambda _: glyphs()}
        source = sources[cfg.data](cfg.data_dir)
        self.moving = isinstance(source[0], Tensor)  # digits, to be moved
        place = lambda part: part.to(device) if self.moving else Clips(*(x.to(device) for x in part))
        self.train, self.validation = (place(part) for part in source)
        if first and dist.is_initialized():
            dist.barrier()

    def __call__(self, step: int) -> Clips:
        cfg, n = self.cfg, self.cfg.batch_size // self.world
        g = seeded(self.generator, "clips", cfg.seed, step)
        mine = slice(self.rank * n, (self.rank + 1) * n)
        if self.moving:
            return Clips(*(x[mine] for x in move_digits(self.train, cfg.batch_size, cfg.frames, g)))
        pick = torch.randint(0, len(self.train.frames), (cfg.batch_size,), generator=g, device=g.device)[mine]
        first = torch.randint(0, FRAMES - cfg.frames + 1, (), generator=g, device=g.device)
        return Clips(*(x[pick][:, first + torch.arange(cfg.frames, device=g.device)] for x in self.train))

    def unseen(self, n: int) -> Clips:
        """n clips to validate on, the same for every run with this n; of the published file as many as there are."""
        if self.moving:
            return move_digits(self.validation, n, FRAMES, seeded(self.generator, "test"))
        return Clips(*(x[:n] for x in self.validation))


# ------------------------------------------------------------------------------------------------------------ model
def wide(x: Tensor) -> Tensor:
    """In float32 at least: statistics and losses are not for bf16."""
    return x if x.dtype == torch.float64 else x.float()


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation of [N, C] or [N, C, H, W]; in training over the rows of all processes (on CPUs too, unlike
    nn.SyncBatchNorm)."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        axes, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
        n, world = x.numel() // x.shape[1] * dist.get_world_size(), dist.get_world_size()
        x32 = wide(x)
        mean = all_reduce(x32.mean(axes)) / world
        var = all_reduce((x32 - mean.view(shape)).square().mean(axes)) / world
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * n / (n - 1), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (x32 * scale.view(shape) + (self.bias - mean * scale).view(shape)).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Over the channels of each place of [N, C, H, W]: the same for true and for predicted latents, whatever else is in
    the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1).to(x.dtype)  # float32 under autocast on CUDA


def norm_of(kind: str, channels: int) -> nn.Module:
    return BatchNorm(channels) if kind == "batch" else LayerNorm(channels)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, norm: str, stride: int = 1):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), norm_of(norm, outputs)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), norm_of(norm, outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm_of(norm, outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class UNet(nn.Module):
    """Residual U-Net: [N, inputs, h, w] -> [N, outputs, h, w]; channels double at each coarser one of `levels`."""

    def __init__(self, inputs: int, outputs: int, width: int, levels: int, norm: str, down: str):
        super().__init__()
        widths, self.pool, step = [width * 2**k for k in range(levels)], down == "pool", 2 if down == "stride" else 1
        self.stem = nn.Sequential(nn.Conv2d(inputs, width, 3, 1, 1, bias=False), norm_of(norm, width), nn.ReLU())
        sizes = list(zip([width, *widths], widths))
        self.down = nn.ModuleList(ResidualBlock(a, b, norm, step if a < b else 1) for a, b in sizes)
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in zip(widths, widths[1:]))
        self.merge = nn.ModuleList(ResidualBlock(2 * a, a, norm) for a in widths[:-1])
        self.out = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, kept = self.stem(x), []
        for k, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if k and self.pool else x)
            kept.append(x)
        for up, merge, finer in zip(reversed(self.up), reversed(self.merge), reversed(kept[:-1])):
            x = merge(torch.cat((up(x), finer), 1))
        return self.out(x)


class Model(nn.Module):
    """Encoder, predictor and projector, trained together, and two heads that read detached latents.

    Another encoder: a module [N, 1, 64, 64] -> [N, latent_dim, 64 / stride, 64 / stride], which the heads rely on.
    Another predictor: [N, 2 S, h, w] -> [N, S, h, w], S = latent_dim + hidden_dim. All their parameters of two axes and
    more go to Muon (`make_optimizer`)."""

    def __init__(self, cfg: Config):
        super().__init__()
        C, W, P, n = cfg.latent_dim, cfg.encoder_width, cfg.projector_width, cfg.norm
        conv = lambda a, b: nn.Conv2d(a, b, 3, 1, 1)
        halve = [2 if cfg.stride >= s else 1 for s in (2, 4, 8)]  # strides of the stem and of the last two blocks
        self.encoder = nn.Sequential(
            nn.Conv2d(1, W, 3, halve[0], 1, bias=False), norm_of(n, W), nn.ReLU(),
            ResidualBlock(W, W, n), ResidualBlock(W, 2 * W, n, halve[1]), ResidualBlock(2 * W, C, n, halve[2]),
        )  # fmt: skip
        self.residual, self.hidden, S = cfg.residual, cfg.hidden_dim, C + cfg.hidden_dim
        self.predictor = UNet(2 * S, S, cfg.predictor_width, cfg.levels, n, cfg.down)
        self.batch_norm = n == "batch"
        first = [nn.Linear(C, P), BatchNorm(P)] if self.batch_norm else [nn.Linear(C, P)]
        self.projector = nn.Sequential(*first, nn.ReLU(), nn.Linear(P, P, bias=not self.batch_norm))
        self.detector = nn.Sequential(nn.AdaptiveAvgPool2d(CELLS), conv(C, 32), nn.ReLU(), conv(32, 1))
        s = cfg.stride
        self.decoder = nn.Sequential(conv(C, 32), nn.ReLU(), conv(32, s * s), nn.PixelShuffle(s))
        self.to(memory_format=torch.channels_last)

    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B, 1, T, 64, 64] in [0, 1] -> latents [B, T, C, h, w]."""
        B, _, T, H, W = frames.shape
        x = frames.transpose(1, 2).reshape(B * T, 1, H, W).contiguous(memory_format=torch.channels_last)
        return self.encoder(x).unflatten(0, (B, T))

    def state(self, z: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] -> states for `predict` [B, T, C + hidden_dim, h, w], with nothing handed on yet."""
        return F.pad(z, (0, 0, 0, 0, 0, self.hidden))

    def predict(self, before: Tensor, last: Tensor) -> Tensor:
        """Two successive states [N, C + hidden_dim, h, w] each -> the next, whose first C features are the latent."""
        y = self.predictor(torch.cat((before, last), 1))
        y = last + y if self.residual else y  # may leave the encoder's range, which is 0 and more (a ReLU)
        return y.to(last.dtype)

    def forecasts(self, z: Tensor, steps: int, context: str) -> list[Tensor]:
        """Latents of clips [B, T, C, h, w] -> for each k = 1..steps predictions [B, n, C, h, w] of the last n frames.

        pairs: k steps open-loop from every two successive true latents, n = T - 1 - k. rounds, as published: those of
        round k, n = T - 2; the last T - 1 - k are k steps ahead, frame t <= k is where it was in round t - 1."""
        B, _, C, _, _ = z.shape
        found, state = [], self.state(z)
        before, last = state[:, :-2], state[:, 1:-1]
        for k in range(1, steps + 1):
            y = self.predict(before.flatten(0, 1), last.flatten(0, 1)).unflatten(0, (B, -1))
            if context == "pairs":
                found.append(y[:, :, :C])
                before, last = last[:, :-1], y[:, :-1]
            else:
                state = torch.cat((state[:, : -y.shape[1]], y), 1)
                found.append(state[:, 2:, :C])
                settled = 0 if self.batch_norm and self.training else k  # its statistics are of all frames each round
                before, last = state[:, settled:-2], state[:, settled + 1 : -1]
        return found

    def rollout(self, context: Tensor, steps: int) -> Tensor:
        """Latents of n > 1 frames [B, n, C, h, w] -> of the `steps` frames after them [B, steps, C, h, w]: in rounds
        over all n, so that more context tells more."""
        B, n, C, _, _ = context.shape
        state, ahead = self.state(context), []
        before, last = state[:, :-1], state[:, 1:]
        for _ in range(steps):
            y = self.predict(before.flatten(0, 1), last.flatten(0, 1)).unflatten(0, (B, n - 1))
            ahead.append(y[:, -1, :C])
            before, last = torch.cat((last[:, :1], y[:, :-1]), 1), y
        return torch.stack(ahead, 1)

    def project(self, z: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] -> projections [B, T, h, w, P]."""
        rows = z.movedim(2, -1)
        return self.projector(rows.flatten(0, -2)).unflatten(0, rows.shape[:-1])

    def detect(self, z: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] -> probability of a digit's centre in each of 8 x 8 cells [B, T, 8, 8]."""
        return torch.sigmoid(wide(self.detector(z.flatten(0, 1)))).view(*z.shape[:2], CELLS, CELLS)

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] -> frames [B, T, 64, 64] in [0, 1]."""
        return torch.sigmoid(wide(self.decoder(z.flatten(0, 1)))).view(*z.shape[:2], SIZE, SIZE)


# --------------------------------------------------------------------------------------------------------- the loss
def gather(z: Tensor) -> Tensor:
    """Rows of all processes. Gradients are averaged over them, and each sees its own rows alone: hence times world."""
    if not dist.is_initialized():
        return z
    rows = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, z.detach().contiguous())
    world = len(rows)
    rows[dist.get_rank()] = world * z - (world - 1) * z.detach()
    return torch.cat(rows)


def share(n: int) -> slice:
    """This process's slice of range(n), n > 0, in the order of ranks; the first process's is never empty."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return slice(-(-n * rank // world), -(-n * (rank + 1) // world))


def joined(parts: list[Tensor], device: torch.device) -> Tensor:
    """The parts [n, ...] of all processes, one below the other in the order of ranks; without a gradient. Every process
    must call it; of things shared out by share(n), rows come back in their first order."""
    if dist.is_initialized():
        dist.all_gather_object(lists := [None] * dist.get_world_size(), [part.cpu() for part in parts])
        parts = [part.to(device) for of_one in lists for part in of_one]
    return torch.cat(parts)


def losses(model: Model, cfg: Config, batch: Clips, amp: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """-> total loss (0-d, to differentiate), the terms in the order of TERMS and latents [B T h w, C] (detached, less
    each place's mean)."""
    device = batch.frames.device
    x = batch.frames[:, None].to(next(model.parameters()).dtype) / 255
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        z = model.encode(x)  # [B, T, C, h, w]
        target = wide(model.project(z))
        ahead = model.forecasts(z, cfg.rollout, cfg.context)
        # one slice for all rounds, for the gradient of each slice fills a tensor of target's size
        later = {n: target[:, -n:] for n in {y.shape[1] for y in ahead}}
        errors = [F.mse_loss(wide(model.project(y)), later[y.shape[1]]) for y in ahead]
        seen = z.detach()
        found = model.detector(seen.flatten(0, 1))[:, 0]
        painted = model.decoder(seen[:, ::8].flatten(0, 1))[:, 0]  # a few frames: it is for pictures only
    prediction = torch.stack(errors).mean()
    spread = gather(target.flatten(0, 1))  # [B T, h, w, P]
    if cfg.centre_places:
        spread = spread - spread.mean(0)
    variance, covariance = variance_covariance_loss(spread.flatten(0, -2))
    # another loss: here, with its weight in Config, itself in TERMS, `total` and `terms`
    detection = F.binary_cross_entropy_with_logits(wide(found), batch.occupied.flatten(0, 1).to(target.dtype))
    decoding = F.binary_cross_entropy_with_logits(wide(painted), x[:, 0, ::8].flatten(0, 1))
    total = (
        cfg.prediction_weight * prediction + cfg.variance_weight * variance + cfg.covariance_weight * covariance
        + detection + decoding
    )  # fmt: skip
    terms = torch.stack((prediction, variance, covariance, detection, decoding)).detach()
    seen = seen - seen.mean((0, 1))  # a fixed code of places must not look like spread to the meter either
    return total, terms, seen.movedim(2, -1).flatten(0, -2)


@torch.no_grad()
def collapse_meter(z: Tensor) -> dict[str, float]:
    """How spread latents [N, D] are: effective rank (RankMe, Garrido et al. 2023, arXiv 2210.02885: exp of the entropy
    of the normalised singular values), smallest and mean feature std, mean |off-diagonal correlation|."""
    z = z[:: -(-len(z) // 2048) | 1].float()  # spread over the batch; an odd stride meets every place of a latent map
    z = z - z.mean(0)
    std = z.std(0)
    p = torch.linalg.svdvals(z)
    p = p / p.sum().clamp(min=1e-12)
    correlation = (z.T @ z) / (len(z) - 1) / (std[:, None] * std).clamp(min=1e-12)
    off = correlation.abs().sum() - correlation.diagonal().abs().sum()
    return dict(
        effective_rank=torch.exp(-(p * torch.log(p.clamp(min=1e-12))).sum()).item(),
        std_min=std.min().item(), std_mean=std.mean().item(),
        correlation=(off / (z.shape[1] * (z.shape[1] - 1))).item(),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------- optimisation
def learning_rate(cfg: Config, step: int, steps: int) -> float:
    """Constant, or linear warm-up over the first twentieth of a schedule of `steps`, then cosine to zero."""
    warmup = max(1, steps // 20)
    if cfg.schedule == "constant":
        return cfg.lr
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def memory(optimizer: torch.optim.Optimizer, p: Tensor, name: str) -> Tensor:
    """What the optimiser remembers of p under a name; zeros at first."""
    state = optimizer.state[p]
    if name not in state:
        state[name] = torch.zeros_like(p)
    return state[name]


class Muon(torch.optim.Optimizer):
    """Momentum whose steps on matrices are orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon); Adam
    on vectors, at a tenth of the rate. Groups: dict(params=..., matrix=..., weight_decay=...).

    torch.optim.Muon takes 2-D parameters only; here a convolution's weight counts as [its first axis, the rest]."""

    def __init__(self, groups: list[dict], lr: float, momentum: float = 0.9):
        super().__init__(groups, dict(lr=lr, momentum=momentum, weight_decay=0.0, steps=0))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads, mean = [p.grad for p in params], [memory(self, p, "mean") for p in params]
            group["steps"] += 1
            if group["matrix"]:
                torch._foreach_mul_(mean, group["momentum"])  # here a sum that fades
                torch._foreach_add_(mean, grads)
                steps = orthogonal(torch._foreach_add(grads, mean, alpha=group["momentum"]))  # Nesterov
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, steps, alpha=-group["lr"])
            else:
                square, (a, b), t = [memory(self, p, "square") for p in params], (0.9, 0.98), group["steps"]
                lr = 0.1 * group["lr"]
                torch._foreach_lerp_(mean, grads, 1 - a)
                torch._foreach_mul_(square, b)
                torch._foreach_addcmul_(square, grads, grads, 1 - b)
                size = torch._foreach_add(torch._foreach_sqrt(square), 1e-8)
                torch._foreach_addcdiv_(params, mean, size, -lr * math.sqrt(1 - b**t) / (1 - a**t))


def orthogonal(matrices: list[Tensor]) -> list[Tensor]:
    """The nearest semi-orthogonal matrix to each [n, ...] seen as [n, m], nearly: five Newton-Schulz steps, times
    sqrt(max(1, n / m)). Those of one shape are done together."""
    (a, b, c), alike, found = (3.4445, -4.7750, 2.0315), {}, list(matrices)
    for i, g in enumerate(matrices):
        alike.setdefault((len(g), g.numel() // len(g)), []).append(i)
    for (n, m), index in alike.items():
        x = torch.stack([matrices[i].reshape(n, m) for i in index])
        x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()  # the iteration forgives rounding
        x = x.mT if n > m else x
        for _ in range(5):
            y = x @ x.mT
            x = a * x + (b * y + c * y @ y) @ x
        x = (x.mT if n > m else x) * max(1, n / m) ** 0.5
        for i, step in zip(index, x):
            found[i] = step.to(matrices[i].dtype).view_as(matrices[i])
    return found


def make_optimizer(model: Model, cfg: Config) -> torch.optim.Optimizer:
    if cfg.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), cfg.lr, fused=True)
    split = {m: [p for p in model.parameters() if (p.ndim > 1) == m] for m in (True, False)}
    return Muon([dict(params=split[m], matrix=m, weight_decay=0.01 if m else 0.0) for m in (True, False)], cfg.lr)


def update(model: Model, cfg: Config, optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One step of the optimiser, gradients averaged over processes."""
    if dist.is_initialized():
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch._utils._flatten_dense_tensors(grads)
        dist.all_reduce(flat.div_(dist.get_world_size()))
        for g, new in zip(grads, torch._utils._unflatten_dense_tensors(flat, grads)):
            g.copy_(new)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# ------------------------------------------------------------------------------------------------------- evaluation
def average_precision(scores: Tensor, labels: Tensor) -> float:
    """Area under precision over recall of scores and boolean labels of one shape: sum over thresholds of
    (recall gained) x precision; equal scores count as one threshold."""
    scores, order = scores.flatten().cpu().sort(descending=True)
    hits = labels.flatten().cpu()[order].double().cumsum(0)
    last = torch.cat((scores[1:] != scores[:-1], scores.new_ones(1, dtype=torch.bool)))  # of its equals
    hits, taken = hits[last], last.nonzero()[:, 0] + 1
    gained = hits.diff(prepend=hits.new_zeros(1)) / hits[-1].clamp(min=1)
    return (gained * hits / taken).sum().item()


TRACKERS = {"ap_constant_velocity": False, "ap_bouncing_velocity": True}


def constant_velocity(centres: Tensor, ahead: int, bounce: bool = False) -> Tensor:
    """Score maps [B, T - 1 - ahead, 8, 8] of a tracker that knows the centres [B, T, 2, 2] of two frames and goes
    straight on for `ahead` frames, stopped at the borders or (bounce) reflected: minus the squared distance
    to the nearer digit."""
    a, b = centres[:, :-1], centres[:, 1:]
    cross = (a - b.flip(2)).norm(dim=3).sum(2) < (a - b).norm(dim=3).sum(2)  # components come in no order
    a = torch.where(cross[..., None, None], a.flip(2), a)
    there = (b + ahead * (b - a))[:, : a.shape[1] - ahead] - DIGIT / 2  # [B, n, 2, 2] upper left corners
    room = SIZE - DIGIT
    there = (fold(there, room) if bounce else there.clamp(0, room)) + DIGIT / 2
    cell = (torch.arange(CELLS, device=centres.device) + 0.5) * SIZE / CELLS
    x, y = ((cell - there[..., axis, None]).square() for axis in (0, 1))  # [B, n, 2, 8]
    return -(y[..., :, None] + x[..., None, :]).nan_to_num(torch.inf).amin(2)


@torch.no_grad()
def evaluate_horizons(model: Model, clips: Clips, horizons: int, batch: int = 50) -> dict:
    """AP_t, t = 0..horizons - 1, on (t + 1)-step predictions for all frames from t + 2 on: from two true frames ("ap"),
    and in rounds as published ("ap_rounds"); beside it what copying the last true latent, the trackers, and the true
    latents of these frames give. Processes share the clips."""
    device, names = clips.frames.device, ("ap", "ap_rounds", "ap_copy_last", *TRACKERS, "ap_true_frames")
    scores = {name: [[] for _ in range(horizons)] for name in names}
    starts = range(0, len(clips.frames), batch)
    for start in starts[share(len(starts))]:
        stop_if_asked()
        part = Clips(*(x[start : start + batch] for x in clips))
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(device)):
            z = model.encode(part.frames[:, None].float() / 255)
            true, T = model.detect(z), z.shape[1]
            pairs, rounds = (model.forecasts(z, horizons, context) for context in ("pairs", "rounds"))
            for t in range(horizons):
                scores["ap"][t].append(model.detect(pairs[t]))
                scores["ap_rounds"][t].append(model.detect(rounds[t][:, t:]))
                scores["ap_copy_last"][t].append(true[:, 1 : T - t - 1])
                for tracker, bounce in TRACKERS.items():
                    scores[tracker][t].append(constant_velocity(part.centres, t + 1, bounce))
                scores["ap_true_frames"][t].append(true[:, t + 2 :])
    of = lambda t, parts: round(average_precision(joined(parts, device), clips.occupied[:, t + 2 :]), 4)
    ap = {name: [of(t, parts) for t, parts in enumerate(by)] for name, by in scores.items()}
    mean = lambda name: round(sum(ap[name]) / horizons, 4)
    return dict(map=mean("ap"), map_rounds=mean("ap_rounds")) | ap


def evaluate(model: Model, cfg: Config, stream: ClipStream, run_dir: Path | None) -> dict:
    """AP on unseen clips, collapse meter of the six that are shown; figures, unless another process draws them (run_dir
    None). -> what it adds to the summary."""
    begin, device = time.perf_counter(), next(model.parameters()).device
    model.eval()
    clips = stream.unseen(cfg.validation_clips)
    result = evaluate_horizons(model, clips, 7)
    stop_if_asked()
    shown = Clips(*(x[:6] for x in clips))
    with torch.no_grad():
        z = model.encode(shown.frames[:, None].float() / 255)
        future = model.rollout(z[:, :2], FRAMES - 2)
        result |= collapse_meter((z - z.mean((0, 1))).movedim(2, -1).flatten(0, -2))
        y = torch.cat((z[:, :2], future), 1)
        painted, found = model.decode(y).cpu(), model.detect(y).cpu()
    if run_dir:
        draw_rollout(run_dir / "rollout.gif", shown, painted, found)
        draw_horizons(run_dir / "ap.png", result)
        draw_curves(run_dir)
    return result | dict(validation_clips=len(clips.frames), evaluation_seconds=round(time.perf_counter() - begin, 1))


# ---------------------------------------------------------------------------------------------------------- figures
def draw_horizons(path: Path, result: dict) -> None:
    """ap.png: average precision against the number of frames predicted, with its floors and its ceiling."""
    styles = dict(ap="-o", ap_rounds="-s", ap_bouncing_velocity="-x", ap_constant_velocity=":", ap_copy_last="-.")
    styles["ap_true_frames"] = "--"
    x = range(1, len(result["ap"]) + 1)
    names = dict(ap="from two true frames", ap_rounds="in rounds")
    label = lambda name: names.get(name, name.removeprefix("ap_").replace("_", " "))
    lines = [(label(name), x, result[name], style) for name, style in styles.items()]
    lines.append(("in rounds, published", (1, 7), (0.76, 0.40), "k*"))
    draw_lines(path, [("frames ahead", "average precision", "linear", lines)])


def draw_lines(path: Path, panels: list[tuple]) -> None:
    """Panels side by side, each (label of x, label of y, scale of y, [(label, x, y, style), ...])."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(panels), 3.4), layout="constrained")
    for axis, (xlabel, ylabel, scale, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for label, x, y, style in lines:
            axis.plot(x, y, style, label=label, lw=1.5)
        axis.set(xlabel=xlabel, ylabel=ylabel, yscale=scale)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)  # beside the lines
    figure.savefig(path, dpi=110)


def draw_curves(run_dir: Path) -> None:
    """curves.png: loss terms, collapse meter, effective rank against the step."""
    log = [r for r in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines()) if "loss" in r]
    x, step = [r["step"] for r in log], "optimiser step"
    lines = lambda *names: [(name, x, [r[name] for r in log], "-") for name in names if max(r[name] for r in log) > 0]
    panels = [(step, "loss term", "log", lines(*TERMS)), (step, "collapse meter", "linear", lines(*METER))]
    draw_lines(run_dir / "curves.png", [*panels, (step, "effective rank", "linear", lines("effective_rank"))])


def draw_rollout(path: Path, clips: Clips, painted: Tensor, found: Tensor, scale: int = 3) -> None:
    """GIF of clips: above the truth with the true centres, below the painted prediction from the first two frames with
    detections over 0.5 (size by probability)."""
    from PIL import Image, ImageDraw

    N, T, side, pictures = len(clips.frames), painted.shape[1], SIZE * scale, []
    for t in range(T):
        sheet = Image.new("RGB", (N * side, 2 * side), "white")
        pen = ImageDraw.Draw(sheet)
        for n in range(N):
            for row, frame in enumerate((clips.frames[n, t].cpu(), (255 * painted[n, t]).to(torch.uint8))):
                picture = Image.fromarray(255 - frame.numpy()).resize((side, side), Image.NEAREST)
                sheet.paste(picture, (n * side, row * side))
            for x, y in clips.centres[n, t].cpu().nan_to_num(-9).mul(scale).tolist():
                pen.ellipse((n * side + x - 4, y - 4, n * side + x + 4, y + 4), outline=(230, 159, 0), width=2)
            for row, column in (found[n, t] > 0.5).nonzero().tolist():
                x, y = n * side + (column + 0.5) * side / CELLS, side + (row + 0.5) * side / CELLS
                r = 2 + 4 * found[n, t, row, column].item()
                pen.ellipse((x - r, y - r, x + r, y + r), fill=(213, 94, 0))
            pen.text((n * side + 3, 1), "truth", fill="grey")
            pen.text((n * side + 3, side + 1), f"{t - 1} ahead" if t > 1 else "context", fill="grey")
        pictures.append(sheet.quantize(64))
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=[300] * (T - 1) + [1200], loop=0)


# ------------------------------------------------------------------------------------------- checkpoint and logging
FORMAT = f"nanojepa/{SCRIPT}/1"
ADVICE = "the last checkpoint, if any, is kept; try a smaller --lr"
asked_to_stop: list[int] = []  # signals received


class Interrupted(Exception):
    """SIGINT or SIGTERM arrived; what had to be saved is saved."""


def note_signal(number: int, _) -> None:
    """Obeyed at the next safe place; the second one ends the process at once."""
    asked_to_stop.append(number)
    signal.signal(number, signal.SIG_DFL)


def progress(things, what: str):
    """The things, with a progress bar on the first process, where somebody is looking."""
    return tqdm(things, desc=what, leave=False, disable=int(os.environ.get("RANK", 0)) > 0 or not sys.stderr.isatty())


def stop_if_asked() -> None:
    if asked_to_stop:
        raise Interrupted("stopped; what was trained is in the checkpoint: go on with --resume")


def stop_wanted(device: torch.device, ask: bool) -> bool:
    """Whether to stop, the same on every process: they ask each other only when `ask`, for it makes them wait."""
    if not dist.is_initialized():
        return bool(asked_to_stop)
    if not ask:
        return False
    flag = torch.tensor([float(bool(asked_to_stop))], device=device)
    dist.all_reduce(flag)
    return bool(flag.item())


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@functools.cache
def use_bf16(device: torch.device) -> bool:
    """bf16 autocast where the hardware has it: CUDA from sm_80, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def start_device(cfg: Config) -> tuple[torch.device, int, int]:
    """Device, rank and world size; joins the process group when started by torchrun."""
    kind = cfg.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available() or kind == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {kind}: PyTorch sees no such device here; use --device auto or cpu")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        hours = datetime.timedelta(hours=2)  # that the others wait while one works alone
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=hours)
    rank = dist.get_rank() if world > 1 else 0
    if cfg.batch_size % world:
        raise UserError(f"--batch-size {cfg.batch_size} does not divide over {world} processes")
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    use_triton(None if cfg.kernels else False)
    return device, rank, world


def run_folder(cfg: Config) -> Path:
    """cfg.run_dir, or the first free runs/<script>/<preset>-<n>; with resume or overwrite the last one taken."""
    if cfg.run_dir:
        return Path(cfg.run_dir)
    numbered = lambda n: Path("runs") / SCRIPT / f"{cfg.preset}-{n}"
    n = next(n for n in range(1, 10**6) if not numbered(n).exists())
    return numbered(max(1, n - 1) if cfg.resume or cfg.overwrite else n)


def open_run_dir(cfg: Config) -> Path:
    """The run folder: fresh, emptied on --overwrite, or as it was on --resume. The first process does it for all."""
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.broadcast_object_list(told := [None])
        return told[0]
    path = run_folder(cfg)
    if path.exists() and not path.is_dir():
        raise UserError(f"--run-dir {path} is a file")
    config = path / "config.json"
    used = config.exists() and FORMAT in config.read_text(errors="replace")
    if cfg.resume and not used:
        raise UserError(f"--resume: there is no run in {path}")
    if not cfg.resume and path.exists() and any(path.iterdir()):
        if not used:
            raise UserError(f"--run-dir {path} holds other things than a run; choose another")
        if not cfg.overwrite:
            raise UserError(f"{path} holds a run: add --resume to go on, --overwrite to empty it, or choose --run-dir")
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    if dist.is_initialized():
        dist.broadcast_object_list([path])
    return path


def write_atomically(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Under a temporary name first, flushed to disk, then renamed: nobody ever sees half a file. The old file stays
    as `previous`, if given."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(run_dir: Path, cfg: Config, model, optimizer, step: int, train_seconds: float) -> None:
    """checkpoint.pt, the one before it kept as previous.pt. Data and schedule are functions of (seed, step)."""
    state = dict(format=FORMAT, config=dataclasses.asdict(cfg), step=step, train_seconds=train_seconds)
    state |= dict(model=model.state_dict(), optimizer=optimizer.state_dict(), rng=torch.get_rng_state())
    torch.save(state, buffer := io.BytesIO())
    write_atomically(run_dir / "checkpoint.pt", buffer.getvalue(), run_dir / "previous.pt")


def load_checkpoint(path: Path, map_location="cpu") -> dict:
    """The content of a checkpoint. Raises UserError, offering the previous one, if it is damaged or foreign."""
    previous = path.with_name("previous.pt")
    offer = f"; the one before it is kept: mv {previous} {path}" if previous.exists() else ""
    read = lambda file: torch.load(file, map_location=map_location, weights_only=True)
    try:
        try:
            state = read(path)
        except FileNotFoundError:  # stopped, or looked at, between the two renames of write_atomically
            state = read(previous)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except Exception as error:  # torch.load raises half a dozen kinds for a damaged file
        raise UserError(f"{path} is damaged or no checkpoint ({type(error).__name__}){offer}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format", "no format mark") if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path} is not a checkpoint of this script ({found}, wanted {FORMAT}){offer}")
    return state


@contextlib.contextmanager
def fitting(path: Path):
    """For putting back what a file of a run holds: what goes wrong inside is the file's fault."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # not JSON, fields that have come or gone, values of other types or shapes
        raise UserError(f"{path} does not fit this script ({type(error).__name__}: {one_line(error)})") from None


def from_saved(config: dict) -> Config:
    return check(Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}))


def resumed(cfg: Config) -> Config:
    """What the run in cfg's folder was started with, so that --resume needs no other flag."""
    folder = run_folder(cfg)
    if not (config := folder / "config.json").is_file():
        raise UserError(f"--resume: there is no run in {folder}")
    with fitting(config):
        saved = from_saved(json.loads(config.read_text())["config"])
    return dataclasses.replace(saved, run_dir=str(folder), resume=True, overwrite=False, max_steps=0)


def restore(path: Path, cfg: Config, model, optimizer, device) -> tuple[int, float]:
    """Put a checkpoint back; the command line must agree with it in what shapes training. -> step, seconds so far."""
    state = load_checkpoint(path, device)
    with fitting(path):
        saved = from_saved(state["config"])
        for field in dataclasses.fields(Config):
            was, now = getattr(saved, field.name), getattr(cfg, field.name)
            if was != now and field.name not in MAY_CHANGE_ON_RESUME:
                raise UserError(f"--resume: the run has {field.name} {was}, the command line {now}; use the same flags")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"].cpu())
        return int(state["step"]), float(state["train_seconds"])


def load(path: str | Path, device: str = "cpu") -> Model:
    """The model of a checkpoint (file or run folder), in eval mode: `z = load("runs/video_jepa/cpu-1").encode(x)`, then
    `model.rollout(z[:, :2], 8)` and `model.detect(z)`. Raises UserError for a bad checkpoint."""
    path = Path(path)
    state = load_checkpoint(path / "checkpoint.pt" if path.is_dir() else path, device)
    with fitting(path):
        model = Model(from_saved(state["config"]))
        model.load_state_dict(state["model"])
    return model.to(device).eval().requires_grad_(False)


def check(cfg: Config) -> Config:
    """Raises UserError for values that cannot work."""
    flag = lambda name: "--" + name.replace("_", "-")
    for field in dataclasses.fields(cfg):
        choices = get_args(field.type) if get_origin(field.type) is Literal else ()
        if choices and (value := getattr(cfg, field.name)) not in choices:
            raise UserError(f"{flag(field.name)} {value} is none of {', '.join(map(str, choices))}")
    for name, value in dataclasses.asdict(cfg).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{flag(name)} must be a finite number, got {value}")
        if isinstance(value, (int, float)) and value < 0:
            raise UserError(f"{flag(name)} must not be negative, got {value}")
    positive = """latent_dim encoder_width predictor_width levels projector_width rollout epochs lr clips_per_epoch
        batch_size validation_clips log_every checkpoint_every"""
    for name in positive.split():
        if not getattr(cfg, name) > 0:
            raise UserError(f"{flag(name)} must be greater than 0, got {getattr(cfg, name)}")
    side = SIZE // cfg.stride
    rules = [
        (cfg.projector_width > 1, "--projector-width must be at least 2"),
        (cfg.latent_dim > 1, "--latent-dim must be at least 2"),
        (cfg.frames >= 4, f"--frames {cfg.frames}: two of context and at least two to predict"),
        (cfg.rollout <= cfg.frames - 2, f"--rollout {cfg.rollout} does not fit in --frames {cfg.frames}, less two"),
        (cfg.data != "moving-mnist" or cfg.frames <= FRAMES, f"--data moving-mnist has clips of {FRAMES} frames"),
        (side % 2 ** (cfg.levels - 1) == 0, f"--levels {cfg.levels} is too many for latents of {side} x {side}"),
        (cfg.batch_size <= cfg.clips_per_epoch, f"--batch-size {cfg.batch_size} is larger than --clips-per-epoch"),
        (not (cfg.resume and cfg.overwrite), "--resume and --overwrite exclude each other"),
    ]  # fmt: skip
    for fine, message in rules:
        if not fine:
            raise UserError(message)
    return cfg


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return f"{name.group(1) if name else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def peak_memory(device: torch.device) -> float:
    """GiB: the most that tensors took on a GPU, elsewhere the most that the process took."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    try:
        import resource
    except ModuleNotFoundError:  # on Windows
        return 0.0
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20), 2)


def write_config(run_dir: Path, cfg: Config, device: torch.device) -> None:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    facts = dict(format=FORMAT, config=dataclasses.asdict(cfg), device=describe(device), commit=commit)
    facts["versions"] = dict(python=platform.python_version(), torch=torch.__version__)
    write_atomically(run_dir / "config.json", json.dumps(facts, indent=1).encode())


def trim_metrics(path: Path, step: int) -> None:
    """Forget what was logged after the checkpoint that the run goes on from."""
    lines = path.read_text().splitlines() if path.exists() else []
    sound = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    write_atomically(path, "".join(line + "\n" for line in sound).encode())


# --------------------------------------------------------------------------------------------------------- training
def compiled(cfg: Config, model: Model, batch: Clips, amp: bool):
    """The loss function to call, compiled if wanted and possible, warmed up on a batch that leaves no trace."""
    begin, state = time.perf_counter(), {k: v.clone() for k, v in model.state_dict().items()}
    whole = not dist.is_initialized()  # collectives break the graph
    for wanted in (True, False) if cfg.compile else (False,):
        try:
            function = torch.compile(losses, fullgraph=whole, dynamic=False) if wanted else losses
            function(model, cfg, batch, amp)[0].backward()
            break
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
            if not wanted or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
            tqdm.write(f"compiling failed, going on eagerly: {reason}")
    model.load_state_dict(state)  # BatchNorm, where there is one, has counted the warm-up
    model.zero_grad(set_to_none=True)
    return function, time.perf_counter() - begin


def fit(
    cfg: Config, model: Model, optimizer, batches, steps: int, start: int, seconds: float, run_dir: Path, say
) -> tuple[float, float]:
    """Train from step `start` to the end of a schedule of `steps`, or cfg.max_steps. -> seconds, those of warm-up.

    Each pass of the loop first looks after the steps before it (checks, log, checkpoint, a wish to stop), then takes
    one more; the last pass takes none. `seconds` leaves out log and checkpoint. `say` prints on the first process."""
    main = not dist.is_initialized() or dist.get_rank() == 0
    device = next(model.parameters()).device
    amp, end = use_bf16(device), min(steps, cfg.max_steps or steps)
    if start > end:
        raise UserError(f"--max-steps {cfg.max_steps} lies before step {start} of the checkpoint")
    compute, warmup_seconds = compiled(cfg, model, batches(start), amp)
    say(f"compile and warm-up {warmup_seconds:.1f} s (in no figure below)")
    # bad: the newest terms, until one is not finite: then it and bad_step stay. On the device: nothing waits for it
    bad = torch.full((1 + len(TERMS),), torch.nan, device=device)
    bad_step = torch.full((), -1, dtype=torch.long, device=device)
    synchronize(device)
    clock, logged, terms = time.perf_counter(), start, None
    bar = tqdm(total=end, initial=start, desc="training", leave=False, disable=not main or not sys.stderr.isatty())
    for step in range(start, end + 1):
        last, stop = step == end, stop_wanted(device, step % cfg.log_every == 0)
        if stop and terms is None:
            raise Interrupted(f"stopped at step {step}, before anything was learnt that is not saved")
        if terms is not None and (last or stop or step % cfg.log_every == 0 or step % cfg.checkpoint_every == 0):
            if dist.is_initialized():
                dist.all_reduce(terms.div_(dist.get_world_size()))
            values = terms.tolist()  # waits for the device
            seconds += (took := time.perf_counter() - clock)
            if (at := bad_step.item()) >= 0:
                names = [n for n, v in zip(TERMS, bad.tolist()) if not math.isfinite(v)] or ["the sum"]
                raise UserError(f"NaN or Inf at step {at} in {', '.join(names)}; {ADVICE}")
            if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():  # loss fine, gradient not
                raise UserError(f"NaN or Inf in the weights at step {step}; {ADVICE}")
            if main and (last or step % cfg.log_every == 0):
                log_step(run_dir, cfg, step, steps, end, values, latents, took / max(1, step - logged), say)
            if main and (last or stop or step % cfg.checkpoint_every == 0):
                save_checkpoint(run_dir, cfg, model, optimizer, step, seconds)
            logged = step
            synchronize(device)
            clock = time.perf_counter()
        if last or stop:
            break
        total, terms, latents = compute(model, cfg, batches(step), amp)
        total.backward()
        terms = torch.cat((terms, total.detach()[None]))
        bad = torch.where(bad_step < 0, terms, bad)
        bad_step = torch.where((bad_step < 0) & ~terms.isfinite().all(), step, bad_step)
        update(model, cfg, optimizer, learning_rate(cfg, step, steps))
        bar.update()
    bar.close()
    if stop and not last:
        raise Interrupted(f"stopped at step {step}; checkpoint saved; go on with --resume --run-dir {run_dir}")
    return seconds, warmup_seconds


def log_step(
    run_dir: Path, cfg: Config, step: int, steps: int, end: int, values: list, latents: Tensor, seconds: float, say
) -> None:
    """One line for people, one object in metrics.jsonl, and a warning when the latents collapse."""
    meter, terms = collapse_meter(latents), dict(zip((*TERMS, "loss"), values))
    rate, lr = cfg.batch_size / max(seconds, 1e-9), learning_rate(cfg, step - 1, steps)
    parts = " ".join(f"{n[:4]} {v:.3f}" for n, v in terms.items() if n != "loss")
    say(
        f"step {step:05d}/{steps} | loss {terms['loss']:.4f} | {parts} | lr {lr:.1e} | {1e3 * seconds:.0f} ms"
        f" | {rate:.0f} clips/s | rank {meter['effective_rank']:.1f}/{latents.shape[1]}"
        f" | eta {(end - step) * seconds / 60:.1f}m"
    )
    if meter["std_mean"] < 0.05 or meter["effective_rank"] < max(1.5, 0.1 * latents.shape[1]):
        found = f"mean std {meter['std_mean']:.3f}, rank {meter['effective_rank']:.1f}"
        say(f"  collapsing: {found}: raise --variance-weight")
    elif meter["correlation"] > 0.7:
        say(f"  collapsing: mean |correlation| {meter['correlation']:.2f}: raise --covariance-weight")
    record = dict(step=step, lr=lr, milliseconds=1e3 * seconds, clips_per_second=rate, **terms, **meter)
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")


def finish(run_dir: Path, summary: dict, device: torch.device, say) -> None:
    """summary.json, the evaluation's line in metrics.jsonl, and where the figures are."""
    summary["peak_memory_gib"] = peak_memory(device)
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(json.dumps(dict(step=summary["steps"], evaluation=summary)) + "\n")
    write_atomically(run_dir / "summary.json", json.dumps(summary, indent=1).encode())
    say(f"{run_dir}: " + ", ".join(sorted(p.name for p in run_dir.iterdir() if p.suffix in (".json", ".png", ".gif"))))


def train(cfg: Config) -> dict:
    """Train, evaluate, draw. -> the summary, also in summary.json. Raises UserError for what a person can mend."""
    check(cfg)
    device, rank, world = start_device(cfg)
    say = tqdm.write if rank == 0 else lambda line: None
    clips = ClipStream(cfg, device, rank, world)
    torch.manual_seed(cfg.seed)
    model = Model(cfg).to(device)
    optimizer = make_optimizer(model, cfg)
    run_dir = open_run_dir(cfg)
    start, seconds = restore(run_dir / "checkpoint.pt", cfg, model, optimizer, device) if cfg.resume else (0, 0.0)
    if rank == 0:
        write_config(run_dir, cfg, device)
        trim_metrics(run_dir / "metrics.jsonl", start)
    parameters = sum(p.numel() for part in (model.encoder, model.predictor) for p in part.parameters())
    amp = "bf16 autocast" if use_bf16(device) else "float32: no bf16 here"
    say(f"{cfg.preset} | {describe(device)} | {amp} | encoder and predictor of {parameters:,} parameters | {run_dir}")
    steps = max(1, round(cfg.epochs * cfg.clips_per_epoch / cfg.batch_size))
    seconds, warmup_seconds = fit(cfg, model, optimizer, clips, steps, start, seconds, run_dir, say)
    done = min(steps, cfg.max_steps or steps)
    summary = dict(
        preset=cfg.preset, seed=cfg.seed, data=cfg.data, steps=done, parameters=parameters, device=describe(device),
        torch=torch.__version__, train_seconds=round(seconds, 1), warmup_seconds=round(warmup_seconds, 1),
        clips_per_second=round(done * cfg.batch_size / max(seconds, 1e-9), 1),
    )  # fmt: skip
    if cfg.evaluate:
        summary |= evaluate(model, cfg, clips, run_dir if rank == 0 else None)
    if rank == 0:
        finish(run_dir, summary, device, say)
    return summary


def report(summary: dict) -> str:
    """The final figures beside the published ones; of long lists the first, the middle and the last."""
    some = lambda v: v if not isinstance(v, list) or len(v) < 9 else [v[0], "..", v[len(v) // 2], "..", v[-1]]
    text = lambda v: " ".join(map(text, v)) if isinstance(v, list) else f"{v:.4g}" if isinstance(v, float) else str(v)
    rows = [("", "here", "published"), *((k, text(some(v)), PUBLISHED.get(k, "")) for k, v in summary.items())]
    return "\n".join(f"{name:<30}{here:<54}{published}".rstrip() for name, here, published in rows)


def parse(argv: list[str]) -> Config:
    """Command line -> Config: the preset's values, then the flags. Raises UserError with the parser's complaint."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    here = "gpu" if torch.cuda.is_available() else "cpu"
    first.add_argument("--preset", nargs="?", default=here, const=here)  # a missing value is for tyro to complain of
    first.add_argument("--run-dir", "--run_dir", nargs="?", default="", const="")
    complaint, resume = io.StringIO(), "--resume" in argv and "--overwrite" not in argv
    try:
        with contextlib.redirect_stderr(complaint):
            known = vars(first.parse_known_args(argv)[0])
            default = preset(known.pop("preset"), **known, resume=resume)
            return tyro.cli(Config, args=argv, default=resumed(default) if resume else default)
    except SystemExit as ended:
        if not ended.code:
            raise
        lines = [line.strip("│ ") for line in complaint.getvalue().splitlines()[1:]]
        until = next((n for n, line in enumerate(lines) if set(line) <= set("─╰╯")), len(lines))
        raise UserError(" ".join(lines[:until]) + " (see --help)") from None


def main() -> None:
    code, message = 0, ""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note_signal)
    try:
        summary = train(parse(sys.argv[1:]))
        if int(os.environ.get("RANK", 0)) == 0:
            print(report(summary) + "\n" + json.dumps(summary))
    except UserError as error:
        code, message = 2, f"error: {error}"
    except torch.OutOfMemoryError as error:
        code, message = 2, f"error: {str(error).splitlines()[0]}; choose a smaller --batch-size"
    except RuntimeError as error:  # DistError is one
        if not (dist.is_initialized() and re.search("gloo|NCCL|[Cc]onnection", str(error))):
            raise
        code, message = 1, f"error: another process of this run has ended ({str(error)[-60:]}); go on with --resume"
        if asked_to_stop:  # so were the others, and one was faster
            code, message = 128 + asked_to_stop[0], "stopped with the other processes; go on with --resume"
    except BrokenPipeError:  # as with --help | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it ends
        code, message = 1, "stopped: nobody reads the output any more"
    except OSError as error:
        what = f"{error.filename or 'writing'}: {error.strerror}"
        code, message = 2, f"error: {what}; free space or choose another --run-dir"
    except Interrupted as error:
        code, message = 128 + (asked_to_stop or [signal.SIGTERM])[0], str(error)
    if code:
        print(message, file=sys.stderr)
        sys.exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
