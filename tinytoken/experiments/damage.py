"""Errors on damaged pictures, and how they compare with a baseline's (Hendrycks & Dietterich 2019, arXiv
1903.12261)."""
import functools
import statistics
from collections.abc import Sequence
from typing import Any

from ..data import CORRUPTIONS, corrupt
from ..tasks import accuracy
from ..train import infer
from .trial import Trial


class Damage:
    """The first `most` test pictures of a trial, under every corruption at the `strengths`."""

    def __init__(self, trial: Trial, strengths: Sequence[int], most: int = 2000) -> None:
        self.trial, self.strengths = trial, strengths
        self.images, self.labels = trial.test.images[:most], trial.test.labels[:most]
        # all models see the same pictures, so they are made once
        self.pictures = functools.cache(
            lambda corruption, strength: corrupt(self.images, corruption, strength, seed=trial.recipe.seed))

    def errors(self, model: Any) -> dict[str, Any]:
        """{"clean": the share of wrong answers, "damaged": {corruption: the shares, by strength}}."""
        def error(images):
            return 1 - accuracy(infer(model, images, self.trial.prepare, threads=self.trial.threads),
                                self.labels)
        return {"clean": error(self.images),
                "damaged": {corruption: [error(self.pictures(corruption, strength))
                                         for strength in self.strengths] for corruption in CORRUPTIONS}}


def mean_error(errors: dict[str, Any]) -> float:
    """The mean of what Damage.errors found, over strengths and corruptions."""
    return statistics.mean(statistics.mean(by_strength) for by_strength in errors["damaged"].values())


def corruption_error(errors: dict[str, Any], baseline: dict[str, Any], added: bool = False) -> float | None:
    """mCE in percent: the error under a corruption over the baseline's, mean over corruptions. added: the
    relative mCE, of what damage adds to the errors on clean pictures. None where the baseline has no errors
    to compare with. Both are as Damage.errors returns them."""
    ratios = []
    for corruption, by_strength in errors["damaged"].items():
        own = statistics.mean(by_strength) - (errors["clean"] if added else 0)
        other = statistics.mean(baseline["damaged"][corruption]) - (baseline["clean"] if added else 0)
        if not other:
            return None
        ratios.append(own / other)
    return 100 * statistics.mean(ratios)
