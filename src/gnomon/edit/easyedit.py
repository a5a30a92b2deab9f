"""EasyEdit's hyperparameter files, read unmodified and translated.

In goes a flat YAML (`alg_name`, `layers`, `v_lr`, ...); out come a method's name and our options. What has no meaning
here (devices, directories, module name templates: found by structure) is left out knowingly; a key nobody knows is
refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from gnomon.edit.registry import method, methods
from gnomon.errors import ConfigError

NAMES = {
    "ROME": "rome", "R-ROME": "rome", "MEMIT": "memit", "PMET": "pmet", "EMMET": "emmet", "AlphaEdit": "alphaedit",
    "FT": "ft", "FT-L": "ft-l", "FT-M": "ft-m", "LoRA": "lora", "GRACE": "grace", "WISE": "wise", "IKE": "ike",
    "KN": "kn", "MEND": "mend", "SERAC": "serac",
}  # fmt: skip
TRANSLATED = {
    "layers": "layers",
    "v_num_grad_steps": "steps",
    "v_lr": "rate",
    "v_weight_decay": "decay",
    "clamp_norm_factor": "clamp",
    "kl_factor": "kl",
    "mom2_update_weight": "weight",
    "emmet_lambda": "damping",
    "L2": "damping",
    "num_steps": "steps",
    "lr": "rate",
    "rank": "rank",
    "lora_alpha": "alpha",
    "k": "demonstrations",
}
WITHOUT_MEANING = frozenset(
    {
        "alg_name", "model_name", "stats_dir", "device", "fact_token", "v_loss_layer", "mom2_adjustment",
        "context_template_length_params", "rewrite_module_tmp", "rewrite_module_tmps",
        "layer_module_tmp", "mlp_module_tmp", "attn_module_tmp",
        "ln_f_module", "lm_head_module", "mom2_dataset", "mom2_n_samples", "mom2_dtype", "model_parallel", "fp16",
        "max_length", "batch_size", "evaluation_type", "api_key", "use_chat_template", "layer_selection", "P_loc",
        "nullspace_threshold", "objective_optimization", "weight_decay", "norm_constraint", "target_modules",
        "lora_dropout", "lora_type", "calculate_hidden_flag", "update_norm_lambda", "nll_loss_factor", "results_dir",
        "tokenizer_class", "sentence_model_name", "use_icl_examples", "enable_random_prefix_keys", "enable_prompt_keys",
        "original_implementation", "early_stop",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Hparams:
    """What a file asks for. moments: "identity" where it switches the second moments off."""

    method: str
    options: dict[str, Any]
    moments: str | None


def read_hparams(path: Path) -> Hparams:
    """An EasyEdit file as a method and its options. Raises ConfigError naming the file and the key."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.", param="hparams") from None
    if not isinstance(content, dict) or "alg_name" not in content:
        raise ConfigError(f"{path} is no EasyEdit file: it has no `alg_name`.", param="hparams")
    name = NAMES.get(str(content["alg_name"]))
    if name is None or name not in methods():
        raise ConfigError(
            f"{path}: the algorithm `{content['alg_name']}` is not available here.",
            hint="`gnomon edit methods` lists what is.",
            param="alg_name",
        )
    fields = method(name).options.model_fields
    options: dict[str, Any] = {}
    for key, value in content.items():
        ours = TRANSLATED.get(key)
        if ours in fields and value != []:
            options[ours] = _number(value)
        elif key not in WITHOUT_MEANING and ours is None:
            raise ConfigError(f"{path}: the key `{key}` is not known.", param=key)
    if "v_lr" in content:
        options["relative"] = False  # theirs counts in the vector's own units
    return Hparams(name, options, "identity" if content.get("mom2_adjustment") is False else None)


def _number(value: Any) -> Any:
    """YAML 1.1 reads `5e-1` as a text; these files mean a number."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
