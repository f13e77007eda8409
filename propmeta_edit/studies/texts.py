"""Every text of a study held against the models that will be asked it, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from propmeta_edit.evaluation.asking import check_case, fewest_tokens
from propmeta_edit.evaluation.runner import DataSet, choose_cases
from propmeta_edit.models.artefacts import find_model_folder
from propmeta_edit.models.loading import load_encoder
from propmeta_edit.studies.variants import Bench, Variant


def check_texts(
    variants: Sequence[Variant], datasets: Sequence[DataSet], bench: Bench, limit: int | None, limits: Mapping[str, int]
) -> None:
    """Refuse a case that a variant's model has no positions or no embeddings for.

    Raises:
        RequestError, ModelError: naming the case, its length and the model's limit.
    """
    encoder_of, checked = cache(load_encoder), set()
    for variant in variants:
        model, in_context = bench.model_of(variant), variant.edit == "in-context"
        if find_model_folder(model) is None:
            continue  # a plan, before the model is made; or a name of the hub, which loading it will check
        for data in datasets:
            for case in variant.adapt(choose_cases(data.cases, limits.get(variant.name, limit), bench.seed)):
                key = (model, in_context, data.name, case.case_id, variant.adapt)
                if key not in checked:
                    check_case(encoder_of(model), case, bench.max_new_tokens, in_context)
                    checked.add(key)


def describe_too_long(model: str, datasets: Sequence[DataSet], bench: Bench, limit: int | None) -> list[str]:
    """A line a data set that has answers or objects of more tokens than are generated; none where the model is not here."""
    if find_model_folder(model) is None:
        return []
    encoder, lines = load_encoder(model), []
    for data in datasets:
        cases = choose_cases(data.cases, limit, bench.seed)
        answers = sum(fewest_tokens(encoder, case) > bench.max_new_tokens for case in cases)
        facts = sum(
            any(encoder.count_answer_tokens(edit.target_new) > bench.max_new_tokens for edit in case.edits) for case in cases
        )
        if answers or facts:
            lines.append(
                f"{data.name}: {bench.max_new_tokens} tokens cannot hold the answer of {answers} and the object of {facts} of "
                f"{len(cases)} cases, which so count as wrong; --max-new-tokens allows more, as another protocol"
            )
    return lines
