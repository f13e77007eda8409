"""The learning curve of a run as a picture."""

from __future__ import annotations

import itertools
from pathlib import Path

from propmeta_edit.files import save_figure
from propmeta_edit.metatrain.run import Progress

SMOOTHED = 50  # tasks in a running mean


def draw_learning_curve(progress: Progress, path: Path) -> None:
    """Related and target loss against tasks, running means, and validation where there is any (PNG)."""
    import pandas as pd
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    losses = pd.DataFrame([vars(entry) for entry in progress.losses], columns=["task_id", "target_loss", "related_loss"])
    numbers = range(1, len(losses) + 1)
    for column, style in (("related_loss", "-"), ("target_loss", ":")):
        mean = losses[column].astype(float).rolling(SMOOTHED, min_periods=1).mean()
        axes.plot(numbers, mean, style, color="black", label=column.replace("_", " "))
    axes.set(xlabel="tasks", ylabel=f"nats a token, mean of {SMOOTHED} tasks", ylim=(0, None))
    if progress.validation:
        table = pd.DataFrame(progress.validation).set_index("num_tasks")
        right = axes.twinx()
        for name, marker in zip(table.columns, itertools.cycle("osD^vP"), strict=False):
            right.plot(table.index, 100 * table[name], marker=marker, linestyle="--", label=name)
        right.set(ylabel="two-hop accuracy after an edit, %", ylim=(min(0.0, 100 * table.min(axis=None)), 100))
        axes.legend(handles=[*axes.lines, *right.lines], fontsize="small", loc="upper right")
    else:
        axes.legend(fontsize="small")
    save_figure(figure, path)
