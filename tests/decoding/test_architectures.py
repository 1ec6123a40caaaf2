"""Every causal architecture of the host is decoded exactly, or refused with a reason."""

import re
from pathlib import Path

import pytest
import sweep
import torch
from architectures import CANNOT_BUILD, MODEL_TYPES, CannotBuild, make_architecture
from image_text import MODEL_TYPES as IMAGE_TEXT_TYPES
from image_text import make_image_text_model


PAGE = Path(__file__).parents[2] / "docs" / "compatibility.md"
# One of each kind, for the default run: convolutions, recurrent states with and without attention, several tokens
# after a state, no cache, positions with an offset, an indexer, an attention that the host cannot batch.
KINDS = ["lfm2", "qwen3_next", "mamba", "mamba2", "falcon_h1", "openai-gpt", "roberta", "glm_moe_dsa", "rwkv", "xlm"]


def documented():
    rows = re.findall(r"^\| ([\w-]+) \| \w+ \| ([^|]+) \| ([^|]+) \|", PAGE.read_text(), flags=re.MULTILINE)
    return {model_type: [single, batch] for model_type, single, batch in rows}


@pytest.mark.parametrize("model_type", KINDS)
def test_one_of_each_kind(model_type):
    findings = sweep.examine(model_type, seeds=(0,), block_sizes=(5,))
    assert [finding.outcome for finding in findings] == documented()[model_type]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_page_is_right(model_type):
    assert [finding.outcome for finding in sweep.examine(model_type)] == documented()[model_type]


def test_the_page_names_every_architecture_and_none_is_wrong():
    page = documented()
    assert sorted(page) == MODEL_TYPES
    singles = [single for single, _ in page.values()]
    assert singles.count(sweep.EXACT) >= 135
    assert {outcome for row in page.values() for outcome in row} <= {
        sweep.EXACT,
        sweep.REFUSED,
        sweep.HOST_FAILS,
        "exact without padding",
        "not tried",
    }
    assert {model_type for model_type, (single, _) in page.items() if single == "not tried"} == set(CANNOT_BUILD)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name not in CANNOT_BUILD])
def test_candidates_are_exact_or_refused(model_type):
    model = make_architecture(model_type)
    for batch_size, is_padded in ((1, False), (3, True)):
        prompts = sweep.make_prompts(batch_size, 12, 0, is_padded)
        options = {"do_sample": False, "max_new_tokens": 30}
        try:
            greedy = model.generate(**prompts, **options)
            model.generate(**prompts, **options, jacobi_block_size=5)
        except Exception:  # in transformers, or refused without candidates too
            continue
        try:
            decoded = model.generate(**prompts, **options, jacobi_block_size=5, jacobi_candidates=2)
        except ValueError as error:
            assert "jacobi_candidates" in str(error)
        else:
            assert decoded.tolist() == greedy.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("model_type", IMAGE_TEXT_TYPES)
def test_text_of_models_that_read_images_is_exact_or_refused(model_type):
    try:
        model = make_image_text_model(model_type)
    except CannotBuild as reason:
        pytest.skip(str(reason))
    for batch_size in (1, 3):
        finding = sweep.compare(model, batch_size, batch_size > 1, seeds=(0,))
        assert finding.outcome != sweep.WRONG, finding.note
