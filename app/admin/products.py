"""Products: their terms of sale, the buttons that bind the next purchase, restocks, the ledger."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

from flask import Blueprint, make_response, redirect, render_template, request, url_for
from flask.typing import ResponseReturnValue
from sqlalchemy.exc import SQLAlchemyError

from .. import auth, numbers
from ..database import is_unavailable
from ..extensions import db, limiter
from ..models import Product
from ..orders import search
from ..problems import InvalidRequest, KeyMismatch, Unavailable
from ..products import catalogue, currency, importing, listing, movements, terms
from ..products.sale import to_follow
from ..reading import MAX_ID, MAX_RESTOCK, VALID_KEY
from ..watch import monitor
from ..web.pages import MOST_OF_FILE
from . import forms, product_form
from .display import moment_utc

bp = Blueprint("products", __name__, url_prefix="/admin/products")
CHANGE_LIMIT = "120/minute"
limiter.limit(CHANGE_LIMIT, methods=["POST"])(bp)

SORTS = {
    "live": "Live first", "newest": "Newest first", "name": "By name", "stock": "Fewest left first",
}  # fmt: skip
MOVEMENTS = 25
# More pages of products nobody has; a larger number than PostgreSQL's would be an error.
MAX_PAGE = 10**6
ORDERS = 8
# Of a file that is to be imported so many products are shown.
SHOWN_OF_IMPORT = 100
ANOTHER_RESTOCK = (
    "This form has added units before, with something else in it. Look at the product's ledger; "
    "sent once more, it adds these, too."
)
COUNTERS = {
    "accepted": "Accepted",
    "sold_out": "Sold out",
    "insufficient": "Too few left",
    "limited": "Limited by user",
    "limited_early": "Limited, too early",
    "limited_address": "Limited by address",
    "limited_network": "Limited by network",
    "replayed": "Replayed",
    "order_ended": "Replayed, order ended",
    "mismatched": "Key reused wrongly",
    "too_many": "Quantity too large",
    "capped": "Over the cap",
    "capped_address": "Over the address's units",
    "price_changed": "Price changed",
    "not_open": "Not open yet",
    "paused": "While paused",
    "ended": "After the end",
    "overloaded": "Queue full",
}


@bp.get("/")
def index() -> ResponseReturnValue:
    found = find()
    fragment = request.headers.get("HX-Target") == "results"
    template = "admin/_products.html" if fragment else "admin/products.html"
    return render_template(template, states=listing.STATES, sorts=SORTS, **found)


@bp.get("/live")
def live() -> ResponseReturnValue:
    """The page's rows again, in the places that they had: none moves away under a pointer."""
    ids = [number for number in request.args.getlist("id", type=int) if 0 < number <= MAX_ID]
    ids = ids[: listing.PAGE_PRODUCTS]
    return render_template("admin/_product_rows.html", **rows(ids or find()["page"].ids))


def find() -> dict[str, Any]:
    """Return what the list shows for this request."""
    args = request.args
    state, sort = args.get("state"), args.get("sort")
    wanted = listing.Wanted(
        text=args.get("q", "").strip(),
        state=state if state in listing.STATES else None,
        sort=sort if sort in listing.SORTS else listing.SORTS[0],
    )
    try:
        page = listing.find(wanted, min(args.get("page", 1, type=int), MAX_PAGE))
    except SQLAlchemyError as error:
        if not is_unavailable(error):
            raise
        # Without PostgreSQL the brakes are left, and what is known without it, unsorted.
        db.session.rollback()
        found, _ = monitor.items()
        items = [item for item in found if item.state != monitor.ARCHIVED]
        page = listing.Page([item.product.id for item in items], len(items))
    query = {name: value for name, value in args.items() if value and name != "page"}
    return {"wanted": wanted, "page": page, "query": query, **rows(page.ids)}


def rows(ids: list[int]) -> dict[str, Any]:
    """Return the products as they stand, in the order of `ids`, without those that are gone."""
    items, live = monitor.items(among=ids)
    known = {item.product.id: item for item in items}
    shown = [known[product_id] for product_id in ids if product_id in known]
    return {"items": shown, "redis_error": live.error, "postgres_error": live.postgres_error}


