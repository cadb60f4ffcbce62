"""image_jepa.py: images as people have them, augmentation, networks, losses, optimisers, probes, and that it learns."""

import dataclasses
import hashlib
import json
import math
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import functional as TF

import image_jepa as ij
from image_jepa import preset

ROOT = Path(__file__).parents[1]


def picture(width=32, height=32) -> np.ndarray:
    """A smooth picture [H, W] uint8 from 20 to 220."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    return (20 + 100 * x + 100 * y).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Two classes of six small images in each part."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for n, size in enumerate([(40, 30), (32, 32), (20, 20), (8, 64), (33, 31), (32, 32)]):
                pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "set" / part / name / f"{n}.png")
    return tmp_path / "set"


# ------------------------------------------------------------------------------------------------------------- data
def test_labelled_folder(folder):
    images = ij.read_folder(folder, 32)
    assert images.classes == ["cat", "dog"] and images.train.dtype == torch.uint8
    assert images.train.shape == images.test.shape == (12, 3, 32, 32)
    assert images.train_labels.tolist() == images.test_labels.tolist() == [0] * 6 + [1] * 6
    exact = torch.from_numpy(np.array(Image.open(folder / "train/dog/5.png"))).movedim(2, 0)
    assert torch.equal(images.train[11], exact)  # 32 x 32 already: untouched
    tall = torch.from_numpy(np.array(Image.open(folder / "train/dog/3.png"))).movedim(2, 0).float()
    square = F.interpolate(tall[None, :, 28:36], (32, 32), mode="bilinear")[0]  # the middle of 8 x 64
    assert (images.train[9] - square)[:, 4:-4].abs().max() < 2  # PIL blends the edge with what lies beyond it
    (folder / "test").rename(folder / "val")
    renamed = ij.read_folder(folder, 32)
    assert torch.equal(renamed.test, images.test) and renamed.classes == images.classes


@pytest.mark.parametrize("layout", ["flat", "nested", "train", "train with classes", "test without classes"])
def test_unlabelled_images_train_and_give_an_encoder(folder, layout, tmp_path, capsys):
    if layout == "flat":
        for n, path in enumerate(sorted(folder.glob("*/*/*.png"))):
            path.rename(folder / f"{n}.png")
        shutil.rmtree(folder / "train")
    if layout in ("train", "train with classes"):
        shutil.rmtree(folder / "test")
    if layout in ("train", "test without classes"):
        for n, path in enumerate(sorted(folder.glob("*/*/*.png"))):
            path.rename(path.parents[1] / f"{n}.png")
    if layout == "nested":
        (folder / "train").rename(folder / "a")
        (folder / "test").rename(folder / "b")
    images = ij.read_folder(folder, 32)
    capsys.readouterr()
    assert images.classes == ["unlabelled"] and not images.train_labels.any()
    assert len(images.train) == (24 if layout in ("flat", "nested") else 12)
    run = tmp_path / "run"
    summary = ij.train(preset("smoke", data=str(folder), batch_size=6, epochs=1, run_dir=str(run), log_every=1))
    assert "linear_accuracy" not in summary and "unlabelled: no linear probe, no kNN" in capsys.readouterr().out
    assert ij.load(run)(images.train).shape == (len(images.train), 8 * 24)
    subprocess.run([sys.executable, ROOT / "results/draw.py", run], check=True)
    assert (run / "neighbours.png").exists()


GREY = {
    "16 bits, PNG": lambda x, path: Image.fromarray(x.astype(np.uint16) * 257).save(path / "x.png"),
    "16 bits, TIFF": lambda x, path: Image.fromarray(x.astype(np.uint16) * 257).save(path / "x.tif"),
    "12 bits, TIFF": lambda x, path: Image.fromarray((x * (4095 / 255)).astype(np.uint16)).save(path / "x.tif"),
    "32 bits, TIFF": lambda x, path: Image.fromarray(x.astype(np.int32) * 8_000_000).save(path / "x.tif"),
    "float in [0, 1]": lambda x, path: Image.fromarray(x.astype(np.float32) / 255).save(path / "x.tiff"),
    "float in 0..255": lambda x, path: Image.fromarray(x.astype(np.float32)).save(path / "x.tiff"),
    "8 bits": lambda x, path: Image.fromarray(x).save(path / "x.png"),
    "palette": lambda x, path: Image.fromarray(x).convert("P").save(path / "x.png"),
    "upright by EXIF": lambda x, path: save_rotated(x, path / "x.jpg"),
    "opaque, with alpha": lambda x, path: Image.fromarray(x).convert("RGBA").save(path / "x.png"),
}


def save_rotated(x: np.ndarray, path: Path) -> None:
    """As a camera does that was held upright: the pixels lie on their side, and a tag says so."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(np.rot90(x)).save(path, exif=exif, quality=100)


