"""Captions with a frozen encoder: do LookupViT's few compressed tokens tell a decoder as much as the ViT's
tokens do, and which tokens does it need for which fact?

    python lessons/full/captions.py --full        # 3 seeds; the same command goes on where it was stopped

The pictures have one or two groups of things (tinytoken/data/captions.py): "two red crosses left of a blue
disc". First a ViT and a LookupViT learn, from the pictures alone, to answer 98 questions: of each colour and
each shape, whether there are one, two, three objects of it or more, and whether one lies in each quarter. So
their tokens carry number, colour, shape and rough place; what colour goes with what shape, and how groups lie
to each other, no label says. Both have the mean of their tokens classified, the LookupViT each of its two
token sets, so that all tokens which are read later were trained. Then the encoders stay as they are, and
decoders of one size learn to write captions from the tokens: the ViT's 64, LookupViT's 9 compressed ones, its
64 lookup tokens, both sets; "blind" sees no picture, and says what is right by chance.

A caption's facts are the number, colour and shape of each group, and the relation (tasks/caption.py says when
one is right). Pictures are neither mirrored nor moved. The bounds were set before the first run. Multiply-
adds are those of a picture and its caption, encoder and decoder together. The same command in several
terminals shares the arms. Writes captions_full.json, and a picture. BLEU and CIDEr want the extra: `pip
install -e '.[captions]'`.
"""
import dataclasses
import functools

import numpy as np

import tinytoken as tt
from tinytoken.data.captions import LENGTH, WORDS, attribute_names, text_of
from tinytoken.errors import InputError, expect
from tinytoken.experiments import Recipe, difference, interval_text, lesson, spread_text
from tinytoken.experiments.captioning import Attributes, Blind, of_attributes, written
from tinytoken.models import Captioner, Describer
from tinytoken.tasks import Caption, corpus_scores

here = lesson.begin("captions")
expect(here.data == "scenes", "captions", f"--data {here.data}: there are captions of scenes alone")
STEPS, WRITING = here.pick((4, 4), (600, 400), (3000, 2000))  # of the encoders, of the decoders
RECIPE = Recipe(data="captions", train_pictures=here.pick(64, 16000, 48000), smoothing=0.0,
                test_pictures=here.pick(16, 1000, 10000),
                **here.pick(dict(batch=8, dim=16, depth=2, heads=2, patch=8, compressed=(2, 2)),
                            dict(dim=64, depth=4, heads=2), {}))
DECODER = dict(dim=RECIPE.dim, depth=2, heads=RECIPE.heads, length=LENGTH)
BEAM = 4
ENCODERS = {"ViT": ("vit", dict(pool="mean")),
            "LookupViT": ("lookupvit", dict(compressed=RECIPE.compressed, classifiers="both"))}
VIT, COMPRESSED, LOOKUP, BOTH, BLIND = "ViT", "compressed", "lookup", "compressed and lookup", "blind"
ARMS = {VIT: ("ViT", "tokens"), COMPRESSED: ("LookupViT", "tokens"), LOOKUP: ("LookupViT", "lookup"),
        BOTH: ("LookupViT", "both"), BLIND: (BLIND, "tokens")}
SORTS = ("facts", "count", "colour", "shape", "relation")
SETTINGS = dataclasses.asdict(RECIPE) | {"steps": STEPS, "writing": WRITING, "decoder": DECODER, "beam": BEAM}


@functools.lru_cache(maxsize=2)  # of one seed at a time
def pictures(seed, of_encoder):
    """The Trial of a seed: its labels are the attributes for encoders, and the captions for decoders."""
    return of_attributes(pictures(seed, False)) if of_encoder else here.trial(RECIPE, seed)


@functools.cache
def encoder(name, seed):
    """(the trained encoder, what fit reported)."""
    if name == BLIND:
        return Blind(RECIPE.dim), None
    kind, config = ENCODERS[name]
    trial = pictures(seed, True)
    model = trial.new(kind, num_classes=len(attribute_names()), **config)
    report = trial.fit(f"captions {name}", Attributes(model), STEPS, RECIPE.lr)
    return model, report


def train_encoder(name, seed):
    """Train an encoder -> what is noted of it."""
    model, report = encoder(name, seed)
    trial = pictures(seed, True)
    return {"trained": report, "parameters": model.parameter_count(),
            "macs": tt.macs(model, trial.prepare(trial.test.images[:1])).total
            } | Attributes.metrics(trial.answers(model), trial.test.attributes)


