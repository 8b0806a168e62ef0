"""Captions of pictures of groups of things (data/captions.py), from the tokens of a frozen encoder."""
from typing import Any

import numpy as np

from .. import random
from ..backend import Array, array_module, to_numpy
from ..data.captions import FACTS, NONE, facts_of, text_of
from ..errors import InputError, install
from ..models.base import Loss
from ..models.captioner import Captioner
from ..models.describer import Describer
from .base import Task, drop_paths, task


@task("caption")
class Caption(Task):
    """Cross-entropy of the words of one of an image's true captions, drawn anew for each step, from a
    Captioner that reads the `tokens` of an encoder (see Describer). The encoder is never changed."""
    taught = True

    def __init__(self, model: Captioner, encoder: Any, smoothing: float = 0.0, drop_path: float = 0.0,
                 tokens: str = "tokens") -> None:
        super().__init__(model, smoothing, drop_path)
        self.describer = Describer(encoder, model, tokens)
        self.settings |= {"tokens": tokens}

    def noise(self, size: int, step: int, seed: int, xp: Any = np) -> dict[str, Array]:
        which = random.uniform((size,), site="tinytoken.tasks.caption.which", step=step, seed=seed, xp=xp)
        if not self.drop_path:
            return {"which": which}
        return {"which": which, "paths": drop_paths(self.model, self.drop_path, size, step, seed, xp)}

    def __call__(self, images: Array, captions: Array, which: Array, **draws: Array) -> Loss:
        """captions (B, R, L): the true ones of each image. which (B,), from 0 to 1: the one that is
        learned."""
        xp = array_module(captions)
        words = captions[xp.arange(len(captions)), (which * captions.shape[1]).astype("int64")]
        out = self.model(self.describer.memory(images), words[:, :-1], **draws)
        return self.model.loss(out, words, smoothing=self.smoothing)

    @staticmethod
    def metrics(answers: np.ndarray, labels: Array) -> dict[str, float]:
        """Of captions answers (B, t), shares: "exact", those that are a true one of their image, labels (B,
        R, L); "facts", the facts that are right, and these by sort: "count", "colour", "shape", "relation".

        A caption is compared with the true one that it has most facts in common with. The facts are those
        that either of the two states; right are those in which they agree, each group in its place. What is
        not of the grammar has none right. A share is of all images' facts together."""
        right, all_of = (dict.fromkeys(FACTS, 0) for _ in range(2))
        exact = 0
        for answer, references in zip(answers, to_numpy(labels)):
            said = _facts(answer)
            true = max(map(_facts, references), key=lambda true: _in_common(said, true))
            exact += said == true
            for sort, one, other in zip(FACTS, said, true):
                all_of[sort] += one not in (None, NONE) or other != NONE
                right[sort] += one == other != NONE
        shares = {sort: right[sort] / max(1, all_of[sort]) for sort in right}
        return {"exact": exact / len(answers), "facts": sum(right.values()) / sum(all_of.values())} | shares


def _facts(words):
    """The facts of a caption, None in each place where it is not of the grammar."""
    return facts_of(words) or (None,) * len(FACTS)


def _in_common(said, true):
    return sum(one == other for one, other in zip(said, true))


def corpus_scores(answers: np.ndarray, labels: Array) -> dict[str, float]:
    """BLEU-4, from 0 to 100 (Papineni et al. 2002; sacrebleu), and CIDEr-D, from 0 to 10 (Vedantam et al.
    2015; pycocoevalcap), of captions (B, t) against the true ones (B, R, L).

    Both want the extra `captions`, neither wants Java: words are not cut anew."""
    try:
        from pycocoevalcap.cider.cider import Cider
        from sacrebleu import corpus_bleu
    except ImportError as error:
        raise InputError(f"corpus_scores: {error.name} is not installed "
                         f"({install('pycocoevalcap==1.2', 'sacrebleu')})") from error
    said = [text_of(words) for words in answers]
    true = [[text_of(words) for words in references] for references in to_numpy(labels)]
    bleu = corpus_bleu(said, [list(column) for column in zip(*true)], tokenize="none", force=True)
    cider, _ = Cider().compute_score(dict(enumerate(true)), {i: [text] for i, text in enumerate(said)})
    return {"bleu4": bleu.score, "cider": float(cider)}
