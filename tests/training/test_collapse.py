"""Signs of collapse: what is one and what is not; runs on bad data warn and end cleanly, and can be stopped."""

import logging
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from watched_runs import BLOCK_SIZE, good_responses, make_dataset, make_trainer

import cllm_hf
from cllm_hf import CollapseCallback
from cllm_hf.training.callbacks import CollapseDetector, find_bad_data


def kinds(signs):
    return [sign.kind for sign in signs]


def follow(detector, entries):
    return [kinds(detector.update(entry)) for entry in entries]


def decoded(agreement=1.0, repetition=0.1, target_repetition=0.1, tokens=20.0, target_tokens=20.0, prefix="eval"):
    values = {
        "agreement": agreement,
        "repetition": repetition,
        "target_repetition": target_repetition,
        "response_tokens": tokens,
        "target_response_tokens": target_tokens,
        "tokens_per_forward": 2.0,
    }
    return {f"{prefix}_{name}": value for name, value in values.items()}


def test_a_good_run_shows_no_sign():
    detector = CollapseDetector()
    losses = [0.3, 0.9, 0.7, 0.5, 0.4, 0.35, 0.6, 0.3]
    assert not any(follow(detector, [{"loss": 4.0, "ar_loss": loss, "ar_tokens": 90} for loss in losses]))
    assert not any(follow(detector, [decoded(a) for a in (1.0, 0.8, 0.85, 0.9)]))
    assert not any(follow(CollapseDetector(), [{"ar_loss": loss} for loss in (9.0, 7.0, 8.0, 12.0, 6.0)]))
    assert not any(follow(CollapseDetector(), [{"learning_rate": math.nan, "grad_norm": math.inf, "note": "nan"}]))
    assert not any(follow(CollapseDetector(), [{}, {"eval_loss": 3.0}, {"step": 3}]))


def test_ar_loss_far_above_its_lowest():
    detector = CollapseDetector()
    assert not any(follow(detector, [{"ar_loss": loss} for loss in (0.5, 0.4, 0.5)]))
    # One bad batch is none; two of the last three are.
    assert follow(detector, [{"ar_loss": 5.0}, {"ar_loss": 5.0}]) == [[], ["ar_loss"]]
    detector = CollapseDetector()
    seen = [detector.update({"ar_loss": loss}) for loss in (0.5, 3.0, 3.0, 3.0, 3.0, 0.5, 0.5, 3.0, 3.0)]
    assert [[(sign.is_new, sign.is_lasting) for sign in signs] for signs in seen] == [
        [],
        [(True, False)],
        [(False, False)],
        [(False, True)],
        [(False, True)],
        [(False, True)],
        [],
        [],
        [(True, False)],
    ]
    message = seen[2][0].message
    assert "`ar_loss` has risen to 3, from 0.5" in message and "learning_rate" in message


def test_a_mean_over_no_tokens_is_no_lowest_value():
    detector = CollapseDetector()
    entries = [{"ar_loss": 0.0, "ar_tokens": 0}] + [{"ar_loss": 1.4, "ar_tokens": 50}] * 4
    assert not any(follow(detector, entries))


def test_the_loss_of_a_model_that_knows_little_may_rise_by_more():
    low, high = CollapseDetector(), CollapseDetector()
    assert any(follow(low, [{"ar_loss": loss} for loss in [0.5] * 3 + [1.8] * 3]))
    assert not any(follow(high, [{"ar_loss": loss} for loss in [4.0] * 3 + [5.3] * 3]))


def test_agreement_against_its_highest_value():
    assert follow(CollapseDetector(), [decoded(0.9), decoded(0.64), decoded(0.62)]) == [[], [], ["agreement"]]
    # A model that starts elsewhere agrees on little, and that is no collapse.
    assert not any(follow(CollapseDetector(), [decoded(0.1), decoded(0.2), decoded(0.18)]))


def test_repetition_against_that_of_the_data():
    assert follow(CollapseDetector(), [decoded(repetition=0.45), decoded(repetition=0.39)]) == [["repetition"], []]
    # Data that repeats itself by nature, such as tables.
    assert not any(follow(CollapseDetector(), [decoded(repetition=0.85, target_repetition=0.7)] * 3))


def test_responses_that_became_short():
    assert follow(CollapseDetector(), [decoded(tokens=6.0), decoded(tokens=1.0)]) == [[], ["response_tokens"]]
    assert not any(follow(CollapseDetector(), [decoded(tokens=1.0, target_tokens=1.0)]))


