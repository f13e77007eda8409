"""Teaching a model the single hops that data files rest on, so that a two-hop test measures propagation and not ignorance.

The texts, the LoRA and the loop are those that the bundled base was taught with (``finetune.single_hop``); only the facts come from
files. No multi-hop question and no edited fact is seen (``data.single_hops``).
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from propmeta_edit.data.single_hops import Facts, SingleHops, choose_facts, read_cre_single_hops, read_mquake_single_hops
from propmeta_edit.errors import ConfigError, DataError, ModelError
from propmeta_edit.evaluation.runner import batches_of
from propmeta_edit.evaluation.scoring import contains_answer, contains_answer_at_word_boundary
from propmeta_edit.evaluation.statistics import wilson_interval
from propmeta_edit.evaluation.tables import markdown_table
from propmeta_edit.files import sha256_of_file, sha256_of_json, shortest_names, write_json_atomically
from propmeta_edit.finetune.single_hop import SingleHopSettings, train_single_hop_adapter
from propmeta_edit.models.artefacts import build_whole, resolve_model_folder
from propmeta_edit.models.devices import resolve_device
from propmeta_edit.models.generation import generate_greedily
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.models.loading import load_model, model_sha256, save_model
from propmeta_edit.options import require_at_least, require_positive
from propmeta_edit.progress import progress_bar
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.recipes.bundled import teach_questions
from propmeta_edit.recipes.data_check import find_format
from propmeta_edit.recipes.meta_training import training_folder
from propmeta_edit.records import Question
from propmeta_edit.store import require_made_from
from propmeta_edit.text.prompts import format_question

CARD, LORA = "teaching.json", "lora"  # in the folder of a taught model: what it was taught, and that alone, for its base
ANSWERED_BEFORE = "before.json"  # beside the state of a teaching: a resumed one need not ask again
READERS: dict[str, Callable[[str | Path], SingleHops]] = {
    "CRE": read_cre_single_hops,
    "MQuAKE": read_mquake_single_hops,
    "CaKE": read_mquake_single_hops,
}
SINGLE_HOP, OLD_MULTI_HOP = "single hop", "old multi-hop"
ASK_AT_ONCE = 32
TIMED_STEPS = 3


@dataclass(frozen=True)
class TeachingSettings(SingleHopSettings):
    """How facts are taught: AdamW with warm-up and a linear decay to zero on a LoRA, which is then merged into the model.

    Real facts are more varied than those of the offline world: a larger LoRA and more epochs than the bundled base had.

    Args:
        learning_rate: of AdamW, after the warm-up.
        num_epochs: how often each question is seen.
        batch_size: questions a step.
        rank: of the LoRA on every attention and MLP projection; its scale is 1.
        warmup_steps: until the learning rate is reached.
        max_grad_norm: gradients are clipped to this norm.
        seed: of the LoRA's first values, of the questions' order, and of those that are asked.

    Raises:
        ConfigError: a number that nothing can be learnt with.
    """

    num_epochs: int = 5
    rank: int = 32

    def __post_init__(self) -> None:
        counts = ("num_epochs", "batch_size", "rank", "warmup_steps")
        require_at_least(1, **{name: getattr(self, name) for name in counts})
        require_positive(learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)


@dataclass(frozen=True)
class Asked:
    """Questions that are asked before and after.

    Args:
        source: the name of the file they are from.
        what: ``single hop`` (taught) or ``old multi-hop`` (not taught).
    """

    source: str
    what: str
    questions: Sequence[Question]


@dataclass(frozen=True)
class Score:
    """How many of ``n`` questions were answered: by CaKE's rule, and at a word boundary."""

    n: int
    correct: int
    at_word_boundary: int


@dataclass(frozen=True)
class Lesson:
    """What is taught and asked, all files read.

    Args:
        sources: for each file its name, format, SHA-256 and counts, as ``teaching.json`` has them.
        facts: the questions to teach.
        asked: the questions to ask before and after.
    """

    sources: Sequence[Mapping[str, Any]]
    facts: Facts
    asked: Sequence[Asked]