@pytest.mark.parametrize("kind", GREY)
def test_grey_images_of_every_depth_look_the_same(kind, tmp_path):
    GREY[kind](picture(), tmp_path)
    image = ij.read_folder(tmp_path, 32).train[0].int()
    expected = torch.from_numpy(picture()).int()
    scale = 8_000_000 * 255 / (2**32 - 1) if kind == "32 bits, TIFF" else 1  # of all that 32 bits can hold
    assert (image - expected * scale).abs().max() <= 2


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_a_drawing_on_nothing_is_a_drawing_on_white(mode, tmp_path):
    alpha = np.zeros((32, 32), np.uint8)
    alpha[8:24, 8:24] = 255
    drawing = Image.new("L", (32, 32), 0)
    if mode in ("RGBA", "LA"):
        drawing = drawing.convert("RGB" if mode == "RGBA" else "L")
        drawing.putalpha(Image.fromarray(alpha))
        drawing.save(tmp_path / "x.png")
    else:  # one colour counts as transparent
        Image.fromarray(255 - alpha).convert(mode).save(tmp_path / "x.png", transparency=255)
    image = ij.read_folder(tmp_path, 32).train[0]
    assert torch.equal(image, torch.from_numpy(255 - alpha).expand(3, -1, -1))


def test_what_is_no_image_is_left_out_and_counted(folder, capsys):
    for name in (".DS_Store", "._1.png", ".ipynb_checkpoints/1-checkpoint.png", "cat/.hidden.png", "cat/notes.txt"):
        path = folder / "train" / name
        path.parent.mkdir(exist_ok=True)
        shutil.copy(folder / "train/dog/0.png", path)
    shutil.copytree(folder / "train/dog", folder / "train/__MACOSX")
    (folder / "train/dog/README").write_text("")
    images = ij.read_folder(folder, 32)
    assert len(images.train) == 12 and images.classes == ["cat", "dog"]
    assert "train: left out 5 hidden, 1 .txt, 1 without extension" in capsys.readouterr().out


def test_links(folder, tmp_path):
    """A link to a folder elsewhere is followed; one back to a parent is not; one to nothing is named."""
    shutil.move(folder / "train/cat", tmp_path / "elsewhere")
    (folder / "train/cat").symlink_to(tmp_path / "elsewhere")
    (folder / "train/dog/all").symlink_to(folder)
    images = ij.read_folder(folder, 32)
    assert len(images.train) == 12 and images.classes == ["cat", "dog"]
    (folder / "train/dog/9.png").symlink_to(folder / "gone.png")
    with pytest.raises(ij.UserError, match="1 files cannot be read as images: .*\n.*dog/9.png .*No such file"):
        ij.read_folder(folder, 32)


def test_all_unreadable_files_are_listed_at_once(folder):
    (folder / "train/cat/3.png").write_bytes(b"no image")
    (folder / "test/dog/1.png").write_bytes((folder / "test/dog/0.png").read_bytes()[:100])
    (folder / "train/dog/2.png").write_bytes(b"")
    with pytest.raises(ij.UserError, match="3 files cannot be read as images: remove them and start again") as error:
        ij.read_folder(folder, 32)
    for name in ("train/cat/3.png", "test/dog/1.png", "train/dog/2.png"):
        assert name in str(error.value)


