"""World-model JEPA: learn what actions do, in latent space, from unlabelled clips; then plan towards a goal image.

A dot moves through two rooms joined by a door. Nothing tells the model what a position, a wall or a door is.

    z_t = encode(o_t)                                   IMPALA CNN or a few strided convolutions, LayerNorm
    y_0 = z_t,  y_k = predict(y_{k-1}, a_{t+k-1})       GRU cell or residual MLP, then the encoder's LayerNorm
    loss = 4 mean_k |y_k - z_{t+k}|^2                   no stop-gradient; collapse is prevented by
         + 16 variance(z) + 8 covariance(z)             (VICReg, arXiv 2105.04906, in kernels/)
         + 12 |slow z_t - slow z_{t+1}|^2               half of the features: smooth in time
         + 16 |inverse(fast z_t, fast z_{t+1}) - a_t|^2 the other half: must tell which action was taken
    plan: argmin over a_1..a_H of sum_t cost(y_t, encode(goal image)), by MPPI or CEM, again every few steps

where |.|^2 is a mean over features. The published recipe (arXiv 2602.03604; preset `paper`) has weight 1 instead of 4
and of the last 16, and takes |y - goal|^2 for the cost. That is blind to walls: a lean planner walks into the corner
nearest the goal. Presets `gpu` and `cpu` differ, still without any label, mainly in this:

1. Half of the latent must be slow (the similarity term), the other half must tell the action (inverse dynamics). Asked
   of all features at once, as published, the two compete, and a small encoder keeps the dot and forgets the door.
2. The cost is the way to go, in px. While the world model trains, psi learns the *largest* metric in which no step is
   longer than its action: the straight line. Afterwards, latents of many walks in the same rooms are joined where psi
   says they are near, the shortest path through that graph is the way round the wall (Isomap, Tenenbaum et al. 2000):

       d(z, z') = |psi(z) - psi(z')| + detour(z, z'),   detour a network that learns what the shortest paths add.

   Beside the door that cost has false minima. Who comes no nearer for twelve steps takes four in a random direction.

Preset cpu: 96-100 % of 100 tasks after 14 minutes on 2 cores (3 seeds, results/); published, on a GPU: 97 +- 2 % of 20.

    python world_model.py                       # preset gpu on CUDA, cpu elsewhere
    python world_model.py --preset paper        # the published sizes, losses and planner
    python world_model.py --ablate variance     # see what a term is for
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
from tqdm import tqdm

from kernels import gru_rollout_cost, use_triton, variance_covariance_loss

SCRIPT = "world_model"
TERMS = ("prediction", "variance", "covariance", "similarity", "inverse_dynamics", "distance", "probe")
METER = ("std_min", "std_mean", "correlation")
PUBLISHED = {  # arXiv 2602.03604, random wall, MPPI, one data-centre GPU
    "success_rate": "97 +- 2 of 20 tasks", "episode_seconds_single": "37",
}  # fmt: skip
Term = Literal["variance", "covariance", "similarity", "inverse-dynamics", "rollout", "distance"]


# ---------------------------------------------------------------------------------------------------- configuration
@dataclass
class Config:
    """Train a latent world model in Two Rooms and plan with it."""

    # Here stand the values of preset gpu.

    preset: Literal["gpu", "paper", "cpu", "smoke"] = "gpu"  # set of defaults; any flag given beside it wins
    seed: int = 0  # of weights and training data
    run_dir: str = ""  # folder of this run; empty: the first free runs/world_model/<preset>-<n>
    resume: bool = False  # go on from the checkpoint in the run folder
    overwrite: bool = False  # empty a run folder that exists
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    compile: bool = True  # torch.compile the loss, forward and backward
    kernels: bool = True  # fused Triton losses and GRU rollouts on NVIDIA GPUs; off: plain PyTorch, module by module
    # data
    fixed_wall: bool = False  # wall at x 32, door at y 18 in every episode; off: both random
    clip_frames: int = 17  # consecutive frames of a training clip
    trajectory_steps: int = 90  # steps of the trajectory that a clip is cut from
    # model
    latent_dim: int = 512  # features of a latent
    channels: tuple[int, int, int] = (16, 32, 32)  # of the three stages of the encoder
    encoder: Literal["impala", "strided"] = "impala"  # strided: one stride-2 convolution a stage, nothing else
    half_resolution: bool = False  # average 2 x 2 pixels of the observation first
    wall_gain: float = 3.0  # contrast of the walls' channel over the published normalisation
    slow_features: int = 256  # features held still by the similarity term; the rest tell the action; 0 = all do both
    predictor: Literal["gru", "residual"] = "residual"  # residual: z + MLP(z, a)
    predictor_width: int = 1024  # hidden units of the residual predictor
    # loss
    rollout: int = 8  # steps predicted open-loop in training
    prediction_weight: float = 4.0  # squared error of the predicted latents
    variance_weight: float = 16.0  # hinge on each feature's standard deviation
    covariance_weight: float = 8.0  # squared off-diagonal covariances
    similarity_weight: float = 12.0  # squared difference of consecutive latents
    inverse_weight: float = 16.0  # inverse dynamics
    ablate: tuple[Term, ...] = ()  # terms to leave out; rollout: predict one step only; distance: needs --cost latent
    # optimisation
    steps: int = 3125  # optimiser steps of the whole schedule
    max_steps: int = 0  # stop after this many steps of it; 0 = off
    batch_size: int = 384  # clips a step, over all processes
    lr: float = 1e-3  # peak of AdamW's learning rate, after 10 % linear warm-up and before cosine decay to 0
    weight_decay: float = 1e-5  # AdamW
    grad_clip: float = 2.0  # largest gradient norm, of each part (encoder, predictor, every head) apart
    # distance, learnt after the world model
    layouts: int = 1500  # rooms whose shortest paths are learnt
    walks: int = 24  # trajectories in each
    join: float = 2.5  # frames nearer than this are neighbours, px; a wall is 3 px thick
    distance_steps: int = 3000  # optimiser steps
    # planner
    planner: Literal["mppi", "cem"] = "mppi"  # mppi: elites weighted by softmax(-cost / temperature); cem: equally
    cost: Literal["distance", "latent"] = "distance"  # learnt way to go (px) or mean squared latent difference
    blocked: float = 0.7  # with cost distance: a step shorter than this part of its action is not taken; 0 = off
    objective: Literal["sum", "last"] = "sum"  # cost of every step of the plan, or of its end
    samples: int = 128  # candidate plans an iteration
    iterations: int = 2  # rounds of sampling
    elites: int = 16  # candidates that shape the next round
    horizon: int = 4  # steps planned ahead
    init_std: float = 1.0  # of the first round's actions, px
    temperature: float = 1.0  # of MPPI's softmax, in units of cost
    action_limit: float = 1.8  # largest action norm, px; 0 = off
    smooth: float = 0.7  # persistence of the sampling noise from one step to the next; 0 = white
    warm_start: bool = True  # begin from what is left of the last plan; keep mean and best plan among the candidates
    execute: Literal["mean", "elite"] = "mean"  # act on the mean plan or on one elite drawn by weight
    replan_every: int = 4  # steps acted before planning anew
    patience: int = 12  # steps without coming 1 px nearer, by the learnt way, before going off at random; 0 = off
    # evaluation and logging
    episodes: int = 1000  # planning tasks
    episode_steps: int = 200  # steps of an episode
    task_seed: int = 12345  # of the planning tasks
    log_every: int = 50  # steps between log lines
    checkpoint_every: int = 500  # steps between checkpoints


PRESETS: dict[str, dict] = {
    "gpu": {},
    "paper": dict(
        wall_gain=1.0, slow_features=0, inverse_weight=1.0, prediction_weight=1.0, predictor="gru", distance_steps=0,
        cost="latent", samples=200, iterations=20, elites=20, horizon=90, init_std=2.0,
        # the reference multiplies costs by 0.005 where a temperature would divide them
        temperature=200.0, action_limit=0.0, smooth=0.0, warm_start=False, execute="elite", replan_every=1,
        patience=0, episodes=20,
    ),
    "cpu": dict(
        latent_dim=128, slow_features=64, channels=(16, 32, 64), encoder="strided", half_resolution=True,
        predictor_width=256, clip_frames=9, batch_size=128, steps=6000, lr=2e-3, samples=64, episodes=100,
        compile=False,  # a minute of compiling saves no time on a CPU (encoder: 40 ms eager, 48 ms compiled)
    ),
    "smoke": dict(
        latent_dim=32, wall_gain=1.0, slow_features=0, inverse_weight=1.0, prediction_weight=1.0, channels=(8, 8, 16),
        encoder="strided", half_resolution=True, predictor_width=64, steps=60, batch_size=32, lr=3e-3, layouts=8,
        distance_steps=30,
        samples=16, iterations=2, elites=4, horizon=6, episodes=6, episode_steps=40, log_every=10, checkpoint_every=20,
        compile=False,
    ),
}  # fmt: skip
PLANNER = {
    "kernels", "planner", "cost", "blocked", "objective", "samples", "iterations", "elites", "horizon", "init_std",
    "temperature", "action_limit", "smooth", "warm_start", "execute", "replan_every", "patience",
}  # fmt: skip
MAY_CHANGE_ON_RESUME = PLANNER | {
    "run_dir", "resume", "overwrite", "device", "compile", "max_steps", "log_every", "checkpoint_every", "episodes",
    "episode_steps", "task_seed",
}  # fmt: skip


class UserError(Exception):
    """What a person can mend: printed as one line, without a traceback."""


def preset(name: str, **overrides) -> Config:
    """The configuration of a preset, with fields replaced: `preset("cpu", seed=1)`."""
    if name not in PRESETS:
        raise UserError(f"--preset {name} is none of {', '.join(PRESETS)}")
    values = {"preset": name, **PRESETS[name]}
    if name == "paper" and overrides.get("planner") == "cem":  # the published CEM has limits of its own
        values |= dict(init_std=1.5, action_limit=2.45, execute="mean")
    return Config(**values | overrides)


# ------------------------------------------------------------------------------------------------------------- data
# Two Rooms, positions (x, y) in px, x to the right, y downwards, pixel centres at integers.
SIZE, LOW, HIGH = 65, 4.0, 60.0  # image side; the dot lives strictly between the borders LOW and HIGH
WALL_HALF, DOOR_HALF = 1.5, 4.0  # the wall is 3 px wide; the door reaches 4 px to either side of its centre
DOT_STD, KEEP_OFF, SUCCESS_PX = 1.3, 0.3, 4.5
MEAN, STD = (0.0026, 0.0989), (0.0369, 0.2986)  # per channel, of observations in [0, 1]


def seeded(generator: torch.Generator, *key) -> torch.Generator:
    """The generator, seeded by a key such as ("clips", seed, step); hashed: on a CPU only 32 bits of a seed count."""
    return generator.manual_seed(zlib.crc32(repr(key).encode()))


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


class Layout(NamedTuple):
    wall_x: Tensor  # [N] centre of the wall, integer px
    door_y: Tensor  # [N] centre of the door, integer px


class Trajectories(NamedTuple):
    position: Tensor  # [N, T + 1, 2] px
    action: Tensor  # [N, T, 2] px a step
    layout: Layout


def random_layout(u: Tensor, fixed_wall: bool = False) -> Layout:
    """Layouts from u [n, 2], uniform in [0, 1): wall x in 20..44, door y in 10..54; or 32 and 18, the fixed wall."""
    if fixed_wall:
        return Layout(*(torch.full_like(u[:, 0], v) for v in (32.0, 18.0)))
    return Layout(20 + (25 * u[:, 0]).floor(), 10 + (45 * u[:, 1]).floor())


def obstacles(layout: Layout) -> tuple[Tensor, Tensor]:
    """Lower and upper corners [N, 6, 2] of all that is solid: four borders, the wall on both sides of the door."""
    x, y = layout
    far = torch.full_like(x, torch.inf)
    low, high = torch.full_like(x, LOW), torch.full_like(x, HIGH)
    wall = (x - WALL_HALF, x + WALL_HALF)
    boxes = [  # x from, x to, y from, y to
        (-far, low, -far, far), (high, far, -far, far), (-far, far, -far, low), (-far, far, high, far),
        (*wall, -far, y - DOOR_HALF), (*wall, y + DOOR_HALF, far),
    ]  # fmt: skip
    x0, x1, y0, y1 = (torch.stack(side, 1) for side in zip(*boxes))
    return torch.stack((x0, y0), 2), torch.stack((x1, y1), 2)


def first_contact(position: Tensor, action: Tensor, boxes: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Where along its action [N, 2] a dot meets an obstacle: fraction [N] (inf = free) and face normal [N, 2].

    The slab method: a segment is inside a box while it is inside both its x and its y interval.
    """
    step = torch.where(action.abs() < 1e-9, 1e-9, action)[:, None]  # [N, 1, 2]; no 0 / 0
    a, b = (boxes[0] - position[:, None]) / step, (boxes[1] - position[:, None]) / step  # [N, 6, 2]
    enter, axis = torch.minimum(a, b).max(2)  # [N, 6]
    leave = torch.maximum(a, b).amin(2)
    # a move that would end a hair before an obstacle counts as meeting it: rounding never puts a dot inside
    hit = (enter < leave) & (leave > 0) & (enter <= 1 + 1e-4)
    fraction, box = torch.where(hit, enter.clamp(min=0), torch.inf).min(1)  # [N]
    along = F.one_hot(axis.gather(1, box[:, None])[:, 0], 2)  # [N, 2]
    return fraction, -torch.sign(action) * along


