"""Orders that could not be stored: what a decision would do is shown before it is made."""

from collections.abc import Iterable
from contextlib import suppress

from flask import Blueprint, flash, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from werkzeug.datastructures import MultiDict

from .. import auth
from ..extensions import limiter
from ..models import DeadLetter
from ..orders import deadletters, search
from ..problems import InvalidRequest
from ..products import catalogue
from ..products.names import Names
from ..reading import MAX_ID, canonical
from . import forms

bp = Blueprint("dead_letters", __name__, url_prefix="/admin/dead-letters")
CHANGE_LIMIT = "60/minute"
limiter.limit(CHANGE_LIMIT, methods=["POST"])(bp)

PAGE_LETTERS = 50
# One decision on so many at most: what it does must still be readable.
MOST_AT_ONCE = 200
STATES = ("open", "replayed", "abandoned")
DECISIONS = {"replay": deadletters.replay, "abandon": deadletters.abandon}


def called(letters: Iterable[DeadLetter], names: Names) -> dict[int, str | None]:
    """Return, by the letters' ids, what their products were called when they were sold."""
    found: dict[int, str | None] = {}
    for letter in letters:
        # What can't be read as an order tells no moment.
        found[letter.id] = names.get(letter.product_id or 0)
        if letter.order_id is not None:
            with suppress(ValueError):
                order = search.from_letter(letter)
                found[letter.id] = names.sold(order.product_id, order.claimed_at)
    return found


def identity(text: str) -> int | None:
    """Return the id in a filter, None where there is none."""
    usable = text.isascii() and text.isdigit() and len(text) <= 16
    return min(int(text), MAX_ID) if usable else None


@bp.get("/")
def index() -> ResponseReturnValue:
    state = request.args.get("state", "open")
    before = forms.cursor()
    user, nobody = None, False
    if name := request.args.get("user", "").strip():
        try:
            user = canonical(name)
        except ValueError:
            nobody = True
    filters = deadletters.Filters(
        state=state if state in STATES else None,
        product_id=identity(request.args.get("product", "")),
        user=user,
        error=request.args.get("error", "").strip() or None,
    )
    letters = [] if nobody else deadletters.list_letters(filters, before, PAGE_LETTERS + 1)
    names = catalogue.names()
    return render_template(
        "admin/_dead_letters.html"
        if request.headers.get("HX-Target") == "results"
        else "admin/dead_letters.html",
        letters=letters[:PAGE_LETTERS],
        names=names,
        called=called(letters[:PAGE_LETTERS], names),
        older=letters[PAGE_LETTERS - 1].id if len(letters) > PAGE_LETTERS else None,
        before=before,
        state=state,
        states=STATES,
        query={name: value for name, value in request.args.items() if value and name != "before"},
    )


def chosen(source: MultiDict[str, str]) -> list[int]:
    ids = [identity(text) for text in source.getlist("id")]
    return [letter_id for letter_id in ids if letter_id][:MOST_AT_ONCE]


@bp.get("/review")
def review() -> ResponseReturnValue:
    """Show what replaying and abandoning the chosen letters would do to stock."""
    return show_review(chosen(request.args))


def show_review(
    ids: list[int], errors: dict[str, str] | None = None, status: int = 200
) -> ResponseReturnValue:
    effects = deadletters.effect_of(ids)
    if not effects:
        flash("Choose dead letters that are still open.", "warning")
        return redirect(url_for("dead_letters.index"))
    returned: dict[int | None, int] = {}
    for effect in effects:
        if effect.returned_units:
            product_id = effect.letter.product_id
            returned[product_id] = returned.get(product_id, 0) + effect.returned_units
    names = catalogue.names()
    return render_template(
        "admin/dead_letters_review.html",
        effects=effects,
        returned=returned,
        replayable=sum(effect.obstacle is None for effect in effects),
        called=called((effect.letter for effect in effects), names),
        names=names,
        errors=errors or {},
    ), status


@bp.post("/<decision>")
def decide(decision: str) -> ResponseReturnValue:
    """Replay or abandon the letters, each by itself, and tell what became of them."""
    ids = chosen(request.form)
    if decision not in DECISIONS:
        raise InvalidRequest("There is no such decision", "decision")
    try:
        reason = forms.reason()
    except InvalidRequest as error:
        errors = {"reason": str(error)}
        return show_review(ids, errors, 422)
    results = DECISIONS[decision](ids, reason, auth.staff_actor())
    done = sum(result.done for result in results)
    if done:
        word = {"replay": "replayed", "abandon": "abandoned"}[decision]
        flash(f"{done} of {len(results)} {word}.", "success")
    # Told one by one up to a handful; the list shows the others.
    for result in [result for result in results if not result.done][:5]:
        flash(f"Dead letter {result.letter_id}: {result.message}", "error")
    return redirect(url_for("dead_letters.index"))
