"""What this package uses of a causal language model and of a tokenizer of transformers, as types."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn


class ModelConfig(Protocol):
    """The settings of a model of transformers, among them ``vocab_size`` and ``max_position_embeddings``."""

    def get_text_config(self) -> Any: ...


class LanguageModel(Protocol):
    """A causal language model; every ``PreTrainedModel`` with a language model head is one."""

    config: Any
    generation_config: Any
    training: bool
    base_model_prefix: str

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def base_model(self) -> Any: ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def generate(self, *args: Any, **kwargs: Any) -> Any: ...

    def get_output_embeddings(self) -> Any: ...

    def get_input_embeddings(self) -> Any: ...

    def get_submodule(self, target: str) -> nn.Module: ...

    def get_parameter(self, target: str) -> nn.Parameter: ...

    def named_parameters(self, prefix: str = "", recurse: bool = True) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def eval(self) -> Any: ...

    def requires_grad_(self, requires_grad: bool = True) -> Any: ...

    def save_pretrained(self, save_directory: Any) -> Any: ...

    def to(self, *args: Any, **kwargs: Any) -> Any: ...


class Tokenizer(Protocol):
    """A tokenizer."""

    padding_side: str
    pad_token: str | None
    eos_token: str | None
    pad_token_id: int | None
    eos_token_id: int | None

    @property
    def is_fast(self) -> bool: ...

    def __call__(self, text: Any, **kwargs: Any) -> Any: ...

    def save_pretrained(self, save_directory: Any) -> Any: ...

    def decode(self, token_ids: Any, **kwargs: Any) -> str: ...

    def batch_decode(self, sequences: Any, **kwargs: Any) -> list[str]: ...
