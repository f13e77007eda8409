"""What an analysis found, as Markdown tables with 95 % intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from propmeta_edit.analysis.gains import (
    HALVES,
    KINDS,
    THIRDS,
    CaseResult,
    compare_by_group,
    cut_at_median_of_relation,
    cut_into_thirds,
)
from propmeta_edit.evaluation.statistics import mean_interval, pair_mean_interval, ratio_interval, wilson_interval
from propmeta_edit.evaluation.tables import markdown_table
from propmeta_edit.studies.inside import ARMS

Studies = Mapping[str, Sequence[Mapping[str, Any]]]
TOKENS = ("new object", "answer", "companion's object")
PAIRED = "cosine with other facts"  # an edit's value is its mean over pairs with all the others
TOP = 10  # a token among the lens's likeliest so many counts as visible
FEW = 10  # cases a relation must have to be shown by itself
SHAPES = ("relative_norm", "stable_rank", "top_share")


def with_interval(value: float, low: float, high: float, scale: float = 1.0, digits: int = 2) -> str:
    return "–" if np.isnan(value) else f"{scale * value:.{digits}f} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"


def mean_cell(values: Sequence[float], scale: float = 1.0, digits: int = 2) -> str:
    """The mean of a column of cases."""
    mean, low, high = mean_interval(np.array(values, dtype=float)[:, None])
    return with_interval(mean[0], low[0], high[0], scale, digits)


def lens_array(studies: Sequence[Mapping[str, Any]], run: str, quantity: str, group: str) -> np.ndarray:
    """[cases, layers, 3 tokens] of the lens at the last token of a group; NaN for a case without the group."""
    shape = np.array(studies[0]["lens"][run][quantity]).shape
    rows = []
    for study in studies:
        values = np.array(study["lens"][run][quantity], dtype=float)
        there = group in study["ends"]
        rows.append(values[:, study["ends"].index(group)] if there else np.full((shape[0], shape[2]), np.nan))
    return np.stack(rows)


def lens_rise(studies: Sequence[Mapping[str, Any]], group: str) -> np.ndarray:
    """[cases, layers, 3]: log-probability in the edited run minus that in the unedited one."""
    rise: np.ndarray = lens_array(studies, "edited", "log_prob", group) - lens_array(studies, "unedited", "log_prob", group)
    return rise


def restored_share(studies: Sequence[Mapping[str, Any]], prompt: str, group: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of the edit's effect on the target's log-probability, the share that one group's states bring along, by patched block."""
    effects, wholes = [], []
    for study in studies:
        found = study[prompt]
        number = len(next(iter(found["write"].values())))
        whole = found["edited"] - found["unedited"]
        effects.append([value - found["unedited"] for value in found["write"].get(group, [np.nan] * number)])
        wholes.append([whole] * number)
    return ratio_interval(np.array(effects), np.array(wholes))


def lost_share(studies: Sequence[Mapping[str, Any]], prompt: str, group: str) -> tuple[float, float, float]:
    """Of the edit's effect, the share that is lost when one group's states after the edited block are the unedited run's."""
    lost = np.array([[s[prompt]["edited"] - s[prompt]["erase"].get(group, np.nan)] for s in studies])
    whole = np.array([[s[prompt]["edited"] - s[prompt]["unedited"]] for s in studies])
    return tuple(float(value[0]) for value in ratio_interval(lost, whole))  # type: ignore[return-value]


def part_share(studies: Sequence[Mapping[str, Any]], prompt: str, part: str) -> tuple[float, float, float]:
    """Of the edit's effect, the share that one part of the weight change has alone."""
    alone = np.array([[s[prompt]["parts"].get(part, np.nan) - s[prompt]["unedited"]] for s in studies])
    whole = np.array([[s[prompt]["edited"] - s[prompt]["unedited"]] for s in studies])
    return tuple(float(value[0]) for value in ratio_interval(alone, whole))  # type: ignore[return-value]