def test_a_loss_that_is_no_number():
    for name, value in (("loss", math.nan), ("consistency_loss", math.inf), ("eval_a_ar_loss", math.nan)):
        (sign,) = CollapseDetector().update({name: value, "step": 1})
        assert sign.kind == "not_finite" and sign.is_lasting and f"`{name}` is {value}" in sign.message


def test_evaluation_shows_what_lasts_when_it_shows_it_twice():
    detector = CollapseDetector()
    bad, good = decoded(repetition=0.9), decoded()
    seen = [detector.update(entry) for entry in (bad, bad, bad, good, bad)]
    assert [[(sign.is_new, sign.is_lasting) for sign in signs] for signs in seen] == [
        [(True, False)],
        [(False, True)],
        [(False, True)],
        [],
        [(True, False)],
    ]


def test_evaluation_datasets_are_followed_apart():
    detector = CollapseDetector()
    entries = [decoded(0.9, prefix="eval_a"), decoded(0.3, prefix="eval_b"), decoded(0.3, prefix="eval_a")]
    assert follow(detector, entries) == [[], [], ["agreement"]]
    assert "`eval_a_agreement` is 30.0%" in detector.update(entries[-1])[0].message


@pytest.mark.parametrize(
    "limits", [{"ar_loss_rise": 0}, {"agreement_drop": 1.5}, {"repetition_rise": -1}, {"response_share": math.nan}]
)
def test_limits_that_are_refused(limits):
    with pytest.raises(ValueError, match=f"`{next(iter(limits))}`"):
        CollapseDetector(**limits)
    with pytest.raises(ValueError, match=f"`{next(iter(limits))}`"):
        CollapseCallback(**limits)


def test_actions_that_are_refused():
    with pytest.raises(ValueError, match="`on_collapse`.*ignore"):
        CollapseCallback("ignore")


BAD_DATA = {
    "data_repetition": dict(responses=[[7] * 20, [8, 9] * 9] * 4),
    "data_one_token": dict(responses=[[7], [9]] * 4),
    "data_padding": dict(responses=good_responses(8), draft=[0] * BLOCK_SIZE),
    "data_no_positions": dict(responses=good_responses(8), settled=True),
}


def test_bad_data_is_found_and_good_data_is_not():
    for kind, made in BAD_DATA.items():
        signs = find_bad_data(make_dataset(**made), pad_id=0)
        assert kind in kinds(signs), kind
        if kind != "data_one_token":  # which has no positions either
            assert kinds(signs) == [kind]
    assert find_bad_data(make_dataset(good_responses()), pad_id=0) == []
    assert find_bad_data([], pad_id=0) == []
    # A stop token more is a response of one token still, and without states the responses are all there is.
    assert kinds(find_bad_data(make_dataset([[7, 1]] * 4), 0, [1])) == ["data_one_token"]
    assert find_bad_data(make_dataset(good_responses(), settled=True), 0, has_states=False) == []


def test_augmented_states_are_something_to_learn_from():
    rows = [dict(row) for row in make_dataset(good_responses(4), settled=True)]
    for row in rows:
        row["augmented_states"] = [[[9] * BLOCK_SIZE] for _ in row["states"]]
    assert find_bad_data(rows, pad_id=0) == []


def train(model, tokenizer, folder, dataset, **options):
    trainer = make_trainer(
        model,
        dataset,
        tokenizer,
        folder,
        dataset,
        eval_strategy="steps",
        eval_steps=options.pop("eval_steps", 4),
        **options,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", BAD_DATA)
def test_a_run_on_bad_data_warns_and_ends_cleanly(word_model, tokenizer, tmp_path, caplog, kind):
    with caplog.at_level(logging.WARNING):
        trainer = train(
            word_model, tokenizer, tmp_path, make_dataset(**BAD_DATA[kind]), max_steps=4, learning_rate=5e-3
        )
    assert trainer.state.global_step == 4
    (message,) = [sign.message for sign in find_bad_data(make_dataset(**BAD_DATA[kind]), 0) if sign.kind == kind]
    assert caplog.text.count(message) == 1
    for log in trainer.state.log_history:
        assert all(math.isfinite(value) for value in log.values()), log
    assert all(parameter.isfinite().all() for parameter in word_model.parameters())
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    output = loaded.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=6, return_dict_in_generate=True)
    assert isinstance(output, cllm_hf.JacobiOutput)


