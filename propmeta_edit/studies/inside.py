"""What changed inside: the same facts written by FT and by MetaFT, each edit studied once and kept on disk."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import torch

from propmeta_edit.analysis.case_study import choose_companions, make_twin, study_edit
from propmeta_edit.analysis.finished import FinishedPieces
from propmeta_edit.analysis.lens import read_tokens, record_states
from propmeta_edit.analysis.probes import make_question_probe
from propmeta_edit.analysis.weight_change import (
    compute_cosine,
    compute_norm,
    describe_change,
    load_kept_state,
    mean_cosines,
)
from propmeta_edit.config import build_config
from propmeta_edit.easyedit.hparams import MetaFTHyperParams
from propmeta_edit.edits.compute import edit_many
from propmeta_edit.edits.edit import Edit
from propmeta_edit.errors import DataError
from propmeta_edit.evaluation.runner import DataSet
from propmeta_edit.files import sha256_of_file
from propmeta_edit.finetune.weights import apply_snapshot, restored_on_exit, snapshot
from propmeta_edit.metatrain.run import find_kept_states
from propmeta_edit.models.artefacts import CHECKPOINT_CARD
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.models.loading import load_model, require_trained_from
from propmeta_edit.progress import progress_bar
from propmeta_edit.protocols import Tokenizer
from propmeta_edit.records import Case
from propmeta_edit.studies.runs import hash_of_model

USUAL = ("FT", "FT-as-MetaFT", "MetaFT")
ARMS = (*USUAL, "MetaFT-bound")
AT_ONCE = 4  # edits computed side by side
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Arm:
    """A way to edit, with the model it starts from."""

    name: str
    hparams: MetaFTHyperParams

    def identity(self) -> dict[str, Any]:
        """What decides its numbers."""
        return {**self.hparams.to_dict(), "device": None, "model_sha256": hash_of_model(str(self.hparams.model_name))}

    def load(self) -> tuple[Any, Any]:
        """(model in fp32, tokenizer); loaded once, and shared by the arms that start from the same model."""
        return _load(str(self.hparams.model_name), str(self.hparams.device))

    def edit(self, cases: Sequence[Case]) -> list[Edit]:
        """One independent edit a case."""
        return edit_many(*self.load(), [case.edits[0] for case in cases], self.hparams, AT_ONCE) if cases else []

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What its edits move."""
        return select_parameters(self.load()[0], self.hparams.layers, self.hparams.modules)


@cache
def _load(model: str, device: str) -> tuple[Any, Any]:
    return load_model(model, device=device)


def make_arms(settings: Mapping[str, Mapping[str, Any]], device: str) -> dict[str, Arm]:
    """FT with its own settings, FT with MetaFT's, MetaFT, and MetaFT-bound if it is there; all in fp32, since what is looked for
    is small.

    Args:
        settings: by method, as the YAMLs in ``hparams/FT`` and ``hparams/MetaFT`` hold them.
    """
    as_metaft = {**settings["MetaFT"], "model_name": settings["FT"]["model_name"]}
    values = {**settings, "FT-as-MetaFT": as_metaft}
    more = {"device": device, "dtype": "float32"}
    return {n: Arm(n, build_config(MetaFTHyperParams, {**values[n], **more}, f"the settings of {n}")) for n in ARMS if n in values}


def choose_cases(dataset: DataSet, tokenizer: Tokenizer, number: int, seed: int) -> list[tuple[Case, Case]]:
    """Cases in a seeded order, each with its companion; more of them begin with the same ones.

    Raises:
        DataError: none can be studied.
    """
    pairs = choose_companions(tokenizer, dataset.cases)
    if not pairs:
        raise DataError(
            f"no case of {dataset.name} can be studied: one edit with a subject, and a question that repeats the edit's prompt "
            "word for word, are needed; the cre data sets have them"
        )
    Random(seed).shuffle(pairs)
    return pairs[:number]


