"""Who answers in a conversation, among several servers: each function is one transaction in the store's thread."""

from __future__ import annotations

from sqlalchemy import Connection, delete, insert, select, update

from candle_vllm.responses.store.conversation_queries import find
from candle_vllm.responses.store.schema import turns

LEASE_MS = 20_000  # of a server that may have died: others wait for so long


def take(connection: Connection, owner: str, name: str, holder: str, now: int) -> bool:
    """Gives a conversation to a holder; False while another one has it."""
    number = find(connection, owner, name, locked=True).number
    there = connection.execute(select(turns.c.until).where(turns.c.record == number)).first()
    if there is not None and there.until > now:
        return False
    connection.execute(delete(turns).where(turns.c.record == number))
    connection.execute(insert(turns).values(record=number, holder=holder, until=now + LEASE_MS))
    return True


def keep(connection: Connection, holder: str, now: int) -> None:
    """Says that a holder still answers."""
    connection.execute(update(turns).where(turns.c.holder == holder).values(until=now + LEASE_MS))


def leave(connection: Connection, holder: str) -> None:
    """Lets the next one in."""
    connection.execute(delete(turns).where(turns.c.holder == holder))


def forget(connection: Connection, now: int) -> None:
    """Takes away what servers held that have died."""
    connection.execute(delete(turns).where(turns.c.until <= now))
