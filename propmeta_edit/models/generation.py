"""Greedy continuation of prompts: the protocol that every score rests on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from propmeta_edit.models.forwards import cache_argument, compute_logits, compute_logits_after
from propmeta_edit.models.layers import ARCHITECTURES
from propmeta_edit.models.packed import packed_products
from propmeta_edit.models.shortcuts import agrees
from propmeta_edit.models.states import evaluating, plain_torch
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.text.encoding import IGNORED, TextEncoder, collate
from propmeta_edit.text.sentences import find_sentence_end

MAX_NEW_TOKENS = 10  # the paper's, after CaKE
_WINDOW = re.compile("window|chunk|local")
NATURAL_LIMIT = 40  # tokens after which a text that does not stop by itself is cut


@dataclass(frozen=True)
class Continuation:
    """What a model says after a prompt.

    Attributes:
        text: the first ``max_new_tokens`` tokens, or fewer where it stopped.
        whole: the text to its natural stop, the end of its first sentence or of the sequence (at most ``NATURAL_LIMIT`` tokens);
            None where it was not asked for.
    """

    text: str
    whole: str | None = None


def generate_greedily(
    model: LanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int = MAX_NEW_TOKENS, batch_size: int = 32
) -> list[str]:
    """The new text after each prompt, decoded greedily, special tokens left out.

    Raises:
        RequestError: a prompt without tokens, or one after which the model has no positions for ``max_new_tokens`` more.
    """
    return [said.text for said in continue_greedily(model, tokenizer, prompts, max_new_tokens, (), batch_size)]


def continue_greedily(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = MAX_NEW_TOKENS,
    naturally: Sequence[bool] = (),
    batch_size: int = 32,
) -> list[Continuation]:
    """The same, and from the same tokens the texts to their natural stop.

    The tokens are those of transformers' ``generate`` without any setting that comes with the model (sampling, beams, repetition
    penalty), one after another: keys and values are kept in tensors of their final size, and frozen weights are laid out once.

    Args:
        naturally: by prompt, whether it is followed to its natural stop; none is if empty. Those that are not are left out of the
            batch once they have their tokens, so under stacked weights each edit must have as many of either kind.
        batch_size: prompts that are answered side by side, in their order.
    """
    encoder = TextEncoder(tokenizer, model.config)
    ends = frozenset(_as_ids(model.generation_config.eos_token_id) or _as_ids(tokenizer.eos_token_id))
    rows = [_Row(ids, max_new_tokens) for ids in _encode(encoder, prompts, max_new_tokens)]
    for row, is_natural in zip(rows, naturally, strict=False):
        if is_natural:
            room = encoder.room_after(row.prompt)
            row.limit = max(max_new_tokens, NATURAL_LIMIT if room is None else min(NATURAL_LIMIT, room))
            row.is_natural = True
    with plain_torch(model), evaluating(model), torch.no_grad(), packed_products(model, ()):
        for start in range(0, len(rows), batch_size):
            for row, token in _decode(model, rows[start : start + batch_size]):
                row.take(token, ends, tokenizer)
    return [row.as_continuation(tokenizer) for row in rows]


def _as_ids(ids: Any) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def _encode(encoder: TextEncoder, prompts: Sequence[str], num_tokens: int) -> Iterator[list[int]]:
    for prompt in prompts:
        ids = encoder.encode_prompt(prompt)
        encoder.require_room(ids, prompt, num_tokens)
        yield ids


@dataclass
class _Row:
    """A prompt and what follows it so far."""

    prompt: list[int]
    max_new_tokens: int
    limit: int = 0
    is_natural: bool = False
    tokens: list[int] = field(default_factory=list)
    is_done: bool = False

    def __post_init__(self) -> None:
        self.limit = self.limit or self.max_new_tokens

    def take(self, token: int, ends: frozenset[int], tokenizer: Tokenizer) -> None:
        """The next token, unless the text has ended."""
        if self.is_done:
            return
        if token in ends:
            self.is_done = True
            return
        self.tokens.append(token)
        self.is_done = len(self.tokens) >= self.limit or (
            len(self.tokens) >= self.max_new_tokens and find_sentence_end(_decode_text(tokenizer, self.tokens)) is not None
        )

    def as_continuation(self, tokenizer: Tokenizer) -> Continuation:
        text = _decode_text(tokenizer, self.tokens[: self.max_new_tokens])
        return Continuation(text, _decode_text(tokenizer, self.tokens) if self.is_natural else None)


def _decode_text(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


def _decode(model: LanguageModel, rows: Sequence[_Row]) -> Iterator[tuple[_Row, int]]:
    """Each row with its next token, until all are done; the caller gives it to the row."""
    width, longest = max(len(row.prompt) for row in rows), max(row.limit for row in rows)
    if not keeps_states(model, width + longest):
        yield from _decode_plainly(model, rows)
        return
    pads = torch.tensor([width - len(row.prompt) for row in rows], device=model.device)
    ids = torch.tensor([[0] * (width - len(row.prompt)) + row.prompt for row in rows], device=model.device)
    reader = _Reader(model, pads, width + longest)
    while not all(row.is_done for row in rows):
        ids = reader.read(ids).float().argmax(dim=-1, keepdim=True).to(pads.device)  # the head may be elsewhere
        yield from zip(rows, ids[:, 0].tolist(), strict=True)
        kept = _rows_to_keep(rows)
        if kept:
            rows, chosen = [rows[number] for number in kept], torch.tensor(kept, device=model.device)
            ids = ids[chosen]
            reader.keep(chosen)


def _decode_plainly(model: LanguageModel, rows: Sequence[_Row]) -> Iterator[tuple[_Row, int]]:
    """The same with nothing kept: every token reads its whole text again, padded on the right, where no text sees it."""
    while not all(row.is_done for row in rows):
        texts = [row.prompt + row.tokens for row in rows]
        batch = collate([(text, [IGNORED] * len(text)) for text in texts]).to(model.device)
        last = torch.tensor([len(text) - 1 for text in texts], device=model.device)
        logits = compute_logits_after(model, batch, torch.arange(len(texts), device=model.device), last)
        yield from zip(rows, logits.float().argmax(dim=-1).tolist(), strict=True)
        kept = _rows_to_keep(rows)
        rows = [rows[number] for number in kept] if kept else rows


def _rows_to_keep(rows: Sequence[_Row]) -> list[int]:
    """Those that go on once the others have their tokens; none if nothing is to be left out."""
    kept = [number for number, row in enumerate(rows) if row.is_natural]
    return kept if 0 < len(kept) < len(rows) and all(row.is_done or row.is_natural for row in rows) else []


def keeps_states(model: LanguageModel, length: int = 0) -> bool:
    """Whether keys and values can be kept from token to token as ``_Reader`` does, in texts of this length."""

    def read(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The text behind padding and the one without, all but one token at first."""
        last = ids.shape[1] - 1
        pads = torch.tensor([2, *[0] * (len(ids) - 1)], device=ids.device)
        padded = ids.clone()
        padded[0, 2:] = ids[0, :-2]
        reader = _Reader(model, pads, ids.shape[1])
        reader.read(padded[:, :last])
        is_read = torch.zeros_like(ids, dtype=torch.bool)
        is_read[torch.arange(len(ids), device=ids.device), last - pads] = True
        return is_read, reader.read(padded[:, last:])

    config = model.config.get_text_config()
    if not agrees(model, "kept keys and values", read):
        return False
    # A trial of a few tokens does not tell what happens beyond a window, whatever it is called.
    windows = [value for name, value in config.to_dict().items() if isinstance(value, int) and _WINDOW.search(name)]
    return config.model_type in ARCHITECTURES or all(length <= window or window < 1 for window in windows)


