"""A mixture of experts from dense models: mergekit-moe's file -> a Mixtral, DeepSeek-MoE, Qwen2-MoE or Qwen3-MoE.

Everything but the MLPs comes from the base; expert i's MLP is model i's; the router's row for it points where its
positive prompts are and its negative ones are not. The result is a MergedCheckpoint like any other: streamed,
resumable, atomic. None of these is one of gnomon's own networks: here they run through transformers.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gnomon.errors import MergeError
from gnomon.kernels import available_threads
from gnomon.merge.build import open_model
from gnomon.merge.layout import Layout
from gnomon.merge.merged import MergedCheckpoint
from gnomon.merge.moe.architectures import PROJECTIONS, Architecture, choose
from gnomon.merge.moe.noise import NoisyCheckpoint
from gnomon.merge.moe.options import Expert, MoeOptions, parse_moe
from gnomon.merge.moe.router import degenerate, router
from gnomon.merge.planned import MergePlan, Source, TensorPlan
from gnomon.models.checkpoint import Checkpoint
from gnomon.models.held_checkpoint import HeldCheckpoint

__all__ = ["open_moe", "parse_moe"]
MADE = "what is made here"
BIASED = ("q_proj", "k_proj", "v_proj")


def open_moe(file: Path, *, seed: int = 0, threads: int = 0) -> MergedCheckpoint:
    """The mixture as a checkpoint, nothing written. Raises ConfigError, MergeError, CheckpointError."""
    options = parse_moe(file)
    experts = [*options.experts, *options.shared_experts]
    references = list(dict.fromkeys([options.base_model, *(e.source_model for e in experts)]))
    models: dict[str, Checkpoint] = {ref: open_model(ref, file.parent, str(file)) for ref in references}
    base = models[options.base_model]
    architecture = choose(options, [str(model.config.get("model_type")) for model in models.values()], str(file))
    _check(file, options, models)
    sources = [_source(models, expert, number, seed) for number, expert in enumerate(experts)]
    gated = experts if architecture.shared_gate else options.experts
    router_LNH = router(base, gated, options.gate_mode, seed)
    own = next(base.info(name).dtype for name in base if name.endswith("q_proj.weight"))
    dtype: str = options.dtype or own
    if dtype not in ("float32", "float16", "bfloat16"):
        dtype = "float32"  # dequantised
    made = _made(base, architecture, router_LNH, len(options.experts))
    models[MADE] = HeldCheckpoint(MADE, made)
    count = len(options.experts)
    warnings = degenerate(router_LNH[:, :count])
    if count & (count - 1):
        warnings.append(f"{count} experts are no power of two: llama.cpp does not take that.")
    if architecture.note is not None:
        warnings.append(architecture.note)
    tensors = _tensors(options, architecture, models, experts, sources, dtype)
    plan = MergePlan(
        tuple(sorted(tensors, key=lambda tensor: tensor.name)), options.base_model, None, tuple(warnings), seed=seed
    )
    config = architecture.config(base.config, options, dtype)
    return MergedCheckpoint(plan, models, reference=str(file), config=config, threads=threads or available_threads())


def _source(models: dict[str, Checkpoint], expert: Expert, number: int, seed: int) -> str:
    """The reference of an expert's weights, with their noise where it asks for some."""
    if not expert.noise_scale:
        return expert.source_model
    name = f"{expert.source_model} with noise ({number})"
    models[name] = NoisyCheckpoint(models[expert.source_model], expert.noise_scale, seed, number)
    return name


def _check(file: Path, options: MoeOptions, models: dict[str, Checkpoint]) -> None:
    base = models[options.base_model]
    for name in base:
        if ".mlp." not in name:
            continue
        for reference, model in models.items():
            if name not in model or model.info(name).shape != base.info(name).shape:
                raise MergeError(f"{file}: `{name}` of {reference} does not fit the base's.")


def _made(base: Checkpoint, architecture: Architecture, router_LNH: Tensor, experts: int) -> dict[str, Tensor]:
    """By the output's name: the router, the shared expert's gate, and biases that the base lacks."""
    stack, made = Layout.of(base).main_stack(), dict[str, Tensor]()
    for layer, rows_NH in enumerate(router_LNH):
        made[f"{stack}.{layer}.{architecture.gate}.weight"] = rows_NH[:experts].contiguous()
        if architecture.shared_gate is not None:
            made[f"{stack}.{layer}.{architecture.shared_gate}.weight"] = rows_NH[experts:].contiguous()
        for part in BIASED if architecture.attention_bias else ():
            name = f"{stack}.{layer}.self_attn.{part}"
            if f"{name}.bias" not in base:
                made[f"{name}.bias"] = torch.zeros(base.info(f"{name}.weight").shape[0])
    return made


def _tensors(
    options: MoeOptions,
    architecture: Architecture,
    models: dict[str, Checkpoint],
    experts: list[Expert],
    sources: list[str],
    dtype: str,
) -> list[TensorPlan]:
    base = models[options.base_model]
    places, found = Layout.of(base).places, list[TensorPlan]()

    def take(name: str, source: Source, scale: float | None = None) -> None:
        shape = models[source.model].info(source.tensor).shape
        found.append(
            TensorPlan(name, shape, dtype, "passthrough", (source,), None, {"scale": [scale]}, promoted="float32")
        )

    for name in base:
        if ".mlp." not in name:
            if architecture.attention_bias and name.endswith("o_proj.bias"):
                raise MergeError(f"`{name}` has no place in a {architecture.model_type}.")
            take(name, Source(options.base_model, name))
            continue
        place = places[name]
        projection = place.rest.split(".")[1]
        if projection not in PROJECTIONS or not name.endswith(".weight"):
            raise MergeError(f"`{name}` has no place in a {architecture.model_type}.")
        for number, (expert, source) in enumerate(zip(experts, sources, strict=True)):
            shared = number >= len(options.experts)
            pattern = (architecture.shared or "") if shared else architecture.expert
            target = pattern.format(number=number, part=architecture.part(projection))
            scale = expert.residual_scale if projection == "down_proj" else None
            take(f"{place.stack}.{place.layer}.{target}.weight", Source(source, name), scale)
    for name in models[MADE]:
        take(name, Source(MADE, name))
    return found
