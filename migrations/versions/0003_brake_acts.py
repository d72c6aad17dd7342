"""Acts that were noted in Redis while PostgreSQL was away enter the audit once."""

import sqlalchemy as sa
from alembic import op

revision = "0003_brake_acts"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade():
    op.add_column("audit_log", sa.Column("act_id", sa.String(32), nullable=True))
    op.create_index("uq_audit_log_act_id", "audit_log", ["act_id"], unique=True)


def downgrade():
    op.drop_index("uq_audit_log_act_id", "audit_log")
    op.drop_column("audit_log", "act_id")
