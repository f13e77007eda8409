"""General ability: perplexity of held-out text, and the tasks of lm-evaluation-harness where that is installed.

Edits are judged by what follows from them (``measures``); this is about everything else that a model could do before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from propmeta_edit.errors import ConfigError, ModelError, RequestError, record_named
from propmeta_edit.evaluation.runner import batches_of
from propmeta_edit.evaluation.statistics import ratio_interval
from propmeta_edit.finetune.losses import compute_token_losses, reduce_answer_tokens
from propmeta_edit.models.devices import in_double
from propmeta_edit.progress import progress_bar
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.text.encoding import EncodedText, TextEncoder, collate

HARNESS = "lm-eval"  # as pip calls it


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of a token, over all tokens of all texts.

    Attributes:
        value: 1 for a model that is always certain and right, the size of the vocabulary for one that knows nothing.
        low, high: 95 % percentile bootstrap over texts.
        losses: for each text the sum of its tokens' negative log-likelihoods, in nats.
        lengths: how many tokens of each text were predicted: all but the first, which nothing predicts.
    """

    value: float
    low: float
    high: float
    losses: Sequence[float]
    lengths: Sequence[int]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


def compute_perplexity(
    model: LanguageModel, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int = 8, doing: str = "perplexity"
) -> Perplexity:
    """Perplexity of texts, each read from its beginning (Jelinek et al., 1977), without gradients.

    Long texts are not cut into windows: each must fit into the model's positions.

    Args:
        model: run in the mode it is in; ``load_model`` gives it without dropout.
        batch_size: texts at once; their logits are in memory together, in fp32 or wider.
        doing: what the progress bar calls it.

    Raises:
        ConfigError: no text.
        RequestError: a text without a second token, or longer than the model has positions, with its number.
        ModelError: a token that the model has no embedding for, or losses that are not finite.
    """
    if not texts:
        raise ConfigError("perplexity needs at least one text, got none")
    encoder = TextEncoder(tokenizer, model.config)
    encoded = [_encode(encoder, text, f"text {number}") for number, text in enumerate(texts)]
    losses: list[float] = []
    with torch.no_grad(), progress_bar(total=len(encoded), desc=doing, unit="text") as bar:
        for some in batches_of(encoded, batch_size):
            batch = collate(some).to(model.device)
            token_losses = compute_token_losses(model, batch)
            losses += reduce_answer_tokens(in_double(token_losses), batch, "sum").tolist()
            bar.update(len(some))
    if not np.isfinite(losses).all():
        raise ModelError("the model gives losses that are not finite: no perplexity can be computed from its weights")
    lengths = [len(ids) - 1 for ids, _ in encoded]
    value, low, high = _exp_of_mean(np.array(losses), np.array(lengths))
    return Perplexity(value, low, high, losses, lengths)


def _encode(encoder: TextEncoder, text: str, name: str) -> EncodedText:
    """A text whose every token is to be predicted."""
    with record_named(name):
        ids = encoder.encode_prompt(text)
        if len(ids) < 2:
            raise RequestError(f"{text!r} has one token; at least two are needed, for nothing predicts the first")
    return ids, ids


def compare_perplexities(after: Perplexity, before: Perplexity) -> tuple[float, float, float]:
    """How many times as high the first is as the second, with its 95 % interval: (ratio, low, high).

    The texts are the same, so they are resampled together: how hard each of them is drops out.

    Raises:
        ValueError: other texts, or another tokenizer.
    """
    if list(after.lengths) != list(before.lengths):
        raise ValueError("perplexities can be compared on the same texts and tokens alone")
    return _exp_of_mean(np.array(after.losses) - np.array(before.losses), np.array(after.lengths))


def _exp_of_mean(losses: np.ndarray, lengths: np.ndarray) -> tuple[float, float, float]:
    """exp of a sum over texts, [n], divided by that of their tokens, [n]; with its interval."""
    mean, low, high = ratio_interval(losses[:, None], lengths[:, None].astype(float))
    return float(np.exp(mean[0])), float(np.exp(low[0])), float(np.exp(high[0]))


def require_tasks(tasks: Sequence[str], folder: str | None = None) -> None:
    """Refuse tasks that lm-evaluation-harness does not know, before anything is computed; no data is loaded.

    Args:
        folder: of tasks of one's own, YAML files as the harness has them.

    Raises:
        ConfigError: an unknown task, or the harness is not installed.
    """
    known = set(_make_task_manager(folder).all_tasks)
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise ConfigError(
            f"{HARNESS} knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists its own, and --task-folder names a folder "
            "with the YAML files of others"
        )


def run_task(
    model: LanguageModel, tokenizer: Tokenizer, task: str, folder: str | None = None, limit: int | None = None, batch_size: int = 8
) -> dict[str, dict[str, float]]:
    """One task of lm-evaluation-harness (Gao et al., 2021) on a model in memory.

    The hub is asked for nothing but the task's own data, where it is there. The harness seeds Python's, numpy's and torch's
    random generators.

    Args:
        task: a name of the harness, of a single task or a group of them, or of ``folder``.
        folder: as for ``require_tasks``.
        limit: at most so many questions of each task.

    Returns:
        For the task, and for each that it is made of, its numbers as the harness calls them (``acc,none``,
        ``acc_stderr,none``), and ``n``, the questions asked, where the harness tells.

    Raises:
        ConfigError: the harness is not installed, or cannot run the task.
    """
    harness = _import_harness()
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found = harness.simple_evaluate(
            model=wrapped,
            tasks=[task],
            task_manager=_make_task_manager(folder),
            limit=limit,
            log_samples=False,
        )
    except Exception as error:  # a task's YAML, its data and its code can each fail in any way
        raise ConfigError(f"{HARNESS} cannot run {task}: {type(error).__name__}: {error}") from error
    counts = found.get("n-samples", {})
    return {name: _numbers_of(scores, counts.get(name, {})) for name, scores in found["results"].items()}


def _numbers_of(scores: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, float]:
    """The measures among what the harness says of a task; a standard error that it does not know is the text ``N/A``."""
    numbers = {name: float(value) for name, value in scores.items() if "," in name and isinstance(value, int | float)}
    return {**numbers, **({"n": counts["effective"]} if "effective" in counts else {})}


def _import_harness() -> Any:
    try:
        import lm_eval
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tasks need lm-evaluation-harness, which is not installed here ({error}); install it with: "
            f'pip install "{HARNESS}[hf]" (or pip install "propmeta-edit[{HARNESS}]")'
        ) from error
    return lm_eval


def _make_task_manager(folder: str | None) -> Any:
    _import_harness()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


def harness_version() -> str:
    """Which release of the harness is installed.

    Raises:
        ConfigError: none.
    """
    _import_harness()
    return version("lm_eval")