def move(position: Tensor, action: Tensor, boxes: tuple[Tensor, Tensor], noise: Tensor | None = None) -> Tensor:
    """One step of the dot [N, 2]. A blocked move leaves it where it was (training data, `noise` None) or at the point
    of contact, pushed off the face by |noise| * 0.5 px, at least 0.3 px (evaluation; noise [N], standard normal)."""
    fraction, normal = first_contact(position, action, boxes)
    blocked = torch.isfinite(fraction)[:, None]
    if noise is None:
        return torch.where(blocked, position, position + action)
    contact = position + torch.where(blocked, fraction[:, None], 1.0) * action
    push = (0.5 * noise.abs()).clamp(KEEP_OFF, 2.0)[:, None] * normal  # 2 px: 4 sigma, and never through a door frame
    return torch.where(blocked, (contact + push).clamp(LOW + KEEP_OFF, HIGH - KEEP_OFF), contact)


def random_position(layout: Layout, margin: float, side: Tensor, u: Tensor) -> Tensor:
    """Positions [N, 2] from u [N, 2], uniform in [0, 1): in the left (side 0) or right (side 1) room [N], at least
    `margin` px from walls."""
    low = torch.where(side == 0, LOW, layout.wall_x + WALL_HALF) + margin
    high = torch.where(side == 0, layout.wall_x - WALL_HALF, HIGH) - margin
    return torch.stack((low + u[:, 0] * (high - low), LOW + margin + u[:, 1] * (HIGH - LOW - 2 * margin)), 1)


