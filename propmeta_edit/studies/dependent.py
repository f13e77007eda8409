"""Many edits of one model that stay: one after another, and all in one inner loop, after 1, 10, 100 and 1,000 facts."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure

from propmeta_edit.config import build_config, read_yaml
from propmeta_edit.easyedit.hparams import MetaFTHyperParams
from propmeta_edit.errors import ConfigError
from propmeta_edit.evaluation.scoring import contains_answer
from propmeta_edit.evaluation.statistics import mean_interval, wilson_interval
from propmeta_edit.evaluation.tables import keep_settings
from propmeta_edit.files import save_figure, sha256_of_json, write_text_atomically
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.single_edit import put_in_place, write_facts
from propmeta_edit.models.artefacts import find_model_folder
from propmeta_edit.models.devices import peak_memory, resolve_device, resolve_dtype, wait_for
from propmeta_edit.models.generation import generate_greedily
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.options import Files, Names, WholeNumbers, require_among, require_at_least
from propmeta_edit.progress import progress_bar
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.recipes.data_sets import load_dataset
from propmeta_edit.records import Case, EditRequest, Question
from propmeta_edit.settings import has_hparams, hparams_file
from propmeta_edit.studies.engine import collect_versions
from propmeta_edit.studies.runs import hash_of_model
from propmeta_edit.text.prompts import format_question

# Of each the folder in hparams/, and what follows the name of its YAML there.
METHODS = {"MetaFT": ("MetaFT", ""), "FT": ("FT", ""), "MetaFT-bound": ("MetaFT", "-bound")}
USUAL = ("MetaFT", "FT")
MODES = ("sequential", "joint")
MEASURES = ("efficacy", "portability", "locality")
FIRST = 10  # facts whose efficacy is asked for once more after those that follow
ASKED = (*MEASURES, "first ten")
SECONDS = {"sequential": 1.5, "joint": 0.6, "question": 0.06}  # of a fact and a question, the bundled model on one core, for --plan


@dataclass(frozen=True)
class ChainOptions:
    """What a chain of edits can be told.

    Args:
        hparams: name of the YAMLs in hparams/MetaFT and hparams/FT; with -bound behind it of MetaFT-bound's.
        datasets: as for table2, their cases of one edit in a random order.
        methods: of MetaFT, FT, MetaFT-bound.
        modes: sequential: each edit on top of the last; joint: one inner loop for all of them.
        counts: after how many facts it is asked.
        asked: of the written facts, and of other ones, how many are asked about.
        batch_size: facts of one update in the joint mode.
        lr: inner rate in place of the YAMLs'; many facts want less than one does.
        chains: so many chains of other facts each, every one on the unedited model; more of them continue fewer.
        device: auto, cpu, mps, cuda or cuda:N.
        seed: of the order of the cases, and of which are asked about.
        output: folder; what is finished there is kept.
        plan: say what would be run, and start nothing.
    """

    hparams: str = "smollm2-135m"
    datasets: Files = field(default_factory=lambda: Files(("world-id", "world-ood", "world-ood-entity", "world-ood-relation")))
    methods: Names = field(default_factory=lambda: Names(USUAL))
    modes: Names = field(default_factory=lambda: Names(MODES))
    counts: WholeNumbers = field(default_factory=lambda: WholeNumbers((1, 10, 100, 1000)))
    asked: int = 100
    batch_size: int = 8
    lr: float | None = None
    chains: int = 1
    device: str = "auto"
    seed: int = 0
    output: str = "results/dependent"
    plan: bool = False

    def __post_init__(self) -> None:
        require_among("methods", self.methods, tuple(METHODS))
        require_among("modes", self.modes, MODES)
        require_at_least(1, asked=self.asked, batch_size=self.batch_size, chains=self.chains, counts=min(self.counts))


def find_settings(method: str, hparams: str) -> Path:
    """The YAML of a method's settings."""
    return hparams_file(*_where(method, hparams))


def read_settings(method: str, options: ChainOptions) -> dict[str, Any]:
    """What is in it, with what the options say otherwise."""
    settings = read_yaml(find_settings(method, options.hparams))
    return settings if options.lr is None else {**settings, "lr": options.lr}


