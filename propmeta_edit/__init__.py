"""propmeta_edit: meta-trained knowledge editing, as an editor ``MetaFT`` of EasyEdit.

Importing this package makes EasyEdit importable and lets it know ``MetaFT``; nothing heavy is loaded before it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from propmeta_edit.easyedit import install, register_algorithm
from propmeta_edit.recipes import register_bundled_models

__version__ = "0.1.0"

_EXPORTS = {
    "CaKEHyperParams": "propmeta_edit.easyedit.cake",
    "AlphaEditHyperParams": "propmeta_edit.easyedit.alphaedit",
    "Case": "propmeta_edit.records",
    "Edit": "propmeta_edit.edits.edit",
    "EditRequest": "propmeta_edit.records",
    "EditSettings": "propmeta_edit.finetune.edit_settings",
    "EditedModel": "propmeta_edit.edits.views",
    "MetaFTHyperParams": "propmeta_edit.easyedit.hparams",
    "MetaTask": "propmeta_edit.records",
    "MetaTrainConfig": "propmeta_edit.metatrain.config",
    "PropMetaError": "propmeta_edit.errors",
    "Question": "propmeta_edit.records",
    "apply_alphaedit_to_model": "propmeta_edit.easyedit.alphaedit",
    "apply_cake_to_model": "propmeta_edit.easyedit.cake",
    "apply_metaft_to_model": "propmeta_edit.easyedit.plugin",
    "compute_edit": "propmeta_edit.edits.compute",
    "edit_from_weights": "propmeta_edit.edits.edit",
    "edit_many": "propmeta_edit.edits.compute",
    "generate_with_edits": "propmeta_edit.edits.views",
    "load_model": "propmeta_edit.models.loading",
    "main": "propmeta_edit.cli",
    "merge_edits": "propmeta_edit.edits.edit",
    "meta_train": "propmeta_edit.metatrain.trainer",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def _when_called(name: str) -> Callable[..., Any]:
    """One of the exported functions, imported when EasyEdit first calls it."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        return __getattr__(name)(*args, **kwargs)

    return apply


register_algorithm("MetaFT", _when_called("apply_metaft_to_model"))
register_algorithm("CaKE", _when_called("apply_cake_to_model"))
register_algorithm("AlphaEdit", _when_called("apply_alphaedit_to_model"), only_where_missing=True)
register_bundled_models()
install()
