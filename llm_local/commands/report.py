"""Makes a page of one run, or of several side by side, that any browser shows: RUN/report.html.

llm-local report runs/quickstart [runs/other ...] [--output report.html] [--sample_prompt "def "]

A run is the output folder of a launch, of all jobs of a run, or of one job; it may be going on. Each run
writes its page at its end by itself. With --sample_prompt each checkpoint that is kept goes on from that text first,
which takes as long as an export of each.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["DS_ACCELERATOR"] = "cpu"  # nothing here runs on a GPU

from llm_local.config import ConfigError
from llm_local.files import Json, Unwritten, ends_with_a_line
from llm_local.program import command_parser, program
from llm_local.report.library import NoCharts
from llm_local.report.notes import read_samples, sample_record, write_samples
from llm_local.report.page import REPORT, write_report
from llm_local.screen import quiet_libraries

NAME = program(__file__)


def sample_checkpoints(run: Path, prompt: str) -> None:
    """Adds what the models of the run's checkpoints write to its samples. Raises ValueError where there is none, or
    none that writes, or one is damaged; ConfigError and Unwritten."""
    from llm_local.checkpoint.line import committed  # these import the models of transformers
    from llm_local.checkpoint.manifest import BrokenCheckpoint

    quiet_libraries()
    checkpoints = committed(run)
    if not checkpoints:
        raise ValueError(f"{run} has no complete checkpoint to write with; leave out --sample_prompt")
    samples = {each["step"]: each for each in read_samples(run)}
    for checkpoint in checkpoints:
        try:
            sample = _sample(run, checkpoint, prompt)
        except BrokenCheckpoint as error:
            raise ValueError(error) from error
        samples[sample["step"]] = sample
    write_samples(run, samples.values())


def _sample(run: Path, checkpoint: Path, prompt: str) -> Json:
    from llm_local.checkpoint.manifest import read_manifest
    from llm_local.export.sample import sample
    from llm_local.offline_export import export_checkpoint

    manifest = read_manifest(checkpoint)
    config = manifest.config()
    if not config.task.generates:
        raise ValueError(f"{run} was trained with task={config.task.name}, whose models write no text")
    print(f"{NAME}: {checkpoint} writes", file=sys.stderr, flush=True)
    with TemporaryDirectory(prefix="llm_local-sample-") as folder:
        export_checkpoint(checkpoint, Path(folder, "model"), None, "fp32")
        text = sample(Path(folder, "model"), prompt, config.train.seed, config.model.trust_remote_code)
    return sample_record(manifest.step, prompt, text)


@ends_with_a_line(Unwritten, NoCharts)
def main(arguments: list[str]) -> int:
    parser = command_parser(NAME, __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of runs")
    parser.add_argument("--output", type=Path, help=f"page to write; default: {REPORT} of the first run")
    parser.add_argument("--sample_prompt", help="text that each kept checkpoint goes on from, for the page")
    given = parser.parse_args(arguments)
    output = given.output or given.runs[0] / REPORT
    try:
        if given.sample_prompt is not None:
            for run in given.runs:
                sample_checkpoints(run, given.sample_prompt)
        faults = write_report(given.runs, output)
    except ConfigError as error:
        print(f"{NAME}: {'; '.join(error.problems)}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
    for fault in faults:
        print(f"{NAME}: {fault}", file=sys.stderr)
    print(f"report: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
