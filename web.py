"""One process of the web server, started by app/run/serve.py.

The arguments are file descriptors: see app/web/server.py.
"""

import sys

from app.web.server import run
from wsgi import app

if __name__ == "__main__":
    run(app, *map(int, sys.argv[1:]))
