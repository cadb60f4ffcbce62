"""Video JEPA: predict the latents of future frames, without reconstructing pixels.

    z_t   = encode(frame_t)                               latent map of each frame of a clip, t = 0..9
    s_t^0 = (z_t, 0)                                      state: the latent, and a hidden state that starts at zero
    s_t^k = predict(s_{t-2}^{k-1}, s_{t-1}^{k-1})         round k of the parallel rollout: all frames t > 1 at once
    loss  = mean_k |project(s^k) - project(z)|^2          no stop-gradient and no moving average: two terms on the
            + 10 variance + 100 covariance                projected latents keep them from collapsing (kernels/)

The first two states stay the true ones, so in round k a prediction lies k frames ahead of the newest true frame that it
draws on. Two heads read detached latents and teach the encoder nothing: a detector says in which of 8 x 8 cells the
centres of digits lie, a decoder shows the frame. The measure is the detector's average precision (AP) on latents that
are predicted k = 1..7 frames ahead, and the mean of the seven (mAP).

    python video_jepa.py                                       # moving digits of MNIST; needs its files or a download
    python video_jepa.py --data digits                         # moving digits of scikit-learn: needs no files
    python video_jepa.py --preset paper --data moving-mnist    # the published recipe (arXiv 2602.03604) and data
    torchrun --nproc_per_node=2 video_jepa.py                  # several GPUs

RESULT
"""

import argparse
import dataclasses
import io
import json
import math
import os
import platform
import signal
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch.distributed.nn.functional import all_gather  # with a gradient
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3
from tqdm import tqdm

from kernels import use_triton, variance_covariance_loss

SCRIPT = "video_jepa"
FORMAT = "nanojepa/video_jepa/2"  # of a checkpoint
SIZE, DIGIT = 64, 28  # side of a frame and of a digit, px
CELLS = 8  # of the detection map, along each axis
HORIZONS = range(1, 8)  # k, frames ahead, at which predictions are measured
TERMS = ("prediction", "variance", "covariance", "detection", "decoding")


class UserError(ValueError):
    """A mistake in settings, data or files that the user can mend: shown as one line, without a traceback."""


# ---------------------------------------------------------------------------------------------------- configuration
@dataclass
class Config:
    """Learn to predict the latents of future frames. The defaults are preset paper, the published recipe."""

    preset: Literal["gpu", "paper", "cpu", "smoke"] = "paper"  # set of defaults; every other flag overrides it
    seed: int = 0  # of weights and of the order of clips
    run_dir: str = ""  # folder of this run; empty: runs/video_jepa/<preset>-<date>-<time>
    resume: bool = False  # go on with the run in run_dir; if that is empty, with the newest of the preset
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    compile: bool = True  # torch.compile the loss
    kernels: bool = True  # fused Triton losses on NVIDIA GPUs; off: plain PyTorch
    # data
    data: Literal["mnist", "digits", "moving-mnist"] = "mnist"  # moving digits of MNIST or scikit-learn; published file
    data_dir: str = "data"  # where downloaded files lie, in torchvision's layout
    sequences: int = 10000  # of 20 frames, nine tenths of them to train; the published file has its own number
    frames: int = 10  # of a training clip: sequences are cut into clips; those to validate on have 10
    # model
    stride: Literal[1, 2, 4, 8] = 1  # pixels of a frame per position of a latent map, along each axis
    latent_dim: int = 16  # channels of a latent map
    encoder_width: int = 32  # channels of the encoder's first stage
    predictor_width: int = 32  # channels of the U-Net's finest level; they double at each coarser one
    levels: int = 4  # of the U-Net
    pool: bool = False  # between levels: max-pooling; off: convolutions of stride 2
    norm: Literal["batch", "layer"] = "batch"  # layer: over the channels of each position
    residual: bool = False  # predict the change of the state
    hidden_dim: int = 0  # channels of the hidden state that a prediction passes on to the next
    projector_width: int = 64  # hidden and output features of the projector
    # loss
    rounds: int = 4  # of the parallel rollout in training (K)
    prediction_weight: float = 1.0  # mean squared error of projected predictions
    variance_weight: float = 10.0  # hinge loss on the standard deviation of each projected feature
    covariance_weight: float = 100.0  # squared off-diagonal covariances of projected features
    centre_positions: bool = False  # for these two, subtract each position's mean over clips and frames first
    # optimisation
    epochs: float = 50.0  # passes over the training clips
    max_steps: int = 0  # stop after this many steps of the schedule; 0 = off
    batch_size: int = 64  # clips a step, over all processes
    optimizer: Literal["adam", "muon"] = "adam"  # muon: for matrices, with Adam at a tenth of its rate for vectors
    lr: float = 1e-3  # peak learning rate
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: linear warm-up over the first twentieth, then to 0
    # evaluation and logging
    validation_clips: int = 2000  # to measure on, at most; 0 = no evaluation
    log_every: int = 50  # steps between log lines
    save_every: float = 60.0  # seconds between checkpoints, at log lines

    def __post_init__(self):
        side = SIZE // self.stride
        if min(self.batch_size, self.rounds, self.levels, self.log_every) < 1 or self.sequences < 10:
            raise UserError(
                "--batch-size, --rounds, --levels and --log-every must be 1 or more, --sequences 10 or more"
            )
        if self.lr <= 0 or self.epochs <= 0:
            raise UserError(f"--lr and --epochs must be positive, got {self.lr} and {self.epochs}")
        if not self.rounds + 2 <= self.frames <= 20:
            raise UserError(f"--frames must be from {self.rounds + 2} (--rounds + 2) to 20, got {self.frames}")
        if side % 2 ** (self.levels - 1):
            raise UserError(f"--levels {self.levels} is too many for latent maps of {side} x {side}")