@bp.get("/<id:product_id>")
def show(product_id: int) -> ResponseReturnValue:
    before = forms.cursor()
    (item,), live = monitor.items(product_id)
    # Without PostgreSQL the figures and the brake are left, which need Redis alone.
    found, page = [], None
    if not live.postgres_error:
        found = movements.movements_of(product_id, before, MOVEMENTS + 1)
        page = search.search(search.Filter(product_id=product_id), limit=ORDERS)
    return render_template(
        "admin/product.html",
        item=item,
        counters=COUNTERS,
        movements=found[:MOVEMENTS],
        older=found[MOVEMENTS - 1].id if len(found) > MOVEMENTS else None,
        before=before,
        page=page,
        visibilities=product_form.VISIBILITIES,
    )


@bp.get("/<id:product_id>/live")
def show_live(product_id: int) -> ResponseReturnValue:
    return render_template(
        "admin/_product_live.html", item=monitor.item(product_id), counters=COUNTERS
    )


@bp.route("/new", methods=["GET", "POST"])
def new() -> ResponseReturnValue:
    """Create a product; it can be bought as soon as its window opens."""
    if request.method == "GET":
        if not VALID_KEY(request.args.get("key", "")):
            # In the address, so that going back finds the same form, not another one.
            return redirect(url_for("products.new", key=forms.submission_key()))
        return show_form(product_form.NEW, {}, key=request.args["key"])
    key = request.form.get("key") or None
    if key and not VALID_KEY(key):
        raise InvalidRequest("This form is out of date: reload the page", "key")
    values = product_form.typed(request.form)
    wanted, errors = product_form.read_new(request.form)
    if wanted is None:
        return show_form(values, errors, 422, key=key)
    try:
        created = catalogue.create(wanted, auth.staff_actor(), key)
    except terms.WrongWindow:
        return show_form(values, product_form.WRONG_WINDOW, 422, key=key)
    except catalogue.SkuTaken:
        return show_form(values, product_form.SKU_TAKEN, 422, key=key)
    except KeyMismatch:
        return show_form(
            values,
            {},
            422,
            key=forms.submission_key(),
            alert="This form has created a product already, with other terms. Look at the products"
            " first; Create product makes another one.",
        )
    except Unavailable:
        db.session.rollback()
        return show_form(
            values,
            {},
            503,
            key=key,
            alert="Redis did not answer, so it is not known whether the product was created. Send"
            " the form again: it creates the product once only.",
        )
    page = url_for("products.show", product_id=created.product["id"])
    name = created.product["name"]
    if created.replayed:
        return forms.done(f"{name} was created already; nothing was created twice.", page)
    return forms.done(f"{name} is created with {wanted.units:,} units.", page)


@bp.url_value_preprocessor
def let_files_in(endpoint: str | None, values: dict[str, Any] | None) -> None:
    """Let files be larger than forms are, before anybody looks into the body."""
    if endpoint != "products.import_many":
        return
    request.max_content_length = request.max_form_memory_size = MOST_OF_FILE
    if (request.content_length or 0) > MOST_OF_FILE:
        most = importing.MOST_BYTES // 1024
        raise InvalidRequest(f"The file is larger than {most:,} KiB: import it in parts")


@bp.route("/import", methods=["GET", "POST"])
def import_many() -> ResponseReturnValue:
    """Show what a file would make, and make it once somebody has seen that."""
    if request.method == "GET":
        return show_import()
    if file := request.files.get("file"):
        content = file.read()
    else:
        content = request.form.get("text", "").encode("utf-8", "replace")
    if not content.strip():
        return show_import(missing=True), 422
    plan, key = importing.read(content), request.form.get("key") or None
    confirmed = request.form.get("confirmed") == "yes"
    if key and not VALID_KEY(key):
        raise InvalidRequest("This form is out of date: reload the page", "key")
    page = url_for("products.index", sort="newest")
    if confirmed and key and importing.was_done(plan.digest, key):
        # Before its skus are found to be taken, by the products that it has made itself.
        return forms.done("This file was imported already; nothing was created twice.", page)
    if plan.faults:
        return show_import(plan), 422
    if not confirmed:
        return show_import(plan, importing.decode(content))
    try:
        ids = importing.carry_out(plan, auth.staff_actor(), key)
    except Unavailable:
        db.session.rollback()
        alert = (
            "Redis did not answer, so it is not known whether the products were created. Send the"
            " form again: it creates them once only."
        )
        return show_import(plan, importing.decode(content), key, alert=alert), 503
    if ids is None:
        return forms.done("This file was imported already; nothing was created twice.", page)
    created = "1 product is" if len(ids) == 1 else f"{len(ids):,} products are"
    return forms.done(f"{created} created.", page)


