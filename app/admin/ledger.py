"""The ledger's proof product by product, and making the sale in Redis anew when it is lost."""

import threading
from typing import Any

from flask import Blueprint, Flask, current_app, render_template, request, url_for
from flask.typing import ResponseReturnValue

from .. import auth
from ..audit import Actor
from ..books import recovery
from ..database import is_unavailable
from ..extensions import limiter
from ..problems import Conflict, Unavailable
from ..watch import monitor
from . import forms

bp = Blueprint("ledger", __name__, url_prefix="/admin/ledger")
CHANGE_LIMIT = "6/minute"
limiter.limit(CHANGE_LIMIT, methods=["POST"])(bp)

# A rebuild of a large sale takes longer than a browser should wait; it goes on without one.
WAIT_SECONDS = 20


@bp.get("/")
def show() -> ResponseReturnValue:
    return render_template("admin/ledger.html", **newest())


@bp.get("/live")
def live() -> ResponseReturnValue:
    return render_template("admin/_ledger.html", **newest())


def newest() -> dict[str, Any]:
    board = monitor.board()
    items = {item.product.id: item for item in (*board.items, *board.archived)}
    return {"ledger": board.ledger, "board": board, "items": items}


@bp.post("/rebuild")
def rebuild() -> ResponseReturnValue:
    """Make the sale in Redis anew out of PostgreSQL."""
    page = url_for("ledger.show")
    if question := forms.unconfirmed(
        "Rebuild the sale in Redis?",
        "Nothing is sold until it is done: about a second for every 100,000 orders.",
        "Rebuild",
        page,
    ):
        return question
    app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]  # the proxy's
    work = Rebuild(app, auth.staff_actor(), "replace" in request.form)
    work.start()
    work.join(WAIT_SECONDS)
    if work.is_alive():
        return forms.done("The rebuild goes on; the audit will tell its result.", page, "warning")
    return forms.done(work.told, page, "success" if work.done else "error")


class Rebuild(threading.Thread):
    """Outside the request, whose short patience with PostgreSQL would end a large rebuild."""

    def __init__(self, app: Flask, actor: Actor, replace: bool) -> None:
        super().__init__(name="rebuild")
        self._app, self._actor, self._replace = app, actor, replace
        self.done = False
        self.told = "The rebuild failed; the log says why."

    def run(self) -> None:
        with self._app.app_context():
            try:
                self.told = str(recovery.rebuild(self._actor, self._replace))
                self.done = True
            except (Conflict, Unavailable) as error:
                self.told = f"{error}."
            except Exception as error:
                if is_unavailable(error):
                    self.told = "PostgreSQL can't do it at the moment: the sale stays closed."
                self._app.logger.exception("the rebuild failed")
