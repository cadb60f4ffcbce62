"""Video JEPA: predict the latents of future frames, without reconstructing pixels.

    z_t   = encode(frame_t)                          latent map of each frame of a clip, t = 0..9
    s_t^0 = (z_t, 0)                                 state: the latent, and a hidden state that starts at zero
    s_t^k = predict(s_{t-2}^{k-1}, s_{t-1}^{k-1})    round k of the parallel rollout: all frames t > 1 at once
    loss  = mean_k |project(s^k) - project(z)|^2     of the latent part of s^k; gradients flow into both sides
            + w_v variance + w_c covariance          of project(z): they keep the latents from collapsing (kernels/)

Frames 0 and 1 are given. After round k, a frame t > k has been predicted from the true frames t - 2k .. t - k: k frames
ahead. Two heads on detached latents teach the encoder nothing: a decoder shows the frame, a detector finds the cells,
of 8 x 8, with centres of digits. The measure is its average precision (AP) 1..7 frames ahead, and their mean (mAP).

    python video_jepa.py                                       # moving digits of MNIST
    python video_jepa.py --data digits                         # moving digits of scikit-learn: needs no files
    python video_jepa.py --preset paper --data moving-mnist    # the published recipe (arXiv 2602.03604) and data
    torchrun --nproc_per_node=2 video_jepa.py                  # several GPUs

Preset cpu: mAP .605 (three seeds) in 8.4 minutes on two CPU cores, on unseen digits; published .607, on other clips.
"""

import argparse
import dataclasses
import io
import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.distributed.nn.functional import all_gather  # with a gradient
from torchvision.datasets import MNIST, MovingMNIST
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.resnet import BasicBlock, conv1x1, conv3x3
from tqdm import tqdm

from kernels import Muon, use_triton, variance_covariance_loss

SCRIPT = "video_jepa"
FORMAT = "nanojepa/video_jepa/3"  # of a checkpoint
SIZE, DIGIT = 64, 28  # side of a frame and of a digit, px
FRAMES = 10  # of a clip
CELLS = 8  # of the detection map, along each axis
HORIZONS = range(1, 8)  # k, frames ahead, at which predictions are measured


class UserError(ValueError):
    """A mistake in settings, data or files that the user can mend: shown as one line, without a traceback."""


# ---------------------------------------------------------------------------------------------------- configuration
@dataclasses.dataclass
class Config:
    """Learn to predict the latents of future frames."""

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
    sequences: int = 10000  # of two clips each, nine tenths of them to train on; moving-mnist: all of the file instead
    # model
    stride: Literal[1, 2, 4, 8] = 1  # pixels of a frame per position of a latent map, along each axis
    latent_dim: int = 16  # channels of a latent map
    encoder_width: int = 32  # channels of the encoder's first stage
    predictor_width: int = 32  # channels of the U-Net's finest level; they double at each coarser one
    levels: int = 4  # of the U-Net; at 1 it is a plain residual network
    norm: Literal["batch", "layer"] = "batch"  # layer: over channels, at each position; the projector then has no norm
    hidden_dim: int = 0  # channels of the hidden state that a prediction passes on to the next
    projector_width: int = 64  # hidden and output features of the projector
    # loss
    rounds: int = 4  # of the parallel rollout in training (K)
    prediction_weight: float = 1.0  # mean squared error of projected predictions
    variance_weight: float = 10.0  # hinge loss on the standard deviation of each projected feature
    covariance_weight: float = 100.0  # squared off-diagonal covariances of projected features
    centre_positions: bool = False  # in variance and covariance, subtract each position's mean first
    # optimisation
    epochs: float = 50.0  # passes over the training clips
    max_steps: int = 0  # stop after this many steps of the schedule; 0 = off
    batch_size: int = 64  # clips a step, over all processes
    optimizer: Literal["adam", "muon"] = "adam"  # muon: for matrices, with Adam at a tenth of its rate for vectors
    lr: float = 1e-3  # peak learning rate
    schedule: Literal["constant", "cosine"] = "constant"  # cosine: linear warm-up over the first twentieth, then to 0
    # evaluation and logging
    validation_clips: int = 2000  # to measure on at most (an odd number is rounded up); 0 = no evaluation
    log_every: int = 50  # steps between log lines
    save_every: float = 60.0  # seconds between checkpoints, at log lines

    def __post_init__(self):
        if min(self.batch_size, self.rounds, self.levels, self.log_every, self.epochs, self.lr) <= 0:
            raise UserError("--batch-size, --rounds, --levels, --log-every, --epochs and --lr must be positive")
        if not 0 <= self.seed < 2**63:
            raise UserError("--seed must be at least 0 and below 2^63")
        if SIZE // self.stride % 2 ** (self.levels - 1):
            raise UserError(f"--levels {self.levels} is too many for latent maps of {SIZE // self.stride} px")


