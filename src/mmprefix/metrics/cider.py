"""CIDEr-D as COCO's caption evaluation computes it.

Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", 2015 (arXiv 1411.5726), section 7 for the D: a
cosine of tf-idf vectors of n-grams, n = 1 to 4, with counts clipped to the reference's and a Gaussian penalty on the
difference of lengths, averaged over n and over references, times ten.

COCO's rules: the document frequency of an n-gram is the number of images with a reference that has it, counted over
the references being scored and nothing else; the length is the number of bigrams, so captions of no word and of one
word are equally long. It follows that a score is one of a whole split: that of a part is another number, that of one
image is 0, and there is no mean over batches or ranks.
"""

from __future__ import annotations

import numpy as np

from mmprefix.metrics.ngrams import CaptionCorpus, Floats

SIGMA = 6.0
"""Width of the penalty, in bigrams."""
SCALE = 10.0


def cider(corpus: CaptionCorpus) -> tuple[float, Floats]:
    """CIDEr-D of the corpus, and of each image; the first is the mean of the second.

    Returns:
        a float, and float64 ``[I]``; in [0, 10]. The field reports 100 times that.
    """
    images, references = len(corpus.predictions), len(corpus.reference_lengths)
    image = corpus.image_of_reference
    similarity = np.zeros(references)
    for order in corpus.orders:
        entries = order.references
        # An n-gram twice among the references of an image counts once.
        of_image = np.unique(image[entries.caption] * order.num_grams + entries.gram)
        frequency = np.bincount(of_image % max(order.num_grams, 1), minlength=order.num_grams)
        idf = np.log(images) - np.log(np.maximum(frequency, 1))

        predicted = order.predictions.count * idf[order.predictions.gram]
        referred = entries.count * idf[entries.gram]
        norms = np.sqrt(np.bincount(order.predictions.caption, predicted**2, minlength=images))[image]
        norms = norms * np.sqrt(np.bincount(entries.caption, referred**2, minlength=references))

        found = order.match >= 0
        products = np.minimum(predicted[order.match[found]], referred[found]) * referred[found]
        dot = np.bincount(entries.caption[found], products, minlength=references)
        similarity += np.divide(dot, norms, out=np.zeros(references), where=norms > 0)

    num_bigrams = np.maximum(corpus.reference_lengths - 1, 0), np.maximum(corpus.prediction_lengths - 1, 0)
    difference = num_bigrams[0] - num_bigrams[1][image]
    similarity *= np.exp(-(difference**2) / (2 * SIGMA**2))
    total = np.bincount(image, similarity, minlength=images)
    scores = SCALE * total / len(corpus.orders) / corpus.num_references
    return float(scores.mean()), scores
