"""rq-dashboard below /admin/rq: RQ's queues, jobs and workers, made fit to be seen from outside."""

import functools
import logging

import redis
import rq_dashboard
from flask import Flask, Response, abort, request
from flask_wtf.csrf import generate_csrf
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.serializers import JSONSerializer
from rq_dashboard import web
from werkzeug.exceptions import HTTPException

from ..extensions import stock
from ..reading import read_digits
from ..web.errors import show_error

log = logging.getLogger(__name__)

REGISTRIES = {"queued", "scheduled", "deferred", "started", "finished", "failed", "canceled"}
MOST_PER_PAGE = 200


def init_app(app: Flask) -> None:
    # It would unpickle what is in Redis, and open new connections for every request.
    web.config.serializer = JSONSerializer
    web.from_url = lambda *_, **__: (None, stock.raw_client)
    # Shown on its pages, so not the URL, which may hold a password.
    app.config["RQ_DASHBOARD_REDIS_URL"] = ("this sale's Redis",)
    web.setup_rq_connection(app)
    app.before_request(check_request)
    app.after_request(offer_csrf_token)
    app.register_error_handler(NoSuchJobError, _gone)
    app.register_error_handler(InvalidJobOperation, _gone)
    app.register_blueprint(rq_dashboard.blueprint, url_prefix="/admin/rq")
    views = app.view_functions
    for endpoint, view in views.items():
        if endpoint.startswith("rq_dashboard."):
            views[endpoint] = never_failing(view)


def check_request() -> None:
    """Refuse what rq-dashboard would answer with a 500, and the change that it makes on GET.

    On the app, because its blueprint can take no more handlers once an app has registered it.
    """
    if request.blueprint != "rq_dashboard":
        return
    if request.endpoint == "rq_dashboard.requeue_all" and request.method != "POST":
        abort(405, valid_methods=["POST"])
    arguments = request.view_args or {}
    if arguments.get("instance_number", 0) != 0:
        abort(404)
    if (arguments.get("registry_name") or "queued") not in REGISTRIES:
        abort(404)
    for name, most in (("page", 10**9), ("per_page", MOST_PER_PAGE)):
        if read_digits(str(arguments.get(name, 1)), 1, most) is None:
            abort(404)


def never_failing(view):
    """Answer with an error of the path's, where rq-dashboard or RQ trips over what it was given."""

    @functools.wraps(view)
    def guarded(*args, **kwargs):
        try:
            return view(*args, **kwargs)
        except (HTTPException, NoSuchJobError, InvalidJobOperation):
            raise
        except (redis.ConnectionError, redis.TimeoutError):
            raise
        except Exception as error:
            log.warning("rq-dashboard, %s: %r", request.path, error)
            return show_error(404, "RQ has nothing here that can be read.")

    return guarded


def offer_csrf_token(response: Response) -> Response:
    """Give rq-dashboard's scripts the token in the cookie that they look for."""
    if request.blueprint == "rq_dashboard" and response.mimetype == "text/html":
        response.set_cookie(
            "_csrf_token",
            generate_csrf(),
            path="/admin/rq/",
            secure=request.is_secure,
            samesite="Strict",
        )
    return response


def _gone(error: Exception):
    return show_error(404, "There is no such job any more. RQ forgets a job some minutes after it.")
