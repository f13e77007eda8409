"""Greedy continuation of prompts: the protocol that every score rests on."""

from __future__ import annotations

import itertools
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
WITH_ANY_MASK = ("eager", "sdpa")  # attention that takes a mask of any shape
ENOUGH_LEFT = 0.75  # of a group's rows: above that none is left out
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
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 32,
    together: int = 1,
) -> list[str]:
    """The new text after each prompt, decoded greedily, special tokens left out.

    Args:
        batch_size, together: as for ``continue_greedily``.

    Raises:
        RequestError: a prompt without tokens, or one after which the model has no positions for ``max_new_tokens`` more.
    """
    return [said.text for said in continue_greedily(model, tokenizer, prompts, max_new_tokens, (), batch_size, together)]


def continue_greedily(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = MAX_NEW_TOKENS,
    naturally: Sequence[bool] = (),
    batch_size: int = 32,
    together: int = 1,
) -> list[Continuation]:
    """The same, and from the same tokens the texts to their natural stop.

    The tokens are those of transformers' ``generate`` without any setting that comes with the model (sampling, beams, repetition
    penalty), one after another: keys and values are kept in tensors of their final size, and frozen weights are laid out once.

    Args:
        naturally: by prompt, whether it is followed to its natural stop; none is if empty.
        batch_size: prompts that are answered side by side, in their order.
        together: so many neighbours meet the same weights: all of an edit's under stacked weights, and as many for each. What their
            texts begin with in common is read once, and those that are done are left out.
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
            for row, token in _decode(model, rows[start : start + batch_size], together):
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


def _decode(model: LanguageModel, rows: Sequence[_Row], together: int) -> Iterator[tuple[_Row, int]]:
    """Each row with its next token, until all are done; the caller gives it to the row."""
    width, longest = max(len(row.prompt) for row in rows), max(row.limit for row in rows)
    groups = [list(range(start, min(start + together, len(rows)))) for start in range(0, len(rows), together)]
    if not keeps_states(model, width + longest):
        yield from _decode_plainly(model, rows, groups)
        return
    pads = torch.tensor([width - len(row.prompt) for row in rows], device=model.device)
    reader = _Reader(model, pads, width + longest)
    if together > 1 and reads_together(model):
        logits = reader.read_together([row.prompt for row in rows], groups)
    else:
        logits = reader.read(torch.tensor([[0] * (width - len(row.prompt)) + row.prompt for row in rows], device=model.device))
    while True:
        ids = logits.float().argmax(dim=-1, keepdim=True).to(pads.device)  # the head may be elsewhere
        yield from zip(rows, ids[:, 0].tolist(), strict=True)
        if all(row.is_done for row in rows):
            return
        groups = _groups_to_keep(rows, groups)
        kept = [number for group in groups for number in group]
        if len(kept) < len(rows):
            rows, chosen = [rows[number] for number in kept], torch.tensor(kept, device=model.device)
            ids, groups = ids[chosen], _counted_anew(groups)
            reader.keep(chosen)
        logits = reader.read(ids)


def _decode_plainly(model: LanguageModel, rows: Sequence[_Row], groups: Sequence[Sequence[int]]) -> Iterator[tuple[_Row, int]]:
    """The same with nothing kept: every token reads its whole text again, padded on the right, where no text sees it."""
    while not all(row.is_done for row in rows):
        texts = [row.prompt + row.tokens for row in rows]
        batch = collate([(text, [IGNORED] * len(text)) for text in texts]).to(model.device)
        last = torch.tensor([len(text) - 1 for text in texts], device=model.device)
        logits = compute_logits_after(model, batch, torch.arange(len(texts), device=model.device), last)
        yield from zip(rows, logits.float().argmax(dim=-1).tolist(), strict=True)
        kept = _groups_to_keep(rows, groups)
        rows, groups = [rows[number] for group in kept for number in group], _counted_anew(kept)


def _groups_to_keep(rows: Sequence[_Row], groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """Equally many rows of each group, among them all that go on; all rows, unless enough are done for the copying to pay."""
    going_on = [[number for number in group if not rows[number].is_done] for group in groups]
    most = max(map(len, going_on))
    if most > ENOUGH_LEFT * max(map(len, groups)):
        return [list(group) for group in groups]
    kept = []
    for group, own in zip(groups, going_on, strict=True):
        done = [number for number in group if number not in own]
        kept.append(sorted([*own, *done[: most - len(own)]]))
    return kept


def _counted_anew(groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """The same groups once there is no other row."""
    numbers = itertools.count()
    return [[next(numbers) for _ in group] for group in groups]


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


def reads_together(model: LanguageModel) -> bool:
    """Whether texts that share their beginnings can be read as ``_Reader.read_together`` does."""

    def read(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A text, its beginning, and another one."""
        first, second = ids.tolist()
        half = len(first) // 2
        texts = [first[:half], first, second[:-1]]
        pads = torch.tensor([len(first) - len(text) for text in texts], device=ids.device)
        is_read = torch.zeros_like(ids, dtype=torch.bool)
        is_read[0, half - 1] = is_read[0, -1] = is_read[1, -2] = True
        return is_read, _Reader(model, pads, len(first)).read_together(texts, [[0, 1, 2]])

    config = model.config.get_text_config()
    return config._attn_implementation in WITH_ANY_MASK and agrees(model, "texts that share their beginnings", read)


class _Reader:
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