def groups_of(studies: Studies, prompt: str) -> list[str]:
    """The groups of positions that any case has, in the prompt's order."""
    order = ("before", "subject", "phrase", "rest", "template", "last")
    there = {group for own in studies.values() for study in own for group in study[prompt]["write"]}
    return [group for group in order if group in there]


def describe_states(states: Mapping[str, Studies]) -> str:
    """The tables of the part ``states``."""
    return "\n".join(_describe_data_set(name, studies) for name, studies in states.items())


def _describe_data_set(name: str, studies: Studies) -> str:
    n = len(next(iter(studies.values())))
    lines = [f"## {name}: inside the two-hop prompt, n = {n}", "", _effects(studies), _lens(studies)]
    for prompt, what in (
        ("question", "the two-hop question, target: the answer"),
        ("fact", "the fact's prompt, target: the object"),
    ):
        lines += [f"### Right after the edited block: {what}", "", _written(studies, prompt)]
    return "\n".join([*lines, "### Later: share of the effect that one group's states bring along, %", "", _by_layer(studies)])


EFFECTS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "answer, unedited": lambda study: study["question"]["unedited"],
    "answer, edited": lambda study: study["question"]["edited"],
    "its rise": lambda study: study["question"]["edited"] - study["question"]["unedited"],
    "its rise for another subject": lambda study: study["elsewhere"]["edited"] - study["elsewhere"]["unedited"],
    "edited, own subject over another": lambda study: study["question"]["edited"] - study["elsewhere"]["edited"],
    "new object's rise, fact's prompt": lambda study: study["fact"]["edited"] - study["fact"]["unedited"],
    "subject's states moved, %": lambda study: 100 * study["question"]["shift"]["subject"],
    "another subject's states moved, %": lambda study: 100 * study["elsewhere"]["shift"]["subject"],
}


def _effects(studies: Studies) -> str:
    """Every measure by arm, and the last one's minus the others', case by case."""
    rows = []
    for arm, own in studies.items():
        right = sum(study["lens"]["edited"]["rank"][-1][study["ends"].index("last")][1] == 0 for study in own)
        share = with_interval(right / len(own), *wilson_interval(right, len(own)), scale=100, digits=0)
        rows.append([arm, share, *(mean_cell([take(study) for study in own]) for take in EFFECTS.values())])
    *others, last = studies
    for arm in others:
        pairs = list(zip(studies[last], studies[arm], strict=True))
        cells = [mean_cell([take(own) - take(other) for own, other in pairs]) for take in EFFECTS.values()]
        rows.append([f"{last} minus {arm}", "–", *cells])
    header = ["edited by", "answer's first token right, %", *EFFECTS]
    return markdown_table(header, rows) + "\nLog-probabilities of the first telling token, in nats.\n"


def _lens(studies: Studies) -> str:
    """Where the lens sees a token most, and its mean rise there, beside the companion's object."""
    header = [
        "edited by",
        "at the last token of",
        "token",
        "largest rise after block",
        "rise there, nats",
        f"in the top {TOP}, edited %",
    ]
    header += [f"in the top {TOP}, unedited %", "companion's object's rise there"]
    rows = []
    for arm, own in studies.items():
        for group in ("subject", "phrase", "last"):
            rise = lens_rise(own, group)
            for token in (0, 1):
                mean, low, high = mean_interval(rise[:, :, token])
                layer = int(np.nanargmax(mean[:-1]))
                block = str(layer - 1) if layer else "none"  # the first states are the embeddings, then comes block 0
                cells = [arm, group, TOKENS[token], block, with_interval(mean[layer], low[layer], high[layer])]
                for run in ("edited", "unedited"):
                    ranks = lens_array(own, run, "rank", group)[:, layer, token]
                    seen = ranks[~np.isnan(ranks)] < TOP  # of the cases that have this group
                    cells.append(with_interval(seen.mean(), *wilson_interval(int(seen.sum()), len(seen)), scale=100, digits=0))
                rows.append([*cells, mean_cell(rise[:, layer, 2].tolist())])
    return markdown_table(header, rows)


