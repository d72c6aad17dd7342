"""Products: their terms of sale, the buttons that bind the next purchase, restocks, the ledger."""

from datetime import UTC, datetime

from flask import Blueprint, make_response, render_template, request, url_for

from .. import auth
from ..extensions import limiter
from ..orders import search
from ..problems import InvalidRequest, Unavailable
from ..products import catalogue, inventory
from ..reading import MAX_ID, MAX_REASON, MAX_RESTOCK, MAX_STOCK, VALID_KEY, read_integer
from ..watch import monitor
from . import forms

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
# What a term is called in a form: (field, words for an error).
FIELDS = {
    "name": ("name", "The name"),
    "priceCents": ("price", "The price"),
    "currency": ("currency", "The currency"),
    "stock": ("stock", "The stock"),
    "opensAt": ("opens", "The opening"),
    "closesAt": ("closes", "The closing"),
    "perUserLimit": ("per_user", "The cap"),
    "maxQuantity": ("max_quantity", "The maximum"),
}
COUNTERS = {
    "accepted": "Accepted",
    "sold_out": "Sold out",
    "insufficient": "Too few left",
    "limited": "Limited by user",
    "limited_address": "Limited by address",
    "replayed": "Replayed",
    "mismatched": "Key reused wrongly",
    "too_many": "Quantity too large",
    "capped": "Over the cap",
    "not_open": "Not open yet",
    "paused": "While paused",
    "ended": "After the end",
    "overloaded": "Queue full",
}


@bp.get("/")
def index():
    found = find()
    fragment = request.headers.get("HX-Target") == "results"
    template = "admin/_products.html" if fragment else "admin/products.html"
    return render_template(template, states=catalogue.STATES, sorts=SORTS, **found)


@bp.get("/live")
def live():
    """The page's rows again, in the places that they had: none moves away under a pointer."""
    ids = [number for number in request.args.getlist("id", type=int) if 0 < number <= MAX_ID]
    ids = ids[: catalogue.PAGE_PRODUCTS]
    return render_template("admin/_product_rows.html", **rows(ids or find()["page"].ids))


def find() -> dict:
    """Return what the list shows for this request."""
    args = request.args
    state, sort = args.get("state"), args.get("sort")
    wanted = catalogue.Wanted(
        text=args.get("q", "").strip(),
        state=state if state in catalogue.STATES else None,
        sort=sort if sort in catalogue.SORTS else catalogue.SORTS[0],
    )
    page = catalogue.find(wanted, min(args.get("page", 1, type=int), MAX_PAGE))
    query = {name: value for name, value in args.items() if value and name != "page"}
    return {"wanted": wanted, "page": page, "query": query, **rows(page.ids)}


def rows(ids: list[int]) -> dict:
    """Return the products as they stand, in the order of `ids`, without those that are gone."""
    items, live = monitor.items(among=ids)
    known = {item.product.id: item for item in items}
    shown = [known[product_id] for product_id in ids if product_id in known]
    return {"items": shown, "redis_error": live.error}


@bp.get("/<id:product_id>")
def show(product_id: int):
    before = forms.cursor()
    movements = inventory.movements_of(product_id, before, MOVEMENTS + 1)
    return render_template(
        "admin/product.html",
        item=monitor.item(product_id),
        counters=COUNTERS,
        movements=movements[:MOVEMENTS],
        older=movements[MOVEMENTS - 1].id if len(movements) > MOVEMENTS else None,
        before=before,
        page=search.search(search.Filter(product_id=product_id), limit=ORDERS),
        names=inventory.names(),
    )


@bp.get("/<id:product_id>/live")
def show_live(product_id: int):
    return render_template(
        "admin/_product_live.html", item=monitor.item(product_id), counters=COUNTERS
    )


@bp.route("/new", methods=["GET", "POST"])
def new():
    """Create a product; it can be bought as soon as its window opens."""
    if request.method == "GET":
        values = {"currency": "USD", "max_quantity": 10, "stock": ""}
        return render_template("admin/product_form.html", item=None, values=values, errors={})
    terms, errors = read_terms(request.form)
    stock = forms.whole_number(request.form.get("stock", ""))
    try:
        read_integer({"stock": stock}, "stock", 0, MAX_STOCK)
    except InvalidRequest as error:
        errors["stock"] = in_words(error)
    if not errors:
        try:
            product, _ = inventory.create_product(terms | {"stock": stock}, auth.staff_actor())
            return forms.done(
                f"{product.name} is created with {stock:,} units.",
                url_for("products.show", product_id=product.id),
            )
        except InvalidRequest as error:
            errors = place(error)
    return render_template(
        "admin/product_form.html", item=None, values=request.form, errors=errors
    ), 422


@bp.route("/<id:product_id>/edit", methods=["GET", "POST"])
def edit(product_id: int):
    """Change the terms; the change binds the next purchase."""
    item = monitor.item(product_id)
    if request.method == "GET":
        values = form_values(item.product)
        return render_template("admin/product_form.html", item=item, values=values, errors={})
    terms, errors = read_terms(request.form)
    # A form knows whole seconds: a time that looks unchanged is unchanged.
    for name, known in (("opensAt", item.product.opens_at), ("closesAt", item.product.closes_at)):
        if known and terms.get(name) and same_second(terms[name], known):
            del terms[name]
    if not errors:
        try:
            product, _ = inventory.change_product(product_id, terms, auth.staff_actor())
            return forms.done(
                f"{product.name} is saved. It binds the next purchase.",
                url_for("products.show", product_id=product_id),
            )
        except InvalidRequest as error:
            errors = place(error)
    return render_template(
        "admin/product_form.html", item=item, values=request.form, errors=errors
    ), 422


