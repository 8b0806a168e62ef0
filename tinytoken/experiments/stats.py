"""Means, spreads and intervals."""
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # {seeds: the 97.5 % quantile}


def difference(right: Sequence[np.ndarray], than: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """How many points of accuracy one arm is above another, paired: (mean, low, high) with a 95 % interval.

    right, than: for each seed, whether each test picture was answered rightly (B,), for the one arm and for
    the other; seeds that both have are compared. The interval is Student's over the seeds; of one seed, the
    normal one over the pictures (which says nothing of how another seed would have come out)."""
    pairs = [100.0 * (a.astype(float) - b) for a, b in zip(right, than)]
    gaps = [pair.mean() for pair in pairs]
    if len(gaps) > 1:
        reach = STUDENT[len(gaps)] * statistics.stdev(gaps) / math.sqrt(len(gaps))
    else:
        reach = 1.96 * pairs[0].std() / math.sqrt(len(pairs[0]))
    middle = statistics.mean(gaps)
    return float(middle), float(middle - reach), float(middle + reach)


def packed(right: np.ndarray) -> str:
    """Whether each test picture was answered rightly (B,), as a text for JSON: a bit each, in hexadecimal."""
    return np.packbits(right).tobytes().hex()


def unpacked(text: str, count: int) -> np.ndarray:
    """The first `count` answers of what `packed` returned: (count,) bool."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), "uint8"), count=count).astype(bool)


def over_chance(rows: Sequence[dict[str, Any]]) -> list[float]:
    """The share of object in what each stage keeps, over the share in all patches: 1 is chance. Means over
    seeds.

    rows: what is noted of an arm by seed, "on_object" being as kept_on_object returns it. Empty where nobody
    knows where the objects are, or nothing is kept."""
    known = [row["on_object"] for row in rows if row.get("on_object")]
    return [statistics.mean(stage) for stage in zip(*([share / seen["all"] for share in seen["stages"]]
                                                      for seen in known))]


def told_apart(logits: np.ndarray, pictures: Any, one: str, other: str) -> np.ndarray:
    """Of the pictures of two classes alone, whether the logit of the right one is the larger of the two:
    (their number,) bool. Chance is a half. logits (B, K): of the set `pictures`."""
    k, j = pictures.names.index(one), pictures.names.index(other)
    of_two = (pictures.labels == k) | (pictures.labels == j)
    return (logits[of_two, k] > logits[of_two, j]) == (pictures.labels[of_two] == k)


def spread_text(values: Sequence[float | None], form: str = ".1f") -> str:
    """The mean, with the standard deviation where there are several values.

    Values that are not known, None, are left out; how many are left is written behind."""
    known = [value for value in values if value is not None]
    if not known:
        return "not known"
    spread = f" ± {statistics.stdev(known):{form.removeprefix('+')}}" if len(known) > 1 else ""
    left = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return f"{statistics.mean(known):{form}}{spread}{left}"


def interval_text(middle: float, low: float, high: float) -> str:
    """A difference in points with the ends of its interval, as `difference` returns them."""
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"


def range_text(values: Sequence[float], form: str = ".0f") -> str:
    """A median with the lowest and the highest value, '690 (440 to 742)': a run that got stuck is seen.

    values: [median, lowest, highest], as timing.images_per_second returns them."""
    middle, low, high = (f"{value:{form}}" for value in values)
    return f"{middle} ({low} to {high})"


def bounds_text(low: float | None, high: float | None) -> str:
    """Two bounds, of which either may be None."""
    texts = [f"above {low:g}"] if low is not None else []
    texts += [f"at most {high:g}"] if high is not None else []
    return ", ".join(texts)
