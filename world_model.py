"""World-model JEPA: learn what actions do, in latent space, from unlabelled walks; then plan towards a goal image.

A dot moves through two rooms joined by a door. Nothing tells the model what a position, a wall or a door is.

    z_t = encode(o_t)                                    a convolutional network, then layer norm
    y_0 = z_0,  y_k = predict(y_{k-1}, a_{k-1})          a GRU cell or a residual MLP, then the encoder's layer norm
    loss = w_p mean_k |y_k - z_k|^2                      prediction, K steps open-loop, without stop-gradient
         + w_v variance(z) + w_c covariance(z)           against collapse: VICReg (arXiv 2105.04906), in kernels/
         + w_s |z_t - z_{t+1}|^2                         similarity: latents change slowly
         + w_i |inverse(z_t, z_{t+1}) - a_t|^2           inverse dynamics: latents tell which action was taken
         + w_d |n - d(y, g)|                             n steps from y_0 and from y_K to other places g, and the
         + w_d |(n_K - n_0) - (d_K - d_0)|               change from y_0 to y_K; not in preset paper
    plan: argmin over a_0 .. a_{H-1} of sum_k cost(y_k, encode(goal image)), by MPPI or CEM, every few steps

where |.|^2 is a mean over features. The published recipe (preset paper, arXiv 2602.03604) takes |y - goal|^2 for the
cost, which does not see the wall. The other presets learn the distance d(y, goal): the number n of steps between two
frames, by the shortest path through the walks in these rooms (see shortest_paths). They do without similarity: to be
slow and to tell the action are demands that compete.

    python world_model.py                                        # train, then plan
    python world_model.py --preset paper                         # the published recipe
    torchrun --nproc_per_node=2 world_model.py                   # several GPUs

Preset cpu: 99.1-99.8 % of 1,000 tasks after 9 minutes on two CPU cores, 0.17 s an episode (straight line 42 %).
Published, on a GPU: 97 % of 20 tasks (mean of three seeds and their last three epochs), 37 s an episode.
"""

import argparse
import dataclasses
import functools
import io
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra
from scipy.stats import binomtest
from torch import Tensor
from torch.distributed.nn.functional import all_gather  # with a gradient
from tqdm import trange

from kernels import CudaGraphs, Muon, gru_rollout_cost, use_triton, variance_covariance_loss

SCRIPT = "world_model"
FORMAT = "nanojepa/world_model/5"  # of a checkpoint


class UserError(ValueError):
    """A mistake in settings, data or files that the user can mend: shown as one line, without a traceback."""


# ---------------------------------------------------------------------------------------------------- configuration
@dataclasses.dataclass
class Config:
    """Train a latent world model in Two Rooms and plan with it."""

    # These values are preset paper, the published recipe; the command line starts from gpu or cpu.
    preset: Literal["gpu", "paper", "cpu", "smoke"] = "paper"  # set of defaults; every other flag overrides it
    seed: int = 0  # of weights, walks and the order of clips
    run_dir: str = ""  # folder of this run; empty: runs/world_model/<preset>-<date>-<time>
    resume: bool = False  # go on with the run in run_dir; if that is empty, with the newest of the preset
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    compile: bool = True  # torch.compile the loss
    bf16: bool = True  # networks in bfloat16 in training; for GPUs before Ampere --no-bf16
    kernels: bool = True  # fused Triton losses and rollouts on NVIDIA GPUs; off: plain PyTorch
    # data
    walks: int = 100000  # number of random walks, of 90 frames each
    walks_per_layout: int = 1  # successive walks that have their wall and door in the same places
    clip_frames: int = 17  # successive frames of a training clip
    # model
    encoder: Literal["impala", "strided"] = "impala"  # strided: for CPUs, at half resolution, one convolution a stage
    channels: tuple[int, int, int] = (16, 32, 32)  # of the three stages of the encoder
    latent_dim: int = 512  # features of a latent
    predictor: Literal["gru", "residual"] = "gru"  # residual: z + MLP(z, a)
    # loss
    cost: Literal["latent", "distance"] = "latent"  # of plans; distance: learnt steps to go, from other walks
    rollout: int = 8  # steps predicted open-loop (K)
    prediction_weight: float = 1.0  # mean squared error of predicted latents
    variance_weight: float = 16.0  # hinge loss on the standard deviation of each feature
    covariance_weight: float = 8.0  # squared off-diagonal covariances
    similarity_weight: float = 12.0  # mean squared difference of successive latents
    inverse_weight: float = 1.0  # mean squared error of the action that inverse dynamics reads from two latents
    distance_weight: float = 0.2  # absolute error of the number of steps to a goal, and of its change over the clip
    # optimisation
    steps: int = 3120  # optimiser steps of the whole schedule
    max_steps: int = 0  # stop after this many steps of the schedule; 0 = off
    batch_size: int = 384  # clips a step, over all processes
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for matrices; the rest by Adam at a tenth of its rate
    lr: float = 1e-3  # peak learning rate, after linear warm-up over the first tenth and before a cosine decay to 1e-5
    # planning
    planner: Literal["mppi", "cem"] = "mppi"  # mppi: weighs the elites, takes one of them; cem: takes their mean
    samples: int = 200  # plans drawn in each iteration
    iterations: int = 20  # of sampling, for each plan
    elites: int = 20  # plans of least cost, from which the next iteration's mean is made
    horizon: int = 90  # steps planned ahead
    init_std: float = 2.0  # of actions in the first iteration, px; published for cem 1.5
    action_limit: float = 0.0  # largest norm of an action, px; 0 = off; published for cem 2.45
    replan_every: int = 1  # steps taken before the next plan
    # evaluation and logging
    episodes: int = 100  # random planning tasks; the twenty published ones come on top; 0 = no evaluation
    log_every: int = 50  # steps between log lines
    save_every: float = 60.0  # seconds between checkpoints, at log lines

    def __post_init__(self):
        if self.batch_size < 2 or min(self.rollout, self.steps, self.log_every, self.lr, self.horizon) <= 0:
            raise UserError("--batch-size: at least 2; --rollout, --steps, --log-every, --lr and --horizon: positive")
        if not 0 <= self.seed < 2**63:
            raise UserError("--seed must be at least 0 and below 2^63")
        if not self.rollout < self.clip_frames < FRAMES:
            raise UserError(f"--clip-frames must be more than --rollout and less than {FRAMES}")
        if not 1 < self.elites <= self.samples or self.iterations < 1:
            raise UserError("--elites must be at least 2, and at most --samples; --iterations at least 1")
        if self.walks_per_layout < 1 or self.walks % self.walks_per_layout or self.walks < self.batch_size:
            raise UserError("--walks must be a multiple of --walks-per-layout, and at least --batch-size")
        if self.cost == "distance" and self.walks_per_layout < 8:
            raise UserError("--cost distance is learnt from many walks between the same walls: --walks-per-layout 32")


