"""image_jepa.py: data, augmentation, networks, losses, optimisers, probes, and that it learns."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as TF

import image_jepa as ij
from image_jepa import preset

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    """Two classes of six tiny pictures each, of all the kinds that people have."""
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for n, (mode, size) in enumerate(
                [
                    ("RGB", (40, 30)),
                    ("L", (32, 32)),
                    ("RGBA", (20, 20)),
                    ("RGB", (8, 64)),
                    ("P", (33, 31)),
                    ("RGB", (32, 32)),
                ]
            ):
                pixels = rng.integers(0, 256, (*size[::-1], 4), dtype=np.uint8)
                Image.fromarray(pixels, "RGBA").convert("RGB").convert(mode).save(
                    tmp_path / "set" / part / name / f"{n}.png"
                )
    return tmp_path / "set"


# ------------------------------------------------------------------------------------------------------------- data
def test_image_folder_reads_every_kind_of_file_and_keeps_the_result(folder, monkeypatch):
    images = ij.image_folder(folder, 32)
    assert (
        images.classes == ["cat", "dog"] and images.train.shape == (12, 3, 32, 32) and images.train.dtype == torch.uint8
    )
    assert images.train_label.tolist() == [0] * 6 + [1] * 6 == images.test_label.tolist()
    exact = torch.from_numpy(np.array(Image.open(folder / "train/dog/5.png"))).permute(2, 0, 1)
    assert torch.equal(images.train[11], exact)  # 32 x 32 already: untouched
    tall = torch.from_numpy(np.array(Image.open(folder / "train/dog/3.png"))).permute(2, 0, 1).float()
    square = F.interpolate(tall[None, :, 28:36], (32, 32), mode="bilinear")[0]  # the middle of 8 x 64
    assert (images.train[9] - square)[:, 4:-4].abs().max() < 2  # PIL blends the edge with what lies beyond it
    grey = images.train[1]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    monkeypatch.setattr(ij, "decode", lambda *_: pytest.fail("read again though nothing changed"))
    again = ij.image_folder(folder, 32)
    assert all(torch.equal(a, b) for a, b in zip(images[:4], again[:4])) and again.classes == images.classes


def test_image_folder_notices_changes_and_a_damaged_cache(folder):
    before = ij.image_folder(folder, 32)
    os.remove(folder / "train/cat/0.png")
    assert len(ij.image_folder(folder, 32).train) == 11
    Image.new("RGB", (32, 32), "red").save(folder / "train/cat/1.png")
    assert ij.image_folder(folder, 32).train[0].float().mean((1, 2)).tolist() == [255, 0, 0]
    (folder / "images-32.pt").write_bytes(b"half a file")
    assert torch.equal(ij.image_folder(folder, 32).test, before.test)
    assert ij.image_folder(folder, 16).train.shape[-1] == 16  # another size, another cache


@pytest.mark.parametrize(
    "damage,said",
    [
        (lambda d: (d / "train/cat/3.png").write_bytes(b"no image"), "train/cat/3.png is not a readable image"),
        (
            lambda d: (d / "train/cat/3.png").write_bytes((d / "train/cat/0.png").read_bytes()[:100]),
            "3.png is not a readable image",
        ),
        (lambda d: shutil.rmtree(d / "test/dog"), "only one of train and test has class dog"),
        (lambda d: [p.unlink() for p in (d / "test/dog").iterdir()], "no valid file for the classes dog"),
        (lambda d: shutil.rmtree(d / "test"), "neither cifar10 nor shapes nor a folder"),
        (lambda d: [shutil.rmtree(p) for p in (d / "train").iterdir()], "(?i)find any class folder"),
    ],
)
def test_bad_folders(folder, damage, said):
    damage(folder)
    with pytest.raises(ij.UserError, match=said):
        ij.image_folder(folder, 32)


def test_fewer_images_than_a_batch(folder, tmp_path):
    with pytest.raises(ij.UserError, match="--batch-size is larger than the data set of 12 images"):
        ij.train(preset("smoke", data=str(folder), run_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_cifar10_in_torchvisions_layout_and_without_network(tmp_path, monkeypatch):
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

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
    images = ij.cifar10(str(tmp_path))
    raw = pickle.loads((base / "train_list2").read_bytes())["data"]
    assert images.train.shape == (20, 3, 32, 32) and images.test.shape == (4, 3, 32, 32) and images.train_label[8] == 2
    assert np.array_equal(images.train[9].numpy(), raw[1].reshape(3, 32, 32))
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nobody listens there
    with pytest.raises(ij.UserError, match="could not be downloaded .* put http"):
        ij.cifar10(str(tmp_path / "empty"))


def test_shapes_are_always_the_same_and_all_there():
    images = ij.shapes(32, 300, 100)
    assert torch.equal(images.train, ij.shapes(32, 300, 100).train) and images.train.shape == (300, 3, 32, 32)
    assert set(images.train_label.tolist()) == set(range(10)) == set(range(len(images.classes)))
    edges, test_edges = (x.float().diff(dim=3).abs().amax(1).flatten(1) for x in (images.train, images.test))
    mean = torch.stack([edges[images.train_label == k].mean(0) for k in range(10)])
    found = torch.cdist(test_edges, mean).argmin(1) == images.test_label
    assert found.float().mean() > 0.2  # their outlines tell classes apart; stripes alone would give 0.1


# ----------------------------------------------------------------------------------------------------- augmentation
@pytest.mark.parametrize("size,out,views", [(32, 32, 2), (32, 16, 3), (48, 20, 2)])
def test_augmentation_equals_torchvision_image_by_image(size, out, views):
    B = 37
    cfg = preset("paper", views=views, grey=0.3, solarise=0.3)
    g = torch.Generator().manual_seed(size + out)
    images = torch.randint(0, 256, (B, 3, size, size), dtype=torch.uint8, generator=g)
    a = ij.draw_augmentation(cfg, views * B, size, g)
    ours = ij.augment(images, a, out)
    assert ours.shape == (views * B, 3, out, out)
    operators = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for n in range(views * B):
        x = TF.resized_crop(images[n % B].float() / 255, *map(int, a.box[n]), [out, out], antialias=True).clamp(0, 1)
        x = TF.horizontal_flip(x) if a.flip[n] else x
        for k in a.order[n].tolist():
            x = operators[k](x, a.factor[n, k].item())
        x = TF.rgb_to_grayscale(x, num_output_channels=3) if a.grey[n] else x
        x = TF.solarize(x, 0.5) if a.solarise[n] else x
        off = (ours[n] - x).abs()
        assert off.median() < 1e-5 and (off > 1e-3).float().mean() < 0.002, (
            n
        )  # a value at the edge of solarising may go either way


def test_augmentation_follows_its_laws():
    n, size = 40000, 32
    cfg = preset("paper", jitter=0.5)
    a = ij.draw_augmentation(cfg, n, size, torch.Generator().manual_seed(0))
    top, left, height, width = a.box.unbind(1)
    assert (
        (a.box == a.box.round()).all()
        and min(top.min(), left.min()) >= 0
        and max((top + height).max(), (left + width).max()) <= size
    )
    share = height * width / size**2
    assert (
        abs(share.mean() - 0.57) < 0.02 and share.min() > 0.17 and share.max() <= 1
    )  # torchvision's: 0.573 over 40,000 draws
    ratio = (width / height).log()
    assert abs(ratio.mean()) < 0.01 and ratio.abs().max() < math.log(4 / 3) + 0.15
    assert (a.order.sort(1).values == torch.arange(4)).all()
    ways = (a.order * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1]
    assert len(ways) == 24 and (ways / n - 1 / 24).abs().max() < 0.005
    neutral, most = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0.4, 0.4, 0.2, 0.1]) / 2  # jitter 0.5
    still = (a.factor == neutral).all(1)
    assert abs(still.float().mean() - 0.2) < 0.01
    change = a.factor[~still] - neutral
    assert torch.allclose(change.amax(0), most, atol=1e-3) and torch.allclose(change.amin(0), -most, atol=1e-3)
    assert torch.allclose(change.abs().mean(0), most / 2, atol=3e-3) and change.mean(0).abs().max() < 4e-3
    for drawn, p in ((a.flip, 0.5), (a.grey, 0.2), (a.solarise, 0.1)):
        assert abs(drawn.float().mean() - p) < 0.01


def test_small_crops_lie_anywhere_in_any_shape_and_nothing_depends_on_another():
    n, size = 40000, 32
    cfg = preset("paper", crop_scale=(0.15, 0.6))  # the first try always fits
    a = ij.draw_augmentation(cfg, n, size, torch.Generator().manual_seed(0))
    corner, sides = a.box[:, :2], a.box[:, 2:]
    assert abs(sides.prod(1).mean() / size**2 - 0.375) < 0.005
    room = size - sides  # the corner is uniform over 0..room
    assert ((corner / room).mean(0) - 0.5).abs().max() < 0.01
    for border in (0, room):
        assert ((corner == border).float().mean(0) - (1 / (room + 1)).mean(0)).abs().max() < 0.006
    ratio = (sides[:, 1] / sides[:, 0]).log()
    assert (
        abs(ratio.mean()) < 0.01 and abs(ratio.abs().mean() - math.log(4 / 3) / 2) < 0.005
    )  # uniform in the logarithm
    drawn = torch.cat((corner / room, ratio[:, None], a.factor, torch.stack((a.flip, a.grey, a.solarise), 1)), 1)
    assert (torch.corrcoef(drawn.T) - torch.eye(10)).abs().max() < 0.025


def test_batches_are_a_function_of_seed_and_step_and_pass_over_every_image():
    images = ij.shapes(16, 100, 10)
    cfg = preset("smoke", batch_size=20, loss="sigreg")
    one, other = ij.Batches(cfg, images, 64), ij.Batches(cfg, images, 64)
    other(7)
    for step in (3, 7, 0):
        for a, b in zip(
            (x for x in one(step) if isinstance(x, torch.Tensor)),
            (x for x in other(step) if isinstance(x, torch.Tensor)),
        ):
            assert torch.equal(a, b)
        assert all(torch.equal(a, b) for a, b in zip(one(step).augmentation, other(step).augmentation))
    seen = torch.cat([one(s).images for s in range(5)]).flatten(1).unique(dim=0)
    assert len(seen) == len(images.train.flatten(1).unique(dim=0))
    assert not torch.equal(one(0).images, one(5).images)  # a new order in the next epoch
    halves = [ij.Batches(cfg, images, 64, rank, 2)(3) for rank in (0, 1)]
    for n in (0, 1):  # images, labels
        assert torch.equal(torch.cat([h[n] for h in halves]), one(3)[n])
    which = (one(3).images[:, None] == images.train).flatten(2).all(2).int().argmax(1)
    assert torch.equal(one(3).labels, images.train_label[which])
    reseeded = ij.Batches(dataclasses.replace(cfg, seed=1), images, 64)(3)
    random = lambda b: (b.images, b.augmentation.box, b.augmentation.factor, b.directions)
    for different in (one(4), reseeded):
        assert not any(torch.equal(a, b) for a, b in zip(random(one(3)), random(different)))
    assert torch.equal(halves[0].directions, halves[1].directions)  # else the sum over processes would be no SIGReg
    assert not torch.equal(halves[0].augmentation.box, halves[1].augmentation.box)


# ---------------------------------------------------------------------------------------------------------- networks
def test_resnet18_is_torchvisions_with_the_stem_for_small_images():
    from torchvision.models import resnet18

    ours, theirs = ij.ResNet("resnet18", 64).eval(), resnet18()
    theirs.conv1, theirs.maxpool, theirs.fc = (
        torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False),
        torch.nn.Identity(),
        torch.nn.Identity(),
    )
    assert sum(p.numel() for p in ours.parameters()) == 11_168_832
    weights = list(ours.state_dict().values())
    mine = dict(zip(["conv1", "bn1"], (ours.stem[0], ours.stem[1])))
    for name, module in mine.items():
        getattr(theirs, name).load_state_dict(module.state_dict())
    for n, block in enumerate(ours.blocks):
        target = getattr(theirs, f"layer{n // 2 + 1}")[n % 2]
        names = dict(conv1="conv1", norm1="bn1", conv2="conv2", norm2="bn2", shortcut="downsample")
        state = {".".join([names[k.split(".")[0]], *k.split(".")[1:]]): v for k, v in block.state_dict().items()}
        target.load_state_dict(state)
    assert len(weights) == len(theirs.state_dict())
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "backbone,features,parameters",
    [("vit_s", 384, 21_374_976), ("vit_b", 768, 85_217_280), ("resnet18", 512, 11_168_832)],
)
def test_backbones_have_their_published_sizes(backbone, features, parameters):
    with torch.device("meta"):
        model = ij.Model(preset("paper", backbone=backbone), 10)
    assert model.encoder.backbone.features == features
    assert sum(p.numel() for p in model.encoder.parameters()) == parameters


def test_vit_sees_every_patch_and_its_place():
    torch.manual_seed(0)
    model = ij.ViT(24, 2, 8, 32, depth=2).eval()
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    (model(x) @ torch.randn(24)).sum().backward()  # the plain sum of a LayerNorm's output is constant
    assert (x.grad.unfold(2, 8, 8).unfold(3, 8, 8).abs().amax((1, 4, 5)) > 0).all()
    assert (model(x) - model(x.roll(8, 3))).abs().max() > 1e-3  # and knows where it lies


def test_vit_takes_images_of_another_size():
    torch.manual_seed(0)
    model = ij.ViT(24, 2, 4, 20, depth=2).eval()
    x = torch.rand(2, 3, 20, 20)
    large = F.interpolate(x, (40, 40), mode="nearest")
    assert model(large).shape == (2, 24) and F.cosine_similarity(model(x), model(large)).min() > 0.5
    first, last = (p.self_attn.in_proj_weight for p in (model.layers.layers[0], model.layers.layers[1]))
    assert not torch.equal(first, last)


@pytest.mark.parametrize("loss,width,size", [("vicreg", 2048, 2048), ("sigreg", 2048, 128), ("vicreg", 0, 512)])
def test_projector(loss, width, size):
    model = ij.Model(preset("paper", loss=loss, projector_width=width), 10)
    assert model.projections == size and model.projector(torch.randn(4, 512)).shape == (4, size)
    assert [m.out_features for m in model.projector if isinstance(m, torch.nn.Linear)] == (
        [2048, 2048, size] if width else []
    )
    parameters = (512 + 1 + 2) * width + (width + 1 + 2) * width + (width + 1) * size if width else 0  # + 2: BatchNorm
    assert sum(p.numel() for p in model.projector.parameters()) == parameters


# ------------------------------------------------------------------------------------------------ loss and optimiser
def small(**overrides):
    cfg = preset("smoke", batch_size=16, views=3, **overrides)
    images = ij.shapes(32, 64, 10)
    torch.manual_seed(0)
    model = ij.Model(cfg, 10)
    return cfg, model, ij.Batches(cfg, images, model.projections)(0)


@pytest.mark.parametrize("loss", ["vicreg", "sigreg"])
def test_the_loss_is_its_formula(loss):
    how = dict(loss=loss, invariance_weight=3.0, knots=7)
    cfg, model, batch = small(**how)
    model.double()
    total, terms, z = ij.losses(model, cfg, batch._replace(images=batch.images))
    with torch.no_grad():
        model.load_state_dict(small(**how)[1].double().state_dict())  # BatchNorm has moved its averages
        x = ij.augment(batch.images, batch.augmentation, cfg.crop_size)
        features = model.encoder(x)
        p, guesses = model.projector(features).view(3, 16, -1), model.probe(features).view(3, 16, 10)
    pairs = [(p[a] - p[b]).square().mean() for a in range(3) for b in range(a)]
    invariance, variance, covariance, sigreg, probe = terms
    torch.testing.assert_close(invariance, torch.stack(pairs).mean().double(), check_dtype=False, rtol=1e-4, atol=1e-6)
    surprise = torch.stack([-guess.softmax(1)[range(16), batch.labels].log().mean() for guess in guesses]).mean()
    torch.testing.assert_close(probe, surprise, check_dtype=False, rtol=1e-4, atol=1e-6)
    parts = 3 * invariance + probe
    if loss == "vicreg":
        each = [2 * torch.stack(ij.variance_covariance_loss(view)) for view in p]  # published: the sum over two views
        torch.testing.assert_close(
            torch.stack((variance, covariance)), torch.stack(each).mean(0), check_dtype=False, rtol=1e-4, atol=1e-6
        )
        parts = parts + cfg.variance_weight * variance + cfg.covariance_weight * covariance
        assert sigreg == 0
    else:
        each = [ij.sigreg_loss(view, batch.directions, knots=7) for view in p]
        torch.testing.assert_close(sigreg, torch.stack(each).mean(), check_dtype=False, rtol=1e-4, atol=1e-6)
        parts = parts + cfg.sigreg_weight * sigreg
        assert batch.directions.norm(dim=0).allclose(torch.ones(cfg.directions)) and variance == covariance == 0
    torch.testing.assert_close(total, parts, check_dtype=False)


def test_the_probe_teaches_the_encoder_nothing():
    cfg, model, batch = small()
    with torch.no_grad():
        model.probe.weight.mul_(100)
    grads = []
    for labels in (batch.labels, 9 - batch.labels):
        total, *_ = ij.losses(model, cfg, batch._replace(labels=labels))
        grads.append(torch.autograd.grad(total, list(model.encoder.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lars_against_its_definition(decay):
    torch.manual_seed(0)
    w, b = torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(5))
    groups = [dict(params=[w], matrix=True, weight_decay=decay), dict(params=[b], matrix=False, weight_decay=0.0)]
    optimizer = ij.LARS(groups, lr=0.3)
    w0, b0, mw, mb = w.detach().clone(), b.detach().clone(), 0, 0
    for step in range(4):
        w.grad, b.grad = torch.randn(5, 3) * 10 ** (step - 2), torch.randn(5)
        trust = min(0.02 * w0.norm() / (w.grad.norm() + decay * w0.norm()) / 0.3, 1)
        mw, mb = 0.9 * mw + trust * (w.grad + decay * w0), 0.9 * mb + b.grad
        optimizer.step()
        w0, b0 = w0 - 0.3 * mw, b0 - 0.3 * mb
        torch.testing.assert_close(w.detach(), w0)
        torch.testing.assert_close(b.detach(), b0)


def test_muon_against_its_definition():
    """The last gradients nearly cancel what is remembered: another momentum, or none of Nesterov, turns the step."""
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 12), (6, 3, 2, 2), (12, 6))]  # two are alike
    vector = torch.nn.Parameter(torch.randn(5))
    twin = torch.nn.Parameter(vector.detach().clone())
    groups = [
        dict(params=matrices, matrix=True, weight_decay=0.5),
        dict(params=[vector], matrix=False, weight_decay=0.0),
    ]
    optimizer, adam = ij.Muon(groups, lr=0.1), torch.optim.Adam([twin], 0.01, (0.9, 0.98))
    gradients = [size * torch.randn_like(w) for size, w in zip((1, 1000, 1), matrices)]
    sums = [0, 0, 0]
    for last in ((1, 1, 1), (1, 1, 1), (1, 1, 1), (-1.07, -1.19, -1.19)):
        before = [w.detach().clone() for w in matrices]
        for w, g, factor in zip(matrices, gradients, last):
            w.grad = factor * g
        vector.grad = twin.grad = torch.randn(5)
        optimizer.step()
        adam.step()
        torch.testing.assert_close(vector, twin)
        for i, (w, old) in enumerate(zip(matrices, before)):
            sums[i] = 0.9 * sums[i] + w.grad
            step = ((1 - 0.1 * 0.5) * old - w.detach()).flatten(1) / 0.1
            u, _, v = torch.linalg.svd((w.grad + 0.9 * sums[i]).flatten(1), full_matrices=False)
            assert F.cosine_similarity(step.flatten(), (u @ v).flatten(), dim=0) > 0.95
            values = torch.linalg.svdvals(step) / max(1, len(step) / step.shape[1]) ** 0.5
            assert 0.6 < values.min() and values.max() < 1.3


@pytest.mark.parametrize(
    "optimizer,backbone", [("lars", "small"), ("adamw", "small"), ("muon", "small"), ("muon", "vit_s")]
)
def test_weight_decay_spares_biases_norms_and_places(optimizer, backbone):
    cfg = preset("smoke", optimizer=optimizer, backbone=backbone, weight_decay=0.1)
    with torch.device("meta" if backbone == "vit_s" else "cpu"):
        model = ij.Model(cfg, 10)
    groups = ij.make_optimizer(model, cfg).param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    decayed, spared = ({id(p) for p in g["params"]} for g in groups)
    assert len(decayed) + len(spared) == len(list(model.parameters()))
    assert not any(id(p) in decayed for p in model.parameters() if p.ndim == 1)
    places = {f"encoder.backbone.{name}" for name in ("position", "token")} if backbone == "vit_s" else set()
    assert {name for name, p in model.named_parameters() if p.ndim > 1 and id(p) in spared} == places


def test_learning_rate():
    cfg = preset("paper", lr=1.0, epochs=100, warmup_epochs=10)
    assert [ij.learning_rate(cfg, s, 1000) for s in (0, 49, 99, 100, 550, 1000)] == pytest.approx(
        [0.01, 0.5, 1.0, 1.0, 0.5, 0.0], abs=1e-9
    )


# -------------------------------------------------------------------------------------------------------- evaluation
def test_linear_probe_converges_and_chooses_its_decay():
    torch.manual_seed(0)
    centre = 2 * torch.randn(3, 8)
    y = torch.randint(0, 3, (900,))
    z = (centre[y] + torch.randn(900, 8)) * torch.logspace(-3, 3, 8)  # scales differ a million times
    y_test = torch.randint(0, 3, (600,))
    z_test = (centre[y_test] + torch.randn(600, 8)) * torch.logspace(-3, 3, 8)
    best = (
        torch.cdist(z_test / torch.logspace(-3, 3, 8), centre).argmin(1) == y_test
    ).float().mean().item() * 100  # Bayes
    result = ij.linear_probe(z, y, z_test, y_test, 3)
    assert abs(result["linear_accuracy"] - best) < 2
    one_class = ij.linear_probe(z, y, z_test[y_test == 0], y_test[y_test == 0], 3)  # test data decide nothing
    assert one_class["linear_accuracy"] > 90 and one_class | {"linear_accuracy": 0} == result | {"linear_accuracy": 0}
    noise = ij.linear_probe(torch.randn(900, 200), y, torch.randn(600, 200), y_test, 3)
    assert (
        noise["probe_decay"] >= 1e-2 and noise["linear_accuracy"] < 45
    )  # where there is nothing, the strong decay wins


def test_linear_probe_is_scikit_learns_on_all_training_images():
    from sklearn.linear_model import LogisticRegression

    torch.manual_seed(0)
    z, y = torch.randn(150, 60), torch.randint(0, 3, (150,))
    ours = ij.linear_probe(5 * z + 1, y, 5 * z + 1, y, 3)
    x = ((z - z.mean(0)) / z.std(0)).numpy()
    theirs = LogisticRegression(C=1 / (150 * ours["probe_decay"]), tol=1e-7, max_iter=5000).fit(x, y.numpy())
    assert ours["linear_accuracy"] == pytest.approx(100 * theirs.score(x, y.numpy()), abs=0.1)


def test_knn_against_counting():
    torch.manual_seed(0)
    z, y, z_test, y_test = (
        torch.randn(300, 5),
        torch.randint(0, 4, (300,)),
        torch.randn(70, 5),
        torch.randint(0, 4, (70,)),
    )
    right = {k: 0 for k in (1, 20, 200)}
    for q, truth in zip(z_test, y_test):
        similar = F.cosine_similarity(q[None], z)
        for k in right:
            votes = [0.0] * 4
            for i in similar.argsort(descending=True)[:k]:
                votes[y[i]] += math.exp(similar[i] / 0.07)
            right[k] += votes.index(max(votes)) == truth.item()
    assert ij.knn(z, y, z_test, y_test, 4, tuple(right)) == pytest.approx(
        {k: 100 * v / 70 for k, v in right.items()}, abs=0.01
    )


# ----------------------------------------------------------------------------------------------------- whole commands
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One smoke run of the command, as a person would start it."""
    path = tmp_path_factory.mktemp("image") / "run"
    done = subprocess.run(
        [sys.executable, "image_jepa.py", "--preset", "smoke", "--run-dir", str(path)],
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
    log = [r for r in map(json.loads, (path / "metrics.jsonl").read_text().splitlines()) if "loss" in r]
    first, last = (sum(r["loss"] for r in part) / 2 for part in (log[:2], log[-2:]))
    assert log[-1]["step"] == summary["steps"] and last < first - 0.25  # measured: 5.47, 4.95
    assert summary["linear_accuracy"] > summary["random_encoder_accuracy"] + 5  # measured: 31 against 17
    subprocess.run([sys.executable, "results/draw.py", path], cwd=ROOT, check=True)
    for name in ("curves", "views", "neighbours", "map"):
        with Image.open(path / f"{name}.png") as picture:
            assert np.array(picture.convert("L")).std() > 5, name


def test_load_is_the_trained_encoder(run):
    encoder = ij.load(run[0])
    images = ij.shapes(32).test[:10].float() / 255
    z = encoder(images)
    assert not encoder.training and not z.requires_grad and z.dtype == torch.float32 and torch.equal(z, encoder(images))
    one = torch.cat([encoder(x[None]) for x in images])
    torch.testing.assert_close(one, z, rtol=1e-4, atol=1e-4)
    fresh = ij.build(preset("smoke"), ij.shapes(32))
    assert (fresh(images) - z).abs().max() > 0.01


@pytest.mark.parametrize("weight,flagged", [(0.1, True), (10.0, False)])
def test_a_collapse_is_flagged(weight, flagged, tmp_path, capsys):
    """SIGReg of weight 0.1 is a failure of the published table."""
    ij.train(
        preset(
            "smoke", loss="sigreg", sigreg_weight=weight, max_steps=100, evaluate=False, run_dir=str(tmp_path / "run")
        )
    )
    log = [r for r in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()) if "loss" in r]
    assert ("collapsing" in capsys.readouterr().out) == flagged
    assert (log[-1]["projection_std"] < 0.1) == flagged
