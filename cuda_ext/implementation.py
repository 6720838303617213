"""What can be said of an operator: which implementation runs, and why."""

from dataclasses import dataclass


@dataclass(frozen=True, eq=False)  # compared by identity: `announce` looks at each call
class Implementation:
    """What runs for an operator. Example: Implementation("reference", "no kernel is built for it")."""

    name: str
    reason: str
    kernel: bool = False

    @property
    def fused(self) -> bool:
        """Whether one kernel does it all, whosever."""
        return self.name != "reference"

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"
