"""Which mistake of a tokenizer is it?  Makes the catalogue's in `reference_impl` and sees which gives the same answers.

The very check that failed is run on the reference's tokenizer with a mistake.  A mistake that gives the candidate's ids
or texts, all of them, the wrong ones and the right ones, is the diagnosis.  Of several, those are named that also give
what the candidate answers to the other checks of the case.  Two at once are looked for among those that explain a part.

Never changes a verdict, and never guesses: what is not reproduced is an unknown mistake, with what can be seen of it.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING, Any

from conformance.diagnosis import Hypothesis, Recall, both, hypotheses, named, recalled
from conformance.implementations import reference
from conformance.judge import Answers, Failure, Judge, Result
from conformance.mutation import mutant
from conformance.pristine import pristine
from conformance.suite import checks
from conformance.text_signatures import WrongText, text_signature
from conformance.tokenizer import TokenizerCandidate

if TYPE_CHECKING:
    from conformance.cases import Case

Check = Callable[[Judge], None]

# Seconds that the search for one diagnosis may take.
SECONDS = 6.0
# Longer texts are not simulated: a wrong order of merging may take n² steps, and says nothing there that it does not
# say of short ones.
LONGEST = 256
# So many of those that explain a part of what is wrong are tried in pairs.
PAIRED = 8


class Recorder(Judge):
    """Runs a check for what it asks; whether the answers are right is no matter."""

    def __init__(self, case: "Case", candidate: Any):
        self.case, self.candidate, self.forward_is_right = case, candidate, None
        self.begin()

    def run(self, check: Check) -> Answers | None:
        with contextlib.suppress(Failure):
            check(self)
        return self.answers


class Brief(TokenizerCandidate):
    """Does not take long texts."""

    def encode(self, text: str, **wanted: bool) -> list[int]:
        return super().encode(text, **wanted) if len(text) <= LONGEST else []


class Simulator:
    """The reference's tokenizer, on one check, with and without mistakes; remembers what it has simulated."""

    def __init__(self, check: Check, case: "Case"):
        self.check, self.case = check, case
        self._known: dict[str, Answers | None] = {}
        with pristine():
            self.tokenizer = reference.tokenizer(case.config, case.files)
        self.right = self._simulate(())

    def simulate(self, hypothesis: Hypothesis) -> Answers | None:
        """What the check would ask and get; None if it does not run to its end."""
        if hypothesis.id not in self._known:
            self._known[hypothesis.id] = self._simulate(hypothesis.mistakes)
        return self._known[hypothesis.id]

    def _simulate(self, mistakes: Sequence[Any]) -> Answers | None:
        try:
            with pristine():
                return Recorder(self.case, Brief(mutant(*mistakes), self.case)).run(self.check)
        except Exception:  # a mistake that cannot be made here, or that does not run
            return None


simulator = lru_cache(maxsize=16)(Simulator)


def counted(answers: Answers) -> list[int]:
    return [n for n, given in enumerate(answers.given) if len(given) <= LONGEST]


def agree(answers: Answers, simulated: Answers | None) -> bool:
    return simulated is not None and all(answers.got[n] == simulated.got[n] for n in counted(answers))


def diagnose(check: Check, judge: Judge, result: Result) -> tuple[dict[str, Any] | None, list[str]]:
    """The diagnosis (as the run's schema has it) of a failed check, or None with a note why there is none."""
    answers = judge.answers
    assert answers is not None
    search = Search(simulator(check, judge.case), answers, judge, result.claim.check)
    if search.simulator.right is None or any(
        search.simulator.right.got[n] != answers.wanted[n] for n in counted(answers)
    ):
        return None, ["not diagnosed: reference_impl itself does not pass this claim in this process"]
    hits = search.hits(recalled(judge.implementation))
    return named([(0.0, h) for h in hits]) if hits else search.unknown(), []


