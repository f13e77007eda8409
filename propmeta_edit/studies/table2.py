"""Table 2: MetaFT against FT, ROME, MEMIT, AlphaEdit and CaKE, on multi-hop questions about edited facts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from propmeta_edit.evaluation.comparisons import write_comparisons
from propmeta_edit.evaluation.tables import require_comparable, summarise, write_tables
from propmeta_edit.files import write_text_atomically
from propmeta_edit.options import Names, read_counts, read_pairs, require_among, require_at_least
from propmeta_edit.recipes.data_sets import load_datasets
from propmeta_edit.recipes.meta_training import EDITS_AT_ONCE
from propmeta_edit.recipes.splits import Split, is_released, kind_of
from propmeta_edit.studies import published
from propmeta_edit.studies.engine import Results, Study, StudyOptions, run_study
from propmeta_edit.studies.methods import CORE, METHODS, NOTES, find_methods

DATASETS, ROWS = Names(("world-id", "world-ood")), Names(variant.name for variant in CORE)


def table2(
    options: StudyOptions,
    model: str = "smollm2-135m",
    metaft_model: str | None = None,
    hparams: str | None = None,
    checkpoints: Names | None = None,
    methods: Names = ROWS,
    datasets: Names = DATASETS,
    limits: Names | None = None,
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
        methods: the rows, or all for the usual ones and the controls.
        datasets: each NAME, FILE, NAME=FILE, or CRE's FOLDER or hub:owner/name; a released set's NAME alone is looked for in the
            folder that the environment variable PROPMETA_DATA names.
        limits: other numbers of cases for single methods, e.g. ROME=8, since it is slow.
        edits_at_once: cases of FT and MetaFT side by side; halved where memory runs out, which the table says.
        dtype: of the frozen rest: float32, bfloat16, float16, or fast: bfloat16 where the device has it in hardware, else float32.
    """
    require_at_least(1, edits_at_once=edits_at_once)
    own_limits = read_counts("limits", limits or ())
    if own_limits:
        require_among("limits", list(own_limits), list(METHODS))
    named = {**read_pairs("checkpoints", checkpoints or ()), **({"metaft": metaft_model} if metaft_model else {})}
    bench = options.make_bench("table2", model, hparams, dtype, checkpoints=named, edits_at_once=edits_at_once)
    splits = load_asked(datasets, options.case_seed)
    write = partial(write_table2, options=options)
    study = Study("table2", find_methods(methods), splits, bench, write, limits=own_limits, check=require_comparable)
    return run_study(study, options)


def load_asked(items: Sequence[str], seed: int) -> list[Split]:
    """The data sets as they are written on the command line.

    Raises:
        DataError: no such data set, or a file that cannot be read.
    """
    return [Split(data, kind_of(item), is_released(item)) for item in items for data in load_datasets(item, seed)]


def write_table2(results: Results, options: StudyOptions) -> str:
    """``table.md``, ``.csv``, ``.json`` of all rows in the folder, and their paired comparisons; the text to print."""
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
    text = write_tables(summarise(rows), results.folder, notes)
    write_comparisons(rows, results.folder, ("FT", "MetaFT"))
    return f"{text}\npaired comparisons with FT and MetaFT, breakdowns and examples: {results.folder / 'comparisons.md'}"
