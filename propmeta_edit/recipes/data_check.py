"""What a data file is, what is in it, and how the model will see one of its cases."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from propmeta_edit.data.cre import load_cre
from propmeta_edit.data.easyedit_files import load_easyedit_file
from propmeta_edit.data.mquake import SUBSET_SIZE, is_two_hop_first_edited, load_mquake, read_json_list
from propmeta_edit.errors import DataError
from propmeta_edit.records import Case
from propmeta_edit.text.prompts import format_cloze, format_in_context, format_question

FORMATS: dict[str, Callable[..., list[Case]]] = {
    "CRE": load_cre,
    "MQuAKE": load_mquake,
    "CaKE": load_mquake,
    "EasyEdit": load_easyedit_file,
}


def find_format(path: Path) -> str:
    """``CRE``, ``MQuAKE``, ``CaKE`` (MQuAKE with augmentation) or ``EasyEdit``.

    Raises:
        DataError: the file cannot be read, or is in none of these formats.
    """
    if path.suffix == ".jsonl":
        return "CRE"
    raws = read_json_list(path)
    if not raws or not isinstance(raws[0], dict):
        raise DataError("the list is empty or not of JSON objects", path)
    if "requested_rewrite" in raws[0]:
        rewrites = [rewrite for raw in raws for rewrite in raw.get("requested_rewrite", [])]
        return "CaKE" if any("learning_prompt" in r or "rephrase_prompt" in r for r in rewrites) else "MQuAKE"
    if {"prompt", "src", "text"} & set(raws[0]):
        return "EasyEdit"
    raise DataError(
        f"none of the known formats: a record has the keys {', '.join(sorted(raws[0]))}; expected CRE (.jsonl with facts and "
        "questions), MQuAKE (requested_rewrite), or EasyEdit (prompt and target_new)",
        path,
    )


def describe_file(path: str | Path) -> str:
    """Several lines for a person: format, counts, oddities, and one case as the model will see it.

    Raises:
        DataError: as ``find_format``, or a broken record (with its line or index).
    """
    path = Path(path)
    kind = find_format(path)
    cases = FORMATS[kind](path)
    lines = [f"{path.name}: {kind}, {len(cases)} cases"]
    for tag in ("edits", "hops", "entity_type", "probe"):
        counts = Counter(case.tags[tag] for case in cases if tag in case.tags)
        if counts:
            lines.append(f"by {tag:<12}" + ", ".join(f"{value}: {count}" for value, count in sorted(counts.items())))
    relations = {case.tags["relation"] for case in cases if "relation" in case.tags}
    if relations:
        lines.append(f"relations     {len(relations)}")
    if kind in ("MQuAKE", "CaKE"):
        subset = sum(is_two_hop_first_edited(raw) for raw in read_json_list(path) if "new_triples" in raw.get("orig", {}))
        lines.append(
            f"subset        {subset} cases with two hops of which only the first is edited (the paper's had {SUBSET_SIZE})"
        )
    lines += _find_oddities(cases)
    if cases:
        lines += ["", "the first case:", *_show(cases[0])]
    return "\n".join(lines)


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
    return lines + ([f"  augmented {augmented} texts for CaKE"] if augmented else [])
