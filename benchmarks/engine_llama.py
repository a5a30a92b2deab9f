"""llama.cpp as engine.py's peer, run by an interpreter that has llama-cpp-python: MODEL.gguf THREADS CLOCK.

Each line in is {"decode": tokens, "prompts": [[ids]]}; each line out is tokens a second. Several prompts are decoded
as one batch of as many sequences, which is what llama.cpp's server does inside. With one prompt and one token, the
prompt's tokens count.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp
import numpy as np

CONTEXT = 4096


def batch_of(items: list[tuple[int, int, int, bool]]) -> Any:
    """(token, position, sequence, whether its logits are wanted) -> llama_batch, to be freed."""
    batch = llama_cpp.llama_batch_init(len(items), 0, 1)
    batch.n_tokens = len(items)
    for i, (token, position, sequence, wanted) in enumerate(items):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
        batch.seq_id[i][0], batch.logits[i] = sequence, wanted
    return batch


def decoded(context: Any, items: list[tuple[int, int, int, bool]]) -> None:
    batch = batch_of(items)
    if llama_cpp.llama_decode(context, batch):
        raise RuntimeError("llama_decode failed")
    llama_cpp.llama_batch_free(batch)


def main() -> None:
    path, threads, clock = sys.argv[1], int(sys.argv[2]), getattr(time, sys.argv[3])
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch, options.n_seq_max, options.kv_unified = CONTEXT, 2048, 16, True
    options.n_threads = options.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, options)
    words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    for line in sys.stdin:
        work = json.loads(line)
        prompts, tokens = work["prompts"], work["decode"]
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        started = clock()
        decoded(
            context,
            [
                (token, place, number, place == len(prompt) - 1)
                for number, prompt in enumerate(prompts)
                for place, token in enumerate(prompt)
            ],
        )
        rows = [sum(map(len, prompts[: number + 1])) - 1 for number in range(len(prompts))]
        for step in range(tokens):
            drawn = [greatest(llama_cpp.llama_get_logits_ith(context, row), words) for row in rows]
            if step + 1 == tokens:
                break
            decoded(context, [(token, len(prompts[n]) + step, n, True) for n, token in enumerate(drawn)])
            rows = list(range(len(prompts)))
        seconds = clock() - started
        count = len(prompts[0]) if len(prompts) == tokens == 1 else tokens * len(prompts)
        print(count / seconds, flush=True)


def greatest(logits: Any, words: int) -> int:
    return int(np.ctypeslib.as_array(logits, shape=(words,)).argmax())


if __name__ == "__main__":
    main()
