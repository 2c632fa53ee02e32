"""A continuum over time: when each level moves, and what that sends."""

from pathlib import Path

from nlscale.config.levels import Level, due
from nlscale.config.run import Run
from nlscale.model.count import parameters
from nlscale.train.plot import pyplot, written

SHOWN = 2  # periods of the slowest level that fits
LONGEST = 128  # steps


def shown(run: Run) -> int:
    """Steps of the picture."""
    periods = [level.steps for level in run.levels if not level.frozen and SHOWN * level.steps <= LONGEST]
    return SHOWN * max(periods, default=1) if max(periods, default=1) > 1 else 16


def said(level: Level) -> str:
    """A level and its beat."""
    if level.frozen:
        return f"{level.name}, frozen"
    return f"{level.name}, every " + (level.unit if level.period == 1 else f"{level.period} {level.unit}s")


def picture(run: Run, target: Path) -> Path:
    """Draws a row a level, a bar at each of its moves, and below the share of all parameters that each step moves.

    PNG into `target`, and an SVG beside it.
    """
    steps, held = shown(run), parameters(run.model, run.levels)
    total = sum(held.values())
    height = 1.6 + 0.55 * len(run.levels)
    figure, (rows, share) = pyplot.subplots(
        2, 1, figsize=(9, height + 1.4), sharex=True, height_ratios=(len(run.levels), 2)
    )
    colours = pyplot.get_cmap("viridis")
    for place, level in enumerate(run.levels):
        colour = colours(place / max(1, len(run.levels) - 1) * 0.85)
        moves = [step for step in range(1, steps + 1) if due(level, step)]
        rows.barh(place, steps, left=0.5, height=0.7, color=colour, alpha=0.15)  # the window
        rows.bar(moves, 0.7, bottom=place - 0.35, width=0.6, color=colour)
        share.bar(
            moves,
            [held[level.name] / total] * len(moves),
            bottom=[
                sum(held[other.name] for other in run.levels[:place] if due(other, step)) / total for step in moves
            ],
            width=0.9,
            color=colour,
        )
    rows.set_yticks(range(len(run.levels)), [f"{said(level)} ({held[level.name] / total:.0%})" for level in run.levels])
    rows.invert_yaxis()
    mean = sum(held[level.name] / level.steps for level in run.levels if not level.frozen) / total
    share.axhline(mean, color="black", linewidth=0.8, linestyle="--")
    share.set_title(f"dashed: the mean, {mean:.2f}, the sum of width / period", loc="left", fontsize="small")
    share.set_ylim(0, 1.05)
    share.set_ylabel("share that moves")
    share.set_xlabel("step")
    share.set_xlim(0.5, steps + 0.5)
    return written(figure, target)
