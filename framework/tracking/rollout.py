"""One response token by token, as rollout.json holds it and the report shows it. Everything at token positions."""

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from framework.core.errors import DataError

_TRACKS = ("log_probs", "reference_log_probs", "kl", "rewards", "values", "advantages")


@dataclass(frozen=True)
class Token:
    """One position of a rollout. `share`: the advantage as a part of the largest in the response, in [-1, 1]."""

    text: str
    counts: bool
    share: float
    log_prob: float
    reference_log_prob: float
    kl: float
    reward: float
    value: float
    advantage: float


@dataclass(frozen=True)
class Row:
    """One row of a rollout's table; without a token it is a stretch that does not count."""

    place: str
    text: str
    token: Token | None


@dataclass(frozen=True)
class Rollout:
    """rollout.json: {"tokens": [str], "response_mask": [bool], "log_probs", "reference_log_probs", "kl", "rewards",
    "values", "advantages": [float], "score": float?, "step": int?}; all lists as long as `tokens`, token positions."""

    tokens: tuple[Token, ...]
    score: float | None
    step: int | None

    @property
    def rows(self) -> list[Row]:
        """The table: a row a token that counts, and one a stretch that does not (prompts are long and say nothing)."""
        rows, t = [], 0
        for counts, run in groupby(self.tokens, lambda token: token.counts):
            stretch = list(run)
            if counts:
                rows += [Row(str(t + i), token.text, token) for i, token in enumerate(stretch)]
            else:
                place = f"{t}–{t + len(stretch) - 1}" if len(stretch) > 1 else str(t)
                rows.append(Row(place, "".join(token.text for token in stretch), None))
            t += len(stretch)
        return rows


def read_rollout(path: Path) -> Rollout | None:
    """The rollout in a file, None where there is no file. Raises DataError where the lists do not fit together."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError(f"is not JSON: {error}", str(path)) from None
    if not isinstance(content, dict):
        raise DataError("is not a JSON object", str(path))
    size = len(content.get("tokens", []))
    for name in ("tokens", "response_mask", *_TRACKS):
        if len(content.get(name, [])) != size or not size:
            raise DataError(f"'{name}' has {len(content.get(name, []))} entries for {size} tokens", str(path))
        if name in _TRACKS and not all(isinstance(value, int | float) for value in content[name]):
            raise DataError(f"'{name}' must hold numbers only", str(path))
    counts = [bool(flag) for flag in content["response_mask"]]
    advantages = [float(value) for value in content["advantages"]]
    most = max((abs(value) for value, flag in zip(advantages, counts) if flag), default=0.0) or 1.0
    tokens = tuple(
        Token(str(text), counts[t], advantages[t] / most if counts[t] else 0.0, *(content[n][t] for n in _TRACKS))
        for t, text in enumerate(content["tokens"])
    )
    return Rollout(tokens, content.get("score"), content.get("step"))
