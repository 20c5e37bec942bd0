"""What a machine without network needs for a day on its GPU, in one folder of at most 60 MB.

    FOLDER/wheels/*.whl          what the usual image of torch and transformers lacks, as requirements.lock has it
    FOLDER/text.jsonl.gz         text, a document a line
    FOLDER/tokenizer/            trained on it
    FOLDER/reference.json        flags and losses of a short run on the CPU; written last

Like gpu_day this imports nothing but Python's own library.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llm_local.bench.gpu_runs import ROOT, Job, Paths, surroundings, train

MOST_BYTES = 60_000_000
# torch, transformers, accelerate, tokenizers, numpy, pandas, pyarrow, psutil and tqdm are taken to be there: the first
# three are what such an image is for, and pyarrow alone is as large as a bundle may be
PACKAGES = (
    *("deepspeed", "hjson", "msgpack", "py-cpuinfo", "einops"),
    *("pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions"),
    *("datasets", "dill", "multiprocess", "xxhash", "sentencepiece"),
    *("pytest", "pytest-timeout", "pluggy", "iniconfig", "pygments"),
)
SOURCE_ONLY = ("deepspeed",)  # its wheel is built here, and has no compiled parts
PYTHON = "3.12"
PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28)))
VERSIONS = ("torch", "deepspeed", "transformers")

# the run whose losses are compared: in float32, on two stages
REFERENCE: dict[str, Any] = {
    "config_name": "configs/quickstart.json",
    "num_stages": 2,
    "seq_length": 128,
    "per_device_train_batch_size": 4,
    "max_steps": 6,
    "learning_rate": 1e-3,
    "eval_batches": 2,
    "logging_steps": 1,
    "seed": 7,
}


class BundleError(RuntimeError):
    """A bundle that cannot be made or used; the message says why in a line."""


def check_bundle(folder: Path) -> None:
    """Raises BundleError naming what is not there."""
    lacking = [
        name for name in ("wheels", "text.jsonl.gz", "tokenizer", "reference.json") if not (folder / name).exists()
    ]
    if lacking:
        raise BundleError(f"--bundle {folder} lacks {', '.join(lacking)}; make it by --make_bundle {folder}")


def make_bundle(folder: Path, text: Path | None, megabytes: float, python: str = PYTHON) -> str:
    """Makes or completes the bundle for a Python of that version; returns a line with its size. Raises BundleError."""
    if text is not None and not text.is_file():
        raise BundleError(f"--text {text}: there is no such file")
    if folder.exists() and any(folder.iterdir()) and not (folder / "wheels").is_dir():
        raise BundleError(f"--make_bundle {folder} holds other files; give another folder")
    wheels = folder / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    lock = (ROOT / "requirements.lock").read_text()
    for name in PACKAGES:
        fetch(f"{name}=={locked(lock, name)}", wheels, None if name in SOURCE_ONLY else python)
    write_text(folder / "text.jsonl.gz", text, int(megabytes * 1e6))
    train_tokenizer(folder / "text.jsonl.gz", folder / "tokenizer")
    with tempfile.TemporaryDirectory(prefix="llm_local-bundle-") as work:
        losses = _reference(folder, Path(work))
    about = {"versions": {name: version(name) for name in VERSIONS}, "flags": REFERENCE, "losses": losses}
    (folder / "reference.json").write_text(json.dumps(about, indent=1) + "\n")
    size = size_of(folder)
    if size > MOST_BYTES:
        raise BundleError(
            f"{folder} has {size / 1e6:.1f} MB and may have {MOST_BYTES / 1e6:.0f}; give fewer --megabytes"
        )
    return f"{folder}: {size / 1e6:.1f} MB, {len(list(wheels.iterdir()))} wheels, for Python {python} on x86-64"


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def locked(lock: str, name: str) -> str:
    """The version of a package in requirements.lock; where there are several, the last is the newest Python's."""
    found = re.findall(rf"^{re.escape(name)}==([\w.+!-]+)", lock, flags=re.MULTILINE)
    if not found:
        raise BundleError(f"requirements.lock has no {name}; run `make lock`")
    return found[-1]


