"""Figures of a run, from its folder alone: summary.json, metrics.jsonl and examples.npz.

    python results/draw.py runs/video_jepa/cpu-20261125-101500 [another run ...]
    python results/draw.py --newest video_jepa      # the newest finished run of a script

Writes into the run folder: curves.png for every run; views.png and neighbours.png for images; ap.png and
rollout.gif for videos; map.png and episodes.gif for world models.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

BLUE, ORANGE, RED, GREY = (0, 114, 178), (230, 159, 0), (213, 94, 0), (120, 120, 120)  # Okabe-Ito, colour-blind safe
METER = ("std_min", "std_mean", "correlation", "projection_std")  # the effective rank has a panel of its own
NO_TERM = {"step", "lr", "milliseconds", "clips_per_second", "loss", "effective_rank", *METER}


# ---------------------------------------------------------------------------------------------------- for every run
def save_lines(path: Path, panels: list[dict]) -> None:
    """Panels side by side: dict(x label, y label, scale, lines = [(label, x, y, matplotlib style), ...])."""
    figure = Figure(figsize=(6 * len(panels), 3.4), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for label, x, y, style in panel["lines"]:
            axis.plot(x, y, style, label=label.replace("$", r"\$"), lw=1.5, ms=4)
        axis.set(xlabel=panel["x"], ylabel=panel["y"], yscale=panel.get("scale", "linear"))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)  # beside the lines
    figure.savefig(path, dpi=110)


def draw_curves(run: Path) -> None:
    """curves.png: loss terms, collapse meter and effective rank against the optimiser step."""
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    log = list({record["step"]: record for record in log if "loss" in record}.values())  # a resumed run repeats steps
    if not log:
        return
    steps = [record["step"] for record in log]

    def lines(names):
        drawn = [name for name in names if any(record[name] for record in log)]
        return [(name.replace("_", " "), steps, [record[name] for record in log], "-") for name in drawn]

    terms = [name for name in log[0] if name not in NO_TERM]
    meter = [name for name in METER if name in log[0]]
    panels = [
        dict(x="optimiser step", y="loss term", scale="log", lines=lines(terms)),
        dict(x="optimiser step", y="collapse meter", lines=lines(meter)),
        dict(x="optimiser step", y="effective rank", lines=lines(["effective_rank"])),
    ]
    save_lines(run / "curves.png", panels)


def save_gif(path: Path, pictures: list[Image.Image], milliseconds: int, last: int) -> None:
    pictures = [picture.quantize(64) for picture in pictures]
    durations = [milliseconds] * (len(pictures) - 1) + [last]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)


# ------------------------------------------------------------------------------------------------------------ video
def draw_video(run: Path, summary: dict, examples: dict) -> None:
    styles = {
        "ap_parallel": ("parallel rollout", "-s"),
        "ap_autoregressive": ("autoregressive, from two frames", "-o"),
        "ap_last_frame": ("baseline: last true frame", "-."),
        "ap_true_frames": ("true frames", "--"),
    }
    lines = [(label, range(1, 8), summary[name], style) for name, (label, style) in styles.items()]
    lines.append(("parallel, published (1 and 7)", (1, 7), (0.76, 0.40), "k*"))
    save_lines(run / "ap.png", [dict(x="frames ahead", y="average precision", lines=lines)])
    draw_rollout(run / "rollout.gif", **examples)


def draw_rollout(path: Path, frames, labels, decoded, detected, scale: int = 3) -> None:
    """GIF of clips: above, true frames with their labelled cells; below, the pixels decoded from the latents predicted
    from the first two frames, with the detected cells (probability over 0.5)."""
    N, T, size, _ = frames.shape
    side, cell = size * scale, size * scale / labels.shape[-1]
    pictures = []
    for t in range(T):
        sheet = Image.new("RGB", (N * side, 2 * side), "white")
        pen = ImageDraw.Draw(sheet)
        for n in range(N):
            for row, (frame, cells, colour) in enumerate(
                [(frames[n, t], labels[n, t], ORANGE), (decoded[n, t], detected[n, t] > 0.5, RED)]
            ):
                left, top = n * side, row * side
                picture = Image.fromarray(255 - frame).resize((side, side), Image.Resampling.NEAREST)
                sheet.paste(picture, (left, top))
                for y, x in np.argwhere(cells):
                    corner = (left + x * cell, top + y * cell)
                    pen.rectangle((*corner, corner[0] + cell, corner[1] + cell), outline=colour, width=2)
                text = "true" if row == 0 else f"predicted, {t - 1} ahead" if t > 1 else "given"
                pen.text((left + 3, top + 1), text, fill="grey")
            pen.line((n * side, 0, n * side, 2 * side), fill="lightgrey")
        pen.line((0, side, N * side, side), fill="lightgrey")
        pictures.append(sheet)
    save_gif(path, pictures, 300, 1200)


# ----------------------------------------------------------------------------------------------------------- images
def draw_image(run: Path, summary: dict, examples: dict) -> None:
    """views.png: images and their augmented views; neighbours.png: test images (or others, if there are none) and those
    nearest to them in feature space, other classes in orange."""
    rows = [("image", examples["images"]), *((f"view {v}", x) for v, x in enumerate(examples["views"], 1))]
    sheet = [[(x, name if n == 0 else "", "black") for n, x in enumerate(pictures)] for name, pictures in rows]
    save_sheet(run / "views.png", sheet)
    names, sheet = [str(name) for name in examples["classes"]], []
    for pictures, labels in zip(examples["nearest"], examples["nearest_labels"]):
        titles = [("image: " if n == 0 else "") + names[label] for n, label in enumerate(labels)]
        colours = ["black" if label == labels[0] else "#d55e00" for label in labels]
        sheet.append(list(zip(pictures, titles, colours)))
    save_sheet(run / "neighbours.png", sheet)


def save_sheet(path: Path, rows: list[list[tuple]]) -> None:
    """Rows of (picture [3, H, W] uint8, title, colour of the title)."""
    figure = Figure(figsize=(len(rows[0]), 1.15 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for axis, (picture, title, colour) in zip(axes.flat, (cell for row in rows for cell in row)):
        axis.imshow(picture.transpose(1, 2, 0), interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(title.replace("$", r"\$"), fontsize=7, pad=2, color=colour)
    figure.savefig(path, dpi=110)


# ------------------------------------------------------------------------------------------------------ world model
WORLD, REACHED = 65, 4.5  # side of a frame; a goal counts as reached within so many px


def draw_world(run: Path, summary: dict, examples: dict) -> None:
    draw_paths(run / "map.png", examples)
    draw_episodes(run / "episodes.gif", examples)


def draw_room(pen: ImageDraw.ImageDraw, left: float, top: float, scale: int, wall_x: float, door_y: float) -> None:
    """The borders and the wall with its door of one frame, as rectangles of whole px."""

    def fill(x0, y0, x1, y1):
        pen.rectangle((left + x0 * scale, top + y0 * scale, left + x1 * scale - 1, top + y1 * scale - 1), fill=GREY)

    for border in (4, 60):
        fill(border, 0, border + 1, WORLD)
        fill(0, border, WORLD, border + 1)
    wall = round(wall_x)
    fill(wall - 1, 0, wall + 2, round(door_y) - 4)
    fill(wall - 1, round(door_y) + 5, wall + 2, WORLD)


def dot(pen: ImageDraw.ImageDraw, x: float, y: float, radius: float, **style) -> None:
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), **style)


def draw_paths(path: Path, examples: dict, most: int = 16) -> None:
    """map.png: the paths of the agent, solved tasks above and failed ones below."""
    position, goal, wall = examples["position"], examples["goal"], examples["wall"]
    solved = np.linalg.norm(position[:, -1] - goal, axis=1) <= REACHED
    groups = [(solved, "solved", BLUE), (~solved, "failed", RED)]
    groups = [group for group in groups if group[0].any()]
    rows = [math.ceil(min(most, which.sum()) / 8) for which, _, _ in groups]
    figure = Figure(figsize=(12, 1.75 * sum(rows) + 0.6), layout="constrained")
    parts = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=rows)[:, 0]
    for part, n_rows, (which, name, colour) in zip(parts, rows, groups):
        shown = f", {most} shown" if which.sum() > most else ""
        part.suptitle(f"{name}: {which.sum()} of {len(solved)} tasks{shown} (dot: start, x: end, circle: goal)")
        axes = list(part.subplots(n_rows, 8, squeeze=False).flat)
        for axis in axes:
            axis.set_axis_off()
        for axis, n in zip(axes, np.flatnonzero(which)[:most]):
            room = Image.new("RGB", (WORLD, WORLD), "white")
            draw_room(ImageDraw.Draw(room), 0, 0, 1, *wall[n])
            axis.imshow(room)
            axis.plot(*position[n].T, color=[c / 255 for c in colour], lw=1)
            axis.plot(*position[n, 0], "o", color="black", ms=3)
            axis.plot(*position[n, -1], "x", color="black", ms=5)
            axis.plot(*goal[n], "o", mfc="none", mec=[c / 255 for c in ORANGE], ms=9)
            axis.set_title(f"task {n}", fontsize=7, pad=1)
    figure.savefig(path, dpi=110)


def draw_episodes(path: Path, examples: dict, scale: int = 4, columns: int = 3) -> None:
    """GIF of the first tasks: dot (blue), goal (orange), the path so far (blue line), the plan (red points)."""
    position, goal, wall, plans = (examples[name] for name in ("position", "goal", "wall", "plans"))
    shown = plans.shape[1]  # plans [steps, shown, horizon, 2], NaN where shorter
    near = np.linalg.norm(position[:shown] - goal[:shown, None], axis=2) <= REACHED  # [shown, steps + 1]
    arrival = [of_task.argmax() if of_task.any() else len(of_task) for of_task in near]
    end = min(len(plans), max(20, max(arrival) + 15))
    side, pictures = WORLD * scale, []
    for t in range(0, end, 1 if end <= 80 else 2):
        sheet = Image.new("RGB", (columns * side, math.ceil(shown / columns) * side), "white")
        pen = ImageDraw.Draw(sheet)
        for n in range(shown):
            corner = np.array([n % columns, n // columns]) * side
            draw_room(pen, *corner, scale, *wall[n])

            def at(p, corner=corner):
                return tuple(corner + (np.asarray(p) + 0.5) * scale)

            if t:
                pen.line([at(p) for p in position[n, : t + 1]], fill=BLUE, width=2)
            dot(pen, *at(position[n, t]), 2 * scale, fill=BLUE)
            dot(pen, *at(goal[n]), REACHED * scale, outline=ORANGE, width=2)
            for p in plans[t, n][np.isfinite(plans[t, n, :, 0])]:
                dot(pen, *at(p), 3, fill=RED)
            text = f"task {n}  step {t}" + ("  at goal" if near[n, t] else "")
            pen.text(at((1.0, 0.0)), text, fill="black")
        pictures.append(sheet)
    save_gif(path, pictures, 80, 1500)


def draw(run: Path) -> None:
    """All figures of a run folder. Raises FileNotFoundError if the run has no summary.json yet."""
    summary = json.loads((run / "summary.json").read_text())
    draw_curves(run)
    if (run / "examples.npz").exists():
        with np.load(run / "examples.npz") as file:
            examples = dict(file)
        kinds = dict(image_jepa=draw_image, video_jepa=draw_video, world_model=draw_world)
        if summary["script"] in kinds:  # a fork of another name has its curves
            kinds[summary["script"]](run, summary, examples)
    print(f"{run}: " + ", ".join(sorted(p.name for p in run.iterdir() if p.suffix in (".png", ".gif"))))


def newest(script: str) -> list[Path]:
    """The newest finished run of a script, in a list; empty if there is none."""
    runs = Path("runs", script).glob("*/summary.json")
    return [path.parent for path in sorted(runs, key=lambda path: path.stat().st_mtime)][-1:]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--newest", metavar="SCRIPT")
    args = parser.parse_args()
    for run in args.runs + (newest(args.newest) if args.newest else []):
        draw(run)
