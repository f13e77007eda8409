"""How many tokens of text are enough for the second moments of MEMIT and AlphaEdit: a table and a picture.

python benchmarks/run_convergence.py --model smollm2-135m --layers 3,5,7 --output results/convergence

Moments of more and more texts are compared with those of as many texts as the largest number, none of them among the others: by
the relative error of C itself, of the update that MEMIT would make with it, and by the overlap of AlphaEdit's null spaces.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from propmeta_edit.baselines.null_space import compute_projection
from propmeta_edit.baselines.second_moments import SecondMoments, collect_second_moments
from propmeta_edit.cli import run_or_exit
from propmeta_edit.data.corpora import read_texts
from propmeta_edit.evaluation.tables import keep_settings
from propmeta_edit.files import save_figure, write_text_atomically
from propmeta_edit.models.artefacts import resolve_model_folder
from propmeta_edit.models.devices import resolve_device, resolve_dtype
from propmeta_edit.models.loading import load_model
from propmeta_edit.recipes.comparison import collect_versions
from propmeta_edit.recipes.statistics import SAMPLED, sample_corpus

NUM_KEYS = 8  # of an imagined edit of several facts
COLUMNS = {
    "moment": "relative error of C",
    "update": "relative error of MEMIT's update",
    "null_space": "part of AlphaEdit's null space that is another",
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", default="5", help="comma-separated (default %(default)s)")
    parser.add_argument("--corpus", default=SAMPLED, help="sampled, a file, or hub:owner/name (default %(default)s)")
    parser.add_argument(
        "--num-texts", type=int, default=4096, help="the largest number; twice as many are read (default %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=6, help="how often that is halved (default %(default)s)")
    parser.add_argument("--update-weight", type=float, default=15000, help="MEMIT's mom2_update_weight (default %(default)s)")
    parser.add_argument("--threshold", type=float, default=2e-2, help="AlphaEdit's nullspace_threshold (default %(default)s)")
    parser.add_argument("--output", default="results/convergence")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def compute_update(moment: torch.Tensor, keys: torch.Tensor, weight: float) -> torch.Tensor:
    """``(λ C + K Kᵀ)⁻¹ K`` [in, n]: MEMIT's update is the residuals times its transpose."""
    system = weight * moment.double() + keys @ keys.T
    return torch.linalg.solve(system, keys)


def compare_moments(
    some: torch.Tensor, reference: torch.Tensor, keys: torch.Tensor, weight: float, threshold: float
) -> dict[str, float]:
    """How far ``some`` [in, in] is from ``reference``, the names as in ``COLUMNS``."""
    update, expected = compute_update(some, keys, weight), compute_update(reference, keys, weight)
    own, other = compute_projection(some, threshold).double(), compute_projection(reference, threshold).double()
    shared = float((own * other).sum() / max(1.0, float(own.trace())))  # tr(P P') / rank P
    return {
        "moment": float((some - reference).norm() / reference.norm()),
        "update": float((update - expected).norm() / expected.norm()),
        "null_space": 1 - shared,
    }


def gather(model: Any, tokenizer: Any, texts: list[str], layers: list[int], counts: list[int]) -> list[SecondMoments]:
    """Moments of the first so many texts, for each of ``counts`` in rising order; every text is read once."""
    found: list[SecondMoments] = []
    total: SecondMoments | None = None
    for start, end in zip([0, *counts], counts, strict=False):
        part = collect_second_moments(model, tokenizer, texts[start:end], layers, max_length=256)
        if total is not None:
            sums = {name: total.sums[name] + part.sums[name] for name in part.sums}
            part = SecondMoments(sums, total.num_tokens + part.num_tokens, total.num_texts + part.num_texts)
        total = part
        found.append(part)
    return found


def run(options: argparse.Namespace) -> None:
    device = resolve_device(options.device)
    model, tokenizer = load_model(resolve_model_folder(options.model), device=device, dtype=resolve_dtype("fast", device))
    layers = [int(layer) for layer in options.layers.split(",")]
    wanted = 2 * options.num_texts
    if options.corpus == SAMPLED:
        texts = sample_corpus(model, tokenizer, wanted, options.seed)
    else:
        texts = read_texts(options.corpus, wanted, options.seed)
    counts = [options.num_texts >> step for step in reversed(range(options.steps + 1))]
    moments = gather(model, tokenizer, texts[: options.num_texts], layers, counts)
    [reference] = gather(model, tokenizer, texts[options.num_texts :], layers, [options.num_texts])
    rows = []
    for layer, module in zip(layers, reference.sums, strict=True):
        width = len(reference.sums[module])
        generator = torch.Generator().manual_seed(options.seed)
        factor = torch.linalg.cholesky(reference.moment(module).double() + 1e-6 * torch.eye(width))
        keys = factor @ torch.randn(width, NUM_KEYS, generator=generator, dtype=torch.double)  # keys as this layer has them
        for some in moments:
            errors = compare_moments(some.moment(module), reference.moment(module), keys, options.update_weight, options.threshold)
            rows.append({"layer": layer, "texts": some.num_texts, "tokens": some.num_tokens, **errors})
    table = pd.DataFrame(rows)
    output = Path(options.output)
    write_text_atomically(output / "convergence.csv", table.to_csv(index=False))
    draw(table, output / "convergence.png")
    asked = {key: value for key, value in vars(options).items() if key != "output"}
    keep_settings({"convergence": {**asked, "device": device, "versions": collect_versions([])}}, output)
    print(table.round(4).to_string(index=False))


def draw(table: pd.DataFrame, path: Path) -> None:
    """Each error against the number of tokens, a line a layer."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, len(COLUMNS))
    for axis, (column, title) in zip(axes, COLUMNS.items(), strict=True):
        for number, (layer, rows) in enumerate(table.groupby("layer")):
            axis.plot(
                rows["tokens"], rows[column], marker="osv^D"[number % 5], color=str(0.15 * (number % 5)), label=f"layer {layer}"
            )
        axis.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        axis.title.set_fontsize(9)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 for what the user can mend."""
    options = parse_arguments(argv)
    return run_or_exit(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
