"""Writes text with an exported model, and measures what one of its exits saves as the draft of the whole.

llm-local generate --export runs/quickstart/export --prompt "import " [--assistant stage-00]

With --assistant the text is written twice, without and with it: greedy text must be the same, and the exit status is 1
if it is not.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from llm_local.export.reading import add_arguments, find_device, find_exit, load, loading, model_class, read_tokenizer
from llm_local.program import COMMAND, command_parser, program

NAME = program(__file__)

WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Written:
    """The token ids that follow each prompt, the seconds of all together, and what became of the drafts' tokens."""

    texts: list[list[int]]
    seconds: float
    proposed: int = 0
    accepted: int = 0

    def speed(self) -> str:
        tokens = sum(map(len, self.texts))
        return f"{tokens} tokens in {self.seconds:.2f} s, {self.rate:,.1f} tokens/s"

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return sum(map(len, self.texts)) / self.seconds


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser(NAME, __doc__)
    parser.add_argument("--export", type=Path, required=True, help="folder of the model: OUTPUT/export of a run")
    parser.add_argument("--prompt", action="append", required=True, help="text to go on from; may be given again")
    parser.add_argument("--assistant", help="draft model: an exit's name under EXPORT/exits, or a folder")
    parser.add_argument(
        "--num_assistant_tokens", type=int, help="draft so many tokens a round; default: as transformers"
    )
    parser.add_argument("--max_new_tokens", type=int, default=64, help="tokens to write after each prompt (64)")
    parser.add_argument("--do_sample", action="store_true", help="sample; default: the likeliest token each time")
    parser.add_argument("--temperature", type=float, help="of sampling (1.0)")
    parser.add_argument("--top_k", type=int, help="sample among the k likeliest tokens (50); 0: among all")
    parser.add_argument("--seed", type=int, help="of sampling (42)")
    add_arguments(parser)
    return parser.parse_args(arguments)


def check(given: argparse.Namespace) -> None:
    """Raises ValueError for flags that contradict each other or have a value out of range."""
    if any(not prompt for prompt in given.prompt):
        raise ValueError("--prompt is empty; give it some text to go on from")
    sampling = {name: getattr(given, name) for name in ("temperature", "top_k", "seed")}
    for name, value in sampling.items():
        if value is not None and not given.do_sample:
            raise ValueError(f"--{name} {value} is for sampling; add --do_sample")
    if given.num_assistant_tokens is not None and given.assistant is None:
        raise ValueError(f"--num_assistant_tokens {given.num_assistant_tokens} needs --assistant")
    for name, least in (("max_new_tokens", 1), ("num_assistant_tokens", 1), ("top_k", 0)):
        value = getattr(given, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value} is less than {least}")
    if given.temperature is not None and not given.temperature > 0:
        raise ValueError(
            f"--temperature {given.temperature} is not above 0; for the likeliest text leave --do_sample out"
        )


def encode(tokenizer: Any, prompt: str, model: Any, max_new_tokens: int) -> torch.Tensor:
    """(1, T) ids, begun with BOS where the tokenizer begins a text so, as in training.

    Raises ValueError if the text to write has no place.
    """
    plain, whole = (tokenizer(prompt, add_special_tokens=special)["input_ids"] for special in (False, True))
    first = whole[:1] if whole[:1] == [tokenizer.bos_token_id] != plain[:1] else []
    ids = torch.tensor([[*first, *plain]], device=model.device)
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    wanted = ids.shape[1] + max_new_tokens
    if positions is not None and wanted > positions:
        raise ValueError(
            f"a prompt of {ids.shape[1]} tokens and --max_new_tokens {max_new_tokens} need {wanted} positions, "
            f"the model has {positions}; shorten one of them"
        )
    return ids


def check_export(folder: Path) -> None:
    """Raises ValueError if there is none, or its model writes no text."""
    name, task = model_class(folder)
    if task is not None and not task.generates:
        raise ValueError(f"--export {folder} is a {name}, which writes no text; use {COMMAND} predict")


@contextmanager
def passes_of(model: Any) -> Iterator[list[torch.Tensor]]:
    """Collects the ids (1, N) that each forward pass of the model reads."""
    passes: list[torch.Tensor] = []

    def hook(_model: Any, _args: tuple, kwargs: dict[str, Any]) -> None:
        passes.append(kwargs["input_ids"])  # kept where it is: a copy to the host would wait for the device

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def count_drafts(num_prompt_tokens: int, passes: list[list[int]], text: list[int]) -> tuple[int, int]:
    """(tokens that the assistant proposed, those of them that were accepted).

    Each pass of the model reads a draft behind what stands: the prompt, later the last token. What it accepts is the
    part up to the first token that the text has otherwise; then it adds one of its own. That holds for sampling, too:
    a token that is rejected has no probability of being drawn in its place.
    """
    proposed = accepted = written = 0
    for number, read in enumerate(passes):
        draft = read[num_prompt_tokens:] if number == 0 else read[1:]
        pairs = zip(draft, text[written:], strict=False)  # one past the end if the text ends on a drafted EOS
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        proposed, accepted, written = proposed + len(draft), accepted + same, written + same + 1
    assert written - len(text) in (0, 1), f"{len(text)} tokens, of which the passes explain {written}"
    return proposed, accepted


