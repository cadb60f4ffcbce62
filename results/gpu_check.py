"""What a GPU does with this project: its tests, the kernels' benchmark, 30 timed steps of presets gpu and paper.

    python results/gpu_check.py [--json FILE] [--only NAME]

Every part is a process of its own: one that fails is a line in the table and ends nothing. Data are made here, so none
need be there; they have the shapes of the real ones.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
PRESETS = [(script, preset) for script in ("world_model", "image_jepa", "video_jepa") for preset in ("gpu", "paper")]
SMALL = {  # settings that shorten preparation and leave out evaluation
    "world_model": dict(walks=768, episodes=0),
    "image_jepa": dict(data="digits", evaluate=False),
    "video_jepa": dict(data="digits", sequences=200, validation_clips=0),
}


def time_steps(name: str, preset: str) -> dict:
    """Steps 31 to 60 of a training; then one more, not compiled, to count its products."""
    from torch.utils.flop_counter import FlopCounterMode

    sys.path.insert(0, str(ROOT))
    script = importlib.import_module(name)
    run_dir = Path(tempfile.mkdtemp(), "run")
    cfg = script.preset(preset, device="cuda", max_steps=60, log_every=30, run_dir=str(run_dir), **SMALL[name])
    begin = time.perf_counter()
    script.train(cfg)
    seconds = time.perf_counter() - begin
    line = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    result = dict(milliseconds=line["milliseconds"], per_second=1e3 * cfg.batch_size / line["milliseconds"])
    result |= dict(peak_gigabytes=torch.cuda.max_memory_allocated() / 2**30, seconds_in_all=seconds)
    result |= dict(dtype="bfloat16" if getattr(cfg, "bf16", False) else "float32")

    torch.compiler.reset()  # gives the memory of its graphs back
    torch.cuda.empty_cache()
    model, batch = parts(script, cfg)
    script.use_triton(False)  # the counter knows PyTorch's operators only
    with FlopCounterMode(display=False) as counter:
        loss, _, _ = script.losses(model, cfg, *batch(0))
        loss.backward()
    result |= dict(teraflops=1e-9 * counter.get_total_flops() / line["milliseconds"])
    if name == "world_model":
        script.use_triton(None)
        agent = script.Agent(model.requires_grad_(False), cfg)
        obs = torch.zeros(20, 2, script.SIZE, script.SIZE, dtype=torch.uint8, device="cuda")
        for _ in range(2):  # the first captures the graphs
            agent.reset()
            begin = time.perf_counter()
            agent.act(obs, obs, script.EPISODE_STEPS)[0, 0].item()
        result |= dict(plan_milliseconds=1e3 * (time.perf_counter() - begin))
    return result


def parts(script, cfg) -> tuple:
    """A model on the GPU, and a function: step -> the arguments of its loss."""
    to_gpu = lambda data: type(data)(*(x.cuda() if torch.is_tensor(x) else x for x in data))
    if script.SCRIPT == "image_jepa":
        images = to_gpu(script.load_images(cfg))
        return script.Model(cfg, len(images.classes)).cuda(), lambda step: script.make_batch(cfg, images, step)
    if script.SCRIPT == "video_jepa":
        clips = script.make_clips(script.load_sequences(cfg)[0], "cuda")
        return script.Model(cfg).cuda(), lambda step: (script.make_batch(cfg, clips, step),)
    walks = script.make_walks(cfg, cfg.walks, 0)
    walks = to_gpu(script.shortest_paths(cfg, walks) if cfg.cost == "distance" else walks)
    return script.Model(cfg).cuda(), lambda step: (script.make_batch(cfg, walks, step),)


def run(*command: str) -> tuple[str, str]:
    """-> what the command printed, and the last line of its error if it failed."""
    ended = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    last = [f"ended with code {ended.returncode}", *ended.stdout.splitlines(), *ended.stderr.splitlines()][-1]
    return ended.stdout, last if ended.returncode else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", default=str(ROOT / "results/gpu_check.json"), metavar="FILE")
    parser.add_argument("--only", default="", metavar="NAME", help="only presets whose script and name contain this")
    parser.add_argument("--steps", nargs=2, metavar=("SCRIPT", "PRESET"), help="only the steps of this one, as JSON")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: PyTorch finds no CUDA device here")
    if arguments.steps:
        print(json.dumps(time_steps(*arguments.steps)))
        return
    begin = time.time()
    report = dict(device=torch.cuda.get_device_name(), torch=torch.__version__, steps={})
    print(f"{report['device']}, torch {report['torch']}", flush=True)
    if not arguments.only:
        out, error = run("-m", "pytest", "-q", "tests/test_kernels.py", "-k", "gpu")
        report["tests"] = out.strip().splitlines()[-1] if out else error
        print(f"GPU tests: {report['tests']}\n", flush=True)
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            out, error = run("-m", "kernels.bench", "--seconds", "0.3", "--json", file.name)
            written = Path(file.name).read_text()
        report["bench"] = json.loads(written) if written else dict(error=error)
        print(out + error, flush=True)
    ceiling = report.get("bench", {}).get("ceiling", {})
    columns = "preset", "ms a step", "samples/s", "TFLOP/s", "of the ceiling", "peak GiB", "plan 20 tasks, ms", "all, s"
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|", flush=True)
    for script, preset in PRESETS:
        if arguments.only not in f"{script} {preset}":
            continue
        out, error = run(__file__, "--steps", script, preset)
        if error:
            report["steps"][f"{script} {preset}"] = dict(error=error)
            print(f"| `{script}`, `{preset}` | failed: {error} |", flush=True)
            continue
        r = report["steps"][f"{script} {preset}"] = json.loads(out.splitlines()[-1])
        share = f"{100 * r['teraflops'] / ceiling[r['dtype']]:.0f} % of {r['dtype']}" if ceiling else ""
        plan = f"{r['plan_milliseconds']:.0f}" if "plan_milliseconds" in r else ""
        cells = f"{r['milliseconds']:.1f}", f"{r['per_second']:,.0f}", f"{r['teraflops']:.1f}", share
        cells += f"{r['peak_gigabytes']:.1f}", plan, f"{r['seconds_in_all']:.0f}"
        print(f"| `{script}`, `{preset}` | " + " | ".join(cells) + " |", flush=True)
    report["minutes"] = (time.time() - begin) / 60
    Path(arguments.json).write_text(json.dumps(report, indent=1))
    print(f"\n{report['minutes']:.1f} minutes; all of it in {arguments.json}")


if __name__ == "__main__":
    main()
