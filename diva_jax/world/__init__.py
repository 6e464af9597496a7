"""A small world of drawn images whose facts are known, in which the method can be tested on two CPU cores.

`scenes` has the facts, `drawing` the images, `captions` the texts, `records` both as a source of training data.
`pretrain` makes a CLIP that is blind to facts which captions seldom mention, and generators that are not; the results
are kept in `weights`. `blindness` measures which facts an encoder sees, `gaps` which facts a generator can teach,
`noise` how noisy its gradient is, and `experiment` tunes the CLIP with each method and compares. docs/DOES_IT_WORK.md
has the results.
"""
