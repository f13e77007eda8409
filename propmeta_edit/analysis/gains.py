"""Which cases one method gains and loses against another, from the rows of a comparison."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from propmeta_edit.errors import DataError
from propmeta_edit.evaluation.rows import Row, select_rows
from propmeta_edit.evaluation.scoring import contains_answer
from propmeta_edit.evaluation.statistics import adjust_holm, compare_paired
from propmeta_edit.finetune.losses import compute_answer_loss
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.text.encoding import TextEncoder, collate
from propmeta_edit.text.prompts import format_question

KINDS = ("right", "the new object", "as before", "something else")
THIRDS = ("low", "middle", "high")
HALVES = ("below its relation's median", "above its relation's median")


@dataclass(frozen=True)
class CaseResult:
    """One case under two methods.

    Attributes:
        own, reference: the two methods' rows.
        prior_strength: how sure the unedited model was of what it said, 0 to 1; NaN if it said nothing.
        own_kind, reference_kind: one of ``KINDS``.
    """

    own: Row
    reference: Row
    prior_strength: float
    own_kind: str
    reference_kind: str


def collect_results(
    rows: Sequence[Row], dataset: str, method: str, reference: str, unedited: str, strengths: Mapping[str, float]
) -> list[CaseResult]:
    """The cases of a data set that all three methods have, in the order of ``method``'s rows.

    Args:
        strengths: prior strength by case.

    Raises:
        DataError: there is no such case.
    """
    by_case = [{row.case_id: row for row in select_rows(rows, name, dataset)} for name in (method, reference, unedited)]
    shared = [case_id for case_id in by_case[0] if all(case_id in own for own in by_case)]
    if not shared:
        known = sorted({f"{row.method} on {row.dataset}" for row in rows})
        raise DataError(
            f"no case of {dataset} has rows of {method}, {reference} and {unedited}; there are rows of {', '.join(known)}; run "
            "these methods on the same cases first"
        )
    results = []
    for case_id in shared:
        own, other, before = (rows_of[case_id] for rows_of in by_case)
        kinds = classify_answer(own, before), classify_answer(other, before)
        results.append(CaseResult(own, other, strengths.get(case_id, math.nan), *kinds))
    return results


def classify_answer(row: Row, unedited: Row) -> str:
    """One of ``KINDS``: right; wrong and naming the new object (tag ``entity_name``) instead of what follows from it; wrong and
    what the unedited model says; wrong otherwise."""
    if row.correct:
        return "right"
    new_object = row.tags.get("entity_name", "").removeprefix("the ")
    if new_object and contains_answer(row.generated, [new_object]):
        return "the new object"
    return "as before" if _answer_of(row) == _answer_of(unedited) else "something else"


def _answer_of(row: Row) -> str:
    """What was said, up to the end of the line."""
    return row.generated.strip().split("\n")[0].strip().rstrip(".").lower()


def compare_by_group(results: Sequence[CaseResult], group_of: Callable[[CaseResult], str | None]) -> list[dict[str, Any]]:
    """A paired comparison in each group of cases, the largest group first.

    Args:
        group_of: None leaves a case out.

    Returns:
        One entry a group: ``group``, the fields of ``PairedComparison``, both accuracies as shares (``own``, ``reference``), and
        ``p_holm``, the p-value adjusted for the number of groups.
    """
    groups: dict[str, list[CaseResult]] = {}
    for result in results:
        group = group_of(result)
        if group is not None:
            groups.setdefault(group, []).append(result)
    entries = []
    for group, members in sorted(groups.items(), key=lambda item: -len(item[1])):
        own, reference = [m.own.correct for m in members], [m.reference.correct for m in members]
        shares = {"own": float(np.mean(own)), "reference": float(np.mean(reference))}
        entries.append({"group": group, **vars(compare_paired(own, reference)), **shares})
    adjusted = adjust_holm([entry["p_value"] for entry in entries])
    return [{**entry, "p_holm": p} for entry, p in zip(entries, adjusted, strict=True)]


def cut_into_thirds(results: Sequence[CaseResult]) -> dict[str, str]:
    """One of ``THIRDS`` by case, of the cases by prior strength; what has none is left out."""
    known = {r.own.case_id: r.prior_strength for r in results if not math.isnan(r.prior_strength)}
    if not known:
        return {}
    low, high = np.quantile(list(known.values()), [1 / 3, 2 / 3])
    return {case: THIRDS[int(value > low) + int(value > high)] for case, value in known.items()}


def cut_at_median_of_relation(results: Sequence[CaseResult]) -> dict[str, str]:
    """One of ``HALVES`` by case: its prior strength against the median of its relation, so that relations count equally in both.

    Left out are cases without a strength or a relation, and those at the median itself.
    """
    by_relation: dict[str, list[CaseResult]] = {}
    for result in results:
        if "relation" in result.own.tags and not math.isnan(result.prior_strength):
            by_relation.setdefault(result.own.tags["relation"], []).append(result)
    halves = {}
    for members in by_relation.values():
        median = float(np.median([member.prior_strength for member in members]))
        for member in members:
            if member.prior_strength != median:
                halves[member.own.case_id] = HALVES[int(member.prior_strength > median)]
    return halves


def compute_prior_strengths(
    model: LanguageModel, tokenizer: Tokenizer, unedited: Sequence[Row], batch_size: int = 16
) -> list[float]:
    """How sure the unedited model was of what it said: the geometric mean of its answer tokens' probabilities, 0 to 1.

    Args:
        model: the one that gave the rows.
        unedited: its rows; one that says nothing has strength NaN.
    """
    strengths, encoder = [math.nan] * len(unedited), TextEncoder(tokenizer, model.config)
    speaking = [number for number, row in enumerate(unedited) if _answer_of(row)]
    for start in range(0, len(speaking), batch_size):
        some = speaking[start : start + batch_size]
        said = [(format_question(unedited[n].question), unedited[n].generated.strip().split("\n")[0]) for n in some]
        batch = collate([encoder.encode_answer(*pair) for pair in said]).to(model.device)
        with torch.no_grad():
            losses = compute_answer_loss(model, batch, num_edits=len(some))
        for number, loss in zip(some, losses.tolist(), strict=True):
            strengths[number] = math.exp(-loss)
    return strengths
