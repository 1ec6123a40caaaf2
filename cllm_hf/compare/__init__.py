"""`cllm compare`: one prompt, decoded in two ways side by side, in a terminal or on a page."""
