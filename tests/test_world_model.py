"""Two Rooms' physics and pictures, the losses, the planners, the metrics, and that the whole learns."""

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import world_model as wm
from world_model import (
    Agent,
    ClipStream,
    Layout,
    TwoRooms,
    WorldModel,
    losses,
    move,
    obstacles,
    plan,
    preset,
    render,
    trajectories,
)

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def layout(x, y):
    return Layout(torch.tensor([float(x)]), torch.tensor([float(y)]))


ROOM = layout(32, 18)


def one_move(position, action, rooms=ROOM, noise=None):
    noise = None if noise is None else torch.tensor([noise])
    return move(torch.tensor([position]), torch.tensor([action]), obstacles(rooms), noise)[0].tolist()


# ---------------------------------------------------------------------------------------------------------- physics
def solid(x, y, rooms):
    """In the wall or outside the room, by the description of the task."""
    outside = (x <= 4) | (x >= 60) | (y <= 4) | (y >= 60)
    return outside | (((x - rooms.wall_x).abs() < 1.5) & ((y - rooms.door_y).abs() > 4))


@pytest.mark.parametrize("rule", ["stays", "contact"])
def test_no_dot_ever_passes_the_wall(rule):
    n, g = 100_000, generator(1)
    rooms = wm.random_layout(torch.rand(n, 2, generator=g))
    p = 4.3 + 55.4 * torch.rand(20 * n, 2, generator=g)
    rooms20 = Layout(*(x.repeat(20) for x in rooms))
    free = ~solid(*p.T, rooms20)
    p, rooms = p[free][:n], Layout(*(x[free][:n] for x in rooms20))
    assert len(p) == n
    a = 8 * torch.randn(n, 2, generator=g)  # up to whole rooms at once
    q = move(p, a, obstacles(rooms), None if rule == "stays" else torch.randn(n, generator=g))
    assert not solid(*q.T, rooms).any()
    steps = torch.linspace(0, 1, 400)[:, None]
    way = [p[:, i] + steps * a[:, i] for i in (0, 1)]  # [400, n]
    hit = solid(*way, rooms).any(0)
    stopped = ((q - p - a).abs() > 1e-3).any(1)
    # a corner may be cut between two of the 400 samples, and a move may end within rounding of an obstacle
    assert (hit & ~stopped).sum() == 0 and (stopped & ~hit).float().mean() < 0.003
    assert 0.3 < hit.float().mean() < 0.7
    crossed = (p[:, 0] < rooms.wall_x) != (q[:, 0] < rooms.wall_x)
    s = ((rooms.wall_x - p[:, 0]) / a[:, 0])[crossed, None]
    at = (p[crossed] + s * a[crossed])[:, 1]
    assert crossed.sum() > 500 and ((at - rooms.door_y[crossed]).abs() <= 4).all()
    if rule == "stays":
        assert torch.equal(q[stopped], p[stopped])


@pytest.mark.parametrize(
    "position,action,contact,normal",
    [
        ((10.0, 30.0), (-20.0, 5.0), (4.0, 31.5), (1, 0)),  # left border
        ((50.0, 30.0), (20.0, 0.0), (60.0, 30.0), (-1, 0)),  # right border
        ((10.0, 8.0), (2.0, -8.0), (11.0, 4.0), (0, 1)),  # upper border
        ((10.0, 58.0), (0.0, 8.0), (10.0, 60.0), (0, -1)),  # lower border
        ((20.0, 40.0), (21.0, 10.5), (30.5, 45.25), (-1, 0)),  # the wall from the left
        ((40.0, 40.0), (-13.0, 0.0), (33.5, 40.0), (1, 0)),  # and from the right
        ((32.0, 18.0), (0.5, -8.0), (32.25, 14.0), (0, 1)),  # upper edge of the door, from inside
        ((32.0, 18.0), (0.5, 8.0), (32.25, 22.0), (0, -1)),  # lower edge
    ],
)
def test_contact_points_and_inward_noise(position, action, contact, normal):
    assert one_move(position, action) == pytest.approx(position)  # training data: stays
    for noise, push in ((0.0, 0.3), (0.4, 0.3), (-0.4, 0.3), (1.0, 0.5), (-2.0, 1.0)):
        wanted = [c + push * n for c, n in zip(contact, normal)]
        assert one_move(position, action, noise=noise) == pytest.approx(wanted, abs=1e-4)


def test_free_moves_are_exact_and_the_door_is_open():
    assert one_move((20.0, 18.0), (20.0, 1.0)) == [40.0, 19.0]
    assert one_move((20.0, 18.0), (20.0, 1.0), noise=3.0) == [40.0, 19.0]
    assert one_move((20.0, 14.5), (20.0, -1.0)) == [20.0, 14.5]  # meets the door's edge on the way
    assert one_move((10.0, 10.0), (0.0, 0.0), noise=1.0) == [10.0, 10.0]


# --------------------------------------------------------------------------------------------------- pictures, data
@pytest.mark.parametrize(
    "x,y,wall_x,door_y", [(10.0, 20.0, 32, 18), (4.3, 59.7, 20, 54), (59.69, 4.31, 44, 10), (32.27, 17.61, 32, 18)]
)
def test_rendering_is_exact(x, y, wall_x, door_y):
    dot, walls = render(torch.tensor([[[x, y]]]), layout(wall_x, door_y))[0, 0].tolist()
    for row in range(65):
        for column in range(65):
            value = 255 * math.exp(-((column - x) ** 2 + (row - y) ** 2) / (2 * 1.3**2))
            assert abs(dot[row][column] - value) <= 0.5001
            border = row in (4, 60) or column in (4, 60)
            wall = wall_x - 1 <= column <= wall_x + 1 and not door_y - 4 <= row <= door_y + 4
            assert walls[row][column] == 255 * (border or wall)


