"""Sessions of the staff that end by themselves, tokens that can be told apart, the audit by time.

Processes of 0.1.0 go on beside it: they know nothing of the new table and columns.
"""

import sqlalchemy as sa
from alembic import op
from online import add_index, lock_briefly
from sqlalchemy.dialects import postgresql

revision = "0004_staff"
down_revision = "0003_brake_acts"
branch_labels = None
depends_on = None


def upgrade():
    timestamp = postgresql.TIMESTAMP(timezone=True)
    with op.get_context().autocommit_block():
        op.create_table(
            "staff_sessions",
            sa.Column("id", sa.String(32), nullable=False),
            sa.Column("staff_id", sa.BigInteger(), nullable=False),
            sa.Column("session_key", sa.String(32), nullable=False),
            sa.Column("created_at", timestamp, server_default=sa.func.now(), nullable=False),
            sa.PrimaryKeyConstraint("id", name="pk_staff_sessions"),
            sa.ForeignKeyConstraint(
                ["staff_id"],
                ["staff.id"],
                name="fk_staff_sessions_staff_id_staff",
                ondelete="CASCADE",
            ),
            if_not_exists=True,
        )
        add_index("ix_staff_sessions_staff_id", "staff_sessions (staff_id)")
        lock_briefly("ALTER TABLE api_tokens ADD COLUMN IF NOT EXISTS hint varchar(16)")
        add_index("ix_audit_log_action_id", "audit_log (action, id)")
        add_index("ix_audit_log_at", "audit_log (at)")


def downgrade():
    op.drop_index("ix_audit_log_at", "audit_log")
    op.drop_index("ix_audit_log_action_id", "audit_log")
    op.drop_column("api_tokens", "hint")
    op.drop_table("staff_sessions")
