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
from conformance.mistakes import Mistake
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


class Tokenizers:
    """The reference's tokenizer of one case, with and without mistakes, each loaded once."""

    def __init__(self, case: "Case"):
        self.case, self.right = case, reference.tokenizer(case.config, case.files)
        self._known: dict[tuple[str, ...], Brief] = {}

    def load(self, mistakes: Sequence[Mistake]) -> Brief:
        key = tuple(mistake.id for mistake in mistakes)
        if key not in self._known:
            self._known[key] = Brief(mutant(*mistakes), self.case)
        return self._known[key]


class Simulator:
    """The reference's tokenizer on one check, with and without mistakes; remembers what it has simulated."""

    def __init__(self, check: Check, case: "Case"):
        self.check, self.case, self.tokenizers = check, case, tokenizers(case)
        self._known: dict[str, Answers | None] = {}
        self.right = self._simulate(())

    def simulate(self, hypothesis: Hypothesis) -> Answers | None:
        """What the check would ask and get; None if it does not run to its end."""
        if hypothesis.id not in self._known:
            self._known[hypothesis.id] = self._simulate(hypothesis.mistakes)
        return self._known[hypothesis.id]

    def _simulate(self, mistakes: Sequence[Mistake]) -> Answers | None:
        try:
            return Recorder(self.case, self.tokenizers.load(mistakes)).run(self.check)
        except Exception:  # a mistake that cannot be made here, or that does not run
            return None


tokenizers = lru_cache(maxsize=8)(Tokenizers)
simulator = lru_cache(maxsize=16)(Simulator)


def counted(answers: Answers) -> list[int]:
    return [n for n, given in enumerate(answers.given) if len(given) <= LONGEST]


def agree(answers: Answers, simulated: Answers | None) -> bool:
    return simulated is not None and all(answers.got[n] == simulated.got[n] for n in counted(answers))


def diagnose(check: Check, judge: Judge, result: Result) -> tuple[dict[str, Any] | None, list[str]]:
    """The diagnosis (as the run's schema has it) of a failed check, or None with a note why there is none."""
    answers, recall = judge.answers, recalled(judge.implementation)
    assert answers is not None
    with pristine():
        search = Search(simulator(check, judge.case), answers, judge, result.claim.check)
        right = search.simulator.right
        if right is None or any(right.got[n] != answers.wanted[n] for n in counted(answers)):
            return None, ["not diagnosed: reference_impl itself does not pass this claim in this process"]
        if known := search.known(recall):
            return named([(0.0, hypothesis) for hypothesis in known]), []
        found = search.hits()
    if len(found) > 1:
        others = search.other_answers()
        with pristine():
            found = search.best(found, others)
    if not found:
        return search.unknown(), []
    recall.known.append(tuple(found))
    return named([(0.0, hypothesis) for hypothesis in found]), []


class Search:
    """One search, with its time.

    near: what was simulated, how many of the wrong answers it gives, and how many others it gets wrong.
    """

    def __init__(self, simulator: Simulator, answers: Answers, judge: Judge, check: str):
        self.simulator, self.answers, self.judge, self.check = simulator, answers, judge, check
        self.wrong = [n for n in answers.wrong() if len(answers.given[n]) <= LONGEST]
        self.near: list[tuple[int, int, Hypothesis]] = []
        self.ends = time.perf_counter() + SECONDS

    def known(self, recall: Recall) -> list[Hypothesis]:
        """What was found in this implementation before, if it gives all answers."""
        for known in recall.known if self.wrong else ():
            if found := [h for h in known if agree(self.answers, self.simulator.simulate(h))]:
                return found
        return []

    def hits(self) -> list[Hypothesis]:
        """What gives all answers: one mistake, or two."""
        every = hypotheses(self.judge.case.family) if self.wrong else ()
        here = [h for h in every if any(self.check in mistake.killed_by for mistake in h.mistakes)]
        return self._try(here) or self._try(self._pairs(here))

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

    def _pairs(self, here: Sequence[Hypothesis]) -> list[Hypothesis]:
        """Of those that explain a part, two and two; then the one that explains most, with every other."""
        some = list(combinations(self._nearest(PAIRED), 2))
        some += [(best, other) for best in self._nearest(1) for other in here if other.id != best.id]
        return list({frozenset({one.id, other.id}): both(one, other) for one, other in reversed(some)}.values())[::-1]

    def _nearest(self, count: int) -> list[Hypothesis]:
        """Those that give most of the wrong answers, one at least."""
        some = [entry for entry in self.near if entry[0] and " and " not in entry[2].id]
        return [
            hypothesis for *_, hypothesis in sorted(some, key=lambda entry: (entry[1] - entry[0], entry[1]))[:count]
        ]

    def other_answers(self) -> dict[str, Answers]:
        """What the candidate answers to the other checks of the case; not those that it or the case has nothing for."""
        calls, found = self.judge.candidate.calls, {}
        for name, check in checks().items():
            if name.startswith("tokenizer.") and name != self.check:
                with contextlib.suppress(Exception):
                    found[name] = Recorder(self.judge.case, self.judge.candidate).run(check)
        self.judge.candidate.calls = calls
        return {name: answers for name, answers in found.items() if answers is not None}

    def best(self, found: list[Hypothesis], others: dict[str, Answers]) -> list[Hypothesis]:
        """Those that give most of the other answers too."""
        agreed = {
            h.id: sum(agree(answers, simulator(checks()[name], self.judge.case).simulate(h))
                      for name, answers in others.items())
            for h in found
        }  # fmt: skip
        return [h for h in found if agreed[h.id] == max(agreed.values())]

    def unknown(self) -> dict[str, Any]:
        """What can be seen of a mistake that no entry gives."""
        answers, tokenizer = self.answers, self.simulator.tokenizers.right
        wrong = WrongText(
            answers.given, answers.got, answers.wanted, tokenizer.decode, frozenset(tokenizer.special_tokens.ids)
        )
        said = [sign] if (sign := text_signature(wrong)) else []
        shares = {h.id: f"{same} of {len(self.wrong)} wrong answers" + (f", {more} others wrong" if more else "")
                  for same, more, h in self.near}  # fmt: skip
        if near := [f"{h.id} ({shares[h.id]})" for h in self._nearest(3)]:
            said.append(f"near, and not the same: {', '.join(near)}")
        if self.wrong:
            said.append(f"none of {len(self.near)} simulated mistakes gives all these answers")
        else:
            said.append(f"only texts of more than {LONGEST} characters are wrong, which are not simulated")
        return {"kind": "unknown", "id": None, "text": "; ".join(said), "reproduced_to": None, "fix": ""}
