"""Orders of summation as values, and float32 sums taken in them bit by bit.

Two float32 sums of the same terms differ by their order alone. An order is a plain value here (`orders`), with a
text form (`text`) and an exact evaluator (`evaluate`); `candidates` has the orders that libraries sum in, `infer`
finds the one that reproduces recorded bytes.
"""
