"""A mixture of experts from dense models: mergekit-moe's file -> a Mixtral checkpoint (Llama or Mistral experts).

Everything but the MLPs comes from the base; expert i's MLP is model i's; the router's row for it points where its
positive prompts are and its negative ones are not. The result is a MergedCheckpoint like any other: streamed,
resumable, atomic. Mixtral is none of gnomon's own networks: here it runs through transformers.
Legend: L layers, N experts, H hidden channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from gnomon.capability import OPERATOR_ONLY
from gnomon.errors import ConfigError, MergeError, UnknownOption
from gnomon.merge.build import open_model
from gnomon.merge.config import Reference, read_documents, reference_text
from gnomon.merge.layout import Layout
from gnomon.merge.merged import MergedCheckpoint
from gnomon.merge.planned import MergePlan, Source, TensorPlan
from gnomon.merge.registry import suggest
from gnomon.models.checkpoint import Checkpoint
from gnomon.models.held_checkpoint import HeldCheckpoint
from gnomon.progress import progress
from gnomon.registry import option_error

ROUTER = "the router"
PARTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
DENSE = ("llama", "mistral")
MODES = ("hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random")
DEGENERATE = 5.0
"""Condition number of a layer's router beyond which experts are hardly told apart."""


class Expert(BaseModel):
    """One expert. residual_scale: its down projection is multiplied by it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source_model: Reference
    positive_prompts: list[str] = []
    negative_prompts: list[str] = []
    residual_scale: float | None = None

    @field_validator("source_model", mode="before")
    @classmethod
    def _reference(cls, value: Any) -> Any:
        return reference_text(value)


class MoeOptions(BaseModel):
    """A whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_model: Annotated[str, OPERATOR_ONLY]
    experts: Annotated[list[Expert], Field(min_length=1)]
    gate_mode: Literal["hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random"] = "hidden"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    experts_per_token: Annotated[int, Field(gt=0)] = 2
    architecture: Literal["mixtral"] = "mixtral"

    @field_validator("base_model", mode="before")
    @classmethod
    def _reference(cls, value: Any) -> Any:
        return reference_text(value)


REFUSED = {
    "shared_experts": "Mixtral has no shared experts.",
    "noise_scale": "experts are taken as they are; add noise to a model before.",
}


def parse_moe(file: Path) -> MoeOptions:
    """Raises ConfigError naming the key and what is wrong with it."""
    documents = read_documents(file)
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise ConfigError(f"{file} must be one mapping with base_model and experts.")
    content = documents[0]
    for place in (content, *(e for e in content.get("experts") or [] if isinstance(e, dict))):
        for key, why in REFUSED.items():
            if place.get(key):
                raise ConfigError(f"{file}: `{key}` is not supported: {why}", param=key)
            place.pop(key, None)
    try:
        options = MoeOptions.model_validate(content)
    except ValidationError as error:
        first = option_error(error)
        hint = None
        if isinstance(first, UnknownOption):
            hint = suggest((first.param or "").split(".")[-1], {*MoeOptions.model_fields, *Expert.model_fields})
        raise ConfigError(f"{file}: {first.message}", hint=hint, param=first.param) from None
    if len(options.experts) < options.experts_per_token:
        raise ConfigError(
            f"{file}: experts_per_token is {options.experts_per_token}, and there are {len(options.experts)} experts.",
            param="experts_per_token",
        )
    if "random" not in options.gate_mode:
        prompts = [(tuple(e.positive_prompts), tuple(e.negative_prompts)) for e in options.experts]
        for number, (positive, _) in enumerate(prompts):
            if not positive:
                raise ConfigError(
                    f"{file}: experts[{number}] has no positive_prompts, which gate_mode {options.gate_mode} reads.",
                    hint="Give examples of what it should answer, or set gate_mode: random.",
                    param="positive_prompts",
                )
        if len(prompts) > 1 and len(set(prompts)) == 1:
            raise ConfigError(f"{file}: all experts have the same prompts; the router could not tell them apart.")
    return options


def open_moe(file: Path, *, seed: int = 0, threads: int = 0) -> MergedCheckpoint:
    """The mixture as a checkpoint, nothing written. Raises ConfigError, MergeError, CheckpointError."""
    options = parse_moe(file)
    references = list(dict.fromkeys([options.base_model, *(e.source_model for e in options.experts)]))
    models = {reference: open_model(reference, file.parent, str(file)) for reference in references}
    base = models[options.base_model]
    _check(file, options, models)
    router_LNH = router(base, options, seed)
    own = next(base.info(name).dtype for name in base if name.endswith("q_proj.weight"))
    dtype: str = options.dtype or own
    if dtype not in ("float32", "float16", "bfloat16"):
        dtype = "float32"  # dequantised
    gates = {f"{layer}": router_LNH[layer].contiguous() for layer in range(len(router_LNH))}
    warnings = degenerate(router_LNH)
    count = len(options.experts)
    if count & (count - 1):
        warnings.append(f"{count} experts are no power of two: llama.cpp does not take that.")
    plan = MergePlan(
        tuple(sorted(_tensors(options, models, gates, dtype), key=lambda tensor: tensor.name)),
        options.base_model, None, tuple(warnings), seed=seed,
    )  # fmt: skip
    from gnomon.kernels import available_threads

    everything: dict[str, Checkpoint] = {**models, ROUTER: HeldCheckpoint(ROUTER, gates)}
    config = mixtral_config(base.config, count, options.experts_per_token, dtype)
    return MergedCheckpoint(
        plan, everything, reference=str(file), config=config, threads=threads or available_threads()
    )


