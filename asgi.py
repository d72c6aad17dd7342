"""What Granian loads: `asgi:app`."""

from app.asgi import Application
from wsgi import app as flask_app

app = Application(flask_app)
