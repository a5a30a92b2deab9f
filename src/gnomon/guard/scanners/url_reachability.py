"""URL reachability: addresses in the answer that do not answer. Off unless named in a policy: it uses the network."""

import re

from gnomon.guard.scanning import Judgement, scanner


@scanner(
    "url_reachability", about="Addresses that do not answer (uses the network).", directions=("output",), state="exact"
)
def url_reachability(text: str, *, prompt: str = "", timeout: float = 5.0) -> Judgement:
    import httpx

    dead = 0
    found = set(re.findall(r"https?://[^\s)\]>\"']+", text))
    for address in found:
        try:
            dead += httpx.head(address, timeout=timeout, follow_redirects=True).status_code >= 400
        except httpx.HTTPError:
            dead += 1
    return Judgement(float(dead > 0), f"{dead} of {len(found)}" if dead else "")
