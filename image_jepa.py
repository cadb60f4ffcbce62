"""Image JEPA: features of unlabelled images, from the agreement between augmented views of the same image.

    x_1 .. x_V = augment(image)                          views: random crops, colours and flips
    z_v = encode(x_v),  p_v = project(z_v)               a ResNet or ViT, then an MLP with P outputs
    loss = a * mean over pairs of |p_u - p_v|^2 / P      invariance: views of one image agree
         + 2 (b * variance(p) + c * covariance(p))       but not all images: VICReg (arXiv 2105.04906), --loss vicreg
      or + s * sigreg(p)                                 or SIGReg (arXiv 2511.08544), --loss sigreg; both in kernels/

Variance, covariance and SIGReg are those of each view, averaged over views.

There is no predictor, stop-gradient, moving average or mask. The projector serves the loss alone; what the features z
are worth is measured with labels that the encoder never sees: by a linear classifier and by nearest neighbours.

    python image_jepa.py                                # CIFAR-10
    python image_jepa.py --data path/to/images          # a folder of images, see read_folder
    python image_jepa.py --preset paper --loss sigreg   # the published recipe (arXiv 2602.03604)
    torchrun --nproc_per_node=2 image_jepa.py           # several GPUs

Preset cpu: 73.1-73.9 % by linear probe after ten minutes on two CPU cores (CIFAR-10 as JPEG copy; three seeds;
untrained 44 %). Published, 300 epochs of a ResNet-18 on a GPU: 90.1 % (VICReg), 91.0 % (SIGReg).
"""

import argparse
import collections
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
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, ShuffleSplit
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.distributed.nn.functional import all_gather  # with a gradient
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.models import VisionTransformer, resnet18
from torchvision.models.resnet import BasicBlock, conv1x1
from torchvision.transforms.functional import rgb_to_grayscale
from tqdm.contrib.concurrent import thread_map

from kernels import Muon, sigreg_loss, use_triton, variance_covariance_loss

SCRIPT = "image_jepa"
DIRECTIONS, KNOTS = 256, 10  # of SIGReg: random directions, new ones in each step; points of its integral
FORMAT = "nanojepa/image_jepa/3"  # of a checkpoint


class UserError(ValueError):
    """A mistake in settings, data or files that the user can mend: shown as one line, without a traceback."""


# ---------------------------------------------------------------------------------------------------- configuration
@dataclasses.dataclass
class Config:
    """Learn features of unlabelled images."""

    # These values are preset paper, the published recipe; the command line starts from gpu or cpu.
    preset: Literal["gpu", "paper", "cpu", "smoke"] = "paper"  # set of defaults; every other flag overrides it
    seed: int = 0  # of weights, batches and views
    run_dir: str = ""  # folder of this run; empty: runs/image_jepa/<preset>-<date>-<time>
    resume: bool = False  # go on with the run in run_dir; if that is empty, with the newest of the preset
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    compile: bool = True  # torch.compile the loss, augmentation included
    bf16: bool = True  # networks in bfloat16 in training; for GPUs before Ampere --no-bf16
    kernels: bool = True  # fused Triton losses on NVIDIA GPUs; off: plain PyTorch
    # data
    data: str = "cifar10"  # cifar10, digits (of scikit-learn, no files), or a folder of images
    data_dir: str = "data"  # where the downloaded CIFAR-10 lies, in torchvision's layout
    image_size: int = 32  # side of digits and of the images of a folder, which are resized, px
    # views
    views: int = 2  # of each image in a step
    crop_size: int = 32  # side of a view, px
    crop_scale: tuple[float, float] = (0.2, 1.0)  # smallest and largest part of the image's area in a view
    jitter: float = 1.0  # of colours, in 80 % of views; 1: brightness, contrast +-40 %, saturation 20 %, hue 0.1 turns
    grey: float = 0.2  # probability that a view loses its colours
    solarise: float = 0.1  # probability that a view's bright pixels are inverted
    # model
    backbone: Literal["resnet18", "small", "vit_s", "vit_b"] = "resnet18"  # small: a slim ResNet, for CPUs
    stem_padding: int = 2  # of resnet18's first convolution, px
    width: int = 64  # channels of small's first stage
    patch_size: int = 8  # of the ViTs, px
    projector_width: int = 2048  # features of the projector's two hidden layers; 0 = no projector
    projector_out: int = 0  # its output features; 0 = 2048 for vicreg, 128 for sigreg
    # loss
    loss: Literal["vicreg", "sigreg"] = "vicreg"  # what prevents collapse
    invariance_weight: float = 1.0  # mean squared difference of two views' projections
    variance_weight: float = 1.0  # vicreg: hinge loss on the standard deviation of each projected feature
    covariance_weight: float = 80.0  # vicreg: squared off-diagonal covariances of projected features
    sigreg_weight: float = 10.0  # sigreg: distance of random directions' distribution from a Gaussian
    # optimisation
    optimizer: Literal["lars", "muon"] = "lars"  # usual --lr: 0.3, 0.02-0.05
    epochs: float = 300.0  # passes over the images
    max_steps: int = 0  # stop after this many steps of the schedule; 0 = off
    batch_size: int = 256  # images a step, over all processes
    lr: float = 0.3  # peak learning rate
    warmup_epochs: float = 10.0  # linear warm-up, before a cosine decay to zero
    schedule: Literal["epoch", "step"] = "epoch"  # the learning rate changes once an epoch or in each step
    weight_decay: float = 1e-4  # none on biases and norms
    # evaluation and logging
    evaluate: bool = True  # probe the features at the end, if the data have labels
    log_every: int = 50  # steps between log lines
    save_every: float = 60.0  # seconds between checkpoints, at log lines

    def __post_init__(self):
        if min(self.batch_size, self.views) < 2 or min(self.log_every, self.epochs, self.lr) <= 0:
            raise UserError("--batch-size and --views must be at least 2; --log-every, --epochs and --lr positive")
        if not 0 <= self.seed < 2**63:
            raise UserError("--seed must be at least 0 and below 2^63")
        if self.backbone.startswith("vit") and self.crop_size % self.patch_size:
            raise UserError(f"--crop-size {self.crop_size} does not divide into patches of {self.patch_size} px")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise UserError("--crop-scale takes two parts of an area, the smaller first, above 0 and at most 1")


