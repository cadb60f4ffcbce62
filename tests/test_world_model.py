"""Two Rooms, shortest paths, the losses, the planners, evaluation, and that the whole learns.

Contacts, pictures, tasks, latents, costs and planners against published numbers: test_published.py.
"""

import dataclasses
import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import world_model as wm
from world_model import Agent, Model, TwoRooms, losses, make_batch, make_walks, move, preset, render

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------------------------------------- physics
def solid(x, y, layout):
    """In the wall or outside the room, by the description of the task."""
    outside = (x <= 4) | (x >= 60) | (y <= 4) | (y >= 60)
    return outside | (((x - layout[:, 0]).abs() < 1) & ((y - layout[:, 1]).abs() > 4))


@pytest.mark.parametrize("noisy", [False, True])
def test_no_dot_ever_passes_the_wall(noisy):
    """Who changes rooms has met the wall's face within the door; nobody leaves the rooms."""
    n, g = 200_000, generator(1)
    layout = wm.random_layout(n, g)
    p = 4.3 + 55.4 * torch.rand(n, 2, generator=g)
    p[: n // 2, 0] = (layout[:, 0] + 8 * torch.rand(n, generator=g) - 4)[: n // 2]  # half of them near the wall
    a = 2 * torch.randn(n, 2, generator=g)
    free = ~solid(*p.T, layout)
    p, a, layout = p[free], a[free], layout[free]
    q = move(p, a, layout, torch.randn(len(p), 2, 2, generator=g) if noisy else None)
    assert q.min() > 4 and q.max() < 60
    left = p[:, 0] < layout[:, 0]
    crossed = left != (q[:, 0] < layout[:, 0])
    face = layout[:, 0] - torch.where(left, 1, -1)
    time = (face - p[:, 0]) / a[:, 0]
    height = (p[:, 1] + time * a[:, 1] - layout[:, 1]).abs()
    in_doorway = (p[:, 0] - layout[:, 0]).abs() <= 1
    assert crossed.sum() > 1000 and ((height <= 4 + 1e-3) | in_doorway)[crossed].all()
    free = ((q - p - a).abs() < 1e-4).all(1)
    assert 0.5 < free.float().mean() < 0.95
    if not noisy:
        assert torch.equal(q[~free], p[~free])


def test_a_dot_that_pushes_at_the_wall_slides_along_it():
    """Published: 5 px beside the middle of the door, 60 steps of pushing; 29 of 40 are through it."""
    n, g = 400, generator()
    layout, p = torch.tensor([[32.0, 30.0]]).expand(n, 2), torch.tensor([[28.0, 35.0]]).expand(n, 2)
    for _ in range(60):
        p = move(p, torch.tensor([[1.8, 0.0]]).expand(n, 2), layout, torch.randn(n, 2, 2, generator=g))
    assert 0.6 < (p[:, 0] > 32).float().mean() < 0.85


# ------------------------------------------------------------------------------------------------------------- data
def test_walks_obey_the_law_and_share_layouts():
    cfg = preset("smoke", walks_per_layout=8, cost="latent")
    walks = make_walks(cfg, 64, 3)
    layout = walks.layout.repeat_interleave(89, 0)
    again = move(walks.position[:, :-1].flatten(0, 1), walks.action.flatten(0, 1), layout)
    assert torch.equal(again.view(64, 89, 2), walks.position[:, 1:])
    groups = walks.layout.view(8, 8, 2)
    assert (groups == groups[:, :1]).all() and len(groups[:, 0].unique(dim=0)) > 6
    for wall, door in groups[:, 0].tolist():
        assert 20 <= wall <= 44 and 10 <= door <= 54
    assert torch.equal(make_walks(cfg, 64, 3).position, walks.position)
    walks = make_walks(preset("smoke", walks_per_layout=8), 64, 3)  # --cost distance: stopped as in episodes
    layout, start = walks.layout.repeat_interleave(89, 0), walks.position[:, :-1].flatten(0, 1)
    moved = walks.position[:, 1:].flatten(0, 1) - start
    action = walks.action.flatten(0, 1)
    stopped = (move(start, action, layout) == start).all(1)
    torch.testing.assert_close(moved[~stopped], action[~stopped], atol=1e-5, rtol=0)
    assert 0.5 < (moved[stopped] != 0).any(1).float().mean() and moved[stopped].norm(dim=1).max() < 5


@pytest.fixture(scope="module")
def walks():
    cfg = preset("smoke")
    return wm.shortest_paths(cfg, make_walks(cfg, cfg.walks, 0))


def true_distance(a, b, layout):
    """px, straight or through the middle of the door."""
    same = (a[..., 0] < layout[..., 0]) == (b[..., 0] < layout[..., 0])
    through = (a - layout).norm(dim=-1) + (b - layout).norm(dim=-1)
    return torch.where(same, (a - b).norm(dim=-1), through), same


def test_shortest_paths_go_through_the_door(walks):
    """Steps are about 1 px: no path may be much shorter than the way, and most are not much longer."""
    W = preset("smoke").walks_per_layout
    position = walks.position.view(-1, W * 90, 2)
    goal = walks.position[:, :: wm.GOAL_EVERY].reshape(len(position), 2 * W, 2)
    layout = walks.layout[::W, None, None]
    distance, same = true_distance(goal[:, :, None], position[:, None], layout)
    known = (walks.steps < wm.UNKNOWN) & (distance > 5)
    straight = (goal[:, :, None] - position[:, None]).norm(dim=-1)
    for which in (same, ~same):
        ratio = (walks.steps / distance)[known & which]
        assert len(ratio) > 10_000 and ratio.quantile(0.01) > 0.8 and 1 < ratio.median() < 1.6
    assert (walks.steps / straight)[known & ~same & (distance > 2 * straight)].quantile(0.01) > 1.3
    own = walks.steps.view(len(position), W, 2, W, 90)
    for w in range(W):
        assert not own[:, w, 0, w, 0].any() and not own[:, w, 1, w, 45].any()  # no step from a goal to itself


def test_batches_are_functions_of_seed_and_step_and_shards_are_their_parts(walks):
    cfg = preset("smoke")
    whole = make_batch(cfg, walks, 3)
    for a, b, c in zip(whole, make_batch(cfg, walks, 3), make_batch(cfg, walks, 4)):
        assert torch.equal(a, b) and not torch.equal(a, c)
    for a, b, c in zip(whole, make_batch(cfg, walks, 3, 0, 2), make_batch(cfg, walks, 3, 1, 2)):
        assert torch.equal(a[0::2], b) and torch.equal(a[1::2], c)
    moved = whole.position[:, 1:] - whole.position[:, :-1]
    free = torch.isclose(moved, whole.action[:, :-1], atol=1e-5).all(2)
    assert 0.7 < free.float().mean() < 1  # all that no wall stopped
    ends = whole.position[:, :: cfg.rollout]
    distance, _ = true_distance(ends[:, :, None], whole.goal[:, None], whole.layout[:, None, None])
    known = whole.steps < wm.UNKNOWN
    assert known.float().mean() > 0.5 and (whole.steps[known] > 0.7 * distance[known] - 3).all()
    epoch = [make_batch(cfg, walks, step) for step in range(len(walks.position) // cfg.batch_size)]
    firsts = torch.cat([batch.action[:, 0] for batch in epoch])
    assert len(firsts.unique(dim=0)) == len(firsts)  # every walk once


# ------------------------------------------------------------------------------------------------------ environment
def test_two_rooms_as_a_vector_environment():
    rooms = TwoRooms(500, max_steps=3)
    with pytest.raises(RuntimeError, match="reset"):
        rooms.step(torch.zeros(500, 2))
    obs, info = rooms.reset(seed=np.int64(7))
    assert obs.dtype == torch.uint8 and obs.shape == (500, 2, 65, 65)
    p, g, layout = info["position"], info["goal"], info["layout"]
    assert ((p[:, 0] < layout[:, 0]) != (g[:, 0] < layout[:, 0])).all()
    assert 0.4 < (p[:, 0] < layout[:, 0]).float().mean() < 0.6
    for q in (p, g):
        gap = (q[:, 0] - layout[:, 0]).abs()
        assert 6.6 <= q.min() < 7 and 57 < q.max() <= 57.4 and 3.6 - 1e-4 <= gap.min() < 4
    assert torch.equal(info["goal_obs"], render(g[:, None], layout)[:, 0])
    for t in range(3):
        obs, reward, terminated, truncated, info = rooms.step(np.zeros((500, 2)))
        assert not terminated.any() and bool(truncated.all()) == (t == 2) and torch.equal(info["position"], p)
    for away, reached in ((4.4, 1.0), (4.6, 0.0)):  # towards the middle of the room
        rooms.position = g - away * torch.stack((torch.zeros(500), (g[:, 1] - 32).sign()), 1)
        _, reward, _, _, info = rooms.step(torch.zeros(500, 2))
        assert (reward == reached).all() and (info["success"] == reached).all()
    for bad in (torch.zeros(499, 2), torch.full((500, 2), torch.nan)):
        with pytest.raises(ValueError, match="actions"):
            rooms.step(bad)
    assert torch.equal(rooms.reset(seed=7)[1]["goal"], g) and not torch.equal(rooms.reset()[1]["goal"], g)
    tasks = wm.published_tasks()
    _, info = TwoRooms(20).reset(options=dict(tasks=tasks))
    assert torch.equal(info["position"], tasks.start)
    with pytest.raises(ValueError, match="20 tasks for 500"):
        rooms.reset(options=dict(tasks=tasks))
    rooms.close()
    with pytest.raises(RuntimeError, match="reset"):
        rooms.step(torch.zeros(500, 2))


def test_gymnasium_spaces():
    pytest.importorskip("gymnasium", reason="gymnasium is optional")
    rooms = TwoRooms(4)
    obs, _ = rooms.reset(seed=0)
    assert rooms.observation_space.contains(obs.numpy()) and rooms.action_space.sample().shape == (4, 2)
    rooms.step(rooms.action_space.sample())


# --------------------------------------------------------------------------------------------------- model and loss
def test_published_sizes():
    model = Model(preset("paper"))
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert (count(model.encoder), count(model.predictor)) == (1_426_096, 792_576)


@pytest.mark.parametrize("encoder", ["impala", "strided"])
def test_encoder_takes_bytes_and_floats_alike(encoder):
    model = Model(preset("smoke", encoder=encoder))
    obs, _ = TwoRooms(3).reset(seed=0)
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(obs), model.encoder(obs.float()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("predictor", ["gru", "residual"])
def test_loss_terms_by_hand(walks, predictor):
    cfg = preset("smoke", predictor=predictor, batch_size=4, prediction_weight=3.0, similarity_weight=12.0)
    torch.manual_seed(0)
    model, batch = Model(cfg).double(), make_batch(cfg, walks, 0)
    batch = wm.Batch(*(x.double() if x.is_floating_point() else x for x in batch))
    loss, terms, z = losses(model, cfg, batch)
    (B, T, _), K, mean = z.shape, cfg.rollout, lambda values: torch.stack(values).mean().item()
    encode = lambda p, b: model.encoder(render(p[None, None], batch.layout[b : b + 1])[0])[0]
    z = [[encode(batch.position[b, t], b) for t in range(T)] for b in range(B)]
    error, away = [], []
    for b in range(B):
        y = [z[b][0]]
        for k in range(K):
            y.append(model.predict(y[-1][None], batch.action[b, k][None])[0])
            error.append((y[-1] - z[b][k + 1]).square().mean())
        for n, goal in enumerate(batch.goal[b]):
            off = torch.stack([batch.steps[b, i, n] - model.distance(y[K * i], encode(goal, b)) for i in (0, 1)])
            known = batch.steps[b, :, n] < wm.UNKNOWN
            away += off.abs() * known
            away[-1] = away[-1] + (off[1] - off[0]).abs() * known.all()
    pairs = [(b, t) for b in range(B) for t in range(T - 1)]
    inverse = lambda b, t: model.inverse_dynamics(torch.cat((z[b][t], z[b][t + 1])))
    truth = lambda b, t: torch.cat((batch.position[b, t], batch.layout[b]))
    expected = dict(
        prediction=mean(error),
        similarity=mean([(z[b][t] - z[b][t + 1]).square().mean() for b, t in pairs]),
        inverse_dynamics=mean([(inverse(b, t) - batch.action[b, t]).square().mean() for b, t in pairs]),
        distance=mean(away),
        probe=mean(
            [(32 + 16 * model.probe(z[b][t]) - truth(b, t)).square().mean() / 256 for b in range(B) for t in range(T)]
        ),
    )
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-9), name
    weights = dict(prediction=3, variance=16, covariance=8, similarity=12, inverse_dynamics=16)
    total = sum(w * terms[name] for name, w in weights.items()) + cfg.distance_weight * terms["distance"]
    assert terms["loss"].item() == pytest.approx(total.item(), rel=1e-12)
    assert loss.item() == pytest.approx((total + terms["probe"]).item(), rel=1e-12)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_optimised_once(name):
    model = Model(preset("smoke"))
    optimizers = wm.make_optimizers(model, preset("smoke", optimizer=name))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    for factor, optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * factor
        optimizer.step()
    for key, p in model.named_parameters():
        step = p.detach() - before[key]
        if name == "adamw" or p.ndim != 2:  # the first step of Adam is the rate itself
            rate = 0.5 if name == "adamw" else 0.05
            torch.testing.assert_close(step, torch.full_like(p, -rate), rtol=1e-2, atol=1e-4)
        else:
            assert 0 < step.norm() < 2 * 0.5 * max(1, len(p) / p[0].numel()) ** 0.5 + 0.1, key


def test_the_probe_leaves_the_encoder_alone(walks):
    cfg = preset("smoke", batch_size=4)
    model, batch = Model(cfg), make_batch(cfg, walks, 0)
    gradients = lambda: torch.autograd.grad(losses(model, cfg, batch)[0], list(model.encoder.parameters()))
    before = gradients()
    for p in model.probe.parameters():
        p.data.mul_(3)
    for a, b in zip(before, gradients()):
        torch.testing.assert_close(a, b)


def test_collapse_meter():
    line = torch.randn(5, 100, 1) * torch.randn(1, 16)
    meter = wm.collapse_meter(line)
    assert meter["effective_rank"] == pytest.approx(1, abs=0.01) and meter["correlation"] == pytest.approx(1, abs=0.01)
    torch.manual_seed(0)
    meter = wm.collapse_meter(2 * torch.randn(40, 100, 16))
    assert meter["effective_rank"] > 15.9 and meter["correlation"] < 0.03
    assert meter["std_min"] == pytest.approx(2, abs=0.1) and meter["std_mean"] == pytest.approx(2, abs=0.05)
    assert wm.collapse_meter(torch.ones(2, 10, 4))["std_min"] == 0


def test_loss_compiles_to_one_graph_that_is_never_recompiled(walks):
    from torch._dynamo.testing import CompileCounter

    cfg, counter = preset("smoke", batch_size=8), CompileCounter()
    model = Model(cfg)
    torch._dynamo.reset()
    function = torch.compile(losses, backend=counter, fullgraph=True, dynamic=False)
    for step in (0, 1, 17, 33):
        function(model, cfg, make_batch(cfg, walks, step))[0].backward()
    assert counter.frame_count == 1


# --------------------------------------------------------------------------------------------------------- planning
TARGET = torch.tensor([[[0.5, -0.3], [1.0, 0.2], [-0.7, 0.4]], [[-1.2, 0.1], [0.0, 0.9], [0.3, -0.5]]])  # [E, H, 2]


def near_target(model, cfg, z, goal, actions):
    return (actions - TARGET[:, None]).square().sum((2, 3))


def plan_without_model(cfg, tasks, horizon):
    """By a rollout_cost that was put in the script's place."""
    search = functools.partial(wm.search_round, None, cfg)
    return wm.plan(search, cfg, torch.zeros(tasks, 4), None, horizon, generator())


@pytest.mark.parametrize("planner", ["mppi", "cem"])
def test_planners_find_the_known_optimum(planner, monkeypatch):
    monkeypatch.setattr(wm, "rollout_cost", near_target)
    cfg = preset("cpu", planner=planner, samples=256, elites=24, iterations=12, action_limit=0.0)
    found = plan_without_model(cfg, tasks=2, horizon=3)
    torch.testing.assert_close(found, TARGET, atol=0.1, rtol=0)
    limited = plan_without_model(dataclasses.replace(cfg, action_limit=0.6), tasks=2, horizon=3)
    length = TARGET.norm(dim=2, keepdim=True)
    torch.testing.assert_close(limited, TARGET * length.clamp(max=0.6) / length, atol=0.1, rtol=0)


def test_mppi_executes_an_elite_drawn_by_weight(monkeypatch):
    """Of two elites with costs 0 and 200, weights softmax(-0.005 cost): the better in e / (1 + e) of the plans."""
    seen, costs = [], torch.tensor([0.0, 200.0]).expand(20_000, 2)
    monkeypatch.setattr(wm, "rollout_cost", lambda model, cfg, z, goal, actions: seen.append(actions) or costs)
    cfg = preset("paper", samples=2, elites=2, iterations=1)
    found = plan_without_model(cfg, tasks=20_000, horizon=1)
    is_best = (seen[0][:, 0] == found).all((1, 2)).float().mean()
    assert abs(is_best - math.e / (1 + math.e)) < 0.012  # four standard deviations


@torch.no_grad()
@pytest.mark.parametrize("predictor, cost", [("gru", "latent"), ("residual", "latent"), ("residual", "distance")])
def test_rollout_cost_by_hand(predictor, cost):
    torch.manual_seed(0)
    cfg = preset("smoke", predictor=predictor, cost=cost)
    model, actions = Model(cfg), torch.randn(3, 7, 5, 2)
    z, goal = torch.randn(2, 3, 32)
    found = wm.rollout_cost(model, cfg, z, goal, actions)
    for e in range(3):
        for s in range(7):
            y = model.rollout(z[e : e + 1], actions[e, s][None])[0, 1:]
            each = model.distance(y, goal[e].expand_as(y)) if cost == "distance" else (y - goal[e]).square().mean(1)
            assert found[e, s].item() == pytest.approx(each.sum().item(), rel=1e-4)


def test_agent_keeps_its_plan_and_its_horizon():
    torch.manual_seed(0)
    cfg = preset("smoke", replan_every=2, horizon=6)
    agent = Agent(Model(cfg), cfg)
    obs, info = TwoRooms(3).reset(seed=0)
    goal = info["goal_obs"]
    assert torch.equal(agent.act(obs, goal, 50), agent.plan[:, 0]) and agent.plan.shape == (3, 6, 2)
    kept = agent.plan
    assert torch.equal(agent.act(obs, goal, 49), kept[:, 1])
    assert agent.act(obs.float().numpy(), goal.float().numpy(), 4).shape == (3, 2) and agent.plan.shape == (3, 4, 2)
    with pytest.raises(ValueError, match="reset"):
        agent.act(obs[:2], goal[:2], 50)
    agent.reset()
    agent.act(obs[:2], goal[:2], 50)
    agent.reset()
    for bad in ((obs[:, :1], goal[:, :1], 5), (obs, goal[:2], 5), (obs, goal, 0), (obs / 255, goal / 255, 5)):
        with pytest.raises(ValueError):
            agent.act(*bad)


# ------------------------------------------------------------------------------------------------------- evaluation
def test_success_is_to_end_near_the_goal_and_baselines_fail():
    tasks = wm.random_tasks(50, generator())
    positions, near, _ = wm.run_episodes(tasks, wm.straight_line)
    assert positions.shape == (50, 201, 2)
    assert torch.equal(near, (positions - tasks.goal[:, None]).norm(dim=2) < 4.5)
    stuck = ~near[:, -1]
    wrong_room = (positions[:, -1, 0] < tasks.layout[:, 0]) != (tasks.goal[:, 0] < tasks.layout[:, 0])
    assert 5 < stuck.sum() < 50 and wrong_room[stuck].float().mean() > 0.9
    torch.manual_seed(0)
    assert wm.run_episodes(tasks, wm.random_actions)[1][:, -1].float().mean() < 0.2


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "smoke"
    summary = wm.train(preset("smoke", steps=150, run_dir=str(folder)))
    return folder, summary


def test_smoke_run_learns(trained):
    folder, summary = trained
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in log] == list(range(10, 151, 10))
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and log[-1]["probe"] < 0.5 * log[0]["probe"]
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["episodes"] == 6
    names = {"success_rate", "success_interval", "success_rate_any", "random_success_rate"}
    names |= {"straight_line_success_rate", "untrained_success_rate", "published_tasks_success_rate", "episode_seconds"}
    assert names <= set(summary)


def test_smoke_run_is_drawn(trained, monkeypatch):
    folder, _ = trained
    monkeypatch.syspath_prepend(str(ROOT / "results"))
    import draw

    draw.draw(folder)
    for name in ("curves.png", "map.png"):
        assert len(Image.open(folder / name).convert("RGB").getcolors(1 << 24)) > 50, name
    assert Image.open(folder / "episodes.gif").n_frames >= 20


def test_load_gives_an_agent_for_anyones_environment(trained):
    folder, _ = trained
    agent = wm.load(folder, samples=8, horizon=5)
    assert agent.cfg.samples == 8 and not agent.model.training
    obs, info = TwoRooms(2).reset(seed=0)
    again = wm.load(folder / "checkpoint.pt", samples=8, horizon=5)
    assert torch.equal(agent.act(obs, info["goal_obs"], 20), again.act(obs, info["goal_obs"], 20))
    with pytest.raises(wm.UserError, match="elites"):
        wm.load(folder, elites=10_000)


def test_collapse_is_flagged(tmp_path, capsys):
    weights = dict(variance_weight=0.0, covariance_weight=0.0, inverse_weight=0.0, distance_weight=0.0)
    wm.train(preset("smoke", similarity_weight=50.0, **weights, episodes=0, run_dir=str(tmp_path / "run")))
    assert "collapse: the latents hardly differ; raise --variance-weight" in capsys.readouterr().out


def test_the_largest_seed_trains_and_larger_ones_are_refused_in_one_line(tmp_path):
    cfg = preset("smoke", seed=2**63 - 1, max_steps=2, episodes=2, run_dir=str(tmp_path / "run"))
    assert wm.train(cfg)["seed"] == 2**63 - 1
    command = [sys.executable, ROOT / "world_model.py", "--seed", str(2**63)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 2 and "--seed must be" in ended.stderr and "Traceback" not in ended.stderr
