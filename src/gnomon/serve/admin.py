"""Administrative routes: off without an admin key, and only that key opens them."""

from __future__ import annotations

import hmac

from fastapi import Request

from gnomon.errors import GnomonError
from gnomon.serve.state import state_of


class AdminRefused(GnomonError):
    """The route is the operator's."""

    status = 403
    code = "admin_only"


def require_admin(request: Request) -> None:
    """A route dependency. Raises AdminRefused."""
    key = state_of(request).options.admin_key
    if key is None:
        raise AdminRefused(
            "Administrative routes are off.", hint="The operator turns them on: gnomon serve --admin-key KEY"
        )
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
        raise AdminRefused("This route needs the admin key: `Authorization: Bearer ADMIN_KEY`.")
