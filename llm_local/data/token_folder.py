"""A folder of tokens that is a source by itself, wherever it is copied: what prepare_data.py --output writes.

FOLDER/train/, FOLDER/validation/    the tokens of the two sets (prepared.py)
FOLDER/tokenizer/                    what they were made by, for --tokenizer_name
FOLDER/tokens.json                   written last: where they are from, and every file with its size
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from llm_local.config import ConfigError
from llm_local.data.encoding import first_token, tokenizer_key
from llm_local.files import link_or_copy, write_json

COUNTS = "counts.json"  # in a folder of tokens beside what `datasets` knows (prepared.py)
CARD, TRAIN, VALIDATION, TOKENIZER = "tokens.json", "train", "validation", "tokenizer"
REPAIR = "copy it again, or write it again with prepare_data.py"


@dataclass(frozen=True)
class Card:
    """Where the tokens of a folder are from. tokenizer: its name, for a person; sizes: bytes of each file;
    bos_token_id: what begins each document, if anything does."""

    source: str
    text_column: str
    validation_split_percentage: int
    tokenizer: str
    tokenizer_key: str
    eos_token_id: int
    sizes: dict[str, int]
    bos_token_id: int | None = None


def is_token_folder(path: Path) -> bool:
    """Also where it is not whole."""
    return (path / CARD).is_file() or any((path / name / COUNTS).is_file() for name in (TRAIN, VALIDATION))


def output_problems(folder: Path) -> list[str]:
    """What keeps tokens from being written there; a folder that was half written is gone on with."""
    if (folder / CARD).exists():
        return [f"output={folder} holds prepared data; remove it, or choose another"]
    if folder.exists() and not folder.is_dir():
        return [f"output={folder} is a file; choose another name"]
    found = sorted(path.name for path in folder.glob("*"))
    begun = [name for name in (TRAIN, VALIDATION) if any((folder / name).glob("*"))]
    ours = set(found) <= {TRAIN, VALIDATION, TOKENIZER} and TRAIN in begun
    if found and not (ours and all((folder / name / COUNTS).is_file() for name in begun)):
        return [f"output={folder} is not empty ({found[0]}); choose another"]
    return []


def write_token_folder(
    folder: Path,
    sets: dict[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    text_column: str,
    percentage: int,
) -> None:
    """Puts the folders of both sets there: files are linked where that is possible, else copied. Raises OSError."""
    for name, made in sets.items():
        shutil.rmtree(folder / name, ignore_errors=True)  # of another start, perhaps of other text
        (folder / name).mkdir(parents=True)
        files = [path for path in made.iterdir() if path.is_file() and not path.name.startswith(".")]
        for file in sorted(files, key=lambda path: (path.name != COUNTS, path.name)):  # by which it is known as ours
            link_or_copy(file, folder / name / file.name)
    tokenizer.save_pretrained(folder / TOKENIZER)
    files = [path for name in sets for path in sorted((folder / name).iterdir())]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    eos, bos = tokenizer.eos_token_id, first_token(tokenizer)
    assert isinstance(eos, int)
    card = Card(source, text_column, percentage, _name(tokenizer), tokenizer_key(tokenizer), eos, sizes, bos)
    write_json(folder / CARD, asdict(card))


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    name = str(tokenizer.name_or_path) or type(tokenizer).__name__
    return Path(name).name if Path(name).exists() else name


def folder_problems(named: str, folder: Path) -> list[str]:
    """What keeps the folder from being read, by its files' names and sizes. At most one line."""
    try:
        card = read_card(folder)
    except FileNotFoundError:
        return [f"{named} is a folder of tokens without {CARD}, which is written last; {REPAIR}"]
    except (OSError, ValueError, TypeError) as error:
        return [f"{named}: {CARD} cannot be read ({' '.join(str(error).split())}); {REPAIR}"]
    for name, size in card.sizes.items():
        path = folder / name
        if not path.is_file():
            return [f"{named} is not whole: {name} is missing; {REPAIR}"]
        if path.stat().st_size != size:
            return [f"{named} is not whole: {name} has {path.stat().st_size:,} bytes, not {size:,}; {REPAIR}"]
    return []


def read_card(folder: Path) -> Card:
    """Raises OSError, ValueError or TypeError for one that is missing or none."""
    return Card(**json.loads((folder / CARD).read_text()))


def require_tokenizer(named: str, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError unless the folder's tokens are this tokenizer's."""
    card, bos = read_card(folder), first_token(tokenizer)
    if card.bos_token_id != bos:
        theirs, ours = ("without BOS" if token is None else "with BOS" for token in (card.bos_token_id, bos))
        repair = f"set tokenizer_name={folder / TOKENIZER} and leave add_bos out, or prepare the text again"
        raise ConfigError([f"{named} has documents that begin {theirs}, this run's begin {ours}; {repair}"])
    if tokenizer_key(tokenizer) != card.tokenizer_key:
        made = f"{named} was tokenised by {card.tokenizer}, not by {_name(tokenizer)}"
        raise ConfigError([f"{made}; set tokenizer_name={folder / TOKENIZER}, or prepare the text by this one"])
