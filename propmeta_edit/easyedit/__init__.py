"""The only room that imports EasyEdit: find it, make it importable, and let it know our algorithms. Importing this is cheap."""

from __future__ import annotations

from propmeta_edit.easyedit.forms import find_form, load_easyedit
from propmeta_edit.easyedit.importing import install
from propmeta_edit.easyedit.registry import register_algorithm

__all__ = ["find_form", "install", "load_easyedit", "register_algorithm"]
