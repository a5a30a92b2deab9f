"""The co-processor: a small language model reads a text beside its writer, and two heads judge every token.

Per token of its own vocabulary: risk (safe, controversial, unsafe) and category, from x = LayerNorm(W h) of the final
hidden state h (the form of Qwen3Guard-Stream). Keys and values stay, so a token costs the same wherever it stands, and
what was judged is never judged again. Text goes in by words, so verdicts depend on the text alone. Experimental: tested
for its mechanism; how well it judges is its training data's affair.
Legend: T tokens, C channels of the model, D of the heads, K categories.
"""

from __future__ import annotations

import json
import re
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gnomon.errors import ConfigError
from gnomon.guard.scanning import Judgement

FORMAT = "gnomon-guard-coprocessor-1"
RISKS = ("safe", "controversial", "unsafe")
WORD = re.compile(r"\s*\S+|\s+")
NAMES = ("pre", "gain", "shift", "risk", "risk_bias", "category", "category_bias")


@dataclass(frozen=True)
class Heads:
    """pre [C, D], gain and shift [D], risk [D, 3], category [D, K], biases. model: whose hidden states these are.

    record: what they were trained on, and how they did on text they had not seen.
    """

    arrays: dict[str, np.ndarray]
    categories: tuple[str, ...]
    model: str
    record: Mapping[str, Any] = field(default_factory=dict)

    def judge(self, hidden_TC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """-> risk [T, 3] and category [T, K], rows sum to one."""
        a = self.arrays
        x_TD = hidden_TC.astype(np.float64) @ a["pre"]
        x_TD = (x_TD - x_TD.mean(-1, keepdims=True)) / np.sqrt(x_TD.var(-1, keepdims=True) + 1e-5)
        x_TD = x_TD * a["gain"] + a["shift"]
        return _softmax(x_TD @ a["risk"] + a["risk_bias"]), _softmax(x_TD @ a["category"] + a["category_bias"])

    def write(self, path: Path) -> None:
        from safetensors.numpy import save_file

        about = {"format": FORMAT, "categories": json.dumps(self.categories), "model": self.model}
        about["record"] = json.dumps(self.record)
        part = path.with_suffix(path.suffix + ".part")
        save_file({name: self.arrays[name].astype(np.float32) for name in NAMES}, part, about)
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> Heads:
        """Raises ConfigError when the file is missing or holds no heads."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise ConfigError(
                        f"{path} holds no heads of a co-processor.", hint="Make one: gnomon guard train-coprocessor."
                    )
                arrays = {name: file.get_tensor(name).astype(np.float64) for name in NAMES}
                record = json.loads(about.get("record", "{}"))
                return cls(arrays, tuple(json.loads(about["categories"])), about["model"], record)
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"The heads {path} cannot be read: {error}.") from None


def _softmax(logits: np.ndarray) -> np.ndarray:
    exponents = np.exp(logits - logits.max(-1, keepdims=True))
    result: np.ndarray = exponents / exponents.sum(-1, keepdims=True)
    return result


@dataclass(frozen=True)
class Example:
    """A labelled text. boundary: the character where it becomes what it is; before it tokens are safe."""

    text: str
    risk: str
    category: str = ""
    boundary: int = 0


def words(text: str) -> list[str]:
    """A text as it goes in: each word with the space before it."""
    return WORD.findall(text)


def tokens_of(text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """(token ids, where in the text the word of each ends)."""
    ids: list[int] = []
    ends: list[int] = []
    at = 0
    for word in words(text):
        at += len(word)
        found = tokenizer.encode(word, add_special_tokens=False)
        ids += found
        ends += [at] * len(found)
    return ids, ends


def train(examples: Sequence[Example], model: Any, *, width: int = 64, rounds: int = 300, seed: int = 0) -> Heads:
    """Heads for a loaded model: reads the texts, then `fit`."""
    read = [tokens_of(one.text, model.tokenizer) for one in examples]
    hidden = [model.worker.hidden(ids).float().numpy() if ids else np.zeros((0, 0)) for ids, _ in read]
    return fit(examples, hidden, [ends for _, ends in read], model.name, width=width, rounds=rounds, seed=seed)


def fit(
    examples: Sequence[Example],
    hidden: Sequence[np.ndarray],
    ends: Sequence[Sequence[int]],
    model: str,
    *,
    width: int = 64,
    rounds: int = 300,
    seed: int = 0,
) -> Heads:
    """Heads for states already read, full batch, deterministic. Every token from the boundary on has the text's risk.

    hidden: [T, C] of each text; ends: where in it the word of each token ends. Loss: cross entropy of risk + of
    category, the latter only where the risk is not safe.
    """
    import torch
    from torch.nn import functional

    unknown = next((one.risk for one in examples if one.risk not in RISKS), None)
    if unknown is not None:
        raise ConfigError(f"No risk `{unknown}`.", hint=f"Known: {', '.join(RISKS)}.", param="risk")
    categories = tuple(sorted({one.category for one in examples if one.risk != "safe"})) or ("",)
    rows, risks, kinds = [], [], []
    for one, states_TC, places in zip(examples, hidden, ends, strict=True):
        if places:
            rows.append(torch.from_numpy(np.asarray(states_TC, np.float32)))
            late = [end > one.boundary for end in places]
            risks += [RISKS.index(one.risk) if after else 0 for after in late]
            kinds += [categories.index(one.category) if after and one.risk != "safe" else -100 for after in late]
    if len(set(risks)) < 2:
        raise ConfigError("Heads need texts of at least two different risks.", param="risk")
    hidden_TC = torch.cat(rows)
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "pre": (hidden_TC.shape[1], width), "gain": (width,), "shift": (width,), "risk": (width, len(RISKS)),
        "risk_bias": (len(RISKS),), "category": (width, len(categories)), "category_bias": (len(categories),),
    }  # fmt: skip
    values = {name: torch.randn(shape, generator=generator) / shape[0] ** 0.5 for name, shape in shapes.items()}
    values["gain"].fill_(1.0)
    for name in ("shift", "risk_bias", "category_bias"):
        values[name].zero_()
    parameters = [value.requires_grad_() for value in values.values()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=1e-3)
    risk_T, kind_T = torch.tensor(risks), torch.tensor(kinds)
    for _ in range(rounds):
        optimizer.zero_grad()
        x_TD = functional.layer_norm(hidden_TC @ values["pre"], (width,), values["gain"], values["shift"])
        loss = functional.cross_entropy(x_TD @ values["risk"] + values["risk_bias"], risk_T)
        if (kind_T >= 0).any():
            loss = loss + functional.cross_entropy(x_TD @ values["category"] + values["category_bias"], kind_T)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return Heads({name: v.detach().double().numpy() for name, v in values.items()}, categories, model)


class Reading:
    """One text under the co-processor's eyes. Thread-safe; called with the text so far, which only grows."""

    def __init__(self, heads: Heads, model: Any, *, strict: bool = True) -> None:
        self.heads = heads
        self.model = model
        self.strict = strict
        self.ids: list[int] = []  # what the model has read
        self.risk_T3 = np.zeros((0, len(RISKS)))
        self.kinds: list[int] = []
        self.rows = 0  # tokens computed, all in all
        self._lock = threading.Lock()
        self._reader = model.worker.reader()
        weakref.finalize(self, _close, model.worker, self._reader).atexit = False

    def __call__(self, text: str, prompt: str = "") -> Judgement:
        """The gravest that two tokens in a row agree on, up to here."""
        with self._lock:
            risk_T3, kinds = self._read(text)
        risky_T = risk_T3[:, 2] + (risk_T3[:, 1] if self.strict else 0.0)
        if len(risky_T) < 2:
            return Judgement(0.0)
        both_T = np.minimum(risky_T[1:], risky_T[:-1])
        worst = int(both_T.argmax())
        label = RISKS[1 + int(risk_T3[worst + 1, 2] >= risk_T3[worst + 1, 1])]
        return Judgement(min(1.0, float(both_T[worst])), f"{label}: {self.heads.categories[kinds[worst + 1]]}")

    def _read(self, text: str) -> tuple[np.ndarray, list[int]]:
        ids, _ = tokens_of(text, self.model.tokenizer)
        same = next(
            (at for at, (a, b) in enumerate(zip(ids, self.ids, strict=False)) if a != b), min(len(ids), len(self.ids))
        )
        if same < len(ids):
            fresh = ids[same:]
            hidden_TC = self.model.worker.run_exclusive(lambda: self._reader.read(fresh, after=same))
            self.rows += len(fresh)
            risk_T3, kind_TK = self.heads.judge(hidden_TC.float().numpy())
            self.ids = ids
            self.risk_T3 = np.concatenate([self.risk_T3[:same], risk_T3])
            self.kinds = self.kinds[:same] + kind_TK.argmax(-1).tolist()
        return self.risk_T3[: len(ids)], self.kinds[: len(ids)]


def _close(worker: Any, reader: Any) -> None:
    from gnomon.errors import GnomonError

    def close() -> None:
        try:
            worker.run_exclusive(reader.close)
        except GnomonError:
            return  # the engine was closed, and its pages with it

    threading.Thread(target=close, daemon=True).start()  # whoever lets go of a text may be the engine itself
