"""One edit on its way through a two-hop question: what each layer would say at each token, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from propmeta_edit.analysis.lens import read_tokens, record_states
from propmeta_edit.analysis.probes import content_token, make_question_probe
from propmeta_edit.edits.compute import compute_edit
from propmeta_edit.errors import ConfigError
from propmeta_edit.files import save_figure
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.recipes import edit_facts
from propmeta_edit.records import Case, EditRequest, Question

ANSWER = "Hanoi"  # to the first question of the example
DEEPEST = 3  # powers of ten of a rank that are told apart


@dataclass(frozen=True)
class Trace:
    """What the logit lens says of two tokens, before and after an edit.

    Attributes:
        tokens: T texts, those of the question as it is asked, from the subject on.
        names: the fact's object and the answer.
        ranks: [2 names, 2 (before, after), L + 1, T]: how many tokens are likelier, 0 for the likeliest.
        layers: those that were edited.
    """

    tokens: Sequence[str]
    names: tuple[str, str]
    ranks: torch.Tensor
    layers: Sequence[int]


def take_trace(model: LanguageModel, tokenizer: Tokenizer, case: Case, hparams: Any) -> Trace:
    """Edit, and read every layer's state at every token before and after (``analysis.lens``).

    Raises:
        RequestError: the question does not hold the fact's prompt word for word, or the fact has no subject.
    """
    probe = make_question_probe(tokenizer, case)
    edit = compute_edit(model, tokenizer, list(case.edits), hparams)
    names = (case.edits[0].target_new, case.question.answers[0])
    wanted = [content_token(tokenizer, name) for name in names]
    start = probe.groups["subject"][0]
    before = record_states(model, probe.input_ids)
    with edit.applied(model):
        after = record_states(model, probe.input_ids)
    ranks = torch.stack([read_tokens(model, states[:, start:], wanted)[1] for states in (before, after)])  # [2, L + 1, T, 2]
    layers = [layer for layer in edit.settings["layers"] if isinstance(layer, int)]
    return Trace([tokenizer.decode([token]) for token in probe.input_ids[start:]], names, ranks.permute(3, 0, 1, 2).cpu(), layers)


def draw_trace(trace: Trace) -> Figure:
    """Four panels: the fact's object and the answer, before and after; the darker, the nearer to being said."""
    depth, width = trace.ranks.shape[-2:]
    figure = Figure(figsize=(7.0, 6.4), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for row, name in enumerate(trace.names):
        for column, when in enumerate(("before the edit", "after it")):
            axis = axes[row][column]
            shade = (1 + trace.ranks[row, column]).log10().clamp(max=DEEPEST).numpy()
            image = axis.imshow(shade, cmap="gray", vmin=0, vmax=DEEPEST, aspect="auto", origin="lower", interpolation="nearest")
            for layer in trace.layers:  # what leaves block l is row l + 1
                axis.axhline(layer + 0.5, color="0.5", linestyle="--", linewidth=0.9)
            axis.set_title(f"{2 * row + column + 1}. “{name}”, {when}", fontsize=9)
            axis.tick_params(labelsize=7)
    for axis in axes[:, 0]:
        axis.set_ylabel("after block", fontsize=8)
        axis.set_yticks(range(0, depth, 5), ["in", *range(4, depth - 1, 5)])
    for axis in axes[1]:
        axis.set_xticks(range(width), [token.strip() or "␣" for token in trace.tokens], rotation=90, fontsize=7)
    bar = figure.colorbar(image, ax=axes, shrink=0.5, ticks=range(DEEPEST + 1))
    bar.ax.set_yticklabels(["the likeliest", "10th", "100th", "1000th or less"][: DEEPEST + 1], fontsize=7)
    return figure


def trace(
    prompt: str | None = None,
    target: str | None = None,
    subject: str | None = None,
    question: str | None = None,
    answer: str | None = None,
    model: str | None = None,
    output: str = "trace.png",
    device: str = "auto",
) -> None:
    """Draw an edit on its way through a two-hop question: what each layer would say at each token, before and after.

    Without arguments: an example on the bundled model.

    Args:
        prompt: the fact without its object: "Ann Lee lives in".
        target: the object: "Peru".
        subject: who or what the fact is about, as it stands in the prompt.
        question: one that holds the prompt word for word: "Which currency is used in the country that Ann Lee lives in?".
        answer: what follows from the fact.
        model: a meta-tuned folder or bundled name (default: the bundled one).
        output: the picture, .png, .svg or .pdf.
        device: auto, cpu, mps, cuda or cuda:N.
    """
    path = Path(output)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--output must end in .png, .svg or .pdf, got {output!r}")
    given = (prompt, target, subject, question, answer)
    if any(given) and not all(given):
        raise ConfigError("give the fact, its object, --subject, --question and --answer, or none of them for the example")
    request = EditRequest(str(prompt), str(target), subject) if prompt else edit_facts.EXAMPLE
    asked = Question(question, (str(answer),)) if question else Question(edit_facts.RELATED[0], (ANSWER,))
    hparams = edit_facts.read_hparams(model, None, device)
    loaded, tokenizer = hparams.load_model()
    save_figure(draw_trace(take_trace(loaded, tokenizer, Case("trace", (request,), asked), hparams)), path)
    print(f"{path}: {request.prompt} -> {request.target_new}; {asked.text}")
