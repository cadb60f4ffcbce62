"""video_jepa.py: the law of the digits, data files, networks, rollouts, loss, measure, and that it learns."""

import json

import numpy as np
import pytest
import torch
from torchvision.datasets import MNIST, MovingMNIST

import video_jepa as vj
from video_jepa import Model, preset


# ------------------------------------------------------------------------------------------------------------- data
def dots(kinds: int) -> np.ndarray:
    """Digits that are one bright pixel in their upper left corner, each of its own brightness."""
    digits = np.zeros((kinds, 28, 28), np.uint8)
    digits[:, 0, 0] = 255 - np.arange(kinds)
    return digits


@pytest.fixture(scope="module")
def corners():
    """Where the two digits of 400 sequences are [N, 20, 2, 2] (x, y); of sequences in which they never coincide."""
    sequences = vj.move_digits(dots(200), 600, seed=3)
    found = []
    for sequence in sequences:
        values = np.unique(sequence)[1:]
        places = [[np.argwhere(frame == value)[:, ::-1] for value in values] for frame in sequence]
        if len(values) == 2 and all(len(place) == 1 for frame in places for place in frame):
            found.append(places)
    return np.array(found)[:, :, :, 0].astype(int)


def test_digits_move_by_the_published_law(corners):
    assert len(corners) > 400 and corners.min() == 0 and corners.max() == 36
    x = corners.transpose(0, 2, 3, 1).reshape(-1, 20)  # each axis on its own: [M, 20]
    at_border = x == 36  # a position below the border is truncated to 35 at most: the digit has hit and rests there
    assert at_border.mean() > 0.02 and (x[:, 1:][at_border[:, :-1]] < 36).mean() > 0.97
    step = np.diff(x, axis=1)
    assert np.abs(step).max() <= 4  # 3.6 px, truncated
    inside = ((x > 4) & (x < 32)).all(1)  # never near a border: a straight line, truncated
    assert inside.sum() > 10
    for line in x[inside]:
        speed = (line[-1] - line[0]) / 19
        assert np.abs(line - line[0] - speed * np.arange(20)).max() < 1.5
    free = ((corners > 4) & (corners < 32)).all((1, 3))  # [N, 2]: digits that meet no border at all, on both axes
    travelled = np.linalg.norm(corners[:, -1] - corners[:, 0], axis=-1)[free]
    far = np.linalg.norm(np.diff(corners[:, ::5], axis=1), axis=-1)  # in five frames, at most 18 px
    assert far.max() < 5 * 3.6 + 2 and np.median(far) > 12 and (travelled <= 19 * 3.6 + 2).all()


def test_positions_and_directions_are_uniform(corners):
    first = corners[:, 0].reshape(-1, 2)
    counts = np.histogram(first, bins=6, range=(0, 36))[0]
    assert counts.max() / counts.min() < 1.5
    step = (corners[:, 5] - corners[:, 0]).reshape(-1, 2)
    assert np.abs(step.mean(0)).max() < 1.0


def test_frames_show_the_brighter_pixel():
    digits = np.full((2, 28, 28), 100, np.uint8)
    digits[1] = 200
    frames = vj.move_digits(digits, 50, seed=0)
    assert set(np.unique(frames)) == {0, 100, 200} and (frames == 0).any((2, 3)).all()
    bright = (frames == 200).sum((2, 3))
    assert set(np.unique(bright[bright < 28 * 28])) == {0}  # a bright square is never covered


def test_labels_of_bright_frames_do_not_overflow():
    frames = np.full((1, 64, 64), 90, np.uint8)
    frames[0, 40:50, 8:30] = 250  # darkest + brightest is more than 255
    assert np.argwhere(vj.detection_labels(frames)).tolist() == [[0, 5, 2]]


def test_clips_are_cut_from_sequences_with_their_labels():
    square = np.zeros((1, 28, 28), np.uint8)
    square[:, 4:24, 4:24] = 255
    sequences = vj.move_digits(square, 12, seed=1)
    clips = vj.make_clips(sequences, torch.device("cpu"))
    assert clips.frames.shape == (24, 10, 64, 64)
    assert clips.labels.shape == (24, 10, 8, 8) and clips.labels.dtype == torch.bool
    assert torch.equal(clips.frames[3, 2], torch.from_numpy(sequences[1, 12]))
    labelled = np.argwhere(vj.detection_labels(sequences[1, 12][None])[0])
    assert 1 <= len(labelled) <= 2 and labelled.tolist() == clips.labels[3, 2].nonzero().tolist()