def fetch(requirement: str, wheels: Path, python: str | None) -> None:
    """The wheel of one package for that Python, or built here of its source, unless it is there; any other of the
    package's is removed."""
    stem, _, wanted = requirement.partition("==")
    stem = re.sub(r"[-_.]+", "_", stem).lower()
    for path in wheels.glob("*.whl"):
        name, number, tag = path.name.lower().split("-")[:3]
        short = (python or "").replace(".", "")
        fits = python is None or tag in ("py3", "py2.py3", f"py{short}", f"cp{short}")
        if name == stem and number.partition("+")[0] == wanted and fits:
            return
        if name == stem:
            path.unlink()
    pip = [sys.executable, "-m", "pip"]
    if python is None:
        command = [*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(wheels), requirement]
    else:
        only = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
        platforms = [part for name in PLATFORMS for part in ("--platform", name)]
        command = [*pip, "download", "-q", "--no-deps", *only, *platforms, "-d", str(wheels), requirement]
    _call(command, f"fetching {requirement}", DS_BUILD_OPS="0")


def install(wheels: Path, target: Path) -> list[str]:
    """Installs the wheels into a folder for PYTHONPATH; returns their names. Raises BundleError."""
    found = sorted(str(path) for path in wheels.glob("*.whl"))
    draft = target.with_name(f".{target.name}")
    shutil.rmtree(draft, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(draft)]
    _call([*pip, *found], "installing the bundle")
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    return [Path(path).name for path in found]


def write_text(target: Path, source: Path | None, most_bytes: int) -> int:
    """So many bytes of documents as .jsonl.gz, of a file of text or of Python's own sources; how many they are."""
    count = written = 0
    with gzip.GzipFile(target, "wb", mtime=0) as file:
        for text in _python_sources() if source is None else _documents(source):
            line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
            if written + len(line) > most_bytes and count:
                break
            file.write(line)
            count, written = count + 1, written + len(line)
    if not count:
        raise BundleError(f"{source} has no text")
    return count


def _python_sources() -> Iterator[str]:
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py")):
        if "site-packages" in path.parts or "dist-packages" in path.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            yield text


def _documents(source: Path) -> Iterator[str]:
    from llm_local.data.text_files import UnreadableText, format_of, pieces_of, read_texts

    kind = format_of(source)
    if kind is None:
        raise BundleError(f"--text {source}: give .txt, .jsonl or .csv, also .gz or .zst")
    try:
        yield from (row["text"] for row in read_texts(pieces_of(source, whole=False), kind, "text"))
    except UnreadableText as error:
        raise BundleError(f"--text {error}") from error


def train_tokenizer(text: Path, target: Path, characters: int = 4_000_000) -> None:
    """4096 pieces, as many as the models have."""
    shutil.rmtree(target, ignore_errors=True)
    sizes = ["--kind", "bpe", "--vocab_size", "4096", "--characters", str(characters)]
    with tempfile.TemporaryDirectory(prefix="llm_local-tokenizer-") as cache:
        data = ["--train_file", str(text), "--cache_dir", cache]
        script = str(ROOT / "scripts/train_tokenizer.py")
        _call([sys.executable, script, "--output", str(target), *sizes, *data], "training the tokenizer")


def _reference(folder: Path, work: Path) -> list[list[float]]:
    paths = Paths(work, folder / "text.jsonl.gz", folder / "tokenizer")
    job = train(Job("reference", REFERENCE, on_cpu=True), paths)
    if job.error:
        raise BundleError(f"the reference run failed: {job.error.splitlines()[-1]}")
    return job.losses


def _call(command: list[str], doing: str, **more: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**surroundings(), **more})
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise BundleError(f"{doing} failed: {said[-1] if said else f'exit status {done.returncode}'}")
