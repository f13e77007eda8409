"""The ``propmeta-edit`` command: thin, every verb one call into the package."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from propmeta_edit.errors import PropMetaError


def make_parser() -> ArgumentParser:
    """The parser of all verbs."""
    parser = ArgumentParser(
        prog="propmeta-edit",
        description="Meta-train language models so that plain fine-tuning edits propagate, and prepare the bundled small model.",
    )
    verbs = parser.add_subcommands(dest="verb", required=True)
    verbs.add_subcommand("prepare", _prepare_parser(), help="build the bundled models in the cache folder")
    verbs.add_subcommand("edit", _edit_parser(), help="write facts into a model and see what it says before and after")
    verbs.add_subcommand("ask", _ask_parser(), help="ask a model as it is and under saved edits")
    verbs.add_subcommand("meta-train", _meta_train_parser(), help="meta-train a model (once, offline)")
    verbs.add_subcommand("choose-layer", _choose_layer_parser(), help="find the layer to meta-train, on validation")
    verbs.add_subcommand("rebuild", _rebuild_parser(), help="train the bundled models' compact files anew")
    data = ArgumentParser(description="Look into data files: CRE, MQuAKE and its kin, CaKE's, and EasyEdit's own.")
    verbs.add_subcommand("data", data, help="look into data files before running on them: data check PATH")
    verbs.add_subcommand("statistics", _statistics_parser(), help="gather the second moments that MEMIT and AlphaEdit need")
    verbs.add_subcommand("export", _export_parser(), help="write a meta-tuned checkpoint in another dtype and say what it costs")
    verbs.add_subcommand("expand", _expand_parser(), help="put a compact checkpoint and its base together")
    _add_data_actions(data)  # a level is complete before the next begins
    return parser


def _prepare_parser() -> ArgumentParser:
    from propmeta_edit.models.artefacts import BUNDLED

    parser = ArgumentParser(description="Build bundled models that are not there yet (PROPMETA_HOME, or ~/.cache/propmeta_edit).")
    parser.add_argument("names", nargs="*", help=f"which of {', '.join(BUNDLED)} (default: the first two, which need no training)")
    return parser


def _edit_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Write a fact into a model by plain fine-tuning and show, side by side, what it says before and after: about "
        "the fact, about what follows from it, and about other things. Without arguments: an example on the bundled model."
    )
    parser.add_argument("prompt", type=str, nargs="?", help='the fact without its object: "Ann Lee lives in"')
    parser.add_argument("target", type=str, nargs="?", help='the object: "Peru"')
    parser.add_argument("--subject", type=str, help="who or what the fact is about, if methods that need it are to read the edit")
    parser.add_argument("--requests", type=str, help="a file of requests instead (JSON list or lines: prompt, target_new, subject)")
    parser.add_argument("--related", type=str, action="append", default=[], help="a question whose answer follows from it (repeat)")
    parser.add_argument("--unrelated", type=str, action="append", default=[], help="a question about something else (repeat)")
    parser.add_argument("--model", type=str, help="a meta-tuned folder or bundled name (default: the bundled one)")
    parser.add_argument(
        "--hparams",
        type=str,
        help="a MetaFT YAML (default: as the model was meta-trained, else that of its name in hparams/MetaFT)",
    )
    parser.add_argument("--save", type=str, help="new folder for the edit, for propmeta-edit ask")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--device",
        type=str,
        help="auto, cpu, mps, cuda or cuda:N (default: as the YAML says, which is auto in those that come along)",
    )
    return parser


def _ask_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Ask questions of a model as it is and under saved edits, side by side.")
    parser.add_argument("questions", type=str, nargs="+", help="in full sentences")
    parser.add_argument("--edit", type=str, action="append", required=True, help="a folder that edit --save wrote (repeat)")
    parser.add_argument("--model", type=str, help="the model they were made on, if not where they say")
    parser.add_argument(
        "--any-base",
        action="store_true",
        help="put their tensors into the model even if it is not, number by number, the one they were made on: for a base that was "
        "built elsewhere",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, mps, cuda or cuda:N")
    return parser


def _rebuild_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Train a bundled model's compact files anew, as those in the package were made (long).")
    parser.add_argument("name", type=str, help="smollm2-135m or smollm2-135m-metaft")
    parser.add_argument("--output", type=str, required=True, help="new folder for the files")
    return parser


def _meta_train_parser() -> ArgumentParser:
    from propmeta_edit.metatrain.config import MetaTrainConfig

    parser = ArgumentParser(
        description="Meta-train by first-order MAML over (new fact, two-hop question) pairs, each used once. "
        "Settings come from --config; any of them can be given on the command line as well and then wins. "
        "A run that was stopped continues when the same command is given again."
    )
    parser.add_argument("--config", action="config", help="a YAML file, e.g. hparams/MetaTrain/smollm2-135m.yaml")
    parser.add_argument("--output", type=str, help="new folder for the checkpoint (default: checkpoints/<model>-metaft)")
    parser.add_argument(
        "--dry-run", action="store_true", help="time a few tasks, say what the run would take in memory and time, and stop"
    )
    parser.add_class_arguments(MetaTrainConfig)
    return parser


def _choose_layer_parser() -> ArgumentParser:
    from propmeta_edit.metatrain.config import MetaTrainConfig
    from propmeta_edit.models.layers import MODULE_CHOICES

    parser = ArgumentParser(
        description="Choose the layer (and modules) to meta-train by successive halving on validation cases: each candidate gets a "
        "few tasks, the better half twice as many, until one is left. Settings as for meta-train. A stopped search continues.",
    )
    parser.add_argument("--config", action="config", help="a YAML file, e.g. hparams/MetaTrain/smollm2-135m.yaml")
    parser.add_argument("--candidates", type=list[int], required=True, help="0-based layers, e.g. [2,5,8,11]")
    parser.add_argument("--module-choices", type=list[str], default=["attention+mlp"], help=f"of {', '.join(MODULE_CHOICES)}")
    parser.add_argument("--first-tasks", type=int, default=80, help="tasks of each candidate in the first round")
    parser.add_argument("--output", type=str, required=True, help="folder of the search")
    parser.add_class_arguments(MetaTrainConfig)
    return parser


def _add_data_actions(data: ArgumentParser) -> None:
    actions = data.add_subcommands(dest="action", required=True)
    check = ArgumentParser(description="Say what a file is, count what is in it, and show one case as the model will see it.")
    check.add_argument("path", type=str, help="the file, a folder whose data files are all checked, or hub:owner/name")
    actions.add_subcommand("check", check, help="what a file is and what is in it")


def _statistics_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Gather the second moments of the keys, all layers in one pass, into the files EasyEdit reads: its YAML's "
        "stats_dir is --output, mom2_dataset is --dataset and mom2_n_samples is --num-texts. A stopped run continues."
    )
    parser.add_argument("model", type=str, help="a folder, a bundled name, or a hub id")
    parser.add_argument("--layers", type=list[int], required=True, help="0-based, e.g. [4,5,6,7,8]")
    parser.add_argument(
        "--corpus",
        type=str,
        default="sampled",
        help="FILE.txt, FILE.jsonl, hub:owner/name[:configuration], or sampled: "
        "text the model writes itself and the offline world's sentences (default: sampled)",
    )
    parser.add_argument("--dataset", type=str, default="sampled", help="what the corpus is called in the files' path")
    parser.add_argument("--num-texts", type=int, default=100_000, help="how many texts")
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a text that are read")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens at once: lower it if memory runs out")
    parser.add_argument("--output", type=str, default="data/stats", help="EasyEdit's stats_dir")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, mps, cuda or cuda:N")
    parser.add_argument("--dtype", type=str, default="fast", help="float32, bfloat16, float16, or fast")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled texts and of their order")
    return parser


def _export_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Export a meta-tuned checkpoint; half precision rounds what meta-training moved.")
    parser.add_argument("checkpoint", type=str, help="a meta-tuned folder or bundled name")
    parser.add_argument("--output", type=str, required=True, help="folder for the copy; must not exist yet")
    parser.add_argument("--dtype", type=str, default="bfloat16", help="bfloat16, float16 or float32")
    parser.add_argument(
        "--compact", action="store_true", help="only the trained tensors, unrounded, with the base's name and hash: what to upload"
    )
    return parser


def _expand_parser() -> ArgumentParser:
    parser = ArgumentParser(description="Turn a compact checkpoint back into an ordinary model folder, with its base's weights.")
    parser.add_argument("compact", type=str, help="a folder that export --compact wrote")
    parser.add_argument("--output", type=str, required=True, help="folder for the checkpoint; must not exist yet")
    parser.add_argument("--base", type=str, help="the base model, if not where the card says")
    return parser


def _run_prepare(options: Namespace) -> None:
    from propmeta_edit.models.artefacts import BUNDLED, ensure_artefact

    for name in options.names or list(BUNDLED)[:2]:
        print(f"{name}: {ensure_artefact(name)}", flush=True)


def _run_edit(options: Namespace) -> None:
    from propmeta_edit.errors import ConfigError
    from propmeta_edit.recipes import edit_facts
    from propmeta_edit.records import EditRequest

    if options.requests and options.prompt is not None:
        raise ConfigError("give a fact or --requests, not both")
    if options.prompt is None and (options.subject or (options.related and not options.requests)):
        raise ConfigError("give the fact as well: propmeta-edit edit 'Ann Lee lives in' 'Peru' --related ... (or --requests FILE)")
    if options.prompt is not None and not options.target:
        raise ConfigError(f"a fact needs its object as well: propmeta-edit edit {options.prompt!r} 'the object'")
    related, unrelated = options.related, options.unrelated or list(edit_facts.UNRELATED)
    if options.requests:
        requests = edit_facts.read_requests(Path(options.requests))
    elif options.prompt is not None:
        requests = [EditRequest(options.prompt, options.target, options.subject)]
    else:
        requests, related = [edit_facts.EXAMPLE], list(edit_facts.RELATED)
    if options.save:
        edit_facts.require_new_folder(Path(options.save))
    hparams = edit_facts.read_hparams(options.model, options.hparams, options.device)
    edit, answers = edit_facts.edit_and_ask(requests, related, unrelated, hparams)
    names = ["before", "after"]
    if options.json:
        print(edit_facts.to_json(answers, names, edit), flush=True)
    else:
        for request in edit.requests:
            print(f"edit: {request.prompt} -> {request.target_new}")
        print(edit_facts.format_answers(answers, names), flush=True)
    if options.save:
        edit.save(options.save)  # after the answers, which would be lost with it otherwise
    if options.save and not options.json:
        print(f'saved in {options.save}; ask it: propmeta-edit ask "..." --edit {options.save}')


def _run_ask(options: Namespace) -> None:
    from propmeta_edit.recipes import edit_facts

    folders = [Path(folder) for folder in options.edit]
    names = edit_facts.name_columns(folders)
    answers = edit_facts.ask_with_edits(folders, options.questions, options.model, options.device, any_base=options.any_base)
    print(edit_facts.to_json(answers, names) if options.json else edit_facts.format_answers(answers, names))


def _read_config(options: Namespace, verb: str) -> Any:
    from propmeta_edit.config import build_config
    from propmeta_edit.metatrain.config import MetaTrainConfig

    names = [field.name for field in dataclasses.fields(MetaTrainConfig)]
    return build_config(MetaTrainConfig, {name: options[name] for name in names}, verb)


def _run_choose_layer(options: Namespace) -> None:
    from propmeta_edit.recipes.layer_choice import PICTURE, choose_layer

    config, folder = _read_config(options, "choose-layer"), Path(options.output)
    scores = choose_layer(config, options.candidates, options.module_choices, options.first_tasks, folder)
    for score in scores:
        splits = ", ".join(f"{name} {100 * value:.1f}" for name, value in score.splits.items())
        print(f"{score.num_tasks:>6} tasks  layer {score.layer:>2} {score.modules:<14} {100 * score.accuracy:5.1f} %  ({splits})")
    print(f"chosen: layers: [{scores[-1].layer}], modules: {scores[-1].modules}; picture: {folder / PICTURE}", flush=True)


def _run_meta_train(options: Namespace) -> None:
    from propmeta_edit.errors import ModelError
    from propmeta_edit.recipes.meta_training import plan_meta_training, train_to_folder

    config = _read_config(options, "meta-train")
    output = Path(options.output or f"checkpoints/{Path(config.model).name}-metaft")
    if options.dry_run:
        print(plan_meta_training(config), flush=True)
        return
    if output.exists():
        raise ModelError(f"{output} exists; choose another --output, or remove it")
    train_to_folder(config, output)
    print(f"wrote {output}", flush=True)


def _run_rebuild(options: Namespace) -> None:
    from propmeta_edit.recipes.bundled import rebuild

    rebuild(options.name, Path(options.output))
    print(f"wrote {options.output}", flush=True)


def _run_data(options: Namespace) -> None:
    from propmeta_edit.errors import DataError
    from propmeta_edit.recipes.data_check import describe_files

    text, num_broken = describe_files(options.check.path)
    print(text)
    if num_broken:
        raise DataError(f"{num_broken} of its files cannot be used; the blocks above say why", options.check.path)


def _run_statistics(options: Namespace) -> None:
    from propmeta_edit.recipes.statistics import make_statistics

    files = make_statistics(
        options.model,
        options.layers,
        options.corpus,
        Path(options.output),
        num_texts=options.num_texts,
        dataset=options.dataset,
        max_length=options.max_length,
        batch_tokens=options.batch_tokens,
        device=options.device,
        dtype=options.dtype,
        seed=options.seed,
    )
    print(f"wrote {len(files)} files to {files[0].parent}", flush=True)


def _run_export(options: Namespace) -> None:
    from propmeta_edit.metatrain.checkpoint import export_checkpoint, export_compact

    if options.compact:
        size = export_compact(options.checkpoint, Path(options.output))
        print(f"wrote {options.output}: {size / 2**20:.1f} MiB of trained tensors", flush=True)
        return
    cost = export_checkpoint(options.checkpoint, Path(options.output), options.dtype)
    print(
        f"wrote {options.output} in {options.dtype}: trained tensors are off by at most {cost['max_abs_error']:.2e} "
        f"({100 * cost['relative_error']:.3f} % of their norm); for further edits use the fp32 checkpoint"
    )


def _run_expand(options: Namespace) -> None:
    from propmeta_edit.metatrain.checkpoint import expand_compact

    expand_compact(Path(options.compact), Path(options.output), options.base)
    print(f"wrote {options.output}", flush=True)


RUNNERS = {
    "edit": _run_edit,
    "ask": _run_ask,
    "prepare": _run_prepare,
    "meta-train": _run_meta_train,
    "choose-layer": _run_choose_layer,
    "rebuild": _run_rebuild,
    "data": _run_data,
    "statistics": _run_statistics,
    "export": _run_export,
    "expand": _run_expand,
}


def exit_code_of(run: Callable[[], int]) -> int:
    """0, 1 if ``run`` says that some cases failed, 2 for what the user can mend."""
    failures: list[int] = []
    code = run_or_exit(lambda: failures.append(run()))
    return code or int(bool(failures and failures[0]))


def run_or_exit(function, *arguments) -> int:  # type: ignore[no-untyped-def]
    """Call ``function``; a user's error or a full disk becomes one line on stderr and exit code 2."""
    try:
        function(*arguments)
    except (PropMetaError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f'error: {error}; install what this needs with: pip install -e ".[bench]"', file=sys.stderr)
        return 2
    return 0


def _check_config_files(arguments: Sequence[str]) -> None:
    """A broken settings file is named with its line, which the parser's own message does not do."""
    from propmeta_edit.config import read_yaml

    for option, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if option == "--config" or option.startswith("--config="):
            read_yaml(value if option == "--config" else option.removeprefix("--config="))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``propmeta-edit``; returns the exit code (2 for anything the user can mend)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if run_or_exit(_check_config_files, arguments):
        return 2
    options = make_parser().parse_args(arguments)
    return run_or_exit(RUNNERS[options.verb], options[options.verb])


if __name__ == "__main__":
    sys.exit(main())
