"""The experiments of the paper (arXiv 1511.02386) and of its readers, one a file; `hivi reproduce NAME` runs them."""