FAST = dict(  # what differs from the paper in all the other presets
    pool=True,
    norm="layer",
    levels=2,
    residual=True,
    centre_positions=True,
    optimizer="muon",
    lr=0.02,
    schedule="cosine",
)
CPU = dict(FAST, stride=8, encoder_width=16, predictor_width=64, hidden_dim=32, frames=8, rounds=6)
PRESETS: dict[str, dict] = {
    "gpu": dict(FAST, stride=8, predictor_width=128, hidden_dim=64, rounds=6, epochs=20),  # not tuned yet
    "paper": {},
    "cpu": dict(CPU, epochs=1.5, batch_size=16, compile=False),  # ten minutes on two cores
    "smoke": dict(CPU, data="digits", sequences=400, rounds=4, epochs=1, batch_size=8, compile=False),  # a minute
}
MAY_CHANGE_ON_RESUME = {"run_dir", "resume", "device", "compile", "kernels", "data_dir", "max_steps"}
MAY_CHANGE_ON_RESUME |= {"validation_clips", "log_every", "save_every"}


def preset(name: str, **overrides) -> Config:
    """The configuration of a preset, with some fields replaced: `preset("cpu", seed=1)`."""
    return Config(**{"preset": name, **PRESETS[name], **overrides})


# ------------------------------------------------------------------------------------------------------------- data
class Clips(NamedTuple):
    frames: Tensor  # [N, T, 64, 64] uint8
    labels: Tensor  # [N, T, 8, 8] bool: the centre of a digit lies in the cell


