"""A tokenizer for models with random weights, which have no text."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def make_number_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Make a tokenizer without special tokens whose words are the numbers of the tokens, as in "7 31"."""
    tokenizer = Tokenizer(models.WordLevel({str(token): token for token in range(vocab_size)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)
