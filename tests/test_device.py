"""
On another device than the CPU: all tensors are where they belong, results are the same, and little is read back.

There is no GPU here; a device made of CPU tensors takes its place (`simulated_device`).
"""

import device_checks
import pytest
from processes import in_new_process
from torch.utils import backend_registration


# What a call of `generate` reads once: prompts, masks, positions, stop tokens, by transformers and by us.
ONCE = 24


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices made in Python",
)
def test_everything_on_another_device(subtests):
    """In one test, since the process takes twenty seconds, and each worker would start its own."""
    results = in_new_process(device_checks.check_everything, ["llama"])
    assert len(results) == 2 * (len(device_checks.DECODING) + 1) + 4 + len(device_checks.OBJECTIVES)
    for case, found in results.items():
        with subtests.test(case=case):
            check(case, found)


def check(case, found):
    """Results are those of the CPU, and the host waits for the device as seldom as it can."""
    num_reads = sum(found["reads"].values())
    if case.startswith("training"):
        assert len(found["ours"]) > 5
        assert found["ours"] == pytest.approx(found["expected"], rel=1e-3)
        assert 0 < sum(found["reads_of_many"].values()) <= num_reads + 1
        return
    assert found["ours"] == found["expected"]
    if case == "responses":
        assert num_reads < found["num_tokens"] / 2
    elif case.endswith("processors"):
        assert num_reads > 2 * found["num_tokens"]  # so the count of the others means something
    elif "num_forwards" in found:
        # Once an iteration, and once more where the adapter has drafted. What transformers reads of a mask of padding
        # is left out.
        num_reads = sum(count for name, count in found["reads"].items() if "_local_scalar_dense" not in name)
        per_iteration = 2 if "lossless" in case else 1
        assert found["num_forwards"] <= num_reads <= per_iteration * found["num_forwards"] + ONCE
