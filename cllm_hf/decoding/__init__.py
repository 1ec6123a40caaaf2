"""
Jacobi decoding: blocks of tokens solved by fixed-point iteration, token for token equal to greedy decoding.

Read `loop` first. Each of its iterations proposes tokens (`strategy`; three are `jacobi`, `candidates`, `lossless`),
runs the model over them (`feeding`), takes what the model confirms into the text (`verify`, `sampling`), and has the
model forget the rest (`memory`, `caches`). `rows` holds the state of a row, `block_size` how many positions are tried.
"""
