"""Named models that are built once on this machine and kept in one cache folder.

The folder is ``PROPMETA_HOME``, or ``~/.cache/propmeta_edit``. A build happens in a temporary folder beside the final one and is
renamed when it is whole, so an interrupted build leaves nothing behind that could be mistaken for a model.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from propmeta_edit.errors import ModelError, did_you_mean
from propmeta_edit.files import sha256_of_file, sha256_of_json

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Builder:
    """How a named model is made.

    Args:
        origin: what it is made from, as JSON: another origin makes another model.
        build: makes it in an empty folder.
    """

    origin: Callable[[], object]
    build: Callable[[Path], None]


CHECKPOINT_CARD = "metaft.json"  # in a folder that meta-training made
EDIT_CARD = "edit_config.json"  # in one that an edit was saved in
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names
PEFT_PREFIX = "base_model.model."  # before the names of tensors in them
QUANTISATION_CONFIGS = ("quantize_config.json", "quant_config.json")  # of GPTQ and AWQ from before config.json had a place for them
BUNDLED: dict[str, Builder] = {}  # by name; those that make them put them here


INPUT_MOMENTS, WHOLE = "input moments", "whole folder"
MAKERS: dict[str, Callable[..., Any]] = {}  # what is made for a model on first use, by its name; likewise


def register_builder(name: str, origin: Callable[[], object], build: Callable[[Path], None]) -> None:
    """Let ``name`` stand for a model that is made on first use."""
    BUNDLED[name] = Builder(origin, build)


# EasyEdit picks a loader by the words it finds in the whole path, the first of a list that fits: "gpt" gives the byte-level BPE
# tokenizer that SmolLM2 has, and "llama" the padding side that ROME needs.
_MODELS_FOLDER = "llama-gpt-bpe"


def cache_home() -> Path:
    """The cache folder: ``PROPMETA_HOME`` or ``~/.cache/propmeta_edit``."""
    return Path(os.environ.get("PROPMETA_HOME") or Path.home() / ".cache" / "propmeta_edit")


def artefact_folder(name: str) -> Path:
    """Where a bundled model is, or will be: a folder for what it is made from, so that a newer package makes its own."""
    return cache_home() / _MODELS_FOLDER / sha256_of_json(BUNDLED[name].origin())[:8] / name


def ensure_artefact(name: str) -> Path:
    """The folder of a bundled model, built first if need be (minutes; with progress bars).

    Raises:
        ModelError: no bundled model of that name.
    """
    if name not in BUNDLED:
        raise ModelError(f"unknown model {name!r}; built here are {', '.join(BUNDLED)}")
    folder = artefact_folder(name)
    if not folder.exists():
        build_whole(folder, BUNDLED[name].build)
    return folder


def build_whole(folder: Path, build: Callable[[Path], object]) -> None:
    """Run ``build(temporary folder)`` and rename the result to ``folder``, or leave nothing.

    Two processes that want the same folder take turns; the second finds it there.
    """
    new_parents = [parent for parent in (folder.parent, *folder.parent.parents) if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_locks_folder() / f"{sha256_of_json(str(folder.resolve()))[:16]}.lock"):
        if folder.exists():
            return
        for left_by_a_killed_build in folder.parent.glob(glob.escape(folder.name) + ".partial-????????"):  # as mkdtemp names them
            shutil.rmtree(left_by_a_killed_build)
        partial = Path(tempfile.mkdtemp(prefix=folder.name + ".partial-", dir=folder.parent))
        try:
            build(partial)
            partial.chmod(0o755)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            for parent in new_parents:  # those that stay empty; the deepest comes first
                with suppress(OSError):
                    parent.rmdir()


def _locks_folder() -> Path:
    """In the cache folder, which processes of several machines may share; where that cannot be written to, for temporary files."""
    for home in (cache_home(), Path(tempfile.gettempdir()) / "propmeta-edit"):
        locks = home / "locks"
        with suppress(OSError):
            locks.mkdir(parents=True, exist_ok=True)
            if os.access(locks, os.W_OK):
                return locks
    raise ModelError(f"no lock can be kept in {cache_home()}; set PROPMETA_HOME to a folder that can be written to")


def resolve_model_folder(name_or_path: str) -> str:
    """A model name as users write it to what transformers loads.

    In this order: a bundled name (built on first use), which no folder that happens to be called so can stand in for (write
    ``./name`` for that one); an existing folder; a hub id ``owner/name``, taken from the hub's cache folder or downloaded into it
    (not with ``HF_HUB_OFFLINE=1``). What holds the difference from a base alone (``holds_difference``) is put together with it.

    Raises:
        ModelError: none of these, quantised weights, or a difference whose base is not to be had.
        OriginError: a difference from other weights than its base has.
    """
    if not name_or_path:
        raise ModelError("no model given: name a folder, a hub id 'owner/name', or one of " + ", ".join(BUNDLED))
    if name_or_path in BUNDLED:
        return str(ensure_artefact(name_or_path))
    if Path(name_or_path).is_dir():
        _require_plain_numbers(Path(name_or_path), name_or_path)
        _require_model(Path(name_or_path), name_or_path)
        return str(_as_whole(Path(name_or_path))) if holds_difference(name_or_path) else name_or_path  # as it was written
    if is_hub_id(name_or_path):
        folder = _fetch_from_hub(name_or_path)
        _require_plain_numbers(Path(folder), name_or_path)
        return str(_as_whole(Path(folder)))
    near = did_you_mean(name_or_path, [*BUNDLED, *(path.name for path in Path().iterdir() if path.is_dir())])
    raise ModelError(
        f"unknown model {name_or_path!r}: it is no folder and no bundled model ({', '.join(BUNDLED)}); "
        f"a model of the hub is written owner/name{near}"
    )


def is_hub_id(name: str) -> bool:
    """Whether a name is written as the hub writes those of its models, ``owner/name``."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def holds_difference(folder: str | Path) -> bool:
    """Whether a folder holds only what tells a model from a base that it names: a compact checkpoint, or a saved edit."""
    return _difference_card(Path(folder)) is not None


