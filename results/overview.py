"""results/overview.png, the README's first picture, from figures of runs that lie in results/."""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HERE = Path(__file__).parent
HEIGHT, GAP, TITLE = 420, 24, 30


def neighbours() -> Image.Image:
    picture = Image.open(HERE / "image_jepa/neighbours.png").convert("RGB")
    return picture.crop((0, 0, picture.width * 6 // 10, picture.height * 4 // 8))  # 4 test images, 5 neighbours each


def rollout() -> Image.Image:
    """Three clips in three columns, each: true frames above those decoded 1, 3 and 5 frames ahead."""
    gif = Image.open(HERE / "video_jepa/rollout.gif")
    side, frames = gif.height // 2, (2, 4, 6)
    picture = Image.new("RGB", (side * 3, side * 4), "white")
    for column, frame in enumerate(frames):
        gif.seek(frame)
        shown = gif.convert("RGB")
        for clip in range(2):
            picture.paste(shown.crop((clip * side, 0, (clip + 1) * side, 2 * side)), (column * side, 2 * clip * side))
    return picture


def ways() -> Image.Image:
    picture = Image.open(HERE / "world_model/map.png").convert("RGB")
    return picture.crop((0, 35, picture.width // 2, 420))  # the first eight tasks


def main() -> None:
    font, parts = ImageFont.load_default(20), []
    for title, picture in (
        ("images: a test image and its neighbours", neighbours()),
        ("video: truth above, predicted below", rollout()),
        ("planning: ways through the door", ways()),
    ):
        part = Image.new("RGB", (max(picture.width * HEIGHT // picture.height, 380), HEIGHT + TITLE), "white")
        part.paste(picture.resize((picture.width * HEIGHT // picture.height, HEIGHT), Image.LANCZOS), (0, TITLE))
        ImageDraw.Draw(part).text((4, 2), title, "black", font)
        parts.append(part)
    whole = Image.new("RGB", (sum(p.width + GAP for p in parts) + GAP, HEIGHT + TITLE + 2 * GAP), "white")
    left = GAP
    for part in parts:
        whole.paste(part, (left, GAP))
        left += part.width + GAP
    whole.quantize(200).save(HERE / "overview.png", optimize=True)


if __name__ == "__main__":
    main()