# What gpu, cpu and smoke have in common.
FAST = dict(variance_weight=2.5, covariance_weight=40.0, stem_padding=1)
FAST |= dict(optimizer="muon", lr=0.02, weight_decay=0.01, schedule="step")
CPU = dict(FAST, backbone="small", projector_width=512, projector_out=256, bf16=False, compile=False)
CPU_VIEWS = dict(views=4, crop_size=20, crop_scale=(0.2, 0.75), jitter=1.4, grey=0.25)
DIGITS = dict(data="digits", crop_size=24, crop_scale=(0.6, 1.0), jitter=2.0, grey=0.5, solarise=0.3, log_every=25)
PRESETS: dict[str, dict] = {
    "gpu": dict(FAST, views=4, crop_size=24, crop_scale=(0.15, 0.8), epochs=150, warmup_epochs=3),  # not tuned yet
    "paper": {},
    "cpu": dict(CPU, **CPU_VIEWS, lr=0.05, batch_size=128, epochs=5.2, warmup_epochs=0.3),
    "smoke": dict(
        CPU | DIGITS, width=24, projector_width=64, projector_out=64, batch_size=64, epochs=2, warmup_epochs=0.2
    ),
}
MAY_CHANGE_ON_RESUME = {"run_dir", "resume", "device", "compile", "bf16", "kernels", "data_dir", "max_steps"}
MAY_CHANGE_ON_RESUME |= {"evaluate", "log_every", "save_every"}


def preset(name: str, **overrides) -> Config:
    """The configuration of a preset, with some fields replaced: `preset("cpu", seed=1)`."""
    return Config(**{"preset": name, **PRESETS[name], **overrides})


# ------------------------------------------------------------------------------------------------------------- data
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # of CIFAR-10's channels, as published


class Images(NamedTuple):
    train: Tensor  # [N, 3, S, S] uint8
    train_labels: Tensor  # [N] int64
    test: Tensor  # [M, 3, S, S] uint8
    test_labels: Tensor  # [M] int64
    classes: list[str]  # a single one, if the images have no labels; M may be 0 then


def load_images(cfg: Config) -> Images:
    """The data set of cfg.data, all of it in memory. A new one is a branch here, with its MEAN and STD."""
    if cfg.data == "digits":
        return draw_digits(cfg.image_size)
    if cfg.data != "cifar10":
        return read_folder(Path(cfg.data), cfg.image_size)
    try:
        train, test = (CIFAR10(cfg.data_dir, train=part, download=True) for part in (True, False))
    except (OSError, RuntimeError, EOFError) as error:  # no network, or a damaged file
        remedy = f"put {CIFAR10.url} into {cfg.data_dir}/, or use --data digits"
        raise UserError(f"CIFAR-10 is not in {cfg.data_dir} and cannot be downloaded ({error}): {remedy}") from None
    pixels = lambda part: torch.from_numpy(part.data).movedim(3, 1).contiguous()  # [N, 3, 32, 32]
    labels = lambda part: torch.tensor(part.targets)
    return Images(pixels(train), labels(train), pixels(test), labels(test), train.classes)


