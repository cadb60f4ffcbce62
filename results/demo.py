"""Trained models at once, from the small weights in results/: no training, and no downloads.

    python results/demo.py                       # or: make demo
    python results/demo.py --images FOLDER       # neighbours of your own images

Plans twelve tasks in Two Rooms, predicts four clips of moving digits, and looks for the images that are nearest to some
others in feature space. Of MNIST and CIFAR-10 what lies in data/ is used, and scikit-learn's digits where nothing does.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import draw
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import image_jepa  # noqa: E402
import video_jepa  # noqa: E402
import world_model  # noqa: E402


def plan(out: Path) -> str:
    agent = world_model.load(ROOT / "results/world_model/cpu-0.pt")
    cfg = dataclasses.replace(agent.cfg, episodes=12)
    rates, examples = world_model.evaluate(agent.model, cfg, torch.device("cpu"))
    draw.draw_paths(out / "paths.png", examples)
    draw.draw_episodes(out / "episodes.gif", examples)
    straight, solved = rates["straight_line_success_rate"], rates["success_rate"]
    return f"{solved:.0f} % of 12 tasks solved (the straight line: {straight:.0f} %): paths.png, episodes.gif"


def predict(out: Path) -> str:
    model = video_jepa.load(ROOT / "results/video_jepa/cpu-0.pt")
    data = "mnist" if (ROOT / "data/MNIST").exists() else "digits"
    cfg = video_jepa.preset("smoke", data=data, data_dir=str(ROOT / "data"), sequences=10, seed=1)
    clips = video_jepa.make_clips(video_jepa.load_sequences(cfg)[0][:2], torch.device("cpu"))
    examples = video_jepa.make_examples(model, clips.frames[:4], clips.labels[:4])
    draw.draw_rollout(out / "rollout.gif", **examples)
    return f"four clips of moving digits ({data}), predicted from their first two frames: rollout.gif"


def neighbours(out: Path, folder: str) -> str:
    encoder = image_jepa.load(ROOT / "results/image_jepa/cpu-0.pt")
    cifar = ROOT / "data/cifar-10-batches-py"
    cfg = image_jepa.preset(
        "cpu", data=folder or ("cifar10" if cifar.exists() else "digits"), data_dir=str(ROOT / "data")
    )
    images = image_jepa.load_images(cfg)
    few = lambda x: x[:: max(1, len(x) // 2000)]
    images = image_jepa.Images(*(few(x) for x in images[:4]), images.classes)
    examples = image_jepa.make_examples(SimpleNamespace(encoder=encoder), cfg, images)
    draw.draw_image(out, {}, examples)
    return f"images of {cfg.data}, and the nearest in feature space (orange: another class): neighbours.png, views.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", metavar="FOLDER", default="", help="images of your own")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/demo", help="where the figures go")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    for part in (plan, predict, lambda out: neighbours(out, arguments.images)):
        print(part(arguments.out), flush=True)
    print(f"{time.perf_counter() - begin:.0f} s; figures in {arguments.out}")


if __name__ == "__main__":
    main()
