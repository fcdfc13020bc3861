"""What fuzzing came to, as lines for a terminal."""

from typing import TYPE_CHECKING

from conformance.report.text import failure_lines

if TYPE_CHECKING:
    from conformance.families import Config
    from conformance.fuzz import Found


def lines(found: "Found", implementation: str) -> list[str]:
    """A line a family, and for a failure the claim, the smallest configuration and how to replay it."""
    outcome = "FAIL" if found.failure else "pass"
    unsupported = sum(found.unsupported.values())
    said = [f"{found.family:<20} {outcome}   {found.examples} configurations, {found.passed} claims passed, "
            f"{unsupported} unsupported, in {found.seconds:.0f} s"]  # fmt: skip
    said += [f"  unsupported {count:>5}  {reason}" for reason, count in found.unsupported.items()]
    if found.failure is None or found.config is None:
        return said
    said += ["", *failure_lines(found.failure, implementation)]
    said += [f"      {'smallest failing' if index == 0 else '':<18} {line}" for index, line in enumerate(moved(found))]
    return [*said, ""]


def moved(found: "Found") -> list[str]:
    """Size of the input, and what the configuration has that the family's plain case has not."""
    from conformance.configurations import plain

    config: Config = found.config or {}
    usual = plain(found.family)
    return [found.size, *(f"{key}: {value}" for key, value in config.items() if usual.get(key) != value)]
