"""``MetaFTHyperParams``: what EasyEdit reads, plus what the inner loop needs, plus how the model is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from propmeta_edit.config import build_config, derive_settings, read_yaml
from propmeta_edit.errors import ConfigError
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.models.artefacts import resolve_model_folder
from propmeta_edit.models.devices import resolve_device, resolve_dtype
from propmeta_edit.models.loading import load_model, read_checkpoint_card
from propmeta_edit.settings import find_settings

EASYEDIT_NAMES = {"inner_lr": "lr", "num_inner_steps": "num_steps"}  # for what ``EditSettings`` calls otherwise


class ModelReference(str):
    """A model's name that loads the model when it is unpacked.

    EasyEdit tests ``type(model_name) is str`` and, for anything else, does ``model, tok = model_name``. Going that way the
    loader, the dtype and the padding are ours for every family and any folder name. EasyEdit later looks for families' words
    in ``model_name.lower()``; that answers with the architecture's name, so that no word of a path can mislead it.
    """

    def __new__(cls, name: str, hparams: MetaFTHyperParams) -> ModelReference:
        reference = super().__new__(cls, name)
        reference.hparams = hparams
        reference.model_type = ""
        return reference

    hparams: MetaFTHyperParams
    model_type: str

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        model, tokenizer = self.hparams.load_model()
        self.model_type = model.config.model_type
        yield from (model, tokenizer)

    def lower(self) -> str:
        return self.model_type or str.lower(self)

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (str(self),)


class FromYaml:
    """Settings that are read the way EasyEdit reads its own."""

    alg_name: str

    @classmethod
    def from_hparams(cls, hparams_name_or_path: str | Path) -> Self:
        """Read a YAML file, in which numbers written as text are numbers.

        Args:
            hparams_name_or_path: a path, to which ``.yaml`` is added if missing, or the name of settings that come with the package
                for this algorithm, as ``smollm2-135m``.

        Raises:
            ConfigError: no such file, broken YAML, unknown or wrongly typed settings.
        """
        path = str(find_settings(cls.alg_name, hparams_name_or_path))
        values = {key: _number_from_text(value) for key, value in read_yaml(path).items()}
        return build_config(cls, values, path)


@dataclass
class MetaFTHyperParams(FromYaml):
    """Settings of a MetaFT edit through EasyEdit.

    The paper's FT is the same with ``model_name`` naming a model that was not meta-tuned.

    Args:
        model_name: the meta-tuned checkpoint: a folder, a bundled name such as ``smollm2-135m-metaft``, or a hub id.
        alg_name: always ``MetaFT``.
        device: auto, cpu, mps, cuda, cuda:N or N, the number of a CUDA device.
        layers: 0-based layers to edit, ``all``, or null for a quarter of the depth.
        modules: attention, mlp, or attention+mlp.
        rank: of two factors that are moved in place of each matrix (``models.factors``), for a model that has none: fresh ones;
            null for the matrices, or for the factors of a checkpoint that has some.
        lr: α of Eq. 2, EasyEdit's name for it.
        num_steps: K of Eq. 2, EasyEdit's name for it.
        inner_step: adamw, the paper's, or whitened (``finetune.inner_steps``).
        damping: λ of the whitened step.
        positions: the tokens that are written at: all, or the subject's alone, which requests must name then (``finetune.writes``).
        weight_decay: AdamW's.
        loss_reduction: over answer tokens, mean or sum.
        batch_size: target facts in one update; ``edit`` wants 1, ``batch_edit`` writes this many facts together.
        max_length: EasyEdit's bound in its own evaluation; its PyPI release cuts off what is longer, question and answer together.
        dtype: of the frozen rest of the model: float32, bfloat16, float16, auto for bfloat16 on CUDA and float32 elsewhere, or fast
            for bfloat16 wherever the device has it in hardware; the edited tensors are fp32 always.
        tf32: products of fp32 matrices on CUDA round their inputs to TF32, 10 bits of 23; off unless asked.
        fp16: EasyEdit's way to write ``dtype: float16``.
        trust_remote_code: run code that comes with the model; off unless asked.
        model_parallel, evaluation_type, api_key, use_chat_template: read by EasyEdit.
    """

    model_name: str
    alg_name: str = "MetaFT"
    device: int | str | None = "auto"
    layers: list[int] | str | None = None
    modules: str = "attention+mlp"
    rank: int | None = None
    lr: float = 2e-5
    num_steps: int = 10
    inner_step: str = "adamw"
    damping: float = 0.03
    positions: str = "all"
    weight_decay: float = 0.01
    loss_reduction: str = "mean"
    batch_size: int = 1
    max_length: int = 256
    dtype: str = "auto"
    tf32: bool = False
    fp16: bool = False
    trust_remote_code: bool = False
    model_parallel: bool = False
    evaluation_type: str | None = None
    api_key: str | None = None
    use_chat_template: bool = False

    def __post_init__(self) -> None:
        if self.alg_name != "MetaFT":
            raise ConfigError(f"alg_name must be MetaFT for these settings, got {self.alg_name!r}")
        if self.model_parallel:
            raise ConfigError("model_parallel is not available for MetaFT: it edits on one device; set model_parallel: false")
        self.device = resolve_device(self.device)
        self.model_name = ModelReference(str(self.model_name), self)
        _ = self.edit  # refuses values the loop would refuse

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, here or in another process, loads its model as this one does."""
        self.__dict__.update(state)
        self.model_name = ModelReference(str(self.model_name), self)

    @classmethod
    def from_json(cls, path: str | Path) -> MetaFTHyperParams:
        """Read a JSON file with the same keys (JSON is YAML, and read by the same rules)."""
        return build_config(cls, read_yaml(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as EasyEdit's hyper-parameters give them."""
        return {**asdict(self), "model_name": str(self.model_name)}

    @classmethod
    def from_checkpoint(cls, folder: str | Path, **changed: Any) -> MetaFTHyperParams:
        """The settings that a checkpoint was meta-trained with, for an edit of it.

        Args:
            folder: a meta-tuned folder or bundled name.
            changed: settings that are to be others.

        Raises:
            ModelError: no meta-tuned checkpoint.
        """
        trained = read_checkpoint_card(resolve_model_folder(str(folder)))["settings"]
        values = {**edit_settings_of(trained), "dtype": resolve_dtype(trained["dtype"], resolve_device("auto"))}
        return build_config(cls, {**values, "model_name": str(folder), **changed}, str(folder))

    @property
    def edit(self) -> EditSettings:
        """What an edit is made with, under our own names."""
        return derive_settings(EditSettings, self, EASYEDIT_NAMES)

    def load_model(self) -> tuple[Any, Any]:
        """(model, tokenizer), the tensors that will be edited in fp32."""
        device = resolve_device(self.device)  # again: users set a number later, as EasyEdit's own have it
        return load_model(
            str(self.model_name),
            device=device,
            dtype="float16" if self.fp16 else resolve_dtype(self.dtype, device),
            layers=self.layers,
            modules=self.modules,
            rank=self.rank,
            trust_remote_code=self.trust_remote_code,
        )


def edit_settings_of(trained: Mapping[str, Any]) -> dict[str, Any]:
    """MetaFT's settings for an edit as in the inner loop of a meta-training, from that one's settings.

    Args:
        trained: by name, as a YAML in ``hparams/MetaTrain`` or a checkpoint's card has them.

    Raises:
        KeyError: one that ``trained`` lacks.
    """
    known = {field.name for field in fields(MetaFTHyperParams)}
    newer = ("inner_step", "positions", "tf32")  # that there were not always
    chosen = {name: trained.get(name, getattr(EditSettings, name)) for name in newer}
    names = {own: EASYEDIT_NAMES.get(own, own) for own in EditSettings(**chosen).to_dict()}
    return {"alg_name": "MetaFT", **{name: trained[own] for own, name in names.items() if name in known}}


def _number_from_text(value: Any) -> Any:
    """EasyEdit turns every text that reads as a number into a float; whole ones stay whole here, since some settings are counts."""
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    return int(number) if number.is_integer() and "e" not in value.lower() and "." not in value else number
