"""What meta-training and edits that stay cost a model in general: perplexity of held-out text, tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from propmeta_edit.data.corpora import read_held_out, read_texts
from propmeta_edit.easyedit.hparams import MetaFTHyperParams
from propmeta_edit.errors import ConfigError
from propmeta_edit.evaluation.ability import (
    Perplexity,
    compare_perplexities,
    compute_perplexity,
    harness_version,
    require_tasks,
    run_task,
)
from propmeta_edit.evaluation.tables import markdown_table
from propmeta_edit.files import sha256_of_file, sha256_of_json, write_json_atomically, write_text_atomically
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.weights import restored_on_exit
from propmeta_edit.models.artefacts import CHECKPOINT_CARD, resolve_model_folder
from propmeta_edit.models.devices import resolve_device, resolve_dtype
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.models.loading import load_model, read_checkpoint_card, require_trained_from
from propmeta_edit.options import Files, Names, WholeNumbers, require_among, require_at_least
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.recipes.edit_facts import read_hparams
from propmeta_edit.records import EditRequest
from propmeta_edit.settings import has_hparams, hparams_file
from propmeta_edit.store import JsonLines
from propmeta_edit.studies.dependent import USUAL, ChainOptions, read_cases, write_groups
from propmeta_edit.studies.engine import collect_versions
from propmeta_edit.studies.runs import hash_of_model

PERPLEXITY = "perplexity"
ROW = ("model", "kind", "method", "edits")  # what a row is told by
ROWS = "rows.jsonl"  # every finished measure of every row, whichever command took it


@dataclass(frozen=True)
class AbilityOptions:
    """What a measurement of general ability can be told.

    Args:
        edits: after how many facts, written one after another, it is measured; 0 for none, which is always measured.
        method: MetaFT edits a meta-tuned checkpoint, FT the model that it was meta-trained from (default: MetaFT for a checkpoint,
            FT for any other model).
        hparams: a YAML of edit settings for all methods (default: for MetaFT as the model was meta-trained, for FT that of the
            model's name in hparams/FT).
        base: the model that a checkpoint was meta-trained from, if not where its card says.
        datasets: where the facts are from, as for dependent; those of its cases of one edit, in a random order.
        texts: held-out texts of your own: FILE.txt (blank lines between them), FILE.jsonl or hub:owner/name.
        tasks: tasks of lm-evaluation-harness, which must be installed.
        task_folder: YAML files of tasks of your own; data files in them are looked for from where you are.
        limit: at most so many texts, and so many questions of each task.
        batch_size: texts or questions at once.
        device: auto, cpu, mps, cuda or cuda:N.
        dtype: of the frozen weights: float32, bfloat16, float16, fast, or auto (bfloat16 on CUDA, float32 elsewhere); edited ones
            are fp32.
        seed: of the order of the facts, and of texts that are drawn.
        output: folder; what is finished there is kept.
    """

    edits: WholeNumbers = field(default_factory=lambda: WholeNumbers((1, 10, 100)))
    method: Names | None = None
    hparams: str | None = None
    base: str | None = None
    datasets: Files = field(default_factory=lambda: ChainOptions().datasets)
    texts: str | None = None
    tasks: Names | None = None
    task_folder: str | None = None
    limit: int | None = None
    batch_size: int = 8
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    output: str = "results/ability"

    def __post_init__(self) -> None:
        require_at_least(0, edits=min(self.edits))
        require_at_least(1, limit=self.limit, batch_size=self.batch_size)
        if self.method is not None:
            require_among("method", self.method, USUAL)
        if self.task_folder is not None and not self.tasks:
            raise ConfigError("--task-folder is where tasks are found; name those to run with --tasks")
        if self.task_folder is not None and not Path(self.task_folder).is_dir():
            raise ConfigError(f"--task-folder: {self.task_folder} is no folder")


@dataclass(frozen=True)
class Chain:
    """A model, and how facts are written into it one after another.

    Args:
        model: its name.
        kind: what the table calls it beside its name: base, meta-tuned, or nothing.
        device, dtype: as torch calls them; the dtype of all that is not edited.
        method: of USUAL; empty if it is measured as it is alone.
        hparams: of the edits; None where there are none.
    """

    model: str
    kind: str
    device: str
    dtype: str
    method: str = ""
    hparams: MetaFTHyperParams | None = None

    @property
    def settings(self) -> EditSettings | None:
        """What an edit is made with."""
        return None if self.hparams is None else self.hparams.edit

    def describe(self, count: int) -> dict[str, Any]:
        """The row after so many edits, by name."""
        return {"model": self.model, "kind": self.kind, "method": self.method if count else "", "edits": count}

    def load(self) -> tuple[Any, Any]:
        """(model, tokenizer)."""
        if self.hparams is not None:
            return self.hparams.load_model()
        return load_model(self.model, device=self.device, dtype=self.dtype, layers=[])


@dataclass(frozen=True)
class Measure:
    """What is measured of each row.

    Args:
        name: its column.
        made_from: what it depends on besides the row's weights.
        take: (model, tokenizer) -> plain values.
    """

    name: str
    made_from: Mapping[str, Any]
    take: Callable[[LanguageModel, Tokenizer], dict[str, Any]]


def plan_chains(model: str, options: AbilityOptions) -> list[Chain]:
    """The models to measure: of a checkpoint its base before it; each with the edits that are asked for.

    Raises:
        ConfigError: MetaFT on a model that is no checkpoint, or no settings for the edits.
        ModelError: no such model, or a damaged card.
        OriginError: a base with other weights than the checkpoint was meta-trained from.
    """
    folder, has_edits = resolve_model_folder(model), max(options.edits) > 0
    is_checkpoint = (Path(folder) / CHECKPOINT_CARD).is_file()
    methods = options.method or [USUAL[0] if is_checkpoint else USUAL[1]]
    if not is_checkpoint:
        if "MetaFT" in methods:
            raise ConfigError(f"{model} has no {CHECKPOINT_CARD}: MetaFT edits what was meta-trained; take --method FT")
        return [_chain(model, "", "FT", has_edits, options)]
    base = options.base or str(read_checkpoint_card(folder)["base_model"])
    require_trained_from(folder, base, hash_of_model(base), "name the right one with --base")
    return [
        _chain(base, "base", "FT", has_edits and "FT" in methods, options),
        _chain(model, "meta-tuned", "MetaFT", has_edits and "MetaFT" in methods, options),
    ]


def _chain(model: str, kind: str, method: str, is_edited: bool, options: AbilityOptions) -> Chain:
    device = resolve_device(options.device)
    bare = Chain(model, kind, device, resolve_dtype(options.dtype, device))
    if not is_edited:
        return bare
    hparams = replace(_settings(model, method, options), dtype=bare.dtype, fp16=False)  # that of the rows without edits
    return replace(bare, method=method, hparams=hparams)


def _settings(model: str, method: str, options: AbilityOptions) -> MetaFTHyperParams:
    file, name = options.hparams, Path(model).name
    if method == "FT" and file is None:  # its layer and rate are not MetaFT's
        if not has_hparams("FT", name):
            raise ConfigError(f"no layer and rate of FT are known for {model}: there is no hparams/FT/{name}.yaml; give --hparams")
        file = str(hparams_file("FT", name))
    return read_hparams(model, file, options.device)


def make_measures(options: AbilityOptions) -> list[Measure]:
    """Perplexity, then each task.

    Raises:
        ConfigError: tasks that cannot be run here.
        DataError: texts that cannot be read.
    """
    texts = (read_texts(options.texts, seed=options.seed) if options.texts else read_held_out())[: options.limit]
    take_perplexity = partial(_take_perplexity, texts=texts, batch_size=options.batch_size)
    measures = [Measure(PERPLEXITY, {"texts_sha256": sha256_of_json(texts)}, take_perplexity)]
    if not options.tasks:
        return measures
    require_tasks(options.tasks, options.task_folder)
    made_from = {"limit": options.limit, "folder_sha256": _hash_of_folder(options.task_folder), "harness": harness_version()}
    return [*measures, *(Measure(task, made_from, partial(_take_task, task=task, options=options)) for task in options.tasks)]


def _take_perplexity(model: LanguageModel, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int) -> dict[str, Any]:
    return asdict(compute_perplexity(model, tokenizer, texts, batch_size))


def _take_task(model: LanguageModel, tokenizer: Tokenizer, task: str, options: AbilityOptions) -> dict[str, Any]:
    return dict(run_task(model, tokenizer, task, options.task_folder, options.limit, options.batch_size))


def _hash_of_folder(folder: str | None) -> str | None:
    """One hash over the files of a folder, names and contents; None for none."""
    if folder is None:
        return None
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return sha256_of_json([[path.relative_to(folder).as_posix(), sha256_of_file(path)] for path in files])


def visit_edits(
    model: LanguageModel,
    tokenizer: Tokenizer,
    requests: Sequence[EditRequest],
    settings: EditSettings | None,
    counts: Sequence[int],
    look: Callable[[int], None],
) -> None:
    """Write facts one after another and look at the model after some of them; it has its weights of before, to the bit, afterwards.

    Args:
        settings: of an edit; None where all counts are 0.
        counts: after how many facts ``look`` is called, with that number; in ascending order.

    Raises:
        RequestError, ModelError: a fact that cannot be written; the weights are restored then, too.
    """
    parameters = {} if settings is None else select_parameters(model, settings.layers, settings.modules)
    done = 0
    with restored_on_exit(parameters):
        for count in counts:
            if settings is not None and count > done:
                groups = [[request] for request in requests[done:count]]
                write_groups(model, tokenizer, groups, settings, f"facts {done + 1} to {count}")
                done = count
            look(count)


def measure_chain(
    chain: Chain, counts: Sequence[int], requests: Sequence[EditRequest], measures: Sequence[Measure], rows: JsonLines
) -> list[dict[str, Any]]:
    """Every measure after every count of edits, those that ``rows`` has not; each is on disk before the next is taken.

    A stopped chain writes its facts anew, since each edit starts from the one before, but measures nothing twice.

    Returns:
        What ``rows`` has of them, count by count.
    """
    origins = {count: _origin(chain, requests[:count]) for count in counts}
    rows_of = {count: chain.describe(count) for count in counts}
    keys = {(count, measure.name): _key(origins[count], measure) for count in counts for measure in measures}
    finished = {entry["key"]: entry for entry in rows.entries}

    def look(count: int) -> None:
        for measure in measures:
            key = keys[count, measure.name]
            if key not in finished:
                made_from, result = {**origins[count], **measure.made_from}, measure.take(model, tokenizer)
                finished[key] = {"key": key, **rows_of[count], "measure": measure.name, "made_from": made_from, "result": result}
                rows.append(finished[key])

    left = [count for count in counts if any(keys[count, measure.name] not in finished for measure in measures)]
    if left:
        model, tokenizer = chain.load()
        visit_edits(model, tokenizer, requests, chain.settings, left, look)
    # Named as this command names them: another one may have measured the same weights as a model of its own.
    return [{**finished[key], **rows_of[count]} for (count, _), key in keys.items()]


def _origin(chain: Chain, requests: Sequence[EditRequest]) -> dict[str, Any]:
    """What the weights of a row are made from."""
    origin: dict[str, Any] = {"model_sha256": hash_of_model(chain.model), "dtype": chain.dtype}
    if not requests or chain.settings is None:
        return origin
    facts = sha256_of_json([[request.prompt, request.target_new] for request in requests])
    # Edits of low rank know of those that stand (finetune.written_inputs); rows from before they did are others.
    known = {"standing": "known"} if chain.settings.is_low_rank and len(requests) > 1 else {}
    return {**origin, "facts": len(requests), "facts_sha256": facts, "edit": chain.settings.to_dict(), **known}


def _key(origin: Mapping[str, Any], measure: Measure) -> str:
    return sha256_of_json([origin, measure.name, measure.made_from])[:16]


def collect_rows(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Measures of one model after one number of edits as one row, as ``ability.json`` has them.

    Perplexities are compared with that of the first row, if its texts have the same tokens: ``ratio`` and its 95 % interval.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in entries:
        about = {name: entry[name] for name in ROW}
        row = rows.setdefault(tuple(about.values()), {**about, "tasks": {}})
        if entry["measure"] == PERPLEXITY:
            row[PERPLEXITY] = entry["result"]
        else:
            row["tasks"][entry["measure"]] = entry["result"]
    found = list(rows.values())
    return [_with_ratio(row, Perplexity(**found[0][PERPLEXITY])) for row in found]


def _with_ratio(row: dict[str, Any], first: Perplexity) -> dict[str, Any]:
    own = Perplexity(**row[PERPLEXITY])
    if list(own.lengths) != list(first.lengths):
        return {**row, "ratio": None, "ratio_ci95": None}
    ratio, low, high = compare_perplexities(own, first)
    return {**row, "ratio": ratio, "ratio_ci95": [low, high]}


def make_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown, with what the columns mean."""
    tasks = list(dict.fromkeys(name for row in rows for scores in row["tasks"].values() for name in scores))
    header = ["model", "edited by", "edits", "perplexity [95 %]", "times the first row's [95 %]", "tokens", *tasks]
    cells = [[*_describe(row), *(_describe_task(row["tasks"], name) for name in tasks)] for row in rows]
    notes = [
        "Perplexity: exp of the mean negative log-likelihood of a token; brackets: bootstrap over texts, paired for the ratio."
    ]
    notes += ["Edits: facts written one after another, each on top of the last."] if any(row["edits"] for row in rows) else []
    notes += ["Tasks: lm-evaluation-harness, its own measures ± standard error."] if tasks else []
    return markdown_table(header, cells) + "\n" + "".join(f"- {note}\n" for note in notes)


def _describe(row: Mapping[str, Any]) -> list[str]:
    found = Perplexity(**row[PERPLEXITY])
    name = f"{row['model']} ({row['kind']})" if row["kind"] else row["model"]
    perplexity = _with_interval(found.value, (found.low, found.high), 2)
    ratio = "–" if row["ratio"] is None else _with_interval(row["ratio"], row["ratio_ci95"], 3)
    return [name, row["method"] or "–", f"{row['edits']:,}", perplexity, ratio, f"{found.num_tokens:,}"]


def _with_interval(value: float, interval: Sequence[float], digits: int) -> str:
    """A number that edits may have multiplied by a million: from 1,000 on without decimals."""
    shown, low, high = (f"{number:,.{digits if number < 1000 else 0}f}" for number in (value, *interval))
    return f"{shown} [{low}, {high}]"


def _describe_task(tasks: Mapping[str, Mapping[str, Mapping[str, float]]], name: str) -> str:
    """A task's measures: the harness calls them ``acc,none`` and ``acc_stderr,none``, the second word being a filter."""
    scores = next((found[name] for found in tasks.values() if name in found), {})
    parts = []
    for key, value in scores.items():
        measure, _, of_filter = key.partition(",")
        if of_filter and not measure.endswith("_stderr"):
            error = scores.get(f"{measure}_stderr,{of_filter}")
            shown = f"{measure} {value:.3f}" + ("" if error is None else f" ± {error:.3f}")
            parts.append(shown if of_filter == "none" else f"{shown} ({of_filter})")
    return ", ".join(parts) or "–"


def ability(model: str, options: AbilityOptions) -> None:
    """Measure what meta-training and edits that stay cost a model in general.

    Perplexity of held-out text, and tasks of lm-evaluation-harness where it is installed: of the model as it is, of its base if it
    is a meta-tuned checkpoint, and after facts that are written one after another. It prints a table and writes it as ability.md
    and ability.json; a stopped run continues.

    Args:
        model: a folder, a bundled name, or a hub id.
    """
    measures, chains = make_measures(options), plan_chains(model, options)
    counts = sorted({0, *options.edits})
    requests: list[EditRequest] = []
    if any(chain.hparams for chain in chains):
        requests = _read_facts(options, counts[-1])
    output = Path(options.output)
    kept = JsonLines(output / ROWS, "remove that line, or the file to measure everything anew")
    entries = []
    for chain in chains:
        own = counts if chain.hparams else [0]
        entries += measure_chain(chain, own, requests, measures, kept)
    rows = collect_rows(entries)
    table = make_table(rows)
    about = {"datasets": options.datasets, "seed": options.seed, "device": chains[0].device, "versions": collect_versions([])}
    made_from = {f"{entry['model']}, {entry['edits']} edits, {entry['measure']}": entry["made_from"] for entry in entries}
    write_json_atomically(output / "ability.json", {"rows": rows, "made_from": made_from, **about})
    write_text_atomically(output / "ability.md", table)
    print(table, end="")


def _read_facts(options: AbilityOptions, count: int) -> list[EditRequest]:
    """The first facts of the data sets in their random order, as ``dependent`` writes them.

    Raises:
        ConfigError: fewer than are to be written.
    """
    cases = read_cases(options.datasets, options.seed)
    if len(cases) < count:
        raise ConfigError(f"{', '.join(options.datasets)} have {len(cases)} cases of one edit, but --edits asks for {count}")
    return [case.edits[0] for case in cases[:count]]