def read_files(dataset, files: list[Path], read) -> list:
    """The content of a torchvision data set's files, downloaded if one is missing."""
    try:
        if not all(file.exists() for file in files):
            dataset(download=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{files[0].parent} lacks {files[0].name} and downloading failed: {error}") from None
    contents = []
    for file in files:
        try:
            contents.append(read(file))
        except (OSError, RuntimeError, ValueError, AssertionError, EOFError) as error:
            raise UserError(f"{file} is damaged ({error}): delete it, and it is downloaded again") from None
    return contents


def load_sequences(cfg: Config) -> tuple[np.ndarray, np.ndarray]:
    """Sequences [N, 20, 64, 64] uint8 to train and to validate on.

    The published file is split as published, so digits may occur in both parts; digits that are moved here do not."""
    import torchvision
    from sklearn.datasets import load_digits

    if cfg.data == "moving-mnist":
        path = Path(cfg.data_dir, "MovingMNIST", "mnist_test_seq.npy")
        dataset = lambda **options: torchvision.datasets.MovingMNIST(cfg.data_dir, split=None, **options)
        (data,) = read_files(dataset, [path], np.load)
        shape = getattr(data, "shape", ())
        if getattr(data, "dtype", None) != np.uint8 or len(shape) != 4 or shape[::2] != (20, 64) or shape[3] != 64:
            raise UserError(f"{path} must be an uint8 array [20, N, 64, 64], got {data.dtype} {list(shape)}")
        order = np.random.RandomState(2025).permutation(shape[1])
        split = len(order) * 9 // 10
        return tuple(data[:, index].swapaxes(0, 1) for index in (order[:split], order[split:]))
    if cfg.data == "mnist":
        folder = Path(cfg.data_dir, "MNIST", "raw")
        files = [folder / f"{part}-images-idx3-ubyte" for part in ("train", "t10k")]
        dataset = lambda **options: torchvision.datasets.MNIST(cfg.data_dir, **options)
        train, validation = (x.numpy() for x in read_files(dataset, files, torchvision.datasets.mnist.read_image_file))
    else:
        digits = load_digits().images.repeat(3, 1).repeat(3, 2)  # [1797, 8, 8] from 0 to 16 -> [1797, 24, 24]
        digits = np.pad(255 / 16 * digits, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
        train, validation = digits[:1500], digits[1500:]
    n = cfg.sequences // 10
    return move_digits(train, cfg.sequences - n, seed=0), move_digits(validation, n, seed=1)


def move_digits(digits: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n sequences [n, 20, 64, 64] of two random digits [D, 28, 28] each, which go straight on at 3.6 px a frame.

    The law of Moving MNIST (Srivastava et al. 2015, arXiv 1502.04681): a digit that hits a border rests there for this
    frame and goes back in the next; positions are truncated to whole px; where digits overlap the brighter pixel shows."""
    rng = np.random.default_rng(seed)
    chosen = digits[rng.integers(len(digits), size=(n, 2))]
    position = rng.random((n, 2, 2))  # (x, y) of each digit's corner; the room of 36 px counts as 1
    angle = rng.uniform(0, 2 * math.pi, (n, 2))
    velocity = 0.1 * np.stack((np.cos(angle), np.sin(angle)), 2)
    sequences = np.zeros((n, 20, SIZE, SIZE), np.uint8)
    for t in range(20):
        position += velocity
        velocity[(position <= 0) | (position >= 1)] *= -1
        position = position.clip(0, 1)
        corner = (position * (SIZE - DIGIT)).astype(int)
        for i, d in np.ndindex(n, 2):
            x, y = corner[i, d]
            window = sequences[i, t, y : y + DIGIT, x : x + DIGIT]
            np.maximum(window, chosen[i, d], out=window)
    return sequences


def detection_labels(frames: np.ndarray) -> np.ndarray:
    """Frames [N, H, W] uint8 -> cells [N, 8, 8] bool that hold the centre of a digit, as published.

    A digit is a connected piece (corners connect) of the pixels above the middle between a frame's darkest and brightest
    one; a piece in a hole of another counts as part of it; the centre is that of its bounding box."""
    from scipy import ndimage

    within_frame = np.zeros((3, 3, 3), bool)
    within_frame[1] = True  # neighbours of a pixel: all eight of its frame
    cross = ndimage.generate_binary_structure(3, 1) & within_frame
    darkest, brightest = (f(axis=(1, 2), keepdims=True).astype(float) for f in (frames.min, frames.max))
    pieces, _ = ndimage.label(
        ndimage.binary_fill_holes(frames > (darkest + brightest) / 2, structure=cross), structure=within_frame
    )
    labels = np.zeros((len(frames), CELLS, CELLS), bool)
    cell_height, cell_width = frames.shape[1] / CELLS, frames.shape[2] / CELLS
    for n, rows, columns in ndimage.find_objects(pieces):
        y, x = (rows.start + rows.stop) / 2, (columns.start + columns.stop) / 2
        labels[n.start, int(y / cell_height), int(x / cell_width)] = True
    return labels


def make_clips(sequences: np.ndarray, length: int) -> Clips:
    """Sequences [N, 20, 64, 64] cut into clips of `length` frames, with their labels."""
    count = sequences.shape[1] // length
    frames = np.ascontiguousarray(sequences[:, : count * length]).reshape(-1, length, SIZE, SIZE)
    chunks = np.array_split(frames, max(1, len(frames) // 100))
    labels = [detection_labels(chunk.reshape(-1, SIZE, SIZE)) for chunk in tqdm(chunks, "labels", leave=False)]
    labels = np.concatenate(labels).reshape(-1, length, CELLS, CELLS)
    return Clips(torch.from_numpy(frames), torch.from_numpy(labels))


class Data:
    """Clips to train and to validate on, and batches as a pure function of (seed, step): nothing to save for a resume.

    Another data set: another branch in `load_sequences`. Labels are only for the detector and its AP."""

    def __init__(self, cfg: Config, device: torch.device, rank: int = 0, world: int = 1):
        self.cfg, self.rank, self.world = cfg, rank, world
        if rank > 0:
            dist.barrier()  # the first process downloads for all
        train, validation = load_sequences(cfg)
        if rank == 0 and world > 1:
            dist.barrier()
        self.train = Clips(*(x.to(device) for x in make_clips(train, cfg.frames)))
        self.validation = Clips(*(x[: cfg.validation_clips].to(device) for x in make_clips(validation, 10)))
        self.steps_per_epoch = len(self.train.frames) // cfg.batch_size
        if self.steps_per_epoch == 0:
            raise UserError(f"--batch-size {cfg.batch_size} is more than the {len(self.train.frames)} training clips")

    def batch(self, step: int) -> Clips:
        """This process's share of the batch; every epoch has its own order."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng((self.cfg.seed, epoch)).permutation(len(self.train.frames))
        index = order[position * self.cfg.batch_size :][: self.cfg.batch_size][self.rank :: self.world]
        return Clips(*(x[torch.from_numpy(index).to(x.device)] for x in self.train))


# ------------------------------------------------------------------------------------------------------------ model
def residual_block(inputs: int, outputs: int, norm, stride: int = 1) -> BasicBlock:
    """Two 3x3 convolutions and a shortcut (He et al. 2016, arXiv 1512.03385): torchvision's block of ResNet-18."""
    shortcut = None
    if stride > 1 or inputs != outputs:
        shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), norm(outputs))
    return BasicBlock(inputs, outputs, stride, shortcut, norm_layer=norm)


class UNet(nn.Module):
    """Residual U-Net [N, inputs, h, w] -> [N, outputs, h, w]; channels double at each coarser level."""

    def __init__(self, inputs: int, outputs: int, width: int, levels: int, norm, pool: bool):
        super().__init__()
        self.pool = pool
        self.stem = nn.Sequential(conv3x3(inputs, width), norm(width), nn.ReLU())
        self.down = nn.ModuleList([residual_block(width, width, norm)])
        self.up = nn.ModuleList()
        widths = [width * 2**level for level in range(levels)]
        for fine, coarse in zip(widths, widths[1:]):
            self.down.append(residual_block(fine, coarse, norm, stride=1 if pool else 2))
        for fine, coarse in reversed(list(zip(widths, widths[1:]))):
            upsample = nn.ConvTranspose2d(coarse, fine, 2, 2)
            self.up.append(nn.ModuleList([upsample, residual_block(2 * fine, fine, norm)]))
        self.out = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        maps = []  # one a level, finest first
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level > 0 and self.pool else x)
            maps.append(x)
        for (upsample, block), finer in zip(self.up, reversed(maps[:-1])):
            x = block(torch.cat((upsample(x), finer), 1))
        return self.out(x)


