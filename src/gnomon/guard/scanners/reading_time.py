"""Reading time: the answer takes too long to read. Options: max_minutes, words_per_minute, truncate."""

from gnomon.guard.scanning import Judgement, scanner


@scanner(
    "reading_time", about="Longer than `max_minutes` to read; can truncate.", directions=("output",), state="exact"
)
def reading_time(
    text: str, *, prompt: str = "", max_minutes: float = 5.0, words_per_minute: float = 200.0, truncate: bool = False
) -> Judgement:
    most = int(max_minutes * words_per_minute)
    count = len(text.split())
    if count <= most:
        return Judgement(0.0)
    cut = " ".join(text.split()[:most]) if truncate else None
    return Judgement(1.0, f"{count} words", cut)