def test_good_data_gets_no_warning(word_model, tokenizer, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(word_model, tokenizer, tmp_path, make_dataset(good_responses()), learning_rate=1e-5)
    assert [record for record in caplog.records if record.name.startswith("cllm_hf")] == []


def test_online_states_need_none_in_the_data(word_model, tokenizer, tmp_path, caplog):
    dataset = make_dataset(good_responses(6)).remove_columns("states")
    options = {"trajectory_source": "online", "block_size": BLOCK_SIZE, "max_steps": 2, "learning_rate": 1e-5}
    with caplog.at_level(logging.WARNING):
        trainer = train(word_model, tokenizer, tmp_path, dataset, eval_steps=2, **options)
    assert [record for record in caplog.records if record.name.startswith("cllm_hf")] == []
    measured = next(log for log in trainer.state.log_history if "eval_loss" in log)
    assert measured["eval_tokens_per_forward"] >= 0.5 and measured["eval_agreement"] >= 0


def destroy(word_model, tokenizer, folder, **options):
    """A learning rate at which nothing of the model is left after a few optimizer steps."""
    return train(
        word_model, tokenizer, folder, make_dataset(good_responses()), learning_rate=1.0, max_steps=9, **options
    )


def test_a_collapsing_run_warns_once_and_goes_on(word_model, tokenizer, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = destroy(word_model, tokenizer, tmp_path)
    assert trainer.state.global_step == 9
    assert caplog.text.count("`ar_loss` has risen to") == 1


def test_a_collapsing_run_is_stopped_and_saved(word_model, tokenizer, tmp_path):
    trainer = destroy(word_model, tokenizer, tmp_path, on_collapse="stop")
    steps = trainer.state.global_step
    assert 1 < steps < 9
    assert trainer.state.log_history[-1]["train_loss"] > 0  # the host's last words
    trainer.save_model()
    trainer.save_state()
    assert f'"global_step": {steps}' in (tmp_path / "trainer_state.json").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path)


class Poison(TrainerCallback):
    """Makes a weight no number after an optimizer step."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                next(model.parameters())[:] = math.nan


def test_a_run_whose_weights_are_lost_is_stopped_at_once(word_model, tokenizer, tmp_path, caplog):
    dataset = make_dataset(good_responses())
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(
            word_model, dataset, tokenizer, tmp_path, callbacks=[Poison()], max_steps=9, on_collapse="stop"
        )
        trainer.train()
    assert trainer.state.global_step == 3 and "is nan: the weights are lost" in caplog.text


def test_callbacks_of_a_trainer(word_model, tokenizer, tmp_path):
    dataset = make_dataset(good_responses(4))

    def found(**options):
        trainer = make_trainer(word_model, dataset, tokenizer, tmp_path, **options)
        return [one for one in trainer.callback_handler.callbacks if isinstance(one, CollapseCallback)]

    assert found(on_collapse="ignore") == []
    assert [one.on_collapse for one in found()] == ["warn"]
    assert [one.on_collapse for one in found(on_collapse="stop")] == ["stop"]
    own = CollapseCallback("stop", agreement_drop=0.9)
    assert found(callbacks=[own]) == [own]


def test_a_resumed_run_knows_what_came_before(word_model, tokenizer, tmp_path):
    dataset = make_dataset(good_responses())
    options = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-5}
    first = make_trainer(word_model, dataset, tokenizer, tmp_path, max_steps=2, **options)
    first.train()
    trainer = make_trainer(word_model, dataset, tokenizer, tmp_path, max_steps=3, **options)
    callback = next(one for one in trainer.callback_handler.callbacks if isinstance(one, CollapseCallback))
    lowest = []
    callback.on_step_begin = lambda *_, **__: lowest.append(callback._detector._lowest)
    trainer.train(resume_from_checkpoint=True)
    logged = [log["ar_loss"] for log in first.state.log_history if "ar_loss" in log]
    assert lowest == [min(logged[0], sum(logged) / 2)]


def test_only_the_main_process_warns_and_all_stop(caplog):
    from transformers import TrainerControl, TrainerState

    for is_main in (True, False):
        caplog.clear()
        callback, control = CollapseCallback("stop"), TrainerControl()
        state = TrainerState(is_world_process_zero=is_main)
        callback.on_log(None, state, control, {"loss": math.nan})
        assert control.should_training_stop and bool(caplog.records) is is_main
