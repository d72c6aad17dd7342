"""The parts that every module shares, created once and bound to an app by its factory."""

from typing import TYPE_CHECKING

from flask import request
from flask_limiter import Limiter
from flask_login import LoginManager
from flask_sqlalchemy import SQLAlchemy
from flask_wtf.csrf import CSRFProtect
from sqlalchemy import MetaData
from sqlalchemy.orm import DeclarativeBase

from .addresses import client_of
from .database import Session
from .stock.gateway import Stock


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def limited_client() -> str:
    """Return whom a rate limit counts; never nothing, which flask-limiter would not count."""
    return client_of(request.remote_addr or "") or "unknown"


db = SQLAlchemy(model_class=Base, session_options={"class_": Session})
if TYPE_CHECKING:
    Model = Base
else:
    # What Flask-SQLAlchemy makes of it, which has no type.
    Model = db.Model
csrf = CSRFProtect()
login = LoginManager()
# The purchase has its own limit inside the claim; this one guards every other route.
limiter = Limiter(limited_client)
stock = Stock()
