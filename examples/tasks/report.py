"""The step `evaluate`: target model and CLLM on the same test problems, as JSON, Markdown and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import find_adapter_config_file

from cllm_hf.cards import code, plain
from cllm_hf.cards import table as markdown_table
from cllm_hf.evaluation.judgements import Judgement
from cllm_hf.files import write_whole
from cllm_hf.loading import load_cllm, load_tokenizer
from cllm_hf.trajectories.prompts import read_rows

from .cllm import choose, load_for_decoding
from .options import Options
from .task import Problem


def evaluate_models(
    options: Options,
    target: str,
    cllm: str,
    draft: str | None,
    problems: Sequence[Problem],
    show_bar: bool = True,
    say: Callable[[str], None] | None = None,
    keep_in: Path | None = None,
) -> dict[str, Any]:
    """
    Decode test problems by both models in every way, and judge the answers.

    Args:
        options (`Options`): of the pipeline.
        target (`str`): folder or Hub id of the target model.
        cllm (`str`): folder of the CLLM, a model or an adapter, or of a lossless adapter.
        draft (`str`, *optional*): folder or Hub id of the draft model.
        problems (`Sequence[Problem]`): test problems.
        show_bar (`bool`): whether to draw progress bars.
        say (`Callable[[str], None]`, *optional*): gets each row of the table when it is done, and how far it is.
        keep_in (`pathlib.Path`, *optional*): folder in which finished parts are kept.

    Returns:
        `dict[str, Any]`: what `compare_models` says, ready for JSON.
    """
    from cllm_hf.evaluation.model_comparison import compare_models
    from cllm_hf.evaluation.model_report import format_model_row

    section, task = options.evaluate, options.task
    tokenizer = load_tokenizer(target)
    order = choose(problems, None, options.seed)
    last = None if section.more_prompts is None or not task.has_metric else section.num_prompts + section.more_prompts
    chosen = [problems[index] for index in order[:last]]
    rows = read_rows([problem.prompt for problem in chosen], None, tokenizer)
    prompts = [row.prompt_ids for row in rows]

    def judge(responses: list[list[int]]) -> list[Judgement]:
        texts = [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in responses]
        judgements = task.judge(texts, chosen[: len(texts)])
        if judgements is None or len(judgements) != len(texts):
            got = "none" if judgements is None else len(judgements)
            raise ValueError(f"{type(task).__name__}.judge must give {len(texts)} judgements, got {got}.")
        return judgements

    def tell(row: dict[str, Any]) -> None:
        if say is not None:
            say(format_model_row(row, len(prompts[: section.num_prompts])))

    target_model = load_for_decoding(options, target, section.dtype, section.device)
    return compare_models(
        target_model,
        _load_trained(options, target, cllm),
        prompts[: section.num_prompts],
        block_size=options.block_size,
        max_new_tokens=section.max_new_tokens or options.max_new_tokens,
        more_block_sizes=section.more_block_sizes,
        candidates=section.candidates,
        judge=judge if task.has_metric else None,
        more_prompts=prompts[section.num_prompts :] if task.has_metric else (),
        assistant=None if draft is None else load_for_decoding(options, draft, section.dtype, section.device),
        is_compiled=section.is_compiled,
        batch_size=section.batch_size,
        repeats=section.repeats,
        pad_token_id=tokenizer.pad_token_id or 0,
        show_progress=show_bar,
        say=say,
        on_result=tell,
        keep_in=keep_in,
    )


def write_report(folder: Path, title: str, comparison: dict[str, Any], facts: Mapping[str, Any]) -> str:
    """
    Write `report.json`, `report.md` and `report.png`.

    Args:
        folder (`pathlib.Path`): where to.
        title (`str`): of the report.
        comparison (`dict[str, Any]`): from `compare_models`.
        facts (`Mapping[str, Any]`): how the models were made: `options` by name and `seconds` by step.

    Returns:
        `str`: the report as Markdown.
    """
    from cllm_hf.evaluation.model_report import format_models, plot_models

    table = format_models(comparison)
    lines = [f"# {plain(title)}", "", table.strip(), "", "## How it was made", ""]
    seconds = ", ".join(f"`{step}` {value:.0f} s" for step, value in facts["seconds"].items())
    rows = [(code(name), code(json.dumps(value))) for name, value in facts["options"].items()]
    lines += [f"Time of the steps: {seconds}.", "", markdown_table(("option", "value"), rows)]
    text = "\n".join(lines) + "\n"
    write_whole(
        folder / "report.json", json.dumps({"title": title, **facts, "comparison": comparison}, indent=2) + "\n"
    )
    plot_models(comparison, folder / "report.png")
    write_whole(folder / "report.md", text)
    return table


def _load_trained(options: Options, target: str, cllm: str) -> Any:
    section = options.evaluate
    if find_adapter_config_file(cllm) is None:
        return load_for_decoding(options, cllm, section.dtype, section.device)
    base = load_for_decoding(options, target, section.dtype, section.device)
    base.name_or_path = target  # as the adapter names it
    return load_cllm(cllm, base_model=base)
