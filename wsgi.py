"""What a WSGI server and the `flask` command load: `wsgi:app`.

Without REDIS_URL and DATABASE_URL the embedded servers are used: those of a running `make run`, or
else started for the life of this process.
"""

import atexit
import contextlib
import sys

from app import create_app, logs
from app.config import SettingsError, load_settings, with_secrets
from app.run.embedded import EmbeddedError, servers

_open = contextlib.ExitStack()
atexit.register(_open.close)

try:
    settings = with_secrets(load_settings())
    logs.configure(settings)
    app = create_app(_open.enter_context(servers(settings)))
except (SettingsError, EmbeddedError) as error:
    sys.exit(f"{error}")
