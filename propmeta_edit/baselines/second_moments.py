"""Second moments of the keys, ``C = E[k kᵀ]``, which MEMIT and AlphaEdit weigh their updates with.

A key is the input of a layer's second MLP projection at one token. All layers are gathered in one pass over the texts, in memory
that does not grow with them, and written as the files that EasyEdit reads in place of computing its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from propmeta_edit.errors import ModelError
from propmeta_edit.files import sha256_of_json, written_whole
from propmeta_edit.models.devices import free_memory
from propmeta_edit.models.layers import get_architecture, key_module_name, key_width, resolve_layers
from propmeta_edit.progress import progress_bar
from propmeta_edit.protocols import LanguageModel, Tokenizer

WINDOW = 100  # texts sorted by length together, so that batches are hardly padded; also where a run can be continued
DTYPE = "float32"


@dataclass
class SecondMoments:
    """Running sums over texts.

    Attributes:
        sums: Σ k kᵀ by module name, each [in, in] in fp32; on the CPU once all texts are read.
        num_tokens: how many keys each sum holds.
        num_texts: how many texts they come from.
        seconds: spent on them.
    """

    sums: dict[str, torch.Tensor]
    num_tokens: int = 0
    num_texts: int = 0
    seconds: float = 0.0

    def moment(self, module: str) -> torch.Tensor:
        """``C = Σ k kᵀ / number of keys`` of one module, [in, in]."""
        return self.sums[module] / self.num_tokens


def collect_second_moments(
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    layers: Sequence[int] | str | None,
    *,
    modules: Sequence[str] | None = None,
    max_length: int = 512,
    batch_tokens: int = 4096,
    state_file: Path | None = None,
    save_every: int = 1000,
    model_id: str = "",
) -> SecondMoments:
    """Sum ``k kᵀ`` over every token of ``texts``, for the chosen layers at once.

    Args:
        modules: these projections' inputs in place of the layers' keys.
        max_length: longer texts are cut; in tokens.
        batch_tokens: at most as many a batch, padding included, unless a single text is longer.
        state_file: where the sums so far are saved every ``save_every`` texts; a run with the same texts and settings continues
            there, to the same bits, and removes the file at the end.
        model_id: tells models apart whose runs could meet in one state file, e.g. the hash of the weights.

    Raises:
        ModelError: no texts, or a state file of other texts or settings.
    """
    if not texts:
        raise ModelError("there are no texts to gather second moments from")
    sums = _make_sums(model, modules or _key_modules(model, layers))
    device = next(iter(sums.values())).device
    identity = sha256_of_json([list(texts), list(sums), max_length, batch_tokens, model_id, str(model.dtype)])
    is_begun = state_file is not None and state_file.is_file()
    moments = _load_state(state_file, identity, device) if state_file and is_begun else SecondMoments(sums)
    with progress_bar(total=len(texts), initial=moments.num_texts, desc="second moments", unit="text") as bar, torch.no_grad():
        while moments.num_texts < len(texts):
            window = texts[moments.num_texts : moments.num_texts + WINDOW]
            started = time.perf_counter()
            for batch in _batches(tokenizer, window, max_length, batch_tokens):
                _add_batch(model, batch, moments)
            moments.seconds += time.perf_counter() - started
            before, moments.num_texts = moments.num_texts, moments.num_texts + len(window)
            bar.update(len(window))
            is_due = before // save_every < moments.num_texts // save_every and moments.num_texts < len(texts)
            if state_file is not None and is_due:
                _save_state(state_file, moments, identity)
    if state_file is not None:
        state_file.unlink(missing_ok=True)
    moments.sums = {name: total.cpu() for name, total in moments.sums.items()}
    return moments


def _key_modules(model: LanguageModel, layers: Sequence[int] | str | None) -> list[str]:
    architecture = get_architecture(model)
    return [key_module_name(architecture, layer) for layer in resolve_layers(layers, model.config.num_hidden_layers)]


def _make_sums(model: LanguageModel, modules: Sequence[str]) -> dict[str, torch.Tensor]:
    """Zeros [in, in] for the inputs of each module, by its name, where there is room for them."""
    widths = {name: key_width(model.get_submodule(name)) for name in modules}
    device = _choose_device(model.device, sum(4 * width**2 for width in widths.values()))
    return {name: torch.zeros(width, width, device=device) for name, width in widths.items()}


def _choose_device(device: torch.device, num_bytes: int) -> torch.device:
    """Where the sums grow: beside the model if they take at most three quarters of what is free there, else on the CPU."""
    return device if num_bytes <= free_memory(device) * 3 // 4 else torch.device("cpu")


def _add_batch(model: LanguageModel, batch: Mapping[str, torch.Tensor], moments: SecondMoments) -> None:
    is_text = batch["attention_mask"].flatten().nonzero().squeeze(1)  # here, where nothing is waited for
    rows = is_text.to(model.device)
    with _keys_seen(model, list(moments.sums), lambda name, key: _add_keys(moments.sums[name], key.flatten(0, -2)[rows].float())):
        model.base_model(**{key: value.to(model.device) for key, value in batch.items()}, use_cache=False)
    moments.num_tokens += len(is_text)


def _add_keys(total: torch.Tensor, keys: torch.Tensor) -> None:
    """``total += kᵀ k`` of keys [tokens, in]; on a GPU without a product beside the sum, which is as large."""
    if total.device == keys.device and total.device.type != "cpu":
        total.addmm_(keys.T, keys)
    else:
        total += (keys.T @ keys).to(total.device)


class _DeepestReached(Exception):
    """Ends a forward pass: the layers above are not needed."""


@contextmanager
def _keys_seen(model: LanguageModel, modules: Sequence[str], see: Callable[[str, torch.Tensor], None]) -> Iterator[None]:
    """Inside, a forward pass shows the named modules' inputs as they come, and goes no further than the last of them."""
    seen: set[str] = set()

    def show(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        see(name, inputs[0])
        seen.add(name)
        if len(seen) == len(modules):
            raise _DeepestReached

    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, inputs, name=name: show(name, inputs)) for name in modules
    ]
    try:
        yield
    except _DeepestReached:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _batches(tokenizer: Tokenizer, texts: Sequence[str], max_length: int, batch_tokens: int) -> Iterator[dict[str, torch.Tensor]]:
    """Token ids and masks, padded on the right; texts of about the same length together."""
    pad_id = tokenizer.pad_token_id or 0  # behind the mask, so any will do
    encoded = sorted(tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"], key=len)
    batch: list[list[int]] = []
    for ids in encoded:
        if batch and len(ids) * (len(batch) + 1) > batch_tokens:
            yield _pad(batch, pad_id)
            batch = []
        if ids:
            batch.append(ids)
    if batch:
        yield _pad(batch, pad_id)


def _pad(batch: Sequence[Sequence[int]], padding: int) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids in batch)
    return {
        "input_ids": torch.tensor([[*ids, *[padding] * (longest - len(ids))] for ids in batch]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch]),
    }