def study_states(
    arms: Mapping[str, Arm], dataset: DataSet, path: Path, *, number: int, every: int, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """``study_edit`` of every arm on the same cases; what is in the file already is not computed again.

    Returns:
        By arm a list of studies, case by case in the same order.
    """
    done = FinishedPieces(path, {"arms": {name: arm.identity() for name, arm in arms.items()}, "every": every})
    pairs = choose_cases(dataset, next(iter(arms.values())).load()[1], number, seed)
    keys = {
        (name, case.case_id): f"{name}|{dataset.name}@{dataset.sha256[:12]}|{case.case_id}|{case.question.text}"
        for name in arms
        for case, _ in pairs  # the seed decides which of a record's questions is the case's
    }
    left = sum(key not in done.pieces for key in keys.values())
    with progress_bar(total=left, desc=f"states, {dataset.name}", unit="edit", hidden=not left) as bar:
        for start in range(0, len(pairs), AT_ONCE):  # all arms of a few cases before the next, so that a stopped run is paired
            for name, arm in arms.items():
                todo = [pair for pair in pairs[start : start + AT_ONCE] if keys[name, pair[0].case_id] not in done.pieces]
                edits = arm.edit([case for case, _ in todo])
                for (case, companion), edit in zip(todo, edits, strict=True):
                    done.add(keys[name, case.case_id], study_edit(*arm.load(), case, companion, edit, every))
                    bar.update()
    return {name: [done.pieces[keys[name, case.case_id]] for case, _ in pairs] for name in arms}


@dataclass(frozen=True)
class Stage:
    """A point on the way from the base to the meta-trained model.

    Args:
        num_tasks: of meta-training; None where that is not known or not the point.
        file: the trained tensors to put into the arm's model, if it is a state on the way.
    """

    label: str
    arm: Arm
    num_tasks: int | None
    file: Path | None = None

    @property
    def key(self) -> str:
        return json.dumps([self.label, self.arm.identity(), self.file and sha256_of_file(self.file)], sort_keys=True)


def list_stages(arms: Mapping[str, Arm], checkpoints: str | None) -> list[Stage]:
    """FT with its own settings, the base, the states that a run kept, the meta-trained models.

    Raises:
        ModelError: a folder without kept states.
        OriginError: it is of a run from another base.
    """
    base = arms["FT-as-MetaFT"]
    stages = [Stage("FT", arms["FT"], None), Stage("FT-as-MetaFT", base, 0)]
    if checkpoints is not None:
        kept = find_kept_states(checkpoints)
        if (Path(checkpoints) / CHECKPOINT_CARD).is_file():
            name = str(base.hparams.model_name)
            require_trained_from(checkpoints, name, hash_of_model(name), "give a run from this base")
        stages += [Stage(f"after {number} tasks", base, number, file) for number, file in kept.items()]
    return [*stages, *(Stage(name, arms[name], None) for name in ARMS[2:] if name in arms)]


def study_weights(stages: Sequence[Stage], dataset: DataSet, path: Path, *, number: int, seed: int) -> dict[str, dict[str, Any]]:
    """What edits of the same facts are like at each stage; the first stage is FT's own, the second the base.

    Returns:
        By label: ``num_tasks``; ``meta``, the change from the base that meta-training made (``describe_change``, empty for none);
        ``edits``, an entry a fact: its ``shape`` (``describe_change``), mean cosine with the other facts' changes, cosine with that
        of the same fact about another subject with another object, cosines with the base's change of the same fact and with
        meta-training's, and the ``gain`` of the answer's log-probability in nats.

    Raises:
        DataError: fewer than two cases.
    """
    pairs = choose_cases(dataset, stages[0].arm.load()[1], number, seed)
    cases = [case for case, _ in pairs]
    if len(cases) < 2:
        raise DataError(f"two cases or more are needed to compare changes, and {dataset.name} has {len(cases)} that can be studied")
    done = FinishedPieces(path, {"cases": [[case.case_id, case.question.text] for case in cases], "data": dataset.sha256})
    base = stages[1]
    unedited = snapshot(base.arm.parameters())
    of_base: list[Tensors] = []
    for stage in progress_bar([stage for stage in stages if stage.key not in done.pieces], desc="weights", unit="stage"):
        is_comparable = set(stage.arm.parameters()) == set(unedited)
        if is_comparable and not of_base:
            of_base = [edit.change() for edit in base.arm.edit(cases)]
        with _standing(stage, unedited):
            moved = _moved_from(unedited, stage.arm.parameters()) if is_comparable else {}
            entries = _describe_edits(stage.arm, pairs, of_base if is_comparable else [], moved)
        meta = describe_change(unedited, moved) if moved else {}
        done.add(stage.key, {"num_tasks": stage.num_tasks, "meta": meta, "edits": entries})
    return {stage.label: done.pieces[stage.key] for stage in stages}


def _moved_from(unedited: Tensors, parameters: Tensors) -> dict[str, torch.Tensor]:
    """How far the tensors are from the base's, by name; empty where they are the base's."""
    moved = {name: value.detach() - unedited[name] for name, value in parameters.items()}
    return moved if compute_norm(moved) else {}


@contextmanager
def _standing(stage: Stage, like: Tensors) -> Iterator[None]:
    """Inside, the arm's model has the stage's trained tensors."""
    if stage.file is None:
        yield
        return
    parameters = stage.arm.parameters()
    with restored_on_exit(parameters):
        apply_snapshot(parameters, load_kept_state(stage.file, like))
        yield


def _describe_edits(
    arm: Arm, pairs: Sequence[tuple[Case, Case]], of_base: Sequence[Tensors], moved: Tensors
) -> list[dict[str, Any]]:
    """The entries of ``study_weights``, of edits made on the arm's model as it stands."""
    model, tokenizer = arm.load()
    cases, entries = [case for case, _ in pairs], list[dict[str, Any]]()
    edits, twins = arm.edit(cases), arm.edit([make_twin(case, companion) for case, companion in pairs])
    changes = [edit.change() for edit in edits]
    for number, (case, edit, among) in enumerate(zip(cases, edits, mean_cosines(changes), strict=True)):
        probe = make_question_probe(tokenizer, case)
        said = []
        for standing in (False, True):
            with edit.applied(model) if standing else nullcontext():
                said.append(float(read_tokens(model, record_states(model, probe.input_ids)[-1, -1], [probe.target])[0][0]))
        entries.append(
            {
                "case": case.case_id,
                "shape": describe_change(edit.before or {}, changes[number]),
                "cosine with other facts": among,
                "cosine with one of its kind": compute_cosine(changes[number], twins[number].change()),
                "cosine with the base's": _cosine_with(of_base[number], changes[number]) if of_base else None,
                "cosine with meta-training": _cosine_with(moved, changes[number]) if moved else None,
                "gain": said[1] - said[0],
            }
        )
    return entries


def _cosine_with(other: Tensors, change: Tensors) -> float:
    """Of the tensors that the change moves: one that is kept as factors moves no biases."""
    return compute_cosine(change, {name: other[name] for name in change})