def _where(method: str, hparams: str) -> tuple[str, str]:
    folder, end = METHODS[method]
    return folder, f"{hparams}{end}"


def read_cases(items: Sequence[str], seed: int) -> list[Case]:
    """The cases of one edit of all data sets, shuffled together."""
    found = [case for item in items for case in load_dataset(item, seed).cases if len(case.edits) == 1]
    random.Random(seed).shuffle(found)
    return found


def choose_cases(cases: Sequence[Case], options: ChainOptions) -> tuple[list[list[Case]], list[Question]]:
    """The facts of every chain, and the questions about other cases, which are the same for all chains.

    Those of several chains are from the end, so that more chains ask the same.

    Raises:
        ConfigError: too few cases.
    """
    most, chains = max(options.counts), options.chains
    others = cases[chains * most :]  # about subjects that no edit names
    kept = [case.second_hop for case in (others if chains == 1 else others[::-1]) if case.second_hop is not None]
    if len(kept) < (1 if chains == 1 else options.asked):
        raise ConfigError(
            f"{', '.join(options.datasets)} have {len(cases)} cases of one edit, which leaves {len(kept)} to ask about besides the "
            f"{chains * most} that are edited; lower {'--counts' if chains == 1 else '--chains, --counts or --asked'}"
        )
    return [list(cases[number * most : (number + 1) * most]) for number in range(chains)], kept[: options.asked]


def ask(
    model: LanguageModel, tokenizer: Tokenizer, written: Sequence[Case], kept: Sequence[Question], number: int, seed: int
) -> dict[str, list[bool]]:
    """Of the written facts: themselves, their consequences, and the first ones themselves; and facts that no edit is about."""
    some = random.Random(seed).sample(list(written), min(number, len(written)))
    asked: dict[str, Sequence[Question]] = {"efficacy": _facts(some), "portability": [case.question for case in some]}
    asked |= {"locality": kept, "first ten": _facts(written[:FIRST])}
    found = {}
    for name, questions in asked.items():
        prompts = [format_question(q.text) if name in ("portability", "locality") else q.text for q in questions]
        texts = generate_greedily(model, tokenizer, prompts)
        found[name] = [contains_answer(text, q.answers) for text, q in zip(texts, questions, strict=True)]
    return found


def _facts(cases: Sequence[Case]) -> list[Question]:
    return [Question(case.edits[0].prompt, (case.edits[0].target_new,)) for case in cases]


def write_groups(
    model: LanguageModel, tokenizer: Tokenizer, groups: Sequence[Sequence[EditRequest]], settings: EditSettings, doing: str
) -> None:
    """One edit after another into the same model, each of a group of facts; they stay.

    Args:
        doing: what the progress bar calls it.

    Raises:
        RequestError, ModelError: as ``write_facts``; the edits before that one stand.
    """
    for group in progress_bar(groups, desc=doing, unit="call"):
        write_facts(model, tokenizer, group, settings)


@dataclass(frozen=True)
class Editor:
    """A method with the unedited model that it edits."""

    method: str
    hparams: MetaFTHyperParams
    model: LanguageModel
    tokenizer: Tokenizer


def load_editor(method: str, options: ChainOptions) -> Editor:
    """A method with its model, as the options name them."""
    path, device = find_settings(method, options.hparams), resolve_device(options.device)
    values = {**read_settings(method, options), "device": device, "dtype": resolve_dtype("fast", device)}
    hparams = build_config(MetaFTHyperParams, values, str(path))
    return Editor(method, hparams, *hparams.load_model())


