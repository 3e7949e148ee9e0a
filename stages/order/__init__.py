"""The order in which many terms are summed: declared, revealed by probing, inferred from recorded bytes.

Two float32 sums of the same terms differ by their order alone. An order is a plain value here (`orders`), with a
text form (`text`) and a slow exact evaluator (`evaluate`). `reveal` finds the tree of a black box, `recognise` names
it, `probe` does both for a backend's stages; `infer` finds the order that reproduces recorded bytes.
"""
