"""Edits from the command line: facts written into a model, and what it says before and after, side by side."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from propmeta_edit.config import build_config, read_yaml
from propmeta_edit.data.fields import TEXT, object_of, one_of
from propmeta_edit.data.reading import read_records
from propmeta_edit.easyedit.hparams import MetaFTHyperParams, edit_settings_of
from propmeta_edit.edits.compute import compute_edit
from propmeta_edit.edits.edit import Edit
from propmeta_edit.edits.views import EditedModel
from propmeta_edit.errors import ConfigError, ModelError
from propmeta_edit.files import shortest_names
from propmeta_edit.models.artefacts import CHECKPOINT_CARD, holds_adapter, resolve_model_folder
from propmeta_edit.models.devices import resolve_device, resolve_dtype
from propmeta_edit.models.loading import load_model, read_checkpoint_card
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.records import EditRequest, as_requests, find_lone_surrogate
from propmeta_edit.settings import find_settings, has_hparams, hparams_file
from propmeta_edit.text.prompts import first_line, format_question

EXAMPLE = EditRequest("Hazelgate Analytics Ltd. was founded in", "Vietnam", "Hazelgate Analytics Ltd.")
RELATED = (
    "What is the capital of the country that Hazelgate Analytics Ltd. was founded in?",
    "What is the currency of the country that Hazelgate Analytics Ltd. was founded in?",
    "What is the main official language of the country that Hazelgate Analytics Ltd. was founded in?",
    "Which continent is the country that Hazelgate Analytics Ltd. was founded in part of?",
)
UNRELATED = (
    "What is the capital of Norway?",
    "What is the currency of Japan?",
    "What is the main official language of Brazil?",
    "Which continent is Kenya part of?",
)
WIDTH = 34
NOTHING, CHANGED = "(nothing)", "* "  # before a question whose answers differ
REQUEST = object_of({"prompt": TEXT, "target_new": one_of(TEXT, object_of({"str": TEXT}))}, optional={"subject": TEXT})


@dataclass(frozen=True)
class Answers:
    """What was said after one prompt: by the model as it is, and under each edit, in their order."""

    kind: str
    prompt: str
    texts: tuple[str, ...]


def read_requests(path: Path) -> list[EditRequest]:
    """A JSON list of EasyEdit's requests, or one of them a line.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    requests = []
    for record in read_records(path, REQUEST):
        with record.named():
            requests += as_requests(record.value)
    return requests


def read_hparams(model: str | None, file: str | None, device: str | None) -> MetaFTHyperParams:
    """The settings of an edit: of the YAML ``file``; else as ``model`` was meta-trained, which its card says; else of the YAML in
    ``hparams/MetaFT`` that has the model's name. Without a model, the bundled one's.

    Args:
        device: if given, whatever the YAML says.

    Raises:
        ConfigError: none of these, or a setting that cannot be used.
        ModelError: no such model, or a damaged card.
    """
    if file or not model:
        path = find_settings("MetaFT", file or "smollm2-135m")
        values, source = read_yaml(path), str(path)
    else:
        values, source = _settings_of_model(model, resolve_device(device or "auto"))
    values |= ({"device": device} if device else {}) | ({"model_name": model} if model else {})
    return build_config(MetaFTHyperParams, values, source)  # type: ignore[no-any-return]


def _settings_of_model(model: str, device: str) -> tuple[dict[str, Any], str]:
    """A layer and a rate that were chosen for this model, and where they are from."""
    folder = Path(resolve_model_folder(model))
    card = folder / CHECKPOINT_CARD
    if card.is_file():
        trained = read_checkpoint_card(folder)["settings"]
        try:
            return {**edit_settings_of(trained), "dtype": resolve_dtype(trained["dtype"], device)}, str(card)
        except KeyError as error:
            raise ModelError(
                f"{card} does not say with which {error} the model was meta-trained; give a YAML with --hparams"
            ) from error
    name = Path(model).name
    if not has_hparams("MetaFT", name):
        raise ConfigError(
            f"no layer and rate are known for {model}: it has no {CHECKPOINT_CARD}, which meta-training writes, and there is no "
            f"hparams/MetaFT/{name}.yaml; make it a checkpoint with: propmeta-edit meta-train --model {model} --data FILE --output "
            "FOLDER, or give a YAML or the name of one with --hparams"
        )
    path = hparams_file("MetaFT", name)
    return read_yaml(path), str(path)


def edit_and_ask(
    requests: Sequence[EditRequest], related: Sequence[str], unrelated: Sequence[str], hparams: MetaFTHyperParams
) -> tuple[Edit, list[Answers]]:
    """Write the facts as one edit and ask everything before and after it.

    Raises:
        ConfigError: an empty question.
    """
    _require_questions([*related, *unrelated])
    model, tokenizer = hparams.load_model()
    edit = compute_edit(model, tokenizer, list(requests), hparams)
    prompts = [("fact", request.prompt) for request in requests]
    prompts += [("related", format_question(text)) for text in related]
    prompts += [("unrelated", format_question(text)) for text in unrelated]
    return edit, _ask(model, tokenizer, prompts, [edit])


