"""
Jacobi decoding: blocks of tokens solved by fixed-point iteration, token for token equal to greedy decoding.

Read `loop` first. Each of its iterations proposes tokens (`strategy`; three are `jacobi`, `candidates`, `lossless`),
runs the model over them (`feeding`), takes what the model confirms into the text (`verify`, `sampling`), and has the
model forget the rest (`memory`, `caches`). `block_size` says how many positions are tried.
"""