def test_photos_may_be_large(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # PIL refuses what has more than twice as many
    Image.fromarray(picture(100, 80)).save(tmp_path / "x.png")
    assert ij.read_folder(tmp_path, 32).train.shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda d: shutil.rmtree(d / "test/dog"), r"only one of train and test has images of \['dog'\]"),
        (lambda d: [p.unlink() for p in (d / "test/dog").iterdir()], r"only one of train and test has images of"),
        (lambda d: [shutil.rmtree(p) for p in d.iterdir()], "no images there, and it is neither cifar10 nor digits"),
        (lambda d: shutil.rmtree(d), "no images there"),
    ],
)
def test_bad_folders(folder, damage, message):
    damage(folder)
    with pytest.raises(ij.UserError, match=message):
        ij.read_folder(folder, 32)


def test_fewer_images_than_a_batch(folder, tmp_path):
    with pytest.raises(ij.UserError, match="--batch-size 64 is more than the 12 training images"):
        ij.train(preset("smoke", data=str(folder), run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_strange_class_names_and_one_test_image(tmp_path):
    """150 classes with signs that mean something to matplotlib; one image to test on: probes and figures survive."""
    rng = np.random.default_rng(0)
    for n in range(150):
        for part in ("train", "test")[: 1 + (n == 0)]:
            path = tmp_path / "set" / part / f"_${n}$^"
            path.mkdir(parents=True)
            for i in range(2 if part == "train" else 1):
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path / f"{i}.png")
    with pytest.raises(ij.UserError, match="only one of train and test has images of"):
        ij.read_folder(tmp_path / "set", 16)
    for n in range(1, 150):
        path = tmp_path / f"set/test/_${n}$^"
        path.mkdir()
        shutil.copy(tmp_path / "set/test/_$0$^/0.png", path)
    options = dict(data=str(tmp_path / "set"), image_size=16, crop_size=16, width=8, epochs=1, log_every=4)
    summary = ij.train(preset("smoke", **options, run_dir=str(tmp_path / "run")))
    assert 0 <= summary["linear_accuracy"] <= 100
    subprocess.run([sys.executable, ROOT / "results/draw.py", tmp_path / "run"], check=True)
    assert (tmp_path / "run/neighbours.png").exists()


def test_cifar10_in_torchvisions_layout_and_without_network(tmp_path, monkeypatch):
    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    rng = np.random.default_rng(0)
    names = {key: [] for key in ("train_list", "test_list")}
    for key in names:
        for n, _ in enumerate(getattr(CIFAR10, key)):
            content = pickle.dumps(dict(data=rng.integers(0, 256, (4, 3072), dtype=np.uint8), labels=[n, 1, 2, 3]))
            (base / f"{key}{n}").write_bytes(content)
            names[key].append([f"{key}{n}", hashlib.md5(content).hexdigest()])
        monkeypatch.setattr(CIFAR10, key, names[key])
    meta = pickle.dumps(dict(label_names=list("abcdefghij")))
    (base / "meta").write_bytes(meta)
    monkeypatch.setattr(CIFAR10, "meta", dict(filename="meta", key="label_names", md5=hashlib.md5(meta).hexdigest()))
    images = ij.load_images(preset("cpu", data_dir=str(tmp_path)))
    raw = pickle.loads((base / "train_list2").read_bytes())["data"]
    assert images.train.shape == (20, 3, 32, 32) and images.test.shape == (4, 3, 32, 32) and images.train_labels[8] == 2
    assert np.array_equal(images.train[9].numpy(), raw[1].reshape(3, 32, 32))
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nobody listens there
    with pytest.raises(ij.UserError, match="cannot be downloaded .*: put http"):
        ij.load_images(preset("cpu", data_dir=str(tmp_path / "empty")))


def test_batches_pass_over_every_image_in_a_new_order(folder):
    images = ij.read_folder(folder, 16)
    cfg = preset("smoke", batch_size=4)
    batches = [ij.make_batch(cfg, images, step) for step in range(6)]
    for epoch in (batches[:3], batches[3:]):
        seen = torch.cat([x for x, _ in epoch]).flatten(1)
        assert torch.equal(seen.unique(dim=0), images.train.flatten(1).unique(dim=0))
        for x, y in epoch:
            index = (x[:, None] == images.train).flatten(2).all(2).int().argmax(1)
            assert torch.equal(y, images.train_labels[index])
    assert not torch.equal(batches[0][0], batches[3][0])
    assert torch.equal(ij.make_batch(cfg, images, 4)[0], batches[4][0])
    assert not torch.equal(ij.make_batch(dataclasses.replace(cfg, seed=1), images, 4)[0], batches[4][0])
    shares = [ij.make_batch(cfg, images, 4, rank, 2)[0] for rank in (0, 1)]
    assert torch.equal(torch.stack(shares, 1).flatten(0, 1), batches[4][0])


# ----------------------------------------------------------------------------------------------------- augmentation
@pytest.fixture
def drawn(monkeypatch):
    """augment, with what it draws: boxes of the crops, factors and order of the colour operations."""
    calls, crop, jitter_colours = {}, ij.crop, ij.jitter_colours

    def spy_crop(images, corner, sides, out):
        calls.update(corner=corner, sides=sides)
        return crop(images, corner, sides, out)

    def spy_jitter(x, factors, order):
        calls.update(before=x, factors=factors, order=order)
        return jitter_colours(x, factors, order)

    monkeypatch.setattr(ij, "crop", spy_crop)
    monkeypatch.setattr(ij, "jitter_colours", spy_jitter)
    return calls


@pytest.mark.parametrize("size, out", [(32, 32), (32, 16), (48, 20)])
def test_augmentation_equals_torchvision_image_by_image(size, out, drawn):
    torch.manual_seed(size + out)
    cfg = preset("paper", crop_size=out, grey=0.3, solarise=0.3)
    images = torch.randint(0, 256, (80, 3, size, size), dtype=torch.uint8)
    views = ij.augment(images, cfg)
    assert views.shape == (80, 3, out, out)
    operators = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    kinds = []
    for n, view in enumerate(views):
        box = [int(x) for x in (*drawn["corner"][n], *drawn["sides"][n])]
        x = TF.resized_crop(images[n].float() / 255, *box, [out, out], antialias=True).clamp(0, 1)
        flips = [(x - drawn["before"][n]).abs().max() < 1e-5, (x.flip(2) - drawn["before"][n]).abs().max() < 1e-5]
        assert any(flips)
        x = drawn["before"][n]
        for k in drawn["order"][n].tolist():
            x = operators[k](x, drawn["factors"][n, k].item())
        grey = TF.rgb_to_grayscale(x, num_output_channels=3)
        candidates = [x, grey, TF.solarize(x, 0.5), TF.solarize(grey, 0.5)]
        off = torch.stack([(view - candidate).abs() for candidate in candidates]).flatten(1)
        best = off.mean(1).argmin()
        assert off[best].median() < 1e-5 and (off[best] > 1e-3).float().mean() < 0.002  # one pixel may be at the edge
        kinds.append((bool(flips[1]), best.item()))
    assert {flip for flip, _ in kinds} == {True, False} and {kind for _, kind in kinds} == {0, 1, 2, 3}


def test_augmentation_follows_its_laws(drawn):
    n, size = 40000, 32
    torch.manual_seed(0)
    ij.augment(torch.zeros(n, 3, size, size, dtype=torch.uint8), preset("paper", jitter=0.5, crop_size=4))
    corner, sides, order, factors = (drawn[name] for name in ("corner", "sides", "order", "factors"))
    assert torch.equal(corner, corner.round()) and torch.equal(sides, sides.round())
    assert corner.min() >= 0 and (corner + sides).max() <= size
    area = sides.prod(1) / size**2
    assert abs(area.mean() - 0.57) < 0.02 and area.min() > 0.17  # torchvision's: 0.573 over 40,000 draws
    ratio = (sides[:, 1] / sides[:, 0]).log()
    assert abs(ratio.mean()) < 0.01 and ratio.abs().max() < math.log(4 / 3) + 0.15
    assert (order.sort(1).values == torch.arange(4)).all()
    _, counts = (order * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)
    assert len(counts) == 24 and (counts / n - 1 / 24).abs().max() < 0.005
    neutral, limit = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0.4, 0.4, 0.2, 0.1]) / 2  # jitter 0.5
    still = (factors == neutral).all(1)
    assert abs(still.float().mean() - 0.2) < 0.01
    change = (factors - neutral)[~still]
    torch.testing.assert_close(change.amax(0), limit, atol=1e-3, rtol=0)
    torch.testing.assert_close(change.amin(0), -limit, atol=1e-3, rtol=0)
    torch.testing.assert_close(change.abs().mean(0), limit / 2, atol=3e-3, rtol=0)