class Model(nn.Module):
    """Encoder, predictor and projector, trained together, and two heads that read detached latents.

    Letters in shapes: B clips, T frames, C = latent_dim, S = C + hidden_dim, h x w positions, P = projector_width.
    Another encoder: any module [N, 1, 64, 64] -> [N, C, h, w]. Another predictor: [N, 2 S, h, w] -> [N, S, h, w]."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.hidden_dim, self.residual, self.batch_norm = cfg.hidden_dim, cfg.residual, cfg.norm == "batch"
        C, S, W, P = cfg.latent_dim, cfg.latent_dim + cfg.hidden_dim, cfg.encoder_width, cfg.projector_width
        norm = nn.BatchNorm2d if self.batch_norm else LayerNorm2d
        strides = [2 if cfg.stride >= factor else 1 for factor in (2, 4, 8)]
        self.encoder = nn.Sequential(
            conv3x3(1, W, strides[0]),
            norm(W),
            nn.ReLU(),
            residual_block(W, W, norm),
            residual_block(W, 2 * W, norm, strides[1]),
            residual_block(2 * W, C, norm, strides[2]),
        )
        self.predictor = UNet(2 * S, S, cfg.predictor_width, cfg.levels, norm, cfg.pool)
        norm1d = nn.BatchNorm1d(P) if self.batch_norm else nn.Identity()
        self.projector = nn.Sequential(nn.Linear(C, P), norm1d, nn.ReLU(), nn.Linear(P, P, bias=False))
        conv = lambda inputs, outputs: nn.Conv2d(inputs, outputs, 3, padding=1)
        self.detector = nn.Sequential(nn.AdaptiveAvgPool2d(CELLS), conv(C, 32), nn.ReLU(), conv(32, 1))
        self.decoder = nn.Sequential(conv(C, C), nn.ReLU(), conv(C, cfg.stride**2), nn.PixelShuffle(cfg.stride))
        self.to(memory_format=torch.channels_last)

    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B, T, 64, 64] as uint8, or as floats in [0, 1] -> latents [B, T, C, h, w]."""
        images = frames.flatten(0, 1)[:, None].contiguous(memory_format=torch.channels_last)
        if frames.dtype == torch.uint8:
            images = images.to(next(self.parameters()).dtype) / 255
        return self.encoder(images).unflatten(0, frames.shape[:2])

    def predict(self, before: Tensor, last: Tensor) -> Tensor:
        """Two successive states [B, n, S, h, w] each -> the next one [B, n, S, h, w]."""
        pairs = torch.cat((before, last), 2).flatten(0, 1)
        y = self.predictor(pairs).unflatten(0, last.shape[:2])
        return last + y if self.residual else y

    def initial_state(self, z: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] -> states [B, T, S, h, w] with a hidden state of zero."""
        return F.pad(z, (0, 0, 0, 0, 0, self.hidden_dim))

    def parallel_rollout(self, z: Tensor, rounds: int) -> list[Tensor]:
        """Latents of clips [B, T, C, h, w] -> latents after each round [B, T, C, h, w]; the first two stay the true ones.

        Of round k = 1.. the frames from k + 1 on, counted from 0, are predicted k frames ahead."""
        T, C = z.shape[1:3]
        state, latents = self.initial_state(z), []
        for k in range(1, rounds + 1):
            # Frames up to k are final before round k, and the last pair predicts a frame beyond the clip. So neither is
            # needed, but batch norm counts them: as published, its statistics are those of all pairs.
            first, end = (0, T - 1) if self.batch_norm else (k - 1, T - 2)
            y = self.predict(state[:, first:end], state[:, first + 1 : end + 1])
            state = torch.cat((state[:, : first + 2], y), 1)[:, :T]
            latents.append(state[:, :, :C])
        return latents

    def autoregressive_rollout(self, z: Tensor, steps: int) -> Tensor:
        """Latents [B, T > 1, C, h, w] -> those of the `steps` frames after the last two of them [B, steps, C, h, w]."""
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
        """Latents [B, T, C, h, w] -> logits that the centre of a digit lies in each of 8 x 8 cells [B, T, 8, 8]."""
        return self.detector(z.flatten(0, 1))[:, 0].unflatten(0, z.shape[:2])

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] -> frames [B, T, 64, 64], about in [0, 1]."""
        return self.decoder(z.flatten(0, 1))[:, 0].unflatten(0, z.shape[:2])