def read_lesson(files: Sequence[str], num_questions: int, num_multi_hop: int, seed: int) -> Lesson:
    """Read every file, and choose what is taught and what is asked.

    Args:
        files: in CRE's or MQuAKE's format.
        num_questions: at most so many single hops of each file are asked.
        num_multi_hop: and at most so many of an MQuAKE file's old multi-hop questions.
        seed: draws the questions that are asked.

    Raises:
        ConfigError: a file named twice, or a number of questions below 1.
        DataError: a file that cannot be read, in another format, or without any single hop to teach.
    """
    require_at_least(1, questions_per_source=num_questions, multi_hop_questions=num_multi_hop)
    paths, places = [Path(file) for file in files], [Path(file).resolve() for file in files]
    twice = [file for file, place in zip(files, places, strict=True) if places.count(place) > 1]
    if twice:
        raise ConfigError(f"--data names {twice[0]} twice; name each file once")
    kinds = [_require_readable(path) for path in paths]
    found = [READERS[kind](path) for kind, path in zip(kinds, paths, strict=True)]
    facts, names = choose_facts(found), shortest_names(places)
    sources, asked = [], []
    for name, kind, file, own, left_out in zip(names, kinds, found, facts.by_file, facts.left_out, strict=True):
        if not own:
            raise DataError(f"no single hop to teach is in it (left out: {left_out or 'nothing'}); leave it out", file.path)
        sources.append(
            {"file": name, "format": kind, "sha256": sha256_of_file(file.path), "questions": len(own), "left_out": left_out}
        )
        asked.append(Asked(name, SINGLE_HOP, _sample(own, num_questions, seed)))
        if file.old_multi_hop:
            asked.append(Asked(name, OLD_MULTI_HOP, _sample(file.old_multi_hop, num_multi_hop, seed)))
    return Lesson(sources, facts, asked)


def _require_readable(path: Path) -> str:
    """The file's format, one of those that have single hops."""
    kind = find_format(path)
    if kind not in READERS:
        raise DataError(f"its format is {kind}, which has no single hops; files of {', '.join(READERS)} can be taught", path)
    return kind


def _sample(questions: Sequence[Question], limit: int, seed: int) -> list[Question]:
    """At most ``limit`` of them: the first of a seeded shuffle."""
    return random.Random(seed).sample(list(questions), len(questions))[:limit]


def teach_to_folder(
    model_name: str, lesson: Lesson, output: Path, settings: TeachingSettings, device: str = "auto"
) -> dict[str, Any]:
    """Teach a model and write it as an ordinary model folder in fp32, whole or not at all; a teaching that was stopped continues.

    While it goes on, its state is in ``<output>.training``.

    Args:
        model_name: a folder, a bundled name, or a hub id.
        output: the new folder; one that the same teaching finished is left as it is.

    Returns:
        What ``teaching.json`` in the folder says.

    Raises:
        ModelError: an unknown model, or ``output`` holds something else.
        OriginError: ``output`` or the state beside it was made from something else.
    """
    device = resolve_device(device)
    _require_new_or_taught(output)
    base_folder = resolve_model_folder(model_name)
    made_from = describe_origin(base_folder, lesson, settings)
    states = training_folder(output)
    if output.exists():
        before = _read_json(output / CARD).get("made_from", {})
        _require_same(made_from, before, output, "holds a taught model", "choose another --output, or remove it")
    else:
        build_whole(output, partial(teach_into, model_name, lesson, settings, states=states, device=device))
    shutil.rmtree(states, ignore_errors=True)  # also one that a process left which was killed after it had named the output
    return _read_json(output / CARD)


def teach_into(
    model_name: str, lesson: Lesson, settings: TeachingSettings, folder: Path, states: Path, device: str = "auto"
) -> dict[str, Any]:
    """The same in an empty folder, which whoever calls it names when it is whole; ``states`` keeps what a stopped one goes on from.

    Raises:
        ModelError: an unknown model.
        OriginError: ``states`` is of another teaching.
    """
    base_folder = resolve_model_folder(model_name)
    made_from, device = describe_origin(base_folder, lesson, settings), resolve_device(device)
    _claim(states, made_from)
    about = {"base_model": model_name, "made_from": made_from, "questions": len(lesson.facts.questions), "files": lesson.sources}
    _teach(base_folder, lesson, settings, device, states, about, folder)
    return _read_json(folder / CARD)


