"""Topic models: corpora, the held-out protocol, and deep exponential families."""

from hivi.topics.base import Corpus
from hivi.topics.coherence import diversity, liveness, npmi
from hivi.topics.corpora import read_corpus, read_ldac, read_matrix_market, read_uci
from hivi.topics.embedded import python_docstrings
from hivi.topics.fitting import TopicFit, amortised, grow, hierarchical, start, train
from hivi.topics.heldout import hold_out_tokens, log_scores, make_split, paired_difference, perplexity, split_documents
from hivi.topics.inference import Inference, infer
from hivi.topics.model import Architecture, Priors, deep_exponential_family
from hivi.topics.peers import evaluate_peer, fit_lda, fit_nmf, fit_unigram
from hivi.topics.text import read_text_folder

__all__ = [
    "Architecture",
    "Corpus",
    "Inference",
    "Priors",
    "TopicFit",
    "amortised",
    "deep_exponential_family",
    "diversity",
    "evaluate_peer",
    "fit_lda",
    "fit_nmf",
    "fit_unigram",
    "grow",
    "hierarchical",
    "hold_out_tokens",
    "infer",
    "liveness",
    "log_scores",
    "make_split",
    "npmi",
    "paired_difference",
    "perplexity",
    "python_docstrings",
    "read_corpus",
    "read_ldac",
    "read_matrix_market",
    "read_text_folder",
    "read_uci",
    "split_documents",
    "start",
    "train",
]
