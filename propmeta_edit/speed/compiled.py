"""Seconds an edit, and of the first one, with the frozen blocks compiled and as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from propmeta_edit.finetune.compiled import compiled_if
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.speed import parts
from propmeta_edit.speed.edits import Setting, time_batched, time_single

ENGINE, COMPILED = "engine", "compiled"


def compare(settings: Sequence[Setting], number: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Two rows a setting, whose edits are computed one after another if it has one at once."""
    for setting in settings:
        model, tokenizer = setting.load()
        edit = partial(time_single if setting.at_once == 1 else time_batched, model, tokenizer, setting, number)
        names = select_parameters(model, [setting.layer])
        sides = {name: partial(_time, edit, compiled_if(name == COMPILED, model, names)) for name in (ENGINE, COMPILED)}
        times = parts.measure(sides, repeats)
        usual = {name: timing.usual for name, timing in times.items()}
        for side, timing in times.items():
            yield {
                "model": setting.model_name,
                "frozen dtype": setting.dtype,
                "side": side,
                "at once": setting.at_once,
                "seconds an edit": timing.usual,
                "seconds once": timing.once(number),
                "times engine": parts.ratio(usual.get(ENGINE), timing.usual),
            }


def _time(edit: Callable[[], float], inside: Callable[[], AbstractContextManager[None]]) -> float:
    with inside():
        return edit()


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ratio of the first setting of the last row's model."""
    own = [row for row in rows if row["model"] == rows[-1]["model"]]
    return {"model": own[0]["model"], "compiled_vs_engine": next((r["times engine"] for r in own if r["side"] == COMPILED), None)}
