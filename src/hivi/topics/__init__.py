"""Topic models: corpora, the held-out protocol, and deep exponential families."""
