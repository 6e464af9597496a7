"""A small world of drawn images whose facts are known, in which the method can be tested on two CPU cores.

`scenes` has the facts, `drawing` the images, `captions` the texts, `records` both as a source of training data.
`pretrain` makes a CLIP that is blind to a fact which captions seldom mention, and a generator that is not; the results
are kept in `weights`, and `criteria` says what they know. `experiment` tunes the CLIP with the `arms`, measures the
`endpoints` with `blindness`, and compares; `why` measures what an arm's gradient holds. docs/DOES_IT_WORK.md has the
results.
"""