def test_training_and_validation_share_no_digit():
    train, validation = vj.load_sequences(preset("smoke", sequences=300))
    assert train.shape == (270, 20, 64, 64) and validation.shape == (30, 20, 64, 64)
    again, _ = vj.load_sequences(preset("smoke", sequences=300, seed=1))
    assert np.array_equal(train, again)  # the same for every seed
    assert not np.array_equal(train[:30], validation)


def write_mnist(root, train=30, test=10):
    """Files in MNIST's format, of digits that are one dot."""
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    for name, n in (("train", train), ("t10k", test)):
        header = b"".join(int(x).to_bytes(4, "big") for x in (2051, n, 28, 28))
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + dots(n).tobytes())
        header = b"".join(int(x).to_bytes(4, "big") for x in (2049, n))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(header + bytes(n))
    return raw


def test_mnist_files(tmp_path, monkeypatch):
    raw = write_mnist(tmp_path)
    cfg = preset("cpu", data_dir=str(tmp_path), sequences=20)
    train, validation = vj.load_sequences(cfg)
    assert train.shape == (18, 20, 64, 64) and validation.shape == (2, 20, 64, 64)
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(vj.UserError, match=r"cannot read .*MNIST/raw .*delete it to download it again"):
        vj.load_sequences(cfg)
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens there
    with pytest.raises(vj.UserError, match="cannot read .*empty/MNIST/raw"):
        vj.load_sequences(preset("cpu", data_dir=str(tmp_path / "empty")))


def write_moving_mnist(root, array):
    (root / "MovingMNIST").mkdir(parents=True, exist_ok=True)
    path = root / "MovingMNIST/mnist_test_seq.npy"
    with open(path, "wb") as file:
        np.save(file, array)
    return path


def test_the_published_file(tmp_path, monkeypatch):
    made = np.random.default_rng(0).integers(0, 256, (20, 40, 64, 64), dtype=np.uint8)
    path = write_moving_mnist(tmp_path, made)
    cfg = preset("smoke", data="moving-mnist", data_dir=str(tmp_path))
    train, validation = vj.load_sequences(cfg)
    assert train.shape == (36, 20, 64, 64) and validation.shape == (4, 20, 64, 64)
    order = np.random.RandomState(2025).permutation(40)
    assert np.array_equal(np.concatenate((train, validation)), made[:, order].swapaxes(0, 1))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(vj.UserError, match="MovingMNIST .*delete it to download it again"):
        vj.load_sequences(cfg)
    monkeypatch.setattr(MovingMNIST, "_URL", "http://127.0.0.1:9/mnist_test_seq.npy")
    with pytest.raises(vj.UserError, match="cannot read .*empty/MovingMNIST"):
        vj.load_sequences(preset("smoke", data="moving-mnist", data_dir=str(tmp_path / "empty")))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((12, 20, 64, 64), np.uint8),
        np.zeros((20, 12, 128, 128), np.uint8),
        np.zeros((20, 12, 64, 64), np.float32),
        np.zeros((10, 12, 64, 64), np.uint8),
        np.zeros((20, 1, 64, 64), np.uint8),
        np.zeros((20, 64, 64), np.uint8),
    ],
    ids=["sequences first", "128 px", "floats", "10 frames", "one sequence", "no sequences"],
)
def test_files_of_another_form_are_refused(array, tmp_path):
    write_moving_mnist(tmp_path, array)
    with pytest.raises(vj.UserError, match=r"cannot read .*MovingMNIST \(not uint8 \[20, N >= 10, 64, 64\]"):
        vj.load_sequences(preset("smoke", data="moving-mnist", data_dir=str(tmp_path)))


def test_a_renamed_npz_is_refused(tmp_path):
    path = write_moving_mnist(tmp_path, np.zeros(1))
    with open(path, "wb") as file:
        np.savez(file, np.zeros((20, 12, 64, 64), np.uint8))
    with pytest.raises(vj.UserError, match="MovingMNIST"):
        vj.load_sequences(preset("smoke", data="moving-mnist", data_dir=str(tmp_path)))


@pytest.fixture(scope="module")
def clips():
    """36 training clips."""
    return vj.make_clips(vj.load_sequences(preset("smoke", sequences=20))[0], torch.device("cpu"))