@functools.cache
def von_mises_table(concentration: float = 5.0, points: int = 4096) -> Tensor:
    """Quantiles of a von Mises angle, for sampling by table look-up (its quantile function has no closed form)."""
    angle = torch.linspace(-math.pi, math.pi, 20001, dtype=torch.float64)
    cdf = torch.exp(concentration * (angle.cos() - 1)).cumsum(0)
    return angle[torch.searchsorted(cdf / cdf[-1], (torch.arange(points) + 0.5) / points)].float()


def random_actions(n: int, steps: int, heading: Tensor, generator: torch.Generator) -> Tensor:
    """Actions [n, steps, 2]: the heading a random walk with von Mises noise from `heading` [n], the length a normal
    (mean 1, std 0.4 px) cut to 0.2..1.8 px."""
    u = torch.rand(2, n, steps, generator=generator, device=generator.device)
    table = von_mises_table().to(u.device)
    turn = table[(u[0] * len(table)).long().clamp(max=len(table) - 1)]
    edge = math.erf(2 / math.sqrt(2))  # the cut lies at two standard deviations
    length = 1 + 0.4 * math.sqrt(2) * torch.erfinv((2 * u[1] - 1) * edge)
    angle = heading[:, None] + turn.cumsum(1)
    return length[..., None] * torch.stack((angle.cos(), angle.sin()), 2)