# --------------------------------------------------------------------------------------------------------- the loss
def losses(model: Model, cfg: Config, clips: Clips) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (a scalar), its terms in the order of TERMS (detached), latents [B, T, C, h, w] (detached).

    Another loss: a term here, its name in TERMS and its weight in Config."""
    z = model.encode(clips.frames)
    target = model.project(z)
    states = model.parallel_rollout(z, cfg.rounds)
    prediction = torch.stack([F.mse_loss(model.project(latents), target) for latents in states]).mean()
    rows = target.flatten(0, 1)  # [B T, h, w, P]
    if dist.is_initialized():
        rows = torch.cat(all_gather(rows))  # statistics over the clips of all processes
    if cfg.centre_positions:
        # what is the same in every frame, such as a code of the position, must not count as spread
        rows = rows - rows.mean(0)
    variance, covariance = variance_covariance_loss(rows.flatten(0, -2))
    detection = F.binary_cross_entropy_with_logits(model.detect(z.detach()), clips.labels.to(z.dtype))
    decoding = F.mse_loss(model.decode(z.detach()), clips.frames.to(z.dtype) / 255)
    loss = cfg.prediction_weight * prediction + cfg.variance_weight * variance + cfg.covariance_weight * covariance
    terms = torch.stack((prediction, variance, covariance, detection, decoding)).detach()
    return loss + detection + decoding, terms, z.detach()


@torch.no_grad()
def collapse_meter(z: Tensor) -> dict[str, float]:
    """How spread latents [B, T, C, h, w] are, after subtraction of each position's mean.

    Effective rank: exp of the entropy of the normalised singular values (RankMe, Garrido et al. 2023, arXiv 2210.02885).
    Smallest and mean standard deviation of a channel; mean |off-diagonal correlation|."""
    z = z[:16].to("cpu", torch.float64)
    z = (z - z.mean((0, 1))).movedim(2, -1).flatten(0, -2)  # [N, C]
    covariance = z.T @ z / len(z)
    std = covariance.diagonal().sqrt()
    singular = torch.linalg.eigvalsh(covariance).clamp(min=1e-24).sqrt()
    p = singular / singular.sum()
    correlation = (covariance / (std[:, None] * std).clamp(min=1e-12)).fill_diagonal_(0)
    return dict(
        effective_rank=torch.exp(-(p * p.log()).sum()).item(),
        std_min=std.min().item(),
        std_mean=std.mean().item(),
        correlation=(correlation.abs().sum() / (len(std) * (len(std) - 1))).item(),
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
    """Nesterov momentum with orthogonalised steps (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

    torch.optim.Muon takes 2-D parameters only; here a convolution's weight counts as a matrix [first axis, the rest]."""

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.01):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        params = [p for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params]
        for p in params:
            self.state[p].setdefault("momentum", torch.zeros_like(p))
        momentum = [self.state[p]["momentum"] for p in params]
        torch._foreach_mul_(momentum, group["momentum"])
        torch._foreach_add_(momentum, grads)
        steps = orthogonalise(torch._foreach_add(grads, momentum, alpha=group["momentum"]))
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, steps, alpha=-group["lr"])


def orthogonalise(matrices: list[Tensor]) -> list[Tensor]:
    """Nearly the closest semi-orthogonal matrix to each [n, ...], seen as [n, m], times sqrt(max(1, n / m)): five
    Newton-Schulz iterations. Matrices of one shape are stacked and done together."""
    a, b, c = 3.4445, -4.7750, 2.0315
    result, by_shape = list(matrices), {}
    for i, matrix in enumerate(matrices):
        by_shape.setdefault((len(matrix), matrix[0].numel()), []).append(i)
    for (n, m), indices in by_shape.items():
        x = torch.stack([matrices[i].reshape(n, m) for i in indices])
        x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()  # the iteration forgives rounding
        x = x.mT if n > m else x
        for _ in range(5):
            y = x @ x.mT
            x = a * x + (b * y + c * y @ y) @ x
        x = (x.mT if n > m else x) * max(1, n / m) ** 0.5
        for i, step in zip(indices, x):
            result[i] = step.to(matrices[i].dtype).view_as(matrices[i])
    return result


