"""An explicit-state model of the exchange whose data are their own flag through L2.

`explore` visits every interleaving of a few CTAs over a few rounds. In round r a CTA

1. stores its words of state r in slot r % slots,
2. clears its words in the slot of state r + clear_ahead,
3. executes a fence,
4. polls all words of all CTAs in slot r % slots, in any order; a word that is not empty is taken.

A store waits in a buffer of its CTA and becomes visible to each other CTA separately, in any order, except that stores
to one word keep their order. A load may be executed before earlier loads of its CTA, back to the CTA's last fence. In
both, memory is weaker than a GPU's. In one respect it is stronger: a fence waits until all earlier stores of the CTA
are visible to all, and orders all its loads, while a kernel's fence is one thread's. The protocol needs no more than
that: a word and its clears are stored by one thread, and each thread that polls executes a fence. The barrier in
receive() orders what the other threads of the CTA have read before what a thread stores next.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

EMPTY = -1


@dataclass(frozen=True)
class Protocol:
    """What is explored; the defaults of `slots`, `clear_ahead` and `fence` are the kernels' protocol."""

    ctas: int
    words: int = 1  # per CTA and state
    rounds: int = 6
    slots: int = 4
    clear_ahead: int = 2
    fence: bool = True  # step 3
    early_loads: bool = False  # the fence does not order the loads of step 4: threads that only read execute none


class Store(NamedTuple):
    slot: int
    word: int
    value: int  # the round, or EMPTY
    unseen: int  # bits of the CTAs that it is not visible to


class Cta(NamedTuple):
    round: int
    step: int  # 0: stores, 1: clears, 2: fence, 3: polls
    pending: tuple[Store, ...]  # the oldest first
    taken: int  # bits of the words (CTA * words + word) that were taken in this round
    early: tuple[tuple[int, int], ...]  # (word, value) of the next round's loads that were executed early


State = tuple[tuple[Cta, ...], tuple[tuple[int, ...], ...]]  # CTAs; per observer [slot, CTA, word]


class Violation(Exception):
    """A CTA took a word of another state, or no CTA can continue."""


class Model:
    def __init__(self, protocol: Protocol) -> None:
        self.p = protocol
        self.state_words = protocol.ctas * protocol.words

    def initial(self) -> State:
        p = self.p
        memory = (EMPTY,) * (p.slots * self.state_words)
        return (Cta(0, 0, (), 0, ()),) * p.ctas, (memory,) * p.ctas

    def successors(self, state: State) -> Iterator[State]:
        """All states after one action of one CTA, or after one store has become visible to one CTA."""
        ctas, memory = state
        for index, cta in enumerate(ctas):
            for next_cta, next_memory in (*self._visibility(index, cta, memory), *self._steps(index, cta, memory)):
                yield (*ctas[:index], next_cta, *ctas[index + 1 :]), next_memory

    def _visibility(self, index, cta, memory):
        earlier: set[tuple[int, int]] = set()
        for k, store in enumerate(cta.pending):
            if (store.slot, store.word) not in earlier:
                for observer in range(self.p.ctas):
                    if store.unseen >> observer & 1:
                        at = (store.slot * self.p.ctas + index) * self.p.words + store.word
                        view = memory[observer]
                        view = (*view[:at], store.value, *view[at + 1 :])
                        left = store.unseen & ~(1 << observer)
                        rest = (store._replace(unseen=left),) if left else ()
                        pending = (*cta.pending[:k], *rest, *cta.pending[k + 1 :])
                        yield cta._replace(pending=pending), (*memory[:observer], view, *memory[observer + 1 :])
            earlier.add((store.slot, store.word))

    def _steps(self, index, cta, memory):
        p = self.p
        if cta.round == p.rounds:
            return
        if cta.step < 2:
            target, value = (cta.round, cta.round) if cta.step == 0 else (cta.round + p.clear_ahead, EMPTY)
            yield self._store(index, cta, target % p.slots, value, memory)
        elif cta.step == 2:
            if not p.fence or not cta.pending:
                yield cta._replace(step=3), memory
        else:
            yield from self._polls(index, cta, memory)

    def _store(self, index, cta, slot, value, memory):
        """The CTA itself sees its stores at once."""
        p, view = self.p, memory[index]
        at = (slot * p.ctas + index) * p.words
        view = (*view[:at], *(value,) * p.words, *view[at + p.words :])
        others = (1 << p.ctas) - 1 & ~(1 << index)
        stores = tuple(Store(slot, word, value, others) for word in range(p.words))
        cta = cta._replace(step=cta.step + 1, pending=cta.pending + stores)
        return cta, (*memory[:index], view, *memory[index + 1 :])

    def _polls(self, index, cta, memory):
        p, early = self.p, dict(cta.early)
        for word in range(self.state_words):
            if cta.taken >> word & 1:
                continue
            value = memory[index][cta.round % p.slots * self.state_words + word]
            if value == EMPTY:
                continue
            yield self._take(cta, word, value), memory
        if p.early_loads and cta.round + 1 < p.rounds:
            for word in range(self.state_words):
                value = memory[index][(cta.round + 1) % p.slots * self.state_words + word]
                if word // p.words != index and word not in early and value != EMPTY:
                    yield cta._replace(early=tuple(sorted({**early, word: value}.items()))), memory

    def _take(self, cta, word, value):
        if value != cta.round:
            raise Violation(f"state {cta.round}: a CTA took a word of state {value}")
        cta = cta._replace(taken=cta.taken | 1 << word)
        if cta.taken + 1 < 1 << self.state_words:
            return cta
        cta = Cta(cta.round + 1, 0, cta.pending, 0, cta.early)
        for early_word, early_value in cta.early:
            if early_value != cta.round:
                raise Violation(f"state {cta.round}: a CTA took word {early_word} of state {early_value} early")
        return cta._replace(early=())


def explore(protocol: Protocol) -> int:
    """Visit all reachable states and return their number.

    Raises:
        Violation: a CTA can take a stale word, or all can wait for a word that was cleared.
    """
    model = Model(protocol)
    first = model.initial()
    seen, stack = {first}, [first]
    while stack:
        state = stack.pop()
        stuck = True
        for following in model.successors(state):
            stuck = False
            if following not in seen:
                seen.add(following)
                stack.append(following)
        if stuck and any(cta.round < protocol.rounds for cta in state[0]):
            raise Violation(f"deadlock: {state[0]}")
    return len(seen)
