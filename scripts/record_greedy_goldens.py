"""Record transformers' greedy continuations of 20 prompts: 100 tokens, the first three 200.

Runs transformers' own module in float32 over the same dequantised weights, one prompt at a time, with its own cache
and argmax; the prompt's ids come from our tokenizer (transformers' GGUF loader drops Gemma's BOS). Needs the extra
`transformers`. Usage: python scripts/record_greedy_goldens.py smollm2-135m-instruct gemma-3-270m
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from gnomon.arch.module import _restore_buffers
from gnomon.models.checkpoint import Checkpoint
from gnomon.models.reference import open_checkpoint

FOLDER = Path(__file__).parents[1] / "tests" / "arch" / "goldens"
TOKENS, LONG_TOKENS, LONG_PROMPTS = 100, 200, 3
PROMPTS = [
    "The capital of Japan is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at a temperature of",
    "La tour Eiffel se trouve à",
    "The three primary colours are",
    "import json\n\ndef read_config(path: str) -> dict:\n",
    "Q: What is the largest planet?\nA:",
    "Die Hauptstadt von Deutschland ist",
    "1, 1, 2, 3, 5, 8,",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "Dear Sir or Madam,\n\nI am writing to",
    "The quick brown fox",
    "El perro corre por el parque y",
    "SELECT name, age FROM users WHERE",
    "In 1969, humans first",
    "日本の首都は",
    "A recipe for pancakes:\n\n1.",
    "The difference between a virus and a bacterium is",
    "Roses are red,",
]


def module_of(checkpoint: Checkpoint) -> Any:
    config = transformers.AutoConfig.for_model(**checkpoint.config)
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    module.load_state_dict({name: checkpoint[name] for name in checkpoint}, strict=False, assign=True)
    module.tie_weights()
    _restore_buffers(module, config)
    return module.eval()


@torch.inference_mode()
def greedy(module: Any, ids: list[int], tokens: int) -> tuple[list[int], float]:
    """-> (continuation, the smallest gap between best and second-best logit on the way)."""
    cache, given, out, gap = None, ids, [], float("inf")
    for _ in range(tokens):
        result = module(torch.tensor([given]), past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        best = result.logits[0, -1].topk(2)
        gap = min(gap, float(best.values[0] - best.values[1]))
        given = [int(best.indices[0])]
        out += given
    return out, gap


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:]:
        checkpoint = open_checkpoint(name)
        tokenizer, module = checkpoint.tokenizer(), module_of(checkpoint)
        runs = []
        for prompt in PROMPTS:
            ids = tokenizer.encode(prompt)
            out, gap = greedy(module, ids, LONG_TOKENS if len(runs) < LONG_PROMPTS else TOKENS)
            runs.append({"prompt": prompt, "prompt_ids": ids, "ids": out, "smallest_gap": round(gap, 6)})
            print(name, len(runs), f"gap {gap:.5f}", repr(tokenizer.decode(out))[:70], flush=True)
        source = f"transformers {transformers.__version__}, torch {torch.__version__}, float32, greedy"
        content = {"model": name, "identity": checkpoint.identity, "source": source, "runs": runs}
        (FOLDER / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False, indent=None) + "\n")


if __name__ == "__main__":
    main()