# What gpu, cpu and smoke have in common: coarse latent maps, a plain predictor with layer norm, Muon.
FAST = dict(levels=1, norm="layer", centre_positions=True, stride=8)
FAST |= dict(optimizer="muon", lr=0.02, schedule="cosine", prediction_weight=2.0)
CPU = dict(FAST, encoder_width=16, predictor_width=96, hidden_dim=32, batch_size=8, compile=False)
PRESETS: dict[str, dict] = {
    "gpu": dict(FAST, predictor_width=192, hidden_dim=64, epochs=20),  # not tuned on a GPU yet
    "paper": {},  # the values of Config: the published recipe
    "cpu": dict(CPU, epochs=1.9),  # ten minutes on two cores
    "smoke": dict(CPU, data="digits", sequences=400, predictor_width=32, epochs=1, validation_clips=64, log_every=10),
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


def load_sequences(cfg: Config) -> tuple[np.ndarray, np.ndarray]:
    """Sequences [N, 20, 64, 64] uint8 to train on and to validate on. A new data set is another branch here."""
    folder = Path(cfg.data_dir, "MovingMNIST" if cfg.data == "moving-mnist" else "MNIST/raw")
    try:
        if cfg.data == "moving-mnist":
            data = MovingMNIST(cfg.data_dir, split=None, download=True).data[:, :, 0].numpy()
            if data.dtype != np.uint8 or data.shape[1:] != (20, SIZE, SIZE) or len(data) < 10:
                raise ValueError(f"not uint8 [20, N >= 10, 64, 64] but, with N first, {data.dtype} {data.shape}")
            data = np.random.RandomState(2025).permutation(data)
            return tuple(np.split(data, [len(data) * 9 // 10]))  # the published split
        if cfg.data == "mnist":
            train, validation = (MNIST(cfg.data_dir, part, download=True).data.numpy() for part in (True, False))
        else:
            digits = load_digits().images.repeat(3, 1).repeat(3, 2)  # [1797, 8, 8] from 0 to 16 -> [1797, 24, 24]
            digits = np.pad(255 / 16 * digits, ((0, 0), (2, 2), (2, 2))).astype(np.uint8)
            train, validation = digits[:1500], digits[1500:]
    except Exception as error:  # a damaged file raises one of half a dozen kinds
        raise UserError(f"cannot read {folder} ({error}): if it is there, delete it to download it again") from None
    n = cfg.sequences // 10
    return move_digits(train, cfg.sequences - n, seed=0), move_digits(validation, n, seed=1)


def move_digits(digits: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n sequences [n, 20, 64, 64] of two random digits [D, 28, 28] each, which go straight on at 3.6 px a frame.

    The law of Moving MNIST (Srivastava et al. 2015, arXiv 1502.04681): a digit that hits a border rests there for one
    frame and goes back; positions are truncated to whole px; where digits overlap the brighter pixel shows."""
    rng = np.random.default_rng(seed)
    chosen = digits[rng.integers(len(digits), size=(n, 2))]
    position = rng.random((n, 2, 2))  # (x, y) of each digit's corner, in units of the 36 px that it can move
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
    """Frames [N, 64, 64] uint8 -> cells [N, 8, 8] bool that hold the centre of a digit, as published.

    A digit is a connected piece of the pixels above (min + max) / 2 of the frame, with its holes filled; its centre is
    that of its bounding box. Digits that touch count as one, a broken one as several."""
    labels = np.zeros((len(frames), CELLS, CELLS), bool)
    for n, frame in enumerate(tqdm(frames, "labels", leave=False, disable=None)):
        bright = ndimage.binary_fill_holes(frame > np.mean((frame.min(), frame.max())))
        pieces, _ = ndimage.label(bright, structure=np.ones((3, 3)))  # corners connect
        for rows, columns in ndimage.find_objects(pieces):
            y, x = (rows.start + rows.stop) / 2, (columns.start + columns.stop) / 2
            labels[n, int(y * CELLS / SIZE), int(x * CELLS / SIZE)] = True
    return labels


def make_clips(sequences: np.ndarray, device: torch.device) -> Clips:
    """Sequences [N, 20, 64, 64], each cut into two clips, with their labels."""
    frames = sequences.reshape(-1, SIZE, SIZE)
    clips = Clips(torch.from_numpy(frames), torch.from_numpy(detection_labels(frames)))
    return Clips(*(x.unflatten(0, (-1, FRAMES)).to(device) for x in clips))


def make_batch(cfg: Config, clips: Clips, step: int, rank: int = 0, world: int = 1) -> Clips:
    """This process's share of a batch: a pure function of (seed, step), with a new order in every epoch."""
    epoch, n = divmod(step, len(clips.frames) // cfg.batch_size)
    order = np.random.default_rng((cfg.seed, epoch)).permutation(len(clips.frames))
    index = order[n * cfg.batch_size : (n + 1) * cfg.batch_size][rank::world]
    index = torch.from_numpy(index).to(clips.frames.device, non_blocking=True)
    return Clips(clips.frames[index], clips.labels[index])


# ------------------------------------------------------------------------------------------------- model and its loss
def residual_block(inputs: int, outputs: int, norm, stride: int = 1) -> BasicBlock:
    """Two 3x3 convolutions and a shortcut (He et al. 2016, arXiv 1512.03385): torchvision's block of ResNet-18."""
    shortcut = None
    if stride > 1 or inputs != outputs:
        shortcut = nn.Sequential(conv1x1(inputs, outputs, stride), norm(outputs))
    return BasicBlock(inputs, outputs, stride, shortcut, norm_layer=norm)


class UNet(nn.Module):
    """Residual U-Net [N, inputs, h, w] -> [N, outputs, h, w]; channels double at each coarser level."""

    def __init__(self, inputs: int, outputs: int, width: int, levels: int, norm):
        super().__init__()
        self.stem = nn.Sequential(conv3x3(inputs, width), norm(width), nn.ReLU())
        self.down = nn.ModuleList([residual_block(width, width, norm)])
        self.up = nn.ModuleList()
        widths = [width * 2**level for level in range(levels - 1)]  # those of all levels but the coarsest
        for fine in widths:
            self.down.append(residual_block(fine, 2 * fine, norm, stride=2))
        for fine in reversed(widths):
            upsample = nn.ConvTranspose2d(2 * fine, fine, 2, 2)
            self.up.append(nn.ModuleList([upsample, residual_block(2 * fine, fine, norm)]))
        self.out = nn.Conv2d(width, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for block in self.down:
            maps.append(block(maps[-1]))
        x = maps.pop()
        for upsample, block in self.up:
            x = block(torch.cat((upsample(x), maps.pop()), 1))  # beside the map of the same size on the way down
        return self.out(x)


class Model(nn.Module):
    """Encoder, predictor and projector, trained together, and two heads that read detached latents.

    Letters in shapes: B clips, T frames, C = latent_dim, S = C + hidden_dim, h x w positions, P = projector_width.
    Another encoder: any module [N, 1, 64, 64] -> [N, C, h, w]. Another predictor: [N, 2 S, h, w] -> [N, S, h, w]."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.hidden_dim, self.batch_norm = cfg.hidden_dim, cfg.norm == "batch"
        C, S, W, P = cfg.latent_dim, cfg.latent_dim + cfg.hidden_dim, cfg.encoder_width, cfg.projector_width
        norm = nn.BatchNorm2d if self.batch_norm else LayerNorm2d
        strides = [2 if cfg.stride >= factor else 1 for factor in (2, 4, 8)]
        stem = conv3x3(1, W, strides[0]), norm(W), nn.ReLU()
        blocks = residual_block(W, W, norm), residual_block(W, 2 * W, norm, strides[1])
        last = residual_block(2 * W, C, norm, strides[2])  # ends in a ReLU: latents are >= 0, predictions need not be
        self.encoder = nn.Sequential(*stem, *blocks, last)
        self.predictor = UNet(2 * S, S, cfg.predictor_width, cfg.levels, norm)
        norm1d = nn.BatchNorm1d(P) if self.batch_norm else nn.Identity()
        self.projector = nn.Sequential(nn.Linear(C, P), norm1d, nn.ReLU(), nn.Linear(P, P, bias=False))
        conv = lambda inputs, outputs: nn.Conv2d(inputs, outputs, 3, padding=1)
        self.detector = nn.Sequential(nn.AdaptiveAvgPool2d(CELLS), conv(C, 32), nn.ReLU(), conv(32, 1))
        self.decoder = nn.Sequential(conv(C, C), nn.ReLU(), conv(C, cfg.stride**2), nn.PixelShuffle(cfg.stride))

    def encode(self, frames: Tensor) -> Tensor:
        """Frames [B, T, 64, 64] as uint8, or as floats in [0, 1] -> latents [B, T, C, h, w]."""
        images = frames.flatten(0, 1)[:, None]
        if frames.dtype == torch.uint8:
            images = images.to(next(self.parameters()).dtype) / 255
        return self.encoder(images).unflatten(0, frames.shape[:2])

    def predict(self, earlier: Tensor, later: Tensor) -> Tensor:
        """Two successive states [B, n, S, h, w] each -> the next one [B, n, S, h, w]."""
        pairs = torch.cat((earlier, later), 2).flatten(0, 1)
        return self.predictor(pairs).unflatten(0, later.shape[:2])

    def parallel_rollout(self, z: Tensor, rounds: int) -> list[Tensor]:
        """Latents of clips [B, T, C, h, w] -> those after each round [B, T, C, h, w]; frames 0 and 1 stay as given."""
        T, C = z.shape[1:3]
        state, latents = F.pad(z, (0, 0, 0, 0, 0, self.hidden_dim)), []  # [B, T, S, h, w]: hidden states of zero
        for k in range(1, rounds + 1):
            # Frames up to k are as in the round before, so only later ones are predicted. But batch norm needs all
            # pairs, as published, for its statistics; the last one's prediction lies beyond the clip and is cut off.
            first_pair, end_pair = (0, T - 1) if self.batch_norm else (k - 1, T - 2)
            y = self.predict(state[:, first_pair:end_pair], state[:, first_pair + 1 : end_pair + 1])
            state = torch.cat((state[:, : first_pair + 2], y), 1)[:, :T]
            latents.append(state[:, :, :C])
        return latents

    def autoregressive_rollout(self, z: Tensor, steps: int) -> Tensor:
        """Latents [B, T > 1, C, h, w] -> those of the `steps` frames after the last two of them [B, steps, C, h, w]."""
        state = F.pad(z[:, -2:], (0, 0, 0, 0, 0, self.hidden_dim))  # [B, 2, S, h, w]
        for _ in range(steps):
            y = self.predict(state[:, -2:-1], state[:, -1:])
            state = torch.cat((state, y), 1)
        return state[:, 2:, : z.shape[2]]

    def project(self, z: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] -> projections [B, T, h, w, P]."""
        z = z.movedim(2, -1)
        return self.projector(z.flatten(0, -2)).unflatten(0, z.shape[:-1])

    def detect(self, z: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] -> probability that the centre of a digit lies in a cell [B, T, 8, 8]."""
        return self.detector(z.flatten(0, 1))[:, 0].sigmoid().unflatten(0, z.shape[:2])

    def decode(self, z: Tensor) -> Tensor:
        """Latents [B, T, C, h, w] -> frames [B, T, 64, 64], about in [0, 1]."""
        return self.decoder(z.flatten(0, 1))[:, 0].unflatten(0, z.shape[:2])


def losses(model: Model, cfg: Config, clips: Clips) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """-> the loss (a scalar), its terms (detached), latents [B, T, C, h, w] (detached)."""
    z = model.encode(clips.frames)
    target = model.project(z)
    rounds = model.parallel_rollout(z, cfg.rounds)
    prediction = torch.stack([F.mse_loss(model.project(latents), target) for latents in rounds]).mean()
    samples = target.flatten(0, 1)  # [B T, h, w, P]
    if dist.is_initialized():
        samples = torch.cat(all_gather(samples))  # statistics over the clips of all processes
    if cfg.centre_positions:
        samples = samples - samples.mean(0)  # what all frames share, such as a code of the position, is no spread
    variance, covariance = variance_covariance_loss(samples.flatten(0, -2))  # another anti-collapse loss goes here
    logits = model.detector(z.detach().flatten(0, 1))
    detection = F.binary_cross_entropy_with_logits(logits, clips.labels.flatten(0, 1)[:, None].to(z.dtype))
    decoding = F.mse_loss(model.decode(z.detach()), clips.frames.to(z.dtype) / 255)
    loss = cfg.prediction_weight * prediction + cfg.variance_weight * variance + cfg.covariance_weight * covariance
    loss = loss + detection + decoding
    terms = dict(loss=loss, prediction=prediction, variance=variance, covariance=covariance)
    terms |= dict(detection=detection, decoding=decoding)
    return loss, {name: term.detach() for name, term in terms.items()}, z.detach()


@torch.no_grad()
def collapse_meter(z: Tensor) -> dict[str, float]:
    """How spread latents [B, T, C, h, w] are around each position's mean: effective rank, exp of the entropy of the
    normalised singular values (RankMe, arXiv 2210.02885); standard deviation of channels; mean |correlation| of two."""
    z = z[:16].to("cpu", torch.float64)
    z = (z - z.mean((0, 1))).movedim(2, -1).flatten(0, -2)  # [N, C]
    std = z.std(0)
    p = F.normalize(torch.linalg.eigvalsh(torch.cov(z.T)).clamp(min=0).sqrt(), p=1, dim=0)
    correlation = torch.corrcoef(z.T).nan_to_num().fill_diagonal_(0).abs().sum() / (len(std) * (len(std) - 1))
    rank = torch.special.entr(p).sum().exp()
    values = dict(effective_rank=rank, std_min=std.min(), std_mean=std.mean(), correlation=correlation)
    return {name: value.item() for name, value in values.items()}


# ----------------------------------------------------------------------------------------------------- optimisation
def learning_rate(cfg: Config, step: int, steps: int) -> float:
    """Constant, or linear warm-up over the first twentieth of a schedule of `steps`, then a cosine to zero."""
    if cfg.schedule == "constant":
        return cfg.lr
    warmup = max(1, steps // 20)
    progress = max(0, step - warmup) / max(1, steps - warmup)
    return cfg.lr * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizers(model: Model, cfg: Config) -> list[tuple[float, torch.optim.Optimizer]]:
    """Pairs of a factor of the learning rate and an optimiser. Muon (kellerjordan.github.io/posts/muon) orthogonalises
    the steps of matrices and convolutions; vectors take Adam's."""
    if cfg.optimizer == "adam":
        return [(1.0, torch.optim.Adam(model.parameters()))]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return [(1.0, Muon(matrices)), (0.1, torch.optim.Adam(vectors, betas=(0.9, 0.98)))]


# ------------------------------------------------------------------------------------------------------- evaluation
def average_precisions(scores: list[Tensor], labels: Tensor) -> list[float]:
    """AP of each of the scores [B, n, 8, 8] against the labels [B, T, 8, 8] of the last n frames, all clips pooled."""
    return [average_precision_score(labels[:, -x.shape[1] :].flatten().cpu(), x.flatten().cpu()) for x in scores]


@torch.no_grad()
def evaluate(model: Model, clips: Clips, batch_size: int = 64) -> dict:
    """Average precision of the detector k = 1..7 frames ahead: the mean over batches, and mAP, the mean of the seven.

    ap_parallel: in round k of the parallel rollout, the published measure. ap_autoregressive: from two true frames.
    Baselines: ap_last_frame, the last true latent instead of a prediction; ap_true_frames, the true latents."""
    rows = []  # of each batch: name -> the seven APs
    for frames, labels in zip(clips.frames.split(batch_size), clips.labels.split(batch_size)):
        z = model.encode(frames)  # [B, T, C, h, w]
        true = model.detect(z)
        rounds = model.parallel_rollout(z, len(HORIZONS))
        pairs = torch.stack((z[:, :-1], z[:, 1:]), 2).flatten(0, 1)  # [B (T - 1), 2, C, h, w]
        future = model.autoregressive_rollout(pairs, len(HORIZONS))  # [B (T - 1), 7, C, h, w]
        ahead = model.detect(future).unflatten(0, (len(z), -1))  # [B, T - 1, 7, 8, 8]
        scores = {  # of frames k + 1 .. T - 1, which can be predicted k ahead from two true frames
            "ap_parallel": [model.detect(rounds[k - 1][:, k + 1 :]) for k in HORIZONS],
            "ap_autoregressive": [ahead[:, :-k, k - 1] for k in HORIZONS],
            "ap_last_frame": [true[:, 1:-k] for k in HORIZONS],
            "ap_true_frames": [true[:, k + 1 :] for k in HORIZONS],
        }
        rows.append({name: average_precisions(horizons, labels) for name, horizons in scores.items()})
    result = {name: np.mean([row[name] for row in rows], axis=0).round(4).tolist() for name in rows[0]}
    return result | {"m" + name: round(float(np.mean(ap)), 4) for name, ap in result.items()}


@torch.no_grad()
def make_examples(model: Model, frames: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """For figures: true frames and labels [N, T, ...]; what the heads read from a rollout of the first two frames."""
    z = model.encode(frames)
    y = torch.cat((z[:, :2], model.autoregressive_rollout(z[:, :2], z.shape[1] - 2)), 1)
    decoded = (255 * model.decode(y).clamp(0, 1)).to(torch.uint8)
    arrays = dict(frames=frames, labels=labels, decoded=decoded, detected=model.detect(y))
    return {name: array.cpu().numpy() for name, array in arrays.items()}


# -------------------------------------------------------------------------------------- run folder and checkpoints
def save_checkpoint(path: Path, state: dict) -> None:
    """A temporary file, flushed to the disk, then renamed: a crash at any moment leaves the old file or the new one."""
    torch.save(state, buffer := io.BytesIO())  # to memory: on a full disk it raises no OSError, but write does
    with open(path.with_suffix(".tmp"), "wb") as file:
        file.write(buffer.getvalue())
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


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
    """The model of a run folder or checkpoint file, in eval mode. Raises UserError for a missing or damaged file."""
    state = read_checkpoint(Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path))
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
    """Device, rank and number of processes. Under torchrun also joins the process group."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    kind = cfg.device if cfg.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here")
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
    return torch.device(kind), rank, world


def train(cfg: Config) -> dict:
    """Train and evaluate; returns what summary.json holds. Raises UserError for what the user can mend, and for NaN."""
    device, rank, world = start_device(cfg)
    run_dir = Path(cfg.run_dir or f"runs/{SCRIPT}/{cfg.preset}-{time.strftime('%Y%m%d-%H%M%S')}")
    if rank == 0 and run_dir.exists() and not cfg.resume:
        raise UserError(f"{run_dir} exists: choose another --run-dir, or go on with its run by --resume")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank > 0:
        dist.barrier()  # until the first process of this computer has downloaded the files
    train_sequences, validation_sequences = load_sequences(cfg)
    if world > 1 and local_rank == 0:
        dist.barrier()
    train_clips = make_clips(train_sequences, device)
    if cfg.batch_size > len(train_clips.frames):
        raise UserError(f"--batch-size {cfg.batch_size} is more than the {len(train_clips.frames)} training clips")
    torch.manual_seed(cfg.seed)
    model = Model(cfg).to(device)
    if world > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizers = make_optimizers(model, cfg)
    steps = max(1, round(cfg.epochs * (len(train_clips.frames) // cfg.batch_size)))  # of the whole schedule
    start, seconds = 0, 0.0
    if cfg.resume:
        state = read_checkpoint(run_dir / "checkpoint.pt")
        for name, value in state["config"].items():
            if name not in MAY_CHANGE_ON_RESUME and value != getattr(cfg, name):
                raise UserError(f"--resume: this run has {name} {value}, not {getattr(cfg, name)}")
        model.load_state_dict(state["model"])
        for (_, optimizer), saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        start, seconds = state["step"], state["seconds"]
    end = max(start, min(steps, cfg.max_steps or steps))
    parameters = sum(p.numel() for part in (model.encoder, model.predictor) for p in part.parameters())
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    if rank == 0:
        run_dir.mkdir(parents=True, exist_ok=cfg.resume)  # two runs that start together never share a folder
        (run_dir / "config.json").write_text(json.dumps(vars(cfg), indent=1))
        print(f"{cfg.preset} | {hardware} | encoder and predictor of {parameters:,} parameters | {run_dir}")

    torch.compiler.reset()  # many trainings in one process would reach the limit of recompilations
    mode = "reduce-overhead" if device.type == "cuda" and world == 1 else "default"  # CUDA graphs, not many launches
    compute_loss = torch.compile(losses, fullgraph=world == 1, dynamic=False, mode=mode) if cfg.compile else losses
    log_step, log_time, save_time = start, time.perf_counter(), time.perf_counter()
    for step in range(start, end):
        if cfg.compile:
            torch.compiler.cudagraph_mark_step_begin()  # a graph may overwrite the last step's tensors
        loss, terms, latents = compute_loss(model, cfg, make_batch(cfg, train_clips, step, rank, world))
        loss.backward()
        if world > 1:
            for p in model.parameters():
                dist.all_reduce(p.grad.div_(world))  # the mean
        lr = learning_rate(cfg, step, steps)
        for factor, optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = factor * lr
            optimizer.step()
        model.zero_grad()
        done = step + 1
        if step == start:
            loss.item()  # waits for the device; the first step compiled and is left out of the timings
            log_step, log_time = done, time.perf_counter()
        if done % cfg.log_every and done < end and not (stop_signals and world == 1):
            continue  # several processes stop together, at a log line

        totals = torch.stack([*terms.values(), terms["loss"].new_tensor(len(stop_signals))])
        if world > 1:
            dist.all_reduce(totals)
        *means, signals = (totals / world).tolist()  # waits for the device
        values = dict(zip(terms, means))
        milliseconds = 1e3 * (time.perf_counter() - log_time) / max(1, done - log_step)
        seconds += (done - log_step) * milliseconds / 1e3
        text = " ".join(f"{name} {value:.4f}" for name, value in values.items())
        if not math.isfinite(values["loss"]) or not all(p.isfinite().all() for p in model.parameters()):
            raise UserError(f"NaN or Inf at step {done} ({text}): the last checkpoint is kept; try a smaller --lr")
        if rank == 0:
            meter = collapse_meter(latents)
            with open(run_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps(dict(step=done, lr=lr, milliseconds=milliseconds, **values, **meter)) + "\n")
            text += f" | {milliseconds:.0f} ms | rank {meter['effective_rank']:.1f}/{latents.shape[2]}"
            print(f"step {done:05d}/{steps} | {text} | {(end - done) * milliseconds / 6e4:.1f} min left", flush=True)
            if meter["std_mean"] < 0.05 or meter["effective_rank"] < 1.5 or meter["correlation"] > 0.7:
                print("  collapse: latents or channels hardly differ; raise --variance-weight and --covariance-weight")
            if done == end or signals or time.perf_counter() - save_time > cfg.save_every:
                # batches and learning rates are functions of (seed, step), so this is enough for an exact resume
                state = dict(format=FORMAT, config=vars(cfg), step=done, seconds=seconds, model=model.state_dict())
                state["optimizers"] = [optimizer.state_dict() for _, optimizer in optimizers]
                save_checkpoint(run_dir / "checkpoint.pt", state)
                save_time = time.perf_counter()
        if signals and done < end:
            if rank == 0:
                print(f"stopped at step {done}, checkpoint saved: go on with --resume --run-dir {run_dir}")
            sys.exit(128 + (stop_signals or [signal.SIGTERM])[0])  # it may be another process's signal
        log_step, log_time = done, time.perf_counter()

    if rank > 0:
        return {}
    summary = dict(script=SCRIPT, preset=cfg.preset, seed=cfg.seed, data=cfg.data, steps=end, parameters=parameters)
    summary |= dict(device=hardware, torch=torch.__version__, train_seconds=round(seconds, 1))
    if cfg.validation_clips:
        clips = make_clips(validation_sequences[: math.ceil(cfg.validation_clips / 2)], device)
        model.eval()
        summary |= evaluate(model, clips) | collapse_meter(model.encode(clips.frames[:16]))
        np.savez_compressed(run_dir / "examples.npz", **make_examples(model, clips.frames[:6], clips.labels[:6]))
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=1))
    print(json.dumps(summary))
    return summary


# ----------------------------------------------------------------------------------------------------- command line
def parse_args(argv: list[str]) -> Config:
    """Defaults from --preset, or on --resume from the run itself; then every field of Config as a flag."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--run-dir", "--run_dir", default="")
    known, _ = parser.parse_known_args(argv)
    default = preset(known.preset)
    if known.resume:
        pattern = f"runs/{SCRIPT}/{known.preset}-*/checkpoint.pt"
        run_dir = Path(known.run_dir or max(Path().glob(pattern), default=Path(pattern)).parent)
        config = read_checkpoint(run_dir / "checkpoint.pt")["config"]
        default = Config(**{**config, "run_dir": str(run_dir), "max_steps": 0})
    return tyro.cli(Config, args=argv, default=default)


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request_stop)
    try:
        train(parse_args(sys.argv[1:]))
    except (UserError, OSError) as error:  # OSError: a full disk, a folder that cannot be written to
        sys.exit(f"error: {error}")
    except torch.OutOfMemoryError:
        sys.exit("error: out of memory: choose a smaller --batch-size")
    except torch._dynamo.exc.TorchDynamoException as error:
        sys.exit(f"error: torch.compile failed: try --no-compile ({str(error).splitlines()[0]})")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