def edit_and_ask(
    editor: Editor, mode: str, cases: Sequence[Case], kept: Sequence[Question], options: ChainOptions
) -> list[dict[str, Any]]:
    """One line a count; sequential edits go on from one count to the next, joint ones start afresh. The model is left unedited.

    Args:
        cases: of the chain, as many as the largest count.
        kept: what is asked about other cases.
    """
    hparams, model, tokenizer = editor.hparams, editor.model, editor.tokenizer
    device = torch.device(str(hparams.device))
    parameters = select_parameters(model, hparams.layers, hparams.modules)
    original = {name: parameter.data for name, parameter in parameters.items()}
    rows, done, seconds = [], 0, 0.0
    for count in sorted(options.counts):
        if mode == "joint":
            put_in_place(parameters, original)
            done, seconds = 0, 0.0
        requests = [case.edits[0] for case in cases[done:count]]
        groups, size = ([requests], options.batch_size) if mode == "joint" else ([[r] for r in requests], hparams.batch_size)
        write = partial(write_groups, model, tokenizer, groups, replace(hparams.edit, batch_size=size), f"{editor.method}, {mode}")
        started = time.perf_counter()
        added = peak_memory(write, device)
        wait_for(device)
        seconds += time.perf_counter() - started
        done = count
        answers = ask(model, tokenizer, cases[:count], kept, options.asked, options.seed)
        row: dict[str, Any] = {"method": editor.method, "mode": mode, "facts": count, "seconds": seconds, "peak GiB added": added}
        for name, verdicts in answers.items():
            low, high = wilson_interval(sum(verdicts), len(verdicts))
            row |= {name: sum(verdicts) / len(verdicts), f"{name} low": low, f"{name} high": high, f"{name} n": len(verdicts)}
        print(json.dumps(row), flush=True)
        rows.append(row)
    put_in_place(parameters, original)
    return rows


def name_chains(method: str, mode: str, options: ChainOptions) -> str:
    """With a hash of what the chains depend on, so that others in the same folder are not taken for them."""
    settings = read_settings(method, options)
    asked: list[Any] = [list(options.datasets), options.asked, options.batch_size, options.seed, sorted(options.counts)]
    asked += ["several"] if options.chains > 1 else []
    if mode == "sequential" and settings.get("inner_step") == "whitened":
        asked.append("standing")  # edits know of those that stand; chains from before they did are others
    return f"{method}-{mode}-{sha256_of_json([settings, hash_of_model(settings['model_name']), asked])[:8]}"


def file_of_chains(method: str, mode: str, options: ChainOptions, folder: Path) -> Path:
    """Where the finished chains of that kind are, whole ones alone."""
    return folder / f"{name_chains(method, mode, options)}.csv"


def describe_chains(method: str, mode: str, options: ChainOptions) -> dict[str, Any]:
    """What chains are made with, for ``settings.json``."""
    settings = read_settings(method, options)
    device = resolve_device(options.device)
    together = {"batch_size": options.batch_size} if mode == "joint" else {}
    given = {name: getattr(options, name) for name in ("datasets", "counts", "asked", "seed")}
    where = {"device": device, "dtype": resolve_dtype("fast", device), "versions": collect_versions([])}
    return {**settings, "model_sha256": hash_of_model(settings["model_name"]), **together, **given, **where}


def missing_chains(method: str, mode: str, options: ChainOptions, folder: Path) -> list[int]:
    """The numbers of the chains that are not in the folder."""
    file = file_of_chains(method, mode, options, folder)
    done: set[int] = set()
    if file.is_file():
        done = {0} if options.chains == 1 else set(pd.read_csv(file)["chain"])
    return [number for number in range(options.chains) if number not in done]


def add_chain(method: str, mode: str, options: ChainOptions, folder: Path, number: int, rows: Sequence[dict[str, Any]]) -> None:
    """Put a finished chain on disk, after those that are there. It is whole: its last count needs the weights of those before."""
    file = file_of_chains(method, mode, options, folder)
    table = pd.DataFrame([{"chain": number, **row} if options.chains > 1 else row for row in rows])
    if file.is_file():
        table = pd.concat([pd.read_csv(file), table])
    keep_settings({file.stem: describe_chains(method, mode, options)}, folder)
    write_text_atomically(file, table.to_csv(index=False))


def average_chains(table: pd.DataFrame) -> pd.DataFrame:
    """One line a method, mode and count: means over chains, with a bootstrap over them, and the longest and largest of any."""
    rows = []
    for (method, mode, facts), own in table.groupby(["method", "mode", "facts"], sort=False):
        row: dict[str, Any] = {"method": method, "mode": mode, "facts": facts, "chains": len(own)}
        for name in ASKED:
            mean, low, high = (float(part[0]) for part in mean_interval(own[[name]].to_numpy(dtype=float)))
            row |= {name: mean, f"{name} low": low, f"{name} high": high}
        rows.append(row | {name: own[name].max() for name in ("seconds", "peak GiB added")})
    return pd.DataFrame(rows)


