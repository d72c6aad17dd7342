"""Which programs may ask: those with a bearer token (RFC 6750)."""

import functools
import hmac
from collections.abc import Callable
from typing import Any

from flask import Response, current_app, g, request
from flask.typing import ResponseReturnValue

from ..audit import Actor
from ..staff import tokens
from .errors import api_error
from .identity import bearer_of
from .limits import token_limit

View = Callable[..., ResponseReturnValue]
# RFC 7515, 7.1: head, body and mark.
JWT_DOTS = 2


def token_with(scope: str) -> Callable[[View], View]:
    """Let only a valid `Authorization: Bearer` in that may do this; `g.actor` is then whose it is.

    `scope` is one of tokens.SCOPES, or tokens.ALL for what no lesser token may do.
    """

    def guard(view: View) -> View:
        @token_limit
        @functools.wraps(view)
        def limited(*args: Any, **kwargs: Any) -> ResponseReturnValue:
            if g.actor is None:
                return _refused("admin", "A valid API token is required")
            if not g.token.may(scope):
                # RFC 6750, 3.1.
                response = api_error(403, f"The token lacks the scope {scope}", scope=scope)
                response.headers["WWW-Authenticate"] = (
                    f'Bearer realm="admin", error="insufficient_scope", scope="{scope}"'
                )
                return response
            return view(*args, **kwargs)

        @functools.wraps(view)
        def guarded(*args: Any, **kwargs: Any) -> ResponseReturnValue:
            token = bearer_of(request.headers.get("Authorization"))
            g.token = tokens.find(token) if token else None
            g.actor = Actor(g.token.name, request.remote_addr) if g.token else None
            return limited(*args, **kwargs)

        return guarded

    return guard


token_required = token_with(tokens.ALL)


def token_optional(view: View) -> View:
    """Note in `g.actor` whose API token came, None for shoppers; a token that is none is refused.

    A shopper's own token (a JWT, in three parts) says nothing here. The limit is the look-ups'.
    """

    @functools.wraps(view)
    def guarded(*args: Any, **kwargs: Any) -> ResponseReturnValue:
        token = bearer_of(request.headers.get("Authorization"))
        g.actor = None
        if token and token.count(".") != JWT_DOTS:
            name = tokens.name_of(token)
            if name is None:
                return _refused("admin", "A valid API token is required")
            g.actor = Actor(name, request.remote_addr)
        return view(*args, **kwargs)

    return guarded


def metrics_token_required(view: View) -> View:
    """Let only METRICS_TOKEN in, or ADMIN_API_TOKEN where there is none. No server is asked."""

    @functools.wraps(view)
    def guarded(*args: Any, **kwargs: Any) -> ResponseReturnValue:
        settings = current_app.config["SETTINGS"]
        expected = settings.metrics_token or settings.admin_api_token
        token = bearer_of(request.headers.get("Authorization")) or ""
        if not hmac.compare_digest(token.encode(), expected.encode()):
            return _refused("metrics", "The metrics token is required")
        return view(*args, **kwargs)

    return guarded


def _refused(realm: str, message: str) -> Response:
    response = api_error(401, message)
    response.headers["WWW-Authenticate"] = f'Bearer realm="{realm}"'
    return response
