"""How a model is loaded: the edited tensors in fp32, the frozen rest in the dtype asked for.

Ten steps of 2e-5 are below the spacing of bf16 numbers near a weight of 0.02 and would mostly vanish, so the tensors that either
loop moves stay in fp32 through meta-training, editing, generation, saving and loading. ``metaft.json`` beside a meta-tuned
checkpoint names the tensors that meta-training moved; they are read in fp32 too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from propmeta_edit.errors import ModelError, OriginError
from propmeta_edit.files import sha256_of_file, sha256_of_json, write_json_atomically
from propmeta_edit.models.artefacts import (
    ADAPTER_CONFIG,
    BUNDLED,
    CHECKPOINT_CARD,
    EDIT_CARD,
    find_model_folder,
    holds_factors,
    resolve_model_folder,
)
from propmeta_edit.models.devices import free_memory, is_out_of_memory, memory_errors_named
from propmeta_edit.models.factors import attach_factors, read_factors
from propmeta_edit.models.layers import FACTORS, cast_around, factored_modules, get_architecture, select_parameters
from propmeta_edit.models.wrappers import merge_adapters
from propmeta_edit.protocols import LanguageModel, ModelConfig, Tokenizer
from propmeta_edit.text.encoding import TextEncoder

HARMLESS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")  # buffers of old files
HEAD = "lm_head.weight"  # in the files or not, where it is the embedding
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors calls them
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name_or_path: str,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    layers: Sequence[int] | str | None = None,
    modules: str = "attention+mlp",
    rank: int | None = None,
    spread: Sequence[int] | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a model for editing or evaluation.

    Args:
        name_or_path: a folder, a bundled name, or a hub id; an adapter of peft is merged into its base.
        device: a torch device string.
        dtype: of the frozen rest: ``float32``, ``bfloat16``, ``float16``, or ``auto`` for what the checkpoint is stored in.
        layers, modules: what will be edited; these tensors are fp32 whatever ``dtype`` says. An empty list of layers: nothing.
        rank: give them factors of that rank, which are edited in their place (``models.factors``); a checkpoint of factors has its
            own.
        spread: numbers of the CUDA devices over which transformers spreads the blocks, evenly; not with ``rank``.
        trust_remote_code: run code that comes with the model; off unless asked.

    Returns:
        (model in eval mode, tokenizer that pads on the left and has a pad token).

    Raises:
        ModelError: unknown name, unsupported architecture, weights that do not fit the architecture, unknown dtype.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype must be one of {', '.join(DTYPES)}, auto, got {dtype!r}")
    with memory_errors_named(
        f"while loading {name_or_path}: there is no room for it on {device} in {dtype}; take --device cpu, --dtype bfloat16 "
        "(dtype: bfloat16 in a YAML), or stop what else holds the memory"
    ):
        return _load(name_or_path, device, dtype, layers, modules, rank, spread, trust_remote_code)


def _load(
    name_or_path: str,
    device: str,
    dtype: str,
    layers: Sequence[int] | str | None,
    modules: str,
    rank: int | None,
    spread: Sequence[int] | None,
    trust_remote_code: bool,
) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model_folder(name_or_path)
    if holds_factors(folder):
        return _load_with_factors(folder, device, dtype, rank, trust_remote_code)
    if rank is not None:
        model, tokenizer = load_model(folder, dtype=dtype, layers=[], trust_remote_code=trust_remote_code)
        attach_factors(model, layers, modules, rank)
        return model.to(device), tokenizer
    kept = _trained_tensor_names(folder)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=_dtype_of_rest(folder, kept) if dtype == "auto" else DTYPES[dtype],
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            # The fused kernel's backward is several times slower than plain products on CPUs, for texts as short as these.
            attn_implementation="eager" if torch.device(device).type == "cpu" else None,
            output_loading_info=True,
            **({} if spread is None else {"device_map": "balanced", "max_memory": _memory_of(spread)}),
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged folder makes transformers raise almost anything
        if is_out_of_memory(error):
            raise
        raise ModelError(f"cannot load a model from {name_or_path!r}: {error}") from error
    if (Path(folder) / ADAPTER_CONFIG).is_file():
        merge_adapters(model)
    _check_weights_fit(name_or_path, model, report)
    edited = select_parameters(model, layers, modules) if layers is None or len(layers) else {}
    names = {*edited, *kept}
    if model.dtype != torch.float32:
        keep_in_fp32(model, folder, names)
    prepare_tokenizer(tokenizer, model.config)
    return (model if spread is not None else model.to(device)).eval(), tokenizer


def _memory_of(devices: Sequence[int]) -> dict[int, int]:
    """Bytes that are free on each; transformers uses no other device then."""
    return {number: free_memory(torch.device("cuda", number)) for number in devices}


def _load_with_factors(folder: str, device: str, dtype: str, rank: int | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """A checkpoint that is a LoRA: its base, with the factors in it."""
    base = read_checkpoint_card(folder)["base_model"]
    require_trained_from(folder, base, model_sha256(resolve_model_folder(base)), "name a checkpoint of this base")
    model, tokenizer = load_model(base, dtype=dtype, layers=[], trust_remote_code=trust_remote_code)
    read_factors(model, Path(folder))
    found = {module.r[FACTORS] for module in factored_modules(model).values()}
    if rank is not None and found != {rank}:
        raise ModelError(f"the factors in {folder} are of rank {max(found)}, and rank says {rank}; leave rank out")
    model.config._name_or_path = folder
    return model.to(device).eval(), tokenizer


def load_encoder(name_or_path: str) -> TextEncoder:
    """A model's tokenizer held against its ``config.json``; no weights are read.

    Raises:
        ModelError: either is missing, or they cannot be used together.
    """
    from transformers import AutoTokenizer

    config = read_model_config(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(find_model_folder(name_or_path) or name_or_path)
    except Exception as error:  # a damaged file makes transformers raise almost anything
        raise ModelError(f"cannot read the tokenizer of {name_or_path!r}: {error}") from error
    prepare_tokenizer(tokenizer, config)
    return TextEncoder(tokenizer, config)


def read_model_config(name_or_path: str) -> Any:
    """A model's ``config.json`` alone, of a folder, a bundled model, or the hub: no weights are read, built or fetched.

    Raises:
        ModelError: there is none, or the bundled model was not prepared yet.
    """
    from transformers import AutoConfig

    folder = find_model_folder(name_or_path)
    if folder is None and name_or_path in BUNDLED:
        raise ModelError(f"{name_or_path} is not on this machine yet; run: propmeta-edit prepare {name_or_path}")
    try:
        return AutoConfig.from_pretrained(folder or name_or_path)
    except Exception as error:  # a damaged file makes transformers raise almost anything
        raise ModelError(f"cannot read the config.json of {name_or_path!r}: {error}") from error


def prepare_tokenizer(tokenizer: Tokenizer, config: ModelConfig | None = None) -> None:
    """Give it a pad token if it has none that the model knows, and pad on the left, so that texts end together.

    Nothing here needs one: it is for EasyEdit's algorithms.
    """
    size = None if config is None else getattr(config.get_text_config(), "vocab_size", None)
    if tokenizer.pad_token_id is None or (size is not None and tokenizer.pad_token_id >= size):
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"


def _check_weights_fit(name: str, model: LanguageModel, report: dict[str, Any]) -> None:
    get_architecture(model)
    kinds = ("missing_keys", "mismatched_keys", "unexpected_keys")
    is_tied = getattr(model.config, "tie_word_embeddings", False)
    found = {kind: {str(key) for key in report.get(kind) or ()} - ({HEAD} if is_tied else set()) for kind in kinds}
    wrong = {kind: sorted(key for key in keys if not HARMLESS.search(key))[:3] for kind, keys in found.items()}
    if any(wrong.values()):
        raise ModelError(
            f"the weights in {name!r} are not those of its config.json (a {model.config.model_type} model of "
            f"{model.config.num_hidden_layers} layers): {wrong}; use a checkpoint of the same architecture"
        )


def _trained_tensor_names(folder: str) -> list[str]:
    """What meta-training moved, and an edit that was put together with its base."""
    names = list(read_checkpoint_card(folder)["trained_tensors"]) if (Path(folder) / CHECKPOINT_CARD).is_file() else []
    edit = Path(folder) / EDIT_CARD
    return names + (list(json.loads(edit.read_text(encoding="utf-8"))["tensors"]) if edit.is_file() else [])


def _dtype_of_rest(folder: str, kept: Collection[str]) -> torch.dtype | str:
    """What the tensors beside those that are fp32 always are stored in, where config.json speaks of these (``_say_fp32``)."""
    from safetensors import safe_open

    for file in sorted(Path(folder).glob("*.safetensors")) if kept else ():
        with safe_open(str(file), framework="pt") as reader:  # type: ignore[no-untyped-call]
            names = [name for name in reader.keys() if name not in kept]  # noqa: SIM118 (it is no mapping)
            stored = {reader.get_slice(name).get_dtype() for name in names} & set(STORED)
            if stored:
                return min((STORED[dtype] for dtype in stored), key=lambda one: one.itemsize)
    return "auto"


def read_checkpoint_card(folder: str | Path) -> dict[str, Any]:
    """What ``metaft.json`` says of a meta-tuned checkpoint.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    path = Path(folder) / CHECKPOINT_CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{folder} is not a meta-tuned checkpoint: it has no {CHECKPOINT_CARD}; one is made of a model by: propmeta-edit "
            f"meta-train --model {folder} --data FILE --output FOLDER"
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}") from error
    if (
        not isinstance(card, dict)
        or not isinstance(card.get("trained_tensors"), list)
        or not isinstance(card.get("settings"), dict)
    ):
        raise ModelError(f"{path} is damaged: it must hold trained_tensors and settings; make the checkpoint anew")
    return card


