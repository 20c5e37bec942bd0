"""Text files as documents: .txt, .jsonl and .csv, plain or packed by gzip or zstandard.

    for row in read_texts(pieces_of(path, whole=False), "json", "text"):    # {"text": ...}

What is wrong in a file is said with its line, wherever it is met: before training or in the middle of a stream. A byte
order mark is dropped and CRLF becomes a newline. A plain file is read in pieces of PIECE_BYTES, each of which starts at
a line of its own, so that a stream goes on in the middle of a large file without reading what lies before.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
TEXT_FORMATS = ("text", "json", "csv")  # read here; `datasets` reads the others
PACKED = {".gz": "gzip", ".zst": "zstd"}
PIECE_BYTES = 64 << 20
BOM = b"\xef\xbb\xbf"

Piece = tuple[str, int, int]  # path, first byte, byte behind the last


class UnreadableText(ValueError):
    """Documents that a source cannot give; says where, and what to do."""

    def __init__(self, place: str, problem: str):
        super().__init__(place, problem)  # as they are given, so that it can be sent from one process to another

    def __str__(self) -> str:
        return ": ".join(self.args)


@dataclass(frozen=True)
class Line:
    """A document of a file, or what is wrong with it. number: of the line that it ends on, from the piece's start."""

    number: int
    text: str
    problem: str = ""


def format_of(path: Path | str) -> str | None:
    """'text', 'json', 'csv', 'parquet' or 'arrow' by the suffixes; None for any other. Text alone may be packed."""
    path = Path(path)
    packed = path.suffix.lower() in PACKED
    found = FORMATS.get((path.with_suffix("") if packed else path).suffix.lower())
    return None if packed and found not in TEXT_FORMATS else found


def pieces_of(path: Path, whole: bool, piece_bytes: int | None = None) -> list[Piece]:
    """The file as pieces that are read by themselves; one where `whole`, and where lines cannot be found within it."""
    piece_bytes = piece_bytes or PIECE_BYTES
    size = path.stat().st_size
    undivided = whole or path.suffix.lower() in PACKED or format_of(path) == "csv"
    if undivided:
        return [(str(path), 0, sys.maxsize)]
    return [(str(path), start, min(size, start + piece_bytes)) for start in range(0, size, piece_bytes)]


def read_texts(pieces: Sequence[Piece], kind: str, column: str, whole: bool = False) -> Iterator[dict[str, str]]:
    """Rows of one column: lines of .txt with their newlines, documents of the others; a file each where `whole`.

    Raises UnreadableText naming file and line.
    """
    for piece in pieces:
        texts = (_or_raise(piece, line) for line in lines_of(piece, kind, column))
        for text in ["".join(texts)] if whole else texts:
            yield {column: text}


def _or_raise(piece: Piece, line: Line) -> str:
    if line.problem:
        raise UnreadableText(f"{piece[0]}, line {lines_before(piece) + line.number}", line.problem)
    return line.text


def lines_of(piece: Piece, kind: str, column: str) -> Iterator[Line]:
    """The documents of a piece one by one; reading goes on behind one with a problem. Raises UnreadableText where the
    file itself ends too early."""
    numbered = _decoded(piece)
    if kind == "csv":
        return _csv_documents(piece, numbered, column)
    return numbered if kind == "text" else _json_documents(numbered, column)


def _decoded(piece: Piece) -> Iterator[Line]:
    for number, raw in enumerate(_raw_lines(piece), start=1):
        raw = raw.removeprefix(BOM) if number == 1 and piece[1] == 0 else raw
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = raw[error.start]
            yield Line(number, "", f"byte {byte:#04x} is not UTF-8; save the file as UTF-8, or give one of text")
            continue
        yield Line(number, text[:-2] + "\n" if text.endswith("\r\n") else text)


def _raw_lines(piece: Piece) -> Iterator[bytes]:
    """Lines that start inside the piece."""
    path, start, stop = piece
    number = 0
    try:
        with _open(Path(path)) as file:
            position = start
            if start:
                file.seek(start - 1)
                position += len(file.readline()) - 1  # the line that the piece before ends with
            for raw in file:
                if position >= stop:
                    return
                position, number = position + len(raw), number + 1
                yield raw
    except (EOFError, OSError, zlib.error) as error:
        place = f"{path}, after line {lines_before(piece) + number}"
        raise UnreadableText(place, f"the file is cut short or damaged ({error}); fetch it again") from error


def _open(path: Path) -> Any:
    packed = PACKED.get(path.suffix.lower())
    if packed == "gzip":
        return gzip.open(path, "rb")
    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")) if packed else path.open("rb")


def lines_before(piece: Piece) -> int:
    """Lines of the file that start before the piece; counted only for a message."""
    path, start, _ = piece
    if not start:
        return 0
    with open(path, "rb") as file:
        blocks = range(0, start - 1, 1 << 20)
        return 1 + sum(file.read(min(1 << 20, start - 1 - done)).count(b"\n") for done in blocks)


def _json_documents(lines: Iterator[Line], column: str) -> Iterator[Line]:
    for line in lines:
        if line.problem:
            yield line
        elif line.text.strip():
            text, problem = _json_text(line.text, column)
            yield Line(line.number, text, problem)


def _json_text(line: str, column: str) -> tuple[str, str]:
    """The document on a line of JSON, '' for null, and what is wrong with it, '' if nothing is."""
    try:
        row = json.loads(line)
    except ValueError as error:
        return "", f"not JSON ({error}); write one JSON object a line"
    if not isinstance(row, dict):
        return "", f"a JSON {type(row).__name__}, not an object; write one JSON object a line"
    if column not in row:
        return "", missing_column(column, list(row))
    text = "" if row[column] is None else row[column]
    if not isinstance(text, str):
        return "", f"{column!r} holds {json.dumps(text)[:40]}, not text; write a string there"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        return "", f"{column!r} holds {half}, half of a character; write both halves or none"
    return text, ""


def _csv_documents(piece: Piece, lines: Iterator[Line], column: str) -> Iterator[Line]:
    csv.field_size_limit(sys.maxsize)  # a document may be larger than the 128 KiB that csv takes for a mistake
    rows = csv.reader((_or_raise(piece, line).replace("\0", "") for line in lines), strict=True)
    header: list[str] = []
    for number in count():
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield Line(rows.line_num, "", f"not CSV ({error}); close every quote, and double one inside a text")
            return
        if row is None:
            return
        if not number:
            header = row
            if column not in header:
                yield Line(rows.line_num, "", missing_column(column, header))
                return
        elif row and len(row) != len(header):
            problem = f"{len(row)} fields where the header has {len(header)}; put a text with commas in quotes"
            yield Line(rows.line_num, "", problem)
        elif row:
            yield Line(rows.line_num, row[header.index(column)])


def missing_column(column: str, columns: list[str], flag: str = "text_column_name") -> str:
    return f"no column {column!r}, only {', '.join(map(repr, columns)) or 'none'}; set {flag}"
