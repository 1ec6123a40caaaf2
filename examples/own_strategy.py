"""
A decoding strategy of your own: what followed the last two tokens before is tried again.

    python examples/own_strategy.py --model MODEL --prompt "a b c a b"

The loop verifies what a strategy proposes, so that the text is the model's own whatever it is.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

import cllm_hf
from cllm_hf import Proposal


class LastTwoTokens:
    """Find the last two tokens earlier in the text, and propose what followed them there."""

    needs_tree = False  # proposals are chains

    def propose(self, rows, room):
        return [Proposal([row.anchor, *self.find(row.text, room.depth)]) for row in rows]

    def observe(self, row, path, predictions):
        pass  # nothing to learn from what was accepted; `row.text` has it already

    def find(self, text, length):
        for place in range(len(text) - 2, 1, -1):
            if text[place - 2 : place] == text[-2:]:
                return text[place : place + length]
        return []


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument("--prompt", required=True)
    arguments = parser.parse_args()
    cllm_hf.register_strategy("last_two_tokens", lambda options: LastTwoTokens())
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model)
    inputs = tokenizer(arguments.prompt, return_tensors="pt")
    options = {"decoding": "last_two_tokens", "jacobi_block_size": 8}
    output = model.generate(**inputs, **options, do_sample=False, max_new_tokens=64, return_dict_in_generate=True)
    print(tokenizer.decode(output.sequences[0]))
    print(f"{output.jacobi_stats.tokens_per_forward:.2f} tokens per forward pass")


if __name__ == "__main__":
    main()