def test_pictures_have_the_published_statistics():
    data = trajectories(600, 1, generator())
    frames = render(data.position, data.layout).float() / 255
    mean, std = frames.mean((0, 1, 3, 4)), frames.std((0, 1, 3, 4))
    torch.testing.assert_close(mean, torch.tensor([0.0026, 0.0989]), atol=1.5e-4, rtol=0)
    torch.testing.assert_close(std, torch.tensor([0.0369, 0.2986]), atol=2e-3, rtol=0)


def test_trajectories_follow_their_law():
    data = trajectories(2000, 90, generator(3), per_layout=4)
    p, a, rooms = data
    boxes = [b.repeat_interleave(90, 0) for b in obstacles(rooms)]
    again = move(p[:, :-1].flatten(0, 1), a.flatten(0, 1), boxes).view(2000, 90, 2)
    torch.testing.assert_close(again, p[:, 1:], atol=1e-4, rtol=0)  # reversed walks obey the physics too
    length, angle = a.norm(dim=2), torch.atan2(a[..., 1], a[..., 0])
    assert 0.2 - 1e-5 <= length.min() and length.max() <= 1.8 + 1e-5
    assert length.mean().item() == pytest.approx(1.0, abs=0.005)
    assert length.std().item() == pytest.approx(0.352, abs=0.005)  # 0.4 * sqrt(1 - 4 phi(2) / (2 Phi(2) - 1))
    turns = (angle[:, 1:] - angle[:, :-1])[:, 45:]
    quiet = ((p[:, 1:-1] != p[:, :-2]).any(2) & (p[:, 2:] != p[:, 1:-1]).any(2))[:, 45:]
    assert turns[quiet].cos().mean().item() == pytest.approx(0.8934, abs=0.004)  # I1(5) / I0(5)
    right = p[..., 0] > rooms.wall_x[:, None]
    crossing = (right.any(1) & ~right.all(1)).float().mean().item()
    assert 0.33 < crossing < 0.45  # 35 % by construction, a few more by chance
    started = right[:, 0].float()
    through = started[right.any(1) & ~right.all(1)].mean()
    assert 0.45 < started.mean() < 0.55 and 0.44 < through < 0.56  # in both rooms, through the door both ways
    assert started[rooms.wall_x < 26].mean() > 0.58 and started[rooms.wall_x > 38].mean() < 0.42  # oftener in the wider
    assert a[:, 0].mean(0).norm() < 0.06  # in every direction
    for side in rooms:
        assert (side.view(-1, 4) == side.view(-1, 4)[:, :1]).all()
    assert (
        rooms.wall_x.min() >= 20 and rooms.wall_x.max() <= 44 and rooms.door_y.min() >= 10 and rooms.door_y.max() <= 54
    )


def test_fixed_wall():
    cfg, env = preset("smoke", fixed_wall=True, episode_steps=1), TwoRooms(5, fixed_wall=True)
    env.reset()
    run = wm.run_episodes(cfg, 5, wm.straight_line, CPU)
    for made in (trajectories(10, 2, generator(), fixed_wall=True), ClipStream(cfg, CPU)(0), env, run):
        assert (made.layout.wall_x == 32).all() and (made.layout.door_y == 18).all()


def test_clips_are_a_function_of_seed_and_step_and_shards_are_their_parts():
    cfg = preset("smoke", batch_size=8)
    stream = ClipStream(cfg, CPU)
    first, later = stream(3), stream(40)
    again = stream(3)
    for a, b, c in zip(first[:2], again[:2], later[:2]):
        assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(first.position, ClipStream(dataclasses.replace(cfg, seed=1), CPU)(3).position)
    halves = [ClipStream(cfg, CPU, rank, 2)(3) for rank in (0, 1)]
    assert torch.equal(first.position, torch.cat([h.position for h in halves]))
    # clips are consecutive: every free step moves by its action
    moved = first.position[:, 1:] - first.position[:, :-1]
    free = (moved != 0).any(2)
    torch.testing.assert_close(moved[free], first.action[free], atol=1e-5, rtol=0)


def test_tasks_and_the_environment():
    env = TwoRooms(500, seed=7, max_steps=3)
    obs, info = env.reset()
    assert obs.dtype == torch.uint8 and obs.shape == (500, 2, 65, 65)
    p, g, x = info["position"], info["goal"], info["wall_x"]
    assert ((p[:, 0] < x) != (g[:, 0] < x)).all()
    assert 0.4 < (p[:, 0] < x).float().mean() < 0.6
    for q in (p, g):
        aside = (q[:, 0] - x).abs()
        assert 6.6 <= q.min() < 7 and 57 < q.max() <= 57.4 and 1.5 + 2.6 - 1e-4 <= aside.min() < 4.4
    assert torch.equal(info["goal_obs"], render(g[:, None], env.layout)[:, 0])
    for t in range(3):
        obs, reward, terminated, truncated, info = env.step(torch.zeros(500, 2))
        assert not terminated.any() and bool(truncated.all()) == (t == 2) and torch.equal(info["position"], p)
    for away, reached in ((4.4, 1.0), (4.6, 0.0)):  # towards the middle of the room
        env.position = g - away * torch.stack((torch.zeros(500), (g[:, 1] - 32).sign()), 1)
        _, reward, _, _, info = env.step(torch.zeros(500, 2))
        assert (reward == reached).all() and (info["success"] == reached).all()
    twin, env.position = torch.Generator().set_state(env.noise.get_state()), p
    far = torch.tensor([[30.0, 5.0]]).expand(500, 2)  # into something: the rule of contact, with fresh noise
    for _ in range(2):
        wanted = move(env.position, far, obstacles(env.layout), torch.randn(500, generator=twin))
        assert torch.equal(env.step(far)[4]["position"], wanted)
    assert torch.equal(TwoRooms(500, seed=7).reset()[1]["goal"], g)
    assert env.render().shape == (500, 65, 65, 3)
    for bad in (torch.zeros(499, 2), torch.full((500, 2), torch.nan)):
        with pytest.raises(ValueError, match="actions"):
            env.step(bad)


