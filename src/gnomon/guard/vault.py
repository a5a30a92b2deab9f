"""The vault: personal data out of a prompt, placeholders in, and back again in the answer, exactly.

One kind and value always get the same placeholder. A placeholder that stands in the user's own text is never handed
out, so what a user forged is never restored. Nothing is guessed: a placeholder is restored only when it is spelt
exactly. Lives in memory only; never printed, never logged.
"""

from __future__ import annotations

import re


class Vault:
    """Values of one conversation by their placeholders."""

    def __init__(self, text: str = "") -> None:
        self._taken = text  # placeholders in here belong to the user
        self._of_value: dict[tuple[str, str], str] = {}
        self._of_placeholder: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._of_placeholder)

    def __repr__(self) -> str:
        return f"<Vault of {len(self)} values>"

    @property
    def placeholders(self) -> list[str]:
        return list(self._of_placeholder)

    def reserve(self, text: str) -> None:
        """Placeholders that stand in this text will not be handed out."""
        self._taken += "\n" + text

    def escaped(self, text: str) -> str:
        """Another text of the same prompt: a placeholder that it spells itself becomes a value, and so only itself."""
        self.reserve(text)
        for name in [name for name in self._of_placeholder if name in text]:
            text = text.replace(name, self.placeholder("TEXT", name))
        return text

    def placeholder(self, kind: str, value: str) -> str:
        """`[EMAIL_1]` for this value: the same for the same value."""
        kind = re.sub(r"[^A-Z0-9]+", "_", kind.upper()).strip("_") or "VALUE"
        if (kind, value) not in self._of_value:
            number = 1 + sum(1 for known, _ in self._of_value if known == kind)
            while (name := f"[{kind}_{number}]") in self._taken or name in self._of_placeholder:
                number += 1
            self._of_value[(kind, value)] = name
            self._of_placeholder[name] = value
        return self._of_value[(kind, value)]

    def restore(self, text: str) -> str:
        """A whole text with every placeholder replaced by its value."""
        restorer = Restorer(self)
        return restorer.push(text) + restorer.finish()


class Restorer:
    """Placeholders back to values in a stream: holds only what may still become a placeholder."""

    def __init__(self, vault: Vault) -> None:
        self.vault = vault
        self.held = ""

    def push(self, text: str) -> str:
        self.held += text
        out = []
        while self.held:
            place = self.held.find("[")
            if place < 0:
                out.append(self.held)
                self.held = ""
                break
            out.append(self.held[:place])
            self.held = self.held[place:]
            end = self.held.find("]")
            name = self.held[: end + 1] if end > 0 else ""
            if name in self.vault._of_placeholder:
                out.append(self.vault._of_placeholder[name])
                self.held = self.held[len(name) :]
            elif any(known.startswith(self.held) for known in self.vault.placeholders):
                break
            else:
                out.append("[")
                self.held = self.held[1:]
        return "".join(out)

    def finish(self) -> str:
        out, self.held = self.held, ""
        return out
