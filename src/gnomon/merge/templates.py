"""The chat template of a merge: the donor's, the one most models have (`auto`), a well-known one, or a given text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from gnomon.errors import ConfigError
from gnomon.models.checkpoint import Checkpoint

_LOOP = "{% for message in messages %}"
_END = "{% endfor %}"
KNOWN = {
    "chatml": (
        _LOOP + "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n" + _END
        + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}" + _LOOP
        + "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
        + "{{ message['content'] | trim }}<|eot_id|>" + _END
        + "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}" + _LOOP + "{% if message['role'] == 'assistant' %}{{ message['content'] }}{{ eos_token }}"
        "{% else %}[INST] {{ message['content'] }} [/INST]{% endif %}" + _END
    ),
    "alpaca": (
        _LOOP + "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
        "{% elif message['role'] == 'user' %}### Instruction:\n{{ message['content'] }}\n\n"
        "{% else %}### Response:\n{{ message['content'] }}{{ eos_token }}\n\n{% endif %}" + _END
        + "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
    "exaone": (
        _LOOP + "[|{{ message['role'] }}|]{{ message['content'] }}"
        "{% if message['role'] != 'user' %}[|endofturn|]{% endif %}\n" + _END
        + "{% if add_generation_prompt %}[|assistant|]{% endif %}"
    ),
}  # fmt: skip


def chat_template(wanted: str | None, models: Sequence[Checkpoint], donor: Checkpoint) -> str | None:
    """The template's text; None when there is none. Raises ConfigError for `auto` without any template."""
    if wanted is None:
        return donor.chat_template
    if wanted != "auto":
        return KNOWN.get(wanted, wanted)
    found = Counter(model.chat_template for model in models if model.chat_template)
    if not found:
        raise ConfigError("chat_template: auto, but no model has a chat template.", param="chat_template")
    most = max(found.values())
    best = [template for template, count in found.items() if count == most]
    own = donor.chat_template
    return own if own in best else best[0]
