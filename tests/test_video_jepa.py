"""video_jepa.py: the digits' law, networks, loss, average precision, and that it learns."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import video_jepa as vj
from video_jepa import SIZE, Clips, Model, preset

ROOT = Path(__file__).parents[1]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------------- data
def test_digits_go_straight_at_the_published_speed_and_bounce():
    path = vj.paths(2000, 40, generator())
    assert path.min() >= 0 and path.max() <= SIZE - vj.DIGIT
    step = path.diff(dim=1)
    turn = ((path[:, 1:-1] < 3.6) | (path[:, 1:-1] > SIZE - vj.DIGIT - 3.6)).any(2)  # a border within reach
    assert (step[:, 1:] - step[:, :-1])[~turn].abs().max() < 1e-3  # no force but at borders
    free = ~turn[:, :-1] & ~turn[:, 1:]
    torch.testing.assert_close(
        step[:, 1:-1][free].norm(dim=1), torch.full((int(free.sum()),), 3.6), rtol=1e-3, atol=1e-3
    )
    assert (step.norm(dim=2) <= 3.6 + 1e-3).all()
    heading = torch.atan2(*step[:, 0].unbind(1)[::-1])
    assert heading.cos().mean().abs() < 0.06 and heading.sin().mean().abs() < 0.06
    spread = path[:, 20].histc(6, 0, SIZE - vj.DIGIT)  # uniform in place, at any time
    assert (spread / spread.mean() - 1).abs().max() < 0.15


def test_a_tracker_of_two_frames_predicts_the_third():
    """Elastic reflection: the tracker unfolds the bounce, and is right wherever the velocity's sign is known."""
    path, room = vj.paths(3000, 3, generator(1)), SIZE - vj.DIGIT
    v = path[:, 1] - path[:, 0]
    unfolded = path[:, 1] + v
    guess = torch.where(unfolded < 0, -unfolded, torch.where(unfolded > room, 2 * room - unfolded, unfolded))
    inside = ((path[:, 0] > 3.6) & (path[:, 0] < room - 3.6)).all(1)  # no bounce between the first two
    assert inside.sum() > 1500
    torch.testing.assert_close(guess[inside], path[inside][:, 2], rtol=0, atol=1e-3)


