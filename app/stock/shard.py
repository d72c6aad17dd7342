"""One shard of a sale: everything of a shopper, and a part of every product's stock."""

from ..config import Settings
from .claims import ClaimScript, OnRecord
from .figures import Figures
from .link import scripts
from .loop_line import LoopLine
from .moves import Moves
from .outbox import Outbox
from .remaking import Remaking
from .servers import Server
from .shards import Part
from .thread_line import ThreadLine


class Shard(Outbox, Moves, Remaking, Figures):
    """Safe to use from several threads. Claims go by lines of their own, all else by the link."""

    def __init__(self, part: Part, server: Server, settings: Settings, on_record: OnRecord) -> None:
        super().__init__(part, server, settings.redis_replicas)
        script = ClaimScript(scripts()["claim"], settings, part)
        self.thread_line = ThreadLine(server, script, on_record)
        self.loop_line = LoopLine(server, script, on_record)
