"""An edit as a thing: kept, applied, undone, saved, loaded, and handed on as a LoRA. It does not know which method made it."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from propmeta_edit.edits.identity import hash_once, hash_tensors, take_fingerprint, take_fingerprints, take_identity
from propmeta_edit.edits.lora import approximate, write_exact_lora, write_factors_as_lora, write_lora
from propmeta_edit.edits.saved import (
    BASE,
    CONFIG,
    DTYPE,
    PACKED,
    WEIGHTS,
    Saved,
    as_tensors,
    pack,
    read_base,
    read_factors,
    read_request,
    require_of_kind,
)
from propmeta_edit.errors import ConfigError, ModelError, RequestError
from propmeta_edit.finetune.learning import Learning
from propmeta_edit.finetune.low_rank import Factors, LowRankWeights
from propmeta_edit.finetune.single_edit import put_in_place
from propmeta_edit.finetune.weights import apply_snapshot
from propmeta_edit.finetune.written_inputs import forget_replaced, remember_inputs
from propmeta_edit.models.artefacts import build_whole
from propmeta_edit.models.factors import base_below, matrix_of, rank_of
from propmeta_edit.models.layers import FACTORS
from propmeta_edit.models.ownership import locked, owned
from propmeta_edit.models.states import put_back_after, to_the_end
from propmeta_edit.models.wrappers import unwrap
from propmeta_edit.protocols import LanguageModel
from propmeta_edit.records import EditRequest, as_requests

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Applied:
    """An edit that stands in a model, the tensors it took the place of, and the fingerprints of what it put there."""

    edit: Edit
    replaced: Mapping[str, torch.Tensor]
    put: Mapping[str, str]


_STANDING: WeakKeyDictionary[LanguageModel, list[_Applied]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Edit:
    """What an edit did to some tensors of a model.

    Args:
        requests: the facts it wrote.
        weights: the edited tensors, by parameter name, as they are after the edit. Of an edit that was computed as factors
            (``inner_step: whitened``) these are ``LowRankWeights``: each is made when it is asked for, and a loaded edit, which
            does not know W₀, has none to give.
        before: the same tensors before it; None for an edit that was loaded, which knows their hash alone.
        base: what every parameter held without any edit (``take_base``), so that two models that differ elsewhere are told apart.
        base_model: the name or path of the model it was made on, for people.
        method: ``MetaFT``, ``ROME``, ...
        settings: of the method, as plain values.
        hash_before: given only for a loaded edit.
        transposed: those weights that are [in, out] (GPT-2's projections), as a LoRA of them has to know.
        fingerprints: of ``before`` (``take_fingerprints``); taken here if not given; edits of one state share them.
        learning: how the inner loop went, where this process ran it; it is not saved.
    """

    requests: tuple[EditRequest, ...]
    weights: Mapping[str, torch.Tensor] = field(repr=False)
    before: Mapping[str, torch.Tensor] | None = field(repr=False)
    base: Mapping[str, str] = field(repr=False)
    base_model: str = ""
    method: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    hash_before: str | None = None
    transposed: tuple[str, ...] = ()
    fingerprints: Mapping[str, str] | None = field(default=None, repr=False)
    learning: Learning | None = None

    def __post_init__(self) -> None:
        # ``before`` is the model's own storage: what is known of it now tells whether someone writes into it later.
        if self.before is not None:
            known = take_fingerprints(self.before) if self.fingerprints is None else self.fingerprints
            object.__setattr__(self, "fingerprints", {name: known[name] for name in self.before})  # an edit's part has some of them

    @cached_property
    def base_sha256(self) -> str:
        """Of the edited tensors before the edit: which model state this edit belongs on."""
        return self.hash_before or hash_tensors(self._unchanged_before())

    @property
    def factors(self) -> Factors | None:
        """By parameter name (A [r, in], B [out, r]), whose product is the change; None of an edit that is not kept as factors."""
        return self.weights.factors if isinstance(self.weights, LowRankWeights) else None

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the tensors that it moves."""
        return self.weights.shapes if isinstance(self.weights, LowRankWeights) else {n: v.shape for n, v in self.weights.items()}

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Likewise."""
        if isinstance(self.weights, LowRankWeights):
            return dict.fromkeys(self.weights, self.weights.dtype)
        return {name: value.dtype for name, value in self.weights.items()}

    def weights_on(self, before: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The edited tensors, given those of the model that it was made on; they may be the edit's own."""
        return self.weights.on(before) if isinstance(self.weights, LowRankWeights) else self.weights

    def only(self, names: Collection[str]) -> Edit:
        """The part of it that moves these tensors alone."""
        before = None if self.before is None else {name: value for name, value in self.before.items() if name in names}
        if isinstance(self.weights, LowRankWeights):
            weights: Mapping[str, torch.Tensor] = self.weights.only(names, before)
        else:
            weights = {name: value for name, value in self.weights.items() if name in names}
        return replace(self, weights=weights, before=before, hash_before=None)

    def apply(self, model: LanguageModel) -> None:
        """Let the model stand edited until ``undo``.

        On the state it was made on, the model then holds the edit's tensors to the bit. Tensors that other edits move which were
        made on the same state and stand already get the changes added up, in the order of application.

        Raises:
            ModelError: the model lacks these tensors or is another one (``pin_to`` if it shall serve all the same), this edit
                stands already, or the model cannot be edited as it is (``models.ownership.owned``).
        """
        with owned(model) as plain:
            values = self._find_values(plain)
            self._check_rest(take_base(plain))
            self._stand(plain, values)

    def undo(self, model: LanguageModel) -> None:
        """Take the edit out again; ``Edit`` objects applied after it stay, as if it had never been there.

        Exact: the last edit goes to the bit, and without any edit the tensors are those of before. Edits of the same tensors that
        were made while this one stood cannot stand without it. What anything else wrote into these tensors meanwhile, an EasyEdit
        method say, goes too, with a warning: make it an edit first (``edit_from_weights``).

        Raises:
            ModelError: it does not stand in this model, or edits made on top of it do.
        """
        with owned(model) as plain:
            standing = _STANDING.get(plain, [])
            place = next((number for number, entry in enumerate(standing) if entry.edit is self), None)
            if place is None:
                raise ModelError("this edit does not stand in the model")
            taken = standing[place:]
            parameters = {name: p for entry in taken for name, p in self._parameters_of(plain, entry.put).items()}
            as_they_stand = {name: parameter.data for name, parameter in parameters.items()}
            try:
                for entry in reversed(taken):
                    self._warn_if_written_to(plain, entry)
                    self._put_back(plain, entry)
                del standing[place:]
                _stand_again(plain, [entry.edit for entry in taken[1:]])
            except BaseException:
                standing[place:] = taken
                to_the_end(lambda: put_in_place(parameters, as_they_stand))
                raise

    @contextmanager
    def applied(self, model: LanguageModel) -> Iterator[LanguageModel]:
        """Inside, the model is edited, and other threads that want it (a view, say) wait; outside it is what it was."""
        with locked(unwrap(model)):
            stood = self in standing_edits(model)
            with put_back_after(lambda: self._undo_unless(stood, model)):
                self.apply(model)
                yield model

    def _undo_unless(self, stood: bool, model: LanguageModel) -> None:
        if not stood and self in standing_edits(model):
            self.undo(model)

    def change(self, model: LanguageModel | None = None) -> dict[str, torch.Tensor]:
        """``W - W₀`` by name; a loaded edit needs the unedited model to know W₀, but where it is kept as factors.

        Raises:
            ModelError: a loaded edit and no model, or another model.
        """
        if isinstance(self.weights, LowRankWeights):
            return self.weights.changes()
        before = self._before_on(model)
        return {name: value.to(before[name].device) - before[name] for name, value in self.weights.items()}

    def _before_on(self, model: LanguageModel | None) -> Mapping[str, torch.Tensor]:
        """W₀, from the model it was made on if the edit was loaded."""
        if self.before is not None:
            return self._unchanged_before()
        if model is None:
            raise ModelError("a loaded edit holds the tensors after it alone; give the model it was made on")
        with owned(model) as plain:
            self.require_made_on(plain)
            return {name: p.data for name, p in self._parameters_of(plain).items()}

    def pin_to(self, model: LanguageModel, base_model: str | None = None) -> Edit:
        """The same tensors as an edit of this model: for a base that was built elsewhere, or another one that is to be tried.

        Of an edit that is kept as factors, the same change. Edits that stand in the model do not count.

        Args:
            base_model: its name or path, for people and for ``propmeta-edit ask``; where it was loaded from, if not given.

        Raises:
            ModelError: the model lacks its tensors, or has them in another shape or dtype.
        """
        with owned(model) as plain:
            originals, base = _originals(plain), take_base(plain)
            before = {name: originals.get(name, parameter.data) for name, parameter in self._parameters_of(plain).items()}
        for name, value in before.items():
            if value.dtype != self.dtypes[name]:
                raise ModelError(
                    f"{name} is {value.dtype} in this model and {self.dtypes[name]} in the edit; load the model with its "
                    "edited layers in that dtype (load_model's layers)"
                )
        where = getattr(plain.config, "_name_or_path", "") if base_model is None else base_model
        weights = self.weights.only(self.weights, before) if isinstance(self.weights, LowRankWeights) else self.weights
        return replace(self, weights=weights, before=before, base_model=where, hash_before=None, base=base, fingerprints=None)

    def save(self, folder: str | Path, *, tolerance: float | None = None, model: LanguageModel | None = None) -> Saved:
        """Write ``edit_model.safetensors`` and ``edit_config.json`` into a new folder, both or none.

        An edit that is kept as factors is written as factors: loaded, it gives a model the same bits.

        Args:
            tolerance: what may be lost, 0.1 say, for a folder that is as small as that allows: each matrix keeps the singular
                values that it needs, as factors in bf16 where that does; changes of biases are left out.
            model: the unedited model, for a loaded edit that is not kept as factors, with a tolerance.

        Raises:
            ConfigError: a tolerance that is not between 0 and 1.
            ModelError: the folder exists; with a tolerance, an edit of something else than projections.
            OSError: it cannot be written.
        """
        folder = Path(folder)
        if folder.exists():
            raise ModelError(f"{folder} exists; choose another folder for the edit")
        small, lost = (self, 0.0) if tolerance is None else self._compress(tolerance, model)
        small._write(folder)
        return Saved(sum(file.stat().st_size for file in folder.iterdir()), lost)

    def _compress(self, tolerance: float, model: LanguageModel | None) -> tuple[Edit, float]:
        """It as factors of as few numbers as the tolerance allows, and what they lose."""
        before = self.before if self.factors else self._before_on(model)
        found, lost = approximate(self.factors or self.change(model), tolerance=tolerance, transposed=self.transposed)
        kept = None if before is None else {name: before[name] for name in found}
        dtype = max(self.dtypes.values(), key=lambda one: one.itemsize)
        weights, known = LowRankWeights(found, self.transposed, dtype, kept), self.hash_before if kept is None else None
        return replace(self, weights=weights, before=kept, hash_before=known, fingerprints=None), lost

    def _write(self, folder: Path) -> None:
        tensors = self.weights if self.factors is None else as_tensors(self.factors)
        config = {
            "requests": [asdict(request) for request in self.requests],
            "base_model": self.base_model,
            "base_sha256": self.base_sha256,
            "method": self.method,
            "settings": dict(self.settings),
            "tensors": {name: list(shape) for name, shape in self.shapes.items()},
            "transposed": list(self.transposed),
            "sha256": hash_tensors(tensors),
        }
        if isinstance(self.weights, LowRankWeights):
            config[DTYPE] = str(self.weights.dtype).removeprefix("torch.")

        def build(partial: Path) -> None:
            own = {name: value.detach().contiguous().cpu() for name, value in tensors.items()}
            save_file(own, partial / WEIGHTS, {PACKED: pack(self.base)})  # a hash a tensor, which nobody reads
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
            tensors = load_file(folder / WEIGHTS)
            config = {**read_base(folder / WEIGHTS), **config}  # in the configuration itself, if the edit is of an older version
            requests = tuple(read_request(row) for row in config["requests"])
            expected, transposed = config["sha256"], tuple(config["transposed"])
            base_model, method, base_sha256 = (
                require_of_kind(str, config, name) for name in ("base_model", "method", "base_sha256")
            )
            settings, base = (require_of_kind(dict, config, name) for name in ("settings", BASE))
            weights = read_factors(tensors, config) if DTYPE in config else tensors
            edit = cls(requests, weights, None, base, base_model, method, settings, base_sha256, transposed)
        except FileNotFoundError as error:
            raise ModelError(
                f"{folder} holds no whole edit, which is {WEIGHTS} and {CONFIG}: {error}; name a folder that propmeta-edit "
                "edit --save or Edit.save wrote"
            ) from error
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RequestError, zlib.error) as error:
            raise ModelError(f"the edit in {folder} is damaged ({error}); save it again") from error
        if hash_tensors(tensors) != expected:
            raise ModelError(f"the edit in {folder} is damaged: {WEIGHTS} is not what {CONFIG} says; save it again")
        return edit

    def save_lora(
        self, folder: str | Path, rank: int | None = None, model: LanguageModel | None = None, *, tolerance: float | None = None
    ) -> float:
        """Write the change as a PEFT LoRA, which keeps its largest singular values and has no place for biases.

        An edit of a model with factors (``models.factors``) is a LoRA already, and is written as it is: on the model below the
        factors, with what they were before the edit; ``rank`` must be theirs. An edit that is kept as factors
        (``inner_step: whitened``) is written as these, exactly, where neither a rank nor a tolerance is given.

        Args:
            rank: of every matrix, 1 or more.
            model: the unedited model, for a loaded edit that is not kept as factors.
            tolerance: in place of a rank, what may be lost, 0.05 say: each matrix gets the rank that it needs, and bf16 where that
                does.

        Returns:
            What that loses: the norm of what is left out, biases included, over the norm of the change.

        Raises:
            ConfigError: a rank below 1, a tolerance that is not between 0 and 1, or not one of the two.
            ModelError: the folder exists, or the edit moves something that is neither a projection's matrix nor a bias.
        """
        if all(f".{FACTORS}." in name for name in self.weights):
            if rank != rank_of(self.weights):
                raise ConfigError(f"the edit's factors are of rank {rank_of(self.weights)}, got {rank}; give that one")
            below = base_below(self.base_model)
            write_factors_as_lora(self.weights, Path(folder), is_transposed=bool(self.transposed), base_model=below)
            return 0.0
        transposed, base_model = self.transposed, self.base_model
        if rank is None and tolerance is None and self.factors:
            write_exact_lora(self.factors, Path(folder), is_transposed=bool(transposed), base_model=base_model)
            return 0.0
        change = self.factors or self.change(model)
        return write_lora(change, Path(folder), rank, tolerance, transposed=transposed, base_model=base_model)

    def _find_values(self, model: LanguageModel) -> dict[str, torch.Tensor]:
        """What the edited tensors become when this edit is applied to the model as it stands."""
        standing = _STANDING.get(model, [])
        if any(entry.edit is self for entry in standing):
            raise ModelError("this edit stands in the model already; undo it first")
        originals = _originals(model)
        current = {name: parameter.data for name, parameter in self._parameters_of(model).items()}
        if self._is_base(current):
            # Copies: methods such as EasyEdit's write into what stands in a model, and this edit is to stay what it is.
            return {n: value.to(current[n].device, copy=True) for n, value in self.weights_on(current).items()}
        below = {name: originals.get(name, value).to(value.device) for name, value in current.items()}
        if not self._is_base(below):
            raise self._foreign(current, "with the edits standing that stood then" if standing else "")
        edited = self.weights_on(below)
        own = {name: value.to(current[name].device, copy=True) for name, value in edited.items() if name not in originals}
        # Where others stand, changes are added: W = W₀ + Σ (Wᵢ - W₀), in the order of application.
        shared = {name: now + (edited[name].to(now.device) - below[name]) for name, now in current.items() if name not in own}
        return own | shared

    def _stand(self, model: LanguageModel, values: Mapping[str, torch.Tensor]) -> None:
        parameters = self._parameters_of(model)
        replaced = {name: parameter.data for name, parameter in parameters.items()}
        entry, standing = _Applied(self, replaced, take_fingerprints(values)), _STANDING.setdefault(model, [])
        try:
            standing.append(entry)
            forget_replaced(model)
            put_in_place(parameters, values)
        except BaseException:
            to_the_end(lambda: put_in_place(parameters, replaced))
            standing[:] = [other for other in standing if other is not entry]
            raise
        if isinstance(self.weights, LowRankWeights):
            remember_inputs(model, self.weights.inputs)

    def _warn_if_written_to(self, model: LanguageModel, entry: _Applied) -> None:
        """Say so before numbers are lost that no ``Edit`` holds."""
        now = self._parameters_of(model, entry.put)
        changed = [name for name, known in entry.put.items() if take_fingerprint(now[name].data) != known]
        if changed:
            LOG.warning(
                "%d tensors were written to while an edit stood in them (%s): taking it out takes that out as well; to keep such "
                "changes make an edit of them before (edit_from_weights)",
                len(changed),
                changed[0],
            )

    def _put_back(self, model: LanguageModel, entry: _Applied) -> None:
        """The tensors that an edit took the place of, wherever the model is by now."""
        parameters = self._parameters_of(model, entry.replaced)
        put_in_place(parameters, {name: value.to(parameters[name].device) for name, value in entry.replaced.items()})

    def require_made_on(self, model: LanguageModel, base: Mapping[str, str] | None = None) -> None:
        """Refuse a model that, as it stands, is not what the edit was made on.

        Args:
            base: ``take_base(model)``, if it is known already.

        Raises:
            ModelError: another model; it lacks the edit's tensors, or has them in other shapes.
        """
        with owned(model) as plain:
            current = {name: p.data for name, p in self._parameters_of(plain).items()}
            if not self._is_base(current):
                raise self._foreign(current)
            self._check_rest(take_base(plain) if base is None else base)

    def _check_rest(self, found: Mapping[str, str]) -> None:
        """Compare all that the edit does not move."""
        names = sorted((set(self.base) | set(found)) - set(self.weights))
        other = [name for name in names if self.base.get(name) != found.get(name)]
        if other:
            raise ModelError(
                f"this edit was made on another model ({self.base_model or 'unnamed'}): {len(other)} tensors that it does not move "
                f"differ here, {', '.join(other[:3])}{', ...' if len(other) > 3 else ''}; apply it to the model it was made on, or "
                "take out what was written into this one since, or pin the edit to it (Edit.pin_to, propmeta-edit ask --any-base)"
            )

    def _foreign(self, current: Mapping[str, torch.Tensor], how: str = "") -> ModelError:
        rounded = [name for name, dtype in self.dtypes.items() if current[name].dtype.itemsize < dtype.itemsize]
        why = ""
        if rounded:
            name = rounded[0]
            why = (
                f". {name} is {current[name].dtype} here and {self.dtypes[name]} in the edit, and so was rounded while "
                'loading: read the model with propmeta_edit.load_model, or from_pretrained(..., dtype="float32")'
            )
        return ModelError(
            f"this edit was made on other weights ({self.base_model or 'an unnamed model'}, sha256 {self.base_sha256[:12]}... of "
            f"{len(self.weights)} tensors) than this model has now; apply it to the model it was made on"
            f"{how and ', ' + how}, or pin it to this one (Edit.pin_to, propmeta-edit ask --any-base){why}"
        )

    def _parameters_of(self, model: LanguageModel, names: Mapping[str, Any] | None = None) -> dict[str, nn.Parameter]:
        parameters = dict(model.named_parameters())
        chosen, shapes = self.weights if names is None else names, self.shapes
        for name in chosen:
            if name not in parameters or parameters[name].shape != shapes.get(name, parameters[name].shape):
                raise ModelError(f"this edit moves {name} {tuple(shapes[name])}, which does not fit this model")
        return {name: parameters[name] for name in chosen}

    def _unchanged_before(self) -> Mapping[str, torch.Tensor]:
        before = self.before or {}
        if not self._fits_fingerprints(before):
            raise ModelError("the model's tensors were written to since this edit was made; save an edit before changing its model")
        return before

    def _fits_fingerprints(self, values: Mapping[str, torch.Tensor]) -> bool:
        known = self.fingerprints or {}
        return all(take_fingerprint(values[name]) == fingerprint for name, fingerprint in known.items())

    def _is_base(self, values: Mapping[str, torch.Tensor]) -> bool:
        return self._fits_fingerprints(values) if self.before is not None else hash_once(values) == self.base_sha256