def show_import(
    plan: importing.Plan | None = None, text: str = "", key: str | None = None, **more: object
) -> str:
    """Return the page: with a plan what the file would make, and the text to make it from."""
    return render_template(
        "admin/products_import.html",
        plan=plan,
        text=text,
        key=key or forms.submission_key(),
        columns=importing.COLUMNS,
        most=importing.MOST_PRODUCTS,
        shown=SHOWN_OF_IMPORT,
        **more,
    )


def show_form(
    values: dict[str, Any], errors: dict[str, Any], status: int = 200, **more: object
) -> ResponseReturnValue:
    """Return the form with what its fields hold; `more` is the rest that the template names."""
    return render_template(
        "admin/product_form.html",
        values=values,
        errors=errors,
        visibilities=product_form.VISIBILITIES,
        **({"product": None} | more),
    ), status


@bp.route("/<id:product_id>/edit", methods=["GET", "POST"])
def edit(product_id: int) -> ResponseReturnValue:
    """Change the terms; the change binds the next purchase."""
    product = monitor.item(product_id).product
    if request.method == "GET":
        was = product_form.shown(product)
        return show_form(was, {}, product=product, was=was, version=product.version)
    edit = product_form.Edit(request.form, product)
    pending: tuple[int, ...] = ()
    kept = {"product": product, "was": edit.was, "version": edit.version}
    values, errors = product_form.read(request.form, edit.touched)
    if errors:
        return show_form(edit.typed, errors, 422, **kept)
    try:
        changed, _, pending = catalogue.change(
            product_id, values, auth.staff_actor(), {edit.version}
        )
    except terms.WrongWindow:
        return show_form(edit.typed, product_form.WRONG_WINDOW, 422, **kept)
    except catalogue.SkuTaken:
        return show_form(edit.typed, product_form.SKU_TAKEN, 422, **kept)
    except catalogue.CurrencyFixed:
        return show_form(edit.typed, product_form.CURRENCY_FIXED, 409, **kept)
    except Unavailable:
        db.session.rollback()
        alert = (
            "Redis did not answer. If the change was recorded, it comes in force by itself; save it"
            " once more to be sure."
        )
        return show_form(edit.typed, {}, 503, alert=alert, **kept)
    except catalogue.StaleVersion:
        changed = monitor.item(product_id).product
        if not edit.is_done(changed):
            fields, differences = edit.rebase(changed)
            return show_form(
                fields,
                {},
                409,
                product=changed,
                was=product_form.shown(changed),
                version=changed.version,
                differences=differences,
            )
    return forms.done(
        f"{changed.name} is saved. It binds the next purchase.{to_follow(pending)}",
        url_for("products.show", product_id=product_id),
    )


# What each button does, and what it tells.
ACTS = {
    "open": (catalogue.open_now, "is open"),
    "pause": (
        lambda product_id, actor: catalogue.change(product_id, {"paused": True}, actor),
        "is paused",
    ),
    "resume": (
        lambda product_id, actor: catalogue.change(product_id, {"paused": False}, actor),
        "is on sale again",
    ),
    "end": (catalogue.end_now, "is ended"),
    "archive": (
        lambda product_id, actor: catalogue.change(product_id, {"archived": True}, actor),
        "is archived: it sells nothing, and is found among the archived products",
    ),
    "restore": (
        lambda product_id, actor: catalogue.change(product_id, {"archived": False}, actor),
        "is back from the archive",
    ),
}


@bp.post("/<id:product_id>/sale")
def act(product_id: int) -> ResponseReturnValue:
    """Open, pause, resume or end a sale: it binds the very next purchase."""
    name = request.form.get("act")
    if name not in ACTS:
        raise InvalidRequest("There is no such act", "act")
    product = monitor.item(product_id).product
    page = url_for("products.show", product_id=product_id)
    asked = sale_questions(product).get(name)
    if asked and (question := forms.unconfirmed(*asked, page)):
        return question
    change, told = ACTS[name]
    product, _, pending = change(product_id, auth.staff_actor())
    return changed(product_id, state_told(product, told) + to_follow(pending))


bp.add_app_template_global(currency.in_doubt)
bp.add_app_template_global(currency.from_hundredths)


class Question(NamedTuple):
    title: str
    text: str
    yes: str