def make_optimizers(model: Model, cfg: Config) -> dict[float, torch.optim.Optimizer]:
    """Optimisers by the share of the learning rate that they use."""
    if cfg.optimizer == "adam":
        return {1.0: torch.optim.Adam(model.parameters(), fused=True)}
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return {1.0: Muon(matrices, cfg.lr), 0.1: torch.optim.Adam(vectors, betas=(0.9, 0.98), fused=True)}


# ------------------------------------------------------------------------------------------------------- evaluation
def average_precisions(scores: list[Tensor], labels: Tensor) -> list[float]:
    """AP of each of the scores [B, n, 8, 8] against the labels [B, T, 8, 8] of the last n frames, all clips pooled."""
    from sklearn.metrics import average_precision_score

    labels = labels.cpu()
    return [average_precision_score(labels[:, -s.shape[1] :].flatten(), s.flatten().cpu()) for s in scores]


@torch.no_grad()
def evaluate(model: Model, clips: Clips, batch_size: int = 64) -> dict:
    """Average precision of the detector for k = 1..7 frames ahead; a mean over batches of clips, as published.

    ap_parallel: in round k of the parallel rollout, the published measure. ap_autoregressive: from two true frames alone.
    Baselines: ap_last_frame, the last true latent instead of a prediction; ap_true_frames, the true latents."""
    batches = {}  # name -> rows of seven
    for start in range(0, len(clips.frames), batch_size):
        frames, labels = (x[start : start + batch_size] for x in clips)
        z = model.encode(frames)  # [B, T, C, h, w]
        T = z.shape[1]
        true = model.detect(z).sigmoid()
        rounds = model.parallel_rollout(z, len(HORIZONS))
        pairs = torch.stack((z[:, :-1], z[:, 1:]), 2).flatten(0, 1)  # [B (T - 1), 2, C, h, w]
        future = model.autoregressive_rollout(pairs, len(HORIZONS))
        ahead = model.detect(future).sigmoid().unflatten(0, (-1, T - 1))  # [B, T - 1, 7, 8, 8]
        # from two true frames, frames k + 1 .. T - 1 can be predicted k ahead
        scores = {
            "ap_parallel": [model.detect(rounds[k - 1][:, k + 1 :]).sigmoid() for k in HORIZONS],
            "ap_autoregressive": [ahead[:, : T - 1 - k, k - 1] for k in HORIZONS],
            "ap_last_frame": [true[:, 1 : T - k] for k in HORIZONS],
            "ap_true_frames": [true[:, k + 1 :] for k in HORIZONS],
        }
        for name in scores:
            batches.setdefault(name, []).append(average_precisions(scores[name], labels))
    result = {name: np.mean(rows, axis=0).round(4).tolist() for name, rows in batches.items()}
    return result | {name.replace("ap_", "map_"): round(float(np.mean(ap)), 4) for name, ap in result.items()}