def _stand_again(model: LanguageModel, edits: Sequence[Edit]) -> None:
    """Let edits stand without one that stood below them.

    Raises:
        ModelError: one of them was made on top of that one; some may stand then.
    """
    try:
        for edit in edits:
            edit._stand(model, edit._find_values(model))
    except ModelError as error:
        raise ModelError("an edit that was made on top of this one stands in the model; undo that one first") from error


def _originals(model: LanguageModel) -> dict[str, torch.Tensor]:
    """The tensors that the model would have without the edits that stand in it, of those that they move."""
    found: dict[str, torch.Tensor] = {}
    for entry in reversed(_STANDING.get(model, [])):  # the first that stands has the oldest
        found.update(entry.replaced)
    return found


def take_base(model: LanguageModel) -> dict[str, str]:
    """``take_identity`` of a model as if none of the edits stood that stand in it, so that an edit fits with others and without.

    What something else wrote into the model, an EasyEdit method say, counts: with it, it is another base.
    """
    return take_identity(model, _originals(model))


def find_transposed(model: LanguageModel, names: Iterable[str]) -> tuple[str, ...]:
    """Those parameters that are weights of GPT-2's projections, [in, out], or factors beside one."""
    return tuple(n for n in names if n.endswith(".weight") and _is_transposed(model.get_submodule(matrix_of(n))))


