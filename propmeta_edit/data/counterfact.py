"""CounterFact as ROME's authors distribute it (``counterfact.json``, and MEMIT's ``multi_counterfact.json``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from propmeta_edit.data.fields import BLANK, ID, TEXT, list_of, object_of
from propmeta_edit.data.reading import read_records
from propmeta_edit.errors import DataError
from propmeta_edit.records import EDITED, NEIGHBOUR, PARAPHRASE, REAL, REWORDED, Case, EditRequest, Probe, Question

NUM_REAL = 2  # neighbourhood prompts that are answered in words too
_TARGET = object_of({"str": TEXT}, optional={"id": BLANK})
_REWRITE = object_of(
    {"prompt": TEXT, "subject": TEXT, "target_new": _TARGET, "target_true": _TARGET}, optional={"relation_id": TEXT}
)
SHAPE = object_of(
    {"requested_rewrite": _REWRITE, "paraphrase_prompts": list_of(TEXT)},
    optional={"case_id": ID, "neighborhood_prompts": list_of(TEXT, least=0)},
)


def load_counterfact(path: str | Path) -> list[Case]:
    """Read a CounterFact file.

    A case's question, and its cloze, is the record's first paraphrase prompt with the new object for answer; the others are probes.
    The first neighbourhood prompt is the other fact, with the object of before for answer. Besides, the edit's own prompt and all
    paraphrase and neighbourhood prompts are probes whose two objects are weighed by probability (ROME's ES, PS and NS).

    Returns:
        The cases in file order, with the tags ``edits`` and ``relation``. Paraphrase prompts are no rewordings to train on.

    Raises:
        DataError: the file cannot be read, or a record is broken (with its place and the field).
    """
    cases = []
    for record in read_records(path, SHAPE):
        with record.named():
            cases.append(_make_case(record.value, record.index))
    return cases


def _make_case(raw: Mapping[str, Any], index: int) -> Case:
    rewrite = raw["requested_rewrite"]
    new, true = (rewrite[name]["str"].strip() for name in ("target_new", "target_true"))
    if rewrite["prompt"].count("{}") != 1:
        raise DataError(f"'requested_rewrite.prompt' must hold exactly one {{}} for the subject, got {rewrite['prompt']!r}")
    subject = rewrite["subject"].strip()
    edit = EditRequest(rewrite["prompt"].replace("{}", subject).strip(), new, subject)
    reworded = [text.strip() for text in raw["paraphrase_prompts"]]
    neighbours = [text.strip() for text in raw.get("neighborhood_prompts") or []]
    probes = [Probe(PARAPHRASE, Question(text, (new,))) for text in reworded[1:]]
    probes += [Probe(REAL, Question(text, (true,))) for text in neighbours[:NUM_REAL]]
    weighed = {EDITED: [edit.prompt], REWORDED: reworded, NEIGHBOUR: neighbours}
    probes += [Probe(kind, Question(text, (new,)), (true,)) for kind, texts in weighed.items() for text in texts]
    tags = {"edits": "1"} | ({"relation": rewrite["relation_id"]} if rewrite.get("relation_id") else {})
    return Case(
        f"counterfact-{raw.get('case_id') if raw.get('case_id') is not None else index}",
        (edit,),
        Question(reworded[0], (new,), cloze=reworded[0]),
        other_fact=Question(neighbours[0], (true,)) if neighbours else None,
        probes=tuple(probes),
        tags=tags,
    )
