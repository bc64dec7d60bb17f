def trial(rng, folder, shared): pass
