"""Oracles for what no library decides: the papers' equations as plain float64 loops, one file a concept.

One example, one time step, one position at a time, in the papers' own vectors and matrices: nothing is batched, padded
or masked, so none of the mistakes that come from batching can be made.  Written from the papers; nothing is shared
with `reference_impl`.  The loops are over torch scalars and vectors where gradients are claimed.
"""
