"""Speed of decoding from numbers of single prompts."""

import evaluate
import pytest
from metrics.gsm8k_accuracy.gsm8k_accuracy import GSM8KAccuracy

import cllm_hf
from cllm_hf.evaluation.metrics import measure_speed


def test_speeds_are_medians_and_forwards_are_summed():
    speed = measure_speed([10, 20, 90], [1.0, 1.0, 1.0], [10, 10, 20], [2.0, 3.0, 1.0])
    assert speed == {"tokens_per_second": 20.0, "tokens_per_forward": 3.0, "speedup": 2.0}
    assert measure_speed([10], [2.0], [5])["speedup"] is None


def test_a_baseline_may_have_generated_other_numbers_of_tokens():
    assert measure_speed([10], [1.0], [5], [1.0], baseline_tokens=[5])["speedup"] == 2.0


def test_prompts_without_tokens_do_not_count_in_medians():
    speed = measure_speed([10, 0], [1.0, 1.0], [4, 1], [2.0, 1.0])
    assert speed == {"tokens_per_second": 10.0, "tokens_per_forward": 2.0, "speedup": 2.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], [1.0, 1.0], [1]), "one number of each kind for each prompt"),
        (([1], [0.0], [1]), "`seconds` must be above 0 for each prompt, got 0.0"),
        (([1], [1.0], [0]), "`forwards` must be above 0"),
        (([-1], [1.0], [1]), "`tokens` must be at least 0 for each prompt, got -1"),
        (([1], [float("nan")], [1]), "`seconds` must be above 0"),
        (([1], [1.0], [1], [0.0]), "`baseline_seconds` must be above 0"),
        (([0], [1.0], [1]), "at least one prompt for which tokens"),
        (([], [], []), "at least one prompt for which tokens"),
    ],
)
def test_other_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        measure_speed(*arguments)


def test_metric_takes_batches_and_a_baseline():
    metric = cllm_hf.DecodingSpeed()
    metric.add_batch(tokens=[64, 60], seconds=[0.5, 0.5], forwards=[16, 15])
    result = metric.compute(baseline_seconds=[1.0, 1.5])
    assert result == {"tokens_per_second": 124.0, "tokens_per_forward": 4.0, "speedup": 2.5}
    assert metric.compute(tokens=[8], seconds=[2.0], forwards=[4])["tokens_per_second"] == 4.0


def test_metrics_combine_and_keep_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    both = evaluate.combine([GSM8KAccuracy(cache_dir=str(tmp_path)), evaluate_exact(tmp_path)])
    result = both.compute(predictions=["#### 1", "#### 2"], references=["#### 1", "#### 3"])
    assert result["GSM8KAccuracy_accuracy"] == 0.5 and result["Exact_accuracy"] == 0.5
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def evaluate_exact(folder):
    class Exact(GSM8KAccuracy):
        """Another metric with the same inputs."""

        def _compute(self, predictions, references):
            return {"accuracy": sum(p == r for p, r in zip(predictions, references)) / len(predictions)}

    return Exact(cache_dir=str(folder))
