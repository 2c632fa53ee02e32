"""The loss curve of one or several runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import PercentFormatter  # noqa: E402

from nlscale.runtime.folder import Folder, read_lines  # noqa: E402


def plot(folders: Sequence[Folder], target: Path) -> Path:
    """Draws training and held-out loss, norms by level, throughput and goodput into `target` (PNG) and an SVG beside it."""
    figure, (losses, norms, speed, good) = pyplot.subplots(
        4, 1, figsize=(8, 10.5), sharex=True, height_ratios=(3, 2, 1.2, 1)
    )
    for folder in folders:
        lines = read_lines(folder.metrics)
        label = f"{folder.path.name} " if len(folders) > 1 else ""
        draw(losses, lines, "train/loss", f"{label}train", linewidth=1)
        draw(losses, lines, "eval/loss", f"{label}held-out", marker="o", linestyle="none")
        levels = [
            key for line in lines[-1:] for key in line if key.startswith("optim/level/") and key.endswith("fired")
        ]
        names = levels or [key for line in lines[:1] for key in line if key.endswith("/fired")]
        for key in names:
            name = key.split("/")[2]
            draw(norms, lines, f"optim/level/{name}/update_norm", f"{label}{name}", marker=".", linewidth=0.8)
        draw(speed, lines, "throughput/tokens_per_second", f"{label}tokens/s", linewidth=0.8)
        draw(good, lines, "goodput/share", f"{label}goodput, all attempts", marker="o", linewidth=0.8)
    losses.set_ylabel("loss (nats a token)")
    norms.set_ylabel("update norm by level")
    norms.set_yscale("log")
    speed.set_ylabel("tokens/s")
    good.set_ylabel("of held time")
    good.set_ylim(0, 1)
    good.yaxis.set_major_formatter(PercentFormatter(1))
    good.set_xlabel("step")
    for axes in (losses, norms, speed, good):
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize="small")
    return written(figure, target)


def draw(axes: pyplot.Axes, lines: list[dict], key: str, label: str, **style: Any) -> None:
    """One curve, where the runs' lines have it."""
    points = [(line["step"], line[key]) for line in lines if key in line]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)


def written(figure: Figure, target: Path) -> Path:
    """Writes a figure into `target` (PNG) and an SVG beside it, and closes it."""
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110)
    figure.savefig(target.with_suffix(".svg"))
    pyplot.close(figure)
    return target
