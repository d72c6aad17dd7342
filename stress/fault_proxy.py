"""A proxy between two sockets that misbehaves on command: cuts, lost replies, delays.

    python fault_proxy.py LISTEN TARGET [SEED]

LISTEN and TARGET are paths of Unix sockets, or TCP ports of this machine.

Commands come as lines on standard input:

    pass            forward everything (the default)
    cut             close every connection now
    lose P          with probability P a reply is lost and its connection closed: the command ran
    tear P          the same, after the first half of the reply was passed on
    delay SECONDS   pass everything on that much later
    refuse          close every connection now, and each new one at once
    target PATH     new connections go there; those that are open stay where they are
"""

import asyncio
import contextlib
import os
import random
import sys

CHUNK_BYTES = 1 << 16


class Proxy:
    def __init__(self, target: str, seed: int):
        self.target = target
        self.random = random.Random(seed)
        self.mode, self.value = "pass", 0.0
        self.writers: set[asyncio.StreamWriter] = set()

    def obey(self, line: str) -> None:
        mode, _, value = line.strip().partition(" ")
        if mode == "target":
            self.target = value
            return
        self.mode = mode
        self.value = float(value or 0)
        if self.mode in ("cut", "refuse"):
            for writer in self.writers:
                writer.transport.abort()
        if self.mode == "cut":
            self.mode = "pass"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.mode == "refuse":
            writer.transport.abort()
            return
        try:
            server_reader, server_writer = await (
                asyncio.open_connection("127.0.0.1", int(self.target))
                if self.target.isdecimal()
                else asyncio.open_unix_connection(self.target)
            )
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, server_writer}
        self.writers |= ends
        tasks = [
            asyncio.create_task(self.forward(reader, server_writer, replies=False)),
            asyncio.create_task(self.forward(server_reader, writer, replies=True)),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for end in ends:
                end.transport.abort()
            self.writers -= ends

    async def forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, replies: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(CHUNK_BYTES):
                if self.mode == "delay":
                    await asyncio.sleep(self.value)
                if replies and self.mode in ("lose", "tear") and self.random.random() < self.value:
                    if self.mode == "tear":
                        writer.write(data[: len(data) // 2])
                        await writer.drain()
                    return
                writer.write(data)
                await writer.drain()


async def main(listen: str, target: str, seed: int) -> None:
    proxy = Proxy(target, seed)
    if listen.isdecimal():
        server = await asyncio.start_server(proxy.serve, "127.0.0.1", int(listen), backlog=1024)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(listen)
        server = await asyncio.start_unix_server(proxy.serve, listen, backlog=1024)
    commands = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(commands), sys.stdin
    )
    async with server:
        while line := await commands.readline():
            proxy.obey(line.decode())


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0))
