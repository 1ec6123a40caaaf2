"""
On another device than the CPU: all tensors are where they belong, results are the same, and little is read back.

There is no GPU here; a device made of CPU tensors takes its place (`simulated_device`).
"""

import device_checks
import pytest
from processes import in_new_process
from torch.utils import backend_registration


pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices made in Python",
)
_DECODED = [*device_checks.DECODING, "samples"]
_CASES = [f"llama, {decoding}, {case}" for decoding in ("jacobi", "lossless") for case in _DECODED]
_TRAINING = [f"training, {case}" for case in device_checks.OBJECTIVES]
# What a call of `generate` reads once: prompts, masks, positions, stop tokens, by transformers and by us.
_ONCE = 24


@pytest.fixture(scope="module")
def results():
    return in_new_process(device_checks.check_everything, ["llama"])


@pytest.mark.parametrize("case", [*_CASES, "responses", "trajectories", "monitoring", "parting"])
def test_results_are_those_of_the_cpu(results, case):
    assert results[case]["ours"] == results[case]["expected"]


@pytest.mark.parametrize("case", _TRAINING)
def test_losses_and_gradients_are_those_of_the_cpu(results, case):
    assert len(results[case]["ours"]) > 5
    assert results[case]["ours"] == pytest.approx(results[case]["expected"], rel=1e-3)


@pytest.mark.parametrize("case", [case for case in _CASES if "processors" not in case and "samples" not in case])
def test_decoding_reads_back_once_an_iteration(results, case):
    """And once more where the adapter has drafted. What transformers reads of a mask of padding is left out."""
    found = results[case]
    reads = sum(count for name, count in found["reads"].items() if "_local_scalar_dense" not in name)
    per_iteration = 2 if "lossless" in case else 1
    assert found["num_forwards"] <= reads <= per_iteration * found["num_forwards"] + _ONCE


@pytest.mark.parametrize("decoding", ["jacobi", "lossless"])
def test_other_processors_read_back_for_each_token(results, decoding):
    """So the count of the others means something."""
    found = results[f"llama, {decoding}, processors"]
    assert sum(found["reads"].values()) > 2 * found["num_tokens"]


def test_collecting_reads_back_once_a_token_of_all_rows(results):
    found = results["responses"]
    assert sum(found["reads"].values()) < found["num_tokens"] / 2


@pytest.mark.parametrize("case", _TRAINING)
def test_training_reads_back_no_more_for_more_records(results, case):
    found = results[case]
    assert 0 < sum(found["reads_of_many"].values()) <= sum(found["reads"].values()) + 1
