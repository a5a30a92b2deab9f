"""The networks of experts that dense models can be put into: names of their tensors, their configs, what they take.

Each is data; `choose` finds the one that a file means, or says of each why it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gnomon.errors import ConfigError
from gnomon.merge.moe.options import MoeOptions
from gnomon.merge.registry import suggest

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Architecture:
    """takes: `model_type`s of its experts. expert, shared, gate, shared_gate: names within a layer.

    shared_experts: how many it may have (least, most). shared_prompts: whether a shared expert is gated by prompts.
    attention_bias: it has biases in q, k and v; models without get zeros. note: what to know of the result.
    """

    name: str
    model_type: str
    class_name: str
    takes: tuple[str, ...]
    expert: str
    gate: str
    parts: tuple[str, str, str] = PROJECTIONS
    shared: str | None = None
    shared_gate: str | None = None
    shared_experts: tuple[int, int] = (0, 0)
    attention_bias: bool = False
    note: str | None = None

    def part(self, projection: str) -> str:
        return self.parts[PROJECTIONS.index(projection)]

    def refuses(self, options: MoeOptions, kinds: Sequence[str]) -> str | None:
        """Why it cannot hold these models; None when it can. kinds: their `model_type`s."""
        if len(set(kinds)) > 1:
            return f"the models are of different kinds ({', '.join(sorted(set(kinds)))})"
        if kinds[0] not in self.takes:
            return f"it takes {', '.join(self.takes)} models, not {kinds[0]}"
        count, (least, most) = len(options.shared_experts), self.shared_experts
        if not least <= count <= most:
            wanted = "no shared experts" if most == 0 else "one shared expert" if least else "at most one shared expert"
            return f"it has {wanted}, not {count}"
        prompts = any(e.positive_prompts or e.negative_prompts for e in options.shared_experts)
        if self.shared_gate is not None and not prompts and "random" not in options.gate_mode:
            return "its shared expert is gated and needs positive_prompts"
        if count and self.shared_gate is None and prompts:
            return "its shared expert is always used: it takes no prompts"
        return None

    def config(self, base: dict[str, Any], options: MoeOptions, dtype: str) -> dict[str, Any]:
        """The base's config as this network's."""
        dropped = ("dtype", "pretraining_tp", "mlp_bias", "architectures", "auto_map")
        config = {key: value for key, value in base.items() if key not in dropped}
        config |= {"architectures": [self.class_name], "model_type": self.model_type, "torch_dtype": dtype}
        config["num_experts_per_tok"] = options.experts_per_token
        return config | self._own(config, options)

    def _own(self, config: dict[str, Any], options: MoeOptions) -> dict[str, Any]:
        experts, width = len(options.experts), config["intermediate_size"]
        if self.name == "mixtral":
            return {"num_local_experts": experts, "sliding_window": None}
        if self.name == "deepseek":
            home = "deepseek-ai/deepseek-moe-16b-base"
            return {
                "n_routed_experts": experts, "n_shared_experts": len(options.shared_experts) or None,
                "first_k_dense_replace": 0, "moe_layer_freq": 1, "scoring_func": "softmax", "norm_topk_prob": True,
                "moe_intermediate_size": width,
                "auto_map": {
                    "AutoConfig": f"{home}--configuration_deepseek.DeepseekConfig",
                    "AutoModelForCausalLM": f"{home}--modeling_deepseek.DeepseekForCausalLM",
                },
            }  # fmt: skip
        common = {
            "num_experts": experts, "decoder_sparse_step": 1, "norm_topk_prob": True, "moe_intermediate_size": width,
            "mlp_only_layers": [],
        }  # fmt: skip
        if self.name == "qwen3":
            return common
        return common | {
            "shared_expert_intermediate_size": width, "use_sliding_window": False, "sliding_window": None,
            "layer_types": ["full_attention"] * int(config["num_hidden_layers"]),
        }  # fmt: skip


ARCHITECTURES = (
    Architecture(
        "mixtral", "mixtral", "MixtralForCausalLM", ("llama", "mistral"),
        expert="block_sparse_moe.experts.{number}.{part}", gate="block_sparse_moe.gate", parts=("w1", "w3", "w2"),
    ),
    Architecture(
        "deepseek", "deepseek", "DeepseekForCausalLM", ("llama", "mistral"),
        expert="mlp.experts.{number}.{part}", gate="mlp.gate", shared="mlp.shared_experts.{part}",
        shared_experts=(0, 1),
        note="transformers has DeepSeek's first network only as code of the hub (trust_remote_code); vLLM and "
        "llama.cpp have it. gnomon cannot run it.",
    ),
    Architecture(
        "qwen", "qwen2_moe", "Qwen2MoeForCausalLM", ("qwen2", "llama", "mistral"),
        expert="mlp.experts.{number}.{part}", gate="mlp.gate", shared="mlp.shared_expert.{part}",
        shared_gate="mlp.shared_expert_gate", shared_experts=(1, 1), attention_bias=True,
    ),
    Architecture(
        "qwen3", "qwen3_moe", "Qwen3MoeForCausalLM", ("qwen3",),
        expert="mlp.experts.{number}.{part}", gate="mlp.gate",
    ),
)  # fmt: skip


def choose(options: MoeOptions, kinds: Sequence[str], where: str) -> Architecture:
    """The one that the file names (or the beginning of its name), else the first that fits. Raises ConfigError."""
    wanted = options.architecture
    candidates = [a for a in ARCHITECTURES if wanted is None or a.name.startswith(wanted.lower())]
    if not candidates:
        hint = suggest(wanted or "", [a.name for a in ARCHITECTURES])
        raise ConfigError(f"{where}: unknown architecture `{wanted}`.", hint=hint, param="architecture")
    if wanted is not None:
        candidates = candidates[:1]
    reasons = {a.name: a.refuses(options, kinds) for a in candidates}
    for architecture in candidates:
        if reasons[architecture.name] is None:
            return architecture
    listed = "; ".join(f"{name}: {why}" for name, why in reasons.items())
    raise ConfigError(f"{where}: no network of experts holds these models. {listed}.", param="architecture")