class _Reader:
    """Reads texts piece by piece and keeps keys and values of what it has read.

    Args:
        pads: [B], tokens of padding before each text.
        size: of all tokens there will ever be, padding included.
    """

    def __init__(self, model: LanguageModel, pads: torch.Tensor, size: int) -> None:
        self._model, self._pads = model, pads
        self._masks, self._slots = _Masks(model, pads, size), _Slots(size)

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, vocabulary] after the last of so many more tokens [B, T]."""
        before, after = self._slots.length, self._slots.length + ids.shape[1]
        positions = torch.arange(before, after, device=ids.device)[None] - self._pads[:, None]
        states = self._model.base_model(
            inputs_embeds=self._model.get_input_embeddings()(ids),
            attention_mask=self._masks.between(before, after),
            position_ids=positions.clamp(min=0),
            **{cache_argument(type(self._model.base_model).forward): self._slots},
            use_cache=True,
            return_dict=True,
        ).last_hidden_state
        self._slots.length = after
        return compute_logits(self._model, states[:, -1])

    def keep(self, rows: torch.Tensor) -> None:
        """Of these rows alone, from now on."""
        self._pads = self._pads[rows]
        self._slots.keep(rows)
        self._masks.keep(rows)


class _Masks:
    """Which key each query sees: its own text so far, within the layer's window, and no padding on the left.

    Args:
        pads: [B], tokens of padding before each prompt.
        size: S, of all keys there will ever be.
    """

    def __init__(self, model: LanguageModel, pads: torch.Tensor, size: int) -> None:
        config = model.config.get_text_config()
        self._implementation = config._attn_implementation
        self._dtype = model.get_input_embeddings().weight.dtype
        keys = torch.arange(size, device=pads.device)
        is_text = keys[None, None, :] >= pads[:, None, None]
        sees = (keys[None, :, None] >= keys[None, None, :]) & is_text  # [B, S, S]
        # A query on padding sees itself: a row without anything to see has no softmax.
        sees |= torch.eye(size, dtype=torch.bool, device=pads.device)[None]
        self._is_text = is_text[:, 0]
        window = getattr(config, "sliding_window", None)
        near = sees if window is None else sees & (keys[:, None] - keys[None, :] < window)
        kinds = getattr(config, "layer_types", None)
        self._by_kind = {kind: near if kind == "sliding_attention" else sees for kind in set(kinds)} if kinds else {"": near}

    def keep(self, rows: torch.Tensor) -> None:
        """Of these rows alone, from now on."""
        self._is_text = self._is_text[rows]
        self._by_kind = {kind: sees[rows] for kind, sees in self._by_kind.items()}

    def between(self, before: int, after: int) -> Any:
        """For the queries from ``before`` to ``after``: one mask [B, 1, T, S], or one a kind of layer."""
        if self._implementation not in ("eager", "sdpa"):
            return self._is_text[:, :after].long()  # such as flash attention, which cuts padding away by itself
        masks = {kind: self._as_mask(sees[:, None, before:after, :after]) for kind, sees in self._by_kind.items()}
        return masks.get("", masks)

    def _as_mask(self, sees: torch.Tensor) -> torch.Tensor:
        if self._implementation == "sdpa":
            return sees
        hidden = torch.finfo(self._dtype).min
        return torch.zeros(sees.shape, dtype=self._dtype, device=sees.device).masked_fill_(~sees, hidden)


def _take(states: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return states[rows.to(states.device)]


class _Slots(DynamicCache):  # type: ignore[misc]
    """Keys and values of every layer in tensors that have room for all tokens from the start.

    Attributes:
        length: tokens that are in; the caller raises it after each pass.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.length = size, 0
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(self, rows: torch.Tensor) -> None:
        """Of these rows alone, from now on."""
        self._kept = {layer: (_take(keys, rows), _take(values, rows)) for layer, (keys, values) in self._kept.items()}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The states of so many more tokens, [B, heads, T, D] each; returns all there are."""
        if layer_idx not in self._kept:
            shapes = [(*states.shape[:2], self.size, states.shape[-1]) for states in (key_states, value_states)]
            self._kept[layer_idx] = key_states.new_empty(shapes[0]), value_states.new_empty(shapes[1])
        keys, values = self._kept[layer_idx]
        end = self.length + key_states.shape[2]
        keys[:, :, self.length : end], values[:, :, self.length : end] = key_states, value_states
        return keys[:, :, :end], values[:, :, :end]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens are in."""
        return self.length
