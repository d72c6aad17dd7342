"""Statements that PostgreSQL plans once for a session."""

from sqlalchemy import text

from app import planned
from app.extensions import db

STATEMENT = text(
    "SELECT CAST(:n AS int) + 1, CAST(:words AS text[]), '50 %', 1::int, CAST(:n AS int)"
)


def test_a_statement_is_planned_once_for_a_session(app):
    with app.app_context():
        for n, words in ((1, ["a'b", None]), (2, []), (3, ["%s", ":n"])):
            row = planned.execute(STATEMENT, {"n": n, "words": words}).one()
            assert tuple(row) == (n + 1, words, "50 %", 1, n)
        plans = text(
            "SELECT generic_plans, custom_plans FROM pg_prepared_statements"
            " WHERE statement LIKE '%50 %'"
        )
        assert tuple(db.session.execute(plans).one()) == (3, 0)


def test_another_session_is_told_of_it(app):
    with app.app_context():
        values = {"n": 1, "words": []}
        planned.execute(STATEMENT, values)
        db.session.connection().invalidate()
        db.session.rollback()
        assert planned.execute(STATEMENT, values).first() is not None
        with db.engine.connect() as busy:
            busy.execute(text("SELECT 1"))
            assert planned.execute(STATEMENT, values).first() is not None


def test_its_settings_end_with_the_transaction(app):
    with app.app_context():
        setting = text("SELECT current_setting('enable_sort')")
        planned.execute(STATEMENT, {"n": 1, "words": []}, "SET LOCAL enable_sort = off;")
        assert db.session.scalar(setting) == "off"
        db.session.rollback()
        assert db.session.scalar(setting) == "on"