def _check(file: Path, options: MoeOptions, models: dict[str, Checkpoint]) -> None:
    for reference, model in models.items():
        kind = model.config.get("model_type")
        if kind not in DENSE:
            raise MergeError(f"{file}: {reference} is a {kind}; a Mixtral takes {' or '.join(DENSE)} models.")
    base = models[options.base_model]
    for name in base:
        if ".mlp." not in name:
            continue
        for reference, model in models.items():
            if name not in model or model.info(name).shape != base.info(name).shape:
                raise MergeError(f"{file}: `{name}` of {reference} does not fit the base's.")


def _tensors(
    options: MoeOptions, models: dict[str, Checkpoint], gates: dict[str, Tensor], dtype: str
) -> list[TensorPlan]:
    base = models[options.base_model]
    places, found = Layout.of(base).places, []

    def take(name: str, source: Source, info_of: Checkpoint, scale: float | None = None) -> None:
        info = info_of.info(source.tensor)
        found.append(
            TensorPlan(name, info.shape, dtype, "passthrough", (source,), None, {"scale": [scale]}, promoted="float32")
        )

    for name in base:
        if ".mlp." not in name:
            take(name, Source(options.base_model, name), base)
            continue
        place = places[name]
        part = place.rest.split(".")[1]
        if part not in PARTS:
            raise MergeError(f"`{name}` has no place in a Mixtral.")
        for number, expert in enumerate(options.experts):
            target = f"{place.stack}.{place.layer}.block_sparse_moe.experts.{number}.{PARTS[part]}.weight"
            scale = expert.residual_scale if part == "down_proj" else None
            take(target, Source(expert.source_model, name), models[expert.source_model], scale)
    router = HeldCheckpoint(ROUTER, gates)
    for layer in gates:
        take(f"model.layers.{layer}.block_sparse_moe.gate.weight", Source(ROUTER, layer), router)
    return found


def mixtral_config(base: dict[str, Any], experts: int, experts_per_token: int, dtype: str) -> dict[str, Any]:
    """The base's config as a Mixtral's."""
    config = {key: value for key, value in base.items() if key not in ("dtype", "pretraining_tp", "mlp_bias")}
    config |= {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": experts,
        "num_experts_per_tok": experts_per_token, "sliding_window": None, "torch_dtype": dtype,
    }  # fmt: skip
    return config


def router(base: Checkpoint, options: MoeOptions, seed: int) -> Tensor:
    """[L, N, H] float32: where each expert's prompts are, at the input of each layer."""
    layers, hidden = int(base.config["num_hidden_layers"]), int(base.config["hidden_size"])
    shape = (layers, len(options.experts), hidden)
    generator = torch.Generator().manual_seed(seed)
    if options.gate_mode == "random":
        return torch.randn(shape, generator=generator)
    if options.gate_mode == "uniform_random":  # as torch makes a new linear layer
        return torch.rand(shape, generator=generator).mul(2).sub(1).mul(hidden**-0.5)
    prompts = [text for expert in options.experts for text in (*expert.positive_prompts, *expert.negative_prompts)]
    found = _embedded(base, prompts) if options.gate_mode == "cheap_embed" else _hidden(base, options, prompts)
    rows = []
    for expert in options.experts:
        row_LH = _middle(found, expert.positive_prompts)
        if expert.negative_prompts and options.gate_mode == "cheap_embed":
            row_LH = _unit(row_LH) - _unit(_middle(found, expert.negative_prompts))
        elif expert.negative_prompts:
            row_LH = row_LH - _middle(found, expert.negative_prompts)
        rows.append(_unit(row_LH).expand(layers, hidden))
    return torch.stack(rows, dim=1)


def _middle(found: dict[str, Tensor], prompts: Sequence[str]) -> Tensor:
    return torch.stack([found[prompt] for prompt in prompts]).mean(0)


def _unit(row_LH: Tensor) -> Tensor:
    unit: Tensor = row_LH / row_LH.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return unit


def _token_ids(base: Checkpoint, prompt: str) -> list[int]:
    tokenizer = base.tokenizer()
    ids: list[int] = tokenizer.backend.encode(prompt, add_special_tokens=False).ids
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def _embedded(base: Checkpoint, prompts: Sequence[str]) -> dict[str, Tensor]:
    """By prompt, [1, H]: the sum of its tokens' embeddings."""
    table = base["model.embed_tokens.weight"]
    return {prompt: table[_token_ids(base, prompt)].float().sum(0, keepdim=True) for prompt in prompts}


def _hidden(base: Checkpoint, options: MoeOptions, prompts: Sequence[str]) -> dict[str, Tensor]:
    """By prompt, [L, H]: the state entering each layer, of the last token or averaged over the prompt's."""
    from gnomon.loading import load

    found = {}
    with (
        load(base, max_sequences=1, ledger=False) as model,
        model.module() as module,
        torch.no_grad(),
        progress("reading prompts", total=len(prompts)) as bar,
    ):
        for prompt in prompts:
            ids = torch.tensor([_token_ids(base, prompt)])
            states_LTH = torch.cat(module(input_ids=ids, output_hidden_states=True).hidden_states[:-1]).float()
            found[prompt] = states_LTH.mean(1) if options.gate_mode == "hidden_avg" else states_LTH[:, -1]
            bar.advance()
    return found


def degenerate(router_LNH: Tensor) -> list[str]:
    """A warning for the layers whose router hardly tells experts apart."""
    bad = [layer for layer, rows in enumerate(router_LNH) if float(torch.linalg.cond(rows)) > DEGENERATE]
    if not bad:
        return []
    where = "every layer" if len(bad) == len(router_LNH) else f"layers {', '.join(map(str, bad))}"
    return [f"The router hardly tells the experts apart in {where}: their prompts are too similar."]