def _save_state(file: Path, moments: SecondMoments, identity: str) -> None:
    counts = {"num_tokens": moments.num_tokens, "num_texts": moments.num_texts, "seconds": moments.seconds, "identity": identity}
    with written_whole(file) as temporary:
        save_file({name: total.cpu() for name, total in moments.sums.items()}, temporary, {"counts": json.dumps(counts)})


def _load_state(file: Path, identity: str, device: torch.device) -> SecondMoments:
    with safe_open(str(file), framework="pt", device=str(device)) as reader:  # type: ignore[no-untyped-call]
        counts = json.loads(reader.metadata()["counts"])
        sums = {key: reader.get_tensor(key) for key in reader.keys()}  # noqa: SIM118
    if counts["identity"] != identity:
        raise ModelError(f"{file} is of a run with another model, other texts or settings; continue with those, or remove it")
    return SecondMoments(sums, counts["num_tokens"], counts["num_texts"], counts["seconds"])


def model_folder_name(model_name: str) -> str:
    """What the folder of a model's statistics is called: the last part of the name or path it is asked for by."""
    return str(model_name).rstrip("/").rsplit("/", 1)[-1]


def statistics_file(folder: Path, model_name: str, dataset: str, module: str, num_texts: int) -> Path:
    """Where EasyEdit looks for a module's second moments, under its ``stats_dir``."""
    return folder / model_name / f"{dataset}_stats" / f"{module}_{DTYPE}_mom2_{num_texts}.npz"


def write_statistics(moments: SecondMoments, folder: Path, model_name: str, dataset: str) -> list[Path]:
    """One file a module, as EasyEdit writes them; its YAML's ``mom2_n_samples`` must be ``moments.num_texts``."""
    files = []
    for module, total in moments.sums.items():
        file = statistics_file(folder, model_name, dataset, module, moments.num_texts)
        values = {
            "mom2.constructor": "easyeditor.util.runningstats.SecondMoment()",
            "mom2.count": moments.num_tokens,
            "mom2.mom2": total.numpy(),
            "sample_size": moments.num_texts,
        }
        with written_whole(file) as temporary, open(temporary, "wb") as opened:
            numpy.savez(opened, **values)  # type: ignore[arg-type]
        files.append(file)
    return files


def read_second_moment(file: Path) -> torch.Tensor:
    """``C`` from one of those files, [in, in] in fp32.

    Raises:
        ModelError: the file is missing or not of that kind.
    """
    try:
        with numpy.load(file, allow_pickle=False) as values:
            return torch.from_numpy(values["mom2.mom2"]).float() / int(values["mom2.count"])
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise ModelError(f"{file} is no file of second moments ({error}); make it with: propmeta-edit statistics") from error