def test_small_crops_lie_anywhere_in_any_shape_and_nothing_depends_on_another(drawn):
    n, size = 40000, 32
    torch.manual_seed(0)  # boxes of at most 0.6 of the image fit at the first try
    cfg = preset("paper", crop_scale=(0.15, 0.6), crop_size=4)
    views = ij.augment(torch.full((n, 3, size, size), 250, dtype=torch.uint8), cfg)
    corner, sides = drawn["corner"], drawn["sides"]
    assert abs(sides.prod(1).mean() / size**2 - 0.375) < 0.005
    room = size - sides  # the corner is uniform over 0..room
    assert ((corner / room).mean(0) - 0.5).abs().max() < 0.01
    for border in (0, room):
        assert ((corner == border).float().mean(0) - (1 / (room + 1)).mean(0)).abs().max() < 0.006
    ratio = (sides[:, 1] / sides[:, 0]).log()
    assert (
        abs(ratio.mean()) < 0.01 and abs(ratio.abs().mean() - math.log(4 / 3) / 2) < 0.005
    )  # uniform in the logarithm
    solarised = (views.amax((1, 2, 3)) < 0.5).float()
    assert abs(solarised.mean() - 0.1) < 0.01
    columns = torch.cat((corner / room, ratio[:, None], drawn["factors"], solarised[:, None]), 1)
    assert (torch.corrcoef(columns.T) - torch.eye(8)).abs().max() < 0.03