# --------------------------------------------------------------------------------------------------- model and loss
def test_published_sizes():
    model = WorldModel(preset("paper"))
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert (count(model.encoder), count(model.predictor)) == (1_426_096, 792_576)


def test_a_residual_block_adds_to_its_input():
    block, x = wm.ResidualBlock(3), torch.randn(2, 3, 9, 9)
    added = block(x) - x
    block.conv2.weight.data.mul_(2), block.conv2.bias.data.mul_(2)
    torch.testing.assert_close(block(x) - x, 2 * added, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("encoder", ["impala", "strided"])
@pytest.mark.parametrize("half", [False, True])
def test_encoder_takes_bytes_and_floats_alike(encoder, half):
    model = WorldModel(preset("smoke", encoder=encoder, half_resolution=half))
    obs, _ = TwoRooms(3).reset()
    with torch.no_grad():
        torch.testing.assert_close(model.encode(obs), model.encode(obs.double()), atol=1e-5, rtol=1e-4)


def test_half_resolution_is_average_pooling():
    seen = []
    model = WorldModel(preset("smoke", wall_gain=3.0))
    model.encoder.cnn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    obs, _ = TwoRooms(3).reset()
    model.encode(obs)
    mean, std = (torch.tensor(v).view(2, 1, 1) for v in (wm.MEAN, (0.0369, 0.2986 / 3)))  # the gain is the walls' alone
    torch.testing.assert_close(seen[0], (torch.nn.functional.avg_pool2d(obs / 255, 2) - mean) / std)


@pytest.mark.parametrize("predictor,slow", [("gru", 0), ("residual", 0), ("residual", 12)])
def test_loss_terms_by_hand(predictor, slow):
    cfg = preset(
        "smoke",
        predictor=predictor,
        rollout=5,
        batch_size=4,
        slow_features=slow,
        prediction_weight=3.0,
        inverse_weight=2.0,
    )
    torch.manual_seed(0)
    model, batch = WorldModel(cfg), ClipStream(cfg, CPU)(0)
    model.psi.last.weight.data.mul_(8)  # some steps are longer than their actions
    total, terms, _ = losses(model, cfg, batch)
    terms = dict(zip(wm.TERMS, terms.tolist()))
    B, T = 4, 17
    z = [
        [
            model.encode(render(batch.position[b : b + 1, t : t + 1], Layout(*(x[b : b + 1] for x in batch.layout)))[0])
            for t in range(T)
        ]
        for b in range(B)
    ]
    error = []
    for b in range(B):
        for t in range(T - 5):
            y = z[b][t]
            for k in range(5):
                y = model.predict(y, batch.action[b, t + k][None])
                error.append((y - z[b][t + k + 1]).square().mean())
    pairs = [(b, t) for b in range(B) for t in range(T - 1)]
    still = slow or 32  # the first features are held still, the others tell the action; 0: all do both
    similarity = [(z[b][t][:, :still] - z[b][t + 1][:, :still]).square().mean() for b, t in pairs]
    inverse = [
        (model.inverse_dynamics(torch.cat((z[b][t][:, slow:], z[b][t + 1][:, slow:]), 1)) - batch.action[b, t])
        .square()
        .mean()
        for b, t in pairs
    ]
    truth = lambda b, t: torch.stack((*batch.position[b, t], batch.layout.wall_x[b], batch.layout.door_y[b]))
    probe = [(model.read(z[b][t])[0] - truth(b, t)).square().mean() / 16**2 for b in range(B) for t in range(T)]
    for name, values in (
        ("prediction", error),
        ("similarity", similarity),
        ("inverse_dynamics", inverse),
        ("probe", probe),
    ):
        assert terms[name] == pytest.approx(torch.stack(values).mean().item(), rel=1e-4), name
    far = lambda b, s, t: (model.psi(z[b][s]) - model.psi(z[b][t])).norm()
    excess = [(far(b, t, t + 1) - batch.action[b, t].norm()).clamp(min=0) ** 2 for b, t in pairs]
    apart = [far(b, s, t) for b in range(B) for s in range(T) for t in range(T)]
    assert 10 < sum(e > 0 for e in excess) < 55
    assert terms["distance"] == pytest.approx(
        (300 * sum(excess) / len(excess) - sum(apart) / len(apart)).item(), rel=1e-3
    )
    v, c = wm.variance_covariance_loss(torch.cat([z[b][t] for b in range(B) for t in range(T)]))
    wanted = (
        3 * terms["prediction"]
        + 16 * v
        + 8 * c
        + 12 * terms["similarity"]
        + 2 * terms["inverse_dynamics"]
        + terms["probe"]
        + 0.1 * terms["distance"]
    )
    assert total.item() == pytest.approx(wanted.item(), rel=1e-4)


def test_ablated_terms_are_left_out_of_the_sum():
    cfg = preset("smoke", batch_size=4)
    torch.manual_seed(0)
    model, batch = WorldModel(cfg), ClipStream(cfg, CPU)(0)
    total, terms, _ = losses(model, cfg, batch)
    for name, part, weight in zip(wm.TERMS[1:], terms[1:].tolist(), (16, 8, 12, 1, 0.1)):
        left = losses(model, dataclasses.replace(cfg, ablate=(name.replace("_", "-"),)), batch)[0]
        assert abs(part) > 1e-3 and (total - left).item() == pytest.approx(weight * part, abs=2e-4), name
    one, short = (
        losses(model, dataclasses.replace(cfg, **c), batch)[0] for c in (dict(ablate=("rollout",)), dict(rollout=1))
    )
    assert one == short != total


def test_probe_and_distance_leave_the_encoder_alone():
    cfg = preset("smoke", batch_size=4, ablate=("variance", "covariance", "similarity", "inverse-dynamics"))
    model, batch = WorldModel(cfg), ClipStream(cfg, CPU)(0)
    total, terms, _ = losses(model, cfg, batch)
    prediction = dict(zip(wm.TERMS, terms))["prediction"]
    grads = torch.autograd.grad(total, list(model.encoder.parameters()), retain_graph=True)
    for head in (model.probe, model.psi):
        for p in head.parameters():
            p.data.mul_(3)
    total2, terms2, _ = losses(model, cfg, batch)
    assert dict(zip(wm.TERMS, terms2))["prediction"] == prediction and total2 != total
    for a, b in zip(grads, torch.autograd.grad(total2, list(model.encoder.parameters()))):
        torch.testing.assert_close(a, b)


def test_metric_is_a_metric():
    a, b, c = torch.randn(3, 100, 64)
    d = wm.metric
    assert (d(a, c) <= d(a, b) + d(b, c) + 1e-4).all() and torch.equal(d(a, b), d(b, a)) and (d(a, a) < 0.01).all()
    flat = torch.zeros(64)
    flat[0], flat[8] = 3.0, 4.0
    assert d(flat, torch.zeros(64)).item() == pytest.approx(5.0, abs=0.01)


class TruePositions(torch.nn.Module):
    """Stands where the encoder stands: the latent is (x, y, wall, door) read off the picture, psi the position in px."""

    def __init__(self):
        super().__init__()
        self.detour = wm.Detour(4, 64)

    def encode(self, obs):
        pixel = torch.arange(65.0)
        dot = obs[:, 0].float()
        x, y = ((dot.sum(axis) * pixel).sum(1) / dot.sum((1, 2)) for axis in (1, 2))
        solid = obs[:, 1, 5:60, 5:60] > 0  # inside the borders
        wall = (solid.sum(1) > 20).float() @ pixel[5:60] / 3
        gap = ~solid.gather(2, (wall.long() - 5)[:, None, None].expand(-1, 55, 1))[..., 0]
        door = (gap * pixel[5:60]).sum(1) / gap.sum(1)
        return torch.stack((x, y, wall, door), 1)

    def psi(self, z):
        return z[..., :2]


def test_shortest_paths_go_through_the_door():
    cfg = preset("smoke", layouts=6, walks=24, join=2.5)
    with torch.random.fork_rng():
        paths = wm.shortest_paths(TruePositions(), cfg, CPU)
    straight, detours = [], []
    for room in range(6):
        z, source, length = paths.z[room].float(), paths.source[room], paths.length[room].float()
        apart = (z[source][:, None, :2] - z[None, :, :2]).norm(dim=2)
        far = (z[source][:, None, 0] < z[0, 2]) != (z[None, :, 0] < z[0, 2])
        known = ~length.isnan()
        assert (
            length[known] >= apart[known] - 0.5
        ).all()  # a way is never shorter than the straight line (bf16 latents)
        straight.append((length / apart.clamp(min=1))[known & ~far & (apart > 10)])
        door = z[0, 2:]
        through = (z[source][:, None, :2] - door).norm(dim=2) + (z[None, :, :2] - door).norm(dim=2)
        detours.append((length - through)[known & far & (through - apart > 15)])
    assert torch.cat(straight).median() < 1.2  # within a room the way is straight
    detours = torch.cat(detours)
    assert len(detours) > 500 and detours.quantile(0.02) > -8  # the door's half-height and the corner that may be cut


class Scaled(TruePositions):
    """The same with latents of the size that networks like."""

    distance = WorldModel.distance

    def encode(self, obs):
        return (super().encode(obs) - 32) / 16

    def psi(self, z):
        return 32 + 16 * z[..., :2]

    def predict(self, z, action):  # the wall is soft: half of a step goes through it
        into = ((z[:, 0] + action[:, 0] / 16) > 0)[:, None]
        return z + torch.cat((torch.where(into, action / 2, action) / 16, torch.zeros_like(action)), 1)


def test_steps_that_fall_short_are_not_taken():
    model, cfg = Scaled(), preset("smoke", blocked=0.7)
    z = torch.tensor([[-1.0, 0, 0, 0], [-0.05, 0, 0, 0], [-0.05, 0, 0, 0]])
    action = torch.tensor([[1.0, 0], [1.0, 0], [0, 1.0]])  # free; into the wall; along it
    after, psi = wm.imagine(model, cfg, z, model.psi(z), action)
    expected = torch.tensor([[-1 + 1 / 16, 0, 0, 0], [-0.05, 0, 0, 0], [-0.05, 1 / 16, 0, 0]])
    torch.testing.assert_close(after, expected)
    torch.testing.assert_close(psi, model.psi(expected))
    pushed, _ = wm.imagine(model, dataclasses.replace(cfg, blocked=0.0), z, model.psi(z), action)
    assert pushed[1, 0] > -0.05  # without the rule the dot sinks in


def test_the_distance_learns_the_way_round_the_wall():
    cfg, model = preset("smoke", layouts=50, walks=24, distance_steps=400), Scaled()
    with torch.random.fork_rng():
        error = wm.fit_distance(model, cfg, CPU, batch=1024)
    g = generator(77)
    rand = lambda: torch.rand(400, 2, generator=g)
    layout = wm.random_layout(rand())
    side = torch.zeros(400)
    start, goal = wm.random_position(layout, 1.0, side, rand()), wm.random_position(layout, 1.0, 1 - side, rand())
    door = torch.stack(layout, 1)
    way, straight = (start - door).norm(dim=1) + (goal - door).norm(dim=1), (start - goal).norm(dim=1)
    z, zg = (torch.cat(((x - 32) / 16, (door - 32) / 16), 1) for x in (start, goal))
    with torch.no_grad():
        learnt = model.distance(z, zg)
    assert (
        error < 6
        and torch.corrcoef(torch.stack((learnt, way)))[0, 1] > torch.corrcoef(torch.stack((straight, way)))[0, 1]
    )
    far = way - straight > 15  # where the wall matters
    assert far.sum() > 50 and (learnt - way)[far].abs().mean() < (straight - way)[far].abs().mean() / 2


def test_an_update_clips_each_part_apart_and_steps_by_the_given_rate():
    model, cfg, g = WorldModel(preset("smoke")), preset("smoke", grad_clip=3.0), generator()
    optimizer, before = torch.optim.SGD(model.parameters(), 7.0), [p.detach().clone() for p in model.parameters()]
    for name, p in model.named_parameters():
        p.grad = torch.randn(p.shape, generator=g) * (
            1e-3 if name.startswith("probe") else 100
        )  # only the probe's is small
    wanted = []
    for part in model.children():
        norm = torch.cat([p.grad.flatten() for p in part.parameters()]).norm()
        wanted += [-0.01 * p.grad * min(1, 3 / norm) for p in part.parameters()]
    wm.update(model, cfg, optimizer, 0.01)
    for p, old, step in zip(model.parameters(), before, wanted, strict=True):
        torch.testing.assert_close(p.detach() - old, step, rtol=1e-3, atol=1e-7)
        assert p.grad is None


def test_the_schedule_and_the_decay_reach_the_optimiser(tmp_path, monkeypatch):
    cfg = preset("smoke", batch_size=2, lr=0.02, weight_decay=0.3, log_every=4, checkpoint_every=4)
    model, rates = WorldModel(cfg), []
    (group,) = (optimizer := wm.make_optimizer(model, cfg)).param_groups
    assert group["weight_decay"] == 0.3 and len(group["params"]) == len(list(model.parameters()))
    monkeypatch.setattr(wm, "update", lambda model, cfg, optimizer, lr: rates.append(lr))
    wm.fit(cfg, model, optimizer, ClipStream(cfg, CPU), 4, 0, 0.0, tmp_path, lambda line: None)
    assert rates == pytest.approx([0.02, 0.02, 0.015, 0.005])  # one step of warm-up, cosine over three


def test_learning_rate():
    cfg = preset("smoke", steps=100, lr=1.0)
    assert [wm.learning_rate(cfg, s, 100) for s in (0, 4, 9, 10, 55, 100)] == pytest.approx(
        [0.1, 0.5, 1.0, 1.0, 0.5, 0.0], abs=1e-9
    )


def test_loss_compiles_to_one_graph_that_is_never_recompiled():
    from torch._dynamo.testing import CompileCounter

    cfg = preset("smoke", batch_size=8)
    model, clips, counter = WorldModel(cfg), ClipStream(cfg, CPU), CompileCounter()
    torch._dynamo.reset()
    function = torch.compile(losses, backend=counter, fullgraph=True, dynamic=False)
    for step in (0, 1, 17, 33):
        function(model, cfg, clips(step), False)[0].backward()
    assert counter.frame_count == 1


# --------------------------------------------------------------------------------------------------------- planning
TARGET = torch.tensor(
    [[[0.5, -0.3], [1.0, 0.2], [-0.7, 0.4]], [[-1.2, 0.1], [0.0, 0.9], [0.3, -0.5]]]
)  # [E = 2, H = 3, 2]


def white(episodes):
    """What plan() draws with."""
    g = generator()
    return lambda law, *shape: law(episodes, *shape, generator=g)


def toy_cost(model, cfg, state, actions, goal):
    return (actions - TARGET[:, None]).square().sum((2, 3))


@pytest.mark.parametrize("planner,temperature", [("mppi", 0.02), ("mppi", 200.0), ("cem", 1.0)])
@pytest.mark.parametrize("smooth", [0.0, 0.6])
def test_planners_find_the_known_optimum(planner, temperature, smooth):
    cfg = preset(
        "cpu",
        planner=planner,
        temperature=temperature,
        smooth=smooth,
        samples=256,
        elites=24,
        iterations=12,
        action_limit=0.0,
    )
    assert cfg.planner == planner
    action, mean = plan(None, cfg, None, None, torch.zeros(2, 3, 2), white(2), toy_cost)
    torch.testing.assert_close(mean, TARGET, atol=0.1, rtol=0)
    assert torch.equal(action, mean)


def test_one_round_of_each_planner():
    """Candidates of the spread and smoothness asked for; of the elites CEM takes the plain mean, a cold MPPI the best."""
    seen = []

    def spy(model, cfg, state, actions, goal):
        seen.append(actions)
        return (actions - 1).square().sum((2, 3))

    flags = dict(temperature=1e-6, samples=4000, elites=40, iterations=1, init_std=2.0, smooth=0.6, action_limit=0.0)
    for planner in ("cem", "mppi"):
        cfg = preset("cpu", planner=planner, warm_start=False, **flags)
        _, mean = plan(None, cfg, None, None, torch.zeros(2, 8, 2), white(2), spy)
        best = (seen[-1] - 1).square().sum((2, 3)).argsort(1)[:, :40]
        elites = torch.stack([of_one[index] for of_one, index in zip(seen[-1], best)])
        torch.testing.assert_close(mean, elites.mean(1) if planner == "cem" else elites[:, 0])
    torch.testing.assert_close(seen[0].std(1), torch.full((2, 8, 2), 2.0), atol=0.15, rtol=0)
    last = seen[0][:, :, -2:]
    assert (last[:, :, 0] * last[:, :, 1]).mean() / 4 == pytest.approx(0.6, abs=0.03)


def test_the_published_cem_has_limits_of_its_own():
    for cfg in (preset("paper", planner="cem"), wm.parse(["--preset", "paper", "--planner", "cem"])):
        assert (cfg.planner, cfg.init_std, cfg.action_limit, cfg.execute) == ("cem", 1.5, 2.45, "mean")
    assert preset("paper", planner="cem", init_std=3.0).init_std == 3.0
    assert wm.parse(["--preset", "paper", "--planner", "cem", "--init-std", "3"]).init_std == 3.0
    assert preset("paper").action_limit == 0.0 and preset("cpu", planner="cem").init_std == wm.Config.init_std


def test_planner_stays_within_the_action_limit():
    cfg = preset("cpu", samples=256, iterations=12, action_limit=0.6, temperature=0.02)
    _, mean = plan(None, cfg, None, None, torch.zeros(2, 3, 2), white(2), toy_cost)
    assert mean.norm(dim=2).max() <= 0.6 + 1e-5
    torch.testing.assert_close(mean, wm.limit_norm(TARGET, 0.6), atol=0.1, rtol=0)


def test_warm_start_keeps_a_perfect_plan_and_elites_are_candidates():
    cfg = preset("cpu", samples=32, elites=4, iterations=1, temperature=1e-6, action_limit=0.0)
    _, mean = plan(None, cfg, None, None, TARGET.clone(), white(2), toy_cost)
    torch.testing.assert_close(mean, TARGET)
    seen = []

    def spy(*arguments):
        seen.append(arguments[3])
        return toy_cost(*arguments)

    cfg = dataclasses.replace(cfg, execute="elite", warm_start=False)
    action, _ = plan(None, cfg, None, None, torch.zeros(2, 3, 2), white(2), spy)
    assert (seen[0] == action[:, None]).all((2, 3)).any(1).all()


def test_the_executed_elite_is_drawn_by_weight():
    """Costs 0 and 1 at temperature 1: the better of two elites is executed in e / (1 + e) of the plans."""
    cfg = preset("cpu", samples=2, elites=2, iterations=1, temperature=1.0, execute="elite", warm_start=False)
    costs = torch.tensor([0.0, 1.0]).expand(20_000, 2)
    seen = []
    spy = lambda model, cfg, state, actions, goal: seen.append(actions) or costs
    action, _ = plan(None, cfg, None, None, torch.zeros(20_000, 1, 2), white(20_000), spy)
    best = (seen[0][:, 0] == action).all((1, 2)).float().mean()
    assert abs(best - math.e / (1 + math.e)) < 0.012  # four standard deviations


@pytest.mark.parametrize("objective", ["sum", "last"])
def test_fused_rollouts_equal_the_models_own_steps(objective):
    torch.manual_seed(0)
    cfg = preset("smoke", predictor="gru", cost="latent", objective=objective)
    model = WorldModel(cfg)
    state, goal, actions = torch.randn(3, 32), torch.randn(3, 32), torch.randn(3, 7, 5, 2)
    with torch.no_grad():
        fused, plain = (
            wm.rollout_cost(model, dataclasses.replace(cfg, kernels=k), state, actions, goal) for k in (True, False)
        )
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cost", ["distance", "latent"])
@pytest.mark.parametrize("objective", ["sum", "last"])
def test_rollout_cost_by_hand(cost, objective):
    torch.manual_seed(0)
    cfg = preset("smoke", cost=cost, objective=objective, blocked=0.0)
    model, actions = WorldModel(cfg), torch.randn(3, 7, 5, 2)
    state, goal = torch.randn(2, 3, 1, 32)
    with torch.no_grad():
        found = wm.rollout_cost(model, cfg, state[:, 0], actions, goal[:, 0])
        for e in range(3):
            for s in range(7):
                z, costs = state[e], []
                for action in actions[e, s]:
                    z = model.predict(z, action[None])
                    way = (model.psi(z) - model.psi(goal[e])).norm() + model.detour(z, goal[e])[0]
                    costs.append((way if cost == "distance" else (z - goal[e]).square().mean()).item())
                assert found[e, s].item() == pytest.approx(sum(costs) if objective == "sum" else costs[-1], rel=1e-4)


def test_agent_batches_episodes_and_keeps_its_horizon():
    torch.manual_seed(0)
    cfg = preset("smoke", replan_every=2, horizon=6)
    agent = Agent(WorldModel(cfg), cfg)
    obs, info = TwoRooms(3).reset()
    assert agent.act(obs, info["goal_obs"], 50).shape == (3, 2) and agent.mean.shape == (3, 6, 2)
    kept = agent.actions
    assert torch.equal(agent.act(obs, info["goal_obs"], 49), kept[:, 1])  # acts on the plan it has
    assert agent.act(obs.float().numpy(), info["goal_obs"].numpy(), 4).shape == (3, 2) and agent.mean.shape == (3, 4, 2)
    with pytest.raises(ValueError, match="reset"):
        agent.act(obs[:2], info["goal_obs"][:2], 50)
    agent.reset()
    agent.act(obs[:2], info["goal_obs"][:2], 50)
    for bad in ((obs[:, :1], info["goal_obs"][:, :1], 5), (obs, info["goal_obs"][:2], 5), (obs, info["goal_obs"], 0)):
        with pytest.raises(ValueError):
            agent.act(*bad)


def test_the_next_plan_begins_from_what_is_left_of_the_last_and_draws_anew(monkeypatch):
    made, seen, draws = torch.randn(2, 6, 2), [], []

    def spy(model, cfg, state, goal, mean, noise):
        seen.append(mean)
        draws.append(noise(torch.rand, 3))
        return -made, made  # to execute, mean

    monkeypatch.setattr(wm, "plan", spy)
    cfg = preset("smoke", replan_every=2, horizon=6)
    model, (obs, info) = WorldModel(cfg), TwoRooms(2).reset()
    for warm in (True, False):
        agent, first = Agent(model, dataclasses.replace(cfg, warm_start=warm)), len(seen)
        for t in range(4):
            assert torch.equal(agent.act(obs, info["goal_obs"], 50 - t), -made[:, t % 2])
        left = torch.cat((made[:, 2:], torch.zeros(2, 2, 2)), 1)
        assert len(seen) == first + 2 and not seen[first].any() and torch.equal(seen[-1], warm * left)
        assert (draws[first] != draws[-1]).all() and (draws[-1][0] != draws[-1][1]).all()


# ---------------------------------------------------------------------------------------------------------- metrics
def test_wilson_interval():
    assert wm.wilson(97, 100) == pytest.approx([91.55, 98.97], abs=0.02)
    assert wm.wilson(0, 20) == pytest.approx([0.0, 16.11], abs=0.02)
    assert wm.wilson(20, 20) == pytest.approx([83.89, 100.0], abs=0.02)


def test_collapse_meter():
    line = torch.randn(500, 1) * torch.randn(1, 16)
    meter = wm.collapse_meter(line)
    assert meter["effective_rank"] == pytest.approx(1, abs=0.01) and meter["correlation"] == pytest.approx(1, abs=0.01)
    torch.manual_seed(0)
    meter = wm.collapse_meter(2 * torch.randn(20000, 16))
    assert meter["effective_rank"] > 15.9 and meter["correlation"] < 0.03
    assert meter["std_min"] == pytest.approx(2, abs=0.1) and meter["std_mean"] == pytest.approx(2, abs=0.05)
    assert wm.collapse_meter(torch.ones(10, 4))["std_min"] == 0


def test_planning_figures_by_hand(monkeypatch):
    """Success is to end near the goal; any: to have been there."""
    ends, passes, never = ([9.0, 20.0, 29.0], [9.0, 30.0, 9.0], [9.0, 8.0, 9.0])  # x; the goal is at 30
    ways = dict(
        agent=[passes, ends, never, passes], random=[ends, ends, ends, passes], straight=[ends, ends, never, never]
    )

    def run(cfg, episodes, policy, device, shown=0):
        name = "agent" if isinstance(policy, Agent) else "straight" if policy is wm.straight_line else "random"
        if name == "random":
            drawn = torch.cat([policy(None, None, 9) for _ in range(2)])
            assert len(drawn.unique(dim=0)) == 8 and (drawn.norm(dim=1) - 2.45).abs().max() < 1e-5
        at = torch.nn.functional.pad(torch.tensor(ways[name][:episodes])[..., None], (0, 1))
        return wm.Episodes(at, torch.tensor([[30.0, 0.0]]), None, [], {4: 8.0, 1: 3.0}[episodes])

    monkeypatch.setattr(wm, "run_episodes", run)
    cfg = preset("smoke", episodes=4)
    figures, runs = wm.evaluate_planning(WorldModel(cfg), cfg, CPU)
    assert figures == dict(
        success_rate=25.0, success_rate_any=75.0, success_interval=wm.wilson(1, 4), success_interval_any=wm.wilson(3, 4),
        episodes=4, random_success_rate=75.0, straight_line_success_rate=50.0, failed_tasks=[0, 2, 3],
        episode_seconds=2.0, episode_seconds_single=3.0,
    )  # fmt: skip
    assert runs.keys() == ways.keys()


def test_unroll_figures_by_hand(monkeypatch):
    """Latents are a tenth of (x, y, wall, door), the model moves by half of an action, the probe is 1 px off in x."""
    g, T = generator(), 4
    p, a, rooms = 9 * torch.randn(3, T + 1, 2, generator=g), torch.randn(3, T, 2, generator=g), layout(32, 18)
    monkeypatch.setattr(wm, "trajectories", lambda *_: wm.Trajectories(p, a, rooms))
    monkeypatch.setattr(wm, "render", lambda at, _: torch.nn.functional.pad(at, (0, 2)))
    off = torch.tensor([1.0, 0.0, 0.0, 0.0])
    model = SimpleNamespace(encode=lambda o: o / 10, read=lambda z: 10 * z + off)
    model.predict = lambda z, action: z + torch.nn.functional.pad(action, (0, 2)) / 20
    found = wm.evaluate_unroll(model, preset("smoke"), CPU)
    for k in range(1, T + 1):
        at, true, first = p[:, 0] + a[:, :k].sum(1) / 2, p[:, k], p[:, 0]
        wanted = dict(
            position_error_px=(at + off[:2] - true).norm(dim=1), copy_error_px=(first - true).norm(dim=1),
            latent_error=(at - true).square().sum(1) / 400, copy_latent_error=(first - true).square().sum(1) / 400,
        )  # fmt: skip
        for name, value in wanted.items():
            assert len(found[name]) == T and found[name][k - 1] == pytest.approx(value.mean().item(), abs=1e-3), name
    assert found["probe_error_px"] == pytest.approx(1.0, abs=1e-3)


def test_straight_line_floor_reaches_the_goal_where_no_wall_is():
    cfg = preset("smoke")
    run = wm.run_episodes(cfg, 50, wm.straight_line, CPU)
    stuck = ~run.near()[:, -1]
    assert 5 < stuck.sum() < 50  # a straight line through the door sometimes works
    assert (
        (run.position[stuck, -1, 0] < run.layout.wall_x[stuck]) != (run.goal[stuck, 0] < run.layout.wall_x[stuck])
    ).float().mean() > 0.9


# ---------------------------------------------------------------------------------------------------- the whole thing
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "smoke"
    summary = wm.train(preset("smoke", steps=120, run_dir=str(folder)))
    return folder, summary


def test_smoke_run_learns(trained):
    folder, summary = trained
    log = [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in r]
    assert [r["step"] for r in log] == list(range(10, 121, 10))
    assert log[-1]["loss"] < 0.7 * log[0]["loss"] and log[-1]["probe"] < 0.7 * log[0]["probe"]
    torch.manual_seed(0)
    untrained = wm.evaluate_unroll(WorldModel(preset("smoke")), preset("smoke"), CPU, n=64)
    assert summary["probe_error_px"] < 0.5 * untrained["probe_error_px"]
    assert json.loads((folder / "summary.json").read_text()) == summary
    keys = """success_rate success_rate_any success_interval episodes random_success_rate straight_line_success_rate episode_seconds
        episode_seconds_single position_error_px effective_rank train_seconds clips_per_second parameters device"""
    assert set(keys.split()) <= set(summary)
    assert len(summary["position_error_px"]) == 90 and summary["episodes"] == 6


def test_smoke_run_is_drawn(trained, monkeypatch):
    from PIL import Image

    folder, _ = trained
    monkeypatch.syspath_prepend(str(Path(wm.__file__).parent / "results"))
    import draw

    draw.draw(folder)
    for name in ("curves.png", "unroll.png", "success.png", "map.png"):
        assert len(Image.open(folder / name).convert("RGB").getcolors(1 << 24)) > 50, name
    for name, frames in (("episodes.gif", 20), ("unroll.gif", 91)):
        assert Image.open(folder / name).n_frames >= frames, name


def test_load_gives_an_agent_for_anyones_environment(trained):
    folder, _ = trained
    agent = wm.load(folder, samples=8, horizon=5)
    assert agent.cfg.samples == 8 and not agent.model.training
    obs, info = TwoRooms(2).reset()
    again = wm.load(folder / "checkpoint.pt", samples=8, horizon=5)
    assert torch.equal(agent.act(obs, info["goal_obs"], 20), again.act(obs, info["goal_obs"], 20))
    with pytest.raises(TypeError, match="latent_dim"):
        wm.load(folder, latent_dim=3)
    with pytest.raises(wm.UserError, match="elites"):
        wm.load(folder, elites=10_000)


def test_collapse_is_flagged(tmp_path, capsys):
    ablate = ("variance", "covariance", "inverse-dynamics")
    wm.train(
        preset("smoke", steps=60, similarity_weight=50.0, ablate=ablate, episodes=0, run_dir=str(tmp_path / "run"))
    )
    assert "raise --variance-weight" in capsys.readouterr().out


def test_published_planner_runs_under_autocast(monkeypatch):
    monkeypatch.setattr(wm, "use_bf16", lambda device: True)
    cfg = preset("paper", latent_dim=24, channels=(4, 4, 4), samples=12, elites=3, iterations=2, horizon=6)
    obs, info = TwoRooms(3, seed=1).reset()
    assert Agent(WorldModel(cfg), cfg).act(obs, info["goal_obs"], 200).isfinite().all()


def test_tasks_of_a_seed_are_the_same_for_any_batch():
    (_, few), (_, many) = TwoRooms(20, seed=5).reset(), TwoRooms(300, seed=5).reset()
    for name in ("position", "goal", "wall_x", "door_y"):
        assert torch.equal(few[name], many[name][:20])


def test_turns_follow_the_von_mises_law():
    table = wm.von_mises_table()
    from torch.distributions import VonMises

    torch.manual_seed(0)
    drawn = VonMises(torch.tensor(0.0), torch.tensor(5.0)).sample((200000,))
    q = torch.linspace(0.01, 0.99, 50)
    assert (table.quantile(q) - drawn.quantile(q)).abs().max() < 0.02
    assert table.abs().max() < 2.9 and abs(table.mean()) < 1e-4  # no about-turn from the ends of the table


def test_who_comes_no_nearer_wanders_and_who_has_arrived_stays():
    cfg = preset("smoke", patience=8, replan_every=4)
    agent, plans = wm.Agent(wm.WorldModel(cfg), cfg), torch.zeros(4, 4, 2)
    ways = [(20.0, 9.0, 30.0, 1.0), (19.5, 9.0, 25.0, 1.0), (20.0, 9.5, 20.0, 1.0), (20.0, 9.0, 15.0, 1.0)]
    for n, to_go in enumerate(ways):
        done = agent.wander(torch.tensor(to_go), plans)
        agent.age = 4  # steps acted before the next plan
        assert not done[2:].any()
        if n == 2:  # eight steps without coming 1 px nearer: each its own way
            torch.testing.assert_close(done[:2].norm(dim=2), torch.full((2, 4), cfg.action_limit))
            assert (done == done[:, :1]).all() and (done[0, 0] != done[1, 0]).all()
        else:
            assert not done[:2].any()


@pytest.mark.parametrize("flags", [dict(cost="distance"), dict(cost="distance", distance_steps=0)])
def test_nothing_is_planned_with_a_distance_that_was_not_learnt(flags):
    with pytest.raises(wm.UserError, match="needs --cost latent"):
        wm.check(preset("paper", **flags))
