"""Seconds and memory an edit: EasyEdit's own FT, our single edit, our edits side by side, and what the machine allows at best."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from propmeta_edit.easyedit.algorithms import easyedit_request, find_algorithm, make_hparams
from propmeta_edit.edits.compute import edit_many
from propmeta_edit.evaluation.runner import batches_of
from propmeta_edit.finetune.edit_settings import EditSettings
from propmeta_edit.finetune.single_edit import put_in_place, write_facts
from propmeta_edit.finetune.weights import apply_snapshot
from propmeta_edit.models.devices import free_unused, peak_memory, wait_for
from propmeta_edit.models.layers import select_parameters
from propmeta_edit.protocols import LanguageModel, Tokenizer
from propmeta_edit.records import EditRequest
from propmeta_edit.speed import parts

EASYEDIT, SINGLE, BATCHED = "EasyEdit FT", "single", "batched"
FLOOR = ("traffic seconds", "arithmetic seconds", "floor")
# So small that EasyEdit's FT never reaches the loss at which it would stop early.
RATE = 1e-7


@dataclass(frozen=True)
class Setting:
    """What is edited, and how long.

    Args:
        filler: words before each prompt, to make it longer.
        at_once: edits side by side, for the batched side.
    """

    model_name: str
    device: str
    dtype: str
    layer: int
    num_steps: int = 10
    filler: int = 0
    at_once: int = 8

    def load(self) -> tuple[Any, Any]:
        return parts.load(self.model_name, self.device, self.dtype, [self.layer], "attention+mlp")

    @property
    def edit(self) -> EditSettings:
        return EditSettings([self.layer], inner_lr=RATE, num_inner_steps=self.num_steps)

    def requests(self, number: int) -> list[EditRequest]:
        before = "It is well known that " * (self.filler // 5)
        facts = [case.edits[0] for case in parts.read_cases(number)]
        return [EditRequest(before + fact.prompt, fact.target_new, fact.subject) for fact in facts]


def time_easyedit(model: LanguageModel, tokenizer: Tokenizer, setting: Setting, number: int) -> float:
    """Seconds an edit of EasyEdit's FT, on the same layer and steps (its template takes the layer's two norms as well)."""
    hparams = make_hparams(
        "FT",
        {
            "alg_name": "FT", "model_name": "llama", "device": setting.device, "layers": [setting.layer],
            "num_steps": setting.num_steps, "batch_size": 1, "max_length": 40, "lr": RATE, "weight_decay": 0, "kl_factor": 0,
            "norm_constraint": False, "rewrite_module_tmp": "model.layers.{}.", "layer_module_tmp": "model.layers.{}",
            "mlp_module_tmp": "model.layers.{}.mlp", "attn_module_tmp": "model.layers.{}.self_attn", "ln_f_module": "model.norm",
            "lm_head_module": "lm_head", "model_parallel": False,
        },
    )  # fmt: skip
    apply = find_algorithm("FT")
    flags = [parameter.requires_grad for parameter in model.parameters()]
    requests = setting.requests(number)
    keep = {"copy": False, "return_orig_weights": True, "keep_original_weight": True}
    started = time.perf_counter()
    try:
        for request in requests:
            _, original = apply(model, tokenizer, [easyedit_request(request)], hparams, **keep)
            apply_snapshot(dict(model.named_parameters()), original)
        wait_for(model.device)
        return (time.perf_counter() - started) / number
    finally:
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None


def time_single(model: LanguageModel, tokenizer: Tokenizer, setting: Setting, number: int) -> float:
    """Seconds of one edit after another by the inner loop, putting back included."""
    parameters, requests = select_parameters(model, [setting.layer]), setting.requests(number)
    started = time.perf_counter()
    for request in requests:
        put_in_place(parameters, write_facts(model, tokenizer, [request], setting.edit))
    wait_for(model.device)
    return (time.perf_counter() - started) / number


def time_batched(model: LanguageModel, tokenizer: Tokenizer, setting: Setting, number: int) -> float:
    """Seconds an edit with ``at_once`` of them side by side, which stay on the model's device."""
    requests = setting.requests(number)
    started = time.perf_counter()
    for some in batches_of(requests, setting.at_once):  # not all in one call: edits that nobody keeps need not be held
        edit_many(model, tokenizer, some, setting.edit, setting.at_once, keep_on_device=True)
    wait_for(model.device)
    return (time.perf_counter() - started) / number


def time_transfer(model: LanguageModel, setting: Setting) -> float:
    """Seconds to copy the tensors of one edit to the CPU, as ``edit_many`` does by itself."""
    tensors = [parameter.detach() for parameter in select_parameters(model, [setting.layer]).values()]
    wait_for(model.device)
    started = time.perf_counter()
    for tensor in tensors:
        tensor.cpu()
    return time.perf_counter() - started


TIMERS: dict[str, Callable[[Any, Any, Setting, int], float]] = {EASYEDIT: time_easyedit, SINGLE: time_single, BATCHED: time_batched}