def _is_transposed(projection: Any) -> bool:
    return isinstance(projection, Conv1D) or bool(getattr(projection, "fan_in_fan_out", False))


def standing_edits(model: LanguageModel) -> list[Edit]:
    """The edits that stand in a model, in the order of application."""
    return [entry.edit for entry in _STANDING.get(unwrap(model), [])]


def edit_from_weights(
    model: LanguageModel,
    original: Mapping[str, torch.Tensor],
    requests: Sequence[EditRequest | Mapping[str, Any]],
    *,
    method: str,
    base_model: str = "",
    settings: Mapping[str, Any] | None = None,
) -> Edit:
    """The edit that any method left in a model, from the weights of before that EasyEdit's editors return; it is taken out again.

    Args:
        model: edited; at ``original`` on return.
        original: the tensors of before, by parameter name.
        requests: the facts that it wrote, as ``EditRequest`` or as EasyEdit has them.

    Raises:
        RequestError: no request, or one that is none; the model is left edited then.
        ModelError: a tensor that the model does not have, or no tensor that differs from ``original``.
    """
    written = tuple(as_requests(requests))
    with owned(model) as plain:
        parameters = dict(plain.named_parameters())
        unknown = sorted(set(original) - set(parameters))
        if unknown:
            raise ModelError(f"{unknown[0]} is no parameter of this model")
        before = {name: value.detach().to(parameters[name].data) for name, value in original.items()}
        moved = [name for name in original if not torch.equal(parameters[name].data, before[name])]
        if not moved:
            raise ModelError(
                f"there is no edit in this model: none of the {len(original)} tensors given differs from what it has now. "
                "EasyEdit's editors put the weights back after each request: call edit(..., sequential_edit=True) with one "
                "request, which stays"
            )
        weights = {name: parameters[name].detach().clone() for name in moved}
        # Such methods write into the model's own storage, which other edits may hold; it gets its old numbers back there.
        apply_snapshot(parameters, {name: before[name] for name in moved})
        now = {name: parameters[name].data for name in moved}
        transposed = find_transposed(plain, moved)
        return Edit(written, weights, now, take_base(plain), base_model, method, settings or {}, transposed=transposed)


