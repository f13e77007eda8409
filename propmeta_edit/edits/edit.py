"""An edit as a thing: kept, applied, undone, saved, loaded, and handed on as a LoRA. It does not know which method made it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from propmeta_edit.errors import ModelError
from propmeta_edit.finetune.single_edit import put_in_place
from propmeta_edit.finetune.weights import apply_snapshot
from propmeta_edit.models.artefacts import build_whole
from propmeta_edit.records import EditRequest

WEIGHTS, CONFIG = "edit_model.safetensors", "edit_config.json"


@dataclass(frozen=True)
class _Applied:
    """An edit that stands in a model, and the tensors it took the place of."""

    edit: Edit
    replaced: Mapping[str, torch.Tensor]


_STANDING: WeakKeyDictionary[nn.Module, list[_Applied]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Edit:
    """What an edit did to some tensors of a model.

    Args:
        requests: the facts it wrote.
        weights: the edited tensors, by parameter name, as they are after the edit.
        before: the same tensors before it; None for an edit that was loaded, which knows their hash alone.
        base_model: the name or path of the model it was made on, for people.
        method: ``MetaFT``, ``ROME``, ...
        settings: of the method, as plain values.
        hash_before: given only for a loaded edit.
        transposed: those weights that are [in, out] (GPT-2's projections), as a LoRA of them has to know.
    """

    requests: tuple[EditRequest, ...]
    weights: Mapping[str, torch.Tensor] = field(repr=False)
    before: Mapping[str, torch.Tensor] | None = field(repr=False)
    base_model: str = ""
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    hash_before: str | None = None
    transposed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # ``before`` is the model's own storage: what is known of it now tells whether someone writes into it later.
        known = None if self.before is None else {name: take_fingerprint(value) for name, value in self.before.items()}
        object.__setattr__(self, "_fingerprints", known)

    @cached_property
    def base_sha256(self) -> str:
        """Of the edited tensors before the edit: which model state this edit belongs on."""
        return self.hash_before or hash_tensors(self._unchanged_before())

    def apply(self, model: nn.Module) -> None:
        """Let the model stand edited until ``undo``.

        On the state it was made on, the model then holds the edit's tensors to the bit. With other edits standing that were made
        on the same state, the changes are added up, in the order of application.

        Raises:
            ModelError: the model lacks these tensors or is another one, or this edit stands already.
        """
        standing = _STANDING.setdefault(model, [])
        if any(entry.edit is self for entry in standing):
            raise ModelError("this edit stands in the model already; undo it first")
        parameters = self._parameters_of(model)
        current = {name: parameters[name].data for name in self.weights}
        below = {name: _original(standing, name, current[name]).to(current[name].device) for name in self.weights}
        if self._is_base(current):
            values = {name: self._on_device(name, current[name]) for name in self.weights}
        elif self._is_base(below):
            # Adding changes: W = W₀ + Σ (Wᵢ - W₀), in the order of application.
            values = {name: current[name] + (self._on_device(name, current[name]) - below[name]) for name in self.weights}
        else:
            raise ModelError(
                f"this edit was made on other weights ({self.base_model or 'an unnamed model'}, sha256 {self.base_sha256[:12]}... "
                f"of {len(self.weights)} tensors) than this model has; apply it to the model it was made on"
                + (", with the edits standing that stood then" if standing else "")
            )
        put_in_place(parameters, values)
        standing.append(_Applied(self, current))

    def undo(self, model: nn.Module) -> None:
        """Take the edit out again; edits applied after it stay, as if it had never been there.

        Exact: the last edit goes to the bit, and without any edit the tensors are those of before. Edits that were made while this
        one stood cannot stand without it.

        Raises:
            ModelError: it does not stand in this model, or edits made on top of it do.
        """
        standing = _STANDING.get(model, [])
        place = next((number for number, entry in enumerate(standing) if entry.edit is self), None)
        if place is None:
            raise ModelError("this edit does not stand in the model")
        later = [entry.edit for entry in standing[place + 1 :]]
        taken = standing[place:]
        for entry in reversed(taken):
            self._put_back(model, entry)
        del standing[place:]
        try:
            for edit in later:
                edit.apply(model)
        except ModelError as error:
            for entry in reversed(standing[place:]):
                self._put_back(model, entry)
            del standing[place:]
            for entry in taken:
                entry.edit.apply(model)
            raise ModelError("an edit that was made on top of this one stands in the model; undo that one first") from error

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """Inside, the model is edited; outside it is what it was."""
        self.apply(model)
        try:
            yield model
        finally:
            self.undo(model)

    def change(self, model: nn.Module | None = None) -> dict[str, torch.Tensor]:
        """``W - W₀`` by name; a loaded edit needs the unedited model to know W₀.

        Raises:
            ModelError: a loaded edit and no model, or another model.
        """
        if self.before is not None:
            before: Mapping[str, torch.Tensor] = self._unchanged_before()
        else:
            if model is None:
                raise ModelError("a loaded edit holds the tensors after it alone; give the model it was made on")
            before = {name: p.data for name, p in self._parameters_of(model).items()}
            if not self._is_base(before):
                raise ModelError("this edit was made on other weights than this model has")
        return {name: value - before[name].to(value.device) for name, value in self.weights.items()}

    def save(self, folder: str | Path) -> None:
        """Write ``edit_model.safetensors`` and ``edit_config.json`` into a new folder, both or none.

        Raises:
            ModelError: the folder exists.
            OSError: it cannot be written.
        """
        folder = Path(folder)
        if folder.exists():
            raise ModelError(f"{folder} exists; choose another folder for the edit")
        config = {
            "requests": [asdict(request) for request in self.requests],
            "base_model": self.base_model,
            "base_sha256": self.base_sha256,
            "method": self.method,
            "settings": dict(self.settings),
            "tensors": {name: list(value.shape) for name, value in self.weights.items()},
            "transposed": list(self.transposed),
            "sha256": hash_tensors(self.weights),
        }

        def build(partial: Path) -> None:
            save_file({name: value.detach().contiguous().cpu() for name, value in self.weights.items()}, partial / WEIGHTS)
            (partial / CONFIG).write_text(json.dumps(config, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")

        build_whole(folder, build)

    @classmethod
    def load(cls, folder: str | Path) -> Edit:
        """Read what ``save`` wrote.

        Raises:
            ModelError: files that are missing, cut off or changed.
        """
        folder = Path(folder)
        try:
            config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            weights = load_file(folder / WEIGHTS)
            requests = tuple(_read_request(row) for row in config["requests"])
            expected, transposed = config["sha256"], tuple(config["transposed"])
            base, method, settings, base_sha256 = (config[name] for name in ("base_model", "method", "settings", "base_sha256"))
            edit = cls(requests, weights, None, base, method, settings, base_sha256, transposed)
        except FileNotFoundError as error:
            raise ModelError(f"{folder} holds no whole edit, which is {WEIGHTS} and {CONFIG}: {error}") from error
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise ModelError(f"the edit in {folder} is damaged ({error}); save it again") from error
        if hash_tensors(weights) != expected:
            raise ModelError(f"the edit in {folder} is damaged: {WEIGHTS} is not what {CONFIG} says; save it again")
        return edit

    def save_lora(self, folder: str | Path, rank: int, model: nn.Module | None = None) -> float:
        """Write the change as a PEFT LoRA of that rank, which keeps its largest singular values.

        Args:
            model: the unedited model, for a loaded edit.

        Returns:
            What that loses: the norm of what is left out over the norm of the change.

        Raises:
            ModelError: the folder exists, or the edit moves something that is no matrix.
        """
        folder = Path(folder)
        if folder.exists():
            raise ModelError(f"{folder} exists; choose another folder for the LoRA")
        changes = self.change(model)
        odd = [name for name, value in changes.items() if value.dim() != 2 or not name.endswith(".weight")]
        if odd:
            raise ModelError(f"a LoRA holds changes of matrices alone, and this edit moves {odd[0]} as well")
        if 0 < len(self.transposed) < len(changes):
            raise ModelError("a LoRA holds weights of one orientation, and this edit moves some of each")
        changes = {name: value.T if name in self.transposed else value for name, value in changes.items()}
        tensors, lost, whole = {}, 0.0, 0.0
        for name, change in changes.items():
            u, s, vh = torch.linalg.svd(change.double(), full_matrices=False)
            module, kept = name.removesuffix(".weight"), min(rank, len(s))
            root = s[:kept].sqrt()
            a, b = torch.zeros(rank, change.shape[1]), torch.zeros(change.shape[0], rank)
            a[:kept], b[:, :kept] = root[:, None] * vh[:kept], u[:, :kept] * root
            tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
            tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
            lost, whole = lost + float(s[kept:].square().sum()), whole + float(s.square().sum())
        leaves = sorted({name.removesuffix(".weight") for name in changes})
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": bool(self.transposed),
            "target_modules": leaves,
            "base_model_name_or_path": self.base_model,
            "inference_mode": True,
        }

        def build(partial: Path) -> None:
            save_file(tensors, partial / "adapter_model.safetensors", {"format": "pt"})
            (partial / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")

        build_whole(folder, build)
        return (lost / whole) ** 0.5 if whole else 0.0

    def _put_back(self, model: nn.Module, entry: _Applied) -> None:
        """The tensors that an edit took the place of, wherever the model is by now."""
        parameters = self._parameters_of(model, entry.replaced)
        put_in_place(parameters, {name: value.to(parameters[name].device) for name, value in entry.replaced.items()})

    def is_made_on(self, model: nn.Module) -> bool:
        """Whether the model, as it stands, is what the edit was made on.

        Raises:
            ModelError: the model lacks its tensors, or has them in other shapes.
        """
        return self._is_base({name: p.data for name, p in self._parameters_of(model).items()})

    def _parameters_of(self, model: nn.Module, names: Mapping[str, Any] | None = None) -> dict[str, nn.Parameter]:
        parameters = dict(model.named_parameters())
        chosen = self.weights if names is None else names
        for name in chosen:
            if name not in parameters or parameters[name].shape != self.weights.get(name, parameters[name]).shape:
                raise ModelError(f"this edit moves {name} {tuple(self.weights[name].shape)}, which does not fit this model")
        return {name: parameters[name] for name in chosen}

    def _unchanged_before(self) -> Mapping[str, torch.Tensor]:
        before = self.before or {}
        if not self._fits_fingerprints(before):
            raise ModelError("the model's tensors were written to since this edit was made; save an edit before changing its model")
        return before

    def _fits_fingerprints(self, values: Mapping[str, torch.Tensor]) -> bool:
        known: Mapping[str, str] = self._fingerprints  # type: ignore[attr-defined]
        return all(take_fingerprint(values[name]) == fingerprint for name, fingerprint in known.items())

    def _is_base(self, values: Mapping[str, torch.Tensor]) -> bool:
        return self._fits_fingerprints(values) if self.before is not None else hash_tensors(values) == self.base_sha256

    def _on_device(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return self.weights[name].to(like.device)


def _original(standing: Sequence[_Applied], name: str, current: torch.Tensor) -> torch.Tensor:
    """The tensor that the first standing edit of that name took the place of."""
    return next((entry.replaced[name] for entry in standing if name in entry.replaced), current)


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, whatever their order and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(save({name: tensors[name].detach().contiguous().cpu()}))
    return digest.hexdigest()


def take_fingerprint(tensor: torch.Tensor) -> str:
    """A short name for the bits of a tensor, from sums of them over rows and columns: where it is, at the speed of memory."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(integers).reshape(len(tensor), -1)
    sums = torch.cat([bits.sum(dim=0, dtype=torch.int64), bits.sum(dim=1, dtype=torch.int64)])
    return hashlib.sha256(save({"sums": sums.cpu()}) + str((tuple(tensor.shape), tensor.dtype)).encode()).hexdigest()


def find_transposed(model: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """Those parameters that are weights of GPT-2's projections, [in, out]."""
    return tuple(n for n in names if n.endswith(".weight") and isinstance(model.get_submodule(n.removesuffix(".weight")), Conv1D))


def standing_edits(model: nn.Module) -> list[Edit]:
    """The edits that stand in a model, in the order of application."""
    return [entry.edit for entry in _STANDING.get(model, [])]


def edit_from_weights(
    model: nn.Module,
    original: Mapping[str, torch.Tensor],
    requests: Sequence[EditRequest],
    *,
    method: str,
    base_model: str = "",
    settings: Mapping[str, Any] | None = None,
) -> Edit:
    """The edit that any method left in a model, from the weights of before that EasyEdit's editors return; it is taken out again.

    Args:
        model: edited; at ``original`` on return.
        original: the tensors of before, by parameter name.
    """
    parameters = dict(model.named_parameters())
    unknown = sorted(set(original) - set(parameters))
    if unknown:
        raise ModelError(f"{unknown[0]} is no parameter of this model")
    before = {name: value.detach().to(parameters[name].data) for name, value in original.items()}
    moved = [name for name in original if not torch.equal(parameters[name].data, before[name])]
    weights = {name: parameters[name].detach().clone() for name in moved}
    # Such methods write into the model's own storage, which other edits may hold; it gets its old numbers back there.
    apply_snapshot(parameters, {name: before[name] for name in moved})
    now = {name: parameters[name].data for name in moved}
    return Edit(tuple(requests), weights, now, base_model, method, settings or {}, transposed=find_transposed(model, moved))


def _read_request(row: Mapping[str, Any]) -> EditRequest:
    """A saved request; those of older edits have no ``rephrasings``."""
    pairs = tuple((text, completion) for text, completion in row["augmentation"])
    return EditRequest(**{**row, "augmentation": pairs, "rephrasings": tuple(row.get("rephrasings", ()))})
