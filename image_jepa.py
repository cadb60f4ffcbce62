"""Image JEPA: features worth probing, learnt from unlabelled images by agreeing with oneself about two views of each.

    x_1 .. x_V = augment(image)                      random crop, colours, grey, solarise, flip
    z_v = encode(x_v),  p_v = project(z_v)           ResNet or ViT; MLP with P outputs
    loss = i * mean over pairs of |p_v - p_w|^2 / P  invariance: the energy; least when all p are equal, hence
         + v * variance(p) + c * covariance(p)       --loss vicreg (arXiv 2105.04906), or
         + s * sigreg(p)                             --loss sigreg (arXiv 2511.08544): p isotropic Gaussian (kernels/)

i, v, c, s: --invariance-weight and so on. Views are compared directly: there is no predictor, no target network, no
mask. The projector is thrown away; a linear classifier on z (`linear_accuracy`) says what the features are worth.

    python image_jepa.py                                # CIFAR-10, preset gpu on CUDA, cpu elsewhere
    python image_jepa.py --data path/to/folder          # train/<class>/*.jpg and test/<class>/*.jpg
    python image_jepa.py --preset paper --loss sigreg   # the published recipe (arXiv 2602.03604)

Preset cpu: 71.8-71.9 % by linear probe after eleven minutes on 2 cores (CIFAR-10 as JPEG copy; untrained 44 %; 3 seeds
in results/). Published, 300 epochs of ResNet-18 on a GPU: 90.1 % (VICReg), 91.0 % (SIGReg). Ours differs in more and
smaller views, a slim network, a larger variance weight, and Muon in place of LARS. From "checkpoint and logging" on all
scripts are nearly the same.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import hashlib
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

from kernels import sigreg_loss, use_triton, variance_covariance_loss

SCRIPT = "image_jepa"
TERMS = ("invariance", "variance", "covariance", "sigreg", "probe")
METER = ("std_mean", "correlation", "projection_std", "agreement")
PUBLISHED = {"online_accuracy": "90.12 vicreg, 91.02 sigreg", "epochs": "300"}  # arXiv 2602.03604, ResNet-18


# ---------------------------------------------------------------------------------------------------- configuration
@dataclass
class Config:
    """Learn features of unlabelled images and probe them."""

    # Here stand the published values: preset paper.

    preset: Literal["gpu", "paper", "cpu", "smoke"] = "paper"  # set of defaults; any flag given beside it wins
    seed: int = 0  # of weights, batches and views
    run_dir: str = ""  # folder of this run; empty: the first free runs/image_jepa/<preset>-<n>
    resume: bool = False  # go on from the checkpoint in the run folder
    overwrite: bool = False  # empty a run folder that exists
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    compile: bool = True  # torch.compile the loss with its augmentation, forward and backward
    kernels: bool = True  # fused Triton losses on NVIDIA GPUs; off: plain PyTorch
    # data
    data: str = "cifar10"  # cifar10, shapes (drawn, no files), or a folder with train/<class>/* and test/<class>/*
    data_dir: str = "data"  # where downloaded sets lie, in torchvision's layout
    image_size: int = 32  # images of a folder are resized once, shapes drawn, with this side, px
    # views
    views: int = 2  # of each image a step
    crop_size: int = 32  # side of a view, px
    crop_scale: tuple[float, float] = (0.2, 1.0)  # part of the image's area that a view shows
    jitter: float = 1.0  # of colours, in 80 % of the views; 1 = 0.4 brightness, 0.4 contrast, 0.2 saturation, 0.1 hue
    grey: float = 0.2  # probability that a view loses its colours
    solarise: float = 0.1  # probability that a view's bright half is inverted
    # model
    backbone: Literal["resnet18", "small", "vit_s", "vit_b"] = "resnet18"  # small: a slim one, for CPUs
    width: int = 64  # channels of the first stage of resnet18 and small
    patch_size: int = 8  # of the ViTs, px
    projector_width: int = 2048  # of the projector's two hidden layers; 0 = no projector
    projector_out: int = 0  # its output features; 0 = 2048 for vicreg, 128 for sigreg
    # loss
    loss: Literal["vicreg", "sigreg"] = "vicreg"  # what prevents collapse
    invariance_weight: float = 1.0  # mean squared difference of two views' projections
    variance_weight: float = 1.0  # vicreg: hinge on each feature's standard deviation, summed over two views
    covariance_weight: float = 80.0  # vicreg: squared off-diagonal covariances, summed over two views
    sigreg_weight: float = 10.0  # sigreg: distance from a Gaussian
    directions: int = 256  # sigreg: random directions, fresh each step
    knots: int = 10  # sigreg: points of the integral over [-3, 3]
    # optimisation
    optimizer: Literal["lars", "adamw", "muon"] = "lars"  # each has an --lr of its own: 0.3, 0.002, 0.02
    epochs: float = 300.0  # passes over the images
    max_steps: int = 0  # stop after this many steps of the schedule; 0 = off
    batch_size: int = 256  # images a step, over all processes
    lr: float = 0.3  # peak learning rate, after warm-up and before cosine decay to 0
    warmup_epochs: float = 10.0  # linear warm-up
    weight_decay: float = 1e-4  # none on biases and norms
    # evaluation and logging
    evaluate: bool = True  # probe the encoder and draw figures at the end
    log_every: int = 50  # steps between log lines
    checkpoint_every: int = 500  # steps between checkpoints


PRESETS: dict[str, dict] = {
    "gpu": dict(  # what won on a CPU, at ResNet-18's size; not tuned on a GPU yet
        views=4, crop_size=24, crop_scale=(0.15, 0.8), variance_weight=2.5, covariance_weight=40.0, optimizer="muon",
        lr=0.02, weight_decay=0.01, epochs=150, warmup_epochs=3,
    ),
    "paper": {},  # the defaults above
    "cpu": dict(
        backbone="small", projector_width=512, projector_out=256, views=4, crop_size=20, crop_scale=(0.15, 0.6),
        batch_size=128, variance_weight=2.5, covariance_weight=40.0, optimizer="muon", lr=0.02, weight_decay=0.01,
        epochs=4.5, warmup_epochs=0.3, compile=False,
    ),
    "smoke": dict(
        data="shapes", backbone="small", width=24, projector_width=64, projector_out=64, crop_size=24,
        crop_scale=(0.4, 1.0), jitter=2.0, grey=0.5, solarise=0.3, batch_size=64, variance_weight=2.5,
        covariance_weight=40.0, optimizer="muon", lr=0.02, weight_decay=0.01, epochs=2, warmup_epochs=0.2,
        log_every=25, checkpoint_every=50, compile=False,
    ),
}  # fmt: skip
MAY_CHANGE_ON_RESUME = {
    "run_dir", "resume", "overwrite", "device", "compile", "kernels", "data_dir", "max_steps", "evaluate", "log_every",
    "checkpoint_every",
}  # fmt: skip


class UserError(Exception):
    """What a person can mend: printed as one line, without a traceback."""


def preset(name: str, **overrides) -> Config:
    """The configuration of a preset, with fields replaced: `preset("cpu", seed=1)`."""
    if name not in PRESETS:
        raise UserError(f"--preset {name} is none of {', '.join(PRESETS)}")
    return Config(**{"preset": name, **PRESETS[name], **overrides})


# ------------------------------------------------------------------------------------------------------------- data
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10, per channel, images in [0, 1]


class Images(NamedTuple):
    train: Tensor  # [N, 3, S, S] uint8
    train_label: Tensor  # [N] int64
    test: Tensor
    test_label: Tensor
    classes: list[str]

    def to(self, device: torch.device) -> "Images":
        return Images(*(x.to(device) for x in self[:4]), self.classes)


def seeded(generator: torch.Generator, *key) -> torch.Generator:
    """The generator, seeded by a key such as ("clips", seed, step); hashed: on a CPU only 32 bits of a seed count."""
    return generator.manual_seed(zlib.crc32(repr(key).encode()))


def load_images(cfg: Config) -> Images:
    """The data set of cfg.data, all of it in memory (and later on the device): square images of one size.

    A new one: a function that returns Images, and its name here. Labels are for the probe only; images without any go
    into one class, train/all/* and test/all/*. Raises UserError, saying what to do, for data that cannot be read."""
    first = not dist.is_initialized() or dist.get_rank() == 0
    if not first:
        dist.barrier()  # the first process downloads and decodes for all
    if cfg.data == "shapes":
        images = shapes(cfg.image_size)
    else:
        images = cifar10(cfg.data_dir) if cfg.data == "cifar10" else image_folder(Path(cfg.data), cfg.image_size)
    if first and dist.is_initialized():
        dist.barrier()
    return images


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def cifar10(root: str) -> Images:
    from torchvision.datasets import CIFAR10

    try:
        train, test = (CIFAR10(root, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError) as error:  # no network, or a damaged file
        what = f"CIFAR-10 is not in {root} and could not be downloaded ({one_line(error)})"
        raise UserError(f"{what}; put {CIFAR10.url} into {root}/") from None
    pixels = lambda s: torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous()
    return Images(pixels(train), torch.tensor(train.targets), pixels(test), torch.tensor(test.targets), train.classes)


def image_folder(root: Path, size: int) -> Images:
    """<root>/{train,test}/<class>/*, decoded and resized once; kept in one file beside them until a file changes."""
    from torchvision.datasets import ImageFolder

    if not (root / "train").is_dir() or not (root / "test").is_dir():
        raise UserError(f"--data {root}: neither cifar10 nor shapes nor a folder of train/<class>/* and test/<class>/*")
    try:
        train, test = (ImageFolder(str(root / part)) for part in ("train", "test"))
    except FileNotFoundError as error:  # no classes, or one without images
        raise UserError(f"--data {root}: {one_line(error)}") from None
    if differ := set(train.classes) ^ set(test.classes):
        raise UserError(f"--data {root}: only one of train and test has class {', '.join(sorted(differ))}")
    files, n = [*train.samples, *test.samples], len(train.samples)  # (path, label)
    stamp = [(os.path.relpath(path, root), (s := os.stat(path)).st_size, s.st_mtime_ns) for path, _ in files]
    key, cache = hashlib.sha256(repr(stamp).encode()).hexdigest(), root / f"images-{size}.pt"
    try:
        kept = torch.load(cache, weights_only=True)
        if kept["key"] == key:
            return Images(*(kept[name] for name in Images._fields))
    except Exception:  # absent, damaged or foreign: made anew
        pass
    pixels = torch.stack([decode(path, size) for path, _ in progress(files, "reading images")])
    label = torch.tensor([label for _, label in files])
    images = Images(pixels[:n].clone(), label[:n].clone(), pixels[n:].clone(), label[n:].clone(), train.classes)
    torch.save(dict(key=key, **images._asdict()), buffer := io.BytesIO())
    try:
        write_atomically(cache, buffer.getvalue())
    except OSError as error:
        print(f"the decoded images could not be kept in {cache} ({error.strerror}); they will be read again next time")
    return images


def decode(path: str, size: int) -> Tensor:
    """One file -> its central square [3, size, size] uint8; greyscale and transparent images become RGB."""
    import numpy as np
    from PIL import Image, ImageOps

    stop_if_asked()
    try:
        with Image.open(path) as image:
            square = ImageOps.fit(image.convert("RGB"), (size, size), Image.BILINEAR)
            return torch.from_numpy(np.array(square)).permute(2, 0, 1)
    except Exception as error:  # PIL raises many kinds for a damaged file
        raise UserError(f"{path} is not a readable image ({type(error).__name__}); remove or replace it") from None


SHAPES = {  # what is solid, at (u, v) in units of the shape's radius
    "disc": lambda u, v: u * u + v * v < 1,
    "ring": lambda u, v: ((u * u + v * v).sqrt() - 0.8).abs() < 0.2,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) < 0.85,
    "frame": lambda u, v: (torch.maximum(u.abs(), v.abs()) - 0.7).abs() < 0.18,
    "triangle": lambda u, v: (v < 0.6) & (v > 1.7 * u.abs() - 1),
    "cross": lambda u, v: (torch.minimum(u.abs(), v.abs()) < 0.25) & (torch.maximum(u.abs(), v.abs()) < 1),
    "star": lambda u, v: (u * u + v * v).sqrt() < 0.65 + 0.4 * torch.cos(5 * torch.atan2(u, -v)),
    "crescent": lambda u, v: (u * u + v * v < 1) & ((u - 0.5).square() + v * v > 0.6),
    "bars": lambda u, v: (v.abs() > 0.35) & (torch.maximum(u.abs(), v.abs()) < 0.95),
    "hourglass": lambda u, v: (u.abs() < v.abs()) & (v.abs() < 0.95),
}


def shapes(size: int, train: int = 8000, test: int = 2000) -> Images:
    """Ten classes of shapes, drawn at a random place, scale and turn, in two colours, on stripes. Always the same."""
    n, g = train + test, seeded(torch.Generator(), "shapes")
    rand = lambda low, high, *more: low + (high - low) * torch.rand(n, *more, 1, 1, generator=g)
    label = torch.randint(0, len(SHAPES), (n,), generator=g)
    pixel = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    radius, turn = rand(0.4, 0.8), rand(-0.3, 0.3)
    x0, y0 = (rand(-1, 1) * (1 - radius) for _ in range(2))
    u = (turn.cos() * (x - x0) + turn.sin() * (y - y0)) / radius
    v = (turn.cos() * (y - y0) - turn.sin() * (x - x0)) / radius
    solid = torch.empty(n, size, size, dtype=torch.bool)
    for k, inside in enumerate(SHAPES.values()):
        solid[label == k] = inside(u[label == k], v[label == k])
    ground, ink = rand(0, 1, 3), rand(0, 1, 3)
    ink = torch.where((ink - ground).abs().amax(1, keepdim=True) < 0.4, 1 - ground.round(), ink)  # always to be seen
    stripes = 0.15 * torch.sin(rand(2, 12) * x + rand(2, 12) * y + rand(0, 6.3))[:, None]
    picture = torch.where(solid[:, None], ink, ground + stripes) + 0.03 * torch.randn(n, 3, size, size, generator=g)
    picture = picture.clamp(0, 1).mul(255).round().to(torch.uint8)
    return Images(picture[:train], label[:train], picture[train:], label[train:], list(SHAPES))


# ----------------------------------------------------------------------------------------------------- augmentation
class Augmentation(NamedTuple):
    """What is done to each of N views; drawn beforehand, so that applying it is a plain function of tensors."""

    box: Tensor  # [N, 4] top, left, height, width of the crop, whole px
    flip: Tensor  # [N] bool
    factor: Tensor  # [N, 4] brightness, contrast and saturation factors, hue shift in turns
    order: Tensor  # [N, 4] permutation of these four (0..3); hue (3) is first in a quarter of the views, and so on
    grey: Tensor  # [N] bool
    solarise: Tensor  # [N] bool


@functools.cache
def constant(values: tuple, device: torch.device) -> Tensor:  # made once: a copy to the GPU waits for it
    return torch.tensor(values, device=device)


def draw_augmentation(cfg: Config, n: int, size: int, g: torch.Generator) -> Augmentation:
    """Parameters of n views of images of side `size`, by the laws of torchvision's RandomResizedCrop, ColorJitter."""
    rand = lambda *shape: torch.rand(*shape, generator=g, device=g.device)
    # the first of ten tries that fits into the image; else all of it
    area = size**2 * (cfg.crop_scale[0] + (cfg.crop_scale[1] - cfg.crop_scale[0]) * rand(n, 10))
    ratio = torch.exp(math.log(4 / 3) * (2 * rand(n, 10) - 1))
    tries = torch.stack(((area / ratio).sqrt().round(), (area * ratio).sqrt().round()), 2)  # [n, 10, 2] height, width
    tries = tries.clamp(min=1)
    fits = (tries <= size).all(2)
    sides = tries.gather(1, fits.int().argmax(1)[:, None, None].expand(-1, 1, 2))[:, 0]
    sides = torch.where(fits.any(1, keepdim=True), sides, size)
    corner = (rand(n, 2) * (size - sides + 1)).floor()
    strength, neutral = (constant(values, g.device) for values in ((0.4, 0.4, 0.2, 0.1), (1.0, 1.0, 1.0, 0.0)))
    factor = neutral + cfg.jitter * strength * (2 * rand(n, 4) - 1) * (rand(n, 1) < 0.8)
    # every order of the four is as likely, but hue comes first in exactly a quarter of the views, second in another:
    # augment then does the costly turn of the hue once a view, on groups whose sizes are known beforehand
    mixed = torch.randperm(n, generator=g, device=g.device)
    slot = torch.arange(4, device=g.device).repeat_interleave(-(-n // 4))[:n][mixed]
    others = rand(n, 3).argsort(1)
    order = torch.empty(n, 4, dtype=torch.long, device=g.device)
    order.scatter_(1, (slot[:, None] + torch.arange(1, 4, device=g.device)) % 4, others).scatter_(1, slot[:, None], 3)
    box, flip = torch.cat((corner, sides), 1), rand(n) < 0.5
    return Augmentation(box, flip, factor, order, rand(n) < cfg.grey, rand(n) < cfg.solarise)


def resampling(start: Tensor, length: Tensor, size: int, out: int) -> Tensor:
    """Matrices [N, out, size] that resize pixels start..start+length of `size` to `out`: bilinear, antialiased."""
    scale = length[:, None] / out
    centre = start[:, None] + (torch.arange(out, device=start.device) + 0.5) * scale  # [N, out]
    pixel = torch.arange(size, device=start.device) + 0.5
    reach = scale.clamp(min=1)[..., None]
    weight = (1 - (pixel - centre[..., None]).abs() / reach).clamp(min=0)  # a triangle, wider when shrinking
    inside = (pixel > start[:, None]) & (pixel < (start + length)[:, None])  # [N, size]
    weight = weight * inside[:, None]
    return weight / weight.sum(2, keepdim=True)


def luminance(x: Tensor) -> Tensor:
    return (0.2989 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])[:, None]


def turn_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Images [N, 3, H, W] in [0, 1], their hue (HSV) turned by shift [N] (1 = once round)."""
    r, g, b = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    safe = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    hue = hue + 6 * shift[:, None, None]
    sixth = (torch.arange(5, 0, -2, device=x.device)[:, None, None] + hue[:, None]) % 6  # 5, 3, 1: red, green, blue
    return value[:, None] - chroma[:, None] * torch.minimum(sixth, 4 - sixth).clamp(0, 1)


def augment(images: Tensor, a: Augmentation, out: int) -> Tensor:
    """Images [B, 3, S, S] uint8 -> V views of each [V B, 3, out, out] in [0, 1], view by view."""
    N, B, S = len(a.box), len(images), images.shape[-1]
    top, left, height, width = a.box.unbind(1)
    rows, columns = resampling(top, height, S, out), resampling(left, width, S, out)
    columns = torch.where(a.flip[:, None, None], columns.flip(1), columns)
    x = (images.float() / 255).expand(N // B, -1, -1, -1, -1).reshape(N, 3, S, S)
    x = (rows[:, None] @ x @ columns.transpose(1, 2)[:, None]).clamp(0, 1)
    by_slot = (a.order == 3).int().argmax(1).argsort().split(-(-N // 4))  # views whose hue is turned first, second, ...
    for slot in range(4):
        kind = a.order[:, slot, None, None, None]
        factor = torch.where(kind == 3, 1.0, a.factor.gather(1, a.order[:, slot : slot + 1])[..., None, None])
        grey = luminance(x)
        other = torch.where(kind == 1, grey.mean((1, 2, 3), keepdim=True), torch.where(kind == 2, grey, 0.0))
        # away from black (brightness), the mean grey (contrast), or the grey image (saturation)
        x = (factor * x + (1 - factor) * other).clamp(0, 1)
        if slot < len(by_slot):
            x = x.index_copy(0, by_slot[slot], turn_hue(x[by_slot[slot]], a.factor[by_slot[slot], 3]))
    x = torch.where(a.grey[:, None, None, None], luminance(x), x)
    return torch.where(a.solarise[:, None, None, None] & (x >= 0.5), 1 - x, x)


class Batch(NamedTuple):
    images: Tensor  # [B, 3, S, S] uint8
    labels: Tensor  # [B]; only the online probe sees them
    augmentation: Augmentation  # of V B views, view by view
    directions: Tensor  # [P, M] random unit columns; empty unless the loss is sigreg


class Batches:
    """Images, labels and view parameters as a pure function of (seed, step): nothing to save, exact on resume. Each
    process draws the views of its own images."""

    def __init__(self, cfg: Config, images: Images, projections: int, rank: int = 0, world: int = 1):
        self.cfg, self.images, self.projections = cfg, images, projections
        self.generator, self.epoch = torch.Generator(images.train.device), None
        self.rank, self.world, self.per_epoch = rank, world, len(images.train) // cfg.batch_size

    def __call__(self, step: int) -> Batch:
        cfg, g = self.cfg, self.generator
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, seed = epoch, seeded(g, "epoch", cfg.seed, epoch)
            self.order = torch.randperm(len(self.images.train), generator=seed, device=g.device)
        n = cfg.batch_size // self.world
        pick = self.order[index * cfg.batch_size + self.rank * n :][:n]
        seeded(g, "views", cfg.seed, step, self.rank)
        views = draw_augmentation(cfg, cfg.views * n, self.images.train.shape[-1], g)
        directions = torch.empty(0)
        if cfg.loss == "sigreg":
            shape, g = (self.projections, cfg.directions), seeded(g, "directions", cfg.seed, step)
            directions = F.normalize(torch.randn(*shape, generator=g, device=g.device), dim=0)
        return Batch(self.images.train[pick], self.images.train_label[pick], views, directions)


# ------------------------------------------------------------------------------------------------------------ model
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


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, arXiv 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = BatchNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = BatchNorm(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), BatchNorm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """[N, 3, H, W] -> [N, 8 width]: a stem, residual blocks, the mean over places.

    resnet18: for small images, so a 3x3 stem of stride 1 and no max-pooling; then four stages of two blocks.
    small: a slim network for CPUs; 4x4 patches of stride 2, three stages of one block, a 1x1 convolution."""

    def __init__(self, kind: Literal["resnet18", "small"], width: int):
        super().__init__()
        kernel, stride, sizes = dict(  # of the stem; channels of stem and blocks, in units of width
            resnet18=(3, 1, (1, 1, 1, 2, 2, 4, 4, 8, 8)), small=(4, 2, (1, 1, 2, 4))
        )[kind]
        conv_norm_relu = lambda a, b, *more: [nn.Conv2d(a, b, *more, bias=False), BatchNorm(b), nn.ReLU()]
        self.features = 8 * width
        self.stem = nn.Sequential(*conv_norm_relu(3, width, kernel, stride, 1))
        blocks = [ResidualBlock(a * width, b * width, 1 if a == b else 2) for a, b in zip(sizes, sizes[1:])]
        if kind == "small":
            blocks += conv_norm_relu(4 * width, 8 * width, 1, 1, 0)
        self.blocks = nn.Sequential(*blocks)
        if kind == "resnet18":  # as torchvision does; small keeps PyTorch's default
            for m in self.modules():
                if isinstance(m, nn.Conv2d):
                    nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x)).mean((2, 3))


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), pre-norm, class token. [N, 3, H, W] -> [N, dim].

    Images of another size than that of the training views are seen with interpolated positions."""

    def __init__(self, dim: int, heads: int, patch: int, size: int, depth: int = 12):
        super().__init__()
        self.features = dim
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(0.02 * torch.randn(1, dim, size // patch, size // patch))
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, nn.LayerNorm(dim), enable_nested_tensor=False)
        for p in self.layers.parameters():
            if p.ndim > 1:  # TransformerEncoder starts all layers as copies of one
                nn.init.trunc_normal_(p, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)  # [N, dim, h, w]
        place = self.position
        if place.shape[2:] != x.shape[2:]:
            place = F.interpolate(place, x.shape[2:], mode="bicubic", antialias=True)
        x = (x + place).flatten(2).transpose(1, 2)  # [N, h w, dim]
        return self.layers(torch.cat((self.token.expand(len(x), -1, -1).to(x.dtype), x), 1))[:, 0]


class Encoder(nn.Module):
    """Images [N, 3, H, W], float in [0, 1] -> features [N, F]; normalises by CIFAR-10's statistics.

    Another backbone: a module [N, 3, H, W] -> [N, F] with F as its attribute `features`, and its name here and in
    Config.backbone. It is trained on views of side crop_size and evaluated on images of side image_size."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        if cfg.backbone in ("vit_s", "vit_b"):
            dim, heads = (384, 6) if cfg.backbone == "vit_s" else (768, 12)
            self.backbone = ViT(dim, heads, cfg.patch_size, cfg.crop_size)
        else:
            self.backbone = ResNet(cfg.backbone, cfg.width)

    def forward(self, images: Tensor) -> Tensor:
        x = (images - self.mean) / self.std
        return self.backbone(x.contiguous(memory_format=torch.channels_last))


class Model(nn.Module):
    """Encoder, projector, and the online probe, which reads detached features."""

    def __init__(self, cfg: Config, classes: int):
        super().__init__()
        self.encoder = Encoder(cfg).to(memory_format=torch.channels_last)
        features, width = self.encoder.backbone.features, cfg.projector_width
        self.projector, self.projections = nn.Sequential(), features
        if width:
            self.projections = cfg.projector_out or (2048 if cfg.loss == "vicreg" else 128)
            layer = lambda a, b: [nn.Linear(a, b), BatchNorm(b), nn.ReLU()]
            self.projector = nn.Sequential(
                *layer(features, width), *layer(width, width), nn.Linear(width, self.projections)
            )
        self.probe = nn.Linear(features, classes)


# --------------------------------------------------------------------------------------------------------- the loss
def wide(x: Tensor) -> Tensor:
    """In float32 at least: statistics and losses are not for bf16."""
    return x if x.dtype == torch.float64 else x.float()


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


def losses(model: Model, cfg: Config, batch: Batch, amp: bool = False) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """-> total loss (0-d, to differentiate), the terms in the order of TERMS, features [V B, F] and projections
    [V, B, P]; all but the total detached."""
    V, B, device = cfg.views, len(batch.images), batch.images.device
    x = augment(batch.images, batch.augmentation, cfg.crop_size)  # [V B, 3, s, s]
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        z = model.encoder(x)  # [V B, F]
        p = model.projector(z)  # [V B, P]
        guess = model.probe(z.detach())
    p = wide(p).view(V, B, -1)
    invariance = 2 * p.var(0).mean()  # = the mean over pairs of views of |p_v - p_w|^2 / P: E (a - b)^2 = 2 Var
    variance = covariance = sigreg = torch.zeros_like(invariance)
    if cfg.loss == "vicreg":
        of_views = [variance_covariance_loss(gather(view)) for view in p]
        variance, covariance = (2 * torch.stack(term).mean() for term in zip(*of_views))  # the sum over two views
    elif cfg.loss == "sigreg":
        sigreg = torch.stack([sigreg_loss(gather(view), batch.directions, knots=cfg.knots) for view in p]).mean()
    # another loss: its name in Config.loss, its weight in Config, its branch here, itself in TERMS, `total` and `terms`
    probe = F.cross_entropy(wide(guess), batch.labels.repeat(V))  # trains the probe alone: it reads detached features
    total = (
        cfg.invariance_weight * invariance + probe
        + cfg.variance_weight * variance + cfg.covariance_weight * covariance + cfg.sigreg_weight * sigreg
    )  # fmt: skip
    terms = torch.stack((invariance, variance, covariance, sigreg, probe)).detach()
    return total, terms, (z.detach(), p.detach())


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
    """Linear warm-up, then cosine to zero, over a schedule of `steps`."""
    warmup = max(1, round(steps * cfg.warmup_epochs / cfg.epochs))
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def memory(optimizer: torch.optim.Optimizer, p: Tensor, name: str) -> Tensor:
    """What the optimiser remembers of p under a name; zeros at first."""
    state = optimizer.state[p]
    if name not in state:
        state[name] = torch.zeros_like(p)
    return state[name]


class LARS(torch.optim.Optimizer):
    """Momentum SGD with a step length for each matrix, relative to its norm (You et al. 2017, arXiv 1708.03888).

    Matrix w with gradient g moves by min(lr, eta |w| / (|g| + decay |w|)) times g + decay w, before momentum: lr is an
    upper bound, and none moves faster than by plain SGD. Vectors take plain SGD steps."""

    def __init__(self, groups, lr: float, momentum: float = 0.9, eta: float = 0.02):
        super().__init__(groups, dict(lr=lr, momentum=momentum, eta=eta, weight_decay=0.0))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            grads = [p.grad for p in params]
            if group["matrix"]:  # biases and norms are neither decayed nor scaled
                decay, ratios = group["weight_decay"], []
                for w, g in zip(torch._foreach_norm(params), torch._foreach_norm(grads)):
                    ratio = group["eta"] * w / (g + decay * w + 1e-8) / group["lr"]
                    ratios.append(torch.where((w > 0) & (g > 0), ratio, 1.0).clamp(max=1))
                grads = torch._foreach_add(grads, params, alpha=decay)
                torch._foreach_mul_(grads, ratios)
            moving = [memory(self, p, "mean") for p in params]
            torch._foreach_mul_(moving, group["momentum"])
            torch._foreach_add_(moving, grads)
            torch._foreach_add_(params, moving, alpha=-group["lr"])


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
    """Weight decay on matrices, none on biases and norms."""
    split = {True: [], False: []}
    for name, p in model.named_parameters():
        split[p.ndim > 1 and not name.endswith(("position", "token"))].append(p)
    groups = [dict(params=split[m], matrix=m, weight_decay=cfg.weight_decay if m else 0.0) for m in (True, False)]
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, cfg.lr, betas=(0.9, 0.98), fused=True)
    return dict(lars=LARS, muon=Muon)[cfg.optimizer](groups, cfg.lr)


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
@torch.no_grad()
def features(encoder: nn.Module, images: Tensor, batch: int = 500) -> Tensor:
    """uint8 images [N, 3, S, S] -> features [N, F] in float32, single view, in eval mode; processes share the work."""
    was, device = encoder.training, images.device
    encoder.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(device)):
        batches = images.split(batch)
        z = [encoder(x.float() / 255).float() for x in batches[share(len(batches))]]
    encoder.train(was)
    return joined(z, device)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return round(100 * (scores.argmax(1) == labels).float().mean().item(), 2)


def linear_probe(z: Tensor, y: Tensor, z_test: Tensor, y_test: Tensor, classes: int) -> dict:
    """Logistic regression on features [N, F]: convex, up to 100 iterations of L-BFGS on the whole set for each decay.
    The weight decay is the best of five on 5,000 held-out training images (a tenth, if there are fewer); then all are
    fitted. -> accuracies in %."""
    mean, std = z.mean(0), z.std(0).clamp(min=1e-6)
    z, z_test = (z - mean) / std, (z_test - mean) / std
    mixed = torch.randperm(len(z), generator=torch.Generator().manual_seed(0)).to(z.device)
    held, rest = mixed.tensor_split([min(5000, max(1, len(z) // 10))])
    weight = torch.zeros(classes, z.shape[1], device=z.device, requires_grad=True)
    bias = torch.zeros(classes, device=z.device, requires_grad=True)

    def regress(x, labels, decay):  # from where the last fit ended: decays are tried from the strongest on
        how = dict(max_iter=100, line_search_fn="strong_wolfe", tolerance_change=1e-7)
        optimizer = torch.optim.LBFGS((weight, bias), **how)

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(x, weight, bias), labels) + decay / 2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    tried = {}
    for decay in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        stop_if_asked()
        regress(z[rest], y[rest], decay)
        with torch.no_grad():
            tried[decay] = accuracy(F.linear(z[held], weight, bias), y[held])
    best = max(tried, key=tried.get)
    regress(z, y, best)
    with torch.no_grad():
        found = accuracy(F.linear(z_test, weight, bias), y_test)
    return dict(linear_accuracy=found, held_out_accuracy=tried[best], probe_decay=best)


@torch.no_grad()
def knn(z: Tensor, y: Tensor, z_test: Tensor, y_test: Tensor, classes: int, ks=(20, 200)) -> dict[int, float]:
    """Accuracy in % of the vote of the k nearest by cosine, weighted by exp(cosine / 0.07) (arXiv 1805.01978)."""
    z, z_test, votes = F.normalize(z, dim=1), F.normalize(z_test, dim=1), {k: [] for k in ks}
    parts = z_test.split(1000)
    for part in parts[share(len(parts))]:
        similar, index = (part @ z.T).topk(min(max(ks), len(z)), 1)
        weight = (similar / 0.07).exp()
        for k in ks:
            votes[k].append(weight.new_zeros(len(part), classes).scatter_add(1, y[index[:, :k]], weight[:, :k]))
    return {k: accuracy(joined(v, z.device), y_test) for k, v in votes.items()}


def probe_encoder(encoder: nn.Module, images: Images) -> tuple[dict, Tensor, Tensor]:
    """-> the offline figures of an encoder, its features of the training and of the test images."""
    z, z_test = features(encoder, images.train), features(encoder, images.test)
    arguments = (z, images.train_label, z_test, images.test_label, len(images.classes))
    near = knn(*arguments)
    return linear_probe(*arguments) | dict(knn_accuracy=near[200], knn20_accuracy=near[20]), z, z_test


def save_examples(path: Path, cfg: Config, images: Images, batch: Batch, z: Tensor, z_test: Tensor) -> None:
    """What results/draw.py needs: views, some test images with their nearest training images, features for a map."""
    import numpy as np

    as_bytes = lambda x: (255 * x).round().to(torch.uint8).cpu().numpy()
    views = augment(batch.images, batch.augmentation, cfg.crop_size).unflatten(0, (cfg.views, -1))[:, :10]
    whole = F.interpolate(batch.images[:10].float() / 255, views.shape[-2:], mode="area")
    spread = lambda n: torch.arange(0, len(z_test), max(1, len(z_test) // n), device=z_test.device)
    some, shown = spread(8)[:8], spread(1000)  # a folder is sorted by class
    similarity = F.normalize(z_test[some], dim=1) @ F.normalize(z, dim=1).T
    near = similarity.topk(min(9, len(z)), 1).indices
    arrays = dict(views=as_bytes(torch.cat((whole[None], views))), classes=np.array(images.classes))
    arrays |= dict(query=images.test[some].cpu().numpy(), query_label=images.test_label[some].cpu().numpy())
    arrays |= dict(near=images.train[near].cpu().numpy(), near_label=images.train_label[near].cpu().numpy())
    arrays |= dict(features=z_test[shown].half().cpu().numpy(), feature_label=images.test_label[shown].cpu().numpy())
    np.savez_compressed(path, **arrays)


def evaluate(model: Model, cfg: Config, images: Images, batch: Batch, run_dir: Path | None) -> dict:
    """Probes of the trained and of the untrained encoder; examples.npz on the first process (else run_dir is None).
    -> what it adds to the summary."""
    begin = time.perf_counter()
    result, z, z_test = probe_encoder(model.encoder, images)
    with torch.no_grad():
        result |= dict(online_accuracy=accuracy(model.probe(z_test), images.test_label), **collapse_meter(z_test))
    untrained, *_ = probe_encoder(build(cfg, images), images)
    result["random_encoder_accuracy"] = untrained["linear_accuracy"]
    result["random_encoder_knn_accuracy"] = untrained["knn_accuracy"]
    if run_dir:
        save_examples(run_dir / "examples.npz", cfg, images, batch, z, z_test)
    return result | dict(evaluation_seconds=round(time.perf_counter() - begin, 1))


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


def build(cfg: Config, images: Images) -> Encoder:
    """The encoder as it is before training, in eval mode."""
    torch.manual_seed(cfg.seed)
    return Model(cfg, len(images.classes)).encoder.to(images.train.device).eval()


def load(path: str | Path, device: str = "cpu") -> Encoder:
    """The encoder of a checkpoint (file or run folder), in eval mode: `load("runs/image_jepa/cpu-1")(images)`.

    Images [N, 3, H, W], float in [0, 1] -> features [N, F] in float32. Raises UserError for a bad checkpoint."""
    path = Path(path)
    state = load_checkpoint(path / "checkpoint.pt" if path.is_dir() else path, device)
    with fitting(path):
        encoder = Encoder(from_saved(state["config"]))
        mine = {k.removeprefix("encoder."): v for k, v in state["model"].items() if k.startswith("encoder.")}
        encoder.load_state_dict(mine)
    return encoder.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def check(cfg: Config, images: int | None = None) -> Config:
    """Raises UserError for values that cannot work, alone or with so many images."""
    flag = lambda name: "--" + name.replace("_", "-")
    for field in dataclasses.fields(cfg):
        choices = get_args(field.type) if get_origin(field.type) is Literal else ()
        if choices and (value := getattr(cfg, field.name)) not in choices:
            raise UserError(f"{flag(field.name)} {value} is none of {', '.join(map(str, choices))}")
    for name, value in dataclasses.asdict(cfg).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{flag(name)} must be a finite number, got {value}")
            if isinstance(number, (int, float)) and number < 0:
                raise UserError(f"{flag(name)} must not be negative, got {value}")
    for name in "image_size crop_size width patch_size directions epochs lr log_every checkpoint_every".split():
        if not getattr(cfg, name) > 0:
            raise UserError(f"{flag(name)} must be greater than 0, got {getattr(cfg, name)}")
    low, high = cfg.crop_scale
    rules = [
        (cfg.batch_size >= 2, f"--batch-size {cfg.batch_size}: variance needs at least 2 images"),
        (cfg.views >= 2, f"--views {cfg.views}: there is nothing to agree with without a second view"),
        (0 < low <= high <= 1, f"--crop-scale {low} {high}: two parts of an area, the smaller first, in (0, 1]"),
        (max(cfg.grey, cfg.solarise) <= 1, "--grey and --solarise are probabilities, at most 1"),
        (cfg.jitter <= 2.5, f"--jitter {cfg.jitter}: at most 2.5, where a view may turn black"),
        (cfg.knots >= 2, f"--knots {cfg.knots}: an integral needs at least 2 points"),
        (cfg.warmup_epochs <= cfg.epochs, f"--warmup-epochs {cfg.warmup_epochs} is longer than --epochs {cfg.epochs}"),
        (
            not cfg.backbone.startswith("vit") or cfg.crop_size % cfg.patch_size == 0,
            f"--crop-size {cfg.crop_size} does not divide into patches of {cfg.patch_size}",
        ),
        (not (cfg.resume and cfg.overwrite), "--resume and --overwrite exclude each other"),
        (not images or cfg.batch_size <= images, f"--batch-size is larger than the data set of {images} images"),
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
def compiled(cfg: Config, model: Model, batch: Batch, amp: bool):
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
    clock, logged, terms, latents = time.perf_counter(), start, None, None
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
    run_dir: Path, cfg: Config, step: int, steps: int, end: int, values: list, latents: tuple, seconds: float, say
) -> None:
    """One line for people, one object in metrics.jsonl, a warning when latents collapse or views do not agree."""
    z, p = latents
    meter, terms = collapse_meter(z), dict(zip((*TERMS, "loss"), values))
    meter["projection_std"] = p.flatten(0, 1).std(0).mean().item()
    # the part of the projections' variance that is between images, not between views of one
    meter["agreement"] = 1 - (p.var(0).mean() / p.flatten(0, 1).var(0).mean().clamp(min=1e-12)).item()
    rate, lr = cfg.views * cfg.batch_size / max(seconds, 1e-9), learning_rate(cfg, step - 1, steps)
    parts = " ".join(f"{n[:4]} {v:.3f}" for n, v in terms.items() if n != "loss" and v)
    say(
        f"step {step:05d}/{steps} | loss {terms['loss']:.4f} | {parts} | lr {lr:.1e} | {1e3 * seconds:.0f} ms"
        f" | {rate:.0f} views/s | rank {meter['effective_rank']:.0f}/{z.shape[1]} | agree {meter['agreement']:.2f}"
        f" | eta {(end - step) * seconds / 60:.1f}m"
    )
    # thresholds: healthy runs on CIFAR-10 show projections' std 0.6-0.9, rank 0.3-0.5 of the features, agreement
    # 0.2-0.5; SIGReg of weight 0.1 falls to std 0.01, VICReg with variance and covariance 50 to agreement 0.15 or less
    # (results/LOG.md)
    spread = "--variance-weight and --covariance-weight" if cfg.loss == "vicreg" else "--sigreg-weight"
    if meter["projection_std"] < 0.1 or meter["effective_rank"] < 0.03 * z.shape[1] or meter["correlation"] > 0.5:
        found = f"projections' std {meter['projection_std']:.3f}, rank {meter['effective_rank']:.1f}"
        say(f"  collapsing: {found}: raise {spread}")
    elif meter["agreement"] < 0.18 and step > steps * cfg.warmup_epochs / cfg.epochs:
        found = f"views of one image do not agree ({meter['agreement']:.2f})"
        say(f"  {found}: raise --invariance-weight or lower {spread}")
    record = dict(step=step, lr=lr, milliseconds=1e3 * seconds, views_per_second=rate, **terms, **meter)
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
    """Train, probe, draw. -> the summary, also in summary.json. Raises UserError for what a person can mend."""
    check(cfg)
    device, rank, world = start_device(cfg)
    say = tqdm.write if rank == 0 else lambda line: None
    images = load_images(cfg).to(device)
    check(cfg, len(images.train))
    torch.manual_seed(cfg.seed)
    model = Model(cfg, len(images.classes)).to(device)
    optimizer = make_optimizer(model, cfg)
    run_dir = open_run_dir(cfg)
    start, seconds = restore(run_dir / "checkpoint.pt", cfg, model, optimizer, device) if cfg.resume else (0, 0.0)
    if rank == 0:
        write_config(run_dir, cfg, device)
        trim_metrics(run_dir / "metrics.jsonl", start)
    parameters = sum(p.numel() for p in model.encoder.parameters())
    amp = "bf16 autocast" if use_bf16(device) else "float32: no bf16 here"
    say(f"{cfg.preset} | {describe(device)} | {amp} | encoder of {parameters:,} parameters | {run_dir}")
    batches = Batches(cfg, images, model.projections, rank, world)
    steps = max(1, round(cfg.epochs * batches.per_epoch))
    seconds, warmup_seconds = fit(cfg, model, optimizer, batches, steps, start, seconds, run_dir, say)
    done = min(steps, cfg.max_steps or steps)
    summary = dict(
        script=SCRIPT, preset=cfg.preset, seed=cfg.seed, data=cfg.data, loss=cfg.loss, steps=done,
        epochs=round(done / batches.per_epoch, 3), parameters=parameters, device=describe(device),
        torch=torch.__version__, train_seconds=round(seconds, 1), warmup_seconds=round(warmup_seconds, 1),
        images_per_second=round(done * cfg.batch_size * cfg.views / max(seconds, 1e-9), 1),
    )  # fmt: skip
    if cfg.evaluate:
        summary |= evaluate(model, cfg, images, batches(0), run_dir if rank == 0 else None)
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
