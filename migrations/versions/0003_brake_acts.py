"""Acts that were noted in Redis while PostgreSQL was away enter the audit once."""

from alembic import op
from online import add_index, lock_briefly

revision = "0003_brake_acts"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade():
    with op.get_context().autocommit_block():
        lock_briefly("ALTER TABLE audit_log ADD COLUMN IF NOT EXISTS act_id varchar(32)")
        add_index("uq_audit_log_act_id", "audit_log (act_id)")


def downgrade():
    op.drop_index("uq_audit_log_act_id", "audit_log")
    op.drop_column("audit_log", "act_id")