class Search:
    """One search, with its time.

    near: what was simulated, how many of the wrong answers it gives, and how many others it gets wrong.
    """

    def __init__(self, simulator: Simulator, answers: Answers, judge: Judge, check: str):
        self.simulator, self.answers, self.judge, self.check = simulator, answers, judge, check
        self.wrong = [n for n in answers.wrong() if len(answers.given[n]) <= LONGEST]
        self.near: list[tuple[int, int, Hypothesis]] = []
        self.ends = time.perf_counter() + SECONDS

    def hits(self, recall: Recall) -> list[Hypothesis]:
        """What gives all answers: what was found in this implementation before, one mistake, or two."""
        if not self.wrong:
            return []
        for known in recall.known:
            if found := [h for h in known if agree(self.answers, self.simulator.simulate(h))]:
                return found
        every = hypotheses(self.judge.case.family)
        here = [h for h in every if any(self.check in mistake.killed_by for mistake in h.mistakes)]
        found = self._try(here) or self._try(self._pairs())
        if found := self._best(found):
            recall.known.append(tuple(found))
        return found

    def _try(self, some: Iterable[Hypothesis]) -> list[Hypothesis]:
        found = []
        for hypothesis in some:
            if time.perf_counter() > self.ends:
                break
            simulated = self.simulator.simulate(hypothesis)
            if agree(self.answers, simulated):
                found.append(hypothesis)
            elif simulated is not None:
                differ = [n for n in counted(self.answers) if self.answers.got[n] != simulated.got[n]]
                same = len(self.wrong) - len(set(differ).intersection(self.wrong))
                self.near.append((same, len(differ) - len(self.wrong) + same, hypothesis))
        return found

    def _pairs(self) -> list[Hypothesis]:
        """Of those that explain a part, two and two."""
        return [both(a, b) for a, b in combinations(self._nearest(PAIRED), 2)]

    def _nearest(self, count: int) -> list[Hypothesis]:
        """Those that give most of the wrong answers, one at least."""
        some = [entry for entry in self.near if entry[0] and " and " not in entry[2].id]
        return [
            hypothesis for *_, hypothesis in sorted(some, key=lambda entry: (entry[1] - entry[0], entry[1]))[:count]
        ]

    def _best(self, found: list[Hypothesis]) -> list[Hypothesis]:
        """Of several those that give most of what the candidate answers to the case's other checks."""
        if len(found) < 2:
            return found
        agreed = dict.fromkeys((h.id for h in found), 0)
        others = [check for name, check in checks().items() if name.startswith("tokenizer.") and name != self.check]
        for check in others:
            if (answers := self._asked(check)) is not None:
                for hypothesis in found:
                    agreed[hypothesis.id] += agree(answers, simulator(check, self.judge.case).simulate(hypothesis))
        return [h for h in found if agreed[h.id] == max(agreed.values())]

    def _asked(self, check: Check) -> Answers | None:
        """What the candidate answers to another check; None if the case or the candidate has nothing to it."""
        calls = self.judge.candidate.calls
        try:
            return Recorder(self.judge.case, self.judge.candidate).run(check)
        except Exception:
            return None
        finally:
            self.judge.candidate.calls = calls

    def unknown(self) -> dict[str, Any]:
        """What can be seen of a mistake that no entry gives."""
        answers, tokenizer = self.answers, self.simulator.tokenizer
        wrong = WrongText(answers.given, answers.got, answers.wanted, tokenizer.decode, frozenset(specials(tokenizer)))
        said = [sign] if (sign := text_signature(wrong)) else []
        shares = {h.id: f"{same} of {len(self.wrong)} wrong answers" + (f", {more} others wrong" if more else "")
                  for same, more, h in self.near}  # fmt: skip
        if near := [f"{h.id} ({shares[h.id]})" for h in self._nearest(3)]:
            said.append(f"near, and not the same: {', '.join(near)}")
        said.append(f"none of {len(self.near)} simulated mistakes gives all these answers")
        return {"kind": "unknown", "id": None, "text": "; ".join(said), "reproduced_to": None, "fix": ""}


def specials(tokenizer: Any) -> list[str]:
    """The texts of its special and added tokens."""
    found: list[str] = list(tokenizer._specials.ids)
    return found
