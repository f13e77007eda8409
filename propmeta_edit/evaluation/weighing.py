"""Which of two objects is likelier after a prompt: what ROME's measures by probability (ES, PS, NS) are counted from."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from propmeta_edit.finetune.losses import compute_token_losses, reduce_answer_tokens
from propmeta_edit.models.packed import packed_products
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.records import WEIGHED, Case, Probe
from propmeta_edit.text.encoding import TextEncoder, collate
from propmeta_edit.text.prompts import format_in_context

NEW, TRUE = 0, 1  # places of the two numbers of a probe


def weighed_probes(case: Case) -> list[Probe]:
    """Those of a case's probes whose objects are weighed, in their order."""
    return [probe for probe in case.probes if probe.kind in WEIGHED]


def texts_to_weigh(case: Case, in_context: bool = False) -> list[tuple[str, str]]:
    """(prompt, object) of both objects of each weighed probe, the new one first; with ``in_context`` after the case's facts."""
    texts = []
    for probe in weighed_probes(case):
        prompt = probe.question.text
        shown = format_in_context(case.edits, prompt) if in_context else prompt
        texts += [(shown, probe.question.answers[0]), (shown, probe.against[0])]
    return texts


def weigh(
    model: LanguageModel, tokenizer: Tokenizer, cases: Sequence[Case], in_context: bool = False
) -> list[list[tuple[float, float]]]:
    """How unlikely both objects of every weighed probe are, from one pass over all texts of all cases.

    Those of a case are side by side and equally many a case, as edits with weights of their own need them.

    Returns:
        For each case, for each of its weighed probes ``-(1/m) Σ_j log p(o_j | prompt, o_<j)`` over the m tokens of the new object,
        and the same of the one before, in nats a token, as ROME's code has it.

    Raises:
        RequestError: a text that the model has no positions for.
    """
    wanted = [texts_to_weigh(case, in_context) for case in cases]
    per_case = max(len(texts) for texts in wanted)
    if not per_case:
        return [[] for _ in cases]
    # What fills a case up is its first text again; a case without any borrows one.
    spare = next(texts[0] for texts in wanted if texts)
    rows = [row for texts in wanted for row in [*texts, *[texts[0] if texts else spare] * (per_case - len(texts))]]
    nats = weigh_answers(model, tokenizer, rows).view(len(cases), per_case).tolist()
    return [
        list(zip(found[: len(texts) : 2], found[1 : len(texts) : 2], strict=True))
        for found, texts in zip(nats, wanted, strict=True)
    ]


def weigh_answers(model: LanguageModel, tokenizer: Tokenizer, rows: Sequence[tuple[str, str]]) -> torch.Tensor:
    """``-(1/m) Σ_j log p(o_j | prompt, o_<j)`` of each (prompt, answer), in nats a token: [rows], from one pass.

    Raises:
        RequestError: a text that the model has no positions for.
    """
    encoder = TextEncoder(tokenizer, model.config)
    batch = collate([encoder.encode_answer(prompt, answer) for prompt, answer in rows]).to(model.device)
    with torch.no_grad(), packed_products(model, ()):
        return reduce_answer_tokens(compute_token_losses(model, batch), batch)
