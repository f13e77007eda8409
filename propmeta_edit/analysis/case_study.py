"""One edit from inside: the lens by layer and position, patches between the edited and the unedited run, parts of the edit.

Everything is about one token: the first telling token of the answer (of the new object, on the fact's own prompt).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from propmeta_edit.analysis.lens import read_states, read_tokens, record_states
from propmeta_edit.analysis.patching import Patch, compute_patched_log_probs
from propmeta_edit.analysis.probes import Probe, content_token, make_fact_probe, make_question_probe
from propmeta_edit.edits.edit import Edit
from propmeta_edit.errors import ConfigError, RequestError
from propmeta_edit.models.layers import get_blocks, resolve_layers, select_parameters
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.records import Case

MODULES = ("attention", "mlp")


def choose_companions(tokenizer: Tokenizer, cases: Sequence[Case]) -> list[tuple[Case, Case]]:
    """Each case that can be studied, with another one of the same entity type (if there are tags) and another new object.

    Left out are cases without exactly one edit and a subject, with a question that words the fact differently, with a new object
    and an answer that begin with the same token, or without a companion.
    """
    usable = [case for case in cases if _is_usable(tokenizer, case)]
    found = []
    for number, case in enumerate(usable):
        own = content_token(tokenizer, case.edits[0].target_new)
        rest = [*usable[number + 1 :], *usable[:number]]
        companions = (
            other
            for other in rest
            if other.tags.get("entity_type") == case.tags.get("entity_type")
            and content_token(tokenizer, other.edits[0].target_new) != own
            and other.edits[0].subject != case.edits[0].subject
        )
        companion = next(companions, None)
        if companion is not None:
            found.append((case, companion))
    return found


def _is_usable(tokenizer: Tokenizer, case: Case) -> bool:
    try:
        probe = make_question_probe(tokenizer, case)
        return probe.target != content_token(tokenizer, case.edits[0].target_new)
    except RequestError:
        return False


def choose_layers(model: LanguageModel, layers: Sequence[int] | str | None, every: int) -> list[int]:
    """After which blocks to patch: the last edited one, then those whose number ``every`` divides, up to the last but one.

    Raises:
        ConfigError: ``every`` below 1.
    """
    if every < 1:
        raise ConfigError(f"every must be 1 or more blocks, got {every}")
    num_layers = len(get_blocks(model))
    edited = max(resolve_layers(layers, num_layers))
    return [edited, *(layer for layer in range(edited + 1, num_layers - 1) if layer % every == 0)]


def study_edit(
    model: LanguageModel, tokenizer: Tokenizer, case: Case, companion: Case, edit: Edit, every: int = 2
) -> dict[str, Any]:
    """Everything that the analysis of one edit needs, as plain values; the model is left as it is.

    Args:
        model: unedited.
        companion: another case; its new object is the lens's control, its subject that of the question about someone else.
        edit: of the case, made on this model.
        every: blocks between two that are patched.

    Returns:
        ``lens``: of the unedited and the edited run, ``log_prob`` and ``rank`` [L + 1, positions, 3] of the new object, the answer
        and the companion's object, at the last token of each group of ``ends``.
        ``question``, ``fact``: see ``study_prompt``; of the question, ``write`` has a number for each block of ``layers``.
        ``elsewhere``: the same answer to the same question about the companion's subject, edited and not, and the states' shift.
    """
    question, fact = make_question_probe(tokenizer, case), make_fact_probe(tokenizer, case)
    elsewhere = make_question_probe(tokenizer, with_subject(case, str(companion.edits[0].subject)))
    tokens = [content_token(tokenizer, name) for name in (case.edits[0].target_new, case.question.answers[0])]
    tokens.append(content_token(tokenizer, companion.edits[0].target_new))
    layers = choose_layers(model, edit.settings.get("layers"), every)
    before = {name: record_states(model, probe.input_ids) for name, probe in (("q", question), ("f", fact), ("e", elsewhere))}
    with edit.applied(model):
        after = {name: record_states(model, probe.input_ids) for name, probe in (("q", question), ("f", fact), ("e", elsewhere))}
    ends = question.ends()
    return {
        "ends": list(ends),
        "layers": layers,
        "lens": {
            name: _read_lens(model, states[:, list(ends.values())], tokens)
            for name, states in (("unedited", before["q"]), ("edited", after["q"]))
        },
        "question": study_prompt(model, question, edit, before["q"], after["q"], layers),
        "fact": study_prompt(model, fact, edit, before["f"], after["f"], layers[:1]),
        "elsewhere": {
            "unedited": _target_log_prob(model, elsewhere, before["e"]),
            "edited": _target_log_prob(model, elsewhere, after["e"]),
            "shift": _shift(elsewhere, before["e"], after["e"], layers[0]),
        },
    }


def study_prompt(
    model: LanguageModel, probe: Probe, edit: Edit, before: torch.Tensor, after: torch.Tensor, layers: Sequence[int]
) -> dict[str, Any]:
    """Log-probabilities (nats) of a prompt's target.

    Args:
        before, after: states of the unedited and the edited run, [L + 1, T, D].
        layers: after which blocks to patch; the first is the edited one.

    Returns:
        ``unedited``, ``edited``; ``write``: the unedited model with the edited run's states at one group of positions, by group a
        number a layer; ``erase``: the edited model with the unedited run's states at one group right after the edited block;
        ``parts``: the attention's or the MLP's share of the edit alone; ``shift``: how far the states after the edited block moved,
        over their norm, by group.
    """
    groups = {name: positions for name, positions in probe.groups.items() if positions}
    places = [(name, layer) for name in groups for layer in layers]
    patches = [Patch(layer, groups[name]) for name, layer in places]
    written = compute_patched_log_probs(model, probe.input_ids, after, patches)[:, probe.target]
    write: dict[str, list[float]] = {name: [] for name in groups}
    for (name, _), value in zip(places, written.tolist(), strict=True):
        write[name].append(round(value, 4))
    with edit.applied(model):
        back = [Patch(layers[0], positions) for positions in groups.values()]
        erased = compute_patched_log_probs(model, probe.input_ids, before, back)[:, probe.target]
    parts = {}
    for modules in MODULES:
        names = set(select_parameters(model, edit.settings.get("layers"), modules)) & set(edit.weights)
        if names:
            with edit.only(names).applied(model):
                parts[modules] = _target_log_prob(model, probe, record_states(model, probe.input_ids))
    return {
        "unedited": _target_log_prob(model, probe, before),
        "edited": _target_log_prob(model, probe, after),
        "write": write,
        "erase": dict(zip(groups, (round(value, 4) for value in erased.tolist()), strict=True)),
        "parts": parts,
        "shift": _shift(probe, before, after, layers[0]),
    }


def with_subject(case: Case, subject: str) -> Case:
    """The same fact and question about another subject."""
    [edit], own = case.edits, str(case.edits[0].subject)
    moved = replace(edit, prompt=edit.prompt.replace(own, subject, 1), subject=subject)
    return replace(case, edits=(moved,), question=replace(case.question, text=case.question.text.replace(own, subject, 1)))


def make_twin(case: Case, companion: Case) -> Case:
    """A fact of one kind with the case's: its words about the companion's subject, with the companion's object."""
    moved = with_subject(case, str(companion.edits[0].subject))
    return replace(moved, edits=(replace(moved.edits[0], target_new=companion.edits[0].target_new),))


def _read_lens(model: LanguageModel, states: torch.Tensor, tokens: Sequence[int]) -> dict[str, Any]:
    log_probs, ranks = read_tokens(model, states, tokens)
    return {"log_prob": [[[round(v, 4) for v in p] for p in layer] for layer in log_probs.tolist()], "rank": ranks.tolist()}


def _target_log_prob(model: LanguageModel, probe: Probe, states: torch.Tensor) -> float:
    return round(float(read_states(model, states[-1, -1])[probe.target]), 4)


def _shift(probe: Probe, before: torch.Tensor, after: torch.Tensor, layer: int) -> dict[str, float]:
    moved = (after[layer + 1] - before[layer + 1]).norm(dim=-1) / before[layer + 1].norm(dim=-1)
    return {name: round(float(moved[list(positions)].mean()), 5) for name, positions in probe.groups.items() if positions}