# ---------------------------------------------------------------------------------------------------------- networks
@pytest.mark.parametrize(
    "backbone, features, parameters",
    [("vit_s", 384, 21_375_360), ("vit_b", 768, 85_218_048), ("resnet18", 512, 11_168_832), ("small", 512, 1_358_464)],
)
def test_backbones_have_their_published_sizes(backbone, features, parameters):
    with torch.device("meta"):
        encoder = ij.Encoder(preset("paper", backbone=backbone))
    assert encoder.feature_dim == features
    assert sum(p.numel() for p in encoder.parameters()) == parameters


@pytest.mark.parametrize("backbone", ["small", "vit_s"])
def test_encoders_take_images_of_another_size(backbone):
    torch.manual_seed(0)
    encoder = ij.Encoder(preset("smoke", backbone=backbone)).eval()
    x = torch.rand(2, 3, 24, 24)
    large = F.interpolate(x, (48, 48), mode="nearest")
    assert F.cosine_similarity(encoder(x), encoder(large)).min() > 0.5


def test_encoder_refuses_what_are_no_images():
    encoder = ij.Encoder(preset("smoke")).eval()
    bytes_ = torch.randint(0, 256, (2, 3, 24, 24), dtype=torch.uint8)
    torch.testing.assert_close(encoder(bytes_), encoder(bytes_ / 255))
    for wrong in (bytes_.float(), (bytes_ / 255 - 0.5) / 0.2):
        with pytest.raises(ValueError, match="uint8, or floats in"):
            encoder(wrong)