def merge_edits(model: LanguageModel, edits: Sequence[Edit]) -> Edit:
    """Several edits as one, which can be saved: what the model holds with all of them applied in this order.

    Exact where each moves tensors of its own. In tensors that several move, their changes are added up, W₀ + Σ (Wᵢ - W₀), and they
    disturb each other as they do when they stand together. Edits that were made on top of one another can be merged as well.

    Args:
        model: what they were made on; left as it is. It is needed for W₀, which loaded edits do not hold.

    Raises:
        ModelError: no edits, one twice, or one of another model.
    """
    if not edits:
        raise ModelError("there is nothing to merge; give one edit or more")
    with owned(model) as plain, ExitStack() as standing:
        parameters = dict(plain.named_parameters())
        everything = {name: parameter.data for name, parameter in parameters.items()}
        for edit in edits:
            standing.enter_context(edit.applied(plain))
        weights = {name: parameters[name].data for edit in edits for name in edit.weights}
        standing.close()
        before = {name: everything[name] for name in weights}
        base, transposed = take_base(plain), find_transposed(plain, weights)
    settings = [dict(edit.settings) for edit in edits]
    methods = list(dict.fromkeys(edit.method for edit in edits))
    return Edit(
        tuple(request for edit in edits for request in edit.requests),
        weights,
        before,
        base,
        edits[0].base_model,
        "+".join(methods),
        settings[0] if all(own == settings[0] for own in settings) else {"merged": settings},
        transposed=transposed,
    )
