"""One process of the web server, started by app/run/serve.py.

The arguments are file descriptors, see app/web/server.py, and what was wrong with the process
before this one, if anything was.
"""

import sys

from wsgi import app  # before all else: from here on what goes wrong is a log line

if __name__ == "__main__":
    from app.web.server import run

    *files, replaces = sys.argv[1:]
    if replaces:
        app.extensions["lane"].meter.count(f"restart:{replaces}")
    run(app, *map(int, files))