def describe_origin(base_folder: str, lesson: Lesson, settings: TeachingSettings) -> dict[str, Any]:
    """Everything that decides what a teaching gives, hashed."""
    return {
        "base_sha256": model_sha256(base_folder),
        "files_sha256": [source["sha256"] for source in lesson.sources],
        "questions_sha256": sha256_of_json([[q.text, *q.answers] for q in lesson.facts.questions]),
        "asked_sha256": sha256_of_json([[asked.what, [q.text for q in asked.questions]] for asked in lesson.asked]),
        "settings": asdict(settings),
    }


def _require_new_or_taught(output: Path) -> None:
    if output.exists() and not (output / CARD).is_file():
        raise ModelError(f"{output} exists, and has no {CARD}; choose another --output, or remove it")


def _claim(states: Path, made_from: Mapping[str, Any]) -> None:
    """Say in the folder of the state what the teaching is made from, or refuse that of another."""
    path = states / "made_from.json"
    if path.is_file():
        remedy = "continue it with those, choose another --output, or remove that folder"
        _require_same(made_from, _read_json(path), states, "holds a teaching", remedy)
    write_json_atomically(path, made_from)


def _require_same(now: Mapping[str, Any], before: Mapping[str, Any], place: Path, what: str, remedy: str) -> None:
    """``require_made_from`` with each setting by its own name, so that the one that differs is named alone."""
    flat_now, flat_before = ({**made_from, **made_from.get("settings", {})} for made_from in (now, before))
    del flat_now["settings"]
    require_made_from(flat_now, flat_before, place, what, remedy)


def _teach(
    base_folder: str,
    lesson: Lesson,
    settings: TeachingSettings,
    device: str,
    states: Path,
    about: Mapping[str, Any],
    folder: Path,
) -> None:
    """Ask, teach, ask again, and write everything into an empty folder."""
    load = partial(load_model, base_folder, layers=[])
    model, tokenizer = load(device=device)
    before = _answer_once(model, tokenizer, lesson.asked, states / ANSWERED_BEFORE)
    started = time.perf_counter()
    # Not beside the model's own files: transformers would put a LoRA that it finds there into the model once more.
    model, tokenizer = teach_questions(model, tokenizer, load, lesson.facts.questions, settings, folder / LORA, states)
    seconds = time.perf_counter() - started
    save_model(model, tokenizer, folder, select_parameters(model, "all"))
    after = answer(model.to(device), tokenizer, lesson.asked, "asking after")
    accuracies = [
        {"source": asked.source, "what": asked.what, "n": first.n, "before": _as_json(first), "after": _as_json(second)}
        for asked, first, second in zip(lesson.asked, before, after, strict=True)
    ]
    write_json_atomically(
        folder / CARD,
        {**about, "seconds": round(seconds, 1), "accuracies": accuracies, "model_sha256": model_sha256(folder)},
    )


def _answer_once(model: LanguageModel, tokenizer: Tokenizer, asked: Sequence[Asked], path: Path) -> list[Score]:
    """The scores in ``path``, which are asked for and written there first if need be."""
    if not path.is_file():
        write_json_atomically(path, {"scores": [asdict(score) for score in answer(model, tokenizer, asked, "asking before")]})
    return [Score(**score) for score in _read_json(path)["scores"]]


