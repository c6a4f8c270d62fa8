"""Reading a corpus that does not fit into memory: seconds and memory against the number of nonzeros.

Run `python benchmarks/topics_reader.py [NONZEROS ...]` (10^6, 10^7, 10^8 by default; 10^8 takes 4 GB of disk). Each size has a
process of its own, which reads a UCI `docword` file into a corpus on disk and draws one minibatch from it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from common import write

from hivi.topics import read_corpus

EACH, WORDS = 100, 100_000
"""Different words in a document, and words in the vocabulary."""


def make(path: Path, nonzeros: int) -> None:
    """A UCI file: every document has `EACH` words."""
    rng, documents = np.random.default_rng(0), nonzeros // EACH
    with path.open("wb") as out:
        out.write(f"{documents}\n{WORDS}\n{nonzeros}\n".encode())
        for first in range(0, documents, 10_000):
            number = np.repeat(np.arange(first, min(first + 10_000, documents)) + 1, EACH)
            steps = rng.integers(1, WORDS // EACH, (len(number) // EACH, EACH))
            word, count = np.cumsum(steps, 1).reshape(-1), rng.integers(1, 4, len(number))
            np.savetxt(out, np.stack([number, word, count], 1), fmt="%d")


def own_memory() -> float:
    """Of this process, in MB, without pages of files that are mapped, which the system takes back at need (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def child(path: str, folder: str) -> None:
    """Read; print seconds, peak MB of its own, and what was found."""
    seen, done = [own_memory()], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            seen.append(own_memory())

    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    corpus = read_corpus(path, folder=folder)
    spent = time.perf_counter() - began
    corpus.subset(np.arange(0, corpus.n_documents, corpus.n_documents // 250))
    done.set()
    print(spent, max(seen) - seen[0], corpus.n_documents, corpus.n_tokens)


def main() -> None:
    """All sizes."""
    rows = []
    for nonzeros in [int(float(a)) for a in sys.argv[1:]] or [10**6, 10**7, 10**8]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "docword.synthetic.txt"
            make(path, nonzeros)
            done = subprocess.run(
                [sys.executable, __file__, "child", str(path), str(Path(folder) / "corpus")],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            seconds, peak, documents, tokens = (float(x) for x in done.stdout.split())
            size = path.stat().st_size / 2**20
        rows.append((
            f"{nonzeros:,}", f"{documents:,.0f}", f"{tokens:,.0f}", f"{size:,.0f}", f"{seconds:.1f}",
            f"{nonzeros / seconds / 1e6:.1f}", f"{peak:.0f}",
        ))  # fmt: skip
        print(rows[-1], flush=True)
    write(
        "topics_reader", "Reading a UCI bag of words", "python benchmarks/topics_reader.py",
        ("nonzeros", "documents", "tokens", "file, MB", "seconds", "million nonzeros per second", "own memory, MB"), rows,
        [
            f"{EACH} different words of {WORDS:,} in each document; the corpus goes to disk. One run, a process per size.",
            "Own memory: the peak above what the process had before, without pages of mapped files.",
        ],
    )  # fmt: skip


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["child"] else main()
