"""Imports EasyEdit through our finder and reports what came of it."""

# ruff: noqa: E402  (the order of the imports is what is tried)

from __future__ import annotations

import importlib.util
import json
import logging
import random
import sys
from pathlib import Path

import propmeta_edit  # noqa: F401

report = {"heavy": [name for name in ("easyeditor", "numpy", "torch", "transformers") if name in sys.modules]}

import numpy
import torch

from propmeta_edit.easyedit import find_form, install, load_easyedit, register_algorithm
from propmeta_edit.easyedit.importing import EasyEditFinder
from propmeta_edit.errors import EasyEditError

found = find_form()
report["form"] = {"kind": found.kind, "location": str(found.location), "supports": sorted(found.supports)}
report["algorithms"] = found.algorithms


def before(*_, **__):
    pass


def after(*_, **__):
    pass


def draws():
    return [random.random(), float(numpy.random.rand()), float(torch.rand(()))]


def seed():
    random.seed(7)
    numpy.random.seed(7)
    torch.manual_seed(7)


register_algorithm("Before", before)
seed()
expected = draws()
seed()
handler = logging.NullHandler()
root = logging.getLogger()
root.handlers[:] = [handler]
root.setLevel(logging.ERROR)
easyeditor = load_easyedit()
report["draws_as_before"] = draws() == expected
report["root_logger_as_before"] = root.handlers == [handler] and root.level == logging.ERROR
report["name"] = easyeditor.BaseEditor.__module__

install()
report["finders"] = sum(isinstance(finder, EasyEditFinder) for finder in sys.meta_path)
register_algorithm("After", after, batchable=False)
from easyeditor.editors.batch_editor import BatchEditor
from easyeditor.util.alg_dict import ALG_DICT

report["table"] = [ALG_DICT["Before"] is before, ALG_DICT["After"] is after, "MetaFT" in ALG_DICT]
report["own_algorithms_kept"] = set(found.algorithms) <= set(ALG_DICT)
report["batchable"] = [BatchEditor.is_batchable_method(name) for name in ("Before", "After", "FT", "ROME", "nonsense")]
try:
    register_algorithm("FT", before)
except EasyEditError as error:
    report["name_taken"] = str(error)


def constants(code):
    for value in code.co_consts:
        yield from constants(value) if hasattr(value, "co_consts") else [value]


modules = {name: module for name, module in sys.modules.items() if name.startswith("easyeditor.") and hasattr(module, "__file__")}
report["modules"] = len(modules)
report["cuda_strings"] = sorted(n for n, m in modules.items() if "cuda:" in constants(m.__loader__.get_code(n)))
report["loaders"] = sorted({type(module.__loader__).__name__ for name, module in modules.items() if ".editors" in name})

import easyeditor.trainer.blip2_models as blip2

try:
    blip2.NoSuchModel(1)
    report["placeholder"] = "constructed"
except ImportError as error:
    report["placeholder"] = str(error)
except AttributeError:
    report["placeholder"] = "real"
third_party = ("sentence_transformers", "zhipuai")
report["fooled"] = [name for name in third_party if name in sys.modules and importlib.util.find_spec(name) is None]
report["never_placed"] = [n for n in ("torchvision", "timm", "cv2") if n in sys.modules and not hasattr(sys.modules[n], "__file__")]
Path(sys.argv[1]).write_text(json.dumps(report), encoding="utf-8")
