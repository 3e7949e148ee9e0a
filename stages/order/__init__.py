"""The order in which many terms are summed: revealed by probing, inferred from recorded bytes, computed in.

`reveal` finds the tree of a black box, `recognise` names it, `probe` does both for a backend's stages; `infer_recorded`
finds the orders of a recorded run, and `ordered_backend` computes in them.
"""
