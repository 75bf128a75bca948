# SPDX-License-Identifier: Apache-2.0
"""Text as bytes: corpora, the split between sites, entropies. Imports no torch."""

from fomoe.data.batches import SiteBatches, validation_batches
from fomoe.data.corpus import TEXT_SUFFIXES, Corpus, Domain, load_corpus
from fomoe.data.entropy import bigram_entropy, unigram_entropy

__all__ = [
    "TEXT_SUFFIXES",
    "Corpus",
    "Domain",
    "SiteBatches",
    "bigram_entropy",
    "load_corpus",
    "unigram_entropy",
    "validation_batches",
]
