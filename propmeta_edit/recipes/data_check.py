"""What a data file is, what is in it, and how the model will see one of its cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from propmeta_edit.data import counterfact, cre, easyedit_files, mquake
from propmeta_edit.data.counterfact import load_counterfact
from propmeta_edit.data.cre import CreCounts, count_cre, load_cre
from propmeta_edit.data.easyedit_files import load_easyedit_file
from propmeta_edit.data.fields import Shape, check, find_ignored, object_of, show_keys
from propmeta_edit.data.mquake import SUBSET_SIZE, count_subset, load_mquake
from propmeta_edit.data.reading import read_json
from propmeta_edit.errors import DataError
from propmeta_edit.recipes.sources import find_files, is_source
from propmeta_edit.records import Case
from propmeta_edit.text.prompts import format_cloze, format_in_context, format_question


@dataclass(frozen=True)
class Format:
    """How files of a kind are read, and what their records must be."""

    load: Callable[..., list[Case]]
    shape: Shape


FORMATS = {
    "CRE": Format(load_cre, cre.SHAPE),
    "MQuAKE": Format(load_mquake, mquake.SHAPE),
    "CaKE": Format(load_mquake, mquake.SHAPE),
    "CounterFact": Format(load_counterfact, counterfact.SHAPE),
    "EasyEdit": Format(load_easyedit_file, easyedit_files.SHAPE),
}
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")  # of the files that are looked at in a folder


def find_format(path: Path) -> str:
    """``CRE``, ``MQuAKE``, ``CaKE`` (MQuAKE with augmentation), ``CounterFact`` or ``EasyEdit``, told by the first record's fields.

    Raises:
        DataError: the file cannot be read, or is in none of these formats.
    """
    records = read_json(path)
    for record in records:
        with record.named():
            check(object_of(), record.value)
    first = records[0].value
    if isinstance(first.get("requested_rewrite"), dict):
        return "CounterFact"
    if "requested_rewrite" in first:
        return "CaKE" if any(_is_augmented(record.value.get("requested_rewrite")) for record in records) else "MQuAKE"
    if "questions" in first:
        return "CRE"
    if set(easyedit_files.PROMPTS) & set(first) or easyedit_files.languages_of(first):
        return "EasyEdit"
    raise DataError(
        f"none of the known formats: a record has the keys {show_keys(first)}; expected CRE "
        "(questions, and facts or text), MQuAKE or CounterFact (requested_rewrite), or EasyEdit (prompt and target_new)",
        path,
    )


def _is_augmented(rewrites: Any) -> bool:
    """Whether an edit has CaKE's texts; what is broken in other ways is left to the loader, which names the case."""
    edits = [rewrite for rewrite in rewrites if isinstance(rewrite, dict)] if isinstance(rewrites, list) else []
    return any({"learning_prompt", "rephrase_prompt"} & set(edit) for edit in edits)


def describe_files(path: str | Path) -> tuple[str, int]:
    """``describe_file`` of a file, of every data file in a folder and its folders, or of CRE's files in ``hub:owner/name``.

    Returns:
        The text, one block a file, and how many files of a folder cannot be read; their blocks say why.

    Raises:
        DataError: a single file cannot be read, or a folder or data set of the hub has no data file.
    """
    if not is_source(str(path)):
        return describe_file(path), 0
    # What datasets itself wrote into a folder as JSON describes its data and holds none.
    inside = Path(path).rglob("*") if not (Path(path) / "dataset_dict.json").is_file() else ()
    files = sorted(file for file in inside if file.name.endswith(SUFFIXES) and file.is_file()) or find_files(str(path)).values()
    blocks, num_broken = [], 0
    for file in files:
        try:
            blocks.append(describe_file(file))
        except DataError as error:
            blocks.append(f"{file.name}: cannot be used\n{error}")
            num_broken += 1
    return "\n\n".join(blocks), num_broken