# What gpu, cpu and smoke have in common.
FAST = dict(cost="distance", walks=36000, walks_per_layout=32, predictor="residual", optimizer="muon", lr=0.02)
FAST |= dict(prediction_weight=4.0, similarity_weight=0.0, inverse_weight=16.0, planner="cem", replan_every=4)
FAST |= dict(samples=64, iterations=2, elites=8, horizon=4, init_std=1.0, action_limit=1.8)
CPU = dict(FAST, encoder="strided", channels=(16, 32, 64), latent_dim=128)
CPU |= dict(clip_frames=5, rollout=4, batch_size=256, bf16=False, compile=False)
PRESETS: dict[str, dict] = {
    "gpu": dict(FAST, steps=6000),  # not tuned yet
    "paper": {},  # the values of Config: the published recipe
    "cpu": dict(CPU, steps=4000),
    "smoke": dict(CPU, walks=128, walks_per_layout=16, channels=(8, 8, 16), latent_dim=32),
}
PRESETS["smoke"] |= dict(steps=60, batch_size=32, episodes=6, log_every=10)
MAY_CHANGE_ON_RESUME = {"run_dir", "resume", "device", "compile", "bf16", "kernels", "max_steps"}
MAY_CHANGE_ON_RESUME |= {"planner", "samples", "iterations", "elites", "horizon", "init_std", "action_limit"}
MAY_CHANGE_ON_RESUME |= {"replan_every", "episodes", "log_every", "save_every"}


def preset(name: str, **overrides) -> Config:
    """The configuration of a preset, with some fields replaced: `preset("cpu", seed=1)`."""
    return Config(**{"preset": name, **PRESETS[name], **overrides})


# ------------------------------------------------------------------------------------------------------ environment
# Two Rooms: positions (x, y) in px, x to the right and y downwards, pixel centres at integers. A layout is the middle
# of the door, in whole px: x of the wall and y of the door.
SIZE, LOW, HIGH = 65, 4.0, 60.0  # side of an observation; the borders
WALL_HALF, DOOR_HALF = 1.0, 4.0  # from the middle of the wall to its faces, from that of the door to its edges
KEEP_OFF = 0.3  # a stopped dot that would end on a face or beyond is put so many px inside
DOT_STD = 1.3
SUCCESS_PX, EPISODE_STEPS = 4.5, 200  # a task is solved if the dot is that near to the goal after so many steps


class Tasks(NamedTuple):
    layout: Tensor  # [E, 2] px
    start: Tensor  # [E, 2] px
    goal: Tensor  # [E, 2] px


def move(position: Tensor, action: Tensor, layout: Tensor, noise: Tensor | None = None) -> Tensor:
    """Positions [N, 2] of dots after actions [N, 2], by the published law.

    With noise, as in episodes, a blocked move ends at the contact plus half the noise, px: away from the face by its
    size, and along the face as it is, so that the dot slides. noise [N, 2, 2] holds standard normal numbers (x, y) for
    contacts with vertical faces, and others for horizontal ones. Without noise, as in the published training walks, a
    blocked move does not happen at all."""
    wall, door = layout.unbind(1)
    (x, y), (dx, dy) = position.unbind(1), action.unbind(1)
    left = x < wall
    low = torch.stack((torch.where(left, LOW, wall + WALL_HALF), torch.full_like(x, LOW)), 1)
    high = torch.stack((torch.where(left, wall - WALL_HALF, HIGH), torch.full_like(x, HIGH)), 1)
    # times, as parts of the step, at which the dot would meet the faces ahead and the edge of the doorway
    x_time, y_time = ((torch.where(action > 0, high, low) - position) / action).unbind(1)
    edge_time = (door + DOOR_HALF * dy.sign() - y) / dy
    through_door = ((dx > 0) == left) & ((y + x_time * dy - door).abs() <= DOOR_HALF)
    from_inside = ((y - door).abs() <= DOOR_HALF) & ((x + edge_time * dx - wall).abs() <= WALL_HALF)
    times = torch.stack((edge_time, y_time, x_time), 1)  # face 0: the doorway's edge, 1: horizontal, 2: vertical
    met = (0 <= times) & (times <= 1) & torch.stack((from_inside, torch.ones_like(left), ~through_door), 1)
    first_time, face = torch.where(met, times, torch.inf).min(1)  # what is met first
    blocked = met.any(1, keepdim=True)
    if noise is None:
        return torch.where(blocked, position, position + action)
    edge, vertical = (face == 0)[:, None], (face == 2)[:, None]
    push = 0.5 * torch.where(vertical, noise[:, 0], noise[:, 1])
    across = torch.cat((vertical, ~vertical), 1)  # the axis that leads away from the face
    contact = position + first_time[:, None] * action + torch.where(across, -action.sign() * push.abs(), push)
    inside = torch.where(contact <= low, low + KEEP_OFF, torch.where(contact >= high, high - KEEP_OFF, contact))
    return torch.where(blocked, torch.where(edge, contact, inside), position + action)