def find_images(folder: Path) -> list[Path]:
    """Image files of a folder, then of those below it, each in alphabetical order. Prints what else is left out."""
    images, others, visited = [], collections.Counter(), {folder.resolve(), *folder.resolve().parents}
    for parent, folders, files in os.walk(folder, followlinks=True):
        hidden = {name for name in [*folders, *files] if name.startswith(".") or name == "__MACOSX"}
        folders[:] = [name for name in sorted(set(folders) - hidden) if Path(parent, name).resolve() not in visited]
        visited |= {Path(parent, name).resolve() for name in folders}  # a link back to one of these is not followed
        others.update(["hidden"] * len(hidden))
        for path in (Path(parent, name) for name in sorted(set(files) - hidden)):
            if path.suffix.lower() in IMG_EXTENSIONS:
                images.append(path)
            else:
                others[path.suffix or "without extension"] += 1
    if others:
        print(f"{folder}: left out " + ", ".join(f"{n} {kind}" for kind, n in others.most_common()))
    return images


def read_folder(root: Path, size: int) -> Images:
    """A folder of images, each cut to its central square and resized.

    With labels: train/<class>/* and test/<class>/* (or val/<class>/*), the same classes in both. Without: train/* or
    simply *, with or without folders below."""
    parts = [root / name for name in ("train", "test", "val") if (root / name).is_dir()][:2]
    if root / "train" not in parts:
        parts = [root]
    files = [(part, path) for part in parts for path in find_images(part)]
    n = sum(part == parts[0] for part, _ in files)
    if not n:
        raise UserError(f"--data {root}: no images there, and it is neither cifar10 nor digits")
    read = lambda path: decode(path, size)
    pixels = thread_map(read, [path for _, path in files], desc="reading images", leave=False, disable=None)
    if unreadable := [reason for reason in pixels if isinstance(reason, str)]:
        listed = "".join(unreadable)
        raise UserError(f"{len(unreadable)} files cannot be read as images: remove them and start again{listed}")
    names = [path.relative_to(part).parts[0] if path.parent != part else "" for part, path in files]  # of classes
    if n == len(files) or "" in names:
        reason = f"{files[names.index('')][1]} lies in no class folder" if "" in names else "there is no test/ or val/"
        print(f"{root}: {reason}, so the images count as unlabelled: no linear probe, no kNN")
        names = ["unlabelled"] * len(files)
    elif differ := set(names[:n]) ^ set(names[n:]):
        raise UserError(f"--data {root}: only one of train and {parts[1].name} has images of {sorted(differ)}")
    classes = sorted(set(names))
    pixels, labels = torch.stack(pixels), torch.tensor([classes.index(name) for name in names])
    return Images(pixels[:n], labels[:n], pixels[n:], labels[n:], classes)


def decode(path: Path, size: int) -> Tensor | str:
    """The central square of an image file [3, size, size] uint8, upright, RGB, on white; or why it cannot be read."""
    Image.MAX_IMAGE_PIXELS = None  # photos of any size: these files are the user's own
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)  # a copy
        if image.mode.startswith(("I", "F")):  # grey of more than 8 bits
            grey = np.nan_to_num(np.asarray(image, float)).clip(0)
            # the full scale is not in the file: 1 (floats), 8, 12, 16 or 32 bits, whichever holds the brightest pixel
            scale = next((s for s in (1, 255, 4095, 65535, 2**32 - 1) if grey.max() <= s), grey.max())
            image = Image.fromarray((255 / scale * grey).round().astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        square = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(square)).movedim(2, 0)
    except Exception as error:  # PIL raises many kinds for a damaged file
        return f"\n  {path} ({type(error).__name__}: {error})"