def _written(studies: Studies, prompt: str) -> str:
    header = ["edited by", "positions", "brings along, %", "lost without, %", "states moved by, %"]
    rows = []
    for arm, own in studies.items():
        for group in groups_of(studies, prompt):
            value, low, high = (float(found[0]) for found in restored_share(own, prompt, group))
            moved = mean_cell([s[prompt]["shift"].get(group, np.nan) for s in own], 100, 0)
            lost = with_interval(*lost_share(own, prompt, group), scale=100, digits=0)
            rows.append([arm, group, with_interval(value, low, high, 100, 0), lost, moved])
        for part in ("attention", "mlp"):
            share = part_share(own, prompt, part)
            rows.append([arm, f"(the change of the {part} alone)", with_interval(*share, scale=100, digits=0), "–", "–"])
    return markdown_table(header, rows)


def _by_layer(studies: Studies) -> str:
    groups = groups_of(studies, "question")
    rows = []
    for arm, own in studies.items():
        shares = {group: restored_share(own, "question", group) for group in groups}
        for place, layer in enumerate(own[0]["layers"]):
            at_layer = [tuple(float(part[place]) for part in shares[group]) for group in groups]
            cells = [with_interval(mean, low, high, scale=100, digits=0) for mean, low, high in at_layer]
            rows.append([arm, str(layer), *cells])
    return markdown_table(["edited by", "after block", *groups], rows)


def shape_mean(edit: Mapping[str, Any], quantity: str) -> float:
    """Of the whole change, or the mean over its matrices where the whole has none."""
    shapes = edit["shape"]
    if quantity in shapes["all"]:
        return float(shapes["all"][quantity])
    return float(np.mean([shape[quantity] for name, shape in shapes.items() if name != "all"]))


MEASURES: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "size of ΔW over W, %": lambda edit: 100 * shape_mean(edit, "relative_norm"),
    "stable rank": lambda edit: shape_mean(edit, "stable_rank"),
    "energy in the first direction, %": lambda edit: 100 * shape_mean(edit, "top_share"),
    PAIRED: lambda edit: edit[PAIRED],
    "cosine with one of its kind": lambda edit: edit.get("cosine with one of its kind"),  # not in what older versions kept
    "cosine with the base's": lambda edit: edit["cosine with the base's"],
    "cosine with meta-training": lambda edit: edit["cosine with meta-training"],
    "answer's rise, nats": lambda edit: edit["gain"],
}


def measure(stage: Mapping[str, Any], name: str) -> np.ndarray:
    """One number an edit; NaN where it is not known."""
    values = [MEASURES[name](edit) for edit in stage["edits"]]
    return np.array([np.nan if value is None else value for value in values], dtype=float)


