"""What Granian loads: `asgi:app`."""

import gc

from app.asgi import Application
from wsgi import app as flask_app

app = Application(flask_app)

# What was loaded so far lives as long as the process: no need to look it over again and again. A
# request's own objects go by reference count: collecting every 700 of them cost 5 % of the CPU.
gc.collect()
gc.freeze()
gc.set_threshold(50_000)
