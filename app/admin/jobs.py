"""rq-dashboard below /admin/rq: RQ's queues, jobs and workers, made fit to be seen from outside."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import redis
import rq_dashboard
from flask import Flask, Response, abort, current_app, redirect, request, url_for
from flask.typing import ResponseReturnValue
from flask_wtf.csrf import generate_csrf
from markupsafe import escape
from rq import Worker
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import Job
from rq.serializers import JSONSerializer
from rq_dashboard import web
from werkzeug.exceptions import HTTPException

from ..extensions import stock
from ..reading import read_digits
from ..stock.servers import code_of
from ..web.errors import show_error

log = logging.getLogger(__name__)

View = Callable[..., Any]  # as Flask keeps them

REGISTRIES = {"queued", "scheduled", "deferred", "started", "finished", "failed", "canceled"}
MOST_PER_PAGE = 200
# What rq-dashboard shows of the queue "orders" (worker/jobs.py) at first: done jobs, newest first.
JOBS_LIST: dict[str, Any] = {
    "instance_number": 0, "queue_name": "orders", "registry_name": "finished", "per_page": 8,
    "order": "dsc", "page": 1,
}  # fmt: skip

# Whose texts its pages show as HTML: an error's may repeat what a shopper sent.
SHOWN_AS_HTML = {"rq_dashboard.job_info", "rq_dashboard.list_workers"}


class _Worker(Worker):
    """A worker as rq-dashboard lists it, whose job is read as ours are written."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"serializer": JSONSerializer})


def init_app(app: Flask) -> None:
    # It would unpickle what is in Redis, and open new connections for every request.
    web.config.serializer = JSONSerializer
    web.Worker = _Worker
    # Its own page for that is bare, and a 200.
    web.RedisConnectionError = ()
    web.from_url = lambda *_, **__: (None, stock.jobs_raw_client)
    # Shown on its pages, so not the URL, which may hold a password.
    app.config["RQ_DASHBOARD_REDIS_URL"] = ("this sale's Redis",)
    web.setup_rq_connection(app)
    app.before_request(check_request)
    app.after_request(offer_csrf_token)
    app.after_request(escape_texts)
    app.register_error_handler(NoSuchJobError, _gone)
    app.register_error_handler(InvalidJobOperation, _gone)
    app.register_blueprint(rq_dashboard.blueprint, url_prefix="/admin/rq")
    views = app.view_functions
    for endpoint, view in views.items():
        if endpoint.startswith("rq_dashboard."):
            views[endpoint] = never_failing(view)


def check_request() -> ResponseReturnValue | None:
    """Refuse what rq-dashboard would answer with a 500, and the change that it makes on GET.

    Its list of jobs begins with the queue that has some.

    On the app, because its blueprint can take no more handlers once an app has registered it.
    """
    if request.blueprint != "rq_dashboard":
        return None
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
    if request.endpoint == "rq_dashboard.jobs_overview" and not arguments.get("queue_name"):
        # It would show RQ's queue "default", which nobody uses here.
        return redirect(url_for(request.endpoint, **JOBS_LIST))
    return None


def is_known(job_id: str) -> bool:
    """Tell whether RQ still remembers a job; False too when it can't be asked."""
    try:
        return Job.exists(job_id, connection=stock.jobs_raw_client)
    except redis.RedisError:
        return False


def never_failing(view: View) -> View:
    """Answer with an error of the path's, where rq-dashboard or RQ trips over what it was given."""

    @functools.wraps(view)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return view(*args, **kwargs)
        except (HTTPException, NoSuchJobError, InvalidJobOperation):
            raise
        except Exception as error:
            if isinstance(error, redis.RedisError) and not _is_rubbish(error):
                raise
            log.warning("rq-dashboard, %s: %r", request.path, error)
            return show_error(404, "RQ has nothing here that can be read.")

    return guarded


def _is_rubbish(error: redis.RedisError) -> bool:
    """Tell a key that holds what is none of RQ's from a Redis that can't do its work."""
    return code_of(error) in ("WRONGTYPE", "ERR") or "caused error: WRONGTYPE" in str(error)


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


def escape_texts(response: Response) -> Response:
    """Let what rq-dashboard's pages would put into themselves as HTML be text."""
    if request.endpoint in SHOWN_AS_HTML and response.is_json:
        response.set_data(current_app.json.dumps(_escaped(response.json)))
    return response


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return escape(value)
    if isinstance(value, list):
        return [_escaped(each) for each in value]
    if isinstance(value, dict):
        return {name: _escaped(each) for name, each in value.items()}
    return value


def _gone(error: Exception) -> ResponseReturnValue:
    return show_error(404, "There is no such job any more. RQ forgets a job some minutes after it.")
