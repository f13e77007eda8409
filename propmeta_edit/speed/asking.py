"""Seconds a case that is asked: our greedy loop against transformers' ``generate``, called as often as a case used to need it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from propmeta_edit.evaluation.asking import Examiner, prompts_of, prompts_to_compare
from propmeta_edit.models.devices import wait_for
from propmeta_edit.models.generation import MAX_NEW_TOKENS
from propmeta_edit.models.loading import load_model
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.recipes.data_sets import load_dataset
from propmeta_edit.records import Case
from propmeta_edit.speed import parts
from propmeta_edit.text.encoding import padded_on

OURS, GENERATE = "one loop", "generate"


def compare(name: str, device: str, dtype: str, data: str, number: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Two rows: the same cases, unedited, asked one after another either way; ours goes on to the natural stop besides."""
    model, tokenizer = load_model(name, device=device, dtype=dtype)
    cases = load_dataset(data, seed=0).cases[:number]
    sides = {GENERATE: partial(time_generate, model, tokenizer, cases), OURS: partial(time_examiner, model, tokenizer, cases)}
    times = parts.measure(sides, repeats)
    for side, timing in times.items():
        yield {
            "model": name,
            "dtype": dtype,
            "side": side,
            "cases": len(cases),
            "seconds a case": timing.usual,
            "times generate": parts.ratio(times[GENERATE].usual, timing.usual),
        }


def time_examiner(model: LanguageModel, tokenizer: Tokenizer, cases: Sequence[Case]) -> float:
    """Seconds a case: what the unedited model says is asked for many cases at once, everything else in one call a case."""
    examiner = Examiner(model, tokenizer)
    examiner.expect(cases)
    started = time.perf_counter()
    for case in cases:
        examiner.ask_unedited([case])
        examiner.ask([case])
    wait_for(model.device)
    return (time.perf_counter() - started) / len(cases)


def time_generate(model: LanguageModel, tokenizer: Tokenizer, cases: Sequence[Case]) -> float:
    """Seconds a case: one call before the edit and one after it, each of ten tokens."""
    started = time.perf_counter()
    for case in cases:
        for prompts in (prompts_to_compare(case), prompts_of(case)):
            _generate(model, tokenizer, list(prompts.values()))
    wait_for(model.device)
    return (time.perf_counter() - started) / len(cases)


def _generate(model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str]) -> None:
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=model.generation_config.eos_token_id,
    )
    with padded_on(tokenizer, "left"), torch.no_grad():
        inputs = tokenizer(list(prompts), return_tensors="pt", padding=True)
        ids, mask = (inputs[key].to(model.device) for key in ("input_ids", "attention_mask"))
        tokenizer.batch_decode(model.generate(input_ids=ids, attention_mask=mask, generation_config=settings))


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ratio of the last row's model."""
    last = rows[-1]
    return {"model": last["model"], "one_loop_vs_generate": last["times generate"] if last["side"] == OURS else None}
