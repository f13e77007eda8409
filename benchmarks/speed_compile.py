"""What torch.compile would give the blocks above the edited one: seconds an edit and of the first one, against what is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import speed_parts
from speed_edit import Setting, time_single

from propmeta_edit.finetune import inner_loop
from propmeta_edit.models.layers import get_architecture

Inside = Sequence[Callable[[], AbstractContextManager[Any]]]
ENGINE, PLAIN, COMPILED = "engine", "plain products", "compiled"


class CompiledBlocks:
    """The frozen blocks above a layer, compiled once for texts of any length, and used inside ``used`` alone."""

    def __init__(self, model: Any, layer: int) -> None:
        self._blocks = list(model.get_submodule(get_architecture(model.config.model_type).blocks))[layer + 1 :]
        for block in self._blocks:
            block.compile(dynamic=True)
        self._compiled = [block._compiled_call_impl for block in self._blocks]
        self._use(None)

    @contextmanager
    def used(self) -> Iterator[None]:
        self._use(self._compiled)
        try:
            yield
        finally:
            self._use(None)

    def _use(self, compiled: Sequence[Any] | None) -> None:
        for block, call in zip(self._blocks, compiled or [None] * len(self._blocks), strict=True):
            block._compiled_call_impl = call


def compare(settings: Sequence[Setting], number: int, repeats: int) -> Iterator[dict[str, Any]]:
    """A row a side: edits one after another as they are computed, with plain products, and with compiled blocks."""
    for setting in settings:
        model, tokenizer = setting.load()
        edit = partial(time_single, model, tokenizer, setting)
        plain = partial(patch.object, inner_loop, "packed_products", lambda *_: nullcontext())  # the compiler cannot look into them
        sides: dict[str, Inside] = {ENGINE: [], PLAIN: [plain], COMPILED: [plain, CompiledBlocks(model, setting.layer).used]}
        times = speed_parts.measure({side: partial(_time, edit, inside, number) for side, inside in sides.items()}, repeats)
        for side, timing in times.items():
            yield {
                "model": setting.model_name,
                "frozen dtype": setting.dtype,
                "side": side,
                "seconds an edit": timing.usual,
                "seconds once": timing.once(number),
                "times engine": speed_parts.ratio(times[ENGINE].usual if ENGINE in times else None, timing.usual),
            }


def _time(edit: Callable[[int], float], inside: Inside, number: int) -> float:
    with ExitStack() as stack:
        for context in inside:
            stack.enter_context(context())
        return edit(number)


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ratio on the last row's model."""
    own = [row for row in rows if row["model"] == rows[-1]["model"]]
    return {"model": own[0]["model"], "compiled_vs_engine": next((r["times engine"] for r in own if r["side"] == COMPILED), None)}
