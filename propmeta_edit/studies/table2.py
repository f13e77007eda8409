"""Table 2: MetaFT against FT, ROME, MEMIT, AlphaEdit and CaKE, on multi-hop questions about edited facts."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from propmeta_edit.data.cre import load_cre
from propmeta_edit.evaluation.companions import choose_stratified, with_commonest_answer, with_groups, with_seen
from propmeta_edit.evaluation.comparisons import write_comparisons
from propmeta_edit.evaluation.counts import TOLD_APART, TOLD_APART_OF
from propmeta_edit.evaluation.runner import DataSet
from propmeta_edit.evaluation.tables import require_comparable, summarise, write_tables
from propmeta_edit.files import save_figure, write_text_atomically
from propmeta_edit.models.artefacts import BUNDLED
from propmeta_edit.options import Files, Names, WholeNumbers, read_counts, read_pairs, require_among, require_at_least
from propmeta_edit.recipes.data_sets import load_all
from propmeta_edit.recipes.meta_training import EDITS_AT_ONCE
from propmeta_edit.recipes.released import find_released
from propmeta_edit.recipes.splits import Split, is_released, kind_of
from propmeta_edit.studies import published
from propmeta_edit.studies.engine import Results, Study, StudyOptions, run_study
from propmeta_edit.studies.methods import BOUND, CORE, METHODS, NOTES, RECIPES, find_methods
from propmeta_edit.studies.pictures import draw_leaks, draw_plane, draw_told_apart

NUM_GROUPS = 100  # of facts that are told apart, a data set
REFERENCES = ("FT", "MetaFT", BOUND.name)  # with which every row is compared
PAPERS_OWN = ("cre-ood", "cre-id", "mquake-3k", "mquake-subset")
DATASETS, ROWS = Files(("world-id", "world-ood")), Names(variant.name for variant in CORE)


def table2(
    options: StudyOptions,
    model: str = "smollm2-135m",
    metaft_model: str | None = None,
    hparams: str | None = None,
    checkpoints: Files | None = None,
    methods: Names = ROWS,
    datasets: Files = DATASETS,
    limits: Names | None = None,
    told_apart: WholeNumbers | None = None,
    training_data: str | None = None,
    data_folder: str | None = None,
    mquake_cases: int = 300,
    edits_at_once: int = EDITS_AT_ONCE,
    dtype: str = "fast",
) -> int:
    """Table 2: MetaFT against FT, ROME, MEMIT, AlphaEdit and CaKE, on multi-hop questions about edited facts.

    propmeta-edit table2 --limit 40 asks forty cases a data set; --minutes-per-row 2 as many as that allows, row by row;
    --methods all adds the controls.

    Args:
        model: the base: a bundled name, a folder or a hub id.
        metaft_model: its meta-tuned checkpoint (default: <model>-metaft).
        hparams: name of the YAML in hparams/<method>/ (default: the model's name; else as the checkpoint was trained).
        checkpoints: meta-trained models of the controls, e.g. k0=FOLDER,shuffled=FOLDER (default: <model>-k0 and so on).
        methods: the rows, or all for the usual ones and the controls; where none is named, MetaFT-bound too for bundled models.
        datasets: each NAME, FILE, NAME=FILE, or CRE's FOLDER or hub:owner/name; a released set's NAME alone is looked for in the
            folder that the environment variable PROPMETA_DATA names.
        limits: other numbers of cases for single methods, e.g. ROME=8, since it is slow.
        told_apart: e.g. 2,4,8: besides, so many facts of one kind in one edit, each of them asked; a hundred groups at most.
        training_data: CRE's training file; comparisons are then split by whether answer, entity and relation occur in it.
        data_folder: the folder of the paper's own data, or one around it: CRE out of and in distribution, MQuAKE-CF-3k and its
            subset, by their published names, or those of them that --datasets names; training_data is found there too.
        mquake_cases: with data_folder: so many cases of MQuAKE-CF-3k, by their hops and whether the last hop is edited in the
            shares they have among all.
        edits_at_once: cases of FT and MetaFT side by side; halved where memory runs out, which the table says.
        dtype: of the frozen rest: float32, bfloat16, float16, or fast: bfloat16 where the device has it in hardware, else float32.
    """
    require_at_least(1, edits_at_once=edits_at_once, mquake_cases=mquake_cases)
    require_at_least(2, told_apart=min(told_apart or (2,)))
    own_limits = read_counts("limits", limits or ())
    if own_limits:
        require_among("limits", list(own_limits), list(METHODS))
    named = {**read_pairs("checkpoints", checkpoints or ()), **({"metaft": metaft_model} if metaft_model else {})}
    bench = options.make_bench("table2", model, hparams, dtype, checkpoints=named, edits_at_once=edits_at_once)
    if data_folder is not None:
        wanted = PAPERS_OWN if datasets == DATASETS else tuple(datasets)
        require_among("datasets beside --data-folder", wanted, PAPERS_OWN)
        datasets = Files(f"{name}={find_released(name, data_folder)}" for name in wanted)
        training_data = training_data or str(find_released("cre-train", data_folder))
    splits = load_asked(datasets, options.case_seed, told_apart or (), training_data, mquake_cases if data_folder else None)
    write = partial(write_table2, options=options)
    variants = find_methods(methods)
    if methods == ROWS and bench.model_of(BOUND) in BUNDLED:  # of a model of one's own there need not be such a checkpoint
        variants.append(BOUND)
    study = Study("table2", variants, splits, bench, write, limits=own_limits, check=require_comparable)
    return run_study(study, options)


def load_asked(
    items: Sequence[str],
    seed: int,
    told_apart: Sequence[int] = (),
    training_data: str | None = None,
    mquake_cases: int | None = None,
) -> list[Split]:
    """The data sets as they are written on the command line, and behind each its groups of facts that are told apart.

    Raises:
        DataError: no such data set, or a file that cannot be read.
    """
    splits = []
    training = load_cre(training_data, "all") if training_data else None
    loaded = load_all(items, seed, probed=True)
    for item in items:
        for data in loaded[item]:
            cases = with_commonest_answer(data.cases)
            cases = cases if training is None else with_seen(cases, training)
            if mquake_cases is not None and data.name == "mquake-3k":
                cases = choose_stratified(cases, mquake_cases, seed, ("hops", "last hop"))
            data = replace(data, cases=cases)
            groups = [group for k in told_apart if (group := _group(data, k, seed)).cases]
            splits += [Split(one, kind_of(item), is_released(item)) for one in (data, *groups)]
    return splits


def _group(data: DataSet, k: int, seed: int) -> DataSet:
    """A data set's facts in groups of k; without cases where no k of one kind differ."""
    tags = {TOLD_APART: str(k), TOLD_APART_OF: data.name}
    groups = with_groups(data.cases, k, seed, NUM_GROUPS)
    return DataSet(f"{data.name}, {k} told apart", data.sha256, [replace(g, tags={**g.tags, **tags}) for g in groups])


def write_table2(results: Results, options: StudyOptions) -> str:
    """``table.md``, ``.csv``, ``.json``, three pictures and paired comparisons of all rows in the folder; the text to print."""
    order = {name: place for place, name in enumerate(METHODS)}
    rows = sorted(results.all_rows, key=lambda row: order.get(row.method, len(order)))  # rows of other studies come last
    notes = [*NOTES]
    if options.minutes_per_row is not None:
        notes.append(f"n: as many cases as a row got through in {options.minutes_per_row:g} min, data sets by turns.")
    if options.ray is not False:
        notes.append(
            f"s / edit: taken while up to {options.workers} workers shared a machine; for times to cite, run without --ray."
        )
    is_on_released = any(split.is_released for split in results.study.splits)
    if results.study.bench.hparams in published.TABLE_2_MODELS and is_on_released:
        write_text_atomically(results.folder / "published.md", published.table_2_markdown())
        notes.append(
            "published.md: what the paper reports for its Llama3-8B, cited with its protocol; whether yours is that is not checked."
        )
    summary = summarise(rows)
    text = write_tables(summary, results.folder, notes)
    for name, draw in (("plane", draw_plane), ("leak", draw_leaks), ("told_apart", draw_told_apart)):
        picture = draw(summary)
        if picture is not None:
            save_figure(picture, results.folder / f"{name}.png")
    write_comparisons(rows, results.folder, REFERENCES, recipes=RECIPES)
    return (
        f"{text}\npaired comparisons with {', '.join(REFERENCES)}, breakdowns and examples: {results.folder / 'comparisons.md'}\n"
        f"all on one page: propmeta-edit report {shlex.quote(str(results.folder))}"
    )