# ------------------------------------------------------------------------------------------------ loss and optimiser
def small(**options):
    cfg = preset("smoke", batch_size=16, views=3, **options)
    torch.manual_seed(0)
    return cfg, ij.Model(cfg, 10), torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8), torch.arange(16) % 10


@pytest.mark.parametrize("loss", ["vicreg", "sigreg"])
def test_the_loss_is_its_formula_for_three_views(loss, monkeypatch):
    cfg, model, images, labels = small(loss=loss, invariance_weight=3.0)
    model.double()
    views = torch.rand(3, 16, 3, 24, 24, dtype=torch.float64)
    given = iter(views)
    monkeypatch.setattr(ij, "augment", lambda *_: next(given))
    torch.manual_seed(1)
    total, terms, z = ij.losses(model, cfg, images, labels)
    features = torch.stack([model.encoder(view) for view in views])
    torch.testing.assert_close(z, features.flatten(0, 1))
    p = torch.stack([model.projector(view) for view in features])
    pairs = [(p[a] - p[b]).square().mean() for a in range(3) for b in range(a)]
    torch.testing.assert_close(terms["invariance"], torch.stack(pairs).mean())
    surprise = -model.probe(features[0]).softmax(1)[range(16), labels].log().mean()
    torch.testing.assert_close(terms["probe"], surprise)
    expected = 3 * torch.stack(pairs).mean() + surprise
    if loss == "vicreg":  # published for two views: their sum
        variance, covariance = 2 * torch.tensor([ij.variance_covariance_loss(view) for view in p]).double().mean(0)
        expected = expected + cfg.variance_weight * variance + cfg.covariance_weight * covariance
    else:
        torch.manual_seed(1)
        directions = F.normalize(torch.randn(64, 256, dtype=torch.float64), dim=0)
        sigreg = torch.stack([ij.sigreg_loss(view, directions, knots=10) for view in p]).mean()
        expected = expected + cfg.sigreg_weight * sigreg
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)