def read_chains(options: ChainOptions, folder: Path) -> pd.DataFrame:
    """All chains of the folder with these settings, whichever command made them: what was asked the same of the same facts."""
    methods = [method for method in METHODS if method in options.methods or _is_known(method, options, folder)]
    files = [file_of_chains(method, mode, options, folder) for method, mode in itertools.product(methods, MODES)]
    found = pd.concat([pd.read_csv(file) for file in files if file.is_file()])
    return found if options.chains == 1 else average_chains(found[found["chain"] < options.chains])


def _is_known(method: str, options: ChainOptions, folder: Path) -> bool:
    """Whether there are chains of the method, and its model to compare their names with; none is fetched or built for that."""
    if not any(folder.glob(f"{method}-[sj]*.csv")) or not has_hparams(*_where(method, options.hparams)):
        return False
    return find_model_folder(read_yaml(find_settings(method, options.hparams))["model_name"]) is not None


def draw(table: pd.DataFrame, path: Path) -> None:
    """Each measure against the number of facts, a line a method and mode."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axis, measure in zip(figure.subplots(1, len(MEASURES)), MEASURES, strict=True):
        for number, ((method, mode), rows) in enumerate(table.groupby(["method", "mode"], sort=False)):
            low, high = rows[measure] - rows[f"{measure} low"], rows[f"{measure} high"] - rows[measure]
            style = "-" if mode == "sequential" else "--"
            shade = {"MetaFT": "black", "MetaFT-bound": "tab:blue"}.get(method, "0.55")
            axis.errorbar(
                rows["facts"], 100 * rows[measure], yerr=[100 * low.clip(0), 100 * high.clip(0)], fmt=style, color=shade,
                marker="osD^"[number % 4], capsize=2, label=f"{method}, {mode}",
            )  # fmt: skip
        axis.set(xscale="log", xlabel="facts written", ylabel="%", ylim=(0, 103), title=measure)
    figure.axes[0].legend(fontsize=7)
    save_figure(figure, path)


def describe_plan(options: ChainOptions, folder: Path) -> str:
    """What would be run, and about how long the bundled model takes."""
    lines, whole = [], 0.0
    for method, mode in itertools.product(options.methods, options.modes):
        missing = len(missing_chains(method, mode, options, folder))
        facts = max(options.counts) if mode == "sequential" else sum(options.counts)
        questions = sum(2 * min(count, options.asked) + min(count, FIRST) + options.asked for count in options.counts)
        minutes = missing * (facts * SECONDS[mode] + questions * SECONDS["question"]) / 60
        whole += minutes
        done = options.chains - missing
        lines.append(f"{method}, {mode}: {options.chains} of {max(options.counts)} facts, {done} done; about {minutes:.0f} min")
    return "\n".join([*lines, f"Together about {whole:.0f} min.", "Nothing was started."])


def dependent(options: ChainOptions) -> None:
    """Ask after many edits of one model that stay: one after another, and all in one inner loop.

    Efficacy and portability are of the written facts; "first ten" is the efficacy of the first ten alone. Locality asks for the
    second hops of cases that are not edited: of 100 such questions 92 to 97 are different ones, and after 1,000 facts half of them
    are also the second hop of a case that is. With several chains the table has means over them, with a bootstrap over chains.
    """
    output = Path(options.output)
    if options.plan:
        print(describe_plan(options, output))
        return
    chains, kept = choose_cases(read_cases(options.datasets, options.seed), options)
    for method in options.methods:
        todo = [(mode, number) for mode in options.modes for number in missing_chains(method, mode, options, output)]
        if not todo:
            continue
        editor = load_editor(method, options)
        for mode, number in todo:
            rows = edit_and_ask(editor, mode, chains[number], kept, options)
            add_chain(method, mode, options, output, number, rows)
    table = read_chains(options, output)
    write_text_atomically(output / "dependent.csv", table.to_csv(index=False))
    draw(table, output / "dependent.png")
    shown = ["method", "mode", "facts", "chains", *ASKED, "seconds", "peak GiB added"]
    print(table[[name for name in shown if name in table]].round(3).to_string(index=False))
