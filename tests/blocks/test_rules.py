"""The functions over blocks, against references that walk token by token."""

import pytest
import torch

from cllm_hf.blocks.rules import (
    accepted_path,
    count_accepted,
    count_accepted_in_blocks,
    count_leading,
    count_until_stop,
    next_draft,
    next_drafts,
)


def random_ids(*shape, high=3, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def test_count_accepted_counts_leading_matches():
    draft, predicted = random_ids(500, 5, high=2, seed=1), random_ids(500, 6, high=2, seed=2)
    expected = []
    for guess, said in zip(draft.tolist(), predicted.tolist()):
        count = 0
        while count < 5 and guess[count] == said[count]:
            count += 1
        expected.append(count)
        assert count_accepted(guess, said) == count
    assert set(expected) == set(range(6))


def test_count_accepted_of_an_empty_draft_is_zero():
    assert count_accepted([], [5]) == 0


def test_count_accepted_refuses_other_lengths():
    with pytest.raises(ValueError, match="`predicted`"):
        count_accepted([1, 2], [1, 2])


def test_count_until_stop_counts_the_stop_token_too():
    for row in random_ids(200, 4, high=6).tolist():
        count = 1
        while count <= 4 and row[count - 1] not in (1, 4):
            count += 1
        assert count_until_stop(row, {1, 4}) == count
    assert count_until_stop([1, 4], ()) == 3


def test_next_draft_is_the_rest_of_the_prediction_and_then_filler():
    assert next_draft([], [7, 8, 9]) == [7, 8, 9]
    assert next_draft([1, 2], [7, 8, 9]) == [1, 2, 7]
    assert next_draft([1, 2, 3, 4], [7, 8, 9]) == [1, 2, 3]
    assert next_draft([1], []) == []


def test_tensor_forms_equal_list_forms():
    drafts, predicted = random_ids(40, 3, 5, high=2, seed=1), random_ids(40, 3, 6, high=2, seed=2)
    fillers = random_ids(40, 3, 4, high=9, seed=3)
    accepted = count_accepted_in_blocks(drafts, predicted)
    slid = next_drafts(predicted, accepted + 1, fillers)
    for row in range(40):
        for block in range(3):
            said = predicted[row, block].tolist()
            count = count_accepted(drafts[row, block].tolist(), said)
            assert accepted[row, block] == count
            assert slid[row, block].tolist() == next_draft(said[count + 1 :], fillers[row, block].tolist())


def test_what_stands_after_a_wrong_token_does_not_count():
    is_right = torch.tensor([[True, True, True], [True, False, True], [False, True, True], [True, True, False]])
    assert count_leading(is_right).tolist() == [3, 1, 0, 2]
    assert count_leading(is_right[:0]).tolist() == [] and count_leading(is_right[:, :0]).tolist() == [0] * 4


def test_fewer_predictions_than_draft_tokens_are_refused():
    with pytest.raises(ValueError, match="`predicted`"):
        count_accepted_in_blocks(random_ids(2, 5), random_ids(2, 4))


def follow_slowly(token_ids, parents, predicted, is_drafter):
    """All paths from the anchor whose every token the model predicts, by trying each; the longest."""
    paths = [[0]]
    for path in paths:
        for place, parent in enumerate(parents):
            if parent == path[-1] and predicted[parent] == token_ids[place] and not is_drafter[place]:
                paths.append([*path, place])
    return max(paths, key=len)


def test_the_accepted_path_is_the_longest_that_the_model_confirms():
    generator = torch.Generator().manual_seed(0)
    lengths = set()
    for _ in range(300):
        parents, token_ids = [-1], [9]
        while len(parents) < 12:
            parent, token = (int(torch.randint(high, (), generator=generator)) for high in (len(parents), 3))
            siblings = {token_ids[place] for place, other in enumerate(parents) if other == parent}
            if token not in siblings:
                parents.append(parent)
                token_ids.append(token)
        predicted = torch.randint(3, (12,), generator=generator).tolist()
        is_drafter = [False, *(torch.rand(11, generator=generator) < 0.1).tolist()]
        path = accepted_path(token_ids, parents, predicted, is_drafter)
        assert path == follow_slowly(token_ids, parents, predicted, is_drafter)
        lengths.add(len(path))
    assert len(lengths) > 3


def test_the_accepted_path_of_a_chain_is_its_count():
    for draft, predicted in zip(
        random_ids(100, 5, high=2, seed=1).tolist(), random_ids(100, 6, high=2, seed=2).tolist()
    ):
        path = accepted_path([7, *draft], list(range(-1, 5)), predicted)
        assert path == list(range(count_accepted(draft, predicted) + 1))