def test_the_probe_teaches_the_encoder_nothing():
    cfg, model, images, labels = small()
    with torch.no_grad():
        model.probe.weight.mul_(100)
    gradients = []
    for answers in (labels, 9 - labels):
        torch.manual_seed(1)
        total, *_ = ij.losses(model, cfg, images, answers)
        gradients.append(torch.autograd.grad(total, list(model.encoder.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("backbone", ["small", "vit_s"])
def test_weight_decay_spares_biases_norms_and_positions(backbone):
    cfg = preset("smoke", optimizer="muon", backbone=backbone, weight_decay=0.1)
    model = ij.Model(cfg, 10)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _, part in ij.make_optimizers(model, cfg):
        for group in part.param_groups:
            group["lr"] = 0.5
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        part.step()
    for name, p in model.named_parameters():
        spared = p.ndim == 1 or name.endswith(("class_token", "pos_embedding"))
        torch.testing.assert_close(p.detach(), before[name] * (1 if spared else 0.95))


def test_learning_rate_by_steps():
    cfg = preset("cpu", lr=1.0, epochs=100, warmup_epochs=10)
    rates = [ij.learning_rate(cfg, step, 10) for step in (0, 1, 50, 100, 101, 551, 999)]
    assert rates == pytest.approx([1e-4, 1e-4, 0.495, 1.0, 1.0, 0.5, 0.0], abs=2e-3)


# -------------------------------------------------------------------------------------------------------- evaluation
def clusters(n):
    torch.manual_seed(n)
    centre = 2 * torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, 3, (n,))
    return ((centre[y] + torch.randn(n, 8)) * torch.logspace(-3, 3, 8)).numpy(), y.numpy(), centre


def test_linear_probe_converges_whatever_the_scales():
    (z, y, centre), (z_test, y_test, _) = clusters(900), clusters(600)
    unscaled = torch.from_numpy(z_test) / torch.logspace(-3, 3, 8)
    best = (torch.cdist(unscaled, centre).argmin(1).numpy() == y_test).mean() * 100  # Bayes
    assert abs(ij.accuracies(z, y, z_test, y_test)[0] - best) < 2
    noise = np.random.default_rng(0).normal(size=(1500, 200)).astype(np.float32)
    assert ij.accuracies(noise[:900], y, noise[900:], y_test)[0] < 45


def test_knn_against_counting():
    torch.manual_seed(0)
    z, y, z_test, y_test = torch.randn(300, 5), torch.randint(0, 4, (300,)), torch.randn(70, 5), torch.arange(70) % 4
    right = 0
    for query, truth in zip(z_test, y_test):
        similar = F.cosine_similarity(query[None], z)
        votes = [0.0] * 4
        for i in similar.argsort(descending=True)[:20]:
            votes[y[i]] += math.exp(similar[i] / 0.07)
        right += votes.index(max(votes)) == truth.item()
    found = ij.accuracies(*(x.numpy() for x in (z, y, z_test, y_test)))[1]
    assert found == pytest.approx(100 * right / 70, abs=0.01)


def test_features_take_the_same_memory_whatever_the_size():
    seen = []

    class Encoder:
        mean = torch.zeros(1)

        def __call__(self, batch):
            seen.append(batch.numel())
            return batch.flatten(1)[:, :4]

    for size in (32, 96, 224):
        images = torch.zeros(600, 3, size, size, dtype=torch.uint8)
        assert ij.extract_features(Encoder(), images).shape == (600, 4)
    assert max(seen) <= 3 * 500 * 32**2


# ----------------------------------------------------------------------------------------------------- whole commands
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One smoke run of the command, as a person would start it."""
    path = tmp_path_factory.mktemp("image") / "run"
    command = [sys.executable, "image_jepa.py", "--preset", "smoke", "--run-dir", path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path, done.stdout


def test_it_learns(run):
    path, out = run
    summary = json.loads(out.splitlines()[-1])
    assert summary == json.loads((path / "summary.json").read_text())
    log = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == summary["steps"] and log[-1]["loss"] < log[0]["loss"] - 0.25
    assert summary["linear_accuracy"] > summary["untrained_linear_accuracy"] + 8  # measured: 86 and 72
    assert summary["knn_accuracy"] > summary["untrained_knn_accuracy"] + 20  # measured: 69 and 32
    subprocess.run([sys.executable, "results/draw.py", path], cwd=ROOT, check=True)
    for name in ("curves", "views", "neighbours"):
        with Image.open(path / f"{name}.png") as figure:
            assert np.array(figure.convert("L")).std() > 5, name


def test_load_is_the_trained_encoder(run):
    encoder = ij.load(run[0])
    images = ij.load_images(preset("smoke")).test[:10]
    z = encoder(images)
    assert not encoder.training and not z.requires_grad and z.dtype == torch.float32 and torch.equal(z, encoder(images))
    one_by_one = torch.cat([encoder(image[None] / 255) for image in images])
    torch.testing.assert_close(one_by_one, z, rtol=1e-4, atol=1e-4)
    with pytest.raises((RuntimeError, AssertionError), match="(?i)cuda|nvidia"):
        ij.load(run[0], device="cuda:77")


@pytest.mark.parametrize("weight, flagged", [(0.1, True), (10.0, False)])
def test_a_collapse_is_flagged(weight, flagged, tmp_path, capsys):
    """SIGReg of weight 0.1 is a failure of the published table."""
    options = dict(loss="sigreg", sigreg_weight=weight, max_steps=100, evaluate=False)
    ij.train(preset("smoke", **options, run_dir=str(tmp_path / "run")))
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert ("the features hardly differ" in capsys.readouterr().out) == flagged
    assert (log[-1]["projection_std"] < 0.1) == flagged