def random_layout(n: int, g: torch.Generator) -> Tensor:
    wall, door = torch.randint(20, 45, (n,), generator=g), torch.randint(10, 55, (n,), generator=g)
    return torch.stack((wall, door), 1).float()


def random_position(layout: Tensor, right: Tensor, margin: float, g: torch.Generator) -> Tensor:
    """Positions [N, 2], uniform in the left or the right room (right [N] bool), `margin` px from its walls."""
    low = torch.where(right, layout[:, 0] + WALL_HALF, LOW) + margin
    high = torch.where(right, HIGH, layout[:, 0] - WALL_HALF) - margin
    u = torch.rand(2, len(low), generator=g)
    return torch.stack((low + u[0] * (high - low), LOW + margin + u[1] * (HIGH - LOW - 2 * margin)), 1)


def random_tasks(n: int, g: torch.Generator) -> Tasks:
    """Start and goal in different rooms, at least 2.6 px from their walls."""
    layout, right = random_layout(n, g), torch.rand(n, generator=g) < 0.5
    return Tasks(layout, random_position(layout, right, 2.6, g), random_position(layout, ~right, 2.6, g))


def published_tasks() -> Tasks:
    """The twenty tasks of the published evaluation: 25 x 45 layouts, 2.6 px from borders and faces."""
    rng = np.random.default_rng(0)
    drawn = [(rng.integers(2250) // 2, *rng.random(5)) for _ in range(21)]  # of 25 x 45 layouts, each twice
    layout, left, right, start_y, goal_y, swap = np.array(drawn[1:]).T  # the first one is not used
    wall, door = 20 + layout // 45, 10 + layout % 45
    left, right = 6.6 + left * (wall - 3.6 - 6.6), wall + 3.6 + right * (57.4 - wall - 3.6)
    start_x, goal_x = np.where(swap < 0.5, (right, left), (left, right))
    start_y, goal_y = 6.6 + start_y * (57.4 - 6.6), 6.6 + goal_y * (57.4 - 6.6)
    tasks = np.stack((wall, door, start_x, start_y, goal_x, goal_y), 1)
    return Tasks(*torch.tensor(np.float32(tasks)).split(2, 1))


def render(position: Tensor, layout: Tensor) -> Tensor:
    """Positions [N, T, 2] in px -> observations [N, T, 2, 65, 65] uint8: the dot, a Gaussian; the walls."""
    pixel = torch.arange(SIZE, device=position.device)
    x, y = torch.exp((pixel - position[..., None]).square() / (-2 * DOT_STD**2)).unbind(2)  # [N, T, 65]
    dot = (255 * y[..., :, None] * x[..., None, :]).to(torch.uint8)  # truncated
    border = (pixel == LOW) | (pixel == HIGH)
    wall = (pixel - layout[:, :1]).abs() <= WALL_HALF  # [N, 65]
    door = (pixel - layout[:, 1:]).abs() <= DOOR_HALF
    solid = border[:, None] | border | (wall[:, None, :] & ~door[:, :, None])  # [N, 65, 65]
    return torch.stack((dot, (255 * solid[:, None].to(torch.uint8)).expand_as(dot)), 2)


class TwoRooms:
    """num_envs tasks side by side, in the manner of a gymnasium vector environment; positions in px.

    reset() -> obs [E, 2, 65, 65] uint8, info;   step(actions [E, 2]) -> obs, reward, terminated, truncated, info
    info: position, goal, layout [E, 2], success [E], goal_obs [E, 2, 65, 65]. The reward is 1 within 4.5 px of the
    goal, else 0. Nothing terminates; all are truncated after max_steps."""

    def __init__(self, num_envs: int = 20, max_steps: int = EPISODE_STEPS, device: torch.device | str = "cpu"):
        self.num_envs, self.max_steps, self.device = num_envs, max_steps, device
        self.generator, self.position = torch.Generator(), None
        if find_spec("gymnasium"):  # optional
            from gymnasium.spaces import Box

            self.observation_space = Box(0, 255, (num_envs, 2, SIZE, SIZE), np.uint8)
            self.action_space = Box(-np.inf, np.inf, (num_envs, 2), np.float32)

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[Tensor, dict]:
        """New random tasks, by a seed the same ones; `options=dict(tasks=Tasks(...))`: these."""
        if seed is not None:
            self.generator.manual_seed(int(seed))
        tasks = (options or {}).get("tasks") or random_tasks(self.num_envs, self.generator)
        if len(tasks.start) != self.num_envs:
            raise ValueError(f"{len(tasks.start)} tasks for {self.num_envs} environments")
        self.layout, self.position, self.goal = (x.to(self.device) for x in tasks)
        self.t = 0
        self.goal_obs = render(self.goal[:, None], self.layout)[:, 0]
        return self._observe()

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        """Actions [E, 2] in px, tensor or array. Raises RuntimeError before reset(), ValueError for other shapes."""
        if self.position is None:
            raise RuntimeError("call reset() before step()")
        actions = torch.as_tensor(actions, dtype=torch.float32, device=self.device)
        if actions.shape != (self.num_envs, 2) or not actions.isfinite().all():
            raise ValueError(f"actions must be finite and [{self.num_envs}, 2], not {tuple(actions.shape)}")
        noise = torch.randn(self.num_envs, 2, 2, generator=self.generator).to(self.device)
        self.position, self.t = move(self.position, actions, self.layout, noise), self.t + 1
        obs, info = self._observe()
        never = torch.zeros_like(info["success"])
        return obs, info["success"].float(), never, never | (self.t >= self.max_steps), info

    def close(self) -> None:
        self.position = None

    def _observe(self) -> tuple[Tensor, dict]:
        info = dict(position=self.position, goal=self.goal, layout=self.layout, goal_obs=self.goal_obs)
        info["success"] = (self.position - self.goal).norm(dim=1) < SUCCESS_PX
        return render(self.position[:, None], self.layout)[:, 0], info


# ------------------------------------------------------------------------------------------------------------- data
FRAMES = 90  # of a walk
GOAL_EVERY = 45  # each 45th frame of a layout is a goal: shortest paths are computed to these
GOALS = 3  # of each clip
CANDIDATES = 3  # random clips of a walk: the one that begins nearest the door is taken, unless the cost is latent
UNKNOWN = 255  # steps: no path was found, or a longer one


class Walks(NamedTuple):
    position: Tensor  # [N, 90, 2] px
    action: Tensor  # [N, 89, 2] px
    layout: Tensor  # [N, 2] px; W = walks_per_layout successive walks share theirs
    steps: Tensor  # [N / W, 2 W, 90 W] uint8: fewest steps to each goal of a layout from each of its frames; or empty


def make_walks(cfg: Config, n: int, seed: int) -> Walks:
    """n random walks. Of three drawn for each, the first that passes the door is taken, or else the first: one random
    walk in ten passes it, one in four of the published ones. For --cost distance, walls stop a walk as in episodes, so
    that training shows the dot where the planner will meet it."""
    g, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    layout = random_layout(n // cfg.walks_per_layout, g).repeat_interleave(cfg.walks_per_layout, 0)
    layouts, count = layout.repeat(3, 1), 3 * n
    right = LOW + torch.rand(count, generator=g) * (HIGH - LOW) > layouts[:, 0]  # a room, by its width
    position = random_position(layouts, right, KEEP_OFF, g)
    # the heading turns by von Mises noise; step lengths are normal, cut off at two standard deviations
    turn = torch.from_numpy(rng.vonmises(0, 5, (count, FRAMES - 1))).float()
    heading = 2 * math.pi * torch.rand(count, 1, generator=g) + turn.cumsum(1)
    length = nn.init.trunc_normal_(torch.empty_like(heading), 1.0, 0.4, 0.2, 1.8, generator=g)
    action = length[..., None] * torch.stack((heading.cos(), heading.sin()), 2)
    positions = [position]
    for a in action.unbind(1):
        noise = torch.randn(len(a), 2, 2, generator=g) if cfg.cost == "distance" else None
        positions.append(move(positions[-1], a, layouts, noise))
    position = torch.stack(positions, 1)
    right = position[..., 0] > layouts[:, :1]
    passes = (right.any(1) & ~right.all(1)).view(3, n)
    taken = passes.int().argmax(0) * n + torch.arange(n)
    return Walks(position[taken], action[taken], layout, torch.zeros(0, 0, 0, dtype=torch.uint8))


def shortest_paths(cfg: Config, walks: Walks) -> Walks:
    """The walks with `steps`: the fewest steps from every frame of a layout to each 45th of them, two of a walk.

    The frames of a layout make a graph. One step joins frames that follow each other, and frames whose pictures differ
    no more than those of a median step, 1 px: they show nearly the same place. (Isomap, Tenenbaum et al. 2000; pixels
    will do, since the dot is all that differs.) No walk leads through the wall, and frames on its two sides are 2 px
    apart or more, so the shortest path leads through the door. Takes 0.08 s a layout on two cores; with several
    processes each computes all."""
    W, n = cfg.walks_per_layout, cfg.walks_per_layout * FRAMES
    frame = torch.arange(n).view(W, FRAMES)
    this, following, goals = frame[:, :-1].flatten(), frame[:, 1:].flatten(), range(0, n, GOAL_EVERY)
    steps = torch.empty(len(walks.position) // W, len(goals), n, dtype=torch.uint8)
    for k in trange(len(steps), desc="shortest paths", unit="layout", disable=None):
        of_layout = slice(k * W, (k + 1) * W)
        dots = render(walks.position[of_layout], walks.layout[of_layout])[:, :, 0].flatten(0, 1)  # [n, 65, 65]
        pixels = F.avg_pool2d(dots.float(), 4).flatten(1)  # a quarter of the resolution, for speed
        difference = torch.cdist(pixels, pixels)
        of_step = difference[this, following]
        joined = difference <= of_step[of_step > 0].median()  # 0: stopped by a wall
        joined[this, following] = True
        found = dijkstra(csr_matrix(joined.numpy()), directed=False, unweighted=True, indices=goals)
        steps[k] = torch.from_numpy(found).clamp(max=UNKNOWN)
    return walks._replace(steps=steps)


class Batch(NamedTuple):  # losses() renders pictures from it
    position: Tensor  # [B, T, 2] px
    action: Tensor  # [B, T, 2] px, from each frame on
    layout: Tensor  # [B, 2] px
    goal: Tensor  # [B, G, 2] px, other places in the same rooms; G = 3, or 0 without --cost distance
    steps: Tensor  # [B, 2, G] fewest steps to these goals from frame 0 and from frame K


def make_batch(cfg: Config, walks: Walks, step: int, rank: int = 0, world: int = 1) -> Batch:
    """This process's share of a batch: a function of (seed, step), with a new order of the walks in every epoch."""
    B, T, W = cfg.batch_size, cfg.clip_frames, cfg.walks_per_layout
    epoch, n = divmod(step, len(walks.position) // B)
    walk = np.random.default_rng((cfg.seed, epoch)).permutation(len(walks.position))[n * B : (n + 1) * B, None]
    rng = np.random.default_rng((cfg.seed, epoch, n))
    goals, candidates = (GOALS, CANDIDATES) if cfg.cost == "distance" else (0, 1)
    first = rng.integers(FRAMES - T, size=(B, candidates))  # each of the T frames must have an action
    goal = rng.integers(W * FRAMES // GOAL_EVERY, size=(B, goals))
    share = lambda x: torch.from_numpy(x[rank::world]).to(walks.position.device, non_blocking=True)
    walk, first, goal = share(walk), share(first), share(goal)  # [B, 1], [B, candidates], [B, G]
    to_door = (walks.position[walk, first] - walks.layout[walk]).norm(dim=2)  # the hardest place for the model
    first = first.gather(1, to_door.argmin(1, keepdim=True))
    frame = first + torch.arange(T, device=first.device)  # [B, T]
    ends = walk % W * FRAMES + first + cfg.rollout * torch.arange(2, device=first.device)  # frames of the layout
    steps = walks.steps[(walk // W)[:, None], goal[:, None], ends[:, :, None]]
    place = walks.position.view(-1, W * FRAMES, 2)[walk // W, GOAL_EVERY * goal]
    return Batch(walks.position[walk, frame], walks.action[walk, frame], walks.layout[walk[:, 0]], place, steps)


# ------------------------------------------------------------------------------------------------- model and its loss
MEAN, STD = (0.0026, 0.0989), (0.0369, 0.2986)  # of the channels of observations in [0, 1], as published


def mlp(*sizes: int) -> nn.Sequential:
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class ResidualBlock(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + super().forward(x))


class Encoder(nn.Module):
    """Observations [N, 2, 65, 65] in 0..255 -> latents [N, D].

    impala: the network of Espeholt et al. 2018 (arXiv 1802.01561, fig. 3). strided: the sums of 2 x 2 pixels, then one
    convolution of stride 2 and a ReLU a stage."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.strided = cfg.encoder == "strided"
        layers, inputs, side = [], 2, SIZE // 2 if self.strided else SIZE
        for channels in cfg.channels:
            if self.strided:
                layers += [nn.Conv2d(inputs, channels, 3, stride=2, padding=1), nn.ReLU()]
            else:
                conv = lambda: nn.Conv2d(channels, channels, 3, padding=1)
                layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.MaxPool2d(3, 2, padding=1)]
                layers += [ResidualBlock(conv(), nn.ReLU(), conv()), ResidualBlock(conv(), nn.ReLU(), conv())]
            inputs, side = channels, (side + 1) // 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(inputs * side * side, cfg.latent_dim))
        self.norm = nn.LayerNorm(cfg.latent_dim)
        self.register_buffer("mean", torch.tensor(MEAN).view(2, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(2, 1, 1), persistent=False)

    def forward(self, observations: Tensor) -> Tensor:
        x = observations
        if self.strided:  # 2 x 2 pixels, summed as integers for speed; the factor 4 cancels below
            x = x[..., :-1, :-1] if x.is_floating_point() else x[..., :-1, :-1].short()
            x = x[..., ::2, :] + x[..., 1::2, :]
            x = x[..., ::2] + x[..., 1::2]
        x = x.to(self.mean.dtype)
        x = x - x.amin((2, 3), keepdim=True)  # each channel to [0, 1]: a dot between pixels is dimmer
        x = x / (x.amax((2, 3), keepdim=True) + 1e-6)
        x = (x - self.mean) / (self.std + 1e-6)
        return self.norm(self.layers(x.contiguous(memory_format=torch.channels_last)))


class Model(nn.Module):
    """Encoder and predictor, trained together, and heads.

    Letters in shapes: B clips, T frames, D = latent_dim. Another encoder: any module [N, 2, 65, 65] -> [N, D] that ends
    in a layer norm called `norm`."""

    def __init__(self, cfg: Config):
        super().__init__()
        D = cfg.latent_dim
        self.encoder = Encoder(cfg)
        self.predictor = nn.GRUCell(2, D) if cfg.predictor == "gru" else mlp(D + 2, 2 * D, 2 * D, D)
        self.inverse_dynamics = mlp(2 * D, 256, 256, 2)
        for layer in self.inverse_dynamics[::2]:
            nn.init.normal_(layer.weight, std=0.02)  # as published
            nn.init.zeros_(layer.bias)
        self.distance_head = mlp(2 * D, 256, 256, 256, 1) if cfg.cost == "distance" else None
        self.probe = mlp(D, 512, 4)  # reads detached latents, for figures: x, y, wall x, door y, as (px - 32) / 16

    def encode(self, observations: Tensor) -> Tensor:
        """Observations [B, T, 2, 65, 65], uint8 or floats in 0..255 -> latents [B, T, D]."""
        return self.encoder(observations.flatten(0, 1)).unflatten(0, observations.shape[:2])

    def predict(self, z: Tensor, action: Tensor) -> Tensor:
        """Latents [N, D] and actions [N, 2] in px -> the next latents [N, D]."""
        if isinstance(self.predictor, nn.GRUCell):
            return self.encoder.norm(self.predictor(action, z))
        return self.encoder.norm(z + self.predictor(torch.cat((z, action), 1)))

    def rollout(self, z: Tensor, actions: Tensor) -> Tensor:
        """Latents [N, D] and actions [N, K, 2] -> z and the latents predicted after each action [N, K + 1, D]."""
        y = [z]
        for action in actions.unbind(1):
            y.append(self.predict(y[-1], action))
        return torch.stack(y, 1)

    def distance(self, z: Tensor, goal: Tensor) -> Tensor:
        """Latents and goals [..., D] -> steps between them [...]."""
        return 10 * F.softplus(self.distance_head(torch.cat((z, goal), -1))[..., 0])


def losses(model: Model, cfg: Config, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """-> the loss (a scalar), its terms (detached), latents of the clips [B, T, D] (detached)."""
    K = cfg.rollout
    with torch.autocast(batch.action.device.type, torch.bfloat16, enabled=cfg.bf16):
        z = model.encode(render(batch.position, batch.layout))  # [B, T, D]
        y = model.rollout(z[:, 0], batch.action[:, :K])  # [B, K + 1, D]
        action = model.inverse_dynamics(torch.cat((z[:, :-1], z[:, 1:]), 2))  # [B, T - 1, 2]
        read = model.probe(z.detach())
        distance = y.new_zeros(batch.steps.shape)
        if cfg.cost == "distance":
            with torch.no_grad():  # goals are targets
                goal = model.encode(render(batch.goal, batch.layout))
            ends = y[:, ::K, None].expand(-1, -1, GOALS, -1)  # y_0 and y_K [B, 2, G, D]
            distance = model.distance(ends, goal[:, None].expand_as(ends))
    z, y, action, read, distance = (x.to(batch.action.dtype) for x in (z, y, action, read, distance))  # not bfloat16
    terms = dict(prediction=F.mse_loss(y[:, 1:], z[:, 1 : K + 1]))
    rows = z.flatten(0, 1)
    if dist.is_initialized():
        rows = torch.cat(all_gather(rows))  # statistics over the clips of all processes
    terms["variance"], terms["covariance"] = variance_covariance_loss(rows)
    terms["similarity"] = F.mse_loss(z[:, 1:], z[:, :-1])
    terms["inverse_dynamics"] = F.mse_loss(action, batch.action[:, :-1])
    known = batch.steps < UNKNOWN  # [B, 2, G]: of y_0 and y_K
    error = (batch.steps - distance) * known
    change = error.diff(dim=1) * known.all(1, keepdim=True)  # the planner compares near places: it must be right
    terms["distance"] = (error.abs().sum() + change.abs().sum()) / max(1, error.numel())  # 0 without goals
    weights = dict(prediction=cfg.prediction_weight, variance=cfg.variance_weight, covariance=cfg.covariance_weight)
    weights |= dict(similarity=cfg.similarity_weight, inverse_dynamics=cfg.inverse_weight, distance=cfg.distance_weight)
    loss = sum(weights[name] * term for name, term in terms.items())
    truth = torch.cat((batch.position, batch.layout[:, None].expand_as(batch.position)), 2)  # [B, T, 4]
    terms = dict(loss=loss, **terms, probe=F.mse_loss(read, (truth - 32) / 16))
    return loss + terms["probe"], {name: term.detach() for name, term in terms.items()}, z.detach()


@torch.no_grad()
def collapse_meter(z: Tensor) -> dict[str, float]:
    """How spread latents [B, T, D] are around their mean: effective rank, exp of the entropy of the normalised singular
    values (RankMe, arXiv 2210.02885); smallest and mean standard deviation of a feature; mean |correlation| of two."""
    z = z.flatten(0, 1)[:4096].cpu().double()
    std = z.std(0)
    p = F.normalize(torch.linalg.eigvalsh(torch.cov(z.T)).clamp(min=0).sqrt(), p=1, dim=0)
    correlation = torch.corrcoef(z.T).nan_to_num().fill_diagonal_(0).abs().sum() / (len(std) * (len(std) - 1))
    rank = torch.special.entr(p).sum().exp()
    values = dict(effective_rank=rank, std_min=std.min(), std_mean=std.mean(), correlation=correlation)
    return {name: value.item() for name, value in values.items()}


# ----------------------------------------------------------------------------------------------------- optimisation
def make_optimizers(model: Model, cfg: Config) -> list[tuple[float, torch.optim.Optimizer]]:
    """Pairs of a factor of the learning rate and an optimiser. Muon (kellerjordan.github.io/posts/muon) orthogonalises
    the steps of matrices; vectors and convolutions take Adam's."""
    if cfg.optimizer == "adamw":
        return [(1.0, torch.optim.AdamW(model.parameters(), weight_decay=1e-5))]
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    return [(1.0, Muon(matrices)), (0.1, torch.optim.Adam(others, betas=(0.9, 0.98)))]


def learning_rate(cfg: Config, step: int) -> float:
    """Linear warm-up over the first tenth of the schedule, then a cosine to 1e-5, as published."""
    warmup, first, last = cfg.steps // 10, 1e-11, 1e-5
    if step < warmup:
        return first + (cfg.lr - first) * step / warmup
    return last + (cfg.lr - last) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (cfg.steps - warmup)))


def clip_gradients(model: Model) -> None:
    """Gradients of the encoder to a norm of 2, then the predictor's; the shared layer norm is in both, as published."""
    nn.utils.clip_grad_norm_(model.encoder.parameters(), 2.0)
    nn.utils.clip_grad_norm_([*model.predictor.parameters(), *model.encoder.norm.parameters()], 2.0)


# --------------------------------------------------------------------------------------------------------- planning
def rollout_cost(model: Model, cfg: Config, z: Tensor, goal: Tensor, actions: Tensor) -> Tensor:
    """Latents and goals [E, D], plans [E, S, H, 2] -> costs [E, S], summed over the H predicted latents."""
    if cfg.cost == "latent" and isinstance(model.predictor, nn.GRUCell):
        gru, norm = model.predictor, model.encoder.norm
        weights = gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh, norm.weight, norm.bias
        return gru_rollout_cost(z, actions, goal, *weights, objective="sum")
    E, S = actions.shape[:2]
    y = model.rollout(z.repeat_interleave(S, 0), actions.flatten(0, 1))[:, 1:].unflatten(0, (E, S))  # [E, S, H, D]
    goal = goal[:, None, None].expand_as(y)
    cost = model.distance(y, goal) if cfg.cost == "distance" else (y - goal).square().mean(3)
    return cost.sum(2)


def search_round(model: Model, cfg: Config, z: Tensor, goal: Tensor, mean: Tensor, std: Tensor, noise: Tensor):
    """One round of sampling around mean and std [E, H, 2] with standard normal noise [E, S, H, 2].

    -> the next mean and std, the elites [E, elites, H, 2] and their weights in MPPI [E, elites] (Williams et al. 2017,
    arXiv 1707.02342), softmax(-0.005 cost) as published. CEM weighs the elites equally."""
    actions = mean[:, None] + std[:, None] * noise
    if cfg.action_limit > 0:
        norm = actions.norm(dim=3, keepdim=True)
        actions = actions * norm.clamp(max=cfg.action_limit) / (norm + 1e-6)
    cost, index = rollout_cost(model, cfg, z, goal, actions).topk(cfg.elites, 1, largest=False)
    elites = actions[torch.arange(len(z), device=z.device)[:, None], index]
    weight = torch.softmax(-0.005 * cost, 1)
    if cfg.planner == "cem":
        return elites.mean(1), elites.std(1), elites, weight
    mean = torch.einsum("en,enha->eha", weight, elites)
    std = torch.einsum("en,enha->eha", weight, (elites - mean[:, None]).square()).sqrt()
    return mean, std, elites, weight


def plan(search: Callable, cfg: Config, z: Tensor, goal: Tensor, horizon: int, g: torch.Generator) -> Tensor:
    """Latents and goals [E, D] -> plans [E, H, 2] in px a step. MPPI returns one of the last elites, CEM their mean.

    search: search_round of a model and its cfg."""
    mean = torch.zeros(len(z), horizon, 2, device=z.device, dtype=z.dtype)
    std = torch.full_like(mean, cfg.init_std)
    for _ in range(cfg.iterations):
        noise = torch.randn((len(z), cfg.samples, horizon, 2), generator=g, device=z.device, dtype=z.dtype)
        mean, std, elites, weight = search(z, goal, mean, std, noise)
    if cfg.planner == "cem":
        return mean
    drawn = torch.multinomial(weight, 1, generator=g)[:, 0]
    return elites[torch.arange(len(z), device=z.device), drawn]


class Agent:
    """Plans for E tasks at once: `act(obs, goal_obs, steps_left)` -> actions [E, 2]; `reset()` before other tasks."""

    def __init__(self, model: Model, cfg: Config, seed: int = 0):
        self.model, self.cfg, self.device = model.eval(), cfg, next(model.parameters()).device
        self.generator, self.seed = torch.Generator(self.device), seed
        search = functools.partial(search_round, model, cfg)
        self.search = CudaGraphs(search) if self.device.type == "cuda" else search  # one launch instead of hundreds
        self.reset()

    def reset(self) -> None:
        self.plan, self.age = None, 0  # the current plan [E, H, 2], and how many steps of it were taken
        self.generator.manual_seed(self.seed)

    @torch.no_grad()
    def act(self, obs: Tensor, goal_obs: Tensor, steps_left: int) -> Tensor:
        """Observations and goals [E, 2, 65, 65], uint8 or floats in 0..255 -> actions [E, 2] in px.

        steps_left counts the step to come. Raises ValueError for other shapes, and for floats in 0..1."""
        obs, goal_obs = torch.as_tensor(obs, device=self.device), torch.as_tensor(goal_obs, device=self.device)
        if obs.shape != goal_obs.shape or obs.shape[1:] != (2, SIZE, SIZE) or steps_left < 1:
            shapes = f"{tuple(obs.shape)} and {tuple(goal_obs.shape)}"
            raise ValueError(f"obs and goal_obs must be [E, 2, 65, 65], not {shapes}; steps_left at least 1")
        if obs.is_floating_point() and max(obs.max(), goal_obs.max()) <= 1:
            raise ValueError("obs and goal_obs must be uint8, or floats in 0..255; these lie in 0..1")
        if self.plan is not None and len(self.plan) != len(obs):
            raise ValueError(f"{len(obs)} observations, but plans for {len(self.plan)} tasks: call reset()")
        if self.plan is None or self.age >= min(self.cfg.replan_every, self.plan.shape[1]):
            z, goal = self.model.encode(torch.stack((obs, goal_obs), 1)).unbind(1)
            horizon = min(self.cfg.horizon, steps_left)
            self.plan = plan(self.search, self.cfg, z, goal, horizon, self.generator)
            self.age = 0
        self.age += 1
        return self.plan[:, self.age - 1]

    def __call__(self, obs: Tensor, info: dict, steps_left: int) -> Tensor:
        return self.act(obs, info["goal_obs"], steps_left)


# ------------------------------------------------------------------------------------------------------- evaluation
@torch.no_grad()
def run_episodes(tasks: Tasks, policy: Callable, device="cpu", watch: Callable | None = None):
    """policy(obs, info, steps left) -> actions [E, 2]; watch(obs) sees every step, outside the timing.

    -> positions [E, 201, 2] px, whether they are near the goal [E, 201], seconds that the policy took."""
    rooms = TwoRooms(len(tasks.start), device=device)
    obs, info = rooms.reset(seed=0, options=dict(tasks=tasks))
    positions, seconds = [info["position"]], 0.0
    for t in range(EPISODE_STEPS):
        begin = time.perf_counter()
        action = policy(obs, info, EPISODE_STEPS - t)
        action[0, 0].item()  # waits for the device
        seconds += time.perf_counter() - begin
        if watch:
            watch(obs)
        obs, _, _, _, info = rooms.step(action)
        positions.append(info["position"])
    positions = torch.stack(positions, 1).cpu()
    return positions, (positions - tasks.goal[:, None]).norm(dim=2) < SUCCESS_PX, seconds


def straight_line(obs: Tensor, info: dict, steps_left: int) -> Tensor:
    """Towards the goal, at most 1.8 px a step."""
    way = info["goal"] - info["position"]
    return way * (1.8 / way.norm(dim=1, keepdim=True).clamp(min=1.8))


def random_actions(obs: Tensor, info: dict, steps_left: int) -> Tensor:
    return 1.8 * F.normalize(torch.randn(len(obs), 2), dim=1).to(obs.device)


@torch.no_grad()
def evaluate(model: Model, cfg: Config, device: torch.device) -> tuple[dict, dict[str, np.ndarray]]:
    """Success rates in %, where the *last* position must be near the goal, and arrays for figures. Baselines: random
    actions; the straight line, which knows positions; the same planner with the weights from before training."""
    tasks = random_tasks(cfg.episodes, torch.Generator().manual_seed(777))
    agent, imagined = Agent(model, cfg), []

    def imagine(obs):  # for a figure: what the model predicts for the plans of the first twelve tasks
        z = model.encode(obs[:12, None])[:, 0]
        path = 32 + 16 * model.probe(model.rollout(z, agent.plan[:12, agent.age - 1 :]))[..., :2]  # px
        imagined.append(F.pad(path, (0, 0, 0, cfg.horizon + 1 - path.shape[1]), value=math.nan))

    start = render(tasks.start[:, None], tasks.layout)[:, 0]
    agent.act(start, start, EPISODE_STEPS)  # on a GPU the first capture is not timed
    agent.reset()
    positions, near, seconds = run_episodes(tasks, agent, device, imagine)
    torch.manual_seed(cfg.seed)  # weights as before training
    untrained = Agent(Model(cfg).to(device), cfg)
    _, published, _ = run_episodes(published_tasks(), Agent(model, cfg), device)
    rate = lambda solved: round(100 * solved.float().mean().item(), 2)
    interval = binomtest(int(near[:, -1].sum()), len(near)).proportion_ci(method="wilson")  # 95 %
    result = dict(success_rate=rate(near[:, -1]), success_interval=[round(100 * float(x), 2) for x in interval])
    result |= dict(success_rate_any=rate(near.any(1)), published_tasks_success_rate=rate(published[:, -1]))
    for name, policy in dict(random=random_actions, straight_line=straight_line, untrained=untrained).items():
        _, reached, _ = run_episodes(tasks, policy, device)
        result[f"{name}_success_rate"] = rate(reached[:, -1])
    result |= dict(episodes=cfg.episodes, episode_seconds=round(seconds / cfg.episodes, 4))
    arrays = dict(position=positions, goal=tasks.goal, wall=tasks.layout, plans=torch.stack(imagined))
    return result, {name: array.cpu().numpy() for name, array in arrays.items()}


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


def load(path: str | Path, device: str = "cpu", **settings) -> Agent:
    """An agent with the model of a run folder or checkpoint file; settings replace those of its planner, for example
    samples=128. `agent.model` encodes, predicts and measures distances.

    Raises UserError for a missing or damaged file."""
    state = read_checkpoint(Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path))
    cfg = Config(**state["config"])
    model = Model(cfg)
    model.load_state_dict(state["model"])
    return Agent(model.to(device).requires_grad_(False), dataclasses.replace(cfg, **settings))


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
    torch.manual_seed(cfg.seed)
    model = Model(cfg).to(device)
    optimizers = make_optimizers(model, cfg)
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
    end = max(start, min(cfg.steps, cfg.max_steps or cfg.steps))
    parameters = sum(p.numel() for p in model.encoder.parameters())
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
    if rank == 0:
        run_dir.mkdir(parents=True, exist_ok=cfg.resume)  # two runs that start together never share a folder
        (run_dir / "config.json").write_text(json.dumps(vars(cfg), indent=1))
        print(f"{cfg.preset} | {hardware} | encoder of {parameters:,} parameters | {run_dir}", flush=True)
    if start < end:
        begin = time.perf_counter()
        walks = make_walks(cfg, cfg.walks, cfg.seed)
        if cfg.cost == "distance":
            walks = shortest_paths(cfg, walks)
        walks = Walks(*(x.to(device) for x in walks))
        seconds += time.perf_counter() - begin

    torch.compiler.reset()  # many trainings in one process would reach the limit of recompilations
    mode = "reduce-overhead" if device.type == "cuda" and world == 1 else "default"  # CUDA graphs, not many launches
    compute_loss = torch.compile(losses, fullgraph=world == 1, dynamic=False, mode=mode) if cfg.compile else losses
    log_step, log_time, save_time = start, time.perf_counter(), time.perf_counter()
    for step in range(start, end):
        if cfg.compile:
            torch.compiler.cudagraph_mark_step_begin()  # a graph may overwrite the last step's tensors
        loss, terms, z = compute_loss(model, cfg, make_batch(cfg, walks, step, rank, world))
        loss.backward()
        if world > 1:
            for p in model.parameters():
                dist.all_reduce(p.grad.div_(world))  # the mean
        clip_gradients(model)
        lr = learning_rate(cfg, step)
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
            text += f" | {milliseconds:.0f} ms | rank {meter['effective_rank']:.1f}/{z.shape[2]}"
            text += f" | {(end - done) * milliseconds / 6e4:.1f} min left"
            print(f"step {done:05d}/{cfg.steps} | {text}", flush=True)
            if meter["std_mean"] < 0.1 or meter["effective_rank"] < 0.03 * z.shape[2]:
                print("  collapse: the latents hardly differ; raise --variance-weight and --covariance-weight")
            if done == end or signals or time.perf_counter() - save_time > cfg.save_every:
                # batches and learning rates are functions of (seed, step): this is enough for an exact resume
                state = dict(format=FORMAT, config=vars(cfg), step=done, seconds=seconds)
                state |= dict(model=model.state_dict(), optimizers=[o.state_dict() for _, o in optimizers])
                save_checkpoint(run_dir / "checkpoint.pt", state)
                save_time = time.perf_counter()
        if signals and done < end:
            if rank == 0:
                print(f"stopped at step {done}, checkpoint saved: go on with --resume --run-dir {run_dir}")
            sys.exit(128 + (stop_signals or [signal.SIGTERM])[0])  # it may be another process's signal
        log_step, log_time = done, time.perf_counter()

    if rank > 0:
        return {}
    summary = dict(script=SCRIPT, preset=cfg.preset, seed=cfg.seed, steps=end, parameters=parameters)
    summary |= dict(device=hardware, torch=torch.__version__, train_seconds=round(seconds, 1))
    if cfg.episodes:
        model.eval()
        rates, arrays = evaluate(model, cfg, device)
        summary |= rates
        np.savez_compressed(run_dir / "examples.npz", **arrays)
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
        sys.exit("error: out of memory: choose a smaller --batch-size; in planning fewer --episodes or --samples")
    except torch._dynamo.exc.TorchDynamoException as error:
        sys.exit(f"error: torch.compile failed: try --no-compile ({str(error).splitlines()[0]})")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