def require_trained_from(checkpoint: str | Path, base: str, base_sha256: str, remedy: str) -> dict[str, Any]:
    """The card of a checkpoint, which must have been meta-trained from these weights.

    Args:
        base, base_sha256: the name of a model, and its hash (``model_sha256``).
        remedy: what the user can do where it was not.

    Raises:
        ModelError: no card, or a damaged one.
        OriginError: it was meta-trained from other weights.
    """
    card = read_checkpoint_card(checkpoint)
    if card["base_sha256"] != base_sha256:
        raise OriginError(
            f"{checkpoint} was meta-trained from other weights ({card['base_model']}, sha256 {card['base_sha256'][:12]}...) than "
            f"{base} has (sha256 {base_sha256[:12]}...); {remedy}"
        )
    return card


def save_model(model: LanguageModel, tokenizer: Tokenizer, folder: Path, trained: Iterable[str] = ()) -> None:
    """Write weights (each tensor in the dtype it has) and tokenizer.

    Args:
        trained: parameters that are read back from the files, and must be there to the bit.

    Raises:
        ModelError: they cannot be written, for instance because the disk is full, or are not what was to be written.
    """
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot write the model to {folder}: {error}") from error
    parameters = {name: model.get_parameter(name).detach().cpu() for name in trained}
    for name, parameter in parameters.items():
        stored = read_tensors(folder, {name}, model.base_model_prefix)[name]
        if stored.dtype != parameter.dtype or not torch.equal(stored, parameter):
            raise ModelError(f"{name} in {folder} is not the tensor that was trained: transformers saved another one")
    if any(parameter.dtype == torch.float32 != model.dtype for parameter in parameters.values()):
        _say_fp32(folder)


