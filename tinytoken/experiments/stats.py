"""Means, spreads and intervals."""
import math
import statistics

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}  # 97.5 % quantiles for so many seeds


def difference(right, than):
    """Points of accuracy of one arm above another, paired: (mean, low, high) with a 95 % interval. right,
    than: for each seed whether each test picture was answered rightly (B,); as many seeds as both have. The
    interval is Student's over the seeds, of one seed the normal one over the pictures (which says nothing of
    how another seed would have come out)."""
    pairs = [100.0 * (a.astype(float) - b) for a, b in zip(right, than)]
    gaps = [pair.mean() for pair in pairs]
    reach = (STUDENT[len(gaps)] * statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1
             else 1.96 * pairs[0].std() / math.sqrt(len(pairs[0])))
    middle = statistics.mean(gaps)
    return float(middle), float(middle - reach), float(middle + reach)


def spread_text(values, form=".1f"):
    """Mean, and standard deviation where there are several. None, a value that is not known, is left out, and
    said."""
    known = [value for value in values if value is not None]
    if not known:
        return "not known"
    spread = f" ± {statistics.stdev(known):{form.removeprefix('+')}}" if len(known) > 1 else ""
    return f"{statistics.mean(known):{form}}{spread}" + f" ({len(known)} of {len(values)})" * (len(known) < len(values))


def interval_text(middle, low, high):
    """A difference in points with the ends of its interval, as `difference` gives them."""
    return f"{middle:+.1f} [{low:+.1f}, {high:+.1f}]"
