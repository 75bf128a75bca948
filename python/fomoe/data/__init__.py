# SPDX-License-Identifier: Apache-2.0
"""What a run trains on: a text as bytes, or streams of documents. Imports no torch.

Nor does it import `datasets` or `tokenizers` (extra `hf`), until a source or a setting needs them.
"""

from fomoe.data.batches import SiteBatches, validation_batches
from fomoe.data.corpus import TEXT_SUFFIXES, Corpus, Domain, load_corpus
from fomoe.data.entropy import bigram_entropy, unigram_entropy
from fomoe.data.sources import Source
from fomoe.data.stream_data import StreamData
from fomoe.data.text_data import TextData
from fomoe.data.training_data import Batches, Batching, Facts, TrainingData

__all__ = [
    "TEXT_SUFFIXES",
    "Batches",
    "Batching",
    "Corpus",
    "Domain",
    "Facts",
    "SiteBatches",
    "Source",
    "StreamData",
    "TextData",
    "TrainingData",
    "bigram_entropy",
    "load_corpus",
    "unigram_entropy",
    "validation_batches",
]
