"""What torch and its libraries put around a model or into it, and the states torch can be in, each made on a tiny model.

A kind says what is handed to the package in place of the plain model, inside which context, and whether an edit must come out as it
does on the plain model, or be refused before anything is written.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

EDITED = "model.layers.1.mlp.up_proj"  # a projection that the tests edit
FROZEN = "model.layers.2.mlp.up_proj"  # one that they do not


@dataclass(frozen=True)
class Kind:
    """A surrounding.

    Args:
        change: takes the plain model and gives what is handed to the package; it may change the model itself.
        state: a context around the call.
        refused: part of the ``ModelError``; None where the call gives what it gives on the plain model.
        reference: makes the plain model that it is held against, where ``change`` makes another function of it.
    """

    change: Callable[[Any], Any] = lambda model: model
    state: Callable[[], AbstractContextManager[Any]] = nullcontext
    refused: str | None = None
    reference: Callable[[Any], Any] = lambda model: model


def _train_with_dropout(model: Any) -> Any:
    model.config.attention_dropout = 0.5
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.5
    return model.train()


def _compile_in_place(model: Any) -> Any:
    for block in model.model.layers:
        block.compile(backend="eager")
    return model


def _compile_a_block(model: Any) -> Any:
    model.model.layers[2] = torch.compile(model.model.layers[2], backend="eager")
    return model


def _peft(kind: str) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        import peft

        if kind == "prompt":
            return peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        if kind == "ia3":
            config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["up_proj"], feedforward_modules=["up_proj"])
            return peft.get_peft_model(model, config)
        config = peft.LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        wrapped = peft.get_peft_model(model, config)
        return {"wrapped": wrapped, "inside": model}[kind] if kind != "unloaded" else wrapped.unload().requires_grad_(True)

    return change


def _add_adapter(model: Any) -> None:
    import peft

    model.add_adapter(peft.LoraConfig(r=2, target_modules=["up_proj"]))


def _checkpointed(model: Any) -> Any:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

    checkpoint_wrapper.apply_activation_checkpointing(model, check_fn=lambda module: module in list(model.model.layers))
    return model


class _Head(nn.Module):
    """A part of a model that torch can trace."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model.lm_head(states)
        return logits


def _traced(model: Any) -> Any:
    return torch.jit.trace(_Head(model), torch.zeros(1, 16), check_trace=False)


def _hooked_by_accelerate(model: Any) -> Any:
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    for module in list(model.modules()):
        add_hook_to_module(module, AlignDevicesHook("cpu", io_same_device=True))
    return model


def _offloaded(model: Any) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def _offloaded_to_disk(model: Any) -> Any:
    from accelerate import disk_offload

    with tempfile.TemporaryDirectory() as folder:
        return disk_offload(model, folder, execution_device=torch.device("cpu"))


def _dispatched(model: Any) -> Any:
    from accelerate import dispatch_model

    return dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


def _prepared(model: Any) -> Any:
    from accelerate import Accelerator

    return Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


@contextmanager
def _one_process() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


def _fully_sharded(version: int) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        if version == 1:
            from torch.distributed.fsdp import FullyShardedDataParallel

            return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))

    return change


class ScaledLinear(nn.Linear):
    """As quantisation libraries do it: it passes for a linear layer and computes something else of its weight."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) * 2


class PackedParameter(nn.Parameter):
    """As bitsandbytes' 4-bit weights: two numbers a byte."""