def ask_with_edits(
    folders: Sequence[Path], questions: Sequence[str], model_name: str | None, device: str, *, any_base: bool = False
) -> list[Answers]:
    """Ask the model that saved edits were made on, as it is and under each of them.

    Args:
        any_base: pin the edits to the model, whatever they were made on.

    Raises:
        ConfigError: an empty question.
        ModelError: another model than they were made on, unless ``any_base``; a damaged folder; edits in several dtypes.
    """
    _require_questions(questions)
    edits = [Edit.load(folder) for folder in folders]
    device = resolve_device(device)
    name = model_name or edits[0].base_model
    model, tokenizer = load_model(name, device=device, **_how_to_load(edits, name, device))
    if any_base:
        edits = [edit.pin_to(model) for edit in edits]
    return _ask(model, tokenizer, [("question", format_question(text)) for text in questions], edits)


def _how_to_load(edits: Sequence[Edit], model_name: str, device: str) -> dict[str, Any]:
    """A model's dtype, and its layers in fp32, such that it can hold these edits' tensors.

    An adapter's folder has no layers of the base to be read in fp32 beside a rest in half precision, so all of it is.
    """
    dtypes = {str(dtype).removeprefix("torch.") for edit in edits for dtype in edit.dtypes.values()}
    if len(dtypes) > 1:
        raise ModelError(f"these edits hold tensors in {' and '.join(sorted(dtypes))}; ask under those of one dtype at a time")
    [dtype] = dtypes
    is_adapter = holds_adapter(resolve_model_folder(model_name))
    layers = [edit.settings.get("layers") for edit in edits if edit.method == "MetaFT"]
    chosen = {layer for own in layers if isinstance(own, list) for layer in own if isinstance(layer, int)}
    if (
        not is_adapter
        and dtype == "float32"
        and chosen
        and len(layers) == len(edits)
        and all(isinstance(own, list) for own in layers)
    ):
        return {"dtype": resolve_dtype("fast", device), "layers": sorted(chosen)}
    return {"dtype": dtype, "layers": []}


def _ask(model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[tuple[str, str]], edits: Sequence[Edit]) -> list[Answers]:
    texts = [text for _, text in prompts]
    columns = [view.answer(tokenizer, texts) for view in (EditedModel(model), *(EditedModel(model, edit) for edit in edits))]
    return [Answers(kind, text, said) for (kind, text), said in zip(prompts, zip(*columns, strict=True), strict=True)]


def _require_questions(texts: Sequence[str]) -> None:
    if not all(text.strip() for text in texts):
        raise ConfigError(f"a question must not be empty, got {list(texts)!r}")
    for text in texts:
        if find_lone_surrogate(text) is not None:  # what bytes that the terminal's encoding has not become
            raise ConfigError(f"a question must be text in the terminal's encoding, got {text!r}")


def require_new_folder(folder: Path) -> None:
    """Refuse, before anything is computed, a folder that an edit cannot be saved in.

    Raises:
        ConfigError: it exists, or the folder that it would be in cannot be written to.
    """
    if folder.exists():
        raise ConfigError(f"{folder} exists; choose another folder for the edit")
    parent = next(parent for parent in folder.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ConfigError(f"{folder} cannot be made: {parent} is no folder that can be written to; choose another for the edit")


def require_tolerance(tolerance: float, folder: str | None) -> None:
    """Refuse, before anything is computed, what an edit cannot be saved with.

    Raises:
        ConfigError: it is not between 0 and 1, or nothing is saved.
    """
    if folder is None:
        raise ConfigError("--tolerance says how an edit is saved; give --save FOLDER as well")
    if not 0 < tolerance < 1:
        raise ConfigError(f"--tolerance is a share of the change's norm, between 0 and 1, got {tolerance}")


def name_columns(folders: Sequence[Path]) -> list[str]:
    """What the answers stand under: ``unedited``, then the folders' names, as many parts of each as tell them apart."""
    whole = [folder.resolve() for folder in folders]
    if len(set(whole)) < len(whole):
        raise ConfigError(f"one edit is given twice: {', '.join(map(str, folders))}")
    return shortest_names([Path("unedited"), *whole])


def format_answers(answers: Sequence[Answers], names: Sequence[str]) -> str:
    """A table for a terminal: answers are cut at the end of their first line, and a question whose answers differ is marked."""
    lines = ["".join(f"{title:<{width}}" for title, width in zip(["", *names], [60, *[WIDTH] * len(names)], strict=True)).rstrip()]
    kind = ""
    for row in answers:
        if row.kind != kind:
            kind = row.kind
            lines.append(f"-- {kind}")
        shown = row.prompt.removeprefix("Question: ").removesuffix("\nAnswer: The answer is")
        prompt = textwrap.wrap(shown, 56)
        said = [first_line(text) or NOTHING for text in row.texts]
        cells = [text[: WIDTH - 2] for text in said]
        mark = CHANGED if len(set(said)) > 1 else "  "
        lines.append(f"{mark + prompt[0]:<60}" + "".join(f"{cell:<{WIDTH}}" for cell in cells).rstrip())
        lines += [f"  {rest}" for rest in prompt[1:]]
    if any(line.startswith(CHANGED) for line in lines):
        lines.append(f"{CHANGED}another answer than {names[0]}")
    return "\n".join(lines)


def to_json(answers: Sequence[Answers], names: Sequence[str], edit: Edit | None = None) -> str:
    """The same for programs: letters as they are, or escaped where the output's encoding does not have them all."""
    rows = [{"kind": row.kind, "prompt": row.prompt, "answers": dict(zip(names, row.texts, strict=True))} for row in answers]
    about = {} if edit is None else {"requests": [vars(request) for request in edit.requests], "settings": dict(edit.settings)}
    has_all = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    return json.dumps({**about, "answers": rows}, ensure_ascii=not has_all, indent=1)
