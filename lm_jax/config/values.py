"""Values of config fields that are written as text, such as spans of a run and curves over it."""

import math
import re

_UNITS = {"k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "": 1.0}
_MOST = 1e18  # of any unit
_DURATION = re.compile(r"(\d+(?:\.\d*)?(?:[eE]\d+)?)\s*([kKMB]?)\s*(steps?|tokens?|epochs?)?")


class Duration(str):
    """A span of training: "2000" or "2000 steps", "2M tokens" or "3 epochs"."""

    def parts(self) -> tuple[float, str]:
        """Amount and unit: step, token or epoch.

        Raises:
            ValueError: if it is not written like that.
        """
        match = _DURATION.fullmatch(self.strip())
        if match is None:
            raise ValueError(
                'is no duration; write a number of steps, or like "2M tokens" or "3 epochs"'
            )
        amount = float(match[1]) * _UNITS[match[2]]
        if amount > _MOST:
            raise ValueError(f"is too long; give at most {_MOST:.0e}")
        return amount, (match[3] or "steps").rstrip("s")


class Span(str):
    """Updates from one to another: "10:20"; empty: none."""

    def updates(self) -> range:
        """These updates, counted from 1, the last one too.

        Raises:
            ValueError: if it is not written like that.
        """
        if not self.strip():
            return range(0)
        match = re.fullmatch(r"(\d+):(\d+)", self.strip())
        if match is None or not 1 <= int(match[1]) < int(match[2]):
            raise ValueError('is no span; write FROM:TO with 1 <= FROM < TO, as in "10:20"')
        return range(int(match[1]), int(match[2]) + 1)


class Curve(str):
    """A value over the run: "0.7", or "0@0.1, 1@0.4": 0 up to a tenth, linear to 1 at 0.4."""

    def points(self) -> list[tuple[float, float]]:
        """(share of the run, value), in order; linear between them and constant outside.

        Raises:
            ValueError: if it is not written like that.
        """
        try:
            return _points(self)
        except ValueError as error:
            raise ValueError(
                f'is no curve ({error}); write a number, or value@share as in "0@0.1, 1@0.4"'
            ) from error

    @property
    def zero(self) -> bool:
        """Whether it is 0 throughout."""
        return not any(value for _, value in self.points())


class RopeScaling(str):
    """How rotary wavelengths grow: "linear:factor=2", "llama3:..." or "yarn:..."; empty: not."""

    def parts(self) -> tuple[str, dict[str, float]]:
        """Kind and numbers by name, as `models.rotary.frequencies` reads them; none if empty.

        Raises:
            ValueError: if it is not written like that.
        """
        if not self.strip():
            return "", {}
        kind, _, rest = self.strip().partition(":")
        if kind not in SCALINGS:
            raise ValueError(f"is of no kind that there is; begin with {', '.join(SCALINGS)}")
        required, optional = (names.split() for names in SCALINGS[kind])
        pairs = [part.strip().partition("=") for part in rest.split(",") if part.strip()]
        numbers = {name: _number(name, value) for name, _, value in pairs}
        known = numbers.keys() <= {*required, *optional} and len(numbers) == len(pairs)
        if not known or not numbers.keys() >= {*required}:
            also = f" and perhaps {', '.join(optional)}" if optional else ""
            wanted = f"{', '.join(required)}{also}"
            raise ValueError(f"does not give {kind} its numbers; they are {wanted}")
        return kind, numbers


# The numbers that each kind must and may have.
SCALINGS = {
    "linear": ("factor", ""),
    "llama3": ("factor low_freq_factor high_freq_factor original_max_position_embeddings", ""),
    "yarn": (
        "factor original_max_position_embeddings",
        "beta_fast beta_slow attention_factor mscale mscale_all_dim truncate",
    ),
}


def _number(name: str, text: str) -> float:
    """A number above 0; 0 or 1 for `truncate`."""
    try:
        value = float(text)
    except ValueError as error:
        raise ValueError(f"has {name}={text!r}; give a number") from error
    good = value in (0, 1) if name == "truncate" else 0 < value < math.inf
    if not good:
        wanted = "0 or 1" if name == "truncate" else "a number above 0"
        raise ValueError(f"has {name}={text}; give {wanted}")
    return value


def _points(text: str) -> list[tuple[float, float]]:
    parts = [part.split("@") for part in text.split(",")]
    if len(parts) == len(parts[0]) == 1:
        parts[0].append("0")
    points = [(float(share), float(value)) for value, share in parts]
    shares = [share for share, _ in points]
    if shares != sorted(set(shares)) or not 0 <= shares[0] <= shares[-1] <= 1:
        raise ValueError("shares must rise from 0 or more to 1 or less")
    if not all(math.isfinite(value) for _, value in points):
        raise ValueError("values must be finite")
    return points