@bp.app_template_global()
def sale_questions(product: Product) -> dict[str, Question]:
    """Return what an act has to ask first; the page's script asks the same in a dialog."""
    now = datetime.now(UTC)
    asked = _sale_questions(product, now)
    if product.archived:
        asked["restore"] = Question(
            "Restore this product?",
            "It is where it was before: if its sale is open, the next purchase is sold.",
            "Restore",
        )
    else:
        asked["archive"] = Question(
            "Archive this product?",
            "The next purchase is refused as unknown, and the product leaves the lists and the"
            " dashboard. Its orders and its ledger stay.",
            "Archive",
        )
    return asked


def _sale_questions(product: Product, now: datetime) -> dict[str, Question]:
    if product.closes_at and catalogue.is_ended(product, now):
        if catalogue.planned_end(product, now):
            return {}
        text = (
            f"It ended at {moment_utc(product.closes_at)} UTC, and no later end is planned: it"
            " sells until you end it. To plan an end, edit its terms instead."
        )
        return {"open": Question("Reopen this sale without an end?", text, "Reopen")}
    text = "The next purchase is sold."
    if product.opens_at and product.opens_at > now:
        text = f"It was to open at {moment_utc(product.opens_at)} UTC. {text}"
    return {
        "open": Question("Open this sale now?", text, "Open now"),
        "end": Question(
            "End this sale now?",
            "The next purchase is refused as ended. Reopened, it goes on as it is planned now.",
            "End the sale",
        ),
    }


def state_told(product: Product, told: str) -> str:
    """Return what became of the product, with the planned moments that are in force."""
    now = datetime.now(UTC)
    if told == "is open":
        if product.opens_at and product.opens_at > now:
            told = f"is scheduled again; it opens at {moment_utc(product.opens_at)} UTC"
        elif product.closes_at:
            told = f"is open; it closes at {moment_utc(product.closes_at)} UTC"
    return f"{product.name} {told}."


def changed(product_id: int, message: str) -> ResponseReturnValue:
    """Answer with the row or the part of the page that shows the change, else with the page."""
    if not forms.by_htmx():
        return forms.done(message, url_for("products.show", product_id=product_id))
    item = monitor.item(product_id)
    on_page = request.form.get("view") == "page"
    partial = "admin/_product_live.html" if on_page else "admin/_product.html"
    return forms.with_note(render_template(partial, item=item, counters=COUNTERS), message)


@bp.get("/<id:product_id>/restock")
def show_restock(product_id: int) -> ResponseReturnValue:
    """The form, fetched when it is opened: so its key is of this moment, and lists stay small."""
    partial = "admin/_restock.html" if forms.by_htmx() else "admin/restock.html"
    return render_template(partial, item=monitor.item(product_id), values=request.args)


@bp.post("/<id:product_id>/restock")
def restock(product_id: int) -> ResponseReturnValue:
    """Add units; the answer shows the stock right after it."""
    values = request.form.to_dict()
    key = values.get("key", "")
    units, reason, errors = 0, None, {}
    try:
        amount = request.form.get("amount", "")
        units = numbers.whole(amount, "amount", "The amount", 1, MAX_RESTOCK)
    except InvalidRequest as error:
        errors["amount"] = str(error)
    try:
        reason = forms.optional_reason()
    except InvalidRequest as error:
        errors["reason"] = str(error)
    if not VALID_KEY(key):
        errors["amount"] = "This form is out of date: reload the page"
    if errors:
        return refuse_restock(product_id, errors)
    try:
        done = movements.restock(product_id, units, reason, auth.staff_actor(), key)
    except KeyMismatch:
        return refuse_restock(product_id, {"amount": ANOTHER_RESTOCK}, values={**values, "key": ""})
    except Unavailable:
        message = "Redis did not answer. If the restock was recorded, it is carried out by itself."
        return refuse_restock(product_id, {"amount": message}, 503)
    if done.replayed:
        return changed(product_id, "This restock was done already; nothing was added twice.")
    return changed(product_id, f"{units:,} units added: {done.free:,} are free now.")


def refuse_restock(
    product_id: int,
    errors: dict[str, str],
    status: int = 422,
    values: Mapping[str, str] | None = None,
) -> ResponseReturnValue:
    item = monitor.item(product_id)
    values = request.form if values is None else values
    if not forms.by_htmx():
        return render_template(
            "admin/restock.html", item=item, errors=errors, values=values
        ), status
    response = make_response(
        render_template("admin/_restock.html", item=item, errors=errors, values=values), 422
    )
    response.headers["HX-Retarget"] = f"#restock-form-{product_id}"
    response.headers["HX-Reswap"] = "outerHTML"
    return response