def write(
    model: Any, prompts: list[torch.Tensor], seed: int | None, assistant: Any, options: dict[str, Any]
) -> Written:
    """Goes on from each prompt (1, T) by itself; transformers drafts for one text at a time."""
    if seed is not None:
        torch.manual_seed(seed)
    texts, seconds, proposed, accepted = [], 0.0, 0, 0
    for ids in prompts:
        with passes_of(model) as passes:
            start = time.perf_counter()
            output = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), assistant_model=assistant, **options
            )
            texts.append(output[0, ids.shape[1] :].tolist())
            seconds += time.perf_counter() - start
        if assistant is not None:
            some, good = count_drafts(ids.shape[1], [read[0].tolist() for read in passes], texts[-1])
            proposed, accepted = proposed + some, accepted + good
    return Written(texts, seconds, proposed, accepted)


def load_assistant(given: argparse.Namespace, model: Any) -> Any:
    """The draft model. Raises ValueError if there is none of that name or its tokens are others."""
    folder = find_exit(given.export, "--assistant", given.assistant)
    assistant = load(folder, AutoModelForCausalLM, model.device, **loading(given))
    ours, theirs = (m.config.get_text_config(decoder=True).vocab_size for m in (model, assistant))
    if ours != theirs:
        raise ValueError(f"--assistant {folder} has a vocabulary of {theirs}, the export one of {ours}")
    if given.num_assistant_tokens is not None:
        settings = assistant.generation_config
        settings.num_assistant_tokens = given.num_assistant_tokens
        settings.num_assistant_tokens_schedule = "constant"
        settings.assistant_confidence_threshold = 0.0  # else a draft ends early where the assistant is not sure
    return assistant


@torch.no_grad()
def first_difference(model: Any, ids: torch.Tensor, plain: list[int], assisted: list[int]) -> str:
    """Where two greedy texts part, and whether rounding can be the reason."""
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(plain, assisted, strict=False)))
    before = torch.cat([ids, ids.new_tensor([plain[:same]], dtype=ids.dtype)], dim=1)
    best = model(input_ids=before, use_cache=False).logits[0, -1].float().topk(2).values
    gap = float(best[0] - best[1])
    return f"from token {same + 1} on, where the two best logits, {float(best[0]):.6g}, are {gap:.2g} apart"


def compare(given: argparse.Namespace, model: Any, prompts: list[torch.Tensor], plain: Written, helped: Written) -> int:
    """Says what the assistant brought. Returns 1 if greedy text is not the same with it, else 0."""
    print(f"without assistant: {plain.speed()}")
    print(f"with {given.assistant}: {helped.speed()}, {helped.rate / plain.rate:.2f} times as fast")
    if helped.proposed:
        share = helped.accepted / helped.proposed
        print(f"drafted tokens: {helped.accepted} accepted / {helped.proposed} proposed, acceptance rate {share:.4f}")
    else:
        print("drafted tokens: none was proposed; raise --max_new_tokens")
    if given.do_sample:
        print("sampled text may differ with and without the assistant: both are draws of the same distribution")
        return 0
    pairs = list(zip(prompts, plain.texts, helped.texts, strict=True))
    others = [number for number, (_, one, two) in enumerate(pairs) if one != two]
    if not others:
        print("greedy text: the same with and without the assistant")
    for number in others:
        where = first_difference(model, *pairs[number])
        print(f"greedy text: NOT the same with the assistant after prompt {number + 1}, {where}")
    return 1 if others else 0


def generate(given: argparse.Namespace) -> int:
    """Loads, writes and says how fast. Raises ValueError for what cannot be done; returns the exit status."""
    check(given)
    check_export(given.export)
    device = find_device(given.device)
    if given.assistant is not None:
        find_exit(given.export, "--assistant", given.assistant)  # before seconds go into loading the export
    tokenizer = read_tokenizer(given.export, given.trust_remote_code)
    model = load(given.export, AutoModelForCausalLM, device, **loading(given))
    prompts = [encode(tokenizer, prompt, model, given.max_new_tokens) for prompt in given.prompt]
    assistant = None if given.assistant is None else load_assistant(given, model)
    options: dict[str, Any] = {"do_sample": given.do_sample, "pad_token_id": tokenizer.eos_token_id}
    seed = None
    if given.do_sample:
        options["temperature"] = 1.0 if given.temperature is None else given.temperature
        options["top_k"] = 50 if given.top_k is None else given.top_k
        seed = 42 if given.seed is None else given.seed
    for helper in (None, assistant):  # the first call pays for what is loaded and compiled late
        write(model, prompts[:1], seed, helper, options | {"max_new_tokens": min(WARM_UP_TOKENS, given.max_new_tokens)})
    options["max_new_tokens"] = given.max_new_tokens
    plain = write(model, prompts, seed, None, options)
    helped = plain if assistant is None else write(model, prompts, seed, assistant, options)
    for ids, text in zip(prompts, helped.texts, strict=True):
        print(tokenizer.decode([*ids[0].tolist(), *text], skip_special_tokens=True), end="\n\n")
    if assistant is None:
        print(plain.speed())
        return 0
    return compare(given, model, prompts, plain, helped)


def main(arguments: list[str]) -> int:
    given = parse(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        return generate(given)
    except ValueError as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return 2