def train_decoder(name, seed):
    """Train a decoder on an encoder's tokens -> what is noted of it."""
    of, tokens = ARMS[name]
    trial, source = pictures(seed, False), encoder(of, seed)[0]
    tt.manual_seed(seed)
    captioner = Captioner(RECIPE.dim, WORDS, **DECODER).to(here.device)
    report = trial.fit(f"captions by {name}", Caption(captioner, source, tokens=tokens), WRITING, RECIPE.lr)
    describer, test = Describer(source, captioner, tokens), trial.test
    answers = {beam: written(describer, trial, beam) for beam in (1, BEAM)}
    row = Caption.metrics(answers[1], test.labels)
    row |= {"by_beam": Caption.metrics(answers[BEAM], test.labels), "trained": report}
    row |= {"macs": tt.macs(describer, trial.prepare(test.images[:1])).total,
            "parameters": captioner.parameter_count(),
            "examples": [[text_of(words), text_of(true[0])] for words, true in
                         zip(answers[1][:8], test.labels)]}
    try:
        return row | corpus_scores(answers[1], test.labels)
    except InputError as error:  # the extra is not there
        return row | {"bleu4": None, "cider": None, "without_bleu_and_cider": str(error)}


seeds = here.seeds
jobs = {}
for seed in seeds:
    jobs |= {f"seed{seed} {name}": functools.partial(train_encoder, name, seed) for name in ENCODERS}
    jobs |= {f"seed{seed} by {name}": functools.partial(train_decoder, name, seed) for name in ARMS}
done = here.each(jobs, SETTINGS)
encoders = {name: [done[f"seed{seed} {name}"] for seed in seeds] for name in ENCODERS}
rows = {name: [done[f"seed{seed} by {name}"] for seed in seeds] for name in ARMS}
above = {name: {sort: difference(*([np.array([row[sort]]) for row in rows[of]] for of in (name, VIT)))
                for sort in SORTS} for name in ARMS if name != VIT}

for name, by_seed in encoders.items():
    print(f"{name}: F1 of number {spread_text([100 * row['number_f1'] for row in by_seed])}, "
          f"of place {spread_text([100 * row['place_f1'] for row in by_seed])}")
print(f"{'right, % of facts':<24}" + "".join(f"{sort:>13}" for sort in SORTS)
      + f"{'exact':>13}{'beam ' + str(BEAM):>13}{'BLEU-4':>13}{'CIDEr':>13}{'M MACs':>8}")
for name, by_seed in rows.items():
    figures = [spread_text([100 * row[sort] for row in by_seed]) for sort in (*SORTS, "exact")]
    figures += [spread_text([100 * row["by_beam"]["exact"] for row in by_seed])]
    figures += [spread_text([row[score] for row in by_seed]) for score in ("bleu4", "cider")]
    print(f"{name:<24}" + "".join(f"{figure:>13}" for figure in figures)
          + f"{by_seed[0]['macs'] / 1e6:>8.1f}")
print(f"{'above the ViT [95 %]' if len(seeds) > 1 else 'above the ViT':<24}" + "".join(
    f"{sort:>20}" for sort in SORTS))
for name, gaps in above.items():
    texts = [interval_text(*gap) if len(seeds) > 1 else f"{gap[0]:+.1f}" for gap in gaps.values()]
    print(f"{name:<24}" + "".join(f"{text:>20}" for text in texts))
here.claim("compressed: points of facts above the ViT's tokens", above[COMPRESSED]["facts"][0], low=-1)
here.claim("compressed: MACs of encoder and decoder, of those with the ViT",
           rows[COMPRESSED][0]["macs"] / rows[VIT][0]["macs"], high=0.5)


def draw_facts(figure):
    """A group of bars for each sort of fact, a bar for each arm."""
    axes = figure.subplots()
    for place, (name, by_seed) in enumerate(rows.items()):
        shares = [100 * np.mean([row[sort] for row in by_seed]) for sort in SORTS]
        axes.bar(np.arange(len(SORTS)) + 0.16 * (place - 2), shares, 0.15, label=name)
    axes.set_xticks(range(len(SORTS)), ["all facts", *SORTS[1:]])
    axes.set_ylabel("right, %")
    axes.legend(fontsize=7)


here.picture("facts", draw_facts, 8, 4)
here.measured(encoders=encoders, rows=rows, above=above, seeds=seeds, recipe=SETTINGS)
here.end()