def _replaced_linear(path: str, packed: bool = False) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        old = model.get_submodule(path)
        new = ScaledLinear(old.in_features, old.out_features, bias=False)
        new.weight = nn.Parameter(old.weight.detach() / 2)
        if packed:
            new.weight = PackedParameter(torch.zeros(old.weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
        return model

    return change


def _on(path: str, function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        function(model.get_submodule(path))
        return model

    return change


def _with(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        function(model)
        return model

    return change


def _share_with_another_layer(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight


def _tie(model: Any) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


def _prune(module: Any) -> Any:
    return prune.l1_unstructured(module, "weight", 0.3)


def _share_a_module(model: Any) -> None:
    model.model.layers[0].mlp = model.model.layers[1].mlp


def _give_gradients(model: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)


def _hook_gradients(model: Any) -> None:
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: gradient * 0)


def _hook_forwards(model: Any) -> None:
    for module in model.modules():
        module.register_forward_hook(lambda module, inputs, output: None)
        module.register_forward_pre_hook(lambda module, inputs: None)


def _hook_backwards(model: Any) -> None:
    for module in model.modules():
        module.register_full_backward_hook(lambda module, inputs, outputs: None)


def _move_to_meta(model: Any) -> None:
    model.model.layers[2].to("meta")


def _checkpoint(model: Any) -> None:
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()


def _turn_weights(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.T.contiguous().T


def _half_around(model: Any) -> None:
    model.to(torch.bfloat16)
    model.model.layers[1].float()


def _flatten(model: Any) -> None:
    parameters = list(model.parameters())
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view_as(parameter)


def _set_in_config(**values: Any) -> Callable[[Any], Any]:
    return _with(lambda model: [setattr(model.config, name, value) for name, value in values.items()])


def _quantise(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def _put_into_inference_tensors(model: Any) -> None:
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        for module in list(model.modules()):
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, leaf, nn.Parameter(parameter.detach().clone(), requires_grad=False))


@contextmanager
def _set(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


def _default_dtype(dtype: torch.dtype) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: _set(torch.get_default_dtype, torch.set_default_dtype, dtype)


def _matmul_precision(precision: str) -> AbstractContextManager[Any]:
    return _set(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, precision)


def _flops() -> AbstractContextManager[Any]:
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


def _global_hooks() -> AbstractContextManager[Any]:
    return _set(lambda: None, _GlobalHook(), True)


class _GlobalHook:
    def __init__(self) -> None:
        self._handle: Any = None

    def __call__(self, wanted: Any) -> None:
        if wanted:
            self._handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
        else:
            self._handle.remove()


KINDS: dict[str, Kind] = {
    "plain": Kind(),
    # around the model
    "torch.compile": Kind(lambda model: torch.compile(model, backend="eager")),
    "torch.compile twice": Kind(
        lambda model: torch.compile(torch.compile(model, backend="eager"), backend="eager"),
        refused="no causal language model of transformers",
    ),
    "model.compile()": Kind(_with(lambda model: model.compile(backend="eager"))),
    "blocks compiled in place": Kind(_compile_in_place),
    "a block in torch.compile": Kind(_compile_a_block, refused="torch.compile"),
    "the body in torch.compile": Kind(
        _with(lambda model: setattr(model, "model", torch.compile(model.model, backend="eager"))), refused="torch.compile"
    ),
    "DataParallel": Kind(nn.DataParallel),
    "DataParallel in torch.compile": Kind(lambda model: torch.compile(nn.DataParallel(model), backend="eager")),
    "torch.compile in AveragedModel": Kind(
        lambda model: torch.optim.swa_utils.AveragedModel(torch.compile(model, backend="eager"))
    ),
    "DistributedDataParallel": Kind(nn.parallel.DistributedDataParallel, _one_process),
    "AveragedModel": Kind(torch.optim.swa_utils.AveragedModel),
    "FSDP": Kind(_fully_sharded(1), _one_process, refused="sharded"),
    "fully_shard": Kind(_fully_sharded(2), _one_process, refused="sharded"),
    "PeftModel": Kind(_peft("wrapped"), refused="merge_and_unload"),
    "the model inside a PeftModel": Kind(_peft("inside"), refused="merge_and_unload"),
    "PeftModel with a prompt": Kind(_peft("prompt"), refused="merge_and_unload"),
    "add_adapter of transformers": Kind(_with(_add_adapter), refused="merge_and_unload"),
    "PeftModel with IA3": Kind(_peft("ia3"), refused="merge_and_unload"),
    "PeftModel that was unloaded": Kind(_peft("unloaded")),
    "activations checkpointed by torch.distributed": Kind(_checkpointed, refused="checkpoint_wrapper"),
    "traced": Kind(_traced, refused="no causal language model of transformers"),
    "accelerate hooks": Kind(_hooked_by_accelerate),
    "accelerate cpu_offload": Kind(_offloaded, refused="meta"),
    "accelerate disk_offload": Kind(_offloaded_to_disk, refused="meta"),
    "accelerate dispatch_model": Kind(_dispatched),
    "accelerate prepare, bf16": Kind(_prepared),
    "without a head": Kind(lambda model: model.model, refused="no language model head"),
    "another module": Kind(lambda model: nn.Sequential(model), refused="no causal language model of transformers"),
    "None": Kind(lambda model: None, refused="no causal language model of transformers"),
    # in the model
    "dynamically quantised": Kind(_quantise, refused="quantised"),
    "one frozen module quantised": Kind(_replaced_linear(FROZEN, packed=True), refused="quantised"),
    "one edited module quantised": Kind(_replaced_linear(EDITED, packed=True), refused="quantised"),
    "an edited linear of another kind": Kind(_replaced_linear(EDITED), refused="ScaledLinear"),
    "a frozen linear of another kind": Kind(_replaced_linear(FROZEN)),
    "is_quantized": Kind(_with(lambda model: setattr(model, "is_quantized", True)), refused="quantised"),
    "weight_norm on an edited module": Kind(_on(EDITED, parametrizations.weight_norm), refused="parametr"),
    "weight_norm on a frozen module": Kind(_on(FROZEN, parametrizations.weight_norm)),
    "old weight_norm on an edited module": Kind(_on(EDITED, nn.utils.weight_norm), refused="weight_g"),
    "spectral_norm on an edited module": Kind(_on(EDITED, parametrizations.spectral_norm), refused="parametr"),
    "pruned edited module": Kind(_on(EDITED, _prune), refused="weight_orig"),
    "pruned frozen module": Kind(_on(FROZEN, _prune), reference=_on(FROZEN, lambda m: prune.remove(_prune(m), "weight"))),
    "a weight shared with another layer": Kind(_with(_share_with_another_layer), refused="shared"),
    "a module shared with another layer": Kind(_with(_share_a_module), refused="shared"),
    "tied embeddings": Kind(_with(_tie), reference=_with(_tie)),
    "a layer on meta": Kind(_with(_move_to_meta), refused="meta"),
    "all of it on meta": Kind(lambda model: model.to("meta"), refused="meta"),
    "inference tensors": Kind(_with(_put_into_inference_tensors), refused="inference_mode"),
    "half precision": Kind(lambda model: model.to(torch.bfloat16), refused="must be fp32"),
    "fp32 where it is edited, bf16 around it": Kind(_with(_half_around), refused="is torch.float32 in a model of torch.bfloat16"),
    "turned weights": Kind(_with(_turn_weights)),
    "views of one flat tensor": Kind(_with(_flatten)),
    "shared memory": Kind(lambda model: model.share_memory()),
    # states of the model
    "training with dropout": Kind(_train_with_dropout),
    "requires_grad off": Kind(lambda model: model.requires_grad_(False)),
    "requires_grad off for the edited": Kind(_with(lambda model: model.model.layers[1].requires_grad_(False))),
    "gradients on the parameters": Kind(_with(_give_gradients)),
    "hooks on gradients": Kind(_with(_hook_gradients)),
    "forward hooks": Kind(_with(_hook_forwards)),
    "backward hooks": Kind(_with(_hook_backwards)),
    "a hook that makes embeddings need gradients": Kind(_with(lambda model: model.enable_input_require_grads())),
    "config.return_dict off": Kind(_set_in_config(return_dict=False)),
    "config.output_hidden_states": Kind(_set_in_config(output_hidden_states=True)),
    "config.output_attentions": Kind(_set_in_config(_attn_implementation="eager", output_attentions=True)),
    "config.use_cache off": Kind(_set_in_config(use_cache=False)),
    "another pad token": Kind(_set_in_config(pad_token_id=None)),
    "sampling by default": Kind(
        _with(lambda model: [setattr(model.generation_config, n, v) for n, v in {"do_sample": True, "temperature": 9.0}.items()])
    ),
    "gradient checkpointing": Kind(_with(_checkpoint)),
    # states of torch
    "no_grad": Kind(state=torch.no_grad),
    "inference_mode": Kind(state=torch.inference_mode),
    "grad off": Kind(state=lambda: torch.autograd.grad_mode.set_grad_enabled(False)),
    "autocast bf16": Kind(state=lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast fp16": Kind(state=lambda: torch.autocast("cpu", torch.float16)),
    "autocast without cache": Kind(state=lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False)),
    "default dtype fp64": Kind(state=_default_dtype(torch.float64)),
    "default dtype bf16": Kind(state=_default_dtype(torch.bfloat16)),
    "default device meta": Kind(state=lambda: torch.device("meta")),
    "deterministic": Kind(state=lambda: _set(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True)),
    "anomaly mode": Kind(state=torch.autograd.detect_anomaly),
    "saved tensors on the CPU": Kind(state=torch.autograd.graph.save_on_cpu),
    "FlopCounterMode": Kind(state=_flops),
    "global forward hook": Kind(state=_global_hooks),
    "matrix products in high precision": Kind(state=lambda: _matmul_precision("high")),
    "no cuDNN, mkldnn off": Kind(state=lambda: torch.backends.mkldnn.flags(enabled=False)),
    "math attention alone": Kind(state=lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)),
    "parametrizations cached": Kind(_on(FROZEN, parametrizations.weight_norm), nn.utils.parametrize.cached),
    "profiler": Kind(state=lambda: torch.autograd.profiler.profile(use_cpu=True)),
}