def draw_digits(size: int) -> Images:
    """Scikit-learn's handwritten digits, each four times in random light colours on dark ones; always the same."""
    data, g = load_digits(), torch.Generator().manual_seed(0)
    ink = F.interpolate(torch.from_numpy(data.images / 16)[:, None], size, mode="bilinear").float()  # [1797, 1, S, S]
    dark, light = torch.rand(2, 4, len(ink), 3, 1, 1, generator=g) / 2
    pixels = (255 * torch.lerp(dark, light + 0.5, ink)).to(torch.uint8)  # [4, 1797, 3, S, S]
    labels = torch.from_numpy(data.target).expand(4, -1)
    train = pixels[:, :1500].flatten(0, 1), labels[:, :1500].flatten()
    test = pixels[:, 1500:].flatten(0, 1), labels[:, 1500:].flatten()
    return Images(*train, *test, [str(digit) for digit in range(10)])


# ----------------------------------------------------------------------------------------------------- augmentation
def augment(images: Tensor, cfg: Config) -> Tensor:
    """Images [B, 3, S, S] uint8 -> a random view of each [B, 3, crop_size, crop_size] in [0, 1]: torchvision's
    RandomResizedCrop, RandomHorizontalFlip, ColorJitter, RandomGrayscale and RandomSolarize, drawn for each image."""
    B, S = len(images), images.shape[-1]
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(B, *shape, device=images.device)
    chance = lambda p: uniform(0, 1, 1, 1, 1) < p  # [B, 1, 1, 1]
    # the first of ten random boxes that fits into the image; if none does, the whole image
    area, log_ratio = S * S * uniform(*cfg.crop_scale, 10), uniform(-math.log(4 / 3), math.log(4 / 3), 10)
    boxes = torch.stack((area * torch.exp(-log_ratio), area * torch.exp(log_ratio)), 2).sqrt().round().clamp(min=1)
    boxes = F.pad(boxes, (0, 0, 0, 1), value=S)  # [B, 11, 2] height, width; the eleventh is the whole image
    sides = boxes[torch.arange(B, device=images.device), (boxes <= S).all(2).int().argmax(1)]  # [B, 2]
    corner = (uniform(0, 1, 2) * (S - sides + 1)).floor()  # [B, 2] top, left
    x = crop(images.float() / 255, corner, sides, cfg.crop_size)
    x = torch.where(chance(0.5), x.flip(3), x)
    strength = cfg.jitter * (uniform(0, 1, 1) < 0.8)
    factor = lambda limit: 1 + strength * uniform(-limit, limit, 1)
    factors = torch.cat((factor(0.4), factor(0.4), factor(0.2), factor(0.1) - 1), 1)  # hue is shifted, not multiplied
    x = jitter_colours(x, factors, order=uniform(0, 1, 4).argsort(1))
    x = torch.where(chance(cfg.grey), rgb_to_grayscale(x), x)
    return torch.where(chance(cfg.solarise) & (x >= 0.5), 1 - x, x)


def crop(images: Tensor, corner: Tensor, sides: Tensor, out: int) -> Tensor:
    """Boxes of images [B, 3, S, S], their corner (top, left) and sides [B, 2] in whole px -> [B, 3, out, out].

    Bilinear and antialiased: two matrices for each image say how much of a pixel goes into each row and column."""
    scale = sides[..., None] / out  # [B, 2, 1]
    centre = corner[..., None] + (torch.arange(out, device=images.device) + 0.5) * scale  # [B, 2, out]
    pixel = torch.arange(images.shape[-1], device=images.device) + 0.5
    weight = (1 - (pixel - centre[..., None]).abs() / scale[..., None].clamp(min=1)).clamp(min=0)  # [B, 2, out, S]
    weight = weight * ((pixel > corner[..., None]) & (pixel < (corner + sides)[..., None]))[:, :, None]
    rows, columns = (weight / weight.sum(3, keepdim=True)).unbind(1)
    return (rows[:, None] @ images @ columns.mT[:, None]).clamp(0, 1)


