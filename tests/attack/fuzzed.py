from collections.abc import Iterator
from tests.attack.case import Case


def cases(rounds: int) -> Iterator[Case]:
    return iter(())
