"""What a run computes, written out from its formulas: plain torch and numpy, in fp64, one sample at a time.

Nothing here but the tests imports the project, so a mistake in it cannot be on both sides of a comparison;
``test_independence.py`` holds that. The formulas are those of docs/training.md and of the family's papers. What is fp32
in the project by contract (pixels, latents, noise, times, targets, text features) is fp32 here, in the same order of
operations, so that results agree to the rounding of fp64.

* ``draws.py``: keys, generators, permutations
* ``samples.py``: which samples make a step, which window and crop each has
* ``encoders.py``: the block transform and the byte text encoder
* ``mmdit.py``: the denoiser
* ``training.py``: objective, clipping, optimizers, schedule, moving average
* ``sampling.py``: times, guidance, Euler steps
"""