def jitter_colours(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] after colour operations. factors [B, 4]: of brightness, contrast and saturation
    (1 changes nothing), shift of the hue in turns. order [B, 4]: the operations in the order in which they apply."""
    BRIGHTNESS, CONTRAST, _, HUE = range(4)  # columns of factors; the third is saturation
    for operation in order[..., None, None].split(1, 1):  # [B, 1, 1, 1]
        factor = factors[..., None, None].gather(1, operation)
        # brightness, contrast and saturation blend with black, with the mean grey and with the grey image
        grey = rgb_to_grayscale(x)
        neutral = torch.where(operation == CONTRAST, grey.mean((1, 2, 3), keepdim=True), grey)
        neutral = torch.where(operation == BRIGHTNESS, 0, neutral)
        blended = (factor * x + (1 - factor) * neutral).clamp(0, 1)
        x = torch.where(operation == HUE, shift_hue(x, factor), blended)
    return x


def shift_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1], the hue of HSV shifted by `shift` turns, of any shape that broadcasts."""
    red, green, blue = x.split(1, 1)
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    safe = torch.where(chroma == 0, 1, chroma)
    hue = torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    hue = torch.where(value == red, (green - blue) / safe, hue) + 6 * shift  # in sixths of a turn
    k = (torch.arange(5, 0, -2, device=x.device).view(3, 1, 1) + hue) % 6  # HSV -> RGB: 5, 3, 1 for red, green, blue
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def make_batch(cfg: Config, images: Images, step: int, rank: int = 0, world: int = 1) -> tuple[Tensor, Tensor]:
    """This process's share of a batch, images and labels: a function of (seed, step), in a new order every epoch."""
    epoch, n = divmod(step, len(images.train) // cfg.batch_size)
    order = np.random.default_rng((cfg.seed, epoch)).permutation(len(images.train))
    index = order[n * cfg.batch_size : (n + 1) * cfg.batch_size][rank::world]
    index = torch.from_numpy(index).to(images.train.device, non_blocking=True)
    return images.train[index], images.train_labels[index]


# ------------------------------------------------------------------------------------------------- model and its loss
def make_backbone(cfg: Config) -> tuple[nn.Module, int]:
    """A module [N, 3, H, W] -> [N, F], and F. A new one is a branch here, and a name in Config.backbone."""
    if cfg.backbone == "resnet18":  # for small images: a 3x3 stem of stride 1, and no max-pooling
        net = resnet18()
        net.conv1 = nn.Conv2d(3, 64, 3, padding=cfg.stem_padding, bias=False)
        net.maxpool = net.fc = nn.Identity()
        return net, 512
    if cfg.backbone in ("vit_s", "vit_b"):
        dim = 384 if cfg.backbone == "vit_s" else 768
        net = VisionTransformer(cfg.crop_size, cfg.patch_size, 12, dim // 64, dim, 4 * dim)
        net.heads = nn.Identity()
        return net, dim
    W = cfg.width
    stem = nn.Conv2d(3, W, 4, 2, 1, bias=False), nn.BatchNorm2d(W), nn.ReLU()
    blocks = [BasicBlock(W, W)]  # two 3x3 convolutions and a shortcut (He et al. 2016, arXiv 1512.03385)
    for inputs in (W, 2 * W):  # these halve the sides and double the channels
        shortcut = nn.Sequential(conv1x1(inputs, 2 * inputs, 2), nn.BatchNorm2d(2 * inputs))
        blocks.append(BasicBlock(inputs, 2 * inputs, 2, shortcut))
    last = conv1x1(4 * W, 8 * W), nn.BatchNorm2d(8 * W), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*stem, *blocks, *last), 8 * W


class Encoder(nn.Module):
    """Images [N, 3, H, W], uint8 or floats in [0, 1] -> features [N, F]."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.backbone, self.feature_dim = make_backbone(cfg)

    def forward(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        elif not self.training and not (-0.5 <= images.min() and images.max() <= 1.5):  # resizing may overshoot
            raise ValueError("images must be uint8, or floats in [0, 1] that are not normalised yet")
        if isinstance(self.backbone, VisionTransformer):  # it takes images of one size only, that of the views
            images = F.interpolate(images, self.backbone.image_size, mode="bilinear", antialias=True)
        images = (images - self.mean) / self.std
        return self.backbone(images.contiguous(memory_format=torch.channels_last))  # a sixth faster on CPUs


class Model(nn.Module):
    """Encoder and projector, trained together, and the online probe, which reads detached features."""

    def __init__(self, cfg: Config, classes: int):
        super().__init__()
        self.encoder = Encoder(cfg)
        W, P = cfg.projector_width, cfg.projector_out or (2048 if cfg.loss == "vicreg" else 128)
        layer = lambda inputs: [nn.Linear(inputs, W), nn.BatchNorm1d(W), nn.ReLU()]
        self.projector = nn.Identity()
        if W > 0:
            self.projector = nn.Sequential(*layer(self.encoder.feature_dim), *layer(W), nn.Linear(W, P))
        self.probe = nn.Linear(self.encoder.feature_dim, classes)


def losses(model: Model, cfg: Config, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Images [B, 3, S, S] uint8, labels [B] -> the loss (a scalar), its terms (detached), features of all views
    [V B, F] (detached). The labels train the online probe, which teaches the encoder nothing.

    Another anti-collapse loss: a branch here, a name in Config.loss, and a weight."""
    views = [augment(images, cfg) for _ in range(cfg.views)]
    with torch.autocast(images.device.type, torch.bfloat16, enabled=cfg.bf16):
        z = [model.encoder(view) for view in views]  # one by one: batch statistics are those of a view, as published
        p = torch.stack([model.projector(features) for features in z])  # [V, B, P]
        logits = model.probe(z[0].detach())
    if cfg.bf16:
        p, logits = p.float(), logits.float()
    invariance = 2 * p.var(0).mean()  # over pairs of views, the mean of (a - b)^2 is twice the variance
    probe = F.cross_entropy(logits, labels)
    loss = cfg.invariance_weight * invariance + probe
    terms = dict(invariance=invariance, probe=probe, projection_std=p.flatten(0, 1).std(0).mean())
    # projections of each view, from all processes: a list of [B, P]
    gathered = [torch.cat(all_gather(view)) if dist.is_initialized() else view for view in p]
    if cfg.loss == "vicreg":
        per_view = torch.stack([torch.stack(variance_covariance_loss(view)) for view in gathered])  # [V, 2]
        variance, covariance = 2 * per_view.mean(0)  # the published loss sums over its two views
        loss = loss + cfg.variance_weight * variance + cfg.covariance_weight * covariance
        terms |= dict(variance=variance, covariance=covariance)
    elif cfg.loss == "sigreg":
        directions = F.normalize(torch.randn(p.shape[2], DIRECTIONS, dtype=p.dtype, device=p.device), dim=0)
        sigreg = torch.stack([sigreg_loss(view, directions, knots=KNOTS) for view in gathered]).mean()
        loss = loss + cfg.sigreg_weight * sigreg
        terms |= dict(sigreg=sigreg)
    return loss, {name: term.detach() for name, term in dict(loss=loss, **terms).items()}, torch.cat(z).detach()


@torch.no_grad()
def collapse_meter(z: Tensor) -> dict[str, float]:
    """How spread features [N, F] are around their mean: effective rank, exp of the entropy of the normalised singular
    values (RankMe, arXiv 2210.02885); smallest and mean standard deviation of a feature; mean |correlation| of two."""
    z = z.cpu().double()
    std = z.std(0)
    p = F.normalize(torch.linalg.eigvalsh(torch.cov(z.T)).clamp(min=0).sqrt(), p=1, dim=0)
    correlation = torch.corrcoef(z.T).nan_to_num().fill_diagonal_(0).abs().sum() / (len(std) * (len(std) - 1))
    rank = torch.special.entr(p).sum().exp()
    values = dict(effective_rank=rank, std_min=std.min(), std_mean=std.mean(), correlation=correlation)
    return {name: value.item() for name, value in values.items()}


# ----------------------------------------------------------------------------------------------------- optimisation
def learning_rate(cfg: Config, step: int, per_epoch: int) -> float:
    """Linear warm-up from a ten-thousandth of the rate, then cosine to zero; it changes every epoch or every step."""
    unit = per_epoch if cfg.schedule == "epoch" else 1
    warmup, end = cfg.warmup_epochs * per_epoch / unit, cfg.epochs * per_epoch / unit
    n = max(0, step // unit - 1)  # one epoch or step late, as published
    if n < warmup:
        return cfg.lr * (1e-4 + (1 - 1e-4) * min(1, n / max(1, warmup - 1)))
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (n - warmup) / (end - warmup)))


