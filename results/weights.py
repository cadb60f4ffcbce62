"""The weights of a run, without its optimisers, for readers who do not want to train first.

    python results/weights.py runs/world_model/cpu-20261126-101500 results/world_model/cpu-0.pt

Matrices and convolutions are rounded to half precision; of image_jepa.py only the encoder is kept. load() of the script
reads the file, and nothing in it is executed.
"""

import sys
from pathlib import Path

import torch


def main() -> None:
    run, out = Path(sys.argv[1]), Path(sys.argv[2])
    state = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    part = "encoder." if "image_jepa" in state["format"] else ""
    weights = {name: value for name, value in state["model"].items() if name.startswith(part)}
    weights = {name: value.half() if value.ndim > 1 else value for name, value in weights.items()}
    torch.save({name: state[name] for name in ("format", "config", "step")} | dict(model=weights), out)
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
