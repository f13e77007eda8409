"""The frozen blocks above the trained ones, compiled: shorter steps, for a minute of compiling before the first one.

Where that pays is in docs/speed.md.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from propmeta_edit.models.forwards import replaced_forwards
from propmeta_edit.models.layers import get_blocks, layers_of
from propmeta_edit.protocols import LanguageModel

LOG = logging.getLogger(__name__)


def compiled_if(wanted: bool, model: LanguageModel, parameter_names: Iterable[str]) -> Callable[[], AbstractContextManager[None]]:
    """``CompiledBlocks.used`` if that is wanted, else a context in which nothing is otherwise."""
    return CompiledBlocks(model, parameter_names).used if wanted else nullcontext


class CompiledBlocks:
    """Compiled once for texts of any length, and in use inside ``used`` alone; plain again where compiling fails, which is logged.

    Args:
        model: a causal language model of transformers.
        parameter_names: the trained parameters; blocks up to the last one that holds any stay as they are.
    """

    def __init__(self, model: LanguageModel, parameter_names: Iterable[str]) -> None:
        last = max(layers_of(model, parameter_names))
        self._has_failed = False
        self._forwards = {block: self._compile(block) for block in get_blocks(model)[last + 1 :]}

    @contextmanager
    def used(self) -> Iterator[None]:
        """Inside, the blocks compute what they always do, but for rounding."""
        with replaced_forwards(self._forwards):
            yield

    def _compile(self, block: nn.Module) -> Callable[..., Any]:
        plain = block.forward
        compiled = torch.compile(plain, dynamic=True)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._has_failed:
                return plain(*args, **kwargs)
            try:
                return compiled(*args, **kwargs)
            except TorchDynamoException as error:
                self._has_failed = True
                LOG.warning("torch.compile does not work here: plain blocks from now on (%s)", str(error).strip().split("\n")[0])
                return plain(*args, **kwargs)

        return forward
