"""The verbs of the ``propmeta-edit`` command that are no studies: each a function whose signature and docstring are its options."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from propmeta_edit.edits.saved import describe_saved
from propmeta_edit.errors import ConfigError, DataError
from propmeta_edit.metatrain.checkpoint import export_as_lora, export_checkpoint, export_compact
from propmeta_edit.metatrain.config import MetaTrainConfig
from propmeta_edit.models.artefacts import ensure_artefact
from propmeta_edit.options import Files, Numbers, WholeNumbers, require_at_least, require_positive
from propmeta_edit.recipes import NAMES, REAL_NAMES, edit_facts, rate_choice, real
from propmeta_edit.recipes.bundled import rebuild as rebuild_files
from propmeta_edit.recipes.bundled import require_new
from propmeta_edit.recipes.data_check import describe_files
from propmeta_edit.recipes.meta_training import train_to_folder
from propmeta_edit.recipes.publishing import push_to_hub
from propmeta_edit.recipes.statistics import SAMPLED, make_statistics
from propmeta_edit.recipes.teaching import (
    TeachingSettings,
    describe_lesson,
    describe_taught,
    estimate_seconds,
    read_lesson,
    teach_to_folder,
)
from propmeta_edit.recipes.whole import expand_folder
from propmeta_edit.recipes.worlds import WORLD
from propmeta_edit.records import EditRequest
from propmeta_edit.studies.cost import describe_run

LOG = logging.getLogger(__name__)
RATES = Numbers((2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3))


def prepare(names: Sequence[str] = NAMES[:2]) -> None:
    """Build bundled models that are not there yet, in the cache folder (PROPMETA_HOME, or ~/.cache/propmeta_edit).

    Args:
        names: which of them (default: the two that need no training).
    """
    for name in names:
        print(f"{name}: {ensure_artefact(name)}", flush=True)


def edit(
    prompt: str | None = None,
    target: str | None = None,
    subject: str | None = None,
    requests: str | None = None,
    related: Sequence[str] = (),
    unrelated: Sequence[str] = edit_facts.UNRELATED,
    model: str | None = None,
    hparams: str | None = None,
    save: str | None = None,
    tolerance: float | None = None,
    json: bool = False,
    device: str | None = None,
) -> None:
    """Write a fact into a model by plain fine-tuning and show, side by side, what it says before and after.

    It is asked about the fact, about what follows from it, and about other things. Without arguments: an example on the bundled
    model.

    Args:
        prompt: the fact without its object: "Ann Lee lives in".
        target: the object: "Peru".
        subject: who or what the fact is about, if methods that need it are to read the edit.
        requests: a file of requests instead (JSON list or lines: prompt, target_new, subject).
        related: a question whose answer follows from it (repeat).
        unrelated: a question about something else (repeat).
        model: a meta-tuned folder or bundled name (default: the bundled one).
        hparams: a MetaFT YAML (default: as the model was meta-trained, else that of its name in hparams/MetaFT).
        save: new folder for the edit, for propmeta-edit ask.
        tolerance: share of the change that may be lost for a small folder, 0.1 say (default: nothing is lost).
        json: print JSON.
        device: auto, cpu, mps, cuda or cuda:N (default: as the YAML says, which is auto in those that come along).
    """
    facts, related = _read_facts(prompt, target, subject, requests, related)
    if save:
        edit_facts.require_new_folder(Path(save))
    if tolerance is not None:
        edit_facts.require_tolerance(tolerance, save)
    settings = edit_facts.read_hparams(model, hparams, device)
    made, answers = edit_facts.edit_and_ask(facts, related, unrelated, settings)
    names = ["before", "after"]
    if json:
        print(edit_facts.to_json(answers, names, made), flush=True)
    else:
        for request in made.requests:
            print(f"edit: {request.prompt} -> {request.target_new}")
        if made.learning is not None:
            print(made.learning)
        print(edit_facts.format_answers(answers, names), flush=True)
    if save:
        saved = made.save(save, tolerance=tolerance)  # after the answers, which would be lost with it otherwise
        if not json:
            print(f'saved in {save} ({describe_saved(saved)}); ask it: propmeta-edit ask "..." --edit {save}')


def _read_facts(
    prompt: str | None, target: str | None, subject: str | None, requests: str | None, related: Sequence[str]
) -> tuple[list[EditRequest], Sequence[str]]:
    """The facts to write and the questions that follow from them: those that are given, or the example."""
    if requests and prompt is not None:
        raise ConfigError("give a fact or --requests, not both")
    if requests:
        return edit_facts.read_requests(Path(requests)), related
    if prompt is None:
        if subject or related:
            raise ConfigError(
                "give the fact as well: propmeta-edit edit 'Ann Lee lives in' 'Peru' --related ... (or --requests FILE)"
            )
        return [edit_facts.EXAMPLE], edit_facts.RELATED
    if not target:
        raise ConfigError(f"a fact needs its object as well: propmeta-edit edit {prompt!r} 'the object'")
    return [EditRequest(prompt, target, subject)], related


def ask(
    questions: Sequence[str],
    edit: Sequence[str],
    model: str | None = None,
    any_base: bool = False,
    json: bool = False,
    device: str = "auto",
) -> None:
    """Ask questions of a model as it is and under saved edits, side by side.

    Args:
        questions: in full sentences.
        edit: a folder that edit --save wrote (repeat).
        model: the model they were made on, if not where they say.
        any_base: put their tensors into the model even if it is not, number by number, the one they were made on: for a base that
            was built elsewhere.
        json: print JSON.
        device: auto, cpu, mps, cuda or cuda:N.
    """
    folders = [Path(folder) for folder in edit]
    names = edit_facts.name_columns(folders)
    answers = edit_facts.ask_with_edits(folders, questions, model, device, any_base=any_base)
    print(edit_facts.to_json(answers, names) if json else edit_facts.format_answers(answers, names))


def meta_train(config: MetaTrainConfig, output: str | None = None, dry_run: bool = False) -> None:
    """Meta-train by first-order MAML over (new fact, two-hop question) pairs, each used once.

    Settings come from --config; any of them can be given on the command line as well and then wins. A run that was stopped
    continues when the same command is given again.

    Args:
        output: new folder for the checkpoint (default: checkpoints/<model>-metaft).
        dry_run: time a few tasks, say what the run would take in memory and time, and stop.
    """
    _announce_data(config)
    if dry_run:
        print(describe_run(config), flush=True)
        return
    folder = Path(output or f"checkpoints/{Path(config.model).name}-metaft")
    require_new(folder)
    train_to_folder(config, folder)
    print(f'wrote {folder}; edit it: propmeta-edit edit "Ann Lee lives in" "Peru" --model {shlex.quote(str(folder))}', flush=True)


def _announce_data(config: MetaTrainConfig) -> None:
    """Say so where the facts are those that come with the package, since nothing else would."""
    if config.data == WORLD:
        LOG.info("data: the offline world that comes with the package; --data FILE takes a training file in CRE's format")


def choose_rate(config: MetaTrainConfig, rates: Numbers = RATES, num_facts: int = 8) -> int:
    """Find an inner rate that writes facts into a model, on a handful of them; nothing is trained.

    Settings as for meta-train: the same model, data, layers, modules and number of steps. The lowest rate counts at which every
    fact is learnt, as far as its loss before the last step tells.

    Args:
        rates: inner rates to try.
        num_facts: how many facts each is tried on.
    """
    require_at_least(1, num_facts=num_facts)
    require_positive(rates=min(rates))
    _announce_data(config)
    trials = rate_choice.try_rates(config, rates, num_facts)
    print(rate_choice.describe_trials(trials), flush=True)
    chosen = rate_choice.choose(trials)
    if chosen is None:
        higher = ",".join(f"{factor * max(rates):g}" for factor in (2, 5, 10))
        print(
            f"no rate writes every fact: try higher ones (--rates {higher}), more steps "
            f"(--num-inner-steps {2 * config.num_inner_steps}), or another layer (--layers)"
        )
        return 1
    print(f"chosen: {chosen.rate:g}; go on with: propmeta-edit meta-train ... --inner-lr {chosen.rate:g} (lr in a YAML of MetaFT)")
    return 0


def teach(
    model: str,
    data: Files,
    output: str,
    settings: TeachingSettings,
    questions_per_source: int = 500,
    multi_hop_questions: int = 300,
    device: str = "auto",
    dry_run: bool = False,
) -> None:
    """Teach a model the single hops that data files rest on, so that a two-hop test finds the second hop known.

    No two-hop question and no edited fact is taught. A teaching that was stopped continues when the same command is given again.
    The output is an ordinary model folder, in fp32; teaching.json in it says what was taught and how much of it is known, before
    and after.

    Args:
        model: a folder, a bundled name (smollm2-135m-raw is SmolLM2 before it was taught anything), or a hub id.
        data: files in CRE's or MQuAKE's format, with commas between them.
        output: new folder for the taught model.
        questions_per_source: at most so many single hops of each file are asked before and after.
        multi_hop_questions: at most so many old multi-hop questions of each MQuAKE file are asked too; they are not taught.
        device: auto, cpu, mps, cuda or cuda:N.
        dry_run: say how many questions and steps it would be, and about how long it would take here, and stop.
    """
    lesson = read_lesson(data, questions_per_source, multi_hop_questions, settings.seed)
    print(describe_lesson(lesson, settings), flush=True)
    if dry_run:
        seconds = estimate_seconds(model, lesson, settings, device)
        print(f"about {seconds / 60:.1f} min here, from a few timed steps", flush=True)
        return
    print(describe_taught(teach_to_folder(model, lesson, Path(output), settings, device)))
    print(f"wrote {output}", flush=True)


def rebuild(name: str, output: str) -> None:
    """Train a bundled model's shipped files anew, as those in the package were made (long).

    Args:
        name: smollm2-135m, smollm2-135m-metaft, or one of the two with real in their names, from the user's own data files.
        output: new folder for the files.
    """
    (real.rebuild if name in REAL_NAMES else rebuild_files)(name, Path(output))
    print(f"wrote {output}", flush=True)


def check_data(path: str) -> None:
    """Say what a data file is, count what is in it, and show one case as the model will see it.

    CRE, MQuAKE and its kin, CaKE's, CounterFact, and EasyEdit's own.

    Args:
        path: the file, a folder whose data files are all checked, or hub:owner/name.
    """
    text, num_broken = describe_files(path)
    print(text)
    if num_broken:
        raise DataError(f"{num_broken} of its files cannot be used; the blocks above say why", path)


def statistics(
    model: str,
    layers: WholeNumbers,
    corpus: str = SAMPLED,
    dataset: str = SAMPLED,
    num_texts: int = 100_000,
    max_length: int = 512,
    batch_tokens: int = 4096,
    output: str = "data/stats",
    device: str = "auto",
    dtype: str = "fast",
    seed: int = 0,
) -> None:
    """Gather the second moments that MEMIT and AlphaEdit need, in the files that EasyEdit reads.

    All layers are gathered in one pass over the texts. The YAML's stats_dir is --output, mom2_dataset is --dataset and
    mom2_n_samples is --num-texts. A stopped run continues.

    Args:
        model: a folder, a bundled name, or a hub id.
        layers: 0-based, e.g. 4,5,6,7,8.
        corpus: FILE.txt (one text a line, or blank lines between them), FILE.jsonl, hub:owner/name[:configuration], or sampled for
            text that the model writes itself and the offline world's sentences.
        dataset: what the corpus is called in the files' path.
        num_texts: how many texts.
        max_length: tokens of a text that are read.
        batch_tokens: tokens at once: lower it if memory runs out.
        output: EasyEdit's stats_dir.
        device: auto, cpu, mps, cuda or cuda:N.
        dtype: float32, bfloat16, float16, or fast.
        seed: of the sampled texts and of their order.
    """
    files = make_statistics(
        model,
        layers,
        corpus,
        Path(output),
        num_texts=num_texts,
        dataset=dataset,
        max_length=max_length,
        batch_tokens=batch_tokens,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    print(f"wrote {len(files)} files to {files[0].parent}", flush=True)


def export(checkpoint: str, output: str, dtype: str = "bfloat16", compact: bool = False, tolerance: float | None = None) -> None:
    """Write a meta-tuned checkpoint in another dtype, or what it changes alone, and say what that costs.

    Half precision rounds what meta-training moved.

    Args:
        checkpoint: a meta-tuned folder or bundled name.
        output: folder for the copy; must not exist yet.
        dtype: bfloat16, float16 or float32.
        compact: only the trained tensors, unrounded, with the base's name and hash: what to upload.
        tolerance: with compact, a LoRA on the base in their place, as small as it can be if this share of the change's norm may be
            lost, 0.2 say.
    """
    if tolerance is not None and not compact:
        raise ConfigError(f"tolerance {tolerance} is of a compact export: add --compact, or leave it out")
    if compact:
        if tolerance is None:
            size, what = export_compact(checkpoint, Path(output)), "trained tensors"
        else:
            size, lost = export_as_lora(checkpoint, Path(output), tolerance)
            what = f"a LoRA, which loses {100 * lost:.1f} % of the change's norm"
        print(f"wrote {output}: {size / 2**20:.1f} MiB of {what}", flush=True)
        return
    cost = export_checkpoint(checkpoint, Path(output), dtype)
    print(
        f"wrote {output} in {dtype}: trained tensors are off by at most {cost['max_abs_error']:.2e} "
        f"({100 * cost['relative_error']:.3f} % of their norm); for further edits use the fp32 checkpoint"
    )


def push(folder: str, name: str, public: bool = False) -> None:
    """Upload a checkpoint or a saved edit to the hub, with its card.

    Args:
        folder: a checkpoint, whole or compact (export --compact), or what edit --save wrote.
        name: of the repository, owner/name; it is made if need be.
        public: let everybody see it, if it is new.
    """
    print(f"pushed {folder} to {push_to_hub(folder, name, private=not public)}", flush=True)


def expand(compact: str, output: str, base: str | None = None) -> None:
    """Put a compact checkpoint, or an edit, and its base together, as an ordinary model folder.

    Named as a model, either does this by itself, in the cache folder.

    Args:
        compact: a folder that export --compact or edit --save wrote.
        output: folder for the model; must not exist yet.
        base: the base model, if not where the card says.
    """
    expand_folder(Path(compact), Path(output), base)
    print(f"wrote {output}", flush=True)
