"""Which key blocks each query block attends to: one file a selector.

A selector sees an `Arrangement` (how the tokens lie in blocks) and, where it is dynamic, q and k in that order. It returns a
mask of blocks; `BlockList` turns it into the lists that a kernel walks along. Whatever a selector says, the diagonal, text
and what else is `required` stay.

A new selector is one file here, one line in `selector.SELECTORS`, one test file.
"""