def measure_machine(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes a second of a large copy (read and write), and multiplications and additions a second of a large product."""
    big = torch.empty(2**26 if device.type == "cpu" else 2**29, dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def best_of(run: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(8):
            wait_for(device)
            started = time.perf_counter()
            run()
            wait_for(device)
            seconds.append(time.perf_counter() - started)
        return min(seconds)

    return {
        "bytes a second": 2 * big.numel() / best_of(lambda: other.copy_(big)),
        "operations a second": 2 * size**3 / best_of(lambda: a @ b),
    }


def estimate_floor(
    model: LanguageModel, tokenizer: Tokenizer, setting: Setting, machine: Mapping[str, float], number: int
) -> dict[str, float]:
    """The least seconds an edit can take here: the larger of its traffic at full bandwidth and its arithmetic at full rate.

    Traffic: below the edited layer every weight once; from it upwards every weight twice a step (forward and back); of the
    edited tensors in fp32 the gradient written and read, value and two moments read and written. Arithmetic: two operations a
    weight and token forward, two back (four in the edited layer, which needs its own gradient).
    """
    blocks = {int(name.split(".")[2]) for name, _ in model.named_parameters() if name.startswith("model.layers.")}
    trained = sum(p.numel() for p in select_parameters(model, [setting.layer]).values())
    below = above = 0.0
    bytes_below = bytes_above = 0.0
    for name, p in model.named_parameters():
        block = int(name.split(".")[2]) if name.startswith("model.layers.") else (max(blocks) + 1 if "norm" in name else None)
        if block is None:
            continue
        if block < setting.layer:
            below, bytes_below = below + p.numel(), bytes_below + p.numel() * p.element_size()
        else:
            above, bytes_above = above + p.numel(), bytes_above + p.numel() * p.element_size()
    head = model.get_output_embeddings().weight
    tokens = answer = 0
    for request in setting.requests(number):
        tokens += len(tokenizer(f"{request.prompt} {request.target_new}")["input_ids"])
        answer += len(tokenizer(f" {request.target_new}", add_special_tokens=False)["input_ids"])
    tokens, answer = tokens / number, answer / number  # type: ignore[assignment]
    k = setting.num_steps
    traffic = bytes_below + k * (2 * bytes_above + 2 * head.numel() * head.element_size() + 8 * 4 * trained)
    arithmetic = 2 * tokens * below + k * (tokens * (4 * above + 2 * trained) + 4 * answer * head.numel())
    by_traffic, by_arithmetic = traffic / machine["bytes a second"], arithmetic / machine["operations a second"]
    return dict(zip(FLOOR, (by_traffic, by_arithmetic, max(by_traffic, by_arithmetic)), strict=True))


def compare(settings: Sequence[Setting], number: int, repeats: int) -> Iterator[dict[str, Any]]:
    """All sides for each setting; EasyEdit's FT cannot mix dtypes, so its model is in the setting's dtype only if that is fp32."""
    for setting in settings:
        yield from _compare_one(setting, number, repeats)


def _compare_one(setting: Setting, number: int, repeats: int) -> Iterator[dict[str, Any]]:
    """One setting; its models are gone when the next one's are loaded. What does not fit into memory has a row that says so.

    All sides run by turns; but if EasyEdit has a model of its own, edits side by side are measured when that is gone, since they
    take as much memory as there is.
    """
    free_unused()  # the setting before
    machine = measure_machine(torch.device(setting.device), getattr(torch, setting.dtype))
    plain = replace(setting, dtype="float32")
    ours = parts.run_if_it_fits(setting.load)
    floor = estimate_floor(*ours, setting, machine, number) if ours else dict.fromkeys(FLOOR)
    easyedit_seconds = None
    for names in [(EASYEDIT, SINGLE, BATCHED)] if plain == setting else [(EASYEDIT, SINGLE), (BATCHED,)]:
        models: dict[str, tuple[Any, Any] | None] = dict.fromkeys(names, ours)
        if EASYEDIT in names and plain != setting:
            models[EASYEDIT] = parts.run_if_it_fits(plain.load)
        runs = {name: partial(TIMERS[name], *model, setting, number) for name, model in models.items() if model}
        times = parts.measure(runs, repeats)
        easyedit_seconds = times[EASYEDIT].usual if EASYEDIT in times else easyedit_seconds
        for name in names:
            peak = None
            if name in times:
                peak = parts.run_if_it_fits(partial(peak_memory, runs[name], torch.device(setting.device)))
            transfer = time_transfer(ours[0], setting) if ours and name == BATCHED else None
            yield {
                **_describe(setting, name, times.get(name), easyedit_seconds, floor["floor"], number),
                "seconds to the CPU": transfer,
                "peak GiB added": peak,
                **floor,
                **machine,
                "note": parts.NO_MEMORY if peak is None else "",
            }
        del models, runs
        free_unused()


def _describe(
    setting: Setting, name: str, timing: parts.Timing | None, easyedit: float | None, floor: float | None, number: int
) -> dict[str, Any]:
    """What was edited, how, and how fast; what could not be measured is None."""
    seconds = timing.usual if timing else None
    return {
        "model": setting.model_name,
        "side": name,
        "layer": setting.layer,
        "steps": setting.num_steps,
        "filler words": setting.filler,
        "frozen dtype": "float32" if name == EASYEDIT else setting.dtype,
        "at once": setting.at_once if name == BATCHED else 1,
        "seconds an edit": seconds,
        "seconds once": timing.once(number) if timing else None,
        "edits a second": parts.ratio(1, seconds),
        "times EasyEdit FT": parts.ratio(easyedit, seconds),
        "times floor": parts.ratio(seconds, floor),
    }


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ratios that are asked for, of the first setting, with as many edits side by side as were measured and fitted into memory.

    What is not known is None: it was not measured yet, or did not fit.
    """
    first = rows[0]
    same = [row for row in rows if all(row[key] == first[key] for key in ("model", "steps", "filler words"))]
    single: Mapping[str, Any] = next((row for row in same if row["side"] == SINGLE), {})
    fitted = [row for row in same if row["side"] == BATCHED and row["seconds an edit"] is not None]
    batched = max(fitted, key=lambda row: row["at once"], default={})
    return {
        "model": first["model"],
        "single_vs_easyedit_ft": single.get("times EasyEdit FT"),
        "batched_vs_easyedit_ft": batched.get("times EasyEdit FT"),
        "batched_at_once": batched.get("at once"),
        "single_vs_floor": single.get("times floor"),
    }