def _say_fp32(folder: Path) -> None:
    """Let config.json name fp32, so that transformers rounds no tensor while loading; by itself it names that of the first one."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    write_json_atomically(folder / "config.json", {**config, "dtype": "float32"})


def keep_in_fp32(model: LanguageModel, folder: str, names: Iterable[str]) -> None:
    """Put the named tensors of a half-precision model into fp32, with the values the checkpoint holds, and cast around them.

    Raises:
        ModelError: a named tensor is not in the folder's safetensors files.
    """
    names = set(names)
    stored = read_tensors(Path(folder), names, model.base_model_prefix)
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{leaf}"
            if name in names:
                setattr(
                    module, leaf, nn.Parameter(stored[name].float().to(parameter.device), requires_grad=parameter.requires_grad)
                )
                cast_around(module)


def read_tensors(folder: Path, names: set[str], prefix: str = "") -> dict[str, torch.Tensor]:
    """Some tensors of a model folder as they are stored, by their name in the model; nothing else is read.

    Args:
        prefix: of the base model, which some files leave out of the names.

    Raises:
        ModelError: files that are damaged, or that lack a tensor.
    """
    from safetensors import safe_open

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(file), framework="pt") as reader:  # type: ignore[no-untyped-call]
                keys = set(reader.keys())
                for name in names:
                    for key in (name, name.removeprefix(prefix + ".")):
                        if key in keys:
                            tensors[name] = reader.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"cannot read tensors from {file}: {error}") from error
    missing = names - tensors.keys()
    if missing:
        raise ModelError(
            f"{len(missing)} tensors that are needed are not in the safetensors files of {folder}, e.g. {min(missing)}"
        )
    return tensors


def model_sha256(folder: str | Path) -> str:
    """One hash over the safetensors files of a model folder, names and contents."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ModelError(f"no safetensors files in {folder}")
    return sha256_of_json([[file.name, sha256_of_file(file)] for file in files])
