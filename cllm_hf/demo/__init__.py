"""`cllm demo`: make word problems, train a small model on them, make it a CLLM, and measure both."""
