"""
Stage 1 of a generative critic: traces of an oracle on partial solutions of the actor, to fit the critic to.

`sampling` draws solutions of the actor, `oracle` is who reasons about their states, `asking` asks about each once, and
`dataset` keeps the traces that the critic is to learn from. `journal` is how all of it survives being killed.
"""