def describe_file(path: str | Path) -> str:
    """Several lines for a person: format, counts, oddities, and one case as the model will see it.

    Of a CRE file every question is counted, since each can become a case.

    Raises:
        DataError: as ``find_format``, or a broken record (with its line or index).
    """
    path = Path(path)
    kind = find_format(path)
    cases = FORMATS[kind].load(path)
    counted, size = cases, f"{len(cases)} cases"
    counts_of_cre = count_cre(path) if kind == "CRE" else None
    if counts_of_cre is not None:
        counted = load_cre(path, question_choice="all")
        size = f"{counts_of_cre.num_records} records, {len(counted)} questions"
    lines = [f"{path.name}: {kind}, {size}"]
    for tag in ("edits", "hops", "entity_type", "probe", "language"):
        counts = Counter(case.tags[tag] for case in counted if tag in case.tags)
        if counts:
            lines.append(f"by {tag:<12}" + ", ".join(f"{value}: {count}" for value, count in sorted(counts.items())))
    relations = {case.tags["relation"] for case in counted if "relation" in case.tags}
    if relations:
        lines.append(f"relations     {len(relations)}")
    if kind in ("MQuAKE", "CaKE"):
        lines.append(
            f"subset        {count_subset(path)} cases with two hops of which only the first is edited "
            f"(the paper's had {SUBSET_SIZE})"
        )
    if counts_of_cre is not None:
        lines += _describe_facts(counts_of_cre)
    lines += _find_ignored(path, kind)
    lines += _find_oddities(counted)
    if cases:
        lines += ["", "the first case:", *_show(cases[0])]
    return "\n".join(lines)


def _describe_facts(counts: CreCounts) -> list[str]:
    """Which way the facts of a CRE file came, and how many questions were left out."""
    ways = {"from the file": counts.from_file, "made from its records' text": counts.from_text}
    lines = ["facts         " + (", ".join(f"{count} {way}" for way, count in ways.items() if count) or "none")]
    if counts.num_unanswered:
        lines.append(f"{counts.num_unanswered:<6} questions left out: their answer is NaN, null or the word nan, which is none")
    return lines


def _find_ignored(path: Path, kind: str) -> list[str]:
    """The fields that nothing here reads, with how many records have each."""
    counts = Counter(name for record in read_json(path) for name in find_ignored(FORMATS[kind].shape, record.value))
    named = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
    return [f"ignored       {named}"] if named else []


def _find_oddities(cases: Sequence[Case]) -> list[str]:
    """What is allowed but worth knowing before hours are spent on it."""
    edits = [edit for case in cases for edit in case.edits]
    answers = [case.question.answers for case in cases]
    found = {
        "edits without a subject (ROME, MEMIT and AlphaEdit need one)": sum(edit.subject is None for edit in edits),
        "edits whose subject does not start the prompt": sum(
            edit.subject is not None and not edit.prompt.startswith(edit.subject) for edit in edits
        ),
        "answers that are numbers": sum(all(text.strip().isdigit() for text in texts) for texts in answers),
        "answers without aliases": sum(len(texts) == 1 for texts in answers),
        "edits or answers with non-ASCII text": sum(not edit.target_new.isascii() for edit in edits)
        + sum(not "".join(texts).isascii() for texts in answers),
        "cases of the same id": len(cases) - len({case.case_id for case in cases}),
    }
    return [f"{count:<6} {what}" for what, count in found.items() if count]


def _show(case: Case) -> list[str]:
    lines = [f"  edit      {edit.prompt!r} -> {' ' + edit.target_new!r}" for edit in case.edits]
    lines.append(f"  question  {format_question(case.question.text)!r}")
    if case.question.cloze is not None:
        lines.append(f"  cloze     {format_cloze(case.question.cloze)!r}")
    lines.append(f"  in context {format_in_context(case.edits, format_question(case.question.text))!r}")
    lines.append(f"  accepted  {', '.join(case.question.answers)}")
    if case.second_hop is not None:
        lines.append(f"  second hop {case.second_hop.text!r}: {', '.join(case.second_hop.answers)}")
    augmented = sum(len(edit.augmentation) for edit in case.edits)
    lines += [f"  augmented {augmented} texts for CaKE"] if augmented else []
    return lines + [f"  or        {prompt!r}" for edit in case.edits for prompt in edit.rephrasings]