def test_frames_show_the_digits_at_their_centres():
    digits = torch.zeros(3, 28, 28, dtype=torch.uint8)
    digits[:, 12:16, 12:16] = torch.tensor([255, 200, 150], dtype=torch.uint8)[:, None, None]
    clips = vj.move_digits(digits, 50, 10, generator(2))
    assert clips.frames.shape == (50, 10, 64, 64) and clips.frames.dtype == torch.uint8
    assert clips.centres.min() >= 14 and clips.centres.max() <= 50
    shown, overlaps = set(), 0
    for frames, occupied, centres in zip(*clips):
        x, y = centres.long().unbind(2)  # [10, 2]
        light = frames[torch.arange(10)[:, None], y, x].median(0).values  # of each digit: mostly it is not covered
        for t in range(10):
            wanted = torch.zeros(64, 64, dtype=torch.uint8)
            for d in light.argsort():  # the brighter of two digits covers the darker
                wanted[y[t, d] - 2 : y[t, d] + 2, x[t, d] - 2 : x[t, d] + 2] = light[d]
            assert torch.equal(frames[t], wanted)
            assert {tuple(c) for c in occupied[t].nonzero().tolist()} == set(
                zip((y[t] // 8).tolist(), (x[t] // 8).tolist())
            )
            overlaps += bool((wanted > 0).sum() < 32 and light[0] != light[1])
        shown |= set(light.tolist())
    assert shown == {150, 200, 255} and overlaps > 5


def test_occupancy_leaves_out_what_is_unknown():
    centres = torch.tensor([[[3.0, 60.0], [torch.nan, torch.nan]]])
    assert vj.occupancy(centres).nonzero().tolist() == [[0, 7, 0]]


def test_training_and_validation_share_no_digit():
    train, unseen = vj.glyphs()
    assert len(train) == 2000 and len(unseen) == 500 and torch.equal(train, vj.glyphs()[0])
    both = torch.cat((train, unseen)).flatten(1)
    assert len(both.unique(dim=0)) == len(both)
    assert (both.amax(1) > 150).all() and train[:10].flatten(1).unique(dim=0).shape[0] == 10


def test_mnist_in_torchvisions_layout(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, n in (("train", 30), ("t10k", 10)):
        for what, magic, shape in (("images-idx3", 2051, (n, 28, 28)), ("labels-idx1", 2049, (n,))):
            content = rng.integers(0, 10, shape, dtype=np.uint8)
            header = b"".join(int(x).to_bytes(4, "big") for x in (magic, *shape))
            (raw / f"{name}-{what}-ubyte").write_bytes(header + content.tobytes())
    train, unseen = vj.mnist(str(tmp_path))
    assert train.shape == (30, 28, 28) and unseen.shape == (10, 28, 28) and train.dtype == torch.uint8
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens there
    with pytest.raises(vj.UserError, match="could not be downloaded .*MNIST/raw"):
        vj.mnist(str(tmp_path / "empty"))


def published_file(folder, sequences=10):
    """A small file of the published form: [20, N, 64, 64] uint8."""
    digits = vj.glyphs(40)[0]
    clips = vj.move_digits(digits, sequences, 20, generator(3))
    (folder / "MovingMNIST").mkdir(parents=True)
    np.save(folder / "MovingMNIST/mnist_test_seq.npy", clips.frames.transpose(0, 1).numpy())
    return clips


def test_the_published_file(tmp_path, monkeypatch):
    made = published_file(tmp_path)
    train, unseen = vj.moving_mnist(str(tmp_path))
    assert train.frames.shape == (18, 10, 64, 64) and unseen.frames.shape == (2, 10, 64, 64)
    assert torch.equal(torch.cat((train.frames, unseen.frames)), made.frames.reshape(20, 10, 64, 64))
    truth = made.centres.reshape(20, 10, 2, 2)
    found = torch.cat((train.centres, unseen.centres))
    apart = (truth[:, :, 0] - truth[:, :, 1]).abs().amax(2) > 26  # digits that do not touch
    assert apart.sum() > 20
    off = torch.cdist(truth[apart].float(), found[apart]).amin(2)
    assert off.nanmean() < 2.5 and off.isnan().float().mean() < 0.05  # centre of mass against centre of the square
    import scipy.ndimage

    monkeypatch.setattr(scipy.ndimage, "label", lambda *a, **k: pytest.fail("found again though nothing changed"))
    again, _ = vj.moving_mnist(str(tmp_path))
    assert torch.equal(again.centres.nan_to_num(-1), train.centres.nan_to_num(-1))


def test_the_largest_components_are_the_digits(tmp_path):
    """By pixels, not by light: a bright speck does not hide a dim digit."""
    frames = np.zeros((20, 10, 64, 64), np.uint8)
    frames[..., 5:15, 5:15], frames[..., 40:50, 40:50], frames[..., 5:9, 50:54] = 40, 255, 255
    (tmp_path / "MovingMNIST").mkdir()
    np.save(tmp_path / "MovingMNIST/mnist_test_seq.npy", frames)
    train, _ = vj.moving_mnist(str(tmp_path))
    assert sorted(train.centres[0, 0].tolist()) == [[10, 10], [45, 45]]


def test_the_published_file_without_network(tmp_path, monkeypatch):
    from torchvision.datasets import MovingMNIST

    monkeypatch.setattr(MovingMNIST, "_URL", "http://127.0.0.1:9/mnist_test_seq.npy")
    with pytest.raises(vj.UserError, match="mnist_test_seq.npy is missing or damaged and could not be downloaded"):
        vj.moving_mnist(str(tmp_path))


def test_batches_are_a_function_of_seed_and_step():
    cfg = preset("smoke", batch_size=8)
    one, other = (vj.ClipStream(cfg, torch.device("cpu")) for _ in range(2))
    other(5)
    assert all(torch.equal(a, b) for a, b in zip(one(3), other(3))) and not torch.equal(one(3).frames, one(4).frames)
    halves = [vj.ClipStream(cfg, torch.device("cpu"), rank, 2)(3).frames for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), one(3).frames)
    assert torch.equal(one.unseen(10).frames, other.unseen(10).frames) and not torch.equal(
        one.unseen(8).frames, one(0).frames
    )
    other.cfg = preset("smoke", batch_size=8, seed=1)
    assert not torch.equal(one(3).frames, other(3).frames)  # but all seeds are measured on the same clips
    assert torch.equal(one.unseen(10).frames, other.unseen(10).frames)
    one.validation, other.train = torch.zeros_like(one.validation), torch.zeros_like(other.train)
    assert one.unseen(5).frames.max() == 0 < one(0).frames.max()  # each takes its own digits only
    assert other(0).frames.max() == 0 < other.unseen(5).frames.max()


# ---------------------------------------------------------------------------------------------------------- networks
def test_published_sizes():
    with torch.device("meta"):
        model = Model(preset("paper"))
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert (count(model.encoder), count(model.predictor)) == (89_280, 2_032_496)
    assert [type(l).__name__ for l in model.projector] == ["Linear", "BatchNorm", "ReLU", "Linear"]
    assert [(l.out_features, l.bias is None) for l in (model.projector[0], model.projector[3])] == [
        (64, False),
        (64, True),
    ]


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_shapes_of_what_others_call(stride):
    cfg = preset("smoke", stride=stride, levels=2)
    model = Model(cfg).eval()
    z = model.encode(torch.rand(3, 1, 5, 64, 64))
    assert z.shape == (3, 5, cfg.latent_dim, 64 // stride, 64 // stride)
    future = model.rollout(z[:, :2], 4)
    assert future.shape == (3, 4, *z.shape[2:])
    p, x = model.detect(z), model.decode(z)
    assert (
        p.shape == (3, 5, 8, 8)
        and x.shape == (3, 5, 64, 64)
        and 0 <= p.min()
        and p.max() <= 1
        and 0 <= x.min()
        and x.max() <= 1
    )


@pytest.mark.parametrize("residual", [False, True])
def test_forecasts_from_pairs_are_rollouts_from_every_frame(residual):
    torch.manual_seed(0)
    model = Model(preset("smoke", residual=residual)).double().eval()
    z = torch.randn(2, 7, 16, 16, 16, dtype=torch.float64)
    found = model.forecasts(z, 4, "pairs")
    assert [y.shape[1] for y in found] == [5, 4, 3, 2]
    for k, y in enumerate(found, 1):
        for n in range(y.shape[1]):  # of frame 7 - y.shape[1] + n, from the two frames k + 1 and k before it
            torch.testing.assert_close(y[:, n], model.rollout(z[:, n : n + 2], k)[:, -1])


@pytest.mark.parametrize("norm", ["layer", "batch"])
def test_forecasts_in_rounds_feed_every_frame_with_the_round_before(norm):
    """All frames in every round, though most need not be predicted again; with BatchNorm they count in training."""
    torch.manual_seed(0)
    model = Model(preset("smoke", norm=norm)).double()
    z = torch.randn(2, 6, 16, 16, 16, dtype=torch.float64)
    found, state = (
        model.forecasts(z, 4, "rounds"),
        torch.cat((z, torch.zeros(2, 6, 8, 16, 16)), 2),
    )  # nothing handed on yet
    for y in found:
        new = model.predict(state[:, :-2].flatten(0, 1), state[:, 1:-1].flatten(0, 1)).unflatten(0, (2, 4))
        state = torch.cat((state[:, :2], new), 1)
        torch.testing.assert_close(y, new[:, :, :16])
    # after as many rounds as there are frames to predict, all of it follows from the two first frames
    model.eval()
    torch.testing.assert_close(model.forecasts(z, 4, "rounds")[-1], model.rollout(z[:, :2], 4))
    # and a rollout from more frames is what rounds make of the frame after them, and so on
    for context in (3, 4):
        ahead = model.rollout(z[:, :context], 2)
        assert ahead.shape == (2, 2, 16, 16, 16)
        rounds = model.forecasts(z, 2, "rounds")  # of frames 2..5
        for k in (1, 2):
            torch.testing.assert_close(ahead[:, k - 1], rounds[k - 1][:, context - 3 + k])


def test_what_is_handed_on_reaches_the_predictions_after_the_next():
    torch.manual_seed(0)
    model = Model(preset("smoke", hidden_dim=8)).eval()
    z, real = torch.randn(1, 2, 16, 16, 16), Model.predict
    whole = model.rollout(z, 3)
    forgetful = lambda a, b: real(model, a, b) * (torch.arange(24) < 16)[:, None, None]
    model.predict = forgetful
    without = model.rollout(z, 3)
    torch.testing.assert_close(whole[:, 0], without[:, 0])
    assert (whole[:, 1:] - without[:, 1:]).abs().amax((0, 2, 3, 4)).min() > 1e-3
    assert whole.shape == without.shape == (1, 3, 16, 16, 16)


def test_residual_and_plain_prediction():
    torch.manual_seed(0)
    plain, added = Model(preset("smoke", residual=False)), Model(preset("smoke", residual=True))
    added.load_state_dict(plain.state_dict())
    a, b = torch.randn(2, 3, 16 + 8, 16, 16)
    torch.testing.assert_close(added.predict(a, b), plain.predict(a, b) + b)


def test_layer_norm_does_not_mix_clips():
    torch.manual_seed(0)
    model = Model(preset("smoke", norm="layer"))  # in training mode
    x = torch.rand(4, 1, 3, 64, 64)
    torch.testing.assert_close(model.encode(x)[:2], model.encode(x[:2]), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- loss
@pytest.mark.parametrize("context", ["pairs", "rounds"])
def test_the_loss_is_its_formula(context):
    torch.manual_seed(0)
    cfg = preset("smoke", batch_size=4, rollout=3, prediction_weight=3.0, context=context)
    model = Model(cfg).double()
    batch = vj.ClipStream(cfg, torch.device("cpu"))(0)
    total, terms, latents = vj.losses(model, cfg, batch)
    z = model.encode(batch.frames[:, None].double() / 255)
    p, errors = model.project(z), []
    for k in range(1, 4):
        if context == "pairs":
            y = torch.stack([model.rollout(z[:, t - k - 1 : t - k + 1], k)[:, -1] for t in range(k + 1, cfg.frames)], 1)
        else:
            y = model.forecasts(z, k, "rounds")[-1]
        errors.append((model.project(y) - p[:, -y.shape[1] :]).square().mean())
    torch.testing.assert_close(terms[0], torch.stack(errors).mean().detach())
    p = p - p.mean((0, 1))  # each place's mean
    v, c = vj.variance_covariance_loss(p.reshape(-1, cfg.projector_width))
    torch.testing.assert_close(terms[1:3], torch.stack((v, c)).detach())
    found, painted, x = model.detect(z), model.decode(z[:, [0, 8]]), batch.frames[:, [0, 8]].double() / 255
    detection = -torch.where(batch.occupied, found, 1 - found).log().mean()
    decoding = -(x * painted.log() + (1 - x) * (1 - painted).log()).mean()
    torch.testing.assert_close(terms[3:], torch.stack((detection, decoding)).detach())
    torch.testing.assert_close(total.detach(), 3 * terms[0] + 10 * terms[1] + 100 * terms[2] + terms[3] + terms[4])
    assert latents.shape == (4 * 10 * 16 * 16, 16) and not latents.requires_grad


def test_the_heads_teach_the_encoder_nothing():
    torch.manual_seed(0)
    cfg = preset("smoke", batch_size=4)
    model = Model(cfg)
    batch = vj.ClipStream(cfg, torch.device("cpu"))(0)
    grads = []
    for labels in (batch.occupied, ~batch.occupied):
        total, *_ = vj.losses(model, cfg, batch._replace(occupied=labels))
        grads.append(torch.autograd.grad(total, list(model.encoder.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_a_fixed_code_of_places_does_not_count_as_spread():
    cfg = preset("smoke", batch_size=4)
    model, batch = Model(cfg), vj.ClipStream(cfg, torch.device("cpu"))(0)
    code = 5 * torch.randn(cfg.latent_dim, 16, 16, generator=generator(3))
    model.encode = lambda x: code.expand(len(x), x.shape[2], -1, -1, -1)  # the same whatever the frame shows
    variance = lambda centre: vj.losses(model, preset("smoke", centre_places=centre), batch)[1][
        vj.TERMS.index("variance")
    ]
    assert variance(False) < 0.5 and variance(True) > 0.98


def test_muon_turns_matrices_and_leaves_vectors_to_adam():
    torch.manual_seed(0)
    matrix, vector = torch.nn.Parameter(torch.randn(6, 4, 3)), torch.nn.Parameter(torch.randn(7))
    before = matrix.detach().clone(), vector.detach().clone()
    optimizer = vj.Muon([dict(params=[matrix], matrix=True), dict(params=[vector], matrix=False)], lr=0.1)
    matrix.grad, vector.grad = torch.randn(6, 4, 3), torch.randn(7)
    slope = vector.grad.sign()
    optimizer.step()
    turned = torch.linalg.svdvals((matrix.detach() - before[0]).view(6, 12) / 0.1)
    assert 0.6 < turned.min() and turned.max() < 1.3
    torch.testing.assert_close(vector.detach(), before[1] - 0.01 * slope, rtol=1e-4, atol=1e-6)


def test_rates_of_the_schedules():
    cfg = preset("smoke", lr=2.0)  # cosine: 60 steps of warm-up, then 1140 of decay
    at = {0: 1 / 60, 29: 0.5, 59: 1, 60: 1, 440: 0.75, 630: 0.5, 820: 0.25, 1200: 0}
    assert [vj.learning_rate(cfg, step, 1200) for step in at] == pytest.approx([2 * share for share in at.values()])
    assert vj.learning_rate(cfg, 0, 3) == 2  # a short schedule warms up for one step
    assert {vj.learning_rate(preset("smoke", lr=2.0, schedule="constant"), step, 1200) for step in at} == {2}
    assert {preset(name).schedule for name in ("gpu", "cpu")} == {"cosine"} and preset("paper").schedule == "constant"


@pytest.mark.parametrize("name, slope, matrices, vectors", [
    ("muon", 0.0, (0.995, 0.0), (1.0, 0.0)),  # decay of 0.01, on matrices only
    ("muon", 7.0, None, (1.0, -0.05)),  # of vectors Adam's first step, at a tenth of the rate
    ("adam", 7.0, (1.0, -0.5), (1.0, -0.5)),
    ("adam", 0.0, (1.0, 0.0), (1.0, 0.0)),
])  # fmt: skip
def test_an_update_reaches_every_parameter_at_the_rate_it_is_given(name, slope, matrices, vectors):
    cfg = preset("smoke", optimizer=name)
    model = Model(cfg)
    optimizer, before = vj.make_optimizer(model, cfg), [p.detach().clone() for p in model.parameters()]
    assert {group["lr"] for group in optimizer.param_groups} == {cfg.lr}
    for p in model.parameters():
        p.grad = torch.full_like(p, slope)
    vj.update(model, cfg, optimizer, 0.5)
    for p, old in zip(model.parameters(), before):
        factor, step = (matrices if p.ndim > 1 else vectors) or (None, None)
        if factor:
            torch.testing.assert_close(p.detach(), factor * old + step, rtol=1e-5, atol=1e-5)
        else:  # equal slopes make equal steps, whose norm is the rate, times sqrt(n / m) if taller than wide; and decay
            n, m = len(p), p[0].numel()
            down = torch.full_like(p, 0.5 * (max(1, n / m) / (n * m)) ** 0.5)
            torch.testing.assert_close(0.995 * old - p.detach(), down, rtol=0.4, atol=0)
        assert p.grad is None


# -------------------------------------------------------------------------------------------------------- evaluation
def test_average_precision_by_hand():
    score, label = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5]), torch.tensor([True, False, True, True, False])
    assert vj.average_precision(score, label) == pytest.approx((1 / 1 + 2 / 3 + 3 / 4) / 3)
    assert vj.average_precision(label.float(), label) == 1
    # equal scores are one threshold: the share of positives, whatever the order
    assert (
        vj.average_precision(torch.ones(5), label)
        == pytest.approx(3 / 5)
        == vj.average_precision(torch.ones(5), label.flip(0))
    )
    tied = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.1])
    assert vj.average_precision(tied, label) == pytest.approx(1 / 3 * 1 + 2 / 3 * 3 / 4)
    g = generator(5)
    noise, rare = torch.rand(100000, generator=g), torch.rand(100000, generator=g) < 0.03
    assert vj.average_precision(noise, rare) == pytest.approx(0.03, abs=0.005)


class Oracle:
    """Latents that are the detection map of the true frame; the next is what `predict` makes of two."""

    forecasts, state, hidden, batch_norm = Model.forecasts, Model.state, 0, False

    def __init__(self, predict):
        self.predict = predict

    def encode(self, frames):
        return frames[:, 0, :, None, ::8, ::8] * 1.0

    def detect(self, z):
        return z[:, :, 0]


def still(B=6, T=10):
    """Clips in which nothing moves; the picture holds its own detection map."""
    occupied = torch.zeros(B, T, 8, 8, dtype=torch.bool)
    occupied[torch.arange(B), :, torch.arange(B), 3] = True
    frames = occupied.repeat_interleave(8, 2).repeat_interleave(8, 3).to(torch.uint8) * 255
    centres = torch.full((B, T, 2, 2), torch.nan)
    centres[:, :, 0] = torch.stack((torch.full((B,), 28.0), torch.arange(B) * 8.0 + 4), 1)[:, None]
    return Clips(frames, occupied, centres)


def test_horizons_compare_the_right_frames():
    clips = still()
    result = vj.evaluate_horizons(Oracle(lambda before, last: last), clips, 7)
    assert (
        result["ap"] == result["ap_rounds"] == result["ap_copy_last"] == result["ap_true_frames"] == [1.0] * 7
        and result["map"] == 1
    )
    moved = clips._replace(frames=clips.frames.clone(), occupied=clips.occupied.clone())
    for t in range(1, 10):  # one cell to the right a frame, round and round
        moved.occupied[:, t] = clips.occupied[:, 0].roll(t, 2)
        moved.frames[:, t] = clips.frames[:, 0].roll(8 * t, 2)
    right = vj.evaluate_horizons(Oracle(lambda before, last: last.roll(1, 3)), moved, 7)
    assert right["ap"] == right["ap_rounds"] == [1.0] * 7 and max(right["ap_copy_last"]) < 0.1
    late = vj.evaluate_horizons(Oracle(lambda before, last: last), moved, 7)
    assert max(late["ap"]) < 0.1  # a predictor that copies is a copy of the last true frame, further and further back
    # four of eight cells off where `before` is true, right where `before` is itself four off: in rounds the second step is
    back = vj.evaluate_horizons(Oracle(lambda before, last: before.roll(-2, 3)), moved, 7)
    assert back["ap"][1] < 0.1 < 0.5 < back["ap_rounds"][1] and back["ap"][0] < 0.1 < 0.9 < back["ap"][2]
    assert back["map"] == pytest.approx(sum(back["ap"]) / 7, abs=2e-4)
    assert back["map_rounds"] == pytest.approx(sum(back["ap_rounds"]) / 7, abs=2e-4)


def test_each_tracker_is_measured_under_its_own_name():
    clips = still()
    clips.centres[:, :, 0, 0] = torch.tensor(
        [18.0, 26, 34, 42, 50, 42, 34, 26, 18, 18]
    )  # 8 px a frame, between 14 and 50
    clips.centres[:, :, 0, 1] = 28
    clips = clips._replace(occupied=vj.occupancy(clips.centres))
    result = vj.evaluate_horizons(Oracle(lambda before, last: last), clips, 7)
    assert result["ap_bouncing_velocity"] == [1.0] * 7 and max(result["ap_constant_velocity"]) < 0.95


def test_constant_velocity_is_right_until_the_border():
    centres = torch.tensor([20.0, 30.0]) + torch.arange(6)[:, None] * torch.tensor([3.0, -2.0])
    corner = torch.tensor([14.0, 50.0]) + torch.arange(6)[:, None] * torch.tensor(
        [12.0, -12.0]
    )  # at (50, 14) in 3 frames
    centres = torch.stack((centres, corner.clamp(14, 50)), 1)[None]  # [1, 6, 2, 2]
    maps = vj.constant_velocity(centres, 2)
    assert maps.shape == (1, 3, 8, 8)
    for k in range(3):
        for x, y in centres[0, k + 3].tolist():
            assert maps[0, k, int(y // 8), int(x // 8)] >= -2 * 4**2  # the cell that it is in: at most half a cell off
        y, x = divmod(maps[0, k].argmax().item(), 8)  # the nearest cell of all is that of a digit
        assert any((int(b // 8), int(a // 8)) == (y, x) for a, b in centres[0, k + 3].tolist())
    swapped = centres.clone()
    swapped[:, 1::2] = swapped[:, 1::2].flip(2)  # components come in no order
    torch.testing.assert_close(vj.constant_velocity(swapped, 2), maps)


def test_a_tracker_that_knows_the_law_sets_the_ceiling():
    """Two exact positions and elastic bounces: what is left is which cell a position near an edge is counted in."""
    exact = vj.paths(2 * 500, 10, generator(9)).view(500, 2, 10, 2).transpose(1, 2)  # corners
    occupied = vj.occupancy(exact.round() + 14)
    mean = lambda centres, bounce: (
        sum(vj.average_precision(vj.constant_velocity(centres, t + 1, bounce), occupied[:, t + 2 :]) for t in range(7))
        / 7
    )
    assert 0.82 < mean(exact + 14, True) < 0.88 and mean(exact + 14, False) < 0.6


def test_training_on_the_published_file(tmp_path, monkeypatch):
    frames = torch.zeros(20, 20, 64, 64, dtype=torch.uint8)
    clips = Clips(
        frames.view(40, 10, 64, 64), torch.zeros(40, 10, 8, 8, dtype=torch.bool), torch.full((40, 10, 2, 2), torch.nan)
    )
    clips.frames.copy_(torch.arange(10, dtype=torch.uint8)[:, None, None].expand_as(clips.frames))
    monkeypatch.setattr(
        vj, "moving_mnist", lambda root: (Clips(*(x[:36] for x in clips)), Clips(*(x[36:] for x in clips)))
    )
    cfg = preset("smoke", data="moving-mnist", frames=6, data_dir=str(tmp_path))
    stream = vj.ClipStream(cfg, torch.device("cpu"))
    first = set()
    for step in range(12):
        batch = stream(step)
        assert batch.frames.shape == (8, 6, 64, 64) and batch.occupied.shape == (8, 6, 8, 8)
        when = batch.frames[:, :, 0, 0].long()
        assert (when.diff(dim=1) == 1).all() and (when == when[:1]).all()  # six successive frames
        first.add(when[0, 0].item())
    assert len(first) > 1 and len(stream.unseen(3).frames) == 3 and stream.unseen(99).frames.shape[:2] == (4, 10)
    assert vj.losses(Model(cfg), cfg, stream(0))[0].isfinite()


@pytest.mark.parametrize(
    "flags",
    [dict(norm="batch", hidden_dim=0, stride=2, down="stride", residual=False), dict(stride=8, context="pairs")],
)
def test_loss_compiles_to_one_graph(flags):
    cfg = preset("smoke", batch_size=4, **flags)
    torch.manual_seed(0)
    model, batch = Model(cfg), vj.ClipStream(cfg, torch.device("cpu"))(0)
    wanted = vj.losses(model, cfg, batch)[0]
    found = torch.compile(vj.losses, backend="aot_eager", fullgraph=True, dynamic=False)(model, cfg, batch)[0]
    torch.testing.assert_close(found, wanted)
    found.backward()
    assert all(p.grad is not None for p in model.encoder.parameters())


# ----------------------------------------------------------------------------------------------------- whole commands
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "run"
    done = subprocess.run(
        [sys.executable, "video_jepa.py", "--preset", "smoke", "--run-dir", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return path, done.stdout


def test_it_learns(run):
    path, out = run
    summary = json.loads(out.splitlines()[-1])
    assert summary == json.loads((path / "summary.json").read_text())
    assert summary["map"] > max(0.1, sum(summary["ap_copy_last"]) / 7) and summary["ap_true_frames"][0] > 0.5
    assert all(math.isfinite(v) for v in summary["ap"]) and summary["map"] < 0.86
    for name in ("curves.png", "ap.png", "rollout.gif"):
        with Image.open(path / name) as picture:
            assert np.array(picture.convert("L")).std() > 5 and getattr(picture, "n_frames", 1) == (
                10 if name.endswith("gif") else 1
            )


def test_load_is_the_trained_model(run):
    model = vj.load(run[0])
    clips = vj.ClipStream(preset("smoke"), torch.device("cpu")).unseen(20)
    x = clips.frames[:, None].float() / 255
    with torch.no_grad():
        z = model.encode(x)
        assert not model.training and torch.equal(z, model.encode(x))
        assert vj.average_precision(model.detect(z), clips.occupied) > 0.5