def trajectories(n: int, steps: int, generator: torch.Generator, fixed_wall=False, per_layout=1) -> Trajectories:
    """n training trajectories, `per_layout` neighbours in the same rooms. 35 % pass the door: two walks from within it,
    in opposite directions, the first run backwards in time (a free move is free both ways; a blocked one stays one)."""
    device, k = generator.device, round(0.35 * n)
    rand = lambda *shape: torch.rand(*shape, generator=generator, device=device)
    layout = Layout(*(x.repeat_interleave(per_layout) for x in random_layout(rand(n // per_layout, 2), fixed_wall)))
    # a room is chosen in proportion to its width, so that starts are uniform over the free space
    room = (rand(n) * (HIGH - LOW - 2 * WALL_HALF) > layout.wall_x - WALL_HALF - LOW).float()
    start, heading = random_position(layout, KEEP_OFF, room, rand(n, 2)), 2 * math.pi * rand(n)
    cross = torch.randperm(n, generator=generator, device=device)[:k]
    door = torch.stack((layout.wall_x[cross], layout.door_y[cross]), 1)
    start[cross] = door + (2 * rand(k, 2) - 1) * torch.tensor([WALL_HALF, DOOR_HALF - KEEP_OFF], device=device)
    heading[cross] = math.pi * (rand(k) < 0.5) + (rand(k) - 0.5) * math.pi / 2
    both = lambda x, y: torch.cat((x, y[cross]))
    action = random_actions(n + k, steps, both(heading, heading + math.pi), generator)
    boxes = tuple(both(side, side) for side in obstacles(layout))
    path = [both(start, start)]
    for t in range(steps):
        path.append(move(path[-1], action[:, t], boxes))
    path = torch.stack(path, 1)  # [n + k, steps + 1, 2]
    path, back, action, back_action = path[:n], path[n:], action[:n], action[n:]
    undo = torch.where((back[:, 1:] == back[:, :-1]).all(2, keepdim=True), back_action, -back_action)
    t = torch.arange(steps + 1, device=device)
    at = torch.randint(0, steps + 1, (k, 1), generator=generator, device=device)
    pick = lambda x, index: x.gather(1, index.clamp(0, x.shape[1] - 1)[..., None].expand(-1, -1, 2))
    later = (t >= at)[..., None]  # `at`: when the dot is in the door
    path[cross] = torch.where(later, pick(path[cross], t - at), pick(back, at - t))
    action[cross] = torch.where(later[:, :-1], pick(action[cross], (t - at)[:, :-1]), pick(undo, (at - t)[:, :-1] - 1))
    return Trajectories(path, action, layout)


def render(position: Tensor, layout: Layout) -> Tensor:
    """Observations [N, T, 2, 65, 65] uint8 (dot, walls) of positions [N, T, 2] in px.

    Only the 10 x 10 pixels round the dot are computed: all others, 5 px and more away, round to zero."""
    N, T, _ = position.shape
    corner = position.floor().clamp(LOW, HIGH - 1) - 4
    window = corner[..., None] + torch.arange(10, device=position.device)  # [N, T, 2, 10] pixels
    blob = torch.exp((window - position[..., None]).square() / (-2 * DOT_STD**2))  # separable
    patch = (255 * blob[:, :, 1, :, None] * blob[:, :, 0, None, :] + 0.5).to(torch.uint8)  # rows are y
    index = (window[:, :, 1, :, None] * SIZE + window[:, :, 0, None, :]).long()
    dot = torch.zeros(N, T, SIZE * SIZE, dtype=torch.uint8, device=position.device)
    dot = dot.scatter(2, index.flatten(2), patch.flatten(2)).view(N, T, SIZE, SIZE)
    pixel = torch.arange(SIZE, device=position.device)
    border = (pixel == LOW) | (pixel == HIGH)
    wall = (pixel - layout.wall_x[:, None]).abs() <= WALL_HALF  # [N, 65]
    door = (pixel - layout.door_y[:, None]).abs() <= DOOR_HALF
    solid = border[:, None] | border | (wall[:, None, :] & ~door[:, :, None])  # [N, 65, 65]
    walls = solid.to(torch.uint8).mul(255)[:, None].expand_as(dot)
    return torch.stack((dot, walls), 2)


class ClipStream:
    """Training batches as a pure function of (seed, step): nothing to save, and a resumed run sees the same clips.

    Trajectories are made for BLOCK steps at once, so that the 90 dependent moves cost little."""

    BLOCK = 16

    def __init__(self, cfg: Config, device: torch.device, rank: int = 0, world: int = 1):
        self.cfg, self.generator, self.block = cfg, torch.Generator(device), None
        self.rank, self.world = rank, world

    def __call__(self, step: int) -> Trajectories:
        cfg, g = self.cfg, self.generator
        block, index = divmod(step, self.BLOCK)
        if block != self.block:
            seeded(g, "clips", cfg.seed, block)
            n, T = self.BLOCK * cfg.batch_size, cfg.trajectory_steps
            self.block, self.data = block, trajectories(n, T, g, cfg.fixed_wall)
            begin = torch.randint(0, T - cfg.clip_frames + 2, (n, 1, 1), generator=g, device=g.device)
            self.frames = (begin + torch.arange(cfg.clip_frames, device=g.device)[:, None]).expand(-1, -1, 2)
        n = cfg.batch_size // self.world
        first = index * cfg.batch_size + self.rank * n
        mine = slice(first, first + n)
        path, action, frames = (x[mine] for x in (self.data.position, self.data.action, self.frames))
        layout = Layout(*(x[mine] for x in self.data.layout))
        return Trajectories(path.gather(1, frames), action.gather(1, frames[:, :-1]), layout)


BLUE, ORANGE, GREY = (0, 114, 178), (230, 159, 0), (120, 120, 120)  # colour-blind safe (Okabe and Ito)


def paint(position: Tensor, goal: Tensor | None, layout: Layout) -> Tensor:
    """RGB pictures [N, 65, 65, 3] uint8 of positions [N, 2]: walls grey, dot blue, goal orange, on white."""
    dot, walls = (render(position[:, None], layout)[:, 0].float() / 255).unbind(1)
    picture = torch.full((*walls.shape, 3), 255.0, device=position.device)
    layers = [(walls, GREY), (dot, BLUE)]
    if goal is not None:
        layers.insert(1, (render(goal[:, None], layout)[:, 0, 0].float() / 255, ORANGE))
    for mask, colour in layers:
        picture = picture + mask[..., None] * (torch.tensor(colour, device=position.device) - picture)
    return picture.round().to(torch.uint8)


class TwoRooms:
    """`batch` Two Rooms tasks side by side, in the manner of gymnasium.

    reset() -> obs [E, 2, 65, 65] uint8, info;   step(actions [E, 2] px) -> obs, reward, terminated, truncated, info
    `info`: tensors position [E, 2], goal [E, 2], wall_x [E], door_y [E], success [E], goal_obs [E, 2, 65, 65].
    Reward is 1 within 4.5 px of the goal, else 0. Nothing terminates; all are truncated after `max_steps`.
    """

    def __init__(self, batch: int, seed: int = 0, fixed_wall=False, max_steps: int = 200, device="cpu"):
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.batch, self.fixed_wall, self.max_steps, self.device = batch, fixed_wall, max_steps, device
        self.tasks, self.noise = torch.Generator(), torch.Generator(device)
        self.seed(seed)

    def seed(self, seed: int) -> None:
        self.tasks.manual_seed(seed)
        self.noise.manual_seed(seed)

    def reset(self, seed: int | None = None) -> tuple[Tensor, dict]:
        """New layouts and tasks: start and goal in different rooms, at least 2.6 px from walls. The first n tasks of a
        seed are the same for any batch and device."""
        if seed is not None:
            self.seed(seed)
        u = torch.rand(self.batch, 7, generator=self.tasks).to(self.device)
        self.layout, room = random_layout(u[:, :2], self.fixed_wall), (u[:, 2] < 0.5).float()
        self.boxes = obstacles(self.layout)
        self.position = random_position(self.layout, 2.6, room, u[:, 3:5])
        self.goal = random_position(self.layout, 2.6, 1 - room, u[:, 5:])
        self.goal_obs, self.t = render(self.goal[:, None], self.layout)[:, 0], 0
        return self.observe()

    def observe(self) -> tuple[Tensor, dict]:
        info = dict(position=self.position, goal=self.goal, **self.layout._asdict(), goal_obs=self.goal_obs)
        info["success"] = (self.position - self.goal).norm(dim=1) < SUCCESS_PX
        return render(self.position[:, None], self.layout)[:, 0], info

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        actions = torch.as_tensor(actions, dtype=torch.float32, device=self.position.device)
        if actions.shape != (self.batch, 2) or not bool(torch.isfinite(actions).all()):
            raise ValueError(f"actions must be finite, of shape {(self.batch, 2)}; got shape {tuple(actions.shape)}")
        noise = torch.randn(self.batch, generator=self.noise, device=actions.device)
        self.position = move(self.position, actions, self.boxes, noise)
        self.t += 1
        obs, info = self.observe()
        ended = torch.zeros_like(info["success"])
        return obs, info["success"].float(), ended, ended | (self.t >= self.max_steps), info

    def render(self) -> Tensor:
        """RGB pictures [E, 65, 65, 3] uint8: walls grey, dot blue, goal orange, on white."""
        return paint(self.position, self.goal, self.layout)


# ------------------------------------------------------------------------------------------------------------ model
def mlp(*sizes: int) -> nn.Sequential:
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Encoder(nn.Module):
    """Observations [N, 2, 65, 65] in 0..255 -> latents [N, D]. impala: the CNN of Espeholt et al. 2018, fig. 3 (arXiv
    1802.01561); strided: one stride-2 convolution and a ReLU a stage."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.half = cfg.half_resolution
        layers, previous, side = [], 2, SIZE // 2 if self.half else SIZE
        for channels in cfg.channels:
            if cfg.encoder == "impala":
                layers += [nn.Conv2d(previous, channels, 3, padding=1), nn.MaxPool2d(3, 2, padding=1)]
                layers += [ResidualBlock(channels), ResidualBlock(channels)]
            else:
                layers += [nn.Conv2d(previous, channels, 3, stride=2, padding=1), nn.ReLU()]
            previous, side = channels, (side + 1) // 2
        self.cnn = nn.Sequential(*layers)
        self.linear = nn.Linear(previous * side * side, cfg.latent_dim)
        self.norm = nn.LayerNorm(cfg.latent_dim)
        self.register_buffer("mean", torch.tensor(MEAN).view(2, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor((STD[0], STD[1] / cfg.wall_gain)).view(2, 1, 1), persistent=False)

    def forward(self, obs: Tensor) -> Tensor:
        x, full = obs, 255
        if self.half:  # sums of slices in int16: a tenth of the time of avg_pool2d on floats, and the same numbers
            x = (x if x.is_floating_point() else x.short())[:, :, : SIZE - 1, : SIZE - 1]  # the last row lies outside
            x, full = x[:, :, ::2] + x[:, :, 1::2], 4 * 255
            x = x[..., ::2] + x[..., 1::2]
        x = (x.float() / full - self.mean) / self.std
        x = self.cnn(x.contiguous(memory_format=torch.channels_last))
        return self.norm(self.linear(F.relu(x).flatten(1)))


class Head(nn.Module):
    """MLP whose last layer is in float32: bf16 is too coarse for distances of tens of px."""

    def __init__(self, *sizes: int):
        super().__init__()
        self.body, self.last = mlp(*sizes[:-1]), nn.Linear(*sizes[-2:])

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.body(x))
        with torch.autocast(h.device.type, enabled=False):
            return self.last(wide(h))


class Detour(nn.Module):
    """What the way from one latent to another is longer than the straight line, in px."""

    def __init__(self, D: int, width: int = 384):
        super().__init__()
        self.here, self.there = nn.Linear(D, width), nn.Linear(D, width)  # apart: one goal serves many states
        self.head = Head(width, width, width, 1)

    def forward(self, z: Tensor, goal: Tensor) -> Tensor:
        h = self.head(F.relu(self.here(z) + self.there(goal)))[..., 0]
        return F.softplus(10 * h, beta=0.2)  # h of about 1 is 10 px; never negative, nearly linear from 10 px on


class WorldModel(nn.Module):
    """Encoder and predictor, trained together, and the heads that read the latents (probe, distance: detached)."""

    def __init__(self, cfg: Config):
        super().__init__()
        D = cfg.latent_dim
        self.encoder = Encoder(cfg).to(memory_format=torch.channels_last)
        self.residual = cfg.predictor == "residual"
        W = cfg.predictor_width
        self.predictor = mlp(D + 2, W, W, D) if self.residual else nn.GRUCell(2, D)
        self.slow = cfg.slow_features
        self.inverse_dynamics = mlp(2 * (D - self.slow), 256, 256, 2)
        self.probe = mlp(D, 512, 4)  # x, y, wall x, door y: (px - 32) / 16
        self.psi = Head(D, 256, 256, 64)
        self.detour = Detour(D)

    def encode(self, obs: Tensor) -> Tensor:
        """Observations [N, 2, 65, 65], uint8 or float in 0..255 -> latents [N, D]."""
        return self.encoder(obs)

    def predict(self, z: Tensor, action: Tensor) -> Tensor:
        """Latents [N, D], actions [N, 2] in px -> next latents [N, D]."""
        if self.residual:
            return self.encoder.norm(z + self.predictor(torch.cat((z, action.to(z.dtype)), -1)))
        return self.encoder.norm(self.predictor(action.to(z.dtype), z))

    def read(self, z: Tensor) -> Tensor:
        """Latents [..., D] -> what the probe sees, in px: x, y, wall x, door y [..., 4]."""
        return 32 + 16 * self.probe(z).float()

    def distance(self, z: Tensor, goal: Tensor, psi: Tensor | None = None) -> Tensor:
        """Latents [..., D], goals that broadcast to them -> the way round the wall, in px [...]; psi(z) if at hand."""
        return metric(self.psi(z) if psi is None else psi, self.psi(goal)) + self.detour(z, goal)


def metric(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distance between embeddings [..., 64] -> [...]; with a gradient at zero."""
    return (wide(a - b).square().sum(-1) + 1e-6).sqrt()


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


def step_metric_loss(psi: Tensor, action: Tensor) -> Tensor:
    """psi [B, T, 64] of clips' frames, actions [B, T - 1, 2] -> scalar.

    The largest metric |psi - psi'| in which no step is longer than its action: frames of a clip are pushed apart, steps
    pulled together. The weight 300 on excess lets steps grow by a few percent."""
    excess = F.relu(metric(psi[:, 1:], psi[:, :-1]) - action.norm(dim=2))
    return 300 * excess.square().mean() - metric(psi[:, :, None], psi[:, None]).mean()


def losses(model: WorldModel, cfg: Config, batch: Trajectories, amp: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """-> total loss (0-d, to differentiate), the terms in the order of TERMS and latents [B T, D] (detached)."""
    (B, T, _), device = batch.position.shape, batch.position.device
    weight = lambda term, of_term: 0.0 if term in cfg.ablate else of_term
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        z = model.encode(render(batch.position, batch.layout).flatten(0, 1)).view(B, T, -1)  # [B, T, D]
        # roll out from every frame that has K successors in the clip, all at once
        K = 1 if "rollout" in cfg.ablate else cfg.rollout
        starts = T - K
        y, prediction = z[:, :starts].flatten(0, 1), 0.0  # [B starts, D]
        for k in range(K):
            y = model.predict(y, batch.action[:, k : k + starts].flatten(0, 1))
            target = z[:, k + 1 : k + 1 + starts].flatten(0, 1)
            prediction = prediction + (wide(y) - wide(target)).square().mean() / K
        fast = z[..., model.slow :]
        action = model.inverse_dynamics(torch.cat((fast[:, :-1], fast[:, 1:]), 2))
        psi = model.psi(z.detach())
        read = wide(model.probe(z.detach()))
    inverse = (wide(action) - batch.action).square().mean()
    slow = wide(z[..., : model.slow or None])
    similarity = (slow[:, 1:] - slow[:, :-1]).square().mean()
    variance, covariance = variance_covariance_loss(gather(wide(z).flatten(0, 1)))
    truth = torch.cat((batch.position, torch.stack(batch.layout, 1)[:, None].expand(-1, T, -1)), 2)
    probe = (read - (truth - 32) / 16).square().mean()
    distance = step_metric_loss(psi, batch.action) if "distance" not in cfg.ablate else torch.zeros_like(probe)
    total = (
        cfg.prediction_weight * prediction
        + weight("variance", cfg.variance_weight) * variance
        + weight("covariance", cfg.covariance_weight) * covariance
        + weight("similarity", cfg.similarity_weight) * similarity
        + weight("inverse-dynamics", cfg.inverse_weight) * inverse
        + probe + 0.1 * distance  # of detached latents: they train probe and psi, and nothing else
    )  # fmt: skip
    terms = torch.stack((prediction, variance, covariance, similarity, inverse, distance, probe)).detach()
    return total, terms, z.detach().flatten(0, 1)


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
    """Linear warm-up over the first tenth of a schedule of `steps`, then cosine to zero."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(model: WorldModel, cfg: Config) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), cfg.lr, weight_decay=cfg.weight_decay, fused=True)


def update(model: WorldModel, cfg: Config, optimizer: torch.optim.Optimizer, lr: float) -> None:
    """One AdamW step; gradients averaged over processes, then clipped module by module."""
    if dist.is_initialized():
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch._utils._flatten_dense_tensors(grads)
        dist.all_reduce(flat.div_(dist.get_world_size()))
        for g, new in zip(grads, torch._utils._unflatten_dense_tensors(flat, grads)):
            g.copy_(new)
    for module in model.children():
        nn.utils.clip_grad_norm_(module.parameters(), cfg.grad_clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# --------------------------------------------------------------------------------------------------------- distance
class Paths(NamedTuple):
    """Shortest paths through experience: from 32 frames of each of L rooms to all n frames of the same rooms."""

    z: Tensor  # [L, n, D] latents of the frames
    source: Tensor  # [L, 32] indices of frames
    length: Tensor  # [L, 32, n] px; NaN = not connected


@torch.no_grad()
def shortest_paths(model: WorldModel, cfg: Config, device: torch.device) -> Paths:
    """Latents of cfg.walks trajectories in each of cfg.layouts rooms (every second frame), each joined with those of
    its 16 nearest that psi finds nearer than cfg.join px; an edge is as long as psi says.

    No walk leads through the wall, and frames on its two sides are over 3 px apart: the shortest path goes round it."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import dijkstra

    g, rooms = seeded(torch.Generator(device), "distance", cfg.seed), []
    for _ in progress(range(cfg.layouts), "shortest paths"):
        stop_if_asked()
        data = trajectories(cfg.walks, cfg.trajectory_steps, g, cfg.fixed_wall, per_layout=cfg.walks)
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(device)):
            z = model.encode(render(data.position[:, ::2], data.layout).flatten(0, 1))  # [n, D]
            psi = model.psi(z).float()
        n = len(z)
        near, to = torch.cdist(psi, psi).topk(min(16, n), 1, largest=False)
        kept = near < cfg.join
        row = torch.arange(n, device=device)[:, None].expand_as(to)
        edges = [x[kept].cpu().numpy() for x in (near, row, to)]
        source = torch.randperm(n, generator=g, device=device)[:32]
        length = dijkstra(csr_matrix((edges[0], edges[1:]), shape=(n, n)), directed=False, indices=source.cpu().numpy())
        length = torch.from_numpy(length).to(device, torch.float16)
        rooms.append((z.to(torch.bfloat16), source, torch.where(length.isfinite(), length, torch.nan)))
    return Paths(*(torch.stack(x) for x in zip(*rooms)))


def fit_distance(model: WorldModel, cfg: Config, device: torch.device, batch: int = 4096) -> float:
    """Teach model.detour what the shortest paths add to the straight line. -> mean absolute error at the end, px, where
    there is a path."""
    torch.manual_seed(cfg.seed)  # start anew, so that a resumed run ends with the same weights
    for layer in model.detour.modules():
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    paths = shortest_paths(model, cfg, device)
    (L, n, _), g = paths.z.shape, seeded(torch.Generator(device), "pairs", cfg.seed)
    optimizer = torch.optim.AdamW(model.detour.parameters(), 1e-3)
    error = torch.zeros((), device=device)
    draw = lambda high: torch.randint(0, high, (batch,), generator=g, device=device)
    for step in progress(range(cfg.distance_steps), "distance"):
        stop_if_asked()
        room, s, i = draw(L), draw(paths.source.shape[1]), draw(n)
        z, goal = paths.z[room, i].float(), paths.z[room, paths.source[room, s]].float()
        length = paths.length[room, s, i].float()
        with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(device)):
            with torch.no_grad():
                straight = metric(model.psi(z), model.psi(goal))
            off = (straight + model.detour(z, goal) - length.nan_to_num()).abs()
        known = ~length.isnan()
        loss = torch.where(known, off, 0.0).mean()  # a NaN in `off` would come back in the gradient
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / cfg.distance_steps))
        optimizer.step()
        error = error.lerp(loss.detach() / known.float().mean().clamp(min=1e-6), 0.01 if step else 1.0)
    return error.item()


# --------------------------------------------------------------------------------------------------------- planning
def imagine(model: WorldModel, cfg: Config, z: Tensor, psi: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Latents [N, D] and their psi [N, 64] after actions [N, 2]. A step that psi finds much shorter than its action has
    met something solid and is not taken, as in the training data: a mean-square predictor sinks into walls."""
    after = model.predict(z, action)
    if cfg.cost == "latent":
        return after, psi
    psi_after = model.psi(after)
    taken = (metric(psi_after, psi) >= cfg.blocked * action.norm(dim=-1))[:, None]
    return torch.where(taken, after.to(z.dtype), z), torch.where(taken, psi_after, psi)


def rollout_cost(model: WorldModel, cfg: Config, state: Tensor, actions: Tensor, goal: Tensor) -> Tensor:
    """Cost [E, S] of actions [E, S, H, 2] from latents [E, D] to goal latents [E, D], all rolled out in one batch."""
    E, S, H, _ = actions.shape
    # the fused kernel knows the GRU and the latent cost; all else goes step by step
    if cfg.kernels and cfg.cost == "latent" and not model.residual:
        gru, norm = model.predictor, model.encoder.norm
        weights = (gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh, norm.weight, norm.bias)
        return gru_rollout_cost(state, actions, goal, *weights, objective=cfg.objective)
    z, goal = state.repeat_interleave(S, 0), goal[:, None]  # [E S, D], [E, 1, D]
    psi, cost = model.psi(z), torch.zeros(E, S, device=z.device)
    for t, action in enumerate(actions.flatten(0, 1).unbind(1)):  # [E S, 2]
        z, psi = imagine(model, cfg, z, psi, action)
        if cfg.objective == "sum" or t == H - 1:
            at = z.unflatten(0, (E, S))
            if cfg.cost == "distance":
                cost = cost + model.distance(at, goal, psi.unflatten(0, (E, S)))
            else:
                cost = cost + (at - goal).float().square().mean(2)
    return cost


def limit_norm(actions: Tensor, limit: float) -> Tensor:
    return actions * (limit / actions.norm(dim=-1, keepdim=True).clamp(min=limit)) if limit else actions


def plan(model, cfg: Config, state: Tensor, goal: Tensor, mean: Tensor, noise, cost_of=rollout_cost):
    """Sampling-based planning from latents [E, D] to goal latents [E, D], from the plan `mean` [E, H, 2] on.

    MPPI (Williams et al. 2017, arXiv 1707.02342) over elites, as in TD-MPC (arXiv 2203.04955), or CEM.
    `noise(torch.randn, ...)` draws [E, ...]; `cost_of(model, cfg, state, actions [E, S, H, 2], goal)` -> [E, S] is the
    place for another cost. -> plan to execute [E, H, 2], mean plan [E, H, 2].
    """
    (E, H, _), S, device = mean.shape, cfg.samples, mean.device
    lag = torch.arange(H, device=device)
    lag = (lag[:, None] - lag).float()
    # smooth noise as one matrix: row t sums the white noise of steps <= t, faded by cfg.smooth a step, to variance 1;
    # the correlation of neighbours comes up to cfg.smooth within a few steps
    ar = torch.where(lag >= 0, cfg.smooth ** lag.clamp(min=0), 0.0)
    ar = ar / ar.norm(dim=1, keepdim=True)
    std = torch.full_like(mean, cfg.init_std)
    best = mean
    for _ in range(cfg.iterations):
        white = noise(torch.randn, S, H, 2)
        actions = mean[:, None] + std[:, None] * torch.einsum("ht,estk->eshk", ar, white)
        if cfg.warm_start:  # never lose what was found; in the first round both are the plan to begin from
            actions[:, 0], actions[:, 1] = mean, best
        actions = limit_norm(actions, cfg.action_limit)
        cost, index = cost_of(model, cfg, state, actions, goal).topk(cfg.elites, dim=1, largest=False)
        elites = actions.gather(1, index[:, :, None, None].expand(-1, -1, H, 2))  # [E, elites, H, 2]
        weight = torch.softmax(-cost / (cfg.temperature if cfg.planner == "mppi" else torch.inf), 1)  # cem: equal
        best, w = elites[:, 0], weight[:, :, None, None]
        mean = (w * elites).sum(1)
        std = (w * (elites - mean[:, None]).square()).sum(1).sqrt().clamp(min=0.05)  # px: the search goes on
    if cfg.execute == "elite":  # the first whose summed weight reaches a uniform number
        drawn = (weight.cumsum(1) < noise(torch.rand, 1)).sum(1).clamp(max=cfg.elites - 1)
        return elites[torch.arange(E, device=device), drawn], mean
    return mean, mean


class Agent:
    """Plans for E episodes at once: `act(obs, goal_obs, steps_left) -> actions [E, 2]`; `reset()` between episodes.

    `shared`: every process calls act() with all E episodes, plans for its share of them and gets the actions of all."""

    def __init__(self, model: WorldModel, cfg: Config, seed: int = 0, shared: bool = False):
        self.model, self.cfg, self.device, self.shared = model.eval(), cfg, next(model.parameters()).device, shared
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.reset()

    def reset(self) -> None:
        """Forget the current plan."""
        self.actions = self.mean = None
        self.age, self.nearest, self.idle = 0, torch.inf, 0

    @torch.no_grad()
    def act(self, obs: Tensor, goal_obs: Tensor, steps_left: int) -> Tensor:
        """Observations and goals [E, 2, 65, 65], uint8 or float in 0..255 -> the next actions [E, 2] in px.

        steps_left: steps to the end of the episode, this one included. Raises ValueError for other shapes or none left.
        """
        obs, goal_obs = (torch.as_tensor(x, device=self.device) for x in (obs, goal_obs))
        if obs.ndim != 4 or obs.shape[1:] != (2, SIZE, SIZE) or goal_obs.shape != obs.shape:
            shapes = f"{tuple(obs.shape)}, {tuple(goal_obs.shape)}"
            raise ValueError(f"obs and goal_obs must be [E, 2, 65, 65], got {shapes}")
        if steps_left < 1:
            raise ValueError(f"steps_left must be at least 1, got {steps_left}")
        if self.mean is not None and len(self.mean) != len(obs):
            raise ValueError(f"a plan for {len(self.mean)} episodes, obs of {len(obs)}: call reset() between batches")
        if self.mean is None or self.age >= min(self.cfg.replan_every, self.mean.shape[1]):
            self.replan(obs, goal_obs, min(self.cfg.horizon, int(steps_left)))
        self.age += 1
        return self.actions[:, self.age - 1]

    def replan(self, obs: Tensor, goal_obs: Tensor, horizon: int) -> None:
        mean = torch.zeros(len(obs), horizon, 2, device=self.device)
        if self.cfg.warm_start and self.mean is not None:
            kept = self.mean[:, self.age : self.age + horizon]
            mean[:, : kept.shape[1]] = kept
        mine = share(len(obs)) if self.shared else slice(None)
        # drawn for all episodes, then cut: how many processes share them does not change a plan
        noise = lambda law, *shape: law(len(obs), *shape, generator=self.generator, device=self.device)[mine]
        impatient = self.cfg.patience and self.cfg.cost == "distance"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=use_bf16(self.device)):
            state, goal = self.model.encode(torch.cat((obs[mine].float(), goal_obs[mine].float()))).float().chunk(2)
            parts = [*plan(self.model, self.cfg, state, goal, mean[mine], noise)]
            parts += [self.model.distance(state, goal)] if impatient else []
        if self.shared:
            parts = [joined([part], self.device) for part in parts]
        self.actions, self.mean, *to_go = parts
        if impatient:
            self.actions = self.wander(*to_go, self.actions)
        self.age = 0

    def wander(self, to_go: Tensor, actions: Tensor) -> Tensor:
        """Plans [E, H, 2] of episodes that are to_go [E] px from the goal; those stuck go off in a random direction.

        Stuck: in cfg.patience steps to_go never fell 1 px below the nearest so far. Both are then forgotten."""
        nearer = to_go < self.nearest - 1
        self.nearest = torch.where(nearer, to_go, self.nearest)
        self.idle = torch.where(nearer, 0, self.idle + self.age)
        stuck = (self.idle >= self.cfg.patience) & (to_go > SUCCESS_PX)
        self.nearest, self.idle = self.nearest.where(~stuck, torch.inf), self.idle.where(~stuck, 0)
        angle = 2 * math.pi * torch.rand(len(to_go), 1, generator=self.generator, device=self.device)
        away = torch.stack((angle.cos(), angle.sin()), 2) * (self.cfg.action_limit or 1.0)  # [E, 1, 2]
        return torch.where(stuck[:, None, None], away, actions)


# ------------------------------------------------------------------------------------------------------- evaluation
def wilson(successes: int, n: int, z: float = 1.96) -> list[float]:
    """95 % interval of a proportion (Wilson 1927), in percent."""
    if n == 0:
        return [0.0, 100.0]
    p, z2 = successes / n, z * z / n
    middle, half = (p + z2 / 2) / (1 + z2), z / (1 + z2) * math.sqrt(p * (1 - p) / n + z2 / n / 4)
    return [round(100 * max(0.0, middle - half), 2), round(100 * min(1.0, middle + half), 2)]


@torch.no_grad()
def evaluate_unroll(model: WorldModel, cfg: Config, device: torch.device, n: int = 256) -> dict:
    """Open-loop prediction on n unseen trajectories: errors by horizon 1..T, beside the copy of the first frame."""
    g = seeded(torch.Generator(device), "unroll", cfg.task_seed)
    data = trajectories(n, cfg.trajectory_steps, g, cfg.fixed_wall)
    with torch.autocast(device.type, torch.bfloat16, enabled=use_bf16(device)):
        z = torch.stack([model.encode(render(p[:, None], data.layout)[:, 0]) for p in data.position.unbind(1)], 1)
        y = [z[:, 0]]
        for a in data.action.unbind(1):
            y.append(model.predict(y[-1], a))
        y = torch.stack(y, 1).float()  # [n, T + 1, D]
        decoded, seen = model.read(y), model.read(z)  # [n, T + 1, 4]
    z, truth = z.float(), data.position
    by_step = lambda x: [round(v, 4) for v in x.mean(0).tolist()]
    error = lambda p: (p - truth).norm(dim=2)
    return dict(
        position_error_px=by_step(error(decoded[..., :2])[:, 1:]),
        copy_error_px=by_step(error(truth[:, :1])[:, 1:]),
        latent_error=by_step((y - z).square().mean(2)[:, 1:]),
        copy_latent_error=by_step((z[:, :1] - z).square().mean(2)[:, 1:]),
        probe_error_px=round(error(seen[..., :2]).mean().item(), 4),
        example=Trajectories(truth[:6].cpu(), data.action[:6].cpu(), Layout(*(x[:6].cpu() for x in data.layout))),
        decoded=decoded[:6].cpu(),
    )


class Episodes(NamedTuple):
    position: Tensor  # [E, T + 1, 2]
    goal: Tensor  # [E, 2]
    layout: Layout
    plans: list  # per step, positions [shown, steps left of it, 2] of the plan as the probe reads it; empty: none shown
    seconds: float  # spent in the policy

    def near(self) -> Tensor:  # [E, T + 1], within reach of the goal
        return (self.position - self.goal[:, None]).norm(dim=2) < SUCCESS_PX


@torch.no_grad()
def run_episodes(cfg: Config, episodes: int, policy, device: torch.device, shown: int = 0) -> Episodes:
    """All tasks side by side under `policy(obs, info, steps_left) -> actions`; an Agent also shows its plans. Every
    process moves all dots."""
    agent = policy if isinstance(policy, Agent) else None
    env = TwoRooms(episodes, cfg.task_seed, cfg.fixed_wall, cfg.episode_steps, device)
    obs, info = env.reset()
    path, plans, seconds = [info["position"]], [], 0.0
    for t in progress(range(cfg.episode_steps), "planning"):
        stop_if_asked()
        left = cfg.episode_steps - t
        synchronize(device)
        begin = time.perf_counter()
        action = agent.act(obs, info["goal_obs"], left) if agent else policy(obs, info, left)
        synchronize(device)
        seconds += time.perf_counter() - begin
        if agent and shown:
            z, plan_path = agent.model.encode(obs[:shown]), []
            psi = agent.model.psi(z)
            for a in agent.actions[:shown, agent.age - 1 :].unbind(1):
                z, psi = imagine(agent.model, cfg, z, psi, a)
                plan_path.append(agent.model.read(z)[:, :2].cpu())
            plans.append(torch.stack(plan_path, 1))
        obs, _, _, _, info = env.step(action)
        path.append(info["position"])
    return Episodes(torch.stack(path, 1).cpu(), env.goal.cpu(), Layout(*(x.cpu() for x in env.layout)), plans, seconds)


def straight_line(obs: Tensor, info: dict, steps_left: int) -> Tensor:
    """Floor that knows the positions but not the wall: as far as 2.45 px a step towards the goal."""
    return limit_norm(info["goal"] - info["position"], 2.45)


def evaluate_planning(model: WorldModel, cfg: Config, device: torch.device) -> tuple[dict, dict[str, Episodes]]:
    """Success of the agent and of two floors on cfg.episodes tasks, which depend on cfg.task_seed alone."""
    E, g = cfg.episodes, seeded(torch.Generator(device), "random actions", cfg.task_seed)

    def random_policy(obs, info, steps_left):
        angle = 2 * math.pi * torch.rand(E, generator=g, device=device)
        return 2.45 * torch.stack((angle.cos(), angle.sin()), 1)

    runs = dict(
        agent=run_episodes(cfg, E, Agent(model, cfg, shared=True), device, shown=min(E, 6)),
        random=run_episodes(cfg, E, random_policy, device),
        straight=run_episodes(cfg, E, straight_line, device),
    )
    single = run_episodes(cfg, 1, Agent(model, cfg), device)
    percent = lambda x: round(100 * x.float().mean().item(), 2)
    near = runs["agent"].near()
    return dict(
        success_rate=percent(near[:, -1]),
        success_rate_any=percent(near.any(1)),
        success_interval=wilson(int(near[:, -1].sum()), E),
        success_interval_any=wilson(int(near.any(1).sum()), E),
        episodes=E,
        random_success_rate=percent(runs["random"].near()[:, -1]),
        straight_line_success_rate=percent(runs["straight"].near()[:, -1]),
        failed_tasks=(~near[:, -1]).nonzero()[:, 0].tolist(),
        episode_seconds=round(runs["agent"].seconds / E, 4),
        episode_seconds_single=round(single.seconds, 4),
    ), runs


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


def load(path: str | Path, device: str = "cpu", **planner) -> Agent:
    """The agent of a checkpoint (file or run folder): `load("runs/world_model/cpu-1", samples=256).act(obs, goal, 9)`.

    `planner`: any planner field of Config. Raises UserError for a bad checkpoint, TypeError for an unknown option.
    """
    path = Path(path)
    state = load_checkpoint(path / "checkpoint.pt" if path.is_dir() else path, device)
    if unknown := set(planner) - PLANNER:
        raise TypeError(f"not a planner option: {', '.join(sorted(unknown))}")
    with fitting(path):
        cfg = check(dataclasses.replace(from_saved(state["config"]), **planner))
        model = WorldModel(cfg).to(device)
        model.load_state_dict(state["model"])
    return Agent(model, cfg)


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
    positive = """clip_frames trajectory_steps latent_dim predictor_width rollout steps lr grad_clip samples iterations
        elites horizon init_std temperature replan_every layouts walks join wall_gain episode_steps log_every
        checkpoint_every"""
    for name in positive.split():
        if not getattr(cfg, name) > 0:
            raise UserError(f"{flag(name)} must be greater than 0, got {getattr(cfg, name)}")
    rules = [
        (cfg.batch_size >= 2, f"--batch-size {cfg.batch_size}: variance needs at least 2 clips"),
        (min(cfg.channels) > 0, f"--channels must be greater than 0, got {cfg.channels}"),
        (cfg.latent_dim > 1, "--latent-dim must be at least 2"),
        (cfg.rollout < cfg.clip_frames, f"--rollout {cfg.rollout} does not fit in --clip-frames {cfg.clip_frames}"),
        (cfg.clip_frames <= cfg.trajectory_steps + 1, f"--clip-frames {cfg.clip_frames} is longer than the trajectory"),
        (cfg.elites <= cfg.samples, f"--elites {cfg.elites} is more than --samples {cfg.samples}"),
        (cfg.samples >= 2, f"--samples {cfg.samples}: planning needs at least 2"),
        (cfg.slow_features < cfg.latent_dim, "--slow-features leaves none of --latent-dim to tell the action"),
        (cfg.smooth < 1, f"--smooth must be below 1, got {cfg.smooth}"),
        (not (cfg.resume and cfg.overwrite), "--resume and --overwrite exclude each other"),
        (cfg.cost == "latent" or cfg.distance_steps, "--distance-steps 0 needs --cost latent"),
        (cfg.cost == "latent" or "distance" not in cfg.ablate, "--ablate distance needs --cost latent"),
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
def compiled(cfg: Config, model: WorldModel, batch: Trajectories, amp: bool):
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
    cfg: Config, model: WorldModel, optimizer, batches, steps: int, start: int, seconds: float, run_dir: Path, say
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
    run_dir: Path, cfg: Config, step: int, steps: int, end: int, values: list, latents: Tensor, seconds: float, say
) -> None:
    """One line for people, one object in metrics.jsonl, and a warning when the latents collapse."""
    meter, terms = collapse_meter(latents), dict(zip((*TERMS, "loss"), values))
    rate, lr = cfg.batch_size / max(seconds, 1e-9), learning_rate(cfg, step - 1, steps)
    parts = " ".join(f"{n[:4]} {v:.3f}" for n, v in terms.items() if n != "loss")
    say(
        f"step {step:05d}/{steps} | loss {terms['loss']:.4f} | {parts} | lr {lr:.1e} | {1e3 * seconds:.0f} ms"
        f" | {rate:.0f} clips/s | rank {meter['effective_rank']:.0f}/{latents.shape[1]}"
        f" | eta {(end - step) * seconds / 60:.1f}m"
    )
    if meter["std_min"] < 0.05 or meter["effective_rank"] < 0.03 * cfg.latent_dim:
        found = f"smallest std {meter['std_min']:.3f}, rank {meter['effective_rank']:.1f}"
        say(f"  collapsing: {found}: raise --variance-weight")
    elif meter["correlation"] > 0.5:
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
    torch.manual_seed(cfg.seed)
    model = WorldModel(cfg).to(device)
    optimizer = make_optimizer(model, cfg)
    run_dir = open_run_dir(cfg)
    start, seconds = restore(run_dir / "checkpoint.pt", cfg, model, optimizer, device) if cfg.resume else (0, 0.0)
    if rank == 0:
        write_config(run_dir, cfg, device)
        trim_metrics(run_dir / "metrics.jsonl", start)
    parameters = sum(p.numel() for p in model.parameters())
    amp = "bf16 autocast" if use_bf16(device) else "float32: no bf16 here"
    say(f"{cfg.preset} | {describe(device)} | {amp} | {parameters:,} parameters | {run_dir}")
    clips = ClipStream(cfg, device, rank, world)
    seconds, warmup_seconds = fit(cfg, model, optimizer, clips, cfg.steps, start, seconds, run_dir, say)
    done = min(cfg.steps, cfg.max_steps or cfg.steps)
    summary = dict(
        script=SCRIPT, preset=cfg.preset, seed=cfg.seed, steps=done, parameters=parameters, device=describe(device),
        torch=torch.__version__, train_seconds=round(seconds, 1), warmup_seconds=round(warmup_seconds, 1),
        clips_per_second=round(done * cfg.batch_size / max(seconds, 1e-9), 1),
    )  # fmt: skip
    if rank == 0 and cfg.cost == "distance" and cfg.distance_steps:
        begin = time.perf_counter()
        summary["distance_error_px"] = round(fit_distance(model, cfg, device), 3)
        took = round(time.perf_counter() - begin, 1)
        summary |= dict(distance_seconds=took, train_seconds=round(seconds + took, 1))
        say(f"distance: {summary['distance_error_px']:.1f} px off the shortest paths of {cfg.layouts} rooms | {took} s")
        save_checkpoint(run_dir, cfg, model, optimizer, done, seconds)
    if dist.is_initialized():
        for p in model.detour.parameters():  # learnt by the first process alone; the others wait here
            dist.broadcast(p.data, 0)
    summary |= evaluate(model.eval(), cfg, device, run_dir if rank == 0 else None)
    if rank == 0:
        finish(run_dir, summary, device, say)
    return summary


def save_examples(path: Path, example: Trajectories, decoded: Tensor, runs: dict[str, Episodes]) -> None:
    """What results/draw.py needs: trajectories and what is read from their prediction; the episodes of the agent."""
    import numpy as np

    room = lambda layout: torch.stack(tuple(layout), 1)  # [N, 2] wall x, door y
    arrays = dict(unroll_position=example.position, unroll_wall=room(example.layout), unroll_read=decoded)
    if runs:
        agent = runs["agent"]
        arrays |= dict(position=agent.position, goal=agent.goal, wall=room(agent.layout))
        plans = torch.full(
            (len(agent.plans), *agent.plans[0].shape[:1], max(p.shape[1] for p in agent.plans), 2), torch.nan
        )
        for t, plan in enumerate(agent.plans):
            plans[t, :, : plan.shape[1]] = plan
        arrays |= dict(plans=plans) | {f"near_{k}": 100 * run.near().float().mean(0) for k, run in runs.items()}
    np.savez_compressed(path, **{name: array.float().cpu().numpy() for name, array in arrays.items()})


def evaluate(model: WorldModel, cfg: Config, device: torch.device, run_dir: Path | None) -> dict:
    """Unrolling, planning; examples.npz on the first process (elsewhere run_dir is None). -> what the summary gains."""
    begin = time.perf_counter()
    unroll = evaluate_unroll(model, cfg, device)
    stop_if_asked()
    example, decoded = unroll.pop("example"), unroll.pop("decoded")
    batch = ClipStream(cfg, device)(0)  # all clips of the first step, on every process
    with torch.no_grad():
        result = collapse_meter(model.encode(render(batch.position, batch.layout).flatten(0, 1))) | unroll
    planning, runs = evaluate_planning(model, cfg, device) if cfg.episodes else ({}, {})
    result |= planning | dict(evaluation_seconds=round(time.perf_counter() - begin, 1))
    if run_dir:
        save_examples(run_dir / "examples.npz", example, decoded, runs)
    return result


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
    first.add_argument("--planner", nargs="?", default=argparse.SUPPRESS, const="mppi")
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