def answer(model: LanguageModel, tokenizer: Tokenizer, asked: Sequence[Asked], doing: str) -> list[Score]:
    """How many questions of each group are answered within ten greedy tokens.

    Args:
        doing: what the progress bar calls it.
    """
    scores = []
    with progress_bar(total=sum(len(group.questions) for group in asked), desc=doing, unit="question") as bar:
        for group in asked:
            correct = at_boundary = 0
            for some in batches_of(group.questions, ASK_AT_ONCE):
                texts = generate_greedily(model, tokenizer, [format_question(q.text) for q in some], batch_size=ASK_AT_ONCE)
                correct += sum(contains_answer(text, q.answers) for text, q in zip(texts, some, strict=True))
                at_boundary += sum(contains_answer_at_word_boundary(t, q.answers) for t, q in zip(texts, some, strict=True))
                bar.update(len(some))
            scores.append(Score(len(group.questions), correct, at_boundary))
    return scores


def _as_json(score: Score) -> dict[str, Any]:
    """Shares in 0 to 1 with Wilson's 95 % intervals."""
    counts = {"accuracy": score.correct, "at_word_boundary": score.at_word_boundary}
    shares = {name: count / score.n for name, count in counts.items()}
    return {**shares, **{f"{name}_interval": list(wilson_interval(count, score.n)) for name, count in counts.items()}}


def describe_taught(card: Mapping[str, Any]) -> str:
    """The accuracies of ``teaching.json`` as a Markdown table, in percent with 95 % intervals."""
    rows = [
        [
            entry["source"],
            entry["what"] + (" (not taught)" if entry["what"] == OLD_MULTI_HOP else ""),
            str(entry["n"]),
            *(_percent(entry[when], rule) for rule in ("accuracy", "at_word_boundary") for when in ("before", "after")),
        ]
        for entry in card["accuracies"]
    ]
    return markdown_table(
        ["file", "questions", "n", "before, %", "after, %", "before, at word boundary, %", "after, at word boundary, %"], rows
    )


def _percent(shares: Mapping[str, Any], name: str) -> str:
    low, high = shares[f"{name}_interval"]
    return f"{100 * shares[name]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def describe_lesson(lesson: Lesson, settings: TeachingSettings) -> str:
    """What is taught, and in how many steps: some lines for a person."""
    lines = []
    for source in lesson.sources:
        left_out = ", ".join(f"{count} {reason}" for reason, count in source["left_out"].items()) or "none"
        lines.append(f"{source['file']}: {source['format']}, {source['questions']} questions; left out: {left_out}")
    count = len(lesson.facts.questions)
    steps = num_steps(count, settings)
    lines.append(f"{count} different questions, {settings.num_epochs} epochs, {steps} steps of {settings.batch_size}")
    lines.append("asked before and after: " + ", ".join(f"{len(a.questions)} {a.what} of {a.source}" for a in lesson.asked))
    return "\n".join(lines)


def num_steps(num_questions: int, settings: SingleHopSettings) -> int:
    """Optimiser steps of a teaching."""
    return settings.num_epochs * math.ceil(num_questions / settings.batch_size)


def estimate_seconds(model_name: str, lesson: Lesson, settings: TeachingSettings, device: str = "auto") -> float:
    """What a whole teaching would take here, from one batch asked and a few timed steps whose results are thrown away."""
    model, tokenizer = load_model(model_name, device=resolve_device(device), layers=[])
    asked = [question for group in lesson.asked for question in group.questions]
    some = asked[:ASK_AT_ONCE]
    started = time.perf_counter()
    answer(model, tokenizer, [Asked("", SINGLE_HOP, some)], "timing answers")
    a_question = (time.perf_counter() - started) / len(some)
    brief = replace(settings, num_epochs=1)
    questions = _sample(lesson.facts.questions, (1 + TIMED_STEPS) * settings.batch_size, settings.seed)
    taken = []
    # Setting up and the first step, which warms everything up, are in both times.
    for number in (settings.batch_size, len(questions)):
        started = time.perf_counter()
        model = train_single_hop_adapter(model, tokenizer, questions[:number], brief).unload()
        taken.append(time.perf_counter() - started)
    more_steps = num_steps(len(questions), settings) // settings.num_epochs - 1
    a_step = (taken[1] - taken[0]) / more_steps if more_steps else taken[1]
    return max(0.0, a_step) * num_steps(len(lesson.facts.questions), settings) + 2 * a_question * len(asked)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is damaged ({error}); remove {path.parent}, or choose another --output") from error
    return found