class LARS(torch.optim.SGD):
    """Momentum SGD with a learning rate for each matrix, relative to its norm (You et al. 2017, arXiv 1708.03888).

    A matrix w with gradient g moves by min(lr, eta |w| / (|g| + decay |w|)) times g + decay w, before momentum: lr is
    an upper bound. Vectors take plain steps, without weight decay."""

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.9, eta: float = 0.02):
        self.decay, self.eta = weight_decay, eta
        super().__init__(params, lr, momentum)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for w in [w for w in group["params"] if w.ndim > 1]:
                norm, gradient_norm = w.norm(), w.grad.norm()
                ratio = self.eta * norm / (gradient_norm + self.decay * norm + 1e-8) / group["lr"]  # SGD multiplies it
                scaled = (w.grad + self.decay * w) * ratio.clamp(max=1)
                w.grad = torch.where((norm > 0) & (gradient_norm > 0), scaled, w.grad)
        super().step()


def make_optimizers(model: Model, cfg: Config) -> list[tuple[float, torch.optim.Optimizer]]:
    """Pairs of a factor of the learning rate and an optimiser. Muon (kellerjordan.github.io/posts/muon) orthogonalises
    the steps of matrices and convolutions; vectors take Adam's."""
    if cfg.optimizer == "lars":
        return [(1.0, LARS(model.parameters(), cfg.lr, cfg.weight_decay))]
    matrices = [p for p in model.parameters() if p.ndim > 1 and len(p) > 1]
    others = [p for p in model.parameters() if p.ndim == 1 or len(p) == 1]  # [1, ..]: position embedding of a ViT
    return [(1.0, Muon(matrices, weight_decay=cfg.weight_decay)), (0.1, torch.optim.Adam(others, betas=(0.9, 0.98)))]


