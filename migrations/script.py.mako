"""${message}."""

from alembic import op
from online import lock_briefly

revision = "${up_revision}"
down_revision = "${down_revision}"
branch_labels = None
depends_on = None


def upgrade():
    with op.get_context().autocommit_block():
        lock_briefly("")


def downgrade():
    op.execute("")
