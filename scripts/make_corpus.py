"""Makes a corpus of English technical prose of what is installed: the docstrings of all Python packages.

python scripts/make_corpus.py corpus.jsonl.zst [--packages DIR]

A module is a document. Paragraphs that were seen before are left out, and modules with little prose. The same packages
give the same file, so a study on it can be repeated with requirements.lock; a few minutes on one core.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import pyarrow

LEAST_CHARACTERS = 200  # of a document
BREAK = re.compile(r"\n\s*\n")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(path: Path) -> list[str]:
    """Of the module, its classes and functions, in their order; [] of what this Python cannot read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return []
    nodes = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in nodes if (text := ast.get_docstring(node))]


def documents(packages: Path) -> Iterator[tuple[str, str]]:
    """Modules by their paths, and their prose."""
    seen: set[bytes] = set()
    for path in sorted(packages.rglob("*.py")):
        kept = []
        for paragraph in (part.strip() for text in docstrings(path) for part in BREAK.split(text)):
            digest = hashlib.sha256(paragraph.encode(errors="replace")).digest()[:12]
            if paragraph and digest not in seen:
                seen.add(digest)
                kept.append(paragraph)
        text = "\n\n".join(kept)
        if len(text) >= LEAST_CHARACTERS:
            yield path.relative_to(packages).as_posix(), text


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="file to write, .jsonl.zst")
    parser.add_argument(
        "--packages", type=Path, default=Path(sysconfig.get_path("purelib")), help="folder; default: this Python's"
    )
    given = parser.parse_args(arguments)
    if not given.packages.is_dir():
        parser.error(f"--packages {given.packages}: no such folder")
    count, size, whole = 0, 0, hashlib.sha256()
    with pyarrow.output_stream(str(given.output), compression="zstd") as file:
        for source, text in documents(given.packages):
            line = json.dumps({"text": text, "source": source}).encode() + b"\n"
            file.write(line)
            whole.update(line)
            count, size = count + 1, size + len(text.encode(errors="replace"))
    print(f"{given.output}: {count:,} documents, {size / 1e6:.1f} MB of text, sha256 {whole.hexdigest()[:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
