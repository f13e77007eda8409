"""How many tokens of text are enough for the second moments of MEMIT and AlphaEdit."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure

from propmeta_edit.baselines.null_space import compute_projection
from propmeta_edit.baselines.second_moments import SecondMoments, collect_second_moments
from propmeta_edit.data.corpora import read_texts
from propmeta_edit.evaluation.tables import keep_settings
from propmeta_edit.files import save_figure, write_text_atomically
from propmeta_edit.models.artefacts import resolve_model_folder
from propmeta_edit.models.devices import resolve_device, resolve_dtype
from propmeta_edit.models.loading import load_model
from propmeta_edit.options import WholeNumbers, require_at_least
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.recipes.statistics import SAMPLED, sample_corpus
from propmeta_edit.studies.engine import collect_versions

LAYERS = WholeNumbers((5,))
NUM_KEYS = 8  # of an imagined edit of several facts
COLUMNS = {
    "moment": "relative error of C",
    "update": "relative error of MEMIT's update",
    "null_space": "part of AlphaEdit's null space that is another",
}


def compute_update(moment: torch.Tensor, keys: torch.Tensor, weight: float) -> torch.Tensor:
    """``(λ C + K Kᵀ)⁻¹ K`` [in, n]: MEMIT's update is the residuals times its transpose."""
    system = weight * moment.double() + keys @ keys.T
    update: torch.Tensor = torch.linalg.solve(system, keys)
    return update


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


def gather(
    model: LanguageModel, tokenizer: Tokenizer, texts: list[str], layers: list[int], counts: list[int]
) -> list[SecondMoments]:
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


def convergence(
    model: str = "smollm2-135m",
    layers: WholeNumbers = LAYERS,
    corpus: str = SAMPLED,
    num_texts: int = 4096,
    steps: int = 6,
    update_weight: float = 15000,
    threshold: float = 2e-2,
    output: str = "results/convergence",
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Show how many tokens of text are enough for the second moments of MEMIT and AlphaEdit: a table and a picture.

    Moments of more and more texts are compared with those of as many texts as the largest number, none of them among the others: by
    the relative error of C itself, of the update that MEMIT would make with it, and by the overlap of AlphaEdit's null spaces.

    Args:
        model: a folder, a bundled name, or a hub id.
        layers: 0-based.
        corpus: sampled, a file, or hub:owner/name.
        num_texts: the largest number; twice as many are read.
        steps: how often that is halved.
        update_weight: MEMIT's mom2_update_weight.
        threshold: AlphaEdit's nullspace_threshold.
        output: folder of the results.
        device: auto, cpu, mps, cuda or cuda:N.
        seed: of the sampled texts, their order, and the imagined edits.
    """
    require_at_least(1, num_texts=num_texts)
    require_at_least(0, steps=steps)
    asked = {"model": model, "layers": list(layers), "corpus": corpus, "num_texts": num_texts, "steps": steps}
    device = resolve_device(device)
    asked |= {"update_weight": update_weight, "threshold": threshold, "seed": seed, "device": device}
    loaded = load_model(resolve_model_folder(model), device=device, dtype=resolve_dtype("fast", device))
    texts = sample_corpus(*loaded, 2 * num_texts, seed) if corpus == SAMPLED else read_texts(corpus, 2 * num_texts, seed)
    counts = [num_texts >> step for step in reversed(range(steps + 1))]
    moments = gather(*loaded, texts[:num_texts], list(layers), counts)
    [reference] = gather(*loaded, texts[num_texts:], list(layers), [num_texts])
    rows = []
    for layer, module in zip(layers, reference.sums, strict=True):
        keys = imagine_keys(reference.moment(module), seed)
        for some in moments:
            errors = compare_moments(some.moment(module), reference.moment(module), keys, update_weight, threshold)
            rows.append({"layer": layer, "texts": some.num_texts, "tokens": some.num_tokens, **errors})
    table, folder = pd.DataFrame(rows), Path(output)
    write_text_atomically(folder / "convergence.csv", table.to_csv(index=False))
    draw(table, folder / "convergence.png")
    keep_settings({"convergence": {**asked, "versions": collect_versions([])}}, folder)
    print(table.round(4).to_string(index=False))


def imagine_keys(moment: torch.Tensor, seed: int) -> torch.Tensor:
    """Keys [in, n] as a layer with this second moment has them."""
    width = len(moment)
    factor = torch.linalg.cholesky(moment.double() + 1e-6 * torch.eye(width))
    keys: torch.Tensor = factor @ torch.randn(width, NUM_KEYS, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return keys


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
