"""Sessions of the staff that end by themselves, tokens that can be told apart, the audit by time.

Processes of 0.1.0 go on beside it: they know nothing of the new table and columns.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0004_staff"
down_revision = "0003_brake_acts"
branch_labels = None
depends_on = None


def upgrade():
    timestamp = postgresql.TIMESTAMP(timezone=True)
    op.create_table(
        "staff_sessions",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("staff_id", sa.BigInteger(), nullable=False),
        sa.Column("session_key", sa.String(32), nullable=False),
        sa.Column("created_at", timestamp, server_default=sa.func.now(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_staff_sessions"),
        sa.ForeignKeyConstraint(
            ["staff_id"], ["staff.id"], name="fk_staff_sessions_staff_id_staff", ondelete="CASCADE"
        ),
    )
    op.create_index("ix_staff_sessions_staff_id", "staff_sessions", ["staff_id"])
    op.add_column("api_tokens", sa.Column("hint", sa.String(16)))
    op.create_index("ix_audit_log_action_id", "audit_log", ["action", "id"])
    op.create_index("ix_audit_log_at", "audit_log", ["at"])


def downgrade():
    op.drop_index("ix_audit_log_at", "audit_log")
    op.drop_index("ix_audit_log_action_id", "audit_log")
    op.drop_column("api_tokens", "hint")
    op.drop_table("staff_sessions")