def test_batches_are_shuffled_epochs_and_a_function_of_seed_and_step(clips):
    cfg = preset("smoke", batch_size=8)  # four batches an epoch; four clips are left over
    numbered = vj.Clips(torch.arange(36), torch.arange(36))
    epochs = [torch.cat([vj.make_batch(cfg, numbered, step).frames for step in range(e, e + 4)]) for e in (0, 4, 8)]
    for epoch in epochs:
        assert len(set(epoch.tolist())) == 32
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])
    assert torch.equal(vj.make_batch(cfg, numbered, 5).frames, epochs[1][8:16])
    assert not torch.equal(vj.make_batch(preset("smoke", seed=1), numbered, 0).frames, epochs[0][:8])
    halves = [vj.make_batch(cfg, numbered, 5, rank, 2).frames for rank in (0, 1)]
    assert torch.equal(torch.stack(halves, 1).flatten(), epochs[1][8:16])
    batch = vj.make_batch(cfg, clips, 5)
    assert torch.equal(batch.frames, clips.frames[epochs[1][8:16]])
    assert torch.equal(batch.labels, clips.labels[epochs[1][8:16]])


# --------------------------------------------------------------------------------------------- networks and rollouts
def test_published_sizes():
    with torch.device("meta"):
        model = Model(preset("paper"))
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert (count(model.encoder), count(model.predictor)) == (89_280, 2_032_496)


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_shapes_of_what_others_call(stride):
    cfg = preset("smoke", stride=stride, levels=2)
    model = Model(cfg).eval()
    frames = torch.randint(0, 256, (3, 5, 64, 64), dtype=torch.uint8)
    z = model.encode(frames)
    torch.testing.assert_close(z, model.encode(frames / 255))
    assert z.shape == (3, 5, cfg.latent_dim, 64 // stride, 64 // stride)
    assert model.autoregressive_rollout(z, 4).shape == (3, 4, *z.shape[2:])
    found, decoded = model.detect(z), model.decode(z)
    assert found.shape == (3, 5, 8, 8) and decoded.shape == (3, 5, 64, 64) and 0 <= found.min() and found.max() <= 1


def random_states(model, frames):
    return torch.randn(2, frames, 16, 16, 16, dtype=torch.float64), torch.zeros(2, frames, model.hidden_dim, 16, 16)


@pytest.mark.parametrize("norm, hidden_dim", [("layer", 8), ("layer", 0), ("batch", 8)])
def test_a_parallel_rollout_predicts_every_frame_from_the_round_before(norm, hidden_dim):
    """All pairs in every round, though most need not be predicted again; in the statistics of batch norm all count."""
    torch.manual_seed(0)
    model = Model(preset("smoke", stride=4, norm=norm, hidden_dim=hidden_dim)).double()
    z, hidden = random_states(model, 6)
    state = torch.cat((z, hidden), 2)
    rounds = model.parallel_rollout(z, 4)
    for latents in rounds:
        predicted = model.predict(state[:, :-1], state[:, 1:])  # the last one lies beyond the clip
        state = torch.cat((state[:, :2], predicted[:, :-1]), 1)
        torch.testing.assert_close(latents, state[:, :, :16])
    # after as many rounds as there are frames to predict, all of it follows from the first two frames
    model.eval()
    ahead = model.autoregressive_rollout(z[:, :2], 4)
    torch.testing.assert_close(model.parallel_rollout(z, 4)[-1][:, 2:], ahead)


def test_the_hidden_state_reaches_the_predictions_after_the_next():
    torch.manual_seed(0)
    model = Model(preset("smoke", hidden_dim=8)).eval()
    z, real = torch.randn(1, 2, 16, 8, 8), Model.predict
    whole = model.autoregressive_rollout(z, 3)
    model.predict = lambda a, b: real(model, a, b) * (torch.arange(24) < 16)[:, None, None]  # forgets it
    without = model.autoregressive_rollout(z, 3)
    torch.testing.assert_close(whole[:, 0], without[:, 0])
    assert (whole[:, 1:] - without[:, 1:]).abs().amax((0, 2, 3, 4)).min() > 1e-3


def test_layer_norm_does_not_mix_clips():
    torch.manual_seed(0)
    model = Model(preset("smoke"))  # in training mode
    x = torch.rand(4, 3, 64, 64)
    torch.testing.assert_close(model.encode(x)[:2], model.encode(x[:2]), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- loss
def test_the_loss_is_its_formula(clips):
    """Of a small preset; that of the paper is in test_published.py."""
    torch.manual_seed(0)
    cfg = preset("smoke", rounds=3, prediction_weight=3.0)
    model, batch = Model(cfg).double(), vj.Clips(clips.frames[:4], clips.labels[:4])
    loss, terms, latents = vj.losses(model, cfg, batch)
    z = model.encode(batch.frames)
    p = model.project(z)
    errors = [(model.project(states) - p).square().mean() for states in model.parallel_rollout(z, 3)]
    torch.testing.assert_close(terms["prediction"], torch.stack(errors).mean().detach())
    rows = (p - p.mean((0, 1))).reshape(-1, cfg.projector_width).detach()  # less each position's mean
    covariance = torch.cov(rows.T)
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    torch.testing.assert_close(terms["variance"], (1 - (covariance.diagonal() + 1e-4).sqrt()).relu().mean())
    torch.testing.assert_close(terms["covariance"], off_diagonal / (64 * 63))
    found, decoded = model.detect(z), model.decode(z)
    torch.testing.assert_close(terms["detection"], -torch.where(batch.labels, found, 1 - found).log().mean().detach())
    torch.testing.assert_close(terms["decoding"], (decoded - batch.frames.double() / 255).square().mean().detach())
    weighted = (
        3 * terms["prediction"]
        + 10 * terms["variance"]
        + 100 * terms["covariance"]
        + terms["detection"]
        + terms["decoding"]
    )
    torch.testing.assert_close(loss.detach(), weighted)
    torch.testing.assert_close(loss.detach(), terms["loss"])
    assert torch.equal(latents, z.detach())


def test_the_heads_teach_the_encoder_nothing(clips):
    torch.manual_seed(0)
    cfg = preset("smoke")
    model, gradients = Model(cfg), []
    for labels in (clips.labels[:4], ~clips.labels[:4]):
        loss, *_ = vj.losses(model, cfg, vj.Clips(clips.frames[:4], labels))
        gradients.append(torch.autograd.grad(loss, list(model.encoder.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_a_code_of_the_position_does_not_count_as_spread(clips):
    cfg = preset("smoke")
    model = Model(cfg)
    code = 5 * torch.randn(cfg.latent_dim, 8, 8, generator=torch.Generator().manual_seed(3))
    model.encode = lambda frames: code.expand(*frames.shape[:2], -1, -1, -1)  # the same whatever the frame shows
    batch = vj.Clips(clips.frames[:4], clips.labels[:4])
    variance = lambda centre: vj.losses(model, preset("smoke", centre_positions=centre), batch)[1]["variance"]
    assert variance(False) < 0.5 and variance(True) > 0.98
    assert vj.collapse_meter(model.encode(batch.frames))["std_mean"] < 1e-6


def test_the_collapse_meter():
    z = torch.randn(50, 20, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    spread = vj.collapse_meter(z)
    assert spread["effective_rank"] == pytest.approx(4, abs=0.01) and spread["correlation"] < 0.03
    assert spread["std_min"] == pytest.approx(1, abs=0.03)
    assert vj.collapse_meter(torch.zeros_like(z))["effective_rank"] == pytest.approx(1)  # not that of rounding
    same = vj.collapse_meter(z[:, :, :1].expand(-1, -1, 4, -1, -1))
    assert same["effective_rank"] == pytest.approx(1, abs=0.01) and same["correlation"] == pytest.approx(1)


@pytest.mark.parametrize("options", [dict(norm="batch", hidden_dim=0, stride=4, levels=2), dict()])
def test_the_loss_compiles_to_one_graph(options, clips):
    cfg = preset("smoke", **options)
    torch.manual_seed(0)
    model, batch = Model(cfg), vj.Clips(clips.frames[:4], clips.labels[:4])
    wanted = vj.losses(model, cfg, batch)[0]
    compiled = torch.compile(vj.losses, backend="aot_eager", fullgraph=True, dynamic=False)
    found = compiled(model, cfg, batch)[0]
    torch.testing.assert_close(found, wanted)
    found.backward()
    assert all(p.grad is not None for p in model.parameters())


# ------------------------------------------------------------------------------------------------------ optimisation
def test_learning_rates():
    cfg = preset("smoke", lr=2.0)  # cosine: 60 steps of warm-up, then 1140 of decay
    at = {0: 1 / 60, 29: 0.5, 59: 1, 60: 1, 440: 0.75, 630: 0.5, 820: 0.25, 1200: 0}
    rates = [vj.learning_rate(cfg, step, 1200) for step in at]
    assert rates == pytest.approx([2 * share for share in at.values()], abs=1e-12)
    assert vj.learning_rate(cfg, 0, 3) == 2  # a short schedule warms up for one step
    assert {vj.learning_rate(preset("smoke", lr=2.0, schedule="constant"), step, 1200) for step in at} == {2}


@pytest.mark.parametrize("name", ["adam", "muon"])
def test_every_parameter_is_optimised_once_at_its_share_of_the_rate(name):
    cfg = preset("smoke", optimizer=name)
    model = Model(cfg)
    optimizers = vj.make_optimizers(model, cfg)
    assert [share for share, _ in optimizers] == ([1.0, 0.1] if name == "muon" else [1.0])
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0)
    for share, optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * share
        optimizer.step()
    for key, p in model.named_parameters():
        if name == "adam" or p.ndim == 1:  # the first step of Adam is the rate itself
            rate = 0.5 if name == "adam" else 0.05
            torch.testing.assert_close(p.detach(), before[key] - rate, rtol=1e-4, atol=1e-5)
        else:  # equal slopes make equal steps, whose norm is the rate, times sqrt(n / m) if taller than wide; and decay
            n, m = len(p), p[0].numel()
            down = torch.full_like(p, 0.5 * (max(1, n / m) / (n * m)) ** 0.5)
            torch.testing.assert_close(0.995 * before[key] - p.detach(), down, rtol=0.4, atol=0)


# -------------------------------------------------------------------------------------------------------- evaluation
class Oracle(Model):
    """Its latents are the detection map of the true frame; the next state is what `rule` makes of two."""

    def __init__(self, rule):
        super().__init__(preset("smoke", hidden_dim=0))
        self.predict = rule

    def encode(self, frames):
        return frames[:, :, None, ::8, ::8] / 255

    def detect(self, z):
        return z[:, :, 0]


@pytest.fixture(scope="module")
def moving():
    """Six clips of one cell each that moves by one cell a frame, round and round; frames hold their detection map."""
    labels = torch.zeros(6, 10, 8, 8, dtype=torch.bool)
    for t in range(10):
        labels[torch.arange(6), t, torch.arange(6), (3 + t) % 8] = True
    frames = labels.repeat_interleave(8, 2).repeat_interleave(8, 3).to(torch.uint8) * 255
    return vj.Clips(frames, labels)


def test_horizons_compare_the_right_frames(moving):
    right = vj.evaluate(Oracle(lambda before, last: last.roll(1, -1)), moving)
    assert right["ap_parallel"] == right["ap_autoregressive"] == right["ap_true_frames"] == [1.0] * 7
    assert right["map_parallel"] == right["map_autoregressive"] == 1 and max(right["ap_last_frame"]) < 0.1
    # copies the last true frame: wrong, and the same as that baseline
    copy = vj.evaluate(Oracle(lambda before, last: last), moving)
    assert copy["ap_autoregressive"] == copy["ap_last_frame"] and max(copy["ap_parallel"]) < 0.1
    # two cells back from the frame before: from two true frames this is off by four cells, then right; after two rounds
    # of a parallel rollout most frames follow from a frame that is itself four cells off
    back = vj.evaluate(Oracle(lambda before, last: before.roll(-2, -1)), moving)
    assert back["ap_autoregressive"][1] < 0.1 < 0.5 < back["ap_parallel"][1]
    assert back["map_parallel"] == pytest.approx(np.mean(back["ap_parallel"]), abs=1e-4)


def test_average_precision_is_that_of_each_batch(moving):
    """Mean over batches, whatever their sizes, as published: not that of all clips pooled."""
    frames = moving.frames.clone()
    frames[4:] = 0  # nothing is to be seen in the last two clips
    result = vj.evaluate(Oracle(lambda before, last: last.roll(1, -1)), moving._replace(frames=frames), batch_size=4)
    chance = 1 / 64  # of equal scores
    assert result["ap_parallel"] == pytest.approx([(1 + chance) / 2] * 7, abs=1e-3)


def test_a_smoke_run_learns_and_is_drawn(tmp_path, monkeypatch):
    """Everything: training, log, summary, examples, figures from the folder alone."""
    run = tmp_path / "run"
    summary = vj.train(preset("smoke", run_dir=str(run)))
    assert summary == json.loads((run / "summary.json").read_text())
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.6 * log[0]["loss"] and log[-1]["effective_rank"] > 4  # measured: 0.51 and 14.9
    assert [record["step"] for record in log] == list(range(10, 91, 10))
    assert summary["map_true_frames"] > summary["map_parallel"] > summary["map_last_frame"]
    monkeypatch.syspath_prepend(str(vj.Path(vj.__file__).parent / "results"))
    import draw

    draw.draw(run)
    assert {path.name for path in run.glob("*.[pg]*f*")} | {path.name for path in run.glob("*.png")} >= {
        "rollout.gif",
        "ap.png",
        "curves.png",
    }