def _difference_card(folder: Path) -> Path | None:
    """What says from which base a folder's difference is; None where the folder is no difference."""
    if (folder / "config.json").is_file() or any(folder.glob("model*.safetensors")):  # a whole model, if perhaps a damaged one
        return None
    return next((card for name in (CHECKPOINT_CARD, EDIT_CARD) if (card := folder / name).is_file()), None)


def _as_whole(folder: Path) -> Path:
    """The model that a folder stands for: itself, or a difference and its base put together in the cache folder, on first use.

    The card says by hashes what the difference is and what it is from, and so names the result.
    """
    card = _difference_card(folder)
    if card is None:
        return folder
    whole = cache_home() / _MODELS_FOLDER / sha256_of_file(card)[:16] / folder.resolve().name
    if not whole.exists():
        LOG.info("%s holds the difference from its base alone; the two are put together in %s, once", folder, whole)
        build_whole(whole, lambda partial: MAKERS[WHOLE](folder, partial))
    return whole


def _base_of(card: Path) -> str:
    """The base that a difference's card names; empty where it cannot be read, which whoever puts the two together says."""
    try:
        return str(json.loads(card.read_text(encoding="utf-8"))["base_model"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def may_be_had(name: str) -> bool:
    """Whether a model that is not on this machine could still come: bundled, of the hub, or a difference from such a one."""
    if name in BUNDLED:
        return True
    card = _difference_card(Path(name)) if Path(name).is_dir() else None
    return may_be_had(_base_of(card)) if card is not None else is_hub_id(name) and not Path(name).is_dir()


def holds_factors(folder: str | Path) -> bool:
    """Whether a folder is a checkpoint of factors (``models.factors``): an adapter too, but one that meta-training made."""
    return (Path(folder) / ADAPTER_CONFIG).is_file() and (Path(folder) / CHECKPOINT_CARD).is_file()


def holds_adapter(folder: str | Path) -> bool:
    """Whether a folder has an adapter of peft on a model, and is no checkpoint of factors."""
    return (Path(folder) / ADAPTER_CONFIG).is_file() and not holds_factors(folder)


def require_no_adapter(folder: str | Path, name: str) -> None:
    """Refuse a folder with an adapter of peft, for what is to write its model's tensors down again as they were named.

    Raises:
        ModelError: naming the way out.
    """
    if holds_adapter(folder):
        raise ModelError(
            f"{name} holds an adapter of peft ({ADAPTER_CONFIG}), whose tensors are not the model's own; merge it, and "
            "name the folder of the whole model: AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload()."
            "save_pretrained(FOLDER), and the same of the tokenizer"
        )


def _require_model(folder: Path, name: str) -> None:
    if not any((folder / file).is_file() for file in ("config.json", ADAPTER_CONFIG, CHECKPOINT_CARD, EDIT_CARD)):
        holds = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
        raise ModelError(
            f"{name} is no model's folder: it has no config.json, and holds {holds}; name the folder that has config.json and "
            "*.safetensors, as save_pretrained writes them"
        )


def _require_plain_numbers(folder: Path, name: str) -> None:
    found = [file for file in QUANTISATION_CONFIGS if (folder / file).is_file()]
    if not found and _quantisation_of(folder / "config.json"):
        found = ["quantization_config in config.json"]
    if found:
        raise ModelError(
            f"{name} is quantised ({found[0]}), and neither edits nor meta-training can be made of such weights; name a folder "
            "that has them in float32, bfloat16 or float16, such as model.dequantize() and save_pretrained(FOLDER) give"
        )


def _quantisation_of(config: Path) -> object:
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # whoever loads it says what is wrong
    return values.get("quantization_config") if isinstance(values, dict) else None


def find_model_folder(name_or_path: str) -> Path | None:
    """Where a model is on this machine, whole, by the same rules but with nothing trained and no network; None if it is not there.

    A difference is put together with its base if that one is here.
    """
    if name_or_path in BUNDLED:
        folder = artefact_folder(name_or_path)
        return folder if folder.is_dir() else None
    found = Path(name_or_path) if Path(name_or_path).is_dir() else _find_in_hub_cache(name_or_path)
    card = None if found is None else _difference_card(found)
    if found is None or card is None:
        return found
    return _as_whole(found) if find_model_folder(_base_of(card)) is not None else None


def _find_in_hub_cache(name: str) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except Exception:  # the hub's errors have no common base: not in the cache, or no name of the hub's
        return None
    index = folder / "model.safetensors.index.json"  # of weights in several files, some of which a stopped download lacks
    if index.is_file():
        parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return folder if all((folder / part).is_file() for part in parts) else None
    return folder if any(folder.glob("*.safetensors")) else None


def _fetch_from_hub(name: str) -> str:
    """A local folder always, so that hashes and stored dtypes can be read from the files; pickled weights stay where they are."""
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]))
    except Exception as error:  # the hub's errors have no common base
        raise ModelError(_explain(error, name)) from error


def _explain(error: Exception, name: str) -> str:
    """Why the hub gives no model, and what to do."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return (
            f"{name} is gated: ask for access on its page of the hub, then give this machine your token: hf auth login (or set "
            "HF_TOKEN)"
        )
    missing = f"there is no folder {name!r} here (one that is still to come is written ./{name})"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{missing}, and the hub has no model of that name that this machine may see: mend the name or, if the model is "
            "private, give your token: hf auth login"
        )
    if isinstance(error, LocalEntryNotFoundError):
        offline = os.environ.get("HF_HUB_OFFLINE", "not set")
        return (
            f"{missing}, it is not in the hub's cache, and the hub cannot be reached (HF_HUB_OFFLINE is {offline}): go online and "
            f"run hf download {name}, or name a folder"
        )
    return f"{missing}, and the hub does not give a model of that name: {error}"