def read_terms(form) -> tuple[dict, dict[str, str]]:
    """Return a form's terms by their JSON names, and its errors by field."""
    cap = form.get("per_user", "").strip()
    read = {
        "name": lambda: form.get("name", ""),
        "priceCents": lambda: forms.cents(form.get("price", "")),
        "currency": lambda: form.get("currency", "").strip().upper(),
        "opensAt": lambda: forms.moment("opens"),
        "closesAt": lambda: forms.moment("closes"),
        "perUserLimit": lambda: forms.whole_number(cap) if cap else None,
        "maxQuantity": lambda: forms.whole_number(form.get("max_quantity", "")),
    }
    terms, errors = {}, {}
    for name, take in read.items():
        try:
            terms[name] = take()
            inventory.read_terms({name: terms[name]})
        except InvalidRequest as error:
            terms.pop(name, None)
            errors[FIELDS[name][0]] = in_words(error)
    return terms, errors


def same_second(text: str, known: datetime) -> bool:
    return datetime.fromisoformat(text) == known.replace(microsecond=0)


def place(error: InvalidRequest) -> dict[str, str]:
    return {FIELDS.get(error.field, ("name",))[0]: in_words(error)}


def in_words(error: InvalidRequest) -> str:
    """Return the error with the field called as the form calls it."""
    _, words = FIELDS.get(error.field, ("", ""))
    text = str(error).replace(
        "closesAt must be after opensAt", "The closing must be after the opening"
    )
    return text.replace(error.field, words, 1) if words and text.startswith(error.field) else text


def form_values(product) -> dict:
    """Return what the form shows of a product; times in UTC, for the script to make local."""
    local = "%Y-%m-%dT%H:%M:%S"
    return {
        "name": product.name,
        "price": f"{product.price_cents // 100}.{product.price_cents % 100:02}",
        "currency": product.currency,
        "opens": product.opens_at.astimezone(UTC).strftime(local) if product.opens_at else "",
        "closes": product.closes_at.astimezone(UTC).strftime(local) if product.closes_at else "",
        "per_user": product.per_user_limit or "",
        "max_quantity": product.max_quantity,
    }


# What each button does, and what it tells.
ACTS = {
    "open": (inventory.open_now, "is open"),
    "pause": (
        lambda product_id, actor: inventory.change_product(product_id, {"paused": True}, actor),
        "is paused",
    ),
    "resume": (
        lambda product_id, actor: inventory.change_product(product_id, {"paused": False}, actor),
        "is on sale again",
    ),
    "end": (inventory.end_now, "is ended"),
}


@bp.post("/<id:product_id>/sale")
def act(product_id: int):
    """Open, pause, resume or end a sale: it binds the very next purchase."""
    name = request.form.get("act")
    if name not in ACTS:
        raise InvalidRequest("There is no such act", "act")
    page = url_for("products.show", product_id=product_id)
    if name == "end" and (
        question := forms.unconfirmed(
            "End this sale now?",
            "The next purchase is refused as ended. It can be opened again later.",
            "End the sale",
            page,
        )
    ):
        return question
    change, told = ACTS[name]
    product, _ = change(product_id, auth.staff_actor())
    return changed(product_id, f"{product.name} {told}.")


def changed(product_id: int, message: str):
    """Answer with the row or the part of the page that shows the change, else with the page."""
    if not forms.by_htmx():
        return forms.done(message, url_for("products.show", product_id=product_id))
    item = monitor.item(product_id)
    on_page = request.form.get("view") == "page"
    partial = "admin/_product_live.html" if on_page else "admin/_product.html"
    return forms.with_note(render_template(partial, item=item, counters=COUNTERS), message)


@bp.get("/<id:product_id>/restock")
def show_restock(product_id: int):
    """The form, fetched when it is opened: so its key is of this moment, and lists stay small."""
    partial = "admin/_restock.html" if forms.by_htmx() else "admin/restock.html"
    return render_template(partial, item=monitor.item(product_id), values=request.args)


@bp.post("/<id:product_id>/restock")
def restock(product_id: int):
    """Add units; the answer shows the stock right after it."""
    key = request.form.get("key", "")
    reason = request.form.get("reason", "").strip()
    units = forms.whole_number(request.form.get("amount", ""))
    errors = {}
    try:
        units = read_integer({"amount": units}, "amount", 1, MAX_RESTOCK)
    except InvalidRequest as error:
        errors["amount"] = str(error).replace("amount", "The amount", 1)
    if len(reason) > MAX_REASON:
        errors["reason"] = f"At most {MAX_REASON} characters"
    if not VALID_KEY(key):
        errors["amount"] = "This form is out of date: reload the page"
    if errors:
        return refuse_restock(product_id, errors)
    try:
        done = inventory.restock(product_id, units, reason or None, auth.staff_actor(), key)
    except Unavailable:
        message = "Redis did not answer. If the restock was recorded, it is carried out by itself."
        return refuse_restock(product_id, {"amount": message}, 503)
    if done.replayed:
        return changed(product_id, "This restock was done already; nothing was added twice.")
    return changed(product_id, f"{units:,} units added: {done.free:,} are free now.")


def refuse_restock(product_id: int, errors: dict[str, str], status: int = 422):
    item = monitor.item(product_id)
    if not forms.by_htmx():
        return render_template(
            "admin/restock.html", item=item, errors=errors, values=request.form
        ), status
    response = make_response(
        render_template("admin/_restock.html", item=item, errors=errors, values=request.form), 422
    )
    response.headers["HX-Retarget"] = f"#restock-form-{product_id}"
    response.headers["HX-Reswap"] = "outerHTML"
    return response
