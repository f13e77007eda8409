"""Checkpoints and edits on the hub."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData

from propmeta_edit.edits.edit import Edit
from propmeta_edit.edits.saved import CONFIG
from propmeta_edit.errors import ModelError
from propmeta_edit.metatrain.model_card import licence_of
from propmeta_edit.models.artefacts import CHECKPOINT_CARD

README = "README.md"


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool = True) -> str:
    """Upload a checkpoint (whole or compact) or an edit, with a card that the hub finds valid; the repository is made if need be.

    An edit's card is written into its folder if it has none. Needs the hub's token, as ``hf auth login`` keeps it.

    Returns:
        The address of the repository.

    Raises:
        ModelError: no such folder, a card that the hub refuses, or whatever keeps the hub from taking it.
    """
    folder = Path(folder)
    if (folder / CONFIG).is_file():
        if not (folder / README).is_file():
            (folder / README).write_text(make_edit_card(Edit.load(folder)), encoding="utf-8")
    elif not (folder / CHECKPOINT_CARD).is_file():
        raise ModelError(f"{folder} is neither a meta-tuned checkpoint ({CHECKPOINT_CARD}) nor an edit ({CONFIG})")
    api = HfApi()
    try:
        ModelCard.load(folder / README).validate()
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=["training/**"])
    except Exception as error:  # the hub's errors have no common base
        raise ModelError(f"the hub does not take {folder} as {repo_id}: {error}; to give it a token: hf auth login") from error
    return str(address)


def make_edit_card(edit: Edit) -> str:
    """The README of an edit: the facts, the base, and how it is used."""
    data = ModelCardData(
        license=licence_of(edit.base_model), library_name="propmeta-edit", tags=["knowledge-editing", "propmeta-edit"]
    )
    facts = "\n".join(f"- {request.prompt} **{request.target_new}**" for request in edit.requests)
    settings = json.dumps(dict(edit.settings), default=str)
    return f"""---
{data.to_yaml()}
---
# An edit of {edit.base_model or "a model"}

{facts}

Made by {edit.method or "an unnamed method"} with `{settings}`. It holds {len(edit.weights)} tensors and is refused on another
base than the one it was made on (sha256 `{edit.base_sha256}`).

```python
from propmeta_edit import Edit

with Edit.load("this folder").applied(model):
    ...
```
"""
