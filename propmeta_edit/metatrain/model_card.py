"""The README of a checkpoint, as the hub reads it: what it is and from what, how it was made, how it is used, its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from propmeta_edit.models.artefacts import BUNDLED, find_model_folder, is_hub_id

CITATION = """@software{propmeta_edit,
  author = {{the authors of propmeta-edit}},
  title = {propmeta-edit: meta-trained knowledge editing for EasyEdit},
  license = {MIT}
}"""
USAGE = """```python
from propmeta_edit import MetaFTHyperParams, compute_edit

hparams = MetaFTHyperParams.from_checkpoint("this folder")  # the layers, rate and steps that it was meta-trained with
model, tokenizer = hparams.load_model()
edit = compute_edit(model, tokenizer, {"prompt": "Ann Lee lives in", "target_new": "Peru"}, hparams)
```
"""
PLAIN_LOADING = """
`AutoModelForCausalLM.from_pretrained("this folder")` loads it too, all of it in fp32. A half-precision `dtype=` given there rounds
the trained tensors, and edits that were saved on this checkpoint are then refused; `propmeta_edit.load_model("this folder",
dtype="bfloat16")` rounds the rest alone.
"""
ROUNDED = """
The trained tensors were rounded to {dtype} in this copy, for serving; edit the checkpoint that it was exported from.
"""
COMPACT_USAGE = """
This folder holds the trained tensors alone. Its name does wherever propmeta-edit takes a model: on first use they and the base are
put together in the cache folder, if the base has the hash above. `propmeta-edit expand "this folder" --output FOLDER` makes an
ordinary model folder of them, for other programs.
"""


def make_model_card(card: Mapping[str, Any], validation: Sequence[Mapping[str, float]] = (), *, is_compact: bool = False) -> str:
    """The README.

    Args:
        card: what ``metaft.json`` says.
        validation: what the run's validations gave, the first being that of the base.
        is_compact: of a folder with the trained tensors alone.
    """
    base = str(card["base_model"])
    data = ModelCardData(
        base_model=base if _is_on_hub(base) else None,
        license=licence_of(base),
        library_name="propmeta-edit" if is_compact else "transformers",
        tags=["knowledge-editing", "meta-learning", "propmeta-edit"],
    )
    usage = USAGE + (COMPACT_USAGE if is_compact else _describe_plain_loading(card))
    settings = "\n".join(f"- `{key}`: {value}" for key, value in card["settings"].items())
    return f"""---
{data.to_yaml()}
---
# {base}, meta-tuned for knowledge editing

Meta-tuned with propmeta-edit by first-order MAML over pairs of a new fact and a two-hop question that follows from it. On this
checkpoint, plain fine-tuning of the layers below on a new fact also moves the answers that follow from the fact.

- base: {base}, sha256 of its weights `{card.get("base_sha256", "unknown")}`; its licence holds for this model too
- trained tensors: {len(card["trained_tensors"])} ({card["trained_tensors"][0]} ...), fp32; every other tensor is the base model's
- data: {card["settings"].get("data", "unknown")}; tasks: {card.get("num_tasks", "unknown")}, each once, sha256 of all
  `{card.get("tasks_sha256", "unknown")}`
{_describe_loss(card)}

## How it is used

{usage}

## Validation

{_describe_validation(validation)}

## Limits

An edit also moves answers about other subjects, and what the model knew is kept less well than by fine-tuning the base. Edits are
meant one at a time. Whether the consequences of an edit follow depends on the base knowing the second hop.

## Settings

An edit takes the same layers, modules, inner rate and number of steps.

{settings}

## Citation

```bibtex
{CITATION}
```
"""


def _describe_loss(card: Mapping[str, Any]) -> str:
    if "lost" not in card:
        return ""
    lost = f"{100 * card['lost']:.1f} % of the change's norm"
    return f"- exported as a LoRA on the base, which lost {lost}; validation was before that\n"


def _describe_plain_loading(card: Mapping[str, Any]) -> str:
    if card["settings"].get("rank"):  # which peft loads
        return ""
    dtype = card.get("exported_dtype", "float32")
    return PLAIN_LOADING if dtype == "float32" else ROUNDED.format(dtype=dtype)


def _is_on_hub(name: str) -> bool:
    return name not in BUNDLED and is_hub_id(name) and not Path(name).is_dir()


def licence_of(name: str) -> str | None:
    """What a model's own card says of its licence; None where it has none on this machine, or says nothing."""
    folder = find_model_folder(name)
    path = None if folder is None else folder / "README.md"
    if path is None or not path.is_file():
        return None
    try:
        return ModelCard.load(path, ignore_metadata_errors=True).data.license  # type: ignore[no-any-return]
    except ValueError:  # no YAML at its head
        return None


def _describe_validation(validation: Sequence[Mapping[str, float]]) -> str:
    """Two-hop accuracy after an edit, before and after meta-training."""
    if not validation:
        return "None was asked for (validate_every)."
    first, last = validation[0], validation[-1]
    names = [name for name in last if name != "num_tasks"]
    lines = ["| cases | before meta-training, % | after, % |", "|---|---|---|"]
    lines += [f"| {name} | {_percent(first.get(name))} | {_percent(last[name])} |" for name in names]
    return "Two-hop questions answered after an edit of their fact.\n\n" + "\n".join(lines)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
