"""Asking all shards of a sale: one after the other, or in one round trip for each node."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, TypeVar

import redis

from ..problems import Unavailable
from .link import Link, Question, piped

Of = TypeVar("Of")
Answer = TypeVar("Answer")


def asked(parts: Iterable[Of], do: Callable[[Of], Answer]) -> list[Answer | Unavailable]:
    """Have it done in every part; return what each answered, or why it could not."""
    answers: list[Answer | Unavailable] = []
    for part in parts:
        try:
            answers.append(do(part))
        except Unavailable as error:
            answers.append(error)
    return answers


def gathered(
    links: Sequence[Link], questions: Sequence[Question[Answer]]
) -> list[Answer | Unavailable]:
    """Ask each its question, all of a node in one round trip; what that leaves open again, alone.

    Alone a shard is looked for where it is now: a node may be lost, or have shards no more.
    """
    known: dict[int, list[Any]] = {}
    if len(links) > 1:
        for numbers in _by_node(links):
            known |= _sent_together([(n, questions[n]) for n in numbers], links[numbers[0]])

    def of(number: int) -> Answer:
        if number in known:
            return questions[number].read(known[number])
        return links[number].ask(questions[number])

    return asked(range(len(links)), of)


def _by_node(links: Sequence[Link]) -> list[list[int]]:
    """Return the numbers of those that were last on one node."""
    groups: defaultdict[object, list[int]] = defaultdict(list)
    for number, link in enumerate(links):
        at = link.server.last_at
        groups[at if at or not link.server.cluster else number].append(number)
    return list(groups.values())


def _sent_together(
    questions: Sequence[tuple[int, Question[Any]]], by: Link
) -> dict[int, list[Any]]:
    """Return the answers to each question that had no error among them, by its number."""
    try:
        commands = [words for _, question in questions for words in question.commands]
        found = iter(piped(by.client, commands, raise_on_error=False))
    except redis.RedisError:
        return {}
    answers = {n: list(islice(found, len(question.commands))) for n, question in questions}
    return {n: of for n, of in answers.items() if not any(isinstance(a, Exception) for a in of)}


def reached(answers: Sequence[Answer | Unavailable]) -> list[Answer]:
    """Return the answers of those that could be asked. Raises Unavailable where none could."""
    found = [answer for answer in answers if not isinstance(answer, Unavailable)]
    if not found:
        all_of(answers)
    return found


def all_of(answers: Sequence[Answer | Unavailable]) -> list[Answer]:
    """Return the answers. Raises Unavailable where one could not be asked."""
    for answer in answers:
        if isinstance(answer, Unavailable):
            raise answer
    return [answer for answer in answers if not isinstance(answer, Unavailable)]


def away(answers: Sequence[Answer | Unavailable]) -> tuple[int, ...]:
    """Return the numbers of the parts that could not be asked."""
    return tuple(n for n, answer in enumerate(answers) if isinstance(answer, Unavailable))