def measure_interval(stage: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    """(mean over the edits, low, high); NaN where it is not known."""
    values = measure(stage, name)
    if name == PAIRED:
        return pair_mean_interval(values)
    return tuple(float(part[0]) for part in mean_interval(values[:, None]))  # type: ignore[return-value]


def describe_weights(weights: Mapping[str, Mapping[str, Any]], dataset: str) -> str:
    """The tables of the part ``weights``."""
    n = len(next(iter(weights.values()))["edits"])
    rows = []
    for label, stage in weights.items():
        moved = 100 * stage["meta"]["all"]["relative_norm"] if stage["meta"] else None
        cells = [with_interval(*measure_interval(stage, name), digits=3 if "cosine" in name else 2) for name in MEASURES]
        rows.append([label, "–" if moved is None else f"{moved:.2f}", *cells])
    lines = [f"## Weights: {n} facts of {dataset}, edited at each stage", ""]
    lines.append(markdown_table(["stage", "the layer's own move, % of W", *MEASURES], rows))
    return "\n".join([*lines, _by_matrix(weights)])


def _by_matrix(weights: Mapping[str, Mapping[str, Any]]) -> str:
    """Size and rank of the edits' changes and of meta-training's, matrix by matrix; shares are of squared norms."""
    header = ["stage", "matrix", "share of the change, %", "size of ΔW over W, %", "stable rank", "effective rank"]
    header.append("energy in the first direction, %")
    columns = (("relative_norm", 100), ("stable_rank", 1), ("effective_rank", 1), ("top_share", 100))
    rows = []
    for label in [name for name in ARMS if name in weights]:
        stage = weights[label]
        for matrix in [name for name in stage["edits"][0]["shape"] if name != "all"]:
            shapes = [edit["shape"][matrix] for edit in stage["edits"]]
            share = mean_cell([(e["shape"][matrix]["norm"] / e["shape"]["all"]["norm"]) ** 2 for e in stage["edits"]], 100, 0)
            cells = [mean_cell([shape[name] for shape in shapes], scale, 1) for name, scale in columns]
            rows.append([label, matrix, share, *cells])
        for matrix, own in stage["meta"].items():
            if matrix != "all":
                share = f"{100 * (own['norm'] / stage['meta']['all']['norm']) ** 2:.0f}"
                rows.append([f"meta-training itself, {label}", matrix, share, *(f"{s * own[name]:.1f}" for name, s in columns)])
    return markdown_table(header, rows)


def group_functions(results: Sequence[CaseResult]) -> dict[str, Callable[[CaseResult], str | None]]:
    """The ways to group cases, by name."""
    thirds, halves = cut_into_thirds(results), cut_at_median_of_relation(results)
    sizes: dict[str, int] = {}
    for result in results:
        relation = result.own.tags.get("relation", "")
        sizes[relation] = sizes.get(relation, 0) + 1
    return {
        "prior strength": lambda r: thirds.get(r.own.case_id),
        "prior strength, relations alike": lambda r: halves.get(r.own.case_id),
        "entity type": lambda r: r.own.tags.get("entity_type"),
        "relation": lambda r: (
            r.own.tags["relation"] if sizes[r.own.tags.get("relation", "")] >= FEW and "relation" in r.own.tags else None
        ),
    }


def describe_gains(gains: Mapping[str, Sequence[CaseResult]]) -> str:
    """The tables of the part ``gains``."""
    lines = []
    for dataset, results in gains.items():
        lines += [f"## {dataset}: MetaFT against FT by kind of case, n = {len(results)}", ""]
        for name, group_of in group_functions(results).items():
            entries = compare_by_group(results, group_of)
            if name.startswith("prior"):
                entries.sort(key=lambda entry: (*THIRDS, *HALVES).index(entry["group"]))
            rows = [
                [
                    entry["group"],
                    str(entry["n"]),
                    f"{100 * entry['own']:.0f}",
                    f"{100 * entry['reference']:.0f}",
                    f"{100 * entry['difference']:+.0f} [{100 * entry['low']:+.0f}, {100 * entry['high']:+.0f}]",
                    f"{entry['wins']} / {entry['losses']}",
                    f"{entry['p_value']:.2g}",
                    f"{entry['p_holm']:.2g}",
                ]
                for entry in entries
            ]
            header = [name, "n", "MetaFT %", "FT %", "difference, points", "wins / losses", "p", "p, Holm"]
            lines.append(markdown_table(header, rows))
        lines.append(_answer_kinds(results))
    return "\n".join(lines)


def _answer_kinds(results: Sequence[CaseResult]) -> str:
    """What either method says, and what became of FT's answers."""
    header = ["FT says \\ MetaFT says", *KINDS, "all, % of the cases"]
    rows = []
    for kind in KINDS:
        own = [result.own_kind for result in results if result.reference_kind == kind]
        share = with_interval(len(own) / len(results), *wilson_interval(len(own), len(results)), scale=100, digits=0)
        rows.append([kind, *(str(own.count(other)) for other in KINDS), share])
    shares = []
    for kind in KINDS:
        count = sum(result.own_kind == kind for result in results)
        shares.append(with_interval(count / len(results), *wilson_interval(count, len(results)), scale=100, digits=0))
    return markdown_table(header, [*rows, ["all, % of the cases", *shares, "–"]])
