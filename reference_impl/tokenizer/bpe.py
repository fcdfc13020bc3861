"""Byte-pair encoding of one word, in O(n log n) of its length (Sennrich, Haddow and Birch 2016, section 3.2).

    repeat: of all neighbouring symbols that may be merged, merge the pair of the best rank; of equal ones the leftmost

Algorithm 1 of the paper looks through all pairs before each merge, n² steps for a word of n letters. Here the pairs
wait in a heap, ordered by rank and position, and the symbols are a linked list.
"""

import heapq
from collections.abc import Callable

# left symbol, right symbol -> how early the pair is merged (smaller is earlier), or None if it is never merged.
Rank = Callable[[str, str], float | None]


def merge(word: str, rank: Rank) -> list[str]:
    """The symbols that `word` ends as, starting from its characters.

    "abab" with the ranks (a, b) → 0 and (ab, ab) → 1: the heap holds (0, at 0) and (0, at 2). The first makes ab·a·b
    and finds no rank for (ab, a); the second makes ab·ab and pushes (1, at 0), which makes abab.
    """
    symbols = list(word)  # the text of the symbol that starts here; "" once it is part of the one before
    following = [*range(1, len(word)), -1]
    preceding = list(range(-1, len(word) - 1))
    heap: list[tuple[float, int, int, int]] = []  # rank, where the left and the right symbol start, length of both

    def offer(left: int, right: int) -> None:
        order = rank(symbols[left], symbols[right])
        if order is not None:
            heapq.heappush(heap, (order, left, right, len(symbols[left]) + len(symbols[right])))

    for start in range(1, len(word)):
        offer(start - 1, start)
    while heap:
        _, left, right, length = heapq.heappop(heap)
        # One of the two has been merged with another neighbour since
        if not symbols[left] or following[left] != right or len(symbols[left]) + len(symbols[right]) != length:
            continue
        symbols[left] += symbols[right]
        symbols[right] = ""
        after = following[left] = following[right]
        if after >= 0:
            preceding[after] = left
            offer(left, after)
        if preceding[left] >= 0:
            offer(preceding[left], left)
    return [symbol for symbol in symbols if symbol]
