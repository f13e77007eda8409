"""A decoder that reads texts piece by piece: keys and values kept from token to token, and common beginnings read once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache

from propmeta_edit.models.forwards import cache_argument, compute_logits
from propmeta_edit.models.layers import ARCHITECTURES
from propmeta_edit.models.shortcuts import agrees
from propmeta_edit.protocols import LanguageModel

_WINDOW = re.compile("window|chunk|local")
WITH_ANY_MASK = ("eager", "sdpa")  # attention that takes a mask of any shape


def keeps_states(model: LanguageModel, length: int = 0) -> bool:
    """Whether keys and values can be kept from token to token as ``Reader`` does, in texts of this length."""

    def read(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The text behind padding and the one without, all but one token at first."""
        last = ids.shape[1] - 1
        pads = torch.tensor([2, *[0] * (len(ids) - 1)], device=ids.device)
        padded = ids.clone()
        padded[0, 2:] = ids[0, :-2]
        reader = Reader(model, pads, ids.shape[1])
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


def reads_together(model: LanguageModel) -> bool:
    """Whether texts that share their beginnings can be read as ``Reader.read_together`` does."""

    def read(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A text, its beginning, and another one."""
        first, second = ids.tolist()
        half = len(first) // 2
        texts = [first[:half], first, second[:-1]]
        pads = torch.tensor([len(first) - len(text) for text in texts], device=ids.device)
        is_read = torch.zeros_like(ids, dtype=torch.bool)
        is_read[0, half - 1] = is_read[0, -1] = is_read[1, -2] = True
        return is_read, Reader(model, pads, len(first)).read_together(texts, [[0, 1, 2]])

    config = model.config.get_text_config()
    return config._attn_implementation in WITH_ANY_MASK and agrees(model, "texts that share their beginnings", read)


class Reader:
    """Reads texts piece by piece and keeps keys and values of what it has read.

    Args:
        pads: [B], tokens of padding before each text.
        size: of all tokens there will ever be, padding included.
    """

    def __init__(self, model: LanguageModel, pads: torch.Tensor, size: int) -> None:
        self._model, self._pads = model, pads
        self._masks, self._slots = _Masks.of_padded(model, pads, size), _Slots(size)

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, vocabulary] after the last of so many more tokens [B, T]."""
        before, after = self._slots.length, self._slots.length + ids.shape[1]
        positions = torch.arange(before, after, device=ids.device)[None] - self._pads[:, None]
        states = self._run(ids, positions.clamp(min=0), self._masks.between(before, after), self._slots)
        self._slots.length = after
        return compute_logits(self._model, states[:, -1])

    def read_together(self, texts: Sequence[Sequence[int]], groups: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits [B, vocabulary] after whole texts, the first that are read; what those of a group begin with in common once.

        Args:
            groups: numbers of texts; all texts in their order, in groups of any size.
        """
        device = self._pads.device
        trees = [_Tree([texts[number] for number in own]) for own in groups]
        width = max(len(tree.ids) for tree in trees)
        ids, places = (
            torch.tensor([own + [0] * (width - len(own)) for own in columns], device=device)
            for columns in ([tree.ids for tree in trees], [tree.places for tree in trees])
        )
        sees = torch.stack([tree.sees(width) for tree in trees]).to(device)
        slots = _Slots(width)
        states = self._run(ids, places, _Masks(self._model, sees, places).between(0, width), slots)
        longest = max(map(len, texts))
        of_text = torch.tensor([number for number, tree in enumerate(trees) for _ in tree.paths], device=device)
        paths = [[0] * (longest - len(path)) + path for tree in trees for path in tree.paths]  # to the left what no token sees
        where = torch.tensor(paths, device=device)
        self._slots.copy_from(slots, of_text, where)
        self._slots.length = longest
        return compute_logits(self._model, _take(states, of_text, where[:, -1]))

    def keep(self, rows: torch.Tensor) -> None:
        """Of these rows alone, from now on."""
        self._pads = self._pads[rows]
        self._slots.keep(rows)
        self._masks.keep(rows)

    def _run(self, ids: torch.Tensor, positions: torch.Tensor, mask: Any, slots: _Slots) -> torch.Tensor:
        states: torch.Tensor = self._model.base_model(
            inputs_embeds=self._model.get_input_embeddings()(ids),
            attention_mask=mask,
            position_ids=positions,
            **{cache_argument(type(self._model.base_model).forward): slots},
            use_cache=True,
            return_dict=True,
        ).last_hidden_state
        return states


class _Tree:
    """Texts as one row of tokens, in which what several begin with in common stands once.

    Attributes:
        ids, places: of each token, and its place in the texts that it is of.
        paths: of each text, where its tokens stand.
    """

    def __init__(self, texts: Sequence[Sequence[int]]) -> None:
        self.ids: list[int] = []
        self.places: list[int] = []
        self._before: list[int] = []  # of each token the one before it; -1 for a first one
        self._found: dict[tuple[int, int], int] = {}
        self.paths = [self._add(text) for text in texts]

    def _add(self, text: Sequence[int]) -> list[int]:
        path: list[int] = []
        for place, token in enumerate(text):
            step = (path[-1] if path else -1, token)
            if step not in self._found:
                self._found[step] = len(self.ids)
                self.ids.append(token)
                self.places.append(place)
                self._before.append(step[0])
            path.append(self._found[step])
        return path

    def sees(self, size: int) -> torch.Tensor:
        """Which token sees which, [size, size]: itself and all that lead to it; what fills up sees itself."""
        found = torch.eye(size, dtype=torch.bool)
        for number, before in enumerate(self._before):
            if before >= 0:
                found[number] |= found[before]
        return found


class _Masks:
    """Which key each query sees: its own text so far, within the layer's window, and no padding on the left.

    Args:
        sees: [B, S, S], whatever the window.
        places: [B or 1, S], of tokens in their text, or as far from each other.
        is_text: [B, S], False on padding, for attention that takes nothing else.
    """

    def __init__(self, model: LanguageModel, sees: torch.Tensor, places: torch.Tensor, is_text: torch.Tensor | None = None) -> None:
        config = model.config.get_text_config()
        self._implementation = config._attn_implementation
        self._dtype = model.get_input_embeddings().weight.dtype
        self._is_text = is_text
        window = getattr(config, "sliding_window", None)
        near = sees if window is None else sees & (places[:, :, None] - places[:, None, :] < window)
        kinds = getattr(config, "layer_types", None)
        self._by_kind = {kind: near if kind == "sliding_attention" else sees for kind in set(kinds)} if kinds else {"": near}

    @classmethod
    def of_padded(cls, model: LanguageModel, pads: torch.Tensor, size: int) -> _Masks:
        """Of texts behind padding.

        Args:
            pads: [B], tokens of padding before each prompt.
            size: S, of all keys there will ever be.
        """
        keys = torch.arange(size, device=pads.device)
        is_text = keys[None, None, :] >= pads[:, None, None]
        sees = (keys[None, :, None] >= keys[None, None, :]) & is_text  # [B, S, S]
        # A query on padding sees itself: a row without anything to see has no softmax.
        sees |= torch.eye(size, dtype=torch.bool, device=pads.device)[None]
        return cls(model, sees, keys[None], is_text[:, 0])

    def keep(self, rows: torch.Tensor) -> None:
        """Of these rows alone, from now on."""
        self._is_text = None if self._is_text is None else self._is_text[rows]
        self._by_kind = {kind: sees[rows] for kind, sees in self._by_kind.items()}

    def between(self, before: int, after: int) -> Any:
        """For the queries from ``before`` to ``after``: one mask [B, 1, T, S], or one a kind of layer."""
        if self._implementation not in WITH_ANY_MASK and self._is_text is not None:
            return self._is_text[:, :after].long()  # such as flash attention, which cuts padding away by itself
        masks = {kind: self._as_mask(sees[:, None, before:after, :after]) for kind, sees in self._by_kind.items()}
        return masks.get("", masks)

    def _as_mask(self, sees: torch.Tensor) -> torch.Tensor:
        if self._implementation == "sdpa":
            return sees
        hidden = torch.finfo(self._dtype).min
        return torch.zeros(sees.shape, dtype=self._dtype, device=sees.device).masked_fill_(~sees, hidden)


def _take(states: torch.Tensor, *numbers: torch.Tensor) -> torch.Tensor:
    return states[tuple(number.to(states.device) for number in numbers)]


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

    def copy_from(self, other: _Slots, rows: torch.Tensor, where: torch.Tensor) -> None:
        """Of each text the states that another one has of its tokens.

        Args:
            rows: [B], the other's row that a text is in.
            where: [B, T], its tokens there.
        """
        for layer, both in other._kept.items():
            keys, values = (self._spread(_take(states.transpose(1, 2), rows[:, None], where)) for states in both)
            self._kept[layer] = keys, values

    def _spread(self, states: torch.Tensor) -> torch.Tensor:
        """[B, T, heads, D] → [B, heads, size, D], with room for those to come."""
        batch, length, heads, width = states.shape
        kept = states.new_empty(batch, heads, self.size, width)
        kept[:, :, :length] = states.transpose(1, 2)
        return kept

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
