"""What an edit changes inside a model: the parts of an analysis, their pages and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from propmeta_edit.analysis.finished import FinishedPieces
from propmeta_edit.analysis.gains import CaseResult, collect_results, compute_prior_strengths
from propmeta_edit.config import read_yaml
from propmeta_edit.errors import ConfigError, DataError
from propmeta_edit.evaluation.rows import Row, read_rows, select_rows
from propmeta_edit.evaluation.tables import keep_settings, require_comparable
from propmeta_edit.files import sha256_of_json, write_text_atomically
from propmeta_edit.models.devices import resolve_device
from propmeta_edit.options import Files, Names, require_among, require_at_least
from propmeta_edit.recipes.data_sets import load_all
from propmeta_edit.settings import hparams_file
from propmeta_edit.studies import analysis_figures, analysis_tables
from propmeta_edit.studies.engine import collect_versions
from propmeta_edit.studies.inside import ARMS, USUAL, Arm, list_stages, make_arms, study_states, study_weights
from propmeta_edit.studies.runs import hash_of_model

PARTS = ("states", "weights", "gains")
SECONDS = {"states": 8.0, "weights": 4.0}  # an edit of the bundled model on two CPU cores, for --plan


@dataclass(frozen=True)
class AnalysisOptions:
    """What an analysis can be told.

    Args:
        hparams: name of the YAMLs in hparams/FT and hparams/MetaFT; with -bound behind it of MetaFT-bound's.
        methods: of FT, FT-as-MetaFT, MetaFT, MetaFT-bound; weights needs the first two, gains FT.
        parts: of states, weights, gains (default: states,weights, and gains with --rows).
        datasets: as for table2, of CRE's form.
        limit: cases a data set in states; a larger one continues a smaller one.
        every: blocks between two that are patched.
        weight_cases: facts in weights, of the first data set.
        checkpoints: a checkpoint meta-trained from the base that kept states on its way (checkpoint_every), for weights.
        rows: rows.jsonl of table2 with unedited, FT and MetaFT, for gains.
        device: auto, cpu, mps, cuda or cuda:N.
        seed: which cases come first.
        output: folder of everything.
        plan: say what would be computed, and start nothing.
    """

    hparams: str = "smollm2-135m"
    methods: Names = field(default_factory=lambda: Names(USUAL))
    parts: Names | None = None
    datasets: Files = field(default_factory=lambda: Files(("valid-ood",)))
    limit: int = 40
    every: int = 3
    weight_cases: int = 16
    checkpoints: str | None = None
    rows: Files | None = None
    device: str = "auto"
    seed: int = 0
    output: str = "results/analysis"
    plan: bool = False

    def __post_init__(self) -> None:
        require_at_least(1, limit=self.limit, every=self.every)
        require_at_least(3, weight_cases=self.weight_cases)
        require_among("parts", self.chosen, PARTS)
        require_among("methods", self.methods, ARMS)
        needed = {"states": (), "weights": ("FT", "FT-as-MetaFT"), "gains": ("FT",)}
        for part in self.chosen:
            lacking = [name for name in needed[part] if name not in self.methods]
            if lacking:
                raise ConfigError(
                    f"the part {part} needs {' and '.join(needed[part])} among --methods, got {','.join(self.methods)}"
                )
        if ("gains" in self.chosen) != bool(self.rows):
            raise ConfigError(
                "the part gains and --rows go together: give the rows.jsonl of a run with unedited, FT and MetaFT, or neither"
            )

    @property
    def chosen(self) -> list[str]:
        """The parts that are asked for."""
        return list(self.parts or (PARTS if self.rows else PARTS[:2]))


def read_arms(options: AnalysisOptions) -> dict[str, Arm]:
    """The arms of the chosen settings."""
    names = {"FT": ("FT", ""), "MetaFT": ("MetaFT", ""), "MetaFT-bound": ("MetaFT", "-bound")}
    of_usual = {"FT", "MetaFT", *options.methods} - {"FT-as-MetaFT"}  # which is FT with MetaFT's settings
    settings = {n: read_yaml(hparams_file(folder, options.hparams + end)) for n, (folder, end) in names.items() if n in of_usual}
    arms = make_arms(settings, resolve_device(options.device))
    return {name: arm for name, arm in arms.items() if name in options.methods}


def describe_plan(options: AnalysisOptions, arms: dict[str, Arm]) -> str:
    """What would be computed, and about how long the bundled model takes."""
    lines = [f"{name}: {arm.hparams.model_name}, layers {arm.hparams.layers}, rate {arm.hparams.lr}" for name, arm in arms.items()]
    names = options.datasets
    if "states" in options.chosen:
        edits = len(arms) * options.limit * len(names)
        lines.append(
            f"states: {options.limit} cases of {', '.join(names)}, {edits} edits; about {edits * SECONDS['states'] / 60:.0f} min"
        )
    if "weights" in options.chosen:
        stages = list_stages(arms, options.checkpoints)
        minutes = len(stages) * options.weight_cases * SECONDS["weights"] / 60
        lines.append(f"weights: {options.weight_cases} facts at {', '.join(s.label for s in stages)}; about {minutes:.0f} min")
    if "gains" in options.chosen:
        lines.append(f"gains: {len(join_rows(options.rows or []))} rows, and one forward pass for each of the unedited model's")
    return "\n".join([*lines, "Nothing was started."])


def join_rows(paths: Sequence[str]) -> list[Row]:
    """The rows of several files; of a case that is in two, the first file's.

    Raises:
        FileNotFoundError: a file that is not there.
        DataError: they do not belong together.
    """
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(f"--rows: no file {missing[0]}; give the rows.jsonl of a run of run_table2.py")
    rows = [row for path in paths for row in read_rows(path)]
    require_comparable(rows)
    return list({row.key: row for row in reversed(rows)}.values())[::-1]


def collect_gains(options: AnalysisOptions, arm: Arm) -> dict[str, list[CaseResult]]:
    """Each case's verdicts and its prior strength, by data set; strengths that are on disk are not computed again.

    Raises:
        DataError: the rows are not of the arm's model.
    """
    rows = join_rows(options.rows or [])
    model_sha256 = hash_of_model(str(arm.hparams.model_name))
    done = FinishedPieces(Path(options.output) / "priors.jsonl", {"model_sha256": model_sha256})
    found = {}
    for dataset in dict.fromkeys(row.dataset for row in rows if row.method == "unedited"):
        unedited = select_rows(rows, "unedited", dataset)
        if unedited[0].model_sha256 != model_sha256:
            raise DataError(
                f"the unedited rows of {dataset} are of {unedited[0].model}, not of {arm.hparams.model_name} as --hparams "
                f"{options.hparams} has it"
            )
        asked = sha256_of_json([[row.case_id, row.question, row.generated] for row in unedited])
        key = f"{dataset}@{unedited[0].data_sha256}|{asked[:12]}"
        if key not in done.pieces:
            strengths = compute_prior_strengths(*arm.load(), unedited)
            done.add(key, {row.case_id: value for row, value in zip(unedited, strengths, strict=True)})
        found[dataset] = collect_results(rows, dataset, "MetaFT", "FT", "unedited", done.pieces[key])
    return found


def describe_parts(options: AnalysisOptions, arms: dict[str, Arm]) -> dict[str, dict[str, Any]]:
    """What each part was made with, for ``settings.json``; another part may be asked for later and with other options."""
    given: dict[str, tuple[str, ...]] = {
        "states": ("datasets", "limit", "every"),
        "weights": ("datasets", "weight_cases", "checkpoints"),
        "gains": ("rows",),
    }
    found: dict[str, dict[str, Any]] = {}
    for part in options.chosen:
        asked = {name: getattr(options, name) for name in (*given[part], "seed")}
        asked |= {"device": resolve_device(options.device), "versions": collect_versions([])}
        used = ["FT"] if part == "gains" else list(arms)  # its model says how sure it was; the edits are those of the rows
        found |= {f"{part}, {name}": {**arms[name].identity(), **asked} for name in used}
    return found


def analysis(options: AnalysisOptions) -> None:
    """Look at what changes inside a model: the same facts written by FT and by MetaFT.

    Three arms: FT with its own settings, FT-as-MetaFT (the same with MetaFT's layer and rate, so that changes can be compared
    tensor by tensor) and MetaFT; MetaFT-bound on request. The parts: states (by layer and position, what the logit lens says of
    the new object and of the answer on the two-hop prompt; and which positions' states, put from the edited run into the unedited
    one after a block, bring the answer along), weights (size, rank and direction of the change that an edit makes, from the base
    on to the meta-trained model), gains (which cases MetaFT wins and loses against FT, by relation, entity type and how sure the
    unedited model was). Whatever is finished stays in the output folder; the same command goes on from there.
    """
    arms, output = read_arms(options), Path(options.output)
    if options.plan:
        print(describe_plan(options, arms))
        return
    datasets = [data for found in load_all(options.datasets, options.seed).values() for data in found]
    pages = {}
    if "states" in options.chosen:
        where = output / "states.jsonl"
        shared = {"number": options.limit, "every": options.every, "seed": options.seed}
        states = {data.name: study_states(arms, data, where, **shared) for data in datasets}
        pages["states"] = analysis_tables.describe_states(states)
        for name, studies in states.items():
            analysis_figures.draw_lens(studies, output / f"lens-{name}")
        analysis_figures.draw_patching(states, output / "patching")
    if "weights" in options.chosen:
        stages = list_stages(arms, options.checkpoints)
        where = output / "weights.jsonl"
        weights = study_weights(stages, datasets[0], where, number=options.weight_cases, seed=options.seed)
        pages["weights"] = analysis_tables.describe_weights(weights, datasets[0].name)
        analysis_figures.draw_weights(weights, output / "weights")
    if "gains" in options.chosen:
        gains = collect_gains(options, arms["FT"])
        pages["gains"] = analysis_tables.describe_gains(gains)
        analysis_figures.draw_gains(gains, output / "gains")
    for part, text in pages.items():  # a file each: another part asked for later leaves them as they are
        write_text_atomically(output / f"{part}.md", text)
    keep_settings(describe_parts(options, arms), output)
    print("\n".join(pages.values()))