@torch.no_grad()
def make_examples(model: Model, frames: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """What figures need: clips [N, T, ...] with labels, and what the heads read from a rollout of their first two frames."""
    z = model.encode(frames)
    y = torch.cat((z[:, :2], model.autoregressive_rollout(z[:, :2], z.shape[1] - 2)), 1)
    decoded = (255 * model.decode(y).clamp(0, 1)).to(torch.uint8)
    arrays = dict(frames=frames, labels=labels, decoded=decoded, detected=model.detect(y).sigmoid())
    return {name: array.cpu().numpy() for name, array in arrays.items()}


# -------------------------------------------------------------------------------------- run folder and checkpoints
def last_run_dir(name: str) -> Path:
    """The newest run folder of a preset."""
    configs = sorted(Path("runs", SCRIPT).glob(f"{name}-*/config.json"), key=os.path.getmtime)
    if not configs:
        raise UserError(f"--resume: there is no run of preset {name} in runs/{SCRIPT}; name one by --run-dir")
    return configs[-1].parent


def write_atomically(path: Path, content: bytes) -> None:
    """Under a temporary name, flushed to the disk, then renamed: a crash at any moment leaves the old file or the new."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_checkpoint(path: Path, **state) -> None:
    """Batches and learning rates are functions of (seed, step), so this is all that an exact resume needs."""
    buffer = io.BytesIO()
    torch.save(dict(format=FORMAT, rng=torch.get_rng_state(), **state), buffer)
    write_atomically(path, buffer.getvalue())


def read_checkpoint(path: Path) -> dict:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)  # executes no pickle
        if state["format"] == FORMAT:
            return state
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except Exception as error:  # a damaged file raises one of half a dozen kinds
        raise UserError(f"{path} is damaged or not a checkpoint ({type(error).__name__})") from None
    raise UserError(f"{path} is of another script or version: {state['format']}, not {FORMAT}")


def load(path: str | Path, device: str = "cpu") -> Model:
    """The model of a run folder or checkpoint file, in eval mode.

        model = load("runs/video_jepa/cpu-20261125-101500")
        z = model.encode(frames)                                   # [B, T, 64, 64] in [0, 1] -> [B, T, C, h, w]
        model.detect(model.autoregressive_rollout(z, 5))           # the five frames after them: logits [B, 5, 8, 8]

    Raises UserError if the file is missing, damaged or of another script."""
    path = Path(path)
    state = read_checkpoint(path / "checkpoint.pt" if path.is_dir() else path)
    model = Model(Config(**state["config"]))
    model.load_state_dict(state["model"])
    return model.to(device).eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------------- training
stop_signals: list[int] = []  # received so far


def request_stop(number: int, _) -> None:
    """Training ends after the step in progress; a second signal ends the process at once."""
    stop_signals.append(number)
    signal.signal(number, signal.SIG_DFL)


def start_device(cfg: Config) -> tuple[torch.device, int, int]:
    """Device, rank and number of processes; under torchrun joins the process group."""
    available = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    kind = next(name for name in available if available[name]) if cfg.device == "auto" else cfg.device
    world = int(os.environ.get("WORLD_SIZE", 1))
    if not available[kind]:
        raise UserError(f"--device {kind}: PyTorch finds no such device here")
    if cfg.batch_size % world:
        raise UserError(f"--batch-size {cfg.batch_size} does not divide over {world} processes")
    if world > 1 and cfg.norm == "batch" and kind != "cuda":
        raise UserError("batch norm over several processes needs GPUs: use --norm layer, or one process")
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.backends.cudnn.benchmark = True
    use_triton(None if cfg.kernels else False)
    return torch.device(kind), int(os.environ.get("RANK", 0)), world


def average_gradients(model: Model, world: int) -> None:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])  # one message
    dist.all_reduce(flat)
    for grad, mean in zip(grads, flat.div_(world).split([grad.numel() for grad in grads])):
        grad.copy_(mean.view_as(grad))


def warm_up(compute_loss, model: Model, cfg: Config, clips: Clips) -> float:
    """Forward and backward once, without a trace, so that compilation is in no timing. Returns its seconds."""
    begin = time.perf_counter()
    state = {name: value.clone() for name, value in model.state_dict().items()}  # batch norm counts what it sees
    try:
        compute_loss(model, cfg, clips)[0].backward()
    except RuntimeError as error:
        if not cfg.compile or isinstance(error, torch.OutOfMemoryError):
            raise
        raise UserError(f"torch.compile failed; try --no-compile ({str(error).splitlines()[0]})") from error
    model.load_state_dict(state)
    model.zero_grad()
    return time.perf_counter() - begin


def train(cfg: Config) -> dict:
    """Train and evaluate. Returns the summary, which is also in summary.json of the run folder.

    Raises UserError for mistakes in settings, data and files, and when the loss is no longer finite."""
    device, rank, world = start_device(cfg)
    main_process = rank == 0  # it logs, saves and evaluates
    data = Data(cfg, device, rank, world)
    torch.manual_seed(cfg.seed)
    model = Model(cfg).to(device)
    if world > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizers = make_optimizers(model, cfg)
    steps = max(1, round(cfg.epochs * data.steps_per_epoch))  # of the whole schedule
    end = min(steps, cfg.max_steps or steps)

    # the run folder: a new one, or that of the run to go on with
    start, seconds, log = 0, 0.0, []
    run_dir = Path(cfg.run_dir or f"runs/{SCRIPT}/{cfg.preset}-{datetime.now():%Y%m%d-%H%M%S}")
    if cfg.resume:
        run_dir = Path(cfg.run_dir) if cfg.run_dir else last_run_dir(cfg.preset)
        state = read_checkpoint(run_dir / "checkpoint.pt")
        for name, value in state["config"].items():
            if name not in MAY_CHANGE_ON_RESUME and value != getattr(cfg, name):
                raise UserError(f"--resume: this run has {name} {value}, not {getattr(cfg, name)}")
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers.values(), state["optimizers"]):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        start, seconds = state["step"], state["seconds"]
        lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
        log = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= start]
    elif main_process:
        try:
            run_dir.mkdir(parents=True)
        except FileExistsError:
            raise UserError(f"{run_dir} exists: choose another --run-dir, or go on with its run by --resume") from None
    parameters = sum(p.numel() for part in (model.encoder, model.predictor) for p in part.parameters())
    threads = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if device.type == "cuda" else threads
    if main_process:
        write_atomically(run_dir / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1).encode())
        write_atomically(run_dir / "metrics.jsonl", "".join(log).encode())
        print(f"{cfg.preset} | {name} | encoder and predictor of {parameters:,} parameters | {run_dir}", flush=True)

    torch.compiler.reset()  # many trainings in one process would reach the limit of recompilations
    compute_loss = torch.compile(losses, fullgraph=world == 1, dynamic=False) if cfg.compile else losses
    warm_up_seconds = warm_up(compute_loss, model, cfg, data.batch(start))
    log_step, log_time, save_time = start, time.perf_counter(), time.perf_counter()
    for step in range(start, end):
        loss, terms, latents = compute_loss(model, cfg, data.batch(step))
        loss.backward()
        if world > 1:
            average_gradients(model, world)
        lr = learning_rate(cfg, step, steps)
        for share, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = share * lr
            optimizer.step()
            optimizer.zero_grad()

        done = step + 1
        stop = stop_signals and world == 1
        if done % cfg.log_every and done < end and not stop:
            continue
        values = torch.cat((loss.detach()[None], terms, terms.new_tensor([len(stop_signals)])))
        if world > 1:
            dist.all_reduce(values)
        *values, signals = (values / world).tolist()  # waits for the device
        stop = signals > 0
        values = dict(zip(("loss", *TERMS), values))
        now = time.perf_counter()
        seconds += now - log_time
        broken = [term for term, value in values.items() if not math.isfinite(value)]
        if broken or not all(p.isfinite().all() for p in model.parameters()):
            where = ", ".join(broken) or "the weights"
            raise UserError(f"NaN or Inf at step {done} in {where}; the last checkpoint is kept; try a smaller --lr")
        if main_process:
            milliseconds, meter = 1e3 * (now - log_time) / (done - log_step), collapse_meter(latents)
            with open(run_dir / "metrics.jsonl", "a") as file:
                record = dict(step=done, lr=lr, milliseconds=milliseconds, **values, **meter)
                file.write(json.dumps(record) + "\n")
            terms = " ".join(f"{term} {value:.4f}" for term, value in values.items())
            left, rank = (end - done) * milliseconds / 6e4, meter["effective_rank"]
            print(f"step {done:05d}/{steps} | {terms} | {milliseconds:.0f} ms | rank {rank:.1f} | {left:.1f} min left")
            if meter["std_mean"] < 0.05 or rank < 1.5:
                print("  collapse: latents hardly differ; raise --variance-weight")
            elif meter["correlation"] > 0.7:
                print("  collapse: channels repeat each other; raise --covariance-weight")
            if done == end or stop or now - save_time > cfg.save_every:
                states = [optimizer.state_dict() for optimizer in optimizers.values()]
                saved = dict(config=dataclasses.asdict(cfg), step=done, seconds=seconds, model=model.state_dict())
                save_checkpoint(run_dir / "checkpoint.pt", **saved, optimizers=states)
                save_time = time.perf_counter()
        if stop and done < end:
            print(f"stopped at step {done}, checkpoint saved: go on with --resume --run-dir {run_dir}")
            sys.exit(128 + (stop_signals or [signal.SIGTERM])[0])
        log_step, log_time = done, time.perf_counter()

    summary = dict(script=SCRIPT, preset=cfg.preset, seed=cfg.seed, data=cfg.data, steps=end, parameters=parameters)
    summary |= dict(device=name, torch=torch.__version__, train_seconds=seconds, warm_up_seconds=warm_up_seconds)
    if main_process and cfg.validation_clips:
        begin, shown = time.perf_counter(), [x[:6] for x in data.validation]
        model.eval()
        summary |= evaluate(model, data.validation) | collapse_meter(model.encode(shown[0]))
        np.savez_compressed(run_dir / "examples.npz", **make_examples(model, *shown))
        summary["evaluation_seconds"] = time.perf_counter() - begin
    if main_process:
        write_atomically(run_dir / "summary.json", json.dumps(summary, indent=1).encode())
        print(json.dumps(summary))
    return summary


# ----------------------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str]) -> Config:
    """Defaults from --preset, or on --resume from the run itself; then every field of Config as a flag."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--run-dir", default="")
    args, _ = parser.parse_known_args(argv)
    default = preset(args.preset)
    if args.resume:
        run_dir = Path(args.run_dir) if args.run_dir else last_run_dir(args.preset)
        config = read_checkpoint(run_dir / "checkpoint.pt")["config"]
        default = Config(**{**config, "run_dir": str(run_dir), "max_steps": 0})
    return tyro.cli(Config, args=argv, default=default)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request_stop)
    try:
        train(parse_args(sys.argv[1:]))
    except torch.OutOfMemoryError:
        sys.exit("error: out of memory: choose a smaller --batch-size")
    except (UserError, OSError) as error:  # OSError: a full disk, a folder that must not be written to
        sys.exit(f"error: {error}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