# ------------------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def extract_features(encoder: Encoder, images: Tensor) -> Tensor:
    """Whole images [N, 3, S, S] uint8 -> features [N, F] on the CPU, by an encoder in eval mode."""
    batches = images.split(max(1, 500 * 32**2 // images.shape[-1] ** 2))  # half a million pixels each
    return torch.cat([encoder(batch.to(encoder.mean.device)).cpu() for batch in batches])


def accuracies(z: np.ndarray, y: np.ndarray, z_test: np.ndarray, y_test: np.ndarray) -> tuple[float, float]:
    """Of classifiers on features z [N, F] with labels y [N], on test images, in %: linear probe, a logistic regression
    with the best of three weight decays on held-out training images; kNN, a vote of the 20 nearest with weights
    exp(cosine / 0.07) (arXiv 1805.01978)."""
    held_out = ShuffleSplit(1, test_size=min(5000, max(1, len(y) // 10)), random_state=0)
    strengths = dict(C=[1 / (decay * len(y)) for decay in (1e-2, 1e-3, 1e-4)])  # C: inverse of the weight decay
    logistic = LogisticRegression(tol=1e-3, max_iter=1000)
    linear = make_pipeline(StandardScaler(), GridSearchCV(logistic, strengths, cv=held_out))
    knn = KNeighborsClassifier(min(20, len(y)), weights=lambda distance: np.exp(-distance / 0.07), metric="cosine")
    score = lambda classifier: round(100 * classifier.fit(z, y).score(z_test, y_test), 2)
    return score(linear), score(knn)


def evaluate(model: Model, cfg: Config, images: Images) -> dict[str, float]:
    """Of labelled images: accuracies in % of the encoder's features, of those before training, of the online probe."""
    torch.manual_seed(cfg.seed)  # as at the beginning of training
    untrained = Encoder(cfg).to(images.train.device).eval()
    y, y_test = images.train_labels.cpu().numpy(), images.test_labels.cpu().numpy()
    result = {}
    for prefix, encoder in (("untrained_", untrained), ("", model.encoder)):
        z, z_test = extract_features(encoder, images.train), extract_features(encoder, images.test)
        linear, knn = accuracies(z.numpy(), y, z_test.numpy(), y_test)
        result |= {prefix + "linear_accuracy": linear, prefix + "knn_accuracy": knn}
    correct = model.probe(z_test.to(images.test.device)).argmax(1) == images.test_labels  # z_test of model.encoder
    return result | dict(online_accuracy=round(100 * correct.float().mean().item(), 2))


def make_examples(model: Model, cfg: Config, images: Images) -> dict[str, np.ndarray]:
    """For figures: some images and their views; some test (else training) images and those nearest to them."""
    evenly = lambda x, n: x[torch.linspace(0, len(x) - 1, n).long()]  # n rows: a folder is sorted by class
    pictures = evenly(images.train, 10)
    views = (255 * torch.stack([augment(pictures, cfg) for _ in range(cfg.views)])).round().to(torch.uint8)
    pool, labels = (images.test, images.test_labels) if len(images.test) else (images.train, images.train_labels)
    z = F.normalize(extract_features(model.encoder, pool))
    nearest = (evenly(z, 8) @ z.T).topk(min(10, len(z))).indices.to(pool.device)  # [8, 10], itself first
    arrays = dict(images=pictures, views=views, nearest=pool[nearest], nearest_labels=labels[nearest])
    return {name: array.cpu().numpy() for name, array in arrays.items()} | dict(classes=np.array(images.classes))


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


def load(path: str | Path, device: str = "cpu") -> Encoder:
    """The encoder of a run folder or checkpoint file, in eval mode. Raises UserError if it is missing or damaged."""
    state = read_checkpoint(Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path))
    encoder = Encoder(Config(**state["config"]))
    weights = {name.removeprefix("encoder."): x for name, x in state["model"].items() if name.startswith("encoder.")}
    encoder.load_state_dict(weights)
    return encoder.to(device).eval().requires_grad_(False)


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
    images = load_images(cfg)
    if world > 1 and local_rank == 0:
        dist.barrier()
    images = Images(*(tensor.to(device) for tensor in images[:4]), images.classes)
    if cfg.batch_size > len(images.train):
        raise UserError(f"--batch-size {cfg.batch_size} is more than the {len(images.train)} training images")
    torch.manual_seed(cfg.seed)
    model = Model(cfg, len(images.classes)).to(device)
    if world > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if device.type != "cuda" and any(isinstance(part, nn.SyncBatchNorm) for part in model.modules()):
            raise UserError("batch norm over several processes needs GPUs")
    optimizers = make_optimizers(model, cfg)
    per_epoch = len(images.train) // cfg.batch_size
    steps = max(1, round(cfg.epochs * per_epoch))  # of the whole schedule
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
    parameters = sum(p.numel() for p in model.encoder.parameters())
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    if rank == 0:
        run_dir.mkdir(parents=True, exist_ok=cfg.resume)  # two runs that start together never share a folder
        (run_dir / "config.json").write_text(json.dumps(vars(cfg), indent=1))
        print(f"{cfg.preset} | {hardware} | encoder of {parameters:,} parameters | {run_dir}")

    torch.compiler.reset()  # many trainings in one process would reach the limit of recompilations
    mode = "reduce-overhead" if device.type == "cuda" and world == 1 else "default"  # CUDA graphs, not many launches
    compute_loss = torch.compile(losses, fullgraph=world == 1, dynamic=False, mode=mode) if cfg.compile else losses
    log_step, log_time, save_time = start, time.perf_counter(), time.perf_counter()
    for step in range(start, end):
        if cfg.compile:
            torch.compiler.cudagraph_mark_step_begin()  # a graph may overwrite the last step's tensors
        # so views and SIGReg's directions depend on (seed, step) alone; all processes draw the same numbers
        torch.manual_seed(hash((cfg.seed, step)) % 2**32)  # Python's hash of integers is always the same
        loss, terms, z = compute_loss(model, cfg, *make_batch(cfg, images, step, rank, world))
        loss.backward()
        if world > 1:
            for p in model.parameters():
                dist.all_reduce(p.grad.div_(world))  # the mean
        lr = learning_rate(cfg, step, per_epoch)
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
            meter = collapse_meter(z)
            with open(run_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps(dict(step=done, lr=lr, milliseconds=milliseconds, **values, **meter)) + "\n")
            text += f" | {milliseconds:.0f} ms | rank {meter['effective_rank']:.1f}/{z.shape[1]}"
            print(f"step {done:05d}/{steps} | {text} | {(end - done) * milliseconds / 6e4:.1f} min left", flush=True)
            if values["projection_std"] < 0.1 or meter["effective_rank"] < 0.03 * min(z.shape):
                print(f"  collapse: the features hardly differ; raise the weights of --loss {cfg.loss}")
            if done == end or signals or time.perf_counter() - save_time > cfg.save_every:
                # batches, views and learning rates are functions of (seed, step): this is enough for an exact resume
                state = dict(format=FORMAT, config=vars(cfg), step=done, seconds=seconds)
                state |= dict(model=model.state_dict(), optimizers=[part.state_dict() for _, part in optimizers])
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
    summary |= dict(loss=cfg.loss, epochs=round(end / per_epoch, 3))
    model.eval()
    if cfg.evaluate:
        sample = images.train[:: max(1, len(images.train) // 2048)]  # of all classes: a folder is sorted by class
        summary |= collapse_meter(extract_features(model.encoder, sample))
        if len(images.classes) > 1:
            summary |= evaluate(model, cfg, images)
        np.savez_compressed(run_dir / "examples.npz", **make_examples(model, cfg, images))
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
        sys.exit("error: out of memory: choose a smaller --batch-size, --crop-size or --image-size")
    except torch._dynamo.exc.TorchDynamoException as error:
        sys.exit(f"error: torch.compile failed: try --no-compile ({str(error).splitlines()[0]})")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
