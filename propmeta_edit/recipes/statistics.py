"""Second moments for MEMIT and AlphaEdit: from a corpus to the files EasyEdit reads."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from propmeta_edit.baselines.null_space import ensure_projection
from propmeta_edit.baselines.second_moments import (
    collect_second_moments,
    model_folder_name,
    statistics_file,
    write_statistics,
)
from propmeta_edit.data.corpora import read_texts
from propmeta_edit.errors import ConfigError
from propmeta_edit.files import sha256_of_file, sha256_of_json, write_json_atomically, written_whole
from propmeta_edit.models.artefacts import CHECKPOINT_CARD, cache_home, find_model_folder, resolve_model_folder
from propmeta_edit.models.devices import resolve_device, resolve_dtype
from propmeta_edit.models.layers import architecture_from_config, key_module_name, resolve_layers
from propmeta_edit.models.loading import load_model, model_sha256, read_checkpoint_card, read_model_config
from propmeta_edit.progress import progress_bar
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.recipes.worlds import WORLD_VERSION, ensure_world, single_hop_questions
from propmeta_edit.text.encoding import TextEncoder

OWN = "cache"  # as stats_dir: the cache folder, and what is not there is made
SAMPLED = "sampled"  # the corpus that needs no file: the model's own text, and the sentences of the offline world
OPENINGS = ("The", "In", "It", "A", "When", "This", "He", "She", "There", "For", "One", "As")
MAX_NEW_TOKENS, MAX_LENGTH = 48, 256  # of a text the model writes; of a text that is read
INPUT_TEXTS = 2000  # that the whitened step's moments are gathered from, as MEMIT's here
SAMPLED_SHARE = 0.2  # of the texts; the rest are sentences of the world


def make_statistics(
    model_name: str,
    layers: Sequence[int] | str | None,
    corpus: str,
    folder: Path,
    *,
    num_texts: int,
    dataset: str,
    max_length: int = 512,
    batch_tokens: int = 4096,
    device: str = "auto",
    dtype: str = "fast",
    seed: int = 0,
) -> list[Path]:
    """Gather the second moments of the chosen layers and write them under ``folder``; a stopped run continues.

    Args:
        corpus: ``sampled``, a file, or ``hub:owner/name`` (``data.corpora``).
        num_texts: must be the YAML's ``mom2_n_samples``.
        dataset: what the corpus is called in the files' path; must be the YAML's ``mom2_dataset``.

    Returns:
        The files, one a layer; beside each its card (``card_file``) says what it was made from.
    """
    base = resolve_model_folder(model_name)
    sha256 = model_sha256(base)
    device = resolve_device(device)
    own = None if corpus == SAMPLED else read_texts(corpus, num_texts, seed)  # before a model is loaded for nothing
    model, tokenizer = load_model(base, device=device, dtype=resolve_dtype(dtype, device))
    texts = sample_corpus(model, tokenizer, num_texts, seed) if own is None else own
    name = model_folder_name(model_name)
    state = folder / name / "unfinished.safetensors"
    state.parent.mkdir(parents=True, exist_ok=True)
    moments = collect_second_moments(
        model,
        tokenizer,
        texts,
        layers,
        max_length=max_length,
        batch_tokens=batch_tokens,
        state_file=state,
        model_id=sha256,
    )
    files = write_statistics(moments, folder, name, dataset)
    made_from = {
        "model": model_name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "model_sha256": sha256,
        "modules": list(moments.sums),  # of the same run
        "corpus": corpus,
        "texts_sha256": sha256_of_json(texts),
        "num_texts": moments.num_texts,
        "num_tokens": moments.num_tokens,
        "max_length": max_length,
        "seed": seed,
        "seconds": round(moments.seconds, 1),
    }
    for file in files:  # with the file's hash: a card that another run's file was put beside says nothing of that one
        card = {**made_from, "file_sha256": sha256_of_file(file)}
        write_json_atomically(card_file(file), card)
    return files


def card_file(file: Path) -> Path:
    """Where it is said what a file of second moments was made from."""
    return file.with_suffix(".json")


def _read_seconds(files: Mapping[Path, str]) -> dict[str, float]:
    """``statistics``: the seconds of the runs that made these files (with their hashes), each run once; {} where no file says."""
    runs: dict[str, float] = {}
    for file, sha256 in files.items():
        if card_file(file).is_file():
            card = json.loads(card_file(file).read_text(encoding="utf-8"))
            if card.pop("file_sha256", None) == sha256:
                runs[sha256_of_json(card)] = float(card["seconds"])
    return {"statistics": sum(runs.values())} if runs else {}


@dataclass(frozen=True)
class Statistics:
    """What an algorithm's settings ask for, on disk.

    Attributes:
        folder: its ``stats_dir``.
        sha256: of the files.
        seconds: ``statistics`` and, where the settings have a threshold, ``projections``: how long each took; what is not known
            (files from elsewhere) is left out.
    """

    folder: str
    sha256: str
    seconds: dict[str, float]


def ensure_statistics(model_name: str, settings: Mapping[str, Any], device: str = "auto") -> Statistics:
    """The second moments and projections an algorithm's settings ask for, made from the sampled corpus first if they are ours.

    Args:
        settings: the YAML's, with ``stats_dir``, ``layers``, ``mom2_dataset`` and ``mom2_n_samples``.

    Raises:
        ConfigError: the files are missing from a folder of the user's own.
    """
    base = Path(resolve_model_folder(model_name))
    is_ours = settings["stats_dir"] == OWN
    # By content: the cached files of a model that was rebuilt would be those of another model.
    recipe = sha256_of_json([model_sha256(base), SAMPLED_SHARE, MAX_NEW_TOKENS, MAX_LENGTH, WORLD_VERSION])[:12]
    folder = cache_home() / "statistics" / recipe if is_ours else Path(settings["stats_dir"])
    layers, files = _statistics_files(model_name, settings, folder)
    dataset, num_texts = settings["mom2_dataset"], settings["mom2_n_samples"]
    if not is_ours:
        require_statistics(model_name, settings)
    if not all(file.is_file() for file in files):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "making.lock"):  # workers that start together take turns, and the second finds them there
            if not all(file.is_file() for file in files):
                make_statistics(
                    model_name, layers, SAMPLED, folder, num_texts=num_texts, dataset=dataset, max_length=MAX_LENGTH, device=device
                )
    hashes = {file: sha256_of_file(file) for file in files}
    seconds = _read_seconds(hashes)
    if "nullspace_threshold" in settings:
        threshold, place = settings["nullspace_threshold"], resolve_device(device)
        seconds["projections"] = sum(ensure_projection(file, threshold, place) for file in files)
    return Statistics(str(folder), sha256_of_json(list(hashes.values())), seconds)


def require_statistics(model_name: str, settings: Mapping[str, Any]) -> None:
    """Refuse settings whose second moments are to be in a folder of the user's and are not; our own are made on first use.

    Args:
        settings: as for ``ensure_statistics``; the model's ``config.json`` is on this machine.

    Raises:
        ConfigError: naming the file, and the command that makes it.
    """
    if settings["stats_dir"] == OWN:
        return
    layers, files = _statistics_files(model_name, settings, Path(settings["stats_dir"]))
    missing = [file for file in files if not file.is_file()]
    if missing:
        dataset, num_texts = settings["mom2_dataset"], settings["mom2_n_samples"]
        corpus = "" if dataset == SAMPLED else f"--corpus FILE (of {dataset}'s texts) "
        raise ConfigError(
            f"no second moments at {missing[0]}; make them with: propmeta-edit statistics {model_name} --layers '{layers}' "
            f"{corpus}--dataset {dataset} --num-texts {num_texts} --output {settings['stats_dir']}"
        )


def _statistics_files(model_name: str, settings: Mapping[str, Any], folder: Path) -> tuple[list[int], list[Path]]:
    """The layers whose second moments settings ask for, and where those of each are in ``folder``."""
    config = read_model_config(model_name)
    layers = resolve_layers(settings["layers"], config.num_hidden_layers)
    architecture, named = architecture_from_config(config), model_folder_name(model_name)
    modules = [key_module_name(architecture, layer) for layer in layers]
    return layers, [
        statistics_file(folder, named, settings["mom2_dataset"], module, settings["mom2_n_samples"]) for module in modules
    ]


def gather_input_moments(folder: str, modules: Sequence[str], device: str = "auto") -> dict[str, torch.Tensor]:
    """``C`` of what enters these projections, from the sampled corpus; kept in the cache folder by the model's weights.

    Of a meta-tuned checkpoint they are those of its base, if that is to be had: edits are weighed as in meta-training. A minute or
    two on a laptop for the bundled model, once.
    """
    folder = _base_below(folder)
    recipe = [model_sha256(folder), list(modules), SAMPLED_SHARE, MAX_NEW_TOKENS, MAX_LENGTH, WORLD_VERSION, INPUT_TEXTS]
    file = cache_home() / "statistics" / sha256_of_json(recipe)[:12] / "inputs.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if not file.is_file():
            model, tokenizer = load_model(folder, device=resolve_device(device), dtype=resolve_dtype("fast", device), layers=[])
            texts = sample_corpus(model, tokenizer, INPUT_TEXTS, seed=0)
            moments = collect_second_moments(model, tokenizer, texts, None, modules=modules, max_length=MAX_LENGTH)
            with written_whole(file) as temporary:
                save_file({module: moments.moment(module) for module in modules}, temporary)
    return load_file(file)


def _base_below(folder: str) -> str:
    """The folder of the base that a checkpoint was meta-trained from, or the folder itself."""
    if not (Path(folder) / CHECKPOINT_CARD).is_file():
        return folder
    card = read_checkpoint_card(folder)
    base = find_model_folder(card["base_model"])
    return str(base) if base and model_sha256(base) == card["base_sha256"] else folder


def sample_corpus(model: LanguageModel, tokenizer: Tokenizer, num_texts: int, seed: int) -> list[str]:
    """Texts without any file: what the model itself writes, and sentences of the offline world, shuffled."""
    world = _sentences_of_the_world()
    from_model = sample_texts(model, tokenizer, round(SAMPLED_SHARE * num_texts), seed)
    random.Random(seed).shuffle(world)
    texts = from_model + [world[number % len(world)] for number in range(num_texts - len(from_model))]
    random.Random(seed).shuffle(texts)
    return texts


def _sentences_of_the_world() -> list[str]:
    texts = [f"Question: {q.text}\nAnswer: The answer is {q.answers[0]}." for q in single_hop_questions()]
    with open(ensure_world() / "train_data_id.jsonl", encoding="utf-8") as lines:
        texts += [json.loads(line)["text"] for line in lines]
    return texts


def sample_texts(
    model: LanguageModel,
    tokenizer: Tokenizer,
    num_texts: int,
    seed: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 64,
) -> list[str]:
    """Texts the model writes after common openings, drawn at temperature 1 with ``seed``."""
    texts: list[str] = []
    encoder = TextEncoder(tokenizer, model.config)
    pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with torch.random.fork_rng(), progress_bar(total=num_texts, desc="sampling texts", unit="text") as bar:
        torch.manual_seed(seed)
        while len(texts) < num_texts:
            count = min(batch_size, num_texts - len(texts))
            openings = [OPENINGS[(len(texts) + number) % len(OPENINGS)] for number in range(count)]
            prompts = [encoder.encode_prompt(opening) for opening in openings]
            width = max(len(prompt) for prompt in prompts)
            is_text = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            with torch.no_grad():
                output = model.generate(
                    input_ids=torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=model.device),
                    attention_mask=is_text.to(model.device),
                    do_sample=True,
                    top_k=0,
                    temperature=1.0,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=pad_id,
                )
            texts += tokenizer.batch_decode(output, skip_special_tokens=True)
            bar.update(count)
    return texts
