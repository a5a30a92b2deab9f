"""No refusal: the answer declines. By the usual phrases at its begin; not measured."""

import re

from gnomon.guard.scanning import Judgement, scanner

PHRASES = re.compile(
    r"(?i)\b(?:i(?:'m| am) (?:sorry|afraid|unable|not able)|i (?:cannot|can't|can not|won't|will not|must decline)"
    r"|as an (?:ai|language model)|i(?:'m| am) just an? (?:ai|language model)"
    r"|unfortunately,? i|it(?:'s| is) (?:not appropriate|against)"
    r"|(?:my|openai'?s?) (?:guidelines|policies|programming))\b"
)


@scanner("no_refusal", about="The answer declines (phrases).", directions=("output",))
def no_refusal(text: str, *, prompt: str = "") -> Judgement:
    head = text[:400]
    return Judgement(min(1.0, 0.6 * len(PHRASES.findall(head))))
